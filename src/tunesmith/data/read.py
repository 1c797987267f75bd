"""Files and hub data sets to rows.

A row is a dict with the values that the source has, nothing added and nothing left out: through Arrow, a row would get
a null for every key that another row has. Rows that come out of Arrow are marked (`ArrowRow`). Each row comes with its
place ("rows.jsonl, line 3"), which the messages of later stages name.

What kind a file is shows in its content; its name only settles what could be either. No file is trusted: what is
damaged in it is a bad row with its place, and the memory that reading takes is bounded by the longest row that is
allowed. Only an object that holds all rows is read as a whole.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tunesmith.data.folders import NO_SCRIPTS, SUFFIXES, find, is_file_name, suffix_of
from tunesmith.data.formats import ArrowRow
from tunesmith.data.jsontext import STRICT, PlacedRows, SourceRow, has_format, is_row, json_line, json_rows
from tunesmith.data.lines import BOM, MOST_BYTES, UTF16, Line, check_beginning, numbered_lines, opened
from tunesmith.data.skipped import BadRow
from tunesmith.errors import TunesmithError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SAMPLE = 1 << 16
"""Bytes after the first line from which a table's delimiter is told."""
DELIMITERS = ",;\t|"
INDEX_COLUMNS = ("", "Unnamed: 0", "__index_level_0__")
"""The names that pandas gives an index without a name."""
SEPARATOR = re.compile(r'"?sep=(.)"?\s*')
"""The first line with which Excel says what the delimiter is."""
ARROW_MAGIC = b"ARROW1"
STREAM_MAGIC = b"\xff\xff\xff\xff"
ARROW_ROWS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of one source. Iterating reads it anew and gives (place, row) pairs; places count from 1.

    Iterating raises TunesmithError, with the place, for what is damaged; `each` gives damaged rows as they are, and
    raises only for what is wrong with a whole file.
    """

    name: str
    read: Callable[[], PlacedRows]
    files: tuple[Path, ...] = ()
    """The files with all of the rows; empty when they come from elsewhere."""
    part: str = ""
    """Which of the rows in the files these are, where the files hold several splits."""

    def __iter__(self) -> Iterator[tuple[str, SourceRow]]:
        for place, row in self.each():
            if isinstance(row, BadRow):
                raise row.error(place)
            yield place, row

    def each(self) -> PlacedRows:
        """All rows, those that can't be read too."""
        empty = True
        for pair in self.read():
            empty = False
            yield pair
        if empty:
            raise TunesmithError(f"{self.name} has no rows")


