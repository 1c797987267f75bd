"""Preparing data: the same with one process or several, cached by content, never from an old cache."""

import gc
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.test_layering import MODULES, ROOT, imports_of, path_of
from tunesmith.data import prepare as module
from tunesmith.data.cache import Store
from tunesmith.data.formats import FormatOptions
from tunesmith.data.prepare import Preparation, identity, prepare
from tunesmith.data.read import read_rows
from tunesmith.data.tokenize import EncodeOptions
from tunesmith.errors import TunesmithError

ROWS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(30)]


@pytest.fixture
def preparation(tokenizer: PreTrainedTokenizerBase) -> Preparation:
    return Preparation(tokenizer=tokenizer, encode=EncodeOptions(), formats=FormatOptions())


def placed(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"row {i}", row) for i, row in enumerate(rows))


def cached(rows: list[dict[str, Any]], preparation: Preparation, folder: Path, source: Any = None) -> bool:
    """Whether this preparation is answered from what earlier ones left in `folder`."""
    before = {path.name for path in folder.iterdir()} if folder.exists() else set()
    source = rows if source is None else source
    first, report = prepare(placed(rows), preparation, store=Store(folder), source=source)
    again, same = prepare(placed(rows), preparation, store=Store(folder), source=source)
    assert (first[:], report) == (again[:], same)
    return {path.name for path in folder.iterdir()} == before


def test_examples_are_what_the_rows_say_and_lie_on_the_disk(preparation: Preparation, tmp_path: Path) -> None:
    dataset, report = prepare(placed(ROWS), preparation, store=Store(tmp_path), source=ROWS)
    tokenizer = preparation.tokenizer
    assert dataset.column_names == ["input_ids", "labels"]
    assert tokenizer.decode(dataset[0]["input_ids"]) == "0+1=1<|im_end|>"
    assert [label for label in dataset[0]["labels"] if label != -100] == tokenizer.encode("1<|im_end|>")
    assert report.counts.rows == len(dataset) == 30
    assert all(Path(file["filename"]).is_relative_to(tmp_path) for file in dataset.cache_files)


def test_several_processes_give_the_same_examples_and_counts(
    preparation: Preparation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 4)
    rows = [*ROWS, {"prompt": "x" * 40, "completion": "lost"}]
    preparation = replace(preparation, encode=EncodeOptions(max_length=20))
    one, counted = prepare(placed(rows), preparation, store=Store(tmp_path / "one"))
    two, counted_too = prepare(placed(rows), replace(preparation, processes=2), store=Store(tmp_path / "two"))
    assert one[:] == two[:]
    assert counted == counted_too
    assert counted.counts.dropped == {"no supervised token within max_length 20": (1, ["row 30"])}


