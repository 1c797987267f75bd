"""Files and hub data sets to rows.

A row is a dict with the values that the source has, nothing added and nothing left out: through Arrow, a row would get
a null for every key that another row has. Each row comes with its place ("rows.jsonl, line 3"), which the messages of
later stages name.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

from tunesmith.data.formats import FORMATS
from tunesmith.data.lines import Line, numbered_lines
from tunesmith.data.skipped import BadRow
from tunesmith.errors import TunesmithError, nearest

Row = dict[str, Any]
Placed = Iterator[tuple[str, Row | BadRow]]

LOOSE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""A hint only: pairs of surrogates are right, a half one is not."""
NO_SCRIPTS = (
    "Data sets with a loading script run code of others, and are not supported; take the data set's Parquet files, "
    "or save its rows as .jsonl"
)
PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of one source. Iterating reads it anew and gives (place, row) pairs; places count from 1.

    Iterating raises TunesmithError, with the place, for what is damaged; `each` gives damaged rows as they are, and
    raises only for what is wrong with a whole file.
    """

    name: str
    read: Callable[[], Placed]
    files: tuple[Path, ...] = ()
    """The files with all of the rows; empty when they come from elsewhere."""

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for place, row in self.each():
            if isinstance(row, BadRow):
                raise row.error(place)
            yield place, row

    def each(self) -> Placed:
        """All rows, those that can't be read too."""
        empty = True
        for pair in self.read():
            empty = False
            yield pair
        if empty:
            raise TunesmithError(f"{self.name} has no rows")


def read_rows(source: str, split: str | None = None, *, default_split: str = "train") -> Rows:
    """The rows of a file, or of a data set on the hub (`name`, or `name:configuration`).

    Files, by their suffix: .jsonl and .ndjson (streamed, blank lines skipped), .json (a list of objects, or an object
    with one such list), .csv and .tsv (a header, then text values), .parquet, .txt (each line that isn't blank is a row
    with the one column `text`). `split` is for the hub only.

    Raises TunesmithError when there is no such file, or it can't be one with rows.
    """
    path = Path(source).expanduser()
    if not _is_file_name(path, source):
        return Rows(name=source, read=lambda: _hub(source, split or default_split))
    if split is not None:
        raise TunesmithError(f"split is {split!r}, but {source} is a file, which has no splits; drop it")
    _check_file(path, source)
    reader = READERS[path.suffix.lower()]
    return Rows(name=source, read=lambda: reader(path, source), files=(path,))


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several sources, one after another."""
    if len(parts) == 1:
        return parts[0]
    files = tuple(file for part in parts for file in part.files)
    return Rows(
        name=", ".join(part.name for part in parts),
        read=lambda: chain.from_iterable(part.each() for part in parts),
        files=files if all(part.files for part in parts) else (),
    )


def _is_file_name(path: Path, source: str) -> bool:
    """Whether `source` means a file, there or not, rather than a name on the hub."""
    hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source)
    in_a_folder = "/" in source and path.parent.is_dir()
    return not hub_name or path.exists() or path.suffix.lower() in READERS or source[0] in ".~" or in_a_folder


def _check_file(path: Path, source: str) -> None:
    known = ", ".join(READERS)
    if path.is_dir():
        inside = sorted(item.name for item in path.iterdir() if item.suffix.lower() in READERS)
        scripts = sorted(item.name for item in path.glob("*.py"))
        if scripts and not inside:
            raise TunesmithError(f"{source} needs the code in {scripts[0]} to be read. {NO_SCRIPTS}")
        listed = f"; it holds {', '.join(inside[:5])}" if inside else f"; it holds no {known} file"
        raise TunesmithError(f"{source} is a folder, expected a file{listed}")
    if not path.exists():
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f": there is no folder {path.parent}"
        raise TunesmithError(f"no file {source}{where}{nearest(path.name, siblings)}")
    if path.suffix.lower() not in READERS:
        packed = "; unpack it first" if path.suffix.lower() in PACKED else ""
        script = f". {NO_SCRIPTS}" if path.suffix == ".py" else ""
        found = f"{source}: files named *{path.suffix or path.name} can't be read"
        raise TunesmithError(f"{found}{packed}; known are {known}{script}")
    if path.stat().st_size == 0:
        raise TunesmithError(f"{source} is an empty file")


# Text


def _text(path: Path, name: str) -> Placed:
    for line in numbered_lines(path, name):
        if line.bad is not None:
            yield line.place, line.bad
        elif line.text.strip():
            yield line.place, {"text": line.text.rstrip("\r\n")}


# JSON


def _jsonl(path: Path, name: str) -> Placed:
    for line in numbered_lines(path, name):
        if line.bad is not None:
            yield line.place, line.bad
        elif line.text.strip():
            yield line.place, _json_line(line)


def _json_line(line: Line) -> Row | BadRow:
    """The object in a line. Raises TunesmithError where the first line shows that the file is no .jsonl."""
    text, first = line.text.rstrip("\r\n").removeprefix("\ufeff"), line.number == 1  # files were joined, BOMs and all
    try:
        row = _parsed(text)
    except json.JSONDecodeError as error:
        hint = "" if line.text.endswith("\n") else "; the file ends in this line: it seems to be cut off"
        bad = BadRow(reason=f"column {error.colno}: {error.msg}{hint}", content=text, joint=", ")
        if first and text.strip() in ("[", "{"):
            hint = "; this looks like one JSON value over many lines: name the file .json"
            raise TunesmithError(f"{bad.error(line.place)}{hint}") from error
        return bad
    except ValueError as error:
        return BadRow(reason=str(error), content=text)
    if isinstance(row, list) and first:
        raise TunesmithError(f"{line.place} is a list; a file with one list of objects is to be named .json")
    return _object(row)


def _json(path: Path, name: str) -> Placed:
    """The whole file is one value. Its rows have places like "rows.json, row 3"."""
    lines = []
    for line in numbered_lines(path, name, most=None):
        if line.bad is not None:
            raise line.bad.error(line.place)
        lines.append(line.text)
    text = "".join(lines)
    del lines
    try:
        value = _parsed(text)
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            hint = "; if every line is an object, name the file .jsonl"
        elif not text.rstrip().endswith(("]", "}")):
            hint = "; the file seems to be cut off"
        raise TunesmithError(f"{name}, line {error.lineno}, column {error.colno}: {error.msg}{hint}") from error
    except ValueError as error:
        raise TunesmithError(f"{name}: {error}") from error
    rows, where = _rows_in(value, name)
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}{where}", _object(row)


def _rows_in(value: Any, name: str) -> tuple[list[Any], str]:
    """The list of rows in a JSON value, and where it was, for their places."""
    if isinstance(value, list):
        return value, ""
    if not isinstance(value, dict):
        raise TunesmithError(f"{name} holds {_kind(value)}, expected a list of objects")
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if any(key in columns for key in value for columns in FORMATS.values()):
        raise TunesmithError(f"{name} holds a single row; put it in a list: [{{...}}]")
    if len(lists) != 1:
        found = f"the lists {', '.join(map(repr, lists))}" if lists else "no list"
        raise TunesmithError(f"{name} holds an object with {found}; expected a list of objects, or an object with one")
    return value[lists[0]], f" of {lists[0]!r}"


def _parsed(text: str) -> Any:
    """JSON in which no key is given twice in an object. Raises ValueError, JSONDecodeError when it isn't JSON."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_number, parse_float=_finite)
        if LOOSE_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{half} is half of a surrogate pair, which is no character") from error
    return value