def read_rows(source: str, split: str | None = None, *, default_split: str = "train") -> Rows:
    """The rows of a file, of several, or of a data set on the hub (`name`, or `name:configuration`).

    `source` is a file, a pattern (`data/*.jsonl`), or a folder with data files, of `save_to_disk`, or of a data set of
    the hub (`folder`, or `folder:configuration`). Files hold, in UTF-8 or UTF-16, JSON Lines (streamed, blank lines
    skipped), JSON (a list of objects, an object with such lists, columns as pandas writes them), a table (a header,
    then text values), Parquet, Arrow, or text (each line that isn't blank is a row with the one column `text`); gzip,
    bzip2, xz and Zstandard are unpacked. `split` chooses where a source has several; unset, `default_split` does.

    Raises TunesmithError when there is no such file, or it can't be one with rows.
    """
    if not is_file_name(source):
        return Rows(name=source, read=lambda: _hub(source, split or default_split))
    path, found = Path(source).expanduser(), find(source)
    if path.is_file():
        reader = _reader(path, source)
        if split is not None and reader is not json_rows:
            raise TunesmithError(f"split is {split!r}, but {source} is a file, which has no splits; drop it")
        part = (split or default_split) if reader is json_rows else ""
        return Rows(name=source, read=lambda: reader(path, source, split, default_split), files=(path,), part=part)
    files = found.chosen(source, split, default_split)
    folder = len(str(path)) if path.is_dir() else None
    names = {file: str(file) if folder is None else source.rstrip("/") + str(file)[folder:] for file in files}

    def each_file() -> PlacedRows:
        for file, name in names.items():
            yield from _reader(file, name)(file, name, None, default_split)

    return Rows(name=source, read=each_file, files=files, part=split or default_split)


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several sources, one after another."""
    if len(parts) == 1:
        return parts[0]
    files = tuple(file for part in parts for file in part.files)
    return Rows(
        name=", ".join(part.name for part in parts),
        read=lambda: chain.from_iterable(part.each() for part in parts),
        files=files if all(part.files for part in parts) else (),
        part=", ".join(part.part for part in parts),
    )


def with_places(
    source: "Dataset | IterableDataset | Rows | Iterable[Any]",
) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """Rows with their places: numbers from 0, unless a source knows better (a file and its lines) and gives pairs."""
    from datasets import Dataset, IterableDataset

    if isinstance(source, Dataset | IterableDataset):
        rows: Iterable[Any] = (row for batch in source.iter(1000) for row in unbatched(batch))
    else:
        rows = source.each() if isinstance(source, Rows) else source
    for number, row in enumerate(rows):
        match row:
            case tuple((str(), Mapping() | BadRow())):
                yield row
            case Mapping():
                yield f"row {number}", row
            case _:
                reason = f"is {type(row).__name__}, expected an object with named columns"
                yield f"row {number}", BadRow(reason=reason, content=row, separator=" ")


def unbatched(batch: Mapping[str, Sequence[Any]]) -> Iterator[ArrowRow]:
    """The rows of a batch of columns of a `datasets.Dataset`."""
    return (ArrowRow(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


# What a file is

Reader: TypeAlias = Callable[[Path, str, str | None, str], PlacedRows]
"""Of the file, what messages call it, the split that is asked for, and the one that is not asked for."""


def _reader(path: Path, name: str) -> Reader:
    """How a file is read, by its content. Raises TunesmithError for what holds no rows."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise TunesmithError(f"{name} can't be read: {error.strerror}") from error
    if not head:
        raise TunesmithError(f"{name} is an empty file")
    if head.startswith(b"PAR1"):
        return _parquet
    if head.startswith((ARROW_MAGIC, STREAM_MAGIC)):
        return _arrow
    with opened(path, name) as content:
        first = content.readline(MOST_BYTES)
        check_beginning(first, f"{name}, line 1")
        while first and not first.removeprefix(BOM).strip():
            first = content.readline(MOST_BYTES)
        first = first.removeprefix(BOM)
        sample = first[:SAMPLE] + content.read(SAMPLE)
    # Of an object the whole line is needed. The one line of a list may have any length.
    line = (first if first.lstrip().startswith(b"{") else first[:SAMPLE]).decode("utf-8", errors="replace").strip()
    lines = StringIO(sample.decode("utf-8", errors="replace"), newline="\n").readlines() or [line]
    suffix = suffix_of(path)
    if suffix != ".txt" or _names_format(line):
        json_reader = _json_reader(line, lines[1:], suffix)
        if json_reader is not None:
            return json_reader
    is_sheet = suffix == ".txt" and head.startswith(UTF16)  # as Excel saves one, tabs between the cells
    delimiter = _delimiter(lines, "\t" if suffix == ".tsv" or is_sheet else ",")
    columns = _cells(lines[:1], delimiter)[0]
    is_table = len(columns) > 1 and has_format(columns)
    if is_sheet:
        rows = _cells(lines, "\t")
        is_table = is_table or (len(rows) > 1 and len({*map(len, rows)}) == 1 and len(rows[0]) > 1)
    if suffix in (".csv", ".tsv") or is_table:
        return lambda path, name, *_: _table(path, name, delimiter)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _json_lines
    if suffix == ".txt":
        return _texts
    if suffix == ".parquet":
        raise TunesmithError(f"{name} is damaged, or not a Parquet file")
    script = f". {NO_SCRIPTS}" if suffix == ".py" else ""
    raise TunesmithError(
        f"{name}: files named *{path.suffix or path.name} can't be read; known are {', '.join(SUFFIXES)}{script}"
    )


