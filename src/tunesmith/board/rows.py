"""The rows of a recipe as training sees them, with their masks: a page of them, or those with a word in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.errors import TunesmithError
from tunesmith.report.inspect import InspectedRow, rows_html

if TYPE_CHECKING:
    from tunesmith.settings.recipe import Recipe

MOST_FOUND = 50
"""Rows that a search shows."""
MOST_SEARCHED = 20_000
"""Rows that a search reads."""


class Prepared(Protocol):
    """The rows of a recipe, prepared as training prepares them."""

    facts: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def row(self, number: int) -> InspectedRow: ...

    def text(self, number: int) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """`count` rows from the row `first` on, or with `text` those that hold it, whatever their case."""

    first: int = 1
    count: int = 5
    text: str = ""


class Rows:
    """Shows rows; those of the last recipe stay prepared."""

    def __init__(self, prepare: Callable[["Recipe"], Prepared]) -> None:
        self._prepare = prepare
        self._key: Any = None
        self._prepared: Prepared | None = None

    def page(self, key: str, recipe: "Recipe", wanted: Wanted) -> dict[str, Any]:
        """HTML of the rows that are wanted. `key` is the text of the recipe."""
        if self._prepared is None or key != self._key:
            self._prepared, self._key = self._prepare(recipe), key
        rows = self._prepared
        if wanted.text:
            searched = min(len(rows), MOST_SEARCHED)
            word = wanted.text.casefold()
            numbers = [number for number in range(1, searched + 1) if word in rows.text(number).casefold()]
            about = f"{len(numbers):,} of {searched:,} rows have “{wanted.text}”"
            if len(numbers) > MOST_FOUND:
                about += f"; the first {MOST_FOUND} are shown"
            numbers = numbers[:MOST_FOUND]
        else:
            if not 1 <= wanted.first <= max(1, len(rows)):
                raise TunesmithError(f"there are rows 1 to {len(rows):,}")
            numbers = list(range(wanted.first, min(len(rows), wanted.first + wanted.count - 1) + 1))
            about = f"rows {numbers[0]:,} to {numbers[-1]:,} of {len(rows):,}" if numbers else "no rows"
        return {
            "facts": [list(pair) for pair in rows.facts],
            "total": len(rows),
            "about": about,
            "html": rows_html([rows.row(number) for number in numbers]),
        }
