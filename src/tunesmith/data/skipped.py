"""Rows that can't be used: what is known of each, and the file that keeps them when `on_bad_row: skip` leaves them out.

A bad row goes the way of all rows, as a value, so that what is skipped is counted and kept in the order of the data.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tunesmith.errors import TunesmithError

SKIPPED = "skipped_rows.jsonl"
"""The file of a run with the rows that were left out."""
KEPT_CHARACTERS = 4000
"""Of a row that is kept; more is cut off."""
KIND_CHARACTERS = 120
PLACE = re.compile(r"(?:(?P<file>.*), )?(?P<unit>line|row) (?P<number>\d+)(?: of .*)?", re.DOTALL)
Record: TypeAlias = dict[str, Any]
SourceRows: TypeAlias = "Iterable[tuple[str, Mapping[str, Any] | BadRow]]"
"""Rows of a source, each with its place ("rows.jsonl, line 3")."""


class NotTheRow(TunesmithError):
    """A mistake in the settings or in a whole file, which shows at a row: skipping rows would hide it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that can't be read, or can't be made an example. `content` is the row, or its raw text.

    `separator` stands between the place and the reason in a message.
    """

    reason: str
    content: Any
    separator: str = ": "

    def error(self, place: str) -> TunesmithError:
        return TunesmithError(f"{place}{self.separator}{self.reason}")

    @property
    def kind(self) -> str:
        """The reason without what differs from row to row: its first line, without numbers."""
        text = re.sub(r"\s*\(.*", "", self.reason.partition("\n")[0].partition(";")[0])
        return re.sub(r"\d+", "#", text)[:KIND_CHARACTERS]

    def record(self, place: str) -> Record:
        """What is kept of it: its place, the reason, and the row, cut when it is long."""
        where: Record = {"place": place}
        if (parts := PLACE.fullmatch(place)) is not None:
            where |= {"file": parts["file"]} if parts["file"] else {}
            where[parts["unit"]] = int(parts["number"])
        return where | {"reason": self.reason} | _excerpt(self.content)


class Place(str):
    """A place that remembers the row that was there, for what turns out later to be wrong with it."""

    row: Any

    def __new__(cls, place: str, row: Any = None) -> "Place":
        self = super().__new__(cls, place)
        self.row = row
        return self


class SkippedRows:
    """The rows of one split that were left out, in a file: there may be millions. Each place is kept once.

    Without a file of its own it has one that goes when the process ends.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tunesmith-skipped-", ignore_cleanup_errors=True)
        self.path = Path(self._folder.name) / SKIPPED
        self.count = 0
        self._known: set[int] = set()
        self._copy: tuple[Path, str] | None = None

    def add(self, rows: list[tuple[str, BadRow]]) -> None:
        """Keep those of `rows` that are new; a stream is read once an epoch."""
        self._keep(bad.record(place) for place, bad in rows)

    def take(self, file: Path) -> None:
        """Keep what another preparation of the same rows left in `file`."""
        shutil.copyfile(file, self.path)
        with self.path.open(encoding="ascii") as lines:
            self.count = sum(1 for _ in lines)

    def recall(self, file: Path, split: str) -> None:
        """Keep what an earlier part of the run left in `file` for this split."""
        earlier: dict[str, Record] = {}
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
            try:
                record = json.loads(line)
                if record.pop("split") == split:
                    earlier[record["place"]] = record
            except (ValueError, KeyError, TypeError, AttributeError):  # cut off when the run was
                continue
        self._keep(earlier.values())

    def copy_to(self, file: Path, split: str) -> None:
        """Append all to `file`, under the name of the split, and from now on whatever comes."""
        self._copy = file, split
        if self.count:
            self._append_copy(self)

    def __iter__(self) -> Iterator[Record]:
        if self.path.exists():
            with self.path.open(encoding="ascii") as lines:
                yield from map(json.loads, lines)

    def _keep(self, records: Iterable[Record]) -> None:
        new = {hash(record["place"]): record for record in records}
        new = {mark: record for mark, record in new.items() if mark not in self._known}
        if new:
            self._known.update(new)
            self.count += len(new)
            _append(self.path, new.values())
            self._append_copy(new.values())

    def _append_copy(self, records: Iterable[Record]) -> None:
        if self._copy is not None:
            file, split = self._copy
            file.parent.mkdir(parents=True, exist_ok=True)
            _append(file, ({"split": split} | record for record in records))


def _append(file: Path, records: Iterable[Record]) -> None:
    with file.open("a", encoding="ascii") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)


def _excerpt(content: Any) -> Record:
    """The row as JSON `content`, or as `raw` text where it is not JSON or too long."""
    if isinstance(content, str):
        return _cut(content)
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        try:
            return _cut(repr(content))
        except Exception:  # an object of the user's, or one that is nested too deeply
            return {"raw": f"({type(content).__name__})"}
    return {"content": json.loads(text)} if len(text) <= KEPT_CHARACTERS else _cut(text)


def _cut(text: str) -> Record:
    if len(text) <= KEPT_CHARACTERS:
        return {"raw": text}
    return {"raw": text[:KEPT_CHARACTERS], "characters": len(text)}
