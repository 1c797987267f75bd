"""Sources to prepared, shuffled and packed data sets."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import datasets
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tests.train.runs import END, PAIR_ROWS, TEXT_ROWS, TEXTS
from tunesmith import SFTConfig, TunesmithError
from tunesmith.data.dataset import DataPreparer, evened, numbered

Prepare = Callable[..., Any]


@pytest.fixture
def prepare(config: Callable[..., SFTConfig], tokenizer: PreTrainedTokenizerBase) -> Prepare:
    def make(source: Any, packing: bool = False, **settings: Any) -> Any:
        return DataPreparer(config(**settings), tokenizer, None)(source, "train", packing=packing)

    return make


def documents(dataset: Dataset) -> list[list[int]]:
    """The ids of every document of packed rows, row by row."""
    found = []
    for row in dataset:
        assert isinstance(row, Mapping)
        ids = list(row["input_ids"])
        for length in row["seq_lengths"]:
            found.append(ids[:length])
            ids = ids[length:]
        assert not ids
    return found


def test_rows_are_numbered_from_zero_unless_they_know_their_place() -> None:
    rows: list[Any] = [{"text": "a"}, ("x.jsonl, line 7", {"text": "b"})]
    assert list(numbered(rows)) == [("row 0", {"text": "a"}), ("x.jsonl, line 7", {"text": "b"})]
    expected = [(f"row {i}", row) for i, row in enumerate(TEXT_ROWS)]
    assert list(numbered(Dataset.from_list(TEXT_ROWS))) == expected


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_documents_are_the_prepared_rows(strategy: str, prepare: Prepare) -> None:
    plain = prepare(PAIR_ROWS)
    packed = prepare(PAIR_ROWS, packing=True, max_length=40, packing_strategy=strategy)
    assert len(packed) < len(plain)
    assert all(len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 40 for row in packed)
    assert sorted(documents(packed)) == sorted(plain["input_ids"])
    pairs = sorted(zip(chain(*packed["input_ids"]), chain(*packed["labels"]), strict=True))
    assert pairs == sorted(zip(chain(*plain["input_ids"]), chain(*plain["labels"]), strict=True))


@pytest.mark.parametrize(
    ("strategy", "lengths"),
    [("bfd", [[8], [8]]), ("bfd_split", [[8], [8], [3, 2]]), ("wrapped", None)],
)
def test_overlong_examples_are_cut_as_the_strategy_says(
    strategy: str, lengths: list[list[int]] | None, prepare: Prepare
) -> None:
    rows = [{"text": "abcdefghi"}, {"text": "0123456789"}]  # 10 and 11 tokens with their ends
    packed = prepare(rows, packing=True, max_length=8, packing_strategy=strategy)
    if lengths is None:
        assert packed.column_names == ["input_ids", "labels"]
        assert [len(ids) for ids in packed["input_ids"]] == [8, 8, 5]
        assert list(chain(*packed["input_ids"])) == list(chain(*prepare(rows)["input_ids"]))
    else:
        assert sorted(packed["seq_lengths"], reverse=True) == sorted(lengths, reverse=True)


def test_weights_are_packed_with_their_tokens(prepare: Prepare) -> None:
    rows = [row | {"weight": 1.0 + i} for i, row in enumerate(TEXT_ROWS)]
    packed = prepare(rows, packing=True, max_length=40)
    weights: dict[float, list[int]] = {}
    for row in packed:
        for ids, weight in zip(row["input_ids"], row["weights"], strict=True):
            weights.setdefault(weight, []).append(ids)
    assert {weight: len(ids) for weight, ids in weights.items()} == {
        1.0 + i: len(text) + 1 for i, text in enumerate(TEXTS)
    }


def test_shuffling_follows_the_seed_and_keeps_rows_whole(prepare: Prepare) -> None:
    plain = prepare(PAIR_ROWS)
    first, again, other = (prepare(PAIR_ROWS, shuffle_dataset=True, seed=seed) for seed in (1, 1, 2))
    assert first[:] == again[:]
    assert first["input_ids"] != plain["input_ids"]
    assert first["input_ids"] != other["input_ids"]

    def rows(dataset: Any) -> list[Any]:
        return sorted(zip(dataset["input_ids"], dataset["labels"], strict=True))

    assert rows(first) == rows(plain)


def test_a_shuffled_data_set_is_packed_in_its_new_order(prepare: Prepare) -> None:
    packed = prepare(PAIR_ROWS, packing=True, max_length=40, shuffle_dataset=True)
    assert sorted(documents(packed)) == sorted(prepare(PAIR_ROWS)["input_ids"])


@pytest.mark.parametrize("kind", ["selected", "filtered", "concatenated"])
def test_a_data_set_of_any_history_is_read_in_its_own_order(kind: str, prepare: Prepare) -> None:
    dataset = Dataset.from_list(TEXT_ROWS)
    if kind == "selected":
        dataset, expected = dataset.select([5, 0, 3]), [TEXTS[5], TEXTS[0], TEXTS[3]]
    elif kind == "filtered":
        dataset, expected = dataset.filter(lambda row: len(row["text"]) < 4), [t for t in TEXTS if len(t) < 4]
    else:
        dataset, expected = datasets.concatenate_datasets([dataset, dataset]), TEXTS * 2
    assert [len(ids) for ids in prepare(dataset)["input_ids"]] == [len(text) + 1 for text in expected]


def test_columns_under_other_names_are_found(prepare: Prepare) -> None:
    rows = [{"question": "a", "answer": "b"}]
    assert prepare(rows, columns={"prompt": "question", "completion": "answer"})[0]["labels"][:1] == [-100]
    assert len(prepare([{"body": "abc"}], dataset_text_field="body")[0]["input_ids"]) == 4


def test_tokenized_rows_are_kept_with_their_labels(prepare: Prepare) -> None:
    rows = [{"input_ids": [5, 6, END], "labels": [-100, 6, END]}]
    assert prepare(rows)[:] == {"input_ids": [[5, 6, END]], "labels": [[-100, 6, END]]}


def test_what_was_prepared_is_not_prepared_again(
    config: Callable[..., SFTConfig], tokenizer: PreTrainedTokenizerBase
) -> None:
    preparer = DataPreparer(config(max_length=40), tokenizer, None)
    packed = preparer(PAIR_ROWS, "train", packing=True)
    assert preparer(packed, "eval", packing=False) is packed
    stream = preparer(Dataset.from_list(PAIR_ROWS).to_iterable_dataset(), "train", packing=False)
    assert preparer(stream, "eval", packing=False) is stream


def test_an_unprepared_data_set_is_passed_on_when_asked_for(prepare: Prepare) -> None:
    dataset = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}])
    assert prepare(dataset, dataset_kwargs={"skip_prepare_dataset": True}) is dataset


def test_an_empty_stream_is_an_error(prepare: Prepare) -> None:
    empty = Dataset.from_list(TEXT_ROWS).to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(TunesmithError, match="train data: the stream is empty"):
        prepare(empty)


def test_rows_of_a_stream_that_can_not_be_read_are_named(prepare: Prepare) -> None:
    stream = Dataset.from_list([*TEXT_ROWS, {"text": None}]).to_iterable_dataset()
    with pytest.raises(TunesmithError, match=f"row {len(TEXT_ROWS)}"):
        list(prepare(stream))


@pytest.mark.parametrize(("rows", "multiple", "length"), [(8, 4, 8), (7, 4, 8), (3, 8, 8), (5, 2, 6)])
@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packing"])
def test_a_data_set_is_evened_with_rows_without_labels(
    rows: int, multiple: int, length: int, packing: bool, prepare: Prepare
) -> None:
    weighted = [row | {"weight": 2.0} for row in PAIR_ROWS[:rows]]
    dataset = prepare(weighted, packing=packing, max_length=28)
    longer: Any = evened(dataset, multiple)
    if not packing:
        assert len(longer) == length
    assert len(longer) % multiple == 0
    assert longer[: len(dataset)] == dataset[:]
    for row in list(longer)[len(dataset) :]:
        assert row["labels"] == [-100]
        assert len(row["input_ids"]) == len(row["weights"]) == 1
        assert row.get("seq_lengths", [1]) == [1]
    if len(longer) != len(dataset):
        assert longer.total_dataset_length == len(dataset)


def test_a_stream_has_the_format_of_its_first_row_in_every_batch(prepare: Prepare) -> None:
    rows = [*PAIR_ROWS * 200, {"text": "another format"}]
    stream = prepare(Dataset.from_list(rows).to_iterable_dataset())
    with pytest.raises(TunesmithError, match=f"row {len(rows) - 1}: .*'prompt'"):
        list(stream)


def test_a_streams_end_tokens_are_known_before_training(
    config: Callable[..., SFTConfig], tokenizer: PreTrainedTokenizerBase
) -> None:
    preparer = DataPreparer(config(), tokenizer, None)
    preparer(Dataset.from_list(TEXT_ROWS).to_iterable_dataset(), "train", packing=False)
    assert preparer.stops == {END}


def test_a_stream_of_texts_without_an_end_is_refused_unless_allowed(prepare: Prepare) -> None:
    stream = Dataset.from_list([{"text": "cut before its end"}]).to_iterable_dataset()
    with pytest.raises(TunesmithError, match="no supervised token ends a text in the first 1 rows"):
        prepare(stream, max_length=4)
    assert len(list(prepare(stream, max_length=4, allow_no_eos=True))) == 1
