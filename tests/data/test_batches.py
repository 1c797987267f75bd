"""Examples to tensors, in literal numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import flat, padded
from tunesmith.data.batches import Batch, FlatCollator, PaddedCollator, documents_of, one_group_of
from tunesmith.errors import TunesmithError
from tunesmith.types import Example

ROWS: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [9, 10], "labels": [9, 10]},
]
PACKED: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, -100], "seq_lengths": [3, 2]},
    {"input_ids": [10], "labels": [10], "seq_lengths": [1]},
]


def lists(batch: Batch) -> dict[str, Any]:
    """What a batch holds for the model and the loss, without what is unset."""
    values = {name: getattr(batch, name) for name in ("labels", "weights", "places", "lengths", "parents")}
    values |= batch.tensors()
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in values.items()
        if value is not None
    }


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
    assert {tuple(x.shape) for x in batch.tensors().values()} == {(2, size)}
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


# What a batch knows of itself


def documents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    return [(example.input_ids, example.labels) for example in batch.documents]


@pytest.mark.parametrize("collate", [flat, padded])
def test_a_batch_keeps_its_documents_each_a_group_of_its_own(collate: Any) -> None:
    batch = collate(PACKED)
    assert documents(batch) == [([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, -100]), ([10], [-100])]
    assert [len(group) for group in batch.groups] == [1, 1, 1]


@pytest.mark.parametrize(("collate", "computed"), [(flat, 6), (padded, 8)])
def test_tokens_supervision_and_weight_are_counted_without_padding(collate: Any, computed: int) -> None:
    rows = [ROWS[0] | {"weights": [9.0, 9.0, 0.5, 2.0]}, ROWS[1]]
    batch = collate(rows)
    assert (batch.computed_tokens, int(batch.tokens), int(batch.supervised)) == (computed, 6, 3)
    assert float(batch.weight) == 3.5
    assert int(collate(ROWS).weight) == 3


def test_with_shared_prefixes_all_tokens_are_read_and_fewer_computed() -> None:
    rows = [{"input_ids": [5, 6, 7, 8, last], "labels": [-100, 6, 7, 8, last]} for last in (1, 2, 3)]
    batch = flat(rows, share_prefix=True)
    assert (batch.computed_tokens, int(batch.tokens), int(batch.supervised)) == (7, 15, 12)
    assert batch.targets().tokens.tolist() == [6, 7, 8, 1, 6, 7, 8, 2, 6, 7, 8, 3]
    assert batch.targets().positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("collate", [flat, padded])
def test_values_of_supervised_positions_are_dealt_to_their_documents(collate: Any) -> None:
    batch = collate([*ROWS, {"input_ids": [11, 12], "labels": [-100, -100]}])
    parts = batch.by_document(torch.arange(3.0))
    assert [part.tolist() for part in parts] == [[0.0, 1.0], [2.0], []]


def test_a_batch_reads_as_a_mapping_of_its_tensors() -> None:
    batch = padded(ROWS)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids"} == set(dict(**batch))
    assert "weights" not in batch
    assert batch.get("weights") is None


def test_a_batch_goes_to_a_device_whole_and_keeps_its_documents() -> None:
    batch = flat([row | {"weights": [1.0] * len(row["input_ids"])} for row in ROWS])
    moved = batch.to("meta")
    assert {name: tensor.device.type for name, tensor in moved.tensors().items()} == dict.fromkeys(
        batch.tensors(), "meta"
    )
    assert (moved.groups, moved.lengths) == (batch.groups, batch.lengths)


def test_what_a_users_collator_adds_reaches_the_model() -> None:
    made = {
        "input_ids": torch.ones(1, 2, dtype=torch.int64),
        "labels": torch.ones(1, 2),
        "token_type_ids": torch.ones(1),
    }
    batch = Batch.of(made)
    assert batch.groups == ()
    assert set(batch.inputs()) == {"input_ids", "token_type_ids"}
    assert batch.to("meta").inputs()["token_type_ids"].device.type == "meta"


# Parts of a batch


@pytest.mark.parametrize("collator", [FlatCollator(), PaddedCollator()])
def test_a_batch_is_split_into_parts_that_hold_all_of_it_in_order(collator: Any) -> None:
    rows = [{"input_ids": [first, *range(20, 20 + size)]} for first, size in enumerate((3, 1, 5, 2, 2), start=1)]
    batch = collator(rows)
    parts = collator.split(batch, 8)
    assert [[example.input_ids[0] for example in part.documents] for part in parts] == [
        [1, 2],
        [
            3,
        ],
        [4, 5],
    ]
    assert all(part.computed_tokens <= 8 for part in parts)
    assert [row for part in parts for row in documents(part)] == documents(batch)
    assert collator.split(batch, 1000) == [batch]


@pytest.mark.parametrize("collator", [FlatCollator(read=one_group_of), PaddedCollator(read=one_group_of)])
def test_a_group_is_never_divided(collator: Any) -> None:
    pair = {"input_ids": [5, 6, 7, 5, 8], "labels": [-100, 6, 7, -100, 8], "seq_lengths": [3, 2]}
    batch = collator([pair, pair])
    assert [len(group) for group in batch.groups] == [2, 2]
    parts = collator.split(batch, 1)
    assert [documents(part) for part in parts] == [[([5, 6, 7], [-100, 6, 7]), ([5, 8], [-100, 8])]] * 2


def test_documents_of_a_conversation_stay_together_where_they_share_and_are_divided_where_they_do_not() -> None:
    front = [*range(10, 20)]
    tree = {"input_ids": [*front, 5, 6, 7], "seq_lengths": [10, 1, 2], "parents": [-1, 0, 0]}
    row = tree | {"labels": [-100] * 10 + [5, 6, 7]}
    first, second = ([*front, 5], [-100] * 10 + [5]), ([*front, 6, 7], [-100] * 10 + [6, 7])
    together, apart = FlatCollator(), PaddedCollator(read=documents_of)
    batch = together([row, row])
    assert (batch.computed_tokens, batch.parents) == (26, [-1, 0, 0, -1, 3, 3])
    assert [documents(part) for part in together.split(batch, 20)] == [[first, second]] * 2
    assert [part.computed_tokens for part in together.split(batch, 20)] == [13, 13]
    assert [documents(part) for part in apart.split(apart([row]), 20)] == [[first], [second]]


def test_the_targets_of_an_example_leave_its_first_token_out() -> None:
    example = Example(input_ids=[5, 6, 7], labels=[5, 6, -100])
    assert (example.supervised, example.target_count) == (2, 1)


def test_a_document_without_tokens_shifts_nothing_behind_it() -> None:
    batch = flat([{"input_ids": []}, {"input_ids": [5, 6]}])
    assert (batch.labels.tolist(), batch.lengths) == ([[-100, 6]], [0, 2])
    assert (batch.targets().positions.tolist(), batch.targets().tokens.tolist()) == ([0], [6])


def test_padding_to_a_multiple_is_part_of_what_a_batch_costs() -> None:
    collator = PaddedCollator(multiple=64)
    batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    assert collator.cost(batch.groups) == batch.computed_tokens == 128
    assert [part.computed_tokens for part in collator.split(batch, 64)] == [64, 64]


def test_a_collator_that_makes_no_batch_is_named_with_what_it_made() -> None:
    with pytest.raises(TunesmithError, match="data_collator returned pixels, labels, without input_ids; a batch needs"):
        Batch.of({"pixels": torch.ones(1), "labels": torch.ones(1, 2)})


def test_batches_are_told_apart_by_identity() -> None:
    batch = flat(ROWS)
    assert batch == batch
    assert batch != flat(ROWS)
    assert len({batch, flat(ROWS)}) == 2
