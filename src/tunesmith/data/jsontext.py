"""JSON to rows: lines of objects, and values over any number of lines that hold rows.

In memory is the row that is being read. Only an object that holds all rows is read as a whole.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from tunesmith.data.folders import no_such_split
from tunesmith.data.formats import FORMATS, check_characters
from tunesmith.data.lines import CHUNK, MOST_BYTES, Line, check_encoding, is_compressed, not_utf8, opened
from tunesmith.data.skipped import BadRow
from tunesmith.data.values import kind_of
from tunesmith.errors import TunesmithError

SourceRow: TypeAlias = dict[str, Any]
PlacedRows: TypeAlias = Iterator[tuple[str, SourceRow | BadRow]]

MOST_OF_A_PACKED_OBJECT = 1_000_000_000
"""Bytes of an object that holds all rows, in a compressed file: a small file could unpack to any size."""
BLANKS = re.compile(r"[ \t\r\n]*")
LONGEST_WORD = 16
"""Characters: no word or escape of JSON that is cut off is as long."""
LOOSE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""A hint only: pairs of surrogates are right, a half one is not."""


def json_line(line: Line) -> SourceRow | BadRow:
    """The object in a line."""
    text = line.text.rstrip("\r\n").removeprefix("\ufeff")  # files were joined, BOMs and all
    try:
        row = _parsed(text)
    except json.JSONDecodeError as error:
        hint = "" if line.text.endswith("\n") else "; the file ends in this line: it seems to be cut off"
        return BadRow(reason=f"column {error.colno}: {error.msg}{hint}", content=text, separator=", ")
    except ValueError as error:
        return BadRow(reason=str(error), content=text)
    return _object(row)


class JsonText:
    """The text of a file as JSON values, one after another; in memory is the one that is being read.

    `text` is what has been read and not passed over yet; its first character stands in line `line`, behind `column`
    others.
    """

    def __init__(self, file: BinaryIO, path: Path, name: str) -> None:
        self._file, self._path, self.name = file, path, name
        self.text, self.at, self.line, self.column = "", 0, 1, 0
        self._undecoded, self._offset, self._ended = b"", 0, False
        self._grow()
        self.text = self.text.removeprefix("\ufeff")

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            assert blanks is not None
            self.at = blanks.end()
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def value(self, most: float, *, strict: bool = True) -> Any:
        """The next value. Raises JSONDecodeError, ValueError for what `strict` refuses, and TunesmithError for a value
        of more than `most` characters; then it is still the next one."""
        self.peek()
        decoder = STRICT if strict else json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = "Unterminated" in error.msg or len(self.text) - error.pos < LONGEST_WORD
                if is_cut and len(self.text) - self.at > most:
                    raise self.error(self.at, f"a value has more than {most:,} characters; divide it") from None
                if not is_cut or not self._grow():
                    raise
                continue
            # A number may go on in what has not been read.
            if isinstance(value, dict | list | str) or end < len(self.text) or not self._grow():
                if strict and LOOSE_SURROGATE.search(self.text, self.at, end):
                    _check_pairs(value)
                self.at = end
                return value

    def error(self, at: int, reason: str) -> TunesmithError:
        """An error at the character `at` of the text."""
        before = self.text[:at]
        line = self.line + before.count("\n")
        column = at - before.rfind("\n") + (0 if "\n" in before else self.column)
        is_cut = self._ended and not self.text.rstrip().endswith(("]", "}"))
        hint = "; the file seems to be cut off" if is_cut else ""
        return TunesmithError(f"{self.name}, line {line}, column {column}: {reason}{hint}")

    def _grow(self) -> bool:
        """Read as much again as is waiting; False at the end."""
        if self._ended:
            return False
        passed = self.text[: self.at]
        self.line += passed.count("\n")
        self.column = len(passed) - passed.rfind("\n") - 1 + (0 if "\n" in passed else self.column)
        self.text, self.at = self.text[self.at :], 0
        raw = self._file.read(max(CHUNK, len(self.text)))
        self._ended, raw = not raw, self._undecoded + raw
        try:
            text, self._undecoded = raw.decode(), b""
        except UnicodeDecodeError as error:
            if self._ended or error.reason != "unexpected end of data":
                raise self._not_utf8(raw, error.start) from error
            text, self._undecoded = raw[: error.start].decode(), raw[error.start :]
        self._offset += len(raw) - len(self._undecoded)
        self.text += text
        return True

    def _not_utf8(self, raw: bytes, at: int) -> TunesmithError:
        line = self.line + self.text.count("\n") + raw[:at].count(b"\n")
        place, reason = f"{self.name}, line {line}", not_utf8(self._offset + at, raw[at])
        check_encoding(self._path, self.name, reason, place)
        return TunesmithError(f"{place}: {reason}")


