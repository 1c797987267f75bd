"""Files and hub data sets to rows.

A row is a dict with the values that the source has, nothing added and nothing left out: through Arrow, a row would get
a null for every key that another row has. Each row comes with its place ("rows.jsonl, line 3"), which the messages of
later stages name.

No file is trusted: what is damaged in it is a bad row with its place, and the memory that reading takes is bounded by
the longest line that is allowed.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from tunesmith.data.formats import FORMATS, check_characters
from tunesmith.data.skipped import KEPT_CHARACTERS, BadRow
from tunesmith.data.values import kind_of
from tunesmith.errors import TunesmithError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

SourceRow: TypeAlias = dict[str, Any]
PlacedRows: TypeAlias = Iterator[tuple[str, SourceRow | BadRow]]

MOST_BYTES = 64_000_000
"""Of a line. A row that can be trained on is a thousandth of it."""
CHUNK = 1 << 20
DAMAGED_SHARE = 0.05
"""So large a share of a file's lines can be damaged; more have another encoding."""

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
MAGIC = {
    b"\x1f\x8b": "gzip-compressed; unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive (as .xlsx and .docx are); unpack it first, or save it as .csv",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first (unzstd)",
    b"BZh": "compressed with bzip2; unpack it first (bunzip2)",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it first (unxz)",
    b"PAR1": "a Parquet file; name it .parquet",
    b"ARROW1": "an Arrow file; save it as .parquet or .jsonl",
    b"%PDF-": "a PDF document; save its text as .txt",
}
"""How files that are not text begin."""

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
    read: Callable[[], PlacedRows]
    files: tuple[Path, ...] = ()
    """The files with all of the rows; empty when they come from elsewhere."""

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


def with_places(source: "Dataset | Rows | Iterable[Any]") -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """Rows with their places: numbers from 0, unless a source knows better (a file and its lines) and gives pairs."""
    from datasets import Dataset

    if isinstance(source, Dataset):
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