def _refuse_number(text: str) -> float:
    """Python's JSON has NaN and Infinity, which JSON does not."""
    raise ValueError(f"{text[:40]} is no number that JSON has; write null, or a finite number")


def _finite(text: str) -> float:
    number = float(text)
    return number if isfinite(number) else _refuse_number(text)


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return row


def _object(row: Any) -> Row | BadRow:
    if not isinstance(row, dict):
        return BadRow(reason=f"is {_kind(row)}, expected an object {{...}}", content=row, joint=" ")
    return row


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]


# Tables


def _csv(path: Path, name: str) -> Placed:
    return _table(path, name, ",")


def _tsv(path: Path, name: str) -> Placed:
    return _table(path, name, "\t")


def _table(path: Path, name: str, delimiter: str) -> Placed:
    """Rows of text values under the names of the first line. A place is the line in which the row begins."""
    csv.field_size_limit(2**31 - 1)  # a process-wide limit, by default 128 KiB: less than a long document
    read: list[Line] = []
    reader = csv.reader(_noted(path, name, read), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        place = f"{name}, line {reader.line_num + 1}"
        read.clear()
        try:
            values = next(reader, None)
        except csv.Error as error:
            bad = BadRow(reason=str(error), content="".join(line.text for line in read))
            if not header or len(read) != 1 or not read[0].text.endswith("\n"):
                # Over several lines, whose rows are those? A quote that is never closed takes the rest of the file.
                raise bad.error(place) from error
            yield place, bad
            continue
        if values is None:
            return
        wrong = next((line for line in read if line.bad is not None), None)
        if wrong is not None and wrong.bad is not None:
            if not header:
                raise wrong.bad.error(wrong.place)
            yield wrong.place, wrong.bad
        elif values and not header:
            header = _checked_header(values, place)
        elif values:
            yield place, _under(header, values)


def _noted(path: Path, name: str, read: list[Line]) -> Iterator[str]:
    """The lines for a table's reader, which are noted in `read`."""
    for line in numbered_lines(path, name):
        read.append(line)
        yield line.text


def _under(header: list[str], values: list[str]) -> Row | BadRow:
    if len(values) != len(header):
        found = f"has {len(values)} values, but the header has {len(header)} names"
        return BadRow(reason=found, content=values, joint=" ")
    return dict(zip(header, values, strict=True))


def _checked_header(names: list[str], place: str) -> list[str]:
    for name in names:
        if not name.strip():
            raise TunesmithError(f"{place}: a column has no name; the header is {', '.join(map(repr, names))}")
        if names.count(name) > 1:
            raise TunesmithError(f"{place}: the column {name!r} is there twice")
    return names


def _parquet(path: Path, name: str) -> Placed:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TunesmithError(f"{name}: after {number} rows: {error}; it is damaged, or no Parquet file") from error


# The hub


def _hub(name: str, split: str) -> Placed:
    from datasets import load_dataset

    path, _, configuration = name.partition(":")
    try:
        dataset = load_dataset(path, configuration or None, split=split)
    except Exception as error:  # of a dozen types: offline, not found, gated, no such split, a file it can't read
        if "scripts are no longer supported" in str(error):
            raise TunesmithError(f"{name} is a data set with a loading script. {NO_SCRIPTS}") from error
        raise TunesmithError(
            f"{name} (split {split}) is no file here and could not be loaded from the hub: {error}\n"
            "Check the name and the connection, or download it and give a file."
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{name} ({split}), row {number}", row


READERS: dict[str, Callable[[Path, str], Placed]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _text,
}
