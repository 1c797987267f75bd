"""Sources to prepared, shuffled and packed data sets."""

import json
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tests.train.runs import END, PAIR_ROWS, REASONING, TALKS, TEXT_ROWS, TEXTS
from tunesmith import TunesmithError
from tunesmith.data.dataset import DataPreparer
from tunesmith.data.mixture import DataSource
from tunesmith.data.read import joined, read_rows
from tunesmith.data.samplers import by_document
from tunesmith.types import Text

Prepare = Callable[..., Any]


@pytest.fixture
def prepare(preparer: Callable[..., DataPreparer]) -> Prepare:
    def make(source: Any, packing: bool = False, **settings: Any) -> Any:
        return preparer(**settings)(source, "train", packing=packing)

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


def test_what_was_prepared_is_not_prepared_again(preparer: Callable[..., DataPreparer]) -> None:
    prepare = preparer(max_length=40)
    packed = prepare(PAIR_ROWS, "train", packing=True)
    assert prepare(packed, "eval", packing=False) is packed
    stream = prepare(Dataset.from_list(PAIR_ROWS).to_iterable_dataset(), "train", packing=False)
    assert prepare(stream, "eval", packing=False) is stream


def test_the_first_rows_are_those_of_each_source_and_what_is_not_trained_on_comes_first(
    preparer: Callable[..., DataPreparer],
) -> None:
    prepare = preparer()
    prepare([{"text": f"t{n}"} for n in range(70)], "train", packing=False)
    prepare([{"text": "e"}], "eval", packing=False)
    assert list(prepare.rows(trained_on=False)) == [Text(text="e")]
    assert list(prepare.rows(trained_on=True)) == [Text(text=f"t{n}") for n in range(64)]
    assert list(prepare.first_rows()) == [*prepare.rows(trained_on=False), *prepare.rows(trained_on=True)]
    assert {split: len(examples) for split, examples in prepare.examples.items()} == {"train": 70, "eval": 1}


def test_an_unprepared_data_set_is_passed_on_when_asked_for(prepare: Prepare) -> None:
    dataset = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}])
    assert prepare(dataset, dataset_kwargs={"skip_prepare_dataset": True}) is dataset
    masked = Dataset.from_list([{"input_ids": [1, 2], "assistant_masks": [0, 1], "completion_mask": [0, 1]}])
    with pytest.raises(
        TunesmithError, match=r"assistant_masks and completion_mask would be ignored. Add a 'labels' col"
    ):
        prepare(masked, dataset_kwargs={"skip_prepare_dataset": True})


def test_splits_are_not_mixed_as_if_they_were_sources(preparer: Callable[..., DataPreparer]) -> None:
    rows = Dataset.from_list(TEXT_ROWS)
    splits = datasets.DatasetDict(train=rows, test=rows)
    with pytest.raises(TunesmithError, match=r"the splits 'train', 'test', .* `train_dataset=data\['train'\]`"):
        preparer().everything(splits, None)
    _, evaluated = preparer().everything(rows, splits)
    assert list(evaluated) == ["train", "test"]


def test_an_empty_stream_is_an_error(prepare: Prepare) -> None:
    empty = Dataset.from_list(TEXT_ROWS).to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(TunesmithError, match="train data: the stream is empty"):
        prepare(empty)


def test_rows_of_a_stream_that_can_not_be_read_are_named(prepare: Prepare) -> None:
    stream = Dataset.from_list([*TEXT_ROWS, {"text": None}]).to_iterable_dataset()
    with pytest.raises(TunesmithError, match=f"row {len(TEXT_ROWS)}"):
        list(prepare(stream))


def test_a_stream_has_the_format_of_its_first_row_in_every_batch(prepare: Prepare) -> None:
    rows = [*PAIR_ROWS * 200, {"text": "another format"}]
    stream = prepare(Dataset.from_list(rows).to_iterable_dataset())
    with pytest.raises(TunesmithError, match=f"row {len(rows) - 1}: .*'prompt'"):
        list(stream)


def test_a_streams_end_tokens_are_known_before_training(preparer: Callable[..., DataPreparer]) -> None:
    prepare = preparer()
    prepare(Dataset.from_list(TEXT_ROWS).to_iterable_dataset(), "train", packing=False)
    assert prepare.stops == {END}