def _names_format(line: str) -> bool:
    """Whether a line is a JSON object with the columns of a format."""
    try:
        row = json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and has_format(row)


def _json_reader(line: str, following: list[str], suffix: str) -> Reader | None:
    """How JSON that begins with `line` is read: as lines, or as one value. None where it isn't JSON.

    The first line of JSON Lines is a whole object; that of a value over several lines ends too early. An object on the
    only line may be either a row or what holds all rows, which the name settles.
    """
    is_named, is_lines = suffix in (".jsonl", ".ndjson", ".json"), suffix in (".jsonl", ".ndjson")
    if line.startswith("["):
        return json_rows if is_named or line.startswith("[{") or line == "[" else None
    if not line.startswith("{"):
        return None
    try:
        value = STRICT.decode(line)
    except json.JSONDecodeError as error:
        is_damaged = is_lines and _is_object(following[:1])  # and the lines after it are not
        if error.pos >= len(line) and not is_damaged:
            return json_rows
        return _json_lines if is_named else None
    except (ValueError, RecursionError):
        return _json_lines if is_named else None
    is_only = not is_lines and not any(text.strip() for text in following)
    return json_rows if is_only and not is_row(value) else _json_lines


def _is_object(lines: Sequence[str]) -> bool:
    return any(line.startswith("{") and line.rstrip().endswith("}") for line in lines)


# Lines


def _json_lines(path: Path, name: str, *_: Any) -> PlacedRows:
    return _by_line(path, name, json_line)


def _texts(path: Path, name: str, *_: Any) -> PlacedRows:
    return _by_line(path, name, lambda line: {"text": line.text.rstrip("\r\n")})


def _by_line(path: Path, name: str, row_of: Callable[[Line], SourceRow | BadRow]) -> PlacedRows:
    for line in numbered_lines(path, name, skip_empty=True):
        if line.bad is not None:
            yield line.place, line.bad
        elif line.text.strip():
            yield line.place, row_of(line)


# Tables


def _table(path: Path, name: str, delimiter: str) -> PlacedRows:
    """Rows of text values under the names of the first line. A place is the line in which the row begins."""
    read: list[Line] = []

    def texts() -> Iterator[str]:
        for line in numbered_lines(path, name):
            read.append(line)
            yield line.text

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        place = f"{name}, line {reader.line_num + 1}"
        read.clear()
        try:
            values = next(reader, None)
        except csv.Error as error:
            bad = BadRow(reason=str(error), content="".join(line.text for line in read))
            if not header or len(read) != 1 or not read[0].text.endswith("\n"):
                # An error over several lines: a quote that is never closed takes the rest of the file.
                raise bad.error(place) from error
            yield place, bad
            continue
        if values is None:
            return
        if damaged := [(line.place, line.bad) for line in read if line.bad is not None]:
            line_place, bad = damaged[0]
            if not header:
                raise bad.error(line_place)
            yield line_place, bad
        elif not header and any(value.strip() for value in values):
            header = [] if SEPARATOR.fullmatch(read[0].text) else _checked_header(values, place)
        elif not any(value.strip() for value in values):  # a blank line, or an empty row of a spreadsheet
            continue
        elif len(values) != len(header):
            reason = f"has {len(values)} values, but the header has {len(header)} names"
            yield place, BadRow(reason=reason, content=values, separator=" ")
        elif any(value.strip() and not name for name, value in zip(header[1:], values[1:], strict=True)):
            reason = (
                f"has a value in a column without a name; the header is {', '.join(map(repr, header))}: give each "
                "column with values a name there, or if that is a title, delete the lines above the header"
            )
            yield place, BadRow(reason=reason, content=values, separator=" ")
        else:
            named = zip(header, values, strict=True)
            yield (
                place,
                {name: value for i, (name, value) in enumerate(named) if name and (i or name not in INDEX_COLUMNS)},
            )


