"""Rewards that can be checked: functions of an answer's text, and of what its row says the answer is.

Each name in `CHECKS` is a function of its arguments that makes a reward. A reward has TRL's signature: lists of
prompts, of completions and of the columns of the rows, an item for each answer; it returns a list of numbers.

    >>> CHECKS["number"](column="answer")(completions=["So it is 1,250."], answer=[1250])
    [1.0]
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from tunesmith.errors import TunesmithError

Completion: TypeAlias = str | Sequence[Mapping[str, Any]]
Reward: TypeAlias = Callable[..., list[float]]
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|-?\.\d+")
THINKING = re.compile(r"<think>(?!.*<think>)(.*?)</think>.*", re.DOTALL)


def text_of(completion: Completion) -> str:
    """The text of an answer: as it is, or of the last message of the assistant."""
    if isinstance(completion, str):
        return completion
    spoken = [message.get("content") for message in completion if message.get("role") == "assistant"]
    return spoken[-1] if spoken and isinstance(spoken[-1], str) else ""


def json_valid() -> Reward:
    """1 where the whole answer is JSON, else 0."""

    def json_valid(completions: Sequence[Completion], **_: Any) -> list[float]:
        return [float(_read_json(text_of(answer))[0]) for answer in completions]

    return json_valid


def json_schema(*, schema: Mapping[str, Any] | str | None = None, column: str = "schema") -> Reward:
    """1 where the whole answer is JSON that fits a JSON schema: the one that is given, or that of the row's column.

    Any draft of JSON Schema, 2020-12 where `$schema` names none. Nothing is fetched: a `$ref` points into the schema
    itself. Raises TunesmithError without the library jsonschema, and for what is no schema.
    """
    if find_spec("jsonschema") is None:
        raise TunesmithError('json_schema needs jsonschema: pip install "tunesmith[rewards]"')
    if schema is not None:
        fixed = _json_of(schema)
        _validator(fixed)

        def json_schema(completions: Sequence[Completion], **_: Any) -> list[float]:
            return [_fits(answer, fixed) for answer in completions]

        return json_schema

    def json_schema_of(completions: Sequence[Completion], **columns: Any) -> list[float]:
        schemas = [_json_of(_without_nulls(schema)) for schema in columns[column]]
        return [_fits(answer, one) for answer, one in zip(completions, schemas, strict=True)]

    return _needs(json_schema_of, "json_schema", column)


def exact_match(*, column: str = "answer") -> Reward:
    """1 where the answer is the text in the row's column, but for space around it."""

    def matches(completions: Sequence[Completion], **columns: Any) -> list[float]:
        pairs = zip(completions, columns[column], strict=True)
        return [float(text_of(answer).strip() == str(wanted).strip()) for answer, wanted in pairs]

    return _needs(matches, "exact_match", column)


def number(*, column: str = "answer", tolerance: float = 0.0) -> Reward:
    """1 where the last number in the answer is that of the row's column, within `tolerance` of it."""

    def close(completions: Sequence[Completion], **columns: Any) -> list[float]:
        pairs = zip(completions, columns[column], strict=True)
        return [float(_equal(last_number(text_of(answer)), wanted, tolerance)) for answer, wanted in pairs]

    return _needs(close, "number", column)


