"""The values of a source row: those that JSON has, checked, copied, and named in messages."""

import json
from collections.abc import Mapping
from typing import Any

from tunesmith.errors import TunesmithError

ATOMS = frozenset({str, int, float, bool, type(None)})


def kind_of(value: Any) -> str:
    """What a value is in JSON's terms: "a list", "a number"."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    names |= {bool: "true or false", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A value with its kind, cut when it is long: "a number (7)"."""
    return f"{kind_of(value)} ({str(value)[:60]})"


def string(value: Any, place: str) -> str:
    """`value`, which must be text."""
    if not isinstance(value, str):
        raise TunesmithError(f"{place} is {shown(value)}, expected text")
    return value


def plain(value: Any, place: str, *, nulls: bool = True) -> Any:
    """A copy of `value`, which may have JSON's types only: a chat template must not reach the methods of others.

    With `nulls` False, objects lose the keys whose value is None, at every depth.
    """
    if type(value) in ATOMS:
        return value
    if isinstance(value, dict | Mapping):
        return {
            str(name): item if type(item) in ATOMS else plain(item, place, nulls=nulls)
            for name, item in value.items()
            if nulls or item is not None
        }
    if isinstance(value, list | tuple):
        return [plain(item, place, nulls=nulls) for item in value]
    raise TunesmithError(f"{place} has {shown(value)} in it; expected text, numbers, lists and objects")


def from_json(value: Any, place: str, kind: type) -> Any:
    """A list or an object (`kind`), or its JSON text, which is taken as it is, nulls included. None for blank text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise TunesmithError(f"{place} is text that is not JSON: {error}") from error
    if value is not None and not isinstance(value, kind):
        expected = "a list" if kind is list else "an object"
        raise TunesmithError(f"{place} is {shown(value)}, expected {expected}, or its JSON text")
    return value