def test_a_stream_of_texts_without_an_end_is_refused_unless_allowed(prepare: Prepare) -> None:
    stream = Dataset.from_list([{"text": "cut before its end"}]).to_iterable_dataset()
    with pytest.raises(TunesmithError, match="no supervised token ends a text in the first 1 rows"):
        prepare(stream, max_length=4)
    assert len(list(prepare(stream, max_length=4, allow_no_eos=True))) == 1


def test_roles_that_the_chat_template_mentions_and_merged_turns_are_prepared(
    preparer: Callable[..., DataPreparer], tokenizer: Any
) -> None:
    tokenizer.chat_template = tokenizer.chat_template + "{# 'critic' #}"
    said = ("system", "Be brief"), ("developer", "Be kind"), ("critic", "Hm"), ("model", "Yes"), ("assistant", "No")
    rows = [{"messages": [{"role": role, "content": content} for role, content in said]}]
    dataset = preparer(merge_turns=True, train_on="assistant")(rows, "train", packing=False)
    text = (
        "<|im_start|>system\nBe brief\n\nBe kind<|im_end|>\n<|im_start|>critic\nHm<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = "Yes\n\nNo<|im_end|>"
    assert tokenizer.decode(dataset[0]["input_ids"]).rstrip() == text + answer
    assert tokenizer.decode([label for label in dataset[0]["labels"] if label != -100]).rstrip() == answer


@pytest.mark.parametrize("key", [{"train": False}, {"loss": False}, {"loss_weight": 0}, {"masked": True}])
def test_an_answer_that_is_not_to_be_trained_on_is_not(
    key: dict[str, Any], preparer: Callable[..., DataPreparer], tokenizer: Any
) -> None:
    turns: tuple[tuple[str, str, dict[str, Any]], ...]
    turns = ("human", "Hi", {}), ("gpt", "Yes", key), ("human", "Why?", {"train": False}), ("gpt", "So", {})
    rows = [{"conversations": [{"from": name, "value": text, **keys} for name, text, keys in turns]}]
    for source in (rows, Dataset.from_list(rows)):
        dataset = preparer(train_on="assistant")(source, "train", packing=False)
        assert tokenizer.decode([label for label in dataset[0]["labels"] if label != -100]).rstrip() == "So<|im_end|>"


# Arrow has a null where a row lacks a key that another row has

SHOWS_TOOLS = """{{ tools | tojson }}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def call_of(function: str, **arguments: Any) -> dict[str, Any]:
    """A row that calls `function`, of one argument."""
    call = {"type": "function", "function": {"name": function, "arguments": arguments}}
    properties = {name: {"type": "string"} for name in arguments}
    messages = [{"role": "user", "content": function}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {
        "messages": messages,
        "tools": [{"type": "function", "function": {"name": function, "parameters": {"properties": properties}}}],
    }


CALLS = [call_of("weather", city="Taipei"), call_of("stock", ticker="TSM")]


def saved(folder: Path, kind: str) -> str:
    """`CALLS` in a file or a folder that Arrow wrote."""
    data, path = Dataset.from_list(CALLS), folder / kind
    if kind == "saved":
        data.save_to_disk(path)
    elif kind == "rows.arrow":
        (folder / "made").mkdir()
        data.save_to_disk(folder / "made")
        next((folder / "made").glob("*.arrow")).rename(path)
    else:
        data.to_parquet(path)
    return str(path)


@pytest.mark.parametrize(
    "kind",
    [
        *("rows.parquet", "parquet.jsonl", "rows.arrow", "saved", "joined", "hub"),
        *("Dataset", "named", "DataSource", "held out", "IterableDataset", "formatting_func"),
    ],
)
def test_no_null_of_arrow_is_trained_on(
    kind: str,
    tmp_path: Path,
    preparer: Callable[..., DataPreparer],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer.chat_template = SHOWS_TOOLS
    prepare, data = preparer(max_length=None), Dataset.from_list(CALLS)
    assert data[0]["tools"][0]["function"]["parameters"]["properties"]["ticker"] is None
    expected = prepare(CALLS, "train", packing=False)["input_ids"]
    assert '"arguments": {"city": "Taipei"}' in tokenizer.decode(expected[0])
    made: Any
    if kind in ("named", "DataSource", "held out"):
        source = DataSource(rows=data, held_out=0.5 if kind == "held out" else 0)
        made, held_out = prepare.mixture(
            {"calls": data if kind == "named" else source}, packing=False, eval_packing=False
        )
        rows = [*made["input_ids"], *chain(*(rows["input_ids"] for rows in held_out.values()))]
        assert len(held_out) == (kind == "held out")
    else:
        if kind == "hub":
            monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
            made = read_rows("owner/calls")
        elif kind == "joined":
            (tmp_path / "rows.jsonl").write_text(json.dumps(CALLS[0]) + "\n")
            parquet = read_rows(saved(tmp_path, "rows.parquet"))
            made, expected = joined([read_rows(str(tmp_path / "rows.jsonl")), parquet]), [expected[0], *expected]
        elif kind == "formatting_func":
            prepare = DataPreparer(prepare.args, tokenizer, dict)
            made = data
        else:
            made = {"Dataset": data, "IterableDataset": data.to_iterable_dataset()}.get(kind)
            made = read_rows(saved(tmp_path, kind)) if made is None else made
        rows = [row["input_ids"] for row in prepare(made, "train", packing=False)]
    assert sorted(rows) == sorted(expected)


def test_a_null_that_somebody_wrote_is_trained_on(
    tmp_path: Path, preparer: Callable[..., DataPreparer], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = SHOWS_TOOLS
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(call_of("weather", city=None)) + "\n")
    text = {"messages": CALLS[0]["messages"], "tools": json.dumps([{"name": "f", "default": None}])}
    Dataset.from_list([text]).to_parquet(tmp_path / "rows.parquet")
    prepare = preparer(max_length=None)
    for source, shown in (("rows.jsonl", '"arguments": {"city": null}'), ("rows.parquet", '"default": null}')):
        (ids,) = prepare(read_rows(str(tmp_path / source)), "train", packing=False)["input_ids"]
        assert shown in tokenizer.decode(ids)


def test_the_same_values_with_nulls_of_arrow_and_with_nulls_of_the_user_are_different_data(
    preparer: Callable[..., DataPreparer], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = SHOWS_TOOLS
    prepare, padded = preparer(max_length=None), Dataset.from_list(CALLS)
    sources = {"a": DataSource(rows=padded, held_out=0.5), "b": DataSource(rows=padded.to_list(), held_out=0.5)}
    for name, source in sources.items():
        made, _ = prepare.mixture({"same": source}, packing=False, eval_packing=False)
        assert ("null" in tokenizer.decode(made[0]["input_ids"])) == (name == "b")


def test_a_conversation_of_several_documents_is_one_example_in_the_preflight(
    preparer: Callable[..., DataPreparer], tokenizer: Any
) -> None:
    tokenizer.chat_template = REASONING
    prepare = preparer(train_on="assistant", max_length=256)
    dataset = prepare([*TALKS, TALKS[0]], "train", packing=False)
    report = prepare.reports["train"]
    assert (report.counts.examples, report.duplicates, report.without_end) == (5, 1, 0)
    assert [max(parents) for parents in dataset["parents"]] == [1, 1, 1, 1, 1]
    assert report.longest == max(map(len, dataset["input_ids"])) < 256
    assert report.counts.tokens == sum(map(len, dataset["input_ids"]))
    # Each turn once: the block of its reasoning, its answer, and its end, of a token a character.
    spoken = [m for talk in [*TALKS, TALKS[0]] for m in talk["messages"] if m["role"] == "assistant"]
    block = len("<think>\n" + "\n</think>\n\n") + 1
    assert report.counts.supervised == sum(block + len(m["reasoning_content"] + m["content"]) for m in spoken)
    assert prepare.preflight().problems == []


def test_a_conversation_is_divided_rather_than_cut_where_its_documents_are_short_enough(
    preparer: Callable[..., DataPreparer], tokenizer: Any
) -> None:
    tokenizer.chat_template = REASONING
    whole = preparer(train_on="assistant", max_length=None)(TALKS[:1], "train", packing=False)
    longest = max(len(row["input_ids"]) for row in by_document(whole))
    prepare = preparer(train_on="assistant", max_length=longest)
    for packing in (False, True):
        dataset = prepare(TALKS[:1], "train", packing=packing)
        assert {*map(tuple, by_document(dataset)["labels"])} == {*map(tuple, by_document(whole)["labels"])}
        assert len(dataset) > 1
        assert prepare.counts["train"].truncated == 0
        assert all(len(ids) <= longest for ids in dataset["input_ids"])
