"""Tools and calls of them, as different tools write them, in the form of OpenAI's chat API.

A call:  {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Taipei"}}}
A tool:  {"type": "function", "function": {"name": "weather", "description": ..., "parameters": {a JSON schema}}}

`arguments` is an object here, and never its JSON text; `id` is there when the row has one.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from tunesmith.data.values import from_json, shown
from tunesmith.errors import TunesmithError

ARGUMENTS = ("arguments", "parameters", "input", "args")
"""What the arguments of a call are named: by OpenAI, Llama 3, Anthropic and Gemini."""
CALL_TYPES = ("function", "function_call", "tool_call", "tool_use")
HOSTED = re.compile(
    r".*_\d{8}|web_search.*|file_search|code_interpreter|computer_use_preview|image_generation|local_shell|mcp|custom"
)
"""Types of tools that only their provider runs, or that take plain text: no chat template shows them."""


def calls_of(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls in a list of them, in one, or in the JSON text of either. `place`: "'tool_calls' of message 2"."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            expected = 'JSON {"name": ..., "arguments": {...}}'
            raise TunesmithError(f"{place} is {value[:80]!r}; expected {expected} ({error})") from error
    calls = value if isinstance(value, list) else [value]
    return [_call(call, place, f"call {i + 1} in {place}") for i, call in enumerate(calls)]


def _call(call: Any, whole: str, place: str) -> dict[str, Any]:
    call = from_json(call, place, dict) if isinstance(call, str) and call.lstrip().startswith("{") else call
    function = call.get("function", call) if isinstance(call, dict) else None
    kind = call.get("type") if isinstance(call, dict) else None
    if kind is not None and kind not in CALL_TYPES:
        raise TunesmithError(f"{place} has the type {kind!r}; only calls of functions can be shown to a model")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise TunesmithError(f"{whole} must be a list of {{'function': {{'name': ..., 'arguments': ...}}}}")
    used = {"name", "id", "type", "function", "cache_control", *ARGUMENTS}
    rest = {name: value for name, value in function.items() if name not in used}
    named = {"name": function["name"], "arguments": _arguments(function, rest, place)}
    around = {} if function is call else {name: value for name, value in call.items() if name not in ("id", "type")}
    identity = {"id": call["id"]} if call.get("id") else {}
    return {**identity, "type": "function", **around, "function": named | rest}


def _arguments(function: Mapping[str, Any], rest: Mapping[str, Any], place: str) -> dict[str, Any]:
    names = [name for name in ARGUMENTS if function.get(name) is not None]
    if len(names) > 1:
        raise TunesmithError(f"{place} has both {' and '.join(map(repr, names))}; keep 'arguments'")
    if not names and rest:
        raise TunesmithError(f"{place} has no 'arguments'; its keys are {', '.join(function)}")
    value = function[names[0]] if names else {}
    return from_json(value, f"{names[0] if names else 'arguments'!r} of {place}", dict) or {}


def tools_of(value: Any, place: str) -> list[Any]:
    """The tools in a list, whose entries may be JSON text, or in the JSON text of a list."""
    tools: list[Any] = []
    for i, tool in enumerate(from_json(value, place, list) or ()):
        where = f"tool {i + 1} of {place}"
        if isinstance(tool, str) and tool.lstrip().startswith("{"):
            tool = from_json(tool, where, dict)
        if not isinstance(tool, dict):
            raise TunesmithError(f"{where} is {shown(tool)}, expected an object (a JSON schema)")
        declared = tool.get("functionDeclarations", tool.get("function_declarations"))  # Gemini's
        tools += tools_of(declared, where) if declared else [_tool(tool, where)]
    return tools


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    function, kind = tool.get("function"), tool.get("type", "function")
    if not isinstance(function, dict):
        if isinstance(kind, str) and HOSTED.fullmatch(kind) and "input_schema" not in tool:
            raise TunesmithError(
                f"{place} has the type {kind!r}, which its provider runs: no chat template shows it. Leave it out of "
                "the row, or describe it as a function with a JSON schema"
            )
        known_kind = kind == "function" or (kind == "custom" and "input_schema" in tool)
        if "name" not in tool or not known_kind or "parameter_definitions" in tool:
            return tool  # a form that only its own template knows
        function = {name: value for name, value in tool.items() if name not in ("type", "cache_control")}
        if "input_schema" in function:
            function["parameters"] = function.pop("input_schema")
        tool = {"type": "function"}
    if isinstance(function.get("parameters"), str):
        function = function | {"parameters": from_json(function["parameters"], f"'parameters' of {place}", dict) or {}}
    return {"type": "function", **tool, "function": function}
