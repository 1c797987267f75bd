"""The one exception a user meets, and the hint that goes with it."""

from collections.abc import Iterable
from difflib import get_close_matches

from tunesmith.text import without_middle

LONGEST = 4000
"""Characters of an error."""


class TunesmithError(ValueError):
    """A mistake in what the user gave: says where, what was found, and what to write instead.

    The command line prints it without a traceback and exits with code 2. A long text, which has a value of the user's
    in it, loses its middle.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(without_middle(text, LONGEST))


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A `; did you mean 'max_length'?` for a misspelt `name`, or an empty string when nothing is close."""
    matches = get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
