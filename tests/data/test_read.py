"""Rows come out as the file has them, each with its place; a damaged file is refused with the place of the damage."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import tracemalloc
from collections.abc import Callable
from operator import add
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.formats import ArrowRow
from tunesmith.data.prepare import identity
from tunesmith.data.read import Rows, read_rows, with_places
from tunesmith.data.skipped import BadRow
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
        ("a.jsonl", '{"a": {"b": 1, "b": 2}}\n', "line 1: the key 'b' is given twice"),
        ("a.jsonl", '{"a": "\\ud83d"}\n', r"line 1: \\ud83d is half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000, "lists or objects are nested too deeply"),
        ("a.jsonl", '{"a": "é"}\n'.encode() + b'{"a": "\xe9"}\n', r"line 2: byte 19 \(0xe9\) is not UTF-8"),
        ("a.jsonl", b'\xef\xbb\xbf{"a": "\xe9"}\n', r"line 1: byte 10 \(0xe9\)"),
        ("a.jsonl", '{"a": 1}\n{"a": "\0"}\n', "line 2: there is a NUL at byte 16"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16-le"), "line 1: the file is UTF-16 without a byte order mark"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16")[:-1], r"a\.jsonl can't be read: .*truncated data"),
        ("a.jsonl", '{"a": 1}\n{"a": NaN}\n', "line 2: NaN is not a number in JSON; write null"),
        ("a.jsonl", '{"a": [-Infinity]}\n', "line 1: -Infinity is not a number"),
        ("a.json", '[{"a": 1e999}]', r"a\.json, row 1: 1e999 is not a number in JSON"),
        ("a.jsonl", '{"a": 1}\n[\n', r"line 2, column 2: Expecting value"),
        ("a.jsonl", '{"a": ' + "[" * 100_000, "line 1: lists or objects are nested too deeply"),
        ("a.jsonl", '{"a": 1' + "0" * 5000 + "}", "line 1: Exceeds the limit"),
        ("a.jsonl", b"\x1f\x8b\x08\x00rest", r"a\.jsonl can't be read: Compressed file ended"),
        ("a.jsonl", gzip.compress(b'{"a": 1}\n' * 99)[:-9], r"a\.jsonl can't be read: Compressed file ended"),
        ("a.jsonl", gzip.compress(gzip.compress(b"{}")), "line 1: the file is compressed twice, with gzip inside"),
        ("a.jsonl", gzip.compress(b"PAR1"), "line 1: the file is a Parquet file in a compressed one"),
        ("a.csv", b"PK\x03\x04rest", "line 1: the file is a zip archive .* save a spreadsheet as CSV UTF-8"),
        ("a.txt", b"PAR1rest", "not a Parquet file"),
        ("a.arrow", b"ARROW1\0\0rest", "not an Arrow file"),
        ("a.tar.gz", gzip.compress(b"name".ljust(257, b"\0") + b"ustar"), "line 1: the file is a tar archive"),
        ("a.pkl", pickle.dumps([{"a": 1}]), "line 1: the file is a pickle, which may run any code"),
        ("a.jsonl", "", "is an empty file"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.json", '[{"a": 1}, 2]', r"a\.json, row 2 is a number, expected an object"),
        ("a.json", '[\n{"a": 1},\n{"a', r"line 3, column 2.*cut off"),
        ("a.json", '[{"a": 1}] [{"a": 2}]', "line 1, column 12: Extra data$"),
        ("a.json", '[{"a": 1},]', "line 1, column 11: Expecting value$"),
        ("a.json", '[{"a": 1} {"a": 2}]', "line 1, column 11: Expecting ',' delimiter$"),
        ("a.json", '[\n{"a": "\xe9"}]'.encode("latin-1"), r"line 2: byte 9 \(0xe9\) is not UTF-8"),
        ("a.json", '{"a": [], "b": []}', "has no split 'train'; it has 'a', 'b'. Choose one: `split: a`"),
        ("a.json", '"text"', "line 1 is text, expected an object"),
        ("a.json", '[{"a": 1, "a": 2}]', "the key 'a' is given twice"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 values, but the header has 2 names"),
        ("a.csv", "a,b\n1\n", "line 2 has 1 values, but the header has 2 names"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "line 2: unexpected end of data"),
        ("a.csv", "a,a\n1,2\n", "line 1: the column 'a' is there twice"),
        ("a.csv", "a,\n1,2\n", "line 2 has a value in a column without a name; the header is 'a', ''"),
        ("a.csv", "Export;\n;\na;b\n1;2\n", "line 3 has a value .* delete the lines above the header"),
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


# The same rows in the disguises of everyday files

ROWS = [{"prompt": "a, b; c\té", "completion": "1"}, {"prompt": 'say "好"', "completion": "2\n3"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, ensure_ascii=False)
TABLE = pa.Table.from_pylist(ROWS)


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


def cells(delimiter: str, *, index: str | None = None, empty: int = 0) -> str:
    out = io.StringIO()
    before: list[list[Any]] = [[], [], []] if index is None else [[index], [0], [1]]
    rows = [[*row, *[""] * empty] for row in (ROWS[0], *(row.values() for row in ROWS))]
    csv.writer(out, delimiter=delimiter).writerows(map(add, before, rows))
    return out.getvalue()


def written(write: Callable[[Any], object]) -> bytes:
    sink = io.BytesIO()
    write(sink)
    return sink.getvalue()


def arrow_file(sink: Any, new: Any = pa.ipc.new_file) -> None:
    with new(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", LINES),
        ("lines.csv", LINES),
        ("lines.data", LINES),
        ("lines.txt", LINES),
        ("array.jsonl", ARRAY),
        ("array.txt.json", json.dumps(ROWS, indent=2)),
        ("array.ndjson", json.dumps(ROWS, indent=2)),
        ("objects.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("held.json", json.dumps({"version": 1, "rows": ROWS}, indent=1)),
        ("split.json", json.dumps({"train": ROWS, "test": [{"prompt": "x", "completion": "y"}]})),
        ("pandas.json", json.dumps({name: dict(enumerate(values)) for name, values in COLUMNS.items()})),
        ("pandas-index.json", json.dumps(dict(enumerate(ROWS)), indent=1)),
        (
            "pandas-split.json",
            json.dumps({"columns": [*ROWS[0]], "index": [0, 1], "data": [list(r.values()) for r in ROWS]}),
        ),
        ("lists.json", json.dumps(COLUMNS)),
        ("rows.csv", cells(",")),
        ("bom.csv", "\ufeff" + cells(",")),
        ("semicolon.csv", cells(";")),
        ("excel.csv", "sep=;\n" + cells(";")),
        ("empty-columns.csv", cells(";", empty=2)),
        ("empty-rows.csv", ";;\n" + cells(";", empty=1) + ";;\n ; ;\n"),
        ("tab.csv", cells("\t")),
        ("bar.csv", cells("|")),
        ("comma.tsv", cells(",")),
        ("table.txt", cells("\t")),
        ("index.csv", cells(",", index="")),
        ("index.tsv", cells("\t", index="Unnamed: 0")),
        ("index.semicolon.csv", cells(";", index="__index_level_0__")),
        ("utf-16.csv", cells("\t").encode("utf-16")),
        ("utf-16-be.csv", b"\xfe\xff" + cells(";").encode("utf-16-be")),
        ("utf-32.jsonl", LINES.encode("utf-32")),
        ("lines.jsonl.gz", gzip.compress(LINES.encode())),
        ("lines.gz", gzip.compress(LINES.encode())),
        ("two.jsonl.gz", b"".join(gzip.compress(line.encode()) for line in LINES.splitlines(keepends=True))),
        ("lines.jsonl.bz2", bz2.compress(LINES.encode())),
        ("lines.jsonl.xz", lzma.compress(LINES.encode())),
        ("two.xz", b"".join(lzma.compress(line.encode()) for line in LINES.splitlines(keepends=True))),
        ("lines.jsonl.zst", zstd(LINES.encode())),
        ("not-named.jsonl", zstd(LINES.encode())),
        ("array.json.zst", zstd(ARRAY.encode())),
        ("utf-16.csv.gz", gzip.compress(cells(";").encode("utf-16"))),
        ("rows.parquet", written(lambda sink: pq.write_table(TABLE, sink))),
        ("parquet.jsonl", written(lambda sink: pq.write_table(TABLE, sink))),
        (
            "index.parquet",
            written(lambda sink: pq.write_table(TABLE.append_column("__index_level_0__", [[5, 6]]), sink)),
        ),
        ("rows.arrow", written(arrow_file)),
        ("stream.arrow", written(lambda sink: arrow_file(sink, pa.ipc.new_stream))),
        ("lines.parquet", LINES),
    ],
)
def test_the_same_rows_in_any_everyday_file(tmp_path: Path, name: str, content: bytes | str) -> None:
    assert rows_of(tmp_path, name, content) == ROWS


def test_a_sheet_that_excel_saved_as_unicode_text_is_a_table_whatever_its_columns_are_called(tmp_path: Path) -> None:
    (tmp_path / "sheet.txt").write_bytes("編號\t提問\n1\t有貨\n2\t多少錢\n".encode("utf-16"))
    (tmp_path / "commas.txt").write_bytes("A, b\tC\nHi, you\tYes\nNo, no\tNo\n".encode("utf-16"))
    assert next(row for _, row in read_rows(str(tmp_path / "commas.txt"))) == {"A, b": "Hi, you", "C": "Yes"}
    (tmp_path / "prose.txt").write_bytes("a\tb\nc\n".encode("utf-16"))
    (tmp_path / "own.txt").write_text("編號\t提問\n1\t有貨\n")
    sheet, prose, own = (
        [row for _, row in read_rows(str(tmp_path / f"{name}.txt"))] for name in ("sheet", "prose", "own")
    )
    assert sheet == [{"編號": "1", "提問": "有貨"}, {"編號": "2", "提問": "多少錢"}]
    assert prose == [{"text": "a\tb"}, {"text": "c"}]
    assert own == [{"text": "編號\t提問"}, {"text": "1\t有貨"}]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("rows.json", '{"a": 1}\n\n{"a": 2}\n', ["rows.json, line 1", "rows.json, line 3"]),
        ("rows.jsonl", '[{"a": 1},\n {"a": 2}]', ["rows.jsonl, row 1", "rows.jsonl, row 2"]),
        ("rows.jsonl", '{"data": [{"a": 1}]}', ["rows.jsonl, line 1"]),
        ("rows.json", '{"data": [{"a": 1}]}', ["rows.json, row 1 of 'data'"]),
        ("rows.json", '{"turns": [{"role": "user", "content": "a"}]}', ["rows.json, line 1"]),
        ("rows.json", '{"messages": [], "tools": [{"name": "f"}], "x": [{}]}', ["rows.json, line 1"]),
        ("rows.json", '{"input_ids": [1, 2], "labels": [1, 2]}', ["rows.json, line 1"]),
        ("rows.csv.gz", gzip.compress(b"a;b\n\n1;2\n"), ["rows.csv.gz, line 3"]),
    ],
)
def test_places_are_lines_where_a_line_is_a_row(
    tmp_path: Path, name: str, content: bytes | str, places: list[str]
) -> None:
    assert places_of(tmp_path, name, content) == places


def test_a_text_file_is_text_whatever_it_looks_like(tmp_path: Path) -> None:
    for text in ('{"a": 1}', "[Verse 1]", "one, two, three", "text", "{", "a;b"):
        assert rows_of(tmp_path, "rows.txt", f"{text}\nmore\n") == [{"text": text}, {"text": "more"}]


def test_the_delimiter_is_that_which_divides_all_rows_alike_and_quotes_are_respected(tmp_path: Path) -> None:
    text = 'question;answer\n"a; b";1,5\n"c\nd";2,5\n'
    assert rows_of(tmp_path, "rows.csv", text) == [
        {"question": "a; b", "answer": "1,5"},
        {"question": "c\nd", "answer": "2,5"},
    ]
    assert rows_of(tmp_path, "rows.csv", "text\none; two\nthree\n") == [{"text": "one; two"}, {"text": "three"}]
    assert rows_of(tmp_path, "rows.csv", "a;x,b;y\n1;2,3;4\n") == [{"a;x": "1;2", "b;y": "3;4"}]
    with pytest.raises(TunesmithError, match="line 3 has 3 values, but the header has 2 names"):
        rows_of(tmp_path, "rows.csv", "a;b\n1;2\n1;2;3\n1;2\n" + "1;2\n" * 9)


def test_a_damaged_row_of_a_list_is_passed_over_where_its_end_is_known(tmp_path: Path) -> None:
    text = '[{"a": 1}, 7, {"a": {"b": 1, "b": 2}}, {"a": NaN}, {"a": "\\ud83d"}, {"a": 2}]'
    rows = [row for _, row in opened(tmp_path, "rows.json", text).each()]
    assert [row for row in rows if isinstance(row, dict)] == [{"a": 1}, {"a": 2}]
    assert [row.reason.partition(";")[0] for row in rows if isinstance(row, BadRow)] == [
        "is a number, expected an object {...}",
        "the key 'b' is given twice in one object",
        "NaN is not a number in JSON",
        "\\ud83d is half of a surrogate pair and not a character",
    ]


def test_splits_of_a_json_file_are_chosen_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": [{"a": 1}], "test": [{"a": 2}], "version": 3}))

    def rows(split: str | None, default: str = "train") -> list[dict[str, Any]]:
        return [row for _, row in read_rows(str(path), split, default_split=default)]

    assert (rows(None), rows(None, "test"), rows("test")) == ([{"a": 1}], [{"a": 2}], [{"a": 2}])
    assert identity(read_rows(str(path))) != identity(read_rows(str(path), default_split="test"))
    with pytest.raises(TunesmithError, match=r"no split 'tests'; did you mean 'test'\?; it has 'train', 'test'"):
        rows("tests")
    path.write_text('[{"a": 1}]')
    with pytest.raises(TunesmithError, match=r"split is 'test', but .*rows\.json is one list, which has no splits"):
        rows("test")


def test_what_arrow_stores_as_json_is_loaded_and_rows_of_arrow_are_marked(tmp_path: Path) -> None:
    rows = [{"x": 1, "messages": [{"c": {"a": [1]}}, "text"]}, {"x": 2, "messages": None}]
    features = Features({"x": Value("int64"), "messages": List(Json())})
    data = Dataset.from_list(rows, features=features)
    data.to_parquet(tmp_path / "rows.parquet")
    found = [row for _, row in read_rows(str(tmp_path / "rows.parquet"))]
    assert found == rows
    assert {type(row) for row in found} == {ArrowRow}
    assert {type(row) for _, row in with_places(data.to_iterable_dataset())} == {ArrowRow}
    assert {type(row) for _, row in opened(tmp_path, "rows.jsonl", '{"a": null}')} == {dict}


def test_a_small_compressed_file_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"a": 1}\n{"a": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"a": 2}\n')
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        first, long, last = (row for _, row in read_rows(str(path)).each())
        assert tracemalloc.get_traced_memory()[1] < 1.5 * 100_000_000
    finally:
        tracemalloc.stop()
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(long, BadRow)
    assert long.reason == "the line has more than 64,000,000 bytes, too many for one row; divide it"


def test_lists_are_read_row_by_row_and_each_row_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.jsontext.CHUNK", 10)
    rows = [{"text": "é" * n, "n": [n, -1.5, None, {"x": True}]} for n in range(40)]
    for text in (json.dumps(rows, ensure_ascii=False), json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        assert rows_of(tmp_path, "rows.json", text) == rows
    with pytest.raises(TunesmithError, match=r"rows\.json, line 3, column 6: Expecting ':' delimiter"):
        rows_of(tmp_path, "rows.json", '[{"a": 1, "b": "long enough"},\n{"a": 2},\n{"a" 3}, {"a": 4}]')
    monkeypatch.setattr("tunesmith.data.jsontext.MOST_BYTES", 50)
    with pytest.raises(TunesmithError, match="line 1, column 12: a value has more than 50 characters; divide it"):
        rows_of(tmp_path, "rows.json", json.dumps([{"a": 1}, {"a": "x" * 500}]))
    monkeypatch.setattr("tunesmith.data.jsontext.MOST_OF_A_PACKED_OBJECT", 100)
    with pytest.raises(TunesmithError, match="line 1, column 1: a value has more than 100 characters"):
        rows_of(tmp_path, "rows.json.gz", gzip.compress(json.dumps({"data": [{"a": "x"}] * 500}).encode()))


@pytest.mark.parametrize("disguise", ["lines.json", "lines.jsonl.gz", "array.jsonl", "array.json.zst", "rows.parquet"])
def test_real_rows_are_the_same_in_every_disguise(shared_data: Path, tmp_path: Path, disguise: str) -> None:
    rows = json.loads((shared_data / "glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    content = {
        "lines.json": lines,
        "lines.jsonl.gz": gzip.compress(lines),
        "array.jsonl": json.dumps(rows).encode(),
        "array.json.zst": zstd(json.dumps(rows, indent=2).encode()),
        "rows.parquet": written(lambda sink: pq.write_table(pa.Table.from_pylist(rows), sink)),
    }[disguise]
    assert rows_of(tmp_path, disguise, content) == rows


def test_a_missing_file_comes_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(TunesmithError, match=r"no file .*rows\.json; did you mean 'rows\.jsonl'\?"):
        read_rows(str(tmp_path / "rows.json"))
    with pytest.raises(TunesmithError, match=r"there is no folder .*nowhere"):
        read_rows(str(tmp_path / "nowhere" / "rows.jsonl"))


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