def test_a_mistake_in_a_row_comes_back_from_another_process(preparation: Preparation, tmp_path: Path) -> None:
    encode = EncodeOptions(max_length=4, overlong="error")
    with pytest.raises(TunesmithError, match=r"row 0: .* more than max_length 4"):
        prepare(placed(ROWS), replace(preparation, encode=encode, processes=2), store=Store(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_weights_are_kept_where_any_row_has_them_and_the_column_goes_where_none_has(
    preparation: Preparation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.data.tokenize.BATCH_ROWS", 10)
    rows: list[dict[str, Any]] = [*ROWS, {**ROWS[0], "weight": 0.5}]
    for _ in range(2):  # the second time from the cache
        dataset, _report = prepare(placed(rows), preparation, store=Store(tmp_path), source=rows)
        assert dataset[0]["weights"] is None
        assert max(dataset[30]["weights"]) == 0.5


def test_what_matters_changes_the_key(preparation: Preparation, tmp_path: Path) -> None:
    assert not cached(ROWS, preparation, tmp_path)
    assert cached([dict(row) for row in ROWS], preparation, tmp_path)
    assert not cached([*ROWS[:-1], {**ROWS[-1], "completion": "other"}], preparation, tmp_path)
    assert not cached(ROWS, replace(preparation, encode=EncodeOptions(max_length=9)), tmp_path)
    assert not cached(ROWS, replace(preparation, encode=EncodeOptions(train_on="all")), tmp_path)
    assert not cached(
        ROWS,
        replace(preparation, formats=FormatOptions(columns={"prompt": "completion", "completion": "prompt"})),
        tmp_path,
    )
    changed = AutoTokenizer.from_pretrained(preparation.tokenizer.name_or_path)
    changed.chat_template = "{{ messages }}"
    assert not cached(ROWS, replace(preparation, tokenizer=changed), tmp_path)
    changed = AutoTokenizer.from_pretrained(preparation.tokenizer.name_or_path)
    changed.add_tokens(["4+1"])
    assert not cached(ROWS, replace(preparation, tokenizer=changed), tmp_path)
    changed = AutoTokenizer.from_pretrained(preparation.tokenizer.name_or_path)
    changed.eos_token = "<|endoftext|>"
    assert not cached(ROWS, replace(preparation, tokenizer=changed), tmp_path)


def test_changed_code_never_meets_old_data(
    preparation: Preparation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not cached(ROWS, preparation, tmp_path)
    monkeypatch.setattr(module, "code_fingerprint", lambda: "another version")
    assert not cached(ROWS, preparation, tmp_path)


NOT_DECIDING = {"cache": "it stores what others decide", "workers": "they do what others decide"}


def test_the_code_that_decides_tokens_is_all_that_preparing_and_parsing_rows_import() -> None:
    """Whatever a row may pass through, by imports at any time, is in the one list or the other."""
    reached, queue = set[str](), ["tunesmith.data.prepare", "tunesmith.data.tokenize", "tunesmith.data.formats"]
    while queue:
        if (name := queue.pop()) in MODULES and name not in reached | {ROOT}:
            reached.add(name)
            queue += [found.module for found in imports_of(name)]
    names = {path_of(name).stem for name in reached if path_of(name).parent.name == "data"}
    assert names == {*module.DECIDING_MODULES, *NOT_DECIDING}


def test_only_code_that_decides_tokens_changes_the_key(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(Path(module.__file__).parent, folder)
    for name in ("samplers.py", "pack.py", "batches.py", "cache.py", "templates/chatml.jinja"):
        with (folder / name).open("a") as file:
            file.write("# changed")
    assert module.code_fingerprint(folder) == module.code_fingerprint()
    for name in module.DECIDING_MODULES:
        before = module.code_fingerprint.__wrapped__(folder)
        with (folder / f"{name}.py").open("a") as file:
            file.write("# changed")
        assert module.code_fingerprint.__wrapped__(folder) != before


def test_a_function_is_never_cached(preparation: Preparation, tmp_path: Path) -> None:
    formats = FormatOptions(formatting_func=lambda row: row["prompt"] + row["completion"])
    prepare(placed(ROWS), replace(preparation, formats=formats), store=Store(tmp_path), source=ROWS)
    assert list(tmp_path.iterdir()) == []


def test_a_template_with_a_date_is_prepared_anew_each_day(preparation: Preparation) -> None:
    preparation.tokenizer.chat_template = "{{ strftime_now('%Y') }}{{ messages }}"
    today = preparation.key("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "date", type("date", (), {"today": staticmethod(lambda: "tomorrow")}))
        assert preparation.key("rows") != today


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    first = identity(read_rows(str(file)))
    file.touch()
    assert identity(read_rows(str(file))) == first
    file.write_text('{"text": "b"}\n')
    assert identity(read_rows(str(file))) != first
    moved = tmp_path / "moved.jsonl"
    file.rename(moved)
    assert identity(read_rows(str(moved))) not in (None, first)


def test_a_copy_of_a_file_is_reported_under_its_own_name(preparation: Preparation, tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        file = tmp_path / name
        file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b", "weight": 0}\n')
        rows = read_rows(str(file))
        _, report = prepare(rows, preparation, store=Store(tmp_path / "store"), source=rows)
        assert [place for _, places in report.counts.dropped.values() for place in places] == [f"{file}, line 2"]


def test_a_dataset_is_known_by_its_content_and_a_live_transform_is_not_cached() -> None:
    one, two = Dataset.from_list(ROWS), Dataset.from_list(ROWS[1:])
    assert identity(one) != identity(two)
    assert identity(one.map(lambda row: {"prompt": row["prompt"] + "!"})) != identity(one)
    assert identity(one.with_transform(lambda batch: batch)) is None
    assert identity([object()]) is None


def test_the_collector_leaves_old_objects_out_meanwhile_and_is_as_it_was_afterwards(
    preparation: Preparation, tmp_path: Path
) -> None:
    before, meanwhile = gc.get_threshold(), []

    def rows() -> Iterator[Any]:
        meanwhile.append(gc.get_threshold())
        yield from placed(ROWS)

    prepare(rows(), preparation, store=Store(tmp_path))
    assert meanwhile == [(*before[:2], 2**30)]
    with pytest.raises(TunesmithError, match="is empty"):
        prepare(placed([]), preparation, store=Store(tmp_path))
    assert gc.get_threshold() == before


def test_nothing_left_is_an_error_with_the_reasons(preparation: Preparation, tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match="data set is empty"):
        prepare(placed([]), preparation, store=Store(tmp_path))
    rows = [{"prompt": "long enough", "completion": "x"}]
    with pytest.raises(TunesmithError, match=r"no example is left of 1 rows \(.*max_length 3: 1 \(row 0"):
        prepare(placed(rows), replace(preparation, encode=EncodeOptions(max_length=3)), store=Store(tmp_path))
    assert list(tmp_path.iterdir()) == []