def json_rows(path: Path, name: str, split: str | None, default_split: str) -> PlacedRows:
    """JSON over any number of lines: a list of rows, an object that holds them, or objects one after another. The rows
    have places like "rows.json, row 3"."""
    with opened(path, name) as file:
        text = JsonText(file, path, name)
        try:
            if text.peek() == "[":
                if split is not None:
                    raise TunesmithError(f"split is {split!r}, but {name} is one list, which has no splits; drop it")
                yield from _items(text)
                return
            value = text.value(MOST_OF_A_PACKED_OBJECT if is_compressed(path) else float("inf"))
            if not text.peek():
                yield from _held(value, name, split, default_split)
                return
            number = 1
            yield f"{name}, row {number}", _object(value)
            while text.peek():
                number += 1
                yield f"{name}, row {number}", _row(text)
        except json.JSONDecodeError as error:
            raise text.error(error.pos, error.msg) from error
        except RecursionError:
            raise TunesmithError(f"{name}: lists or objects are nested too deeply") from None
        except TunesmithError:
            raise
        except ValueError as error:
            raise TunesmithError(f"{name}: {error}") from error


def _items(text: JsonText) -> PlacedRows:
    """The objects of a list."""
    text.at += 1
    number = 0
    while text.peek() != "]":
        if number and text.peek() != ",":
            raise text.error(text.at, "Expecting ',' delimiter")
        text.at += bool(number)
        number += 1
        yield f"{text.name}, row {number}", _row(text)
    text.at += 1
    if text.peek():
        raise text.error(text.at, "Extra data")


def _row(text: JsonText) -> SourceRow | BadRow:
    """The next value as a row. Raises JSONDecodeError for what is no JSON, behind which no other row can be found."""
    try:
        return _object(text.value(MOST_BYTES))
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # JSON, and not a row: the next one begins where it ends
        return BadRow(reason=str(error), content=text.value(MOST_BYTES, strict=False))


def _held(value: Any, name: str, split: str | None, default_split: str) -> PlacedRows:
    """The rows that an object holds: columns as pandas writes them, one list of objects or one for each split. One
    that holds none is a row itself."""
    if not isinstance(value, dict):
        raise TunesmithError(f"{name} holds {kind_of(value)}, expected a list of objects")
    rows, where = _from_columns(value), ""
    if rows is None and is_row(value):
        rows = [value]
    elif rows is None:
        lists = {key: item for key, item in value.items() if _is_list_of_rows(item)}
        key = split or (next(iter(lists)) if len(lists) == 1 else default_split)
        if key not in lists:
            raise TunesmithError(no_such_split(name, key, lists))
        rows, where, split = lists[key], f" of {key!r}", None
    if split is not None:
        raise TunesmithError(f"split is {split!r}, but {name} has no splits; drop it")
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}{where}", _object(row)


def is_row(value: Mapping[str, Any]) -> bool:
    """Whether an object is a row, and does not hold rows."""
    return _from_columns(value) is None and (has_format(value) or not any(map(_is_list_of_rows, value.values())))


def _is_list_of_rows(value: Any) -> bool:
    """Whether a list's items are objects, and not the messages of one conversation."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return False
    return not value or not {"role", "from"} & {*value[0]}


def _from_columns(value: Mapping[str, Any]) -> list[SourceRow] | None:
    """The rows of an object of columns, as pandas' `to_json` and `Dataset.to_dict` have them; None for another object.

    A column is a list, or an object with the numbers of the rows; with `orient="index"` a row has its number, and with
    `orient="split"` names and values are apart.
    """
    if {"columns", "data"} <= {*value} <= {"columns", "index", "data"}:
        names, data = value["columns"], value["data"]
        if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
            return [dict(zip(names, row, strict=True)) for row in data]
    first = next(iter(value.values()), None)
    if isinstance(first, dict) and all(isinstance(item, dict) for item in value.values()):
        if (
            first
            and all(key.isdigit() for key in first)
            and all(item.keys() == first.keys() for item in value.values())
        ):
            return [{name: column[number] for name, column in value.items()} for number in first]
        return list(value.values()) if all(key.isdigit() for key in value) else None
    if not isinstance(first, list) or not all(isinstance(item, list) for item in value.values()):
        return None
    items = [item for column in value.values() for item in column]
    if any(isinstance(item, dict) for item in items) or ("input_ids" in value and not isinstance(items[0], list)):
        return None  # a row
    if not items or {len(column) for column in value.values()} != {len(first)}:
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _parsed(text: str) -> Any:
    """JSON in which no key is given twice in an object. Raises ValueError, JSONDecodeError when it isn't JSON."""
    try:
        value = STRICT.decode(text)
        if LOOSE_SURROGATE.search(text):
            _check_pairs(value)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    return value


def _check_pairs(value: Any) -> None:
    try:
        check_characters(json.dumps(value, ensure_ascii=False))
    except TunesmithError as error:
        raise ValueError(str(error)) from error


def _refuse_number(text: str) -> float:
    """Python's JSON has NaN and Infinity, which JSON does not."""
    raise ValueError(f"{text[:40]} is not a number in JSON; write null, or a finite number")


def _finite(text: str) -> float:
    number = float(text)
    return number if isfinite(number) else _refuse_number(text)


def _unique(pairs: list[tuple[str, Any]]) -> SourceRow:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return row


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_number, parse_float=_finite)


def _object(row: Any) -> SourceRow | BadRow:
    if not isinstance(row, dict):
        return BadRow(reason=f"is {kind_of(row)}, expected an object {{...}}", content=row, separator=" ")
    return row


def has_format(columns: Iterable[str]) -> bool:
    names = {*columns}
    return any(names.issuperset(needed) for needed in FORMATS.values())