def unbatched(batch: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a batch of columns."""
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


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
        problem = f"{source}: files named *{path.suffix or path.name} can't be read"
        raise TunesmithError(f"{problem}{packed}; known are {known}{script}")
    if path.stat().st_size == 0:
        raise TunesmithError(f"{source} is an empty file")


# Lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line with its end, and its number from 1. With `bad`, its text is what could be read of it."""

    number: int
    place: str
    text: str
    bad: BadRow | None = None


def numbered_lines(path: Path, name: str, most: int | None = MOST_BYTES) -> Iterator[Line]:
    """The lines of a UTF-8 file, split at \\n only: JSON may hold other line separators. A BOM is left out.

    Raises TunesmithError for a file that can't be read or is not UTF-8 text; `name` is what messages call
    it. A line of more than `most` bytes (None: no limit), with a NUL or with bytes that are not UTF-8 is bad.
    """
    offset, number, checked = 0, 0, False
    try:
        with path.open("rb") as file:
            while raw := file.readline(-1 if most is None else most):
                number += 1
                place = f"{name}, line {number}"
                if number == 1:
                    _check_beginning(raw, place)
                if most is not None and len(raw) == most and not raw.endswith(b"\n"):
                    yield Line(number=number, place=place, text="\n", bad=_too_long(raw, most))
                    offset += _read_past_line(file)
                else:
                    text, bad = _decoded(raw, offset)
                    if bad is not None and not checked:
                        checked = True
                        _check_encoding(path, bad, place)
                    yield Line(number=number, place=place, text=text, bad=bad)
                offset += len(raw)
    except OSError as error:
        raise TunesmithError(f"{name} can't be read: {error.strerror}") from error


def _check_beginning(raw: bytes, place: str) -> None:
    for magic, meaning in MAGIC.items():
        if raw.startswith(magic):
            raise TunesmithError(f"{place}: the file is {meaning}")
    if raw.startswith(UTF16) or (len(raw) > 1 and (raw[0] == 0) != (raw[1] == 0)):
        raise TunesmithError(f"{place}: the file is UTF-16, or not text; save it as UTF-8")


def _decoded(raw: bytes, offset: int) -> tuple[str, BadRow | None]:
    """The text of a line, which begins at byte `offset` of the file, and what is wrong with it."""
    if offset == 0 and raw.startswith(BOM):
        raw, offset = raw[len(BOM) :], len(BOM)
    try:
        text, reason = raw.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        text = raw.decode("utf-8", errors="replace")
        wrong = f"byte {offset + error.start} (0x{raw[error.start]:02x})"
        reason = f"{wrong} is not UTF-8; save the file as UTF-8"
    if b"\0" in raw:
        reason = f"there is a NUL at byte {offset + raw.index(0)}; the file is damaged, or it is not UTF-8 text"
    return text, BadRow(reason=reason, content=text) if reason else None


def _read_past_line(file: BinaryIO) -> int:
    """Reads to the end of the line, and returns how many bytes that were."""
    passed = 0
    while part := file.readline(CHUNK):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _too_long(raw: bytes, most: int) -> BadRow:
    text = raw[:KEPT_CHARACTERS].decode("utf-8", errors="replace")
    hint = "; if the file is one JSON value, name it .json" if text.lstrip("\ufeff \t").startswith("[") else ""
    reason = f"the line has more than {most:,} bytes, too many for one row; divide it{hint}"
    return BadRow(reason=reason, content=text)


def _check_encoding(path: Path, first: BadRow, place: str) -> None:
    """Raises TunesmithError where more lines are not UTF-8 than are, and not just a few: that is the file's encoding,
    not a bad row."""
    count = right = wrong = 0
    with path.open("rb") as file:
        while raw := file.readline(MOST_BYTES):
            count += 1
            if raw.isascii():
                continue
            try:
                raw.decode("utf-8")
                right += 1
            except UnicodeDecodeError:
                wrong += 1
    if wrong > max(1, right) and wrong > DAMAGED_SHARE * count:
        raise TunesmithError(
            f"{place}: {first.reason}. Of the lines that are not plain ASCII {right:,} are UTF-8 and "
            f"{wrong:,} are not: the file has another encoding, such as Latin-1 (`iconv -f latin1 -t utf8`)"
        )


def _by_line(path: Path, name: str, row_of: Callable[[Line], SourceRow | BadRow]) -> PlacedRows:
    for line in numbered_lines(path, name):
        if line.bad is not None:
            yield line.place, line.bad
        elif line.text.strip():
            yield line.place, row_of(line)


# JSON


def _json_line(line: Line) -> SourceRow | BadRow:
    """The object in a line. Raises TunesmithError where the first line shows that the file is not JSON Lines."""
    text, first = line.text.rstrip("\r\n").removeprefix("\ufeff"), line.number == 1  # files were joined, BOMs and all
    try:
        row = _parsed(text)
    except json.JSONDecodeError as error:
        hint = "" if line.text.endswith("\n") else "; the file ends in this line: it seems to be cut off"
        bad = BadRow(reason=f"column {error.colno}: {error.msg}{hint}", content=text, separator=", ")
        if first and text.strip() in ("[", "{"):
            hint = "; this looks like one JSON value over many lines: name the file .json"
            raise TunesmithError(f"{bad.error(line.place)}{hint}") from error
        return bad
    except ValueError as error:
        return BadRow(reason=str(error), content=text)
    if isinstance(row, list) and first:
        raise TunesmithError(f"{line.place} is a list; if the file is one list of objects, name it .json")
    return _object(row)


def _json(path: Path, name: str) -> PlacedRows:
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
        raise TunesmithError(f"{name} holds {kind_of(value)}, expected a list of objects")
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if any(key in columns for key in value for columns in FORMATS.values()):
        raise TunesmithError(f"{name} holds a single row; put it in a list: [{{...}}]")
    if len(lists) != 1:
        held = f"the lists {', '.join(map(repr, lists))}" if lists else "no list"
        raise TunesmithError(f"{name} holds an object with {held}; expected a list of objects, or an object with one")
    return value[lists[0]], f" of {lists[0]!r}"


def _parsed(text: str) -> Any:
    """JSON in which no key is given twice in an object. Raises ValueError, JSONDecodeError when it isn't JSON."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_number, parse_float=_finite)
        if LOOSE_SURROGATE.search(text):
            check_characters(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    return value


def _refuse_number(text: str) -> float:
    """Python's JSON has NaN and Infinity, which JSON does not."""
    raise ValueError(f"{text[:40]} is not a number in JSON; write null, or a finite number")


def _finite(text: str) -> float:
    number = float(text)
    return number if isfinite(number) else _refuse_number(text)


def _unique(pairs: list[tuple[str, Any]]) -> SourceRow:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return row


def _object(row: Any) -> SourceRow | BadRow:
    if not isinstance(row, dict):
        return BadRow(reason=f"is {kind_of(row)}, expected an object {{...}}", content=row, separator=" ")
    return row


# Tables


def _table(path: Path, name: str, delimiter: str) -> PlacedRows:
    """Rows of text values under the names of the first line. A place is the line in which the row begins."""
    csv.field_size_limit(2**31 - 1)  # a process-wide limit, by default 128 KiB: less than a long document
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
        elif values and not header:
            header = _checked_header(values, place)
        elif values and len(values) != len(header):
            reason = f"has {len(values)} values, but the header has {len(header)} names"
            yield place, BadRow(reason=reason, content=values, separator=" ")
        elif values:
            yield place, dict(zip(header, values, strict=True))


def _checked_header(names: list[str], place: str) -> list[str]:
    for name in names:
        if not name.strip():
            raise TunesmithError(f"{place}: a column has no name; the header is {', '.join(map(repr, names))}")
        if names.count(name) > 1:
            raise TunesmithError(f"{place}: the column {name!r} is there twice")
    return names


def _parquet(path: Path, name: str) -> PlacedRows:
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
        raise TunesmithError(f"{name}: after {number} rows: {error}; it is damaged, or not a Parquet file") from error


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
        yield f"{name} ({split}), row {number}", row


READERS: dict[str, Callable[[Path, str], PlacedRows]] = {
    ".jsonl": partial(_by_line, row_of=_json_line),
    ".ndjson": partial(_by_line, row_of=_json_line),
    ".json": _json,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".parquet": _parquet,
    ".txt": partial(_by_line, row_of=lambda line: {"text": line.text.rstrip("\r\n")}),
}
