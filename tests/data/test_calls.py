"""Calls and tools in every form become OpenAI's, with what they say unchanged."""

import json
from typing import Any

import pytest

from tunesmith.data.calls import calls_of, tools_of
from tunesmith.errors import TunesmithError

ARGUMENTS: dict[str, Any] = {"city": "Taipei", "ticker": None, "b": [1], "a": {}}
CALL = {"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "f", "arguments": ARGUMENTS}},
        {"type": "function", "function": {"name": "f", "arguments": json.dumps(ARGUMENTS)}},
        {"name": "f", "arguments": ARGUMENTS},
        {"name": "f", "arguments": json.dumps(ARGUMENTS)},
        {"name": "f", "parameters": ARGUMENTS},
        {"type": "tool_use", "name": "f", "input": ARGUMENTS},
        {"name": "f", "args": ARGUMENTS},
    ],
)
def test_calls_have_one_form(call: dict[str, Any]) -> None:
    for value in (call, [call], json.dumps(call), json.dumps([call]), [json.dumps(call)]):
        read = calls_of(value, "here")
        assert read == [CALL]
        assert json.dumps(read) == json.dumps([CALL])  # in this order
    assert calls_of(call | {"id": "c1"}, "here") == [{"id": "c1"} | CALL]


def test_calls_without_arguments_and_with_keys_of_their_own() -> None:
    nothings: list[dict[str, Any]] = [{}, {"arguments": ""}, {"arguments": "{}"}, {"arguments": None}]
    for nothing in (*nothings, {"arguments": {}}):
        (call,) = calls_of({"function": {"name": "f", **nothing}, "index": 0, "id": ""}, "here")
        assert call == {"type": "function", "function": {"name": "f", "arguments": {}}, "index": 0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"function": {}}, r"^here must be a list of \{'function': \{'name': \.\.\., 'arguments': \.\.\.\}\}"),
        ("f(1)", r"^here is 'f\(1\)'; expected JSON"),
        ({"name": "f", "arguments": "{x: 1}"}, "'arguments' of call 1 in here is text that is not JSON"),
        ({"name": "f", "arguments": "[1]"}, "'arguments' of call 1 in here is a list .*, expected an object"),
        ({"name": "f", "arguments": 7}, "'arguments' of call 1 in here is a number"),
        ({"name": "f", "arguments": {}, "input": {}}, "call 1 in here has both 'arguments' and 'input'"),
        ({"name": "f", "argumnets": {}}, "call 1 in here has no 'arguments'; its keys are name, argumnets"),
        ({"type": "custom", "custom": {"name": "f"}}, "call 1 in here has the type 'custom'; only calls of functions"),
    ],
)
def test_a_broken_call_is_refused_with_its_place(call: Any, message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        calls_of(call, "here")


@pytest.mark.parametrize(
    "tool",
    [
        TOOL,
        {"function": TOOL["function"]},
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": json.dumps(SCHEMA)}},
        {"name": "f", "description": "d", "parameters": SCHEMA},
        {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA},
        {"name": "f", "description": "d", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
        {"type": "custom", "name": "f", "description": "d", "input_schema": SCHEMA},
        {"functionDeclarations": [{"name": "f", "description": "d", "parameters": SCHEMA}]},
    ],
)
def test_tools_have_one_form(tool: dict[str, Any]) -> None:
    for value in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        read = tools_of(value, "here")
        assert read == [TOOL]
        assert json.dumps(read) == json.dumps([TOOL])


def test_tools_of_another_form_stay_as_they_are() -> None:
    tools = [{"name": "f", "description": "d", "parameter_definitions": {}}, {"type": "object", "title": "f"}]
    assert tools_of(tools, "here") == tools
    nothings: tuple[Any, ...] = (None, "", [], "[]")
    for nothing in nothings:
        assert tools_of(nothing, "here") == []


@pytest.mark.parametrize("kind", ["web_search", "code_interpreter", "computer_20250124", "custom"])
def test_tools_that_their_provider_runs_are_refused(kind: str) -> None:
    with pytest.raises(TunesmithError, match=f"tool 2 of here has the type '{kind}', which its provider runs"):
        tools_of([TOOL, {"type": kind, "name": "x"}], "here")
