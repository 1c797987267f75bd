"""Examples to tensors, in literal numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.data.batches import flat, padded

ROWS: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [9, 10], "labels": [9, 10]},
]
PACKED: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, -100], "seq_lengths": [3, 2]},
    {"input_ids": [10], "labels": [10], "seq_lengths": [1]},
]


def lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in batch.items()}


def test_a_flat_batch_is_one_row_with_its_documents_side_by_side() -> None:
    assert lists(flat(ROWS)) == {
        "input_ids": [[5, 6, 7, 8, 9, 10]],
        "labels": [[-100, -100, 7, 8, -100, 10]],
        "position_ids": [[0, 1, 2, 3, 0, 1]],
        "lengths": [4, 2],
    }


def test_a_padded_batch_is_one_row_a_document() -> None:
    assert lists(padded(ROWS, pad_token_id=1)) == {
        "input_ids": [[5, 6, 7, 8], [9, 10, 1, 1]],
        "labels": [[-100, -100, 7, 8], [-100, 10, -100, -100]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "position_ids": [[0, 1, 2, 3], [0, 1, 0, 0]],
    }


def test_the_first_token_of_a_document_is_never_supervised() -> None:
    """Nothing in its document predicts it; in a flat row the last token of its neighbour would."""
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    assert flat(rows)["labels"].tolist() == [[-100, 6, -100, 8]]
    assert padded(rows)["labels"].tolist() == [[-100, 6], [-100, 8]]


def test_a_packed_row_is_taken_apart_into_its_documents() -> None:
    assert lists(flat(PACKED)) == {
        "input_ids": [[5, 6, 7, 8, 9, 10]],
        "labels": [[-100, 6, 7, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0]],
        "lengths": [3, 2, 1],
    }
    assert lists(padded(PACKED)) == {
        "input_ids": [[5, 6, 7], [8, 9, 0], [10, 0, 0]],
        "labels": [[-100, 6, 7], [-100, -100, -100], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0], [1, 0, 0]],
        "position_ids": [[0, 1, 2], [0, 1, 0], [0, 0, 0]],
    }


def test_an_end_token_that_also_pads_stays_supervised_and_attended() -> None:
    end = 2
    rows = [{"input_ids": [5, 6, end], "labels": [-100, 6, end]}, {"input_ids": [7, end], "labels": [-100, end]}]
    batch = padded(rows, pad_token_id=end)
    assert batch["labels"].tolist() == [[-100, 6, end], [-100, end, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, end], [7, end, end]]


@pytest.mark.parametrize(("multiple", "size"), [(1, 4), (3, 6), (4, 4), (8, 8)])
def test_padding_goes_on_to_a_multiple(multiple: int, size: int) -> None:
    batch = padded(ROWS, multiple=multiple)
    assert {tuple(x.shape) for x in batch.values()} == {(2, size)}
    assert batch["attention_mask"].sum() == 6
    assert (batch["labels"] != -100).sum() == 3


def test_weights_are_there_when_any_row_has_them() -> None:
    rows = [ROWS[0] | {"weights": [0.0, 0.0, 0.5, 2.0]}, ROWS[1]]
    assert flat(rows)["weights"].tolist() == [[0.0, 0.0, 0.5, 2.0, 1.0, 1.0]]
    assert padded(rows)["weights"].tolist() == [[0.0, 0.0, 0.5, 2.0], [1.0, 1.0, 0.0, 0.0]]
    assert "weights" not in flat(ROWS)
    assert "weights" not in padded(ROWS)
    assert "weights" not in flat([ROWS[0] | {"weights": None}])


def test_weights_of_packed_rows_stay_with_their_tokens() -> None:
    rows = [PACKED[0] | {"weights": [0.1, 0.2, 0.3, 0.4, 0.5]}]
    assert flat(rows)["weights"].tolist() == torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]]).tolist()
    assert padded(rows)["weights"].tolist() == torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]).tolist()


@pytest.mark.parametrize("labels", [{}, {"labels": None}], ids=["no column", "null"])
def test_rows_without_labels_are_supervised_everywhere_but_at_their_start(labels: dict[str, Any]) -> None:
    assert flat([{"input_ids": [5, 6, 7], **labels}])["labels"].tolist() == [[-100, 6, 7]]


@pytest.mark.parametrize("collate", [flat, padded])
def test_ids_and_labels_are_whole_numbers(collate: Any) -> None:
    batch = collate([row | {"weights": [1.0] * len(row["input_ids"])} for row in ROWS])
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].dtype == torch.int64
    assert batch["weights"].dtype == torch.float32


@pytest.mark.parametrize("collate", [flat, padded])
def test_rows_of_tensors_are_taken_too(collate: Any) -> None:
    """A data set with `with_format("torch")`."""
    rows = [{name: torch.tensor(values) for name, values in row.items()} for row in PACKED]
    assert lists(collate(rows)) == lists(collate(PACKED))


@pytest.mark.parametrize("collate", [flat, padded])
def test_the_rows_are_not_changed(collate: Any) -> None:
    rows = [{name: list(values) for name, values in row.items()} for row in ROWS]
    collate(rows)
    assert rows == ROWS