def regex(*, pattern: str, full: bool = False) -> Reward:
    """1 where the pattern is found in the answer; with `full`, where it is the whole answer."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise TunesmithError(f"regex: the pattern {pattern!r} can't be read: {error}") from error
    find = compiled.fullmatch if full else compiled.search

    def regex(completions: Sequence[Completion], **_: Any) -> list[float]:
        return [float(find(text_of(answer)) is not None) for answer in completions]

    return regex


def length(*, most: int, least: int = 0, unit: Literal["tokens", "characters"] = "tokens") -> Reward:
    """1 where the answer has from `least` to `most` tokens or characters, else 0."""
    if unit not in ("tokens", "characters"):
        raise TunesmithError(f"length: unit is {unit!r}; write tokens or characters")

    def length(completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        sizes = map(len, completion_ids) if unit == "tokens" else (len(text_of(answer)) for answer in completions)
        return [float(least <= size <= most) for size in sizes]

    return length


def soft_overlong(*, most: int, margin: int) -> Reward:
    """0 up to `most` - `margin` tokens, -1 above `most`, and falling evenly between (DAPO, arXiv:2503.14476)."""
    if not 0 < margin <= most:
        raise TunesmithError(f"soft_overlong: margin is {margin}; write a number of tokens up to most, {most}")

    def soft_overlong(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [max(-1.0, min(0.0, (most - margin - len(ids)) / margin)) for ids in completion_ids]

    return soft_overlong


def think_format() -> Reward:
    """1 where the answer begins with one pair of <think> and </think>, else 0."""

    def think_format(completions: Sequence[Completion], **_: Any) -> list[float]:
        return [float(THINKING.fullmatch(text_of(answer)) is not None) for answer in completions]

    return think_format


CHECKS: dict[str, Callable[..., Reward]] = {
    check.__name__: check
    for check in (json_valid, json_schema, exact_match, number, regex, length, soft_overlong, think_format)
}


def last_number(text: str) -> float | None:
    """The last number in a text, with or without commas between thousands."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _needs(reward: Reward, name: str, column: str) -> Reward:
    """Notes under which name it is shown, and which column of the rows it reads."""
    reward.__name__ = name
    reward.columns = (column,)  # type: ignore[attr-defined]
    return reward


def _equal(found: float | None, wanted: Any, tolerance: float) -> bool:
    try:
        expected = last_number(wanted) if isinstance(wanted, str) else float(wanted)
    except (TypeError, ValueError):
        expected = None
    if expected is None:
        raise TunesmithError(f"number: the row's answer is {wanted!r}, which has no number")
    return found is not None and math.isfinite(found) and abs(found - expected) <= tolerance


# JSON


def _read_json(text: str) -> tuple[bool, Any]:
    def refuse(word: str) -> Any:
        raise ValueError(word)  # NaN and Infinity are no JSON

    try:
        return True, json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False, None


def _json_of(schema: Any) -> str:
    """A schema as text, by which its validator is found again: rows repeat theirs."""
    return schema if isinstance(schema, str) else json.dumps(schema)


def _without_nulls(schema: Any) -> Any:
    """A table gives each row's schema the keys of all of them, None where it has none. No keyword takes null but
    `const` and `default`, whose nulls can't be told from those that the table filled in."""
    if isinstance(schema, Mapping):
        return {key: _without_nulls(item) for key, item in schema.items() if item is not None}
    return [_without_nulls(item) for item in schema] if isinstance(schema, list) else schema


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    is_json, read = _read_json(schema)
    if not is_json or not isinstance(read, dict | bool):
        raise TunesmithError(f"json_schema: {schema[:80]!r} is no schema; write an object, such as {{type: object}}")
    kind = validator_for(read, default=Draft202012Validator)
    try:
        kind.check_schema(read)
    except SchemaError as error:
        place = "/".join(map(str, error.absolute_path)) or "the schema"
        raise TunesmithError(f"json_schema: {place}: {error.message}") from error
    return kind(read, registry=Registry())  # without a registry, the library would fetch what a $ref names


def _fits(answer: Completion, schema: str) -> float:
    from referencing.exceptions import Unresolvable

    is_json, value = _read_json(text_of(answer))
    if not is_json:
        return 0.0
    try:
        return float(_validator(schema).is_valid(value))
    except RecursionError as error:
        raise TunesmithError("json_schema: the schema refers to itself without end") from error
    except Unresolvable as error:
        raise TunesmithError(
            f"json_schema: the $ref {error.ref!r} is not in the schema, and nothing is fetched; write it under $defs"
        ) from error
