"""The JSON schema of recipes, by which an editor completes keys, shows their help, and marks what does not fit.

The schema takes what recipes take, and is wider in one way: it does not know which keys contradict each other, which
`tunesmith check` tells.
"""

from dataclasses import MISSING
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from tunesmith.settings.coerce import members_of
from tunesmith.settings.recipe import TRAINERS, all_settings

_TYPES: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}


def recipe_schema() -> dict[str, Any]:
    """The schema of the recipes of all trainers (JSON Schema, draft 2020-12). A setting that two trainers have with
    other values takes those of both."""
    properties: dict[str, Any] = {}
    for trainer in TRAINERS:
        for name, setting in all_settings(trainer).items():
            forms = _forms(setting.kind)
            if name in properties:
                forms = [*properties[name]["anyOf"], *forms]
            elif forms:
                properties[name] = {"description": setting.help} | _default(setting.default)
            if forms:
                properties[name]["anyOf"] = [form for number, form in enumerate(forms) if form not in forms[:number]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tunesmith recipe",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _default(value: Any) -> dict[str, Any]:
    value = getattr(value, "value", value)
    return {"default": value} if value is not MISSING and isinstance(value, bool | int | float | str | None) else {}


def _forms(kind: Any) -> list[dict[str, Any]]:
    """What a value of the type `kind` may look like in YAML; none where it is for scripts only."""
    forms: list[dict[str, Any]] = []
    for member in members_of(kind):
        origin = get_origin(member) or member
        if isinstance(origin, type) and issubclass(origin, Enum):
            forms.append({"enum": [item.value for item in origin]})
        elif origin is Literal:
            forms.append({"enum": list(get_args(member))})
        elif origin is list:
            kinds = get_args(member)
            items = {} if not kinds or kinds[0] is Any else {"anyOf": _forms(kinds[0])}
            forms += [{"type": "array", "items": items}, {"type": "string"}]  # `a,b` is a list, too
        elif origin is dict:
            forms.append({"type": "object"})
        elif origin in _TYPES:
            forms.append({"type": _TYPES[origin]})
    if {"type": "number"} in forms:  # readers of YAML 1.1 take 2e-5 for text
        forms.append({"type": "string", "pattern": r"^[+-]?[0-9.]+[eE][+-]?[0-9]+$"})
    return forms
