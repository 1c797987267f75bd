"""`on_bad_row: skip`: bad rows are left out, counted by reason and kept with their content; what is no row's fault is
not skipped."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from tunesmith import SFTConfig, TunesmithError
from tunesmith.cli.main import app
from tunesmith.data import prepare as preparing
from tunesmith.data.dataset import DataPreparer
from tunesmith.data.mixture import DataSource
from tunesmith.data.read import joined, read_rows
from tunesmith.data.skipped import BadRow, SkippedRows

GOOD = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(12)]
BAD: list[Any] = [
    {"prompt": "a", "completion": 3},
    {"question": "a"},
    "no object",
    {"prompt": "a", "completion": "half \ud800"},
    {"input_ids": [1, 2]},
]


@pytest.fixture
def preparer(preparer: Callable[..., DataPreparer]) -> Callable[..., DataPreparer]:
    return partial(preparer, on_bad_row="skip")


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def jsonl(path: Path, *lines: Any) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return jsonl(
        tmp_path / "rows.jsonl", GOOD[0], b'{"prompt": "a", "comp', GOOD[1], [1], b'{"prompt": "\xe9"}', *BAD[:2]
    )


def test_bad_rows_of_a_file_are_counted_by_reason_and_kept_with_line_and_content(
    file: Path, preparer: Callable[..., DataPreparer], tmp_path: Path
) -> None:
    preparing_run = preparer()
    dataset = preparing_run(read_rows(str(file)), "train", packing=False)
    assert len(dataset) == 2
    counts = preparing_run.counts["train"]
    assert (counts.rows, counts.examples, counts.skipped) == (7, 2, 5)
    assert counts.dropped["bad row: is a list, expected an object {...}"] == (1, [f"{file}, line 4"])
    notes = preparing_run.preflight().notes
    assert "train: 5 of 7 rows can't be used and are left out (on_bad_row: skip)" in notes
    preparing_run.save_skipped()
    kept = lines_of(tmp_path / "run" / "skipped_rows.jsonl")
    assert [record["line"] for record in kept] == [2, 4, 5, 6, 7]
    assert {record["file"] for record in kept} == {str(file)}
    assert kept[0]["raw"] == '{"prompt": "a", "comp'
    assert kept[0]["reason"].startswith("column 17: Unterminated string")
    assert kept[3]["content"] == BAD[0]
    assert kept[3]["split"] == "train"


def test_the_default_stops_at_the_first_bad_row(file: Path, preparer: Callable[..., DataPreparer]) -> None:
    with pytest.raises(TunesmithError, match=r"rows\.jsonl, line 2, column 17"):
        preparer(on_bad_row="error")(read_rows(str(file)), "train", packing=False)


def test_a_cached_preparation_reports_and_keeps_the_same_rows(
    file: Path, preparer: Callable[..., DataPreparer], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = preparer(), preparer()
    one = first(read_rows(str(file)), "train", packing=False)
    monkeypatch.setattr(preparing, "encoded", None)  # nothing can be prepared any more
    two = again(read_rows(str(file)), "train", packing=False)
    assert one[:] == two[:]
    assert list(first.skipped["train"]) == list(again.skipped["train"]) != []
    assert first.preflight().as_json() == again.preflight().as_json()


@pytest.mark.parametrize("processes", [None, 2])
def test_bad_rows_of_a_python_list_are_left_out_at_every_stage(
    preparer: Callable[..., DataPreparer], processes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "BATCH_ROWS", 4)
    rows = [*GOOD[:6], *BAD, *GOOD[6:]]
    preparing_run = preparer(dataset_num_proc=processes)
    dataset = preparing_run(rows, "train", packing=False)
    assert dataset[:] == preparer()(GOOD, "train", packing=False)[:]
    kept = list(preparing_run.skipped["train"])
    assert [record["row"] for record in kept] == [6, 7, 8, 9, 10]


def test_a_row_that_a_template_refuses_is_skipped_with_its_content(preparer: Callable[..., DataPreparer]) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    calling = {"messages": [turns[0], {"role": "assistant", "content": "", "tool_calls": [call]}], "tag": 7}
    preparing_run = preparer()
    assert len(preparing_run([{"messages": turns}, calling, {"messages": turns}], "train", packing=False)) == 2
    (record,) = preparing_run.skipped["train"]
    assert record["reason"].startswith("the chat template does not show tool calls")
    assert (record["row"], record["content"]) == (1, calling)


def test_several_sources_and_what_they_hold_out_skip_too(
    file: Path, preparer: Callable[..., DataPreparer], tmp_path: Path
) -> None:
    other = jsonl(tmp_path / "other.jsonl", *GOOD[2:], BAD[0], BAD[0])
    preparing_run = preparer()
    sources = {
        "a": DataSource(rows=read_rows(str(file))),
        "b": DataSource(rows=read_rows(str(other)), held_out=0.5),
    }
    dataset, held_out = preparing_run.mixture(sources, packing=False, eval_packing=False)
    assert len(dataset) + len(held_out["b"]) == 12
    preparing_run.save_skipped()
    kept = lines_of(tmp_path / "run" / "skipped_rows.jsonl")
    assert len(kept) == 7
    assert {record["split"] for record in kept} >= {"train/a"}
    both = joined([read_rows(str(file)), read_rows(str(other))])
    assert len(preparer()(both, "train", packing=False)) == 12


def test_a_stream_skips_as_it_comes_and_keeps_each_row_once(
    preparer: Callable[..., DataPreparer], tmp_path: Path
) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"prompt": "first", "completion": None}
        for number in range(100):
            yield {"prompt": "a", "completion": None if number == 80 else "b"}

    preparing_run = preparer()
    stream = preparing_run(IterableDataset.from_generator(rows), "train", packing=False)
    preparing_run.save_skipped()
    assert [len(list(stream)) for _ in range(2)] == [99, 99]
    kept = lines_of(tmp_path / "run" / "skipped_rows.jsonl")
    assert [record["place"] for record in kept] == ["row 0", "row 81"]
    resumed = preparer(resume_from_checkpoint="x")
    resumed(IterableDataset.from_generator(rows), "train", packing=False)
    resumed.save_skipped()
    assert lines_of(tmp_path / "run" / "skipped_rows.jsonl") == kept


def test_a_data_set_of_arrow_skips(preparer: Callable[..., DataPreparer]) -> None:
    rows = Dataset.from_list([*GOOD, {"prompt": "a", "completion": None}])
    assert len(preparer()(rows, "train", packing=False)) == 12


def test_a_function_that_raises_makes_a_bad_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    args = SFTConfig(output_dir=str(tmp_path), on_bad_row="skip", use_cpu=True)
    preparing_run = DataPreparer(args, tokenizer, lambda row: row["a"] + "!")
    assert len(preparing_run([{"a": "x"}, {"b": "y"}], "train", packing=False)) == 1
    (record,) = preparing_run.skipped["train"]
    assert record == {
        "place": "row 1",
        "row": 1,
        "reason": "formatting_func raised KeyError: 'a'",
        "content": {"b": "y"},
    }


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        ({}, [BAD[0], BAD[1]], "no example is left of 2 rows"),
        ({"train_on": "assistant"}, GOOD, "row 0: train_on: assistant needs conversations"),
        ({"overlong": "error", "max_length": 4}, [{"text": "a text too long"}], "more than max_length 4"),
        ({"columns": {"prompt": "question"}}, GOOD, "no column 'question'"),
    ],
)
def test_what_is_no_rows_fault_is_not_skipped(
    settings: dict[str, Any], rows: list[Any], message: str, preparer: Callable[..., DataPreparer]
) -> None:
    with pytest.raises(TunesmithError, match=message):
        preparer(**settings)(rows, "train", packing=False)


def test_a_file_in_another_encoding_is_not_skipped_line_by_line(
    tmp_path: Path, preparer: Callable[..., DataPreparer]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        "".join(f'{{"text": "{word}"}}\n' for word in ("café", "plain", "naïve", "über")).encode("latin-1")
    )
    with pytest.raises(TunesmithError, match=r"line 1: byte 13 \(0xe9\) .* 3 are not: .* WINDOWS-1252"):
        preparer()(read_rows(str(file)), "train", packing=False)
    one = b"".join(b'{"text": "caf\xc3\xa9"}\n' for _ in range(30)) + b'{"text": "\xe9"}\n'
    file.write_bytes(one)
    assert len(preparer()(read_rows(str(file)), "train", packing=False)) == 30


def test_a_table_skips_rows_but_not_what_an_open_quote_swallows(
    tmp_path: Path, preparer: Callable[..., DataPreparer]
) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b'prompt,completion\na,b\na\n"a"x,b\nc,d\n\xff,b\ne,\0\n' + b"f,\xc3\xa9\n" * 3)
    preparing_run = preparer()
    assert len(preparing_run(read_rows(str(file)), "train", packing=False)) == 5
    assert [record["line"] for record in preparing_run.skipped["train"]] == [3, 4, 6, 7]
    file.write_text('prompt,completion\na,b\n"c,d\ne,f\n')
    with pytest.raises(TunesmithError, match="line 3: unexpected end of data"):
        preparer()(read_rows(str(file)), "train", packing=False)


def test_what_is_kept_of_a_row_is_json_and_not_long() -> None:
    skipped = SkippedRows()
    contents: list[Any] = [
        "x" * 9000,
        {"a": "y" * 9000},
        {"a": float("nan")},
        {1: {2, 3}},
        _nested(5000),
        {"a": "\ud800"},
    ]
    skipped.add([(f"row {i}", BadRow(reason="r", content=content)) for i, content in enumerate(contents)])
    kept = list(skipped)
    assert len(kept) == 6
    assert all(len(record.get("raw", "")) <= 4000 for record in kept)
    assert kept[0]["characters"] == 9000
    assert kept[2]["raw"] == "{'a': nan}"
    assert kept[5]["content"] == {"a": "\ud800"}


def test_reasons_without_end_are_counted_together(preparer: Callable[..., DataPreparer]) -> None:
    preparing_run = preparer()
    names = ["x" * n for n in range(1, 40)]
    turns = [{"messages": [{"from": name, "value": "a"}]} for name in names]
    text = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    preparing_run([text, *turns], "train", packing=False)
    counts = preparing_run.counts["train"]
    assert counts.dropped["bad row: other reasons"][0] == 19
    assert sum(count for count, _ in counts.dropped.values()) == counts.skipped == 39


def _nested(depth: int) -> list[Any]:
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": _nested(5000)}, "row 0: lists or objects are nested too deeply"),
        ({1: "a"}, "row 0: a column is named 1, expected text"),
        ({None: "a"}, "row 0: a column is named None, expected text"),
        ({"conversations": [{"from": [], "value": "a"}]}, "row 0: 'from' of message 1 of 'conversations' is a list"),
        ({"messages": [{"role": "assistant", "tool_calls": 7}]}, "row 0: 'tool_calls' of message 1 of 'messages' must"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": 7}]}]}, "row 0: 'tool_calls' of message 1"),
        (("a", "b"), "row 0 is tuple, expected an object"),
        ({"text": "half \ud800"}, r"row 0: \\ud800 is half of a surrogate pair"),
        ({"text": "x" * 10_000_001}, "row 0: a text of 10,000,001 characters; at most 10,000,000 are read"),
    ],
)
def test_rows_that_no_tokenizer_could_take_are_refused(
    row: Any, message: str, preparer: Callable[..., DataPreparer]
) -> None:
    with pytest.raises(TunesmithError, match=message):
        preparer(on_bad_row="error")([row], "train", packing=False)


def test_check_shows_them_and_writes_nothing(file: Path, tiny_model: Path, tmp_path: Path) -> None:
    options = ["--model", tiny_model, "--data", file, "--eval-data", file, "--on-bad-row", "skip"]
    before = {*tmp_path.rglob("skipped_rows.jsonl")}
    done = CliRunner().invoke(app, ["check", *map(str, options)])
    assert done.exit_code == 0, done.output
    assert "eval: 5 of 7 rows can't be used and are left out (on_bad_row: skip)" in done.output
    assert f"bad row: is a list, expected an object {{...}}: {file}, line 4" in done.output
    report = json.loads(CliRunner().invoke(app, ["check", *map(str, options), "--json"]).stdout)
    assert report["splits"]["train"]["counts"]["skipped"] == 5
    assert {*tmp_path.glob("*/skipped_rows.jsonl")} == before
