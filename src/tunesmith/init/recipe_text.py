"""A recipe as text to read: each setting with the reason for it."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

WIDTH = 110


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A setting of a recipe and why it has this value. One with `off` is written as a comment: what one might do."""

    key: str
    value: Any
    why: str
    off: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Settings that belong together, under a heading."""

    title: str
    lines: tuple[Line, ...]


def values(sections: Sequence[Section]) -> dict[str, Any]:
    """What the recipe sets."""
    return {line.key: line.value for section in sections for line in section.lines if not line.off}


def write(heading: Sequence[str], sections: Sequence[Section]) -> str:
    """The text of the recipe: `heading` as comments, then the sections. Lines of the heading that begin with spaces are
    commands, which stay whole however long they are: they are there to be copied."""
    parts = ["\n".join(wrapped for line in heading for wrapped in _comment(line))]
    for section in sections:
        lines = [text for line in section.lines for text in _written(line)]
        parts.append("\n".join([f"# {section.title}", *lines]))
    return "\n\n".join(parts) + "\n"


def _written(line: Line) -> list[str]:
    """Behind the setting where there is room for the reason, else above it."""
    key = yaml_value(line.key)
    setting = f"{'# ' if line.off else ''}{key}: {yaml_value(line.value)}"
    why = _plain(line.why)
    if not why:
        return [setting]
    if len(setting) + len(why) + 4 <= WIDTH:
        return [f"{setting}  # {why}"]
    return [*_comment(why), setting]


def _comment(text: str) -> list[str]:
    if text.startswith("  "):
        return [f"# {_printable(text)}"]
    return textwrap.wrap(
        _plain(text),
        WIDTH,
        initial_indent="# ",
        subsequent_indent="#   ",
        break_long_words=False,
        break_on_hyphens=False,
    ) or ["#"]


def _plain(text: str) -> str:
    """`text` in one line, without characters that YAML does not allow even in a comment."""
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def yaml_value(value: Any) -> str:
    """`value` as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("...\n").strip()
