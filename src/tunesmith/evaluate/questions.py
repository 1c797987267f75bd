"""What rows ask, and the answers they expect: rows that were not trained on, to measure a model with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.formats import FormatOptions, parse_rows
from tunesmith.data.read import read_rows
from tunesmith.data.tokenize import Counts
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation, Row, Text, Tokens

Prompt = str | tuple[dict[str, Any], ...]
"""A text to go on with, or messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One row: `place` says which, `arguments` are for the chat template, such as `tools`."""

    place: str
    prompt: Prompt
    expected: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the rows are: as `read_rows` and `FormatOptions` take it. `system` is put in place of the rows' own system
    message."""

    data: str
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None


def questions(source: Source, counts: Counts) -> list[Question]:
    """All rows that have a prompt and an answer; `counts` is told of the others.

    Raises TunesmithError for what can't be read, and where no row is left.
    """
    options = FormatOptions(columns=source.columns, arrow=False)
    rows = read_rows(source.data, source.split, default_split="test")
    found = list(_of_rows(parse_rows(rows, options), source.system, counts))
    if not found:
        reason, (count, places) = next(iter(counts.dropped.items()))
        raise TunesmithError(
            f"{source.data} has no row with a prompt and an answer: {count:,} with {reason} ({', '.join(places)})"
        )
    return found


def _of_rows(rows: Iterator[tuple[str, Row]], system: str | None, counts: Counts) -> Iterator[Question]:
    for place, row in rows:
        counts.rows += 1
        made = _question(place, row, system)
        if isinstance(made, Question):
            yield made
        else:
            counts.drop(made, place)


def _question(place: str, row: Row, system: str | None) -> Question | str:
    """The question of a row, or what it comes with instead."""
    if isinstance(row, Tokens):
        return "token ids, which are no text to ask"
    if isinstance(row, Text):
        if row.prompt is None:
            return "one text, not a prompt and an answer"
        prompt: Prompt = row.prompt
        expected, arguments = row.text[len(row.prompt) :], {}
        if not row.prompt.strip():
            return "no prompt"
    else:
        at = _last_answer(row)
        if not at:
            return "no answer" if at is None else "no prompt"
        prompt = tuple(message.fields for message in row.messages[:at])
        expected, arguments = _text(row.messages[at].fields.get("content")), dict(row.template_kwargs)
        if row.tools:
            arguments["tools"] = row.tools
        if not expected.strip() and row.messages[at].fields.get("tool_calls"):
            return "a call of a tool for its answer, not a text"
    if not expected.strip():
        return "no answer"
    return Question(place=place, prompt=_with_system(prompt, system), expected=expected, arguments=arguments)


def _last_answer(row: Conversation) -> int | None:
    """The number of the last message of the assistant, None without one behind the prompt."""
    places = range(row.prompt_length or 0, len(row.messages))
    return max((i for i in places if row.messages[i].role == "assistant"), default=None)


def _text(content: Any) -> str:
    """A message's content, which may be text in parts."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else str(content or "")


def _with_system(prompt: Prompt, system: str | None) -> Prompt:
    if system is None:
        return prompt
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return ({"role": "system", "content": system}, *(item for item in messages if item["role"] != "system"))