def _checked_header(names: list[str], place: str) -> list[str]:
    """The names of the columns; that of one without a name is empty, and its cells should be, too."""
    names = [name if name.strip() else "" for name in names]
    if twice := next((name for name, count in Counter(names).items() if name and count > 1), None):
        raise TunesmithError(f"{place}: the column {twice!r} is there twice")
    return names


def _delimiter(lines: Sequence[str], usual: str) -> str:
    """The delimiter with which most of `lines` have as many values as the first, and more than one. Of several the
    usual one is taken."""
    if (written := SEPARATOR.fullmatch(lines[0])) is not None:
        return written[1]

    def fit(delimiter: str) -> tuple[float, bool, int]:
        rows = _cells(lines, delimiter)
        width = len(rows[0])
        share = sum(len(row) == width for row in rows) / len(rows) if width > 1 else 0.0
        return share, delimiter == usual, width

    return max(DELIMITERS, key=fit)


def _cells(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    """The rows of a table in `lines`, at least one. The last of several is left out: it may be cut."""
    csv.field_size_limit(2**31 - 1)  # a process-wide limit, by default 128 KiB: less than a long document
    try:
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if row] or [[]]
    except csv.Error:
        return [[]]
    return rows[:-1] or rows


# Arrow


def _parquet(path: Path, name: str, *_: Any) -> PlacedRows:
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=ARROW_ROWS)

    return _arrow_rows(batches(), name, "a Parquet file")


def _arrow(path: Path, name: str, *_: Any) -> PlacedRows:
    """An Arrow file, or an Arrow stream as `datasets` writes it."""
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(path)) as source:
            if source.read(len(ARROW_MAGIC)) == ARROW_MAGIC:
                file = pa.ipc.open_file(source)
                yield from map(file.get_batch, range(file.num_record_batches))
            else:
                source.seek(0)
                yield from pa.ipc.open_stream(source)

    return _arrow_rows(batches(), name, "an Arrow file")


def _arrow_rows(batches: Iterator[Any], name: str, kind: str) -> PlacedRows:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            batch.validate(full=True)  # offsets that point elsewhere would read any memory
            json_columns = [field.name for field in batch.schema if "arrow.json" in str(field.type)]
            for start in range(0, len(batch), ARROW_ROWS):
                for row in batch.slice(start, ARROW_ROWS).to_pylist():
                    number += 1
                    for column in json_columns:
                        row[column] = _loaded(row[column], batch.schema.field(column).type)
                    for index in INDEX_COLUMNS:
                        row.pop(index, None)
                    yield f"{name}, row {number}", ArrowRow(row)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TunesmithError(f"{name}: after {number} rows: {error}; it is damaged, or not {kind}") from error


def _loaded(value: Any, kind: Any) -> Any:
    """A value whose type `kind` has JSON text in it, as `datasets` stores values of several types, with that loaded."""
    import pyarrow as pa

    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _loaded(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_loaded(item, kind.value_type) for item in value]
    return value


# The hub


def _hub(name: str, split: str) -> PlacedRows:
    from datasets import load_dataset

    path, _, configuration = name.partition(":")
    try:
        dataset = load_dataset(path, configuration or None, split=split)
    except Exception as error:  # of a dozen types: offline, not found, gated, no such split, a file it can't read
        if "scripts are no longer supported" in str(error):
            raise TunesmithError(f"{name} is a data set with a loading script. {NO_SCRIPTS}") from error
        raise TunesmithError(
            f"{name} (split {split}) is not a file here and could not be loaded from the hub: {error}\n"
            "Check the name and the connection, or download it and give a file."
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{name} ({split}), row {number}", ArrowRow(row)
