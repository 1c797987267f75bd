"""A source's rows to typed rows: all of one format, each with its place; what can't be one is a bad row."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from tunesmith.data.formats import FormatOptions, detect, format_row, parse
from tunesmith.data.skipped import BadRow, Place
from tunesmith.errors import TunesmithError
from tunesmith.types import Row, Text, Tokens

Source: TypeAlias = Iterable[tuple[str, Mapping[str, Any] | BadRow]]


def parsed(rows: Source, options: FormatOptions) -> Iterator[tuple[str, Row]]:
    """Source rows with their places to typed rows, all in the format of the first.

    A bad row is left out with `skip_bad`, else TunesmithError is raised.
    """
    return ((place, row) for place, row in sifted(rows, options) if not isinstance(row, BadRow))


def sifted(rows: Source, options: FormatOptions) -> Iterator[tuple[str, Row | BadRow]]:
    """As `parsed`, with the bad rows between the others; the format is that of the first row that has one."""
    reader = _Reader(options)
    for place, row in rows:
        if isinstance(row, BadRow):
            if not options.skip_bad:
                raise row.error(place)
            yield place, row
            continue
        try:
            value: Row | BadRow = reader.read(row)
        except TunesmithError as error:
            if not options.skip_bad:
                raise TunesmithError(f"{place}: {error}") from error
            value = BadRow(reason=str(error), content=dict(row))
        yield (Place(place, row) if options.skip_bad else place), value


class _Reader:
    """Reads row after row in the format of the first one."""

    def __init__(self, options: FormatOptions) -> None:
        self.options = options
        self.format_name = self.kind = ""

    def read(self, row: Mapping[str, Any]) -> Row:
        for name in row:
            if not isinstance(name, str):
                raise TunesmithError(f"a column is named {name!r}, expected text")
        try:
            if self.options.formatting_func is not None:
                value, name = self._formatted(row), ""
            else:
                name = self.format_name or detect(row, self.options)
                value = parse(row, name, self.options)
        except RecursionError:
            raise TunesmithError("lists or objects are nested too deeply") from None
        kind = _kind(value)
        if self.kind not in ("", kind):
            raise TunesmithError(f"this row is {kind}, the rows before it are each {self.kind}")
        self.format_name, self.kind = name, kind
        return value

    def _formatted(self, row: Mapping[str, Any]) -> Row:
        """What the user's function makes of `row`; what it raises is a reason to skip the row, where that is wanted."""
        try:
            return format_row(row, self.options)
        except Exception as error:
            if isinstance(error, TunesmithError) or not self.options.skip_bad:
                raise
            raise TunesmithError(f"formatting_func raised {type(error).__name__}: {error}") from error


def _kind(row: Row) -> str:
    """What a row is, in words: rows of two kinds would be trained on differently."""
    if isinstance(row, Tokens):
        return "tokens"
    if isinstance(row, Text):
        return "a text" if row.prompt is None else "a prompt and a completion, both text"
    return "a conversation" if row.prompt_length is None else "a prompt and a completion, both messages"
