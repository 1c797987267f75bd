"""Text of anybody's in a Markdown page: it is shown as it is, and can't change the page."""

import re
from collections.abc import Iterable, Sequence

SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&-])")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""With those that turn the direction of what follows."""


def inline(text: str) -> str:
    """`text` for a line, a heading or a cell."""
    return SPECIAL.sub(r"\\\1", " ".join(CONTROL.sub(" ", text).split()))


def block(text: str, language: str = "text") -> str:
    """`text` in a fenced block, whose fence is longer than any run of backticks in it."""
    text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are Markdown already. All columns but the first that hold numbers only are aligned right."""
    listed = [list(row) for row in rows]
    numbers = [bool(listed) and all(re.fullmatch(r"[\d.,%]*", row[i]) for row in listed) for i in range(len(head))]
    rules = ["---:" if number and i else "---" for i, number in enumerate(numbers)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), rules, *listed])


def shortened(text: str, limit: int) -> str:
    """`text`, or its first `limit` characters and an ellipsis."""
    return text if len(text) <= limit else text[:limit].rstrip() + " …"
