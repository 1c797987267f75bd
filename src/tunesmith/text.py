"""Numbers and lists in words: counts, sizes and times, each written in one way everywhere."""

import math
from collections.abc import Sequence


def counted(count: int, noun: str) -> str:
    """`1 row`, and `2,000 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def verb(count: int, one: str, several: str) -> str:
    """The verb that goes with so many: `one` with 1, `several` with any other number."""
    return one if count == 1 else several


def listing(names: Sequence[str], most: int = 50) -> str:
    """`a, b`; of more than `most`, the first ones: `a, b and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def size(count: float) -> str:
    """Bytes in decimal units, as disks and shops count them: `64 kB`, `98 MB`, `1.2 GB`, `1,234.0 GB`."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `2 min 3 s`, `1 h 20 min`; without parts that are 0."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (0 if hours else rest, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count)


def clock(seconds: float | None) -> str:
    """`2:03`, `1:02:03`, as a clock that runs shows it; `-` for what is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shorten(text: str, width: int = 80) -> str:
    """`text` in at most `width` characters."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def without_middle(text: str, width: int) -> str:
    """`text` in at most `width` characters, of which there are 100 or more: the first ones and the last ones."""
    half = width // 2 - 25
    if len(text) <= width:
        return text
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """`text` with what a terminal would obey written out, `\\x1b` say: rows, names and files are not ours. Line ends
    and tabs stay."""
    return text.translate(CONTROLS)
