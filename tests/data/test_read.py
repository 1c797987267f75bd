"""Rows come out as the file has them, each with its place; a damaged file is refused with the place of the damage."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.read import Rows, numbered_lines, read_rows, with_places
from tunesmith.errors import TunesmithError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def opened(folder: Path, name: str, content: bytes | str) -> Rows:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(str(path))


def rows_of(folder: Path, name: str, content: bytes | str) -> list[dict[str, Any]]:
    return [row for _, row in opened(folder, name, content)]


def places_of(folder: Path, name: str, content: bytes | str) -> list[str]:
    return [place.removeprefix(f"{folder}/") for place, _ in opened(folder, name, content)]


def test_jsonl_rows_keep_their_own_keys_without_nulls_for_those_of_others(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "rows.jsonl", '{"a": 1}\n{"b": {"c": []}}\n{"b": {"d": null}}\n')
    assert rows == [{"a": 1}, {"b": {"c": []}}, {"b": {"d": None}}]


def test_blank_lines_byte_order_mark_windows_lines_and_line_separators_in_text_are_fine(tmp_path: Path) -> None:
    text = '\ufeff{"a": "one\u2028two\x85three"}\r\n\r\n  \n{"a": "x"}'
    assert rows_of(tmp_path, "rows.ndjson", text) == [{"a": "one\u2028two\x85three"}, {"a": "x"}]
    assert places_of(tmp_path, "rows.ndjson", text) == ["rows.ndjson, line 1", "rows.ndjson, line 4"]


def test_jsonl_is_streamed_and_can_be_read_again(tmp_path: Path) -> None:
    rows = opened(tmp_path, "rows.jsonl", '{"a": 1}\nbroken\n')
    assert next(iter(rows))[1] == next(iter(rows))[1] == {"a": 1}
    with pytest.raises(TunesmithError, match="line 2"):
        list(rows)


@given(rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=4), min_size=1, max_size=5), escaped=st.booleans())
def test_any_json_rows_come_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], escaped: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    assert rows_of(folder, "any.jsonl", "\n".join(lines)) == rows
    assert rows_of(folder, "any.json", json.dumps(rows, ensure_ascii=escaped)) == rows


def test_a_json_file_is_a_list_or_an_object_with_one_list(tmp_path: Path) -> None:
    assert places_of(tmp_path, "rows.json", '[{"a": 1}, {"a": 2}]') == ["rows.json, row 1", "rows.json, row 2"]
    assert places_of(tmp_path, "rows.json", '{"version": 1, "data": [{"a": 1}]}') == ["rows.json, row 1 of 'data'"]


def test_tables_give_text_values_and_the_line_where_a_row_begins(tmp_path: Path) -> None:
    text = 'prompt,completion\r\n"a, ""b""\nc",1\n\nd,\n'
    assert rows_of(tmp_path, "rows.csv", text) == [
        {"prompt": 'a, "b"\nc', "completion": "1"},
        {"prompt": "d", "completion": ""},
    ]
    assert places_of(tmp_path, "rows.csv", text) == ["rows.csv, line 2", "rows.csv, line 5"]
    assert rows_of(tmp_path, "rows.TSV", "a\tb\n1,5\t2\n") == [{"a": "1,5", "b": "2"}]


def test_a_table_may_hold_a_long_document(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "rows.csv", f"text\n{'x' * 1_000_000}\n") == [{"text": "x" * 1_000_000}]


def test_each_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "rows.txt", "  one \r\n\n\ttwo\n") == [{"text": "  one "}, {"text": "\ttwo"}]


def test_parquet_rows_keep_their_types(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "n": 1}, {"messages": [], "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = read_rows(str(tmp_path / "rows.parquet"))
    assert [row for _, row in source] == rows
    assert [place for place, _ in source] == [f"{tmp_path}/rows.parquet, row {i}" for i in (1, 2)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": "tru', r"a\.jsonl, line 2, column 7: Unterminated string.*cut off"),
        ("a.jsonl", '{"a": 1}\n{"a" 1}\n', r"line 2, column 6: Expecting ':' delimiter$"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is a list, expected an object"),
        ("a.jsonl", '{"a": 1}\nnull\n', "line 2 is null, expected an object"),
        ("a.jsonl", '[{"a": 1}]\n', r"line 1 is a list.*name it \.json"),
        ("a.jsonl", '{\n"a": 1\n}\n', r"line 1, column 2.*name the file \.json$"),
        ("a.jsonl", '{"a": {"b": 1, "b": 2}}\n', "line 1: the key 'b' is given twice"),
        ("a.jsonl", '{"a": "\\ud83d"}\n', r"line 1: \\ud83d is half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000, "line 1: lists or objects are nested too deeply"),
        ("a.jsonl", '{"a": "é"}\n'.encode() + b'{"a": "\xe9"}\n', r"line 2: byte 19 \(0xe9\) is not UTF-8"),
        ("a.jsonl", b'\xef\xbb\xbf{"a": "\xe9"}\n', r"line 1: byte 10 \(0xe9\)"),
        ("a.jsonl", '{"a": 1}\n{"a": "\0"}\n', "line 2: there is a NUL at byte 16"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "line 1: the file is UTF-16"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16-le"), "line 1: the file is UTF-16"),
        ("a.jsonl", '{"a": 1}\n{"a": NaN}\n', "line 2: NaN is not a number in JSON; write null"),
        ("a.jsonl", '{"a": [-Infinity]}\n', "line 1: -Infinity is not a number"),
        ("a.json", '[{"a": 1e999}]', r"a\.json: 1e999 is not a number in JSON"),
        ("a.jsonl", '{"a": 1}\n[\n', r"line 2, column 2: Expecting value"),
        ("a.jsonl", '{"a": 1' + "0" * 5000 + "}", "line 1: Exceeds the limit"),
        ("a.jsonl", b"\x1f\x8b\x08\x00rest", "line 1: the file is gzip-compressed; unpack it first"),
        ("a.csv", b"PK\x03\x04rest", "line 1: the file is a zip archive .* save it as .csv"),
        ("a.txt", b"PAR1rest", "line 1: the file is a Parquet file; name it .parquet"),
        ("a.jsonl.gz", b"\x1f\x8b", r"files named \*\.gz can't be read; unpack it first; known are"),
        ("a.jsonl", "", "is an empty file"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.json", '[{"a": 1}, 2]', r"a\.json, row 2 is a number, expected an object"),
        ("a.json", '[\n{"a": 1},\n{"a', r"line 3, column 2.*cut off"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', r"line 2, column 1: Extra data; .*name the file \.jsonl"),
        ("a.json", '{"a": 1}', "holds an object with no list"),
        ("a.json", '{"a": [], "b": []}', "with the lists 'a', 'b'"),
        ("a.json", '{"messages": [{"role": "user"}]}', "holds a single row; put it in a list"),
        ("a.json", '"text"', "holds text, expected a list"),
        ("a.json", '[{"a": 1, "a": 2}]', "the key 'a' is given twice"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 values, but the header has 2 names"),
        ("a.csv", "a,b\n1\n", "line 2 has 1 values, but the header has 2 names"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "line 2: unexpected end of data"),
        ("a.csv", "a,a\n1,2\n", "line 1: the column 'a' is there twice"),
        ("a.csv", "a,\n1,2\n", "line 1: a column has no name"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.txt", "\n \n", "has no rows"),
        ("a.txt", b"one\ntw\xf6\n", r"line 2: byte 6 \(0xf6\)"),
        ("a.parquet", "PAR1 not really", "not a Parquet file"),
        ("a.xlsx", "x", r"files named \*\.xlsx can't be read; known are \.jsonl"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    with pytest.raises(TunesmithError, match=message):
        list(opened(tmp_path, name, content))


def test_a_missing_file_comes_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(TunesmithError, match=r"no file .*rows\.json; did you mean 'rows\.jsonl'\?"):
        read_rows(str(tmp_path / "rows.json"))
    with pytest.raises(TunesmithError, match=r"there is no folder .*nowhere"):
        read_rows(str(tmp_path / "nowhere" / "rows.jsonl"))


def test_a_folder_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(TunesmithError, match=r"is a folder, expected a file; it holds rows\.jsonl"):
        read_rows(str(tmp_path))


def test_a_data_set_with_a_loading_script_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "name").mkdir()
    script = tmp_path / "name" / "name.py"
    script.write_text("raise SystemExit")
    for source in (script.parent, script):
        with pytest.raises(TunesmithError, match="loading script run code of others, and are not supported"):
            read_rows(str(source))
    # A name of the hub is not a folder here: what `datasets` says for a script is passed on in our words.
    from datasets import load_dataset

    monkeypatch.setattr("datasets.load_dataset", lambda path, *rest, **named: load_dataset(str(script.parent), **named))
    with pytest.raises(TunesmithError, match="owner/set is a data set with a loading script"):
        list(read_rows("owner/set"))


def test_files_that_were_joined_keep_their_byte_order_marks(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "a.jsonl", '\ufeff{"a": 1}\n\ufeff{"a": 2}\n') == [{"a": 1}, {"a": 2}]


def test_a_line_of_100_mb_is_refused_in_a_moment_and_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        file.truncate(100_000_000)  # of NULs, which take no place on the disk
    tracemalloc.start()
    try:
        with pytest.raises(TunesmithError, match="line 2: the line has more than 64,000,000 bytes"):
            list(read_rows(str(path)))
        assert tracemalloc.get_traced_memory()[1] < 1.5 * 100_000_000
    finally:
        tracemalloc.stop()


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(TunesmithError, match=r"split is 'test', but .* is a file"):
        read_rows(str(tmp_path / "rows.jsonl"), "test")


def test_a_hub_name_is_loaded_with_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
        calls.append((path, name, split))
        return [{"text": "a"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(read_rows("owner/set:main", "test")) == [("owner/set:main (test), row 1", {"text": "a"})]
    list(read_rows("squad", default_split="validation"))
    assert calls == [("owner/set", "main", "test"), ("squad", None, "validation")]


def test_a_hub_name_without_network_says_so() -> None:
    with pytest.raises(TunesmithError, match=r"owner/set .* is not a file here and could not be loaded from the hub"):
        list(read_rows("owner/set"))


@pytest.mark.parametrize(
    ("name", "count"), [("gsm8k_test.jsonl", 1319), ("alpaca_en_demo.json", 999), ("glaive_toolcall_en_demo.json", 300)]
)
def test_real_files_are_read_as_json_reads_them(shared_data: Path, name: str, count: int) -> None:
    text = (shared_data / name).read_text(encoding="utf-8")
    expected = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.split("\n") if line]
    assert [row for _, row in read_rows(str(shared_data / name))] == expected
    assert len(expected) == count


def test_rows_are_numbered_from_zero_unless_they_know_their_place() -> None:
    rows: list[Any] = [{"text": "a"}, ("x.jsonl, line 7", {"text": "b"})]
    assert list(with_places(rows)) == [("row 0", {"text": "a"}), ("x.jsonl, line 7", {"text": "b"})]
    columns = Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    assert list(with_places(columns)) == [("row 0", {"text": "a", "n": 1}), ("row 1", {"text": "b", "n": 2})]


def test_a_long_line_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes(b"a" * 3000 + b"\n" + b"b" * 10 + b"\n")
    long, short = numbered_lines(file, "rows.txt", most=1000)
    assert long.bad is not None
    assert long.bad.reason == "the line has more than 1,000 bytes, too many for one row; divide it"
    assert (short.text, short.place, short.bad) == ("b" * 10 + "\n", "rows.txt, line 2", None)
