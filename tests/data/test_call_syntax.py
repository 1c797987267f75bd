"""The forms in which chat templates write calls: each is learned from its template, and read back from an answer."""

import json
from typing import Any

import pytest

from tests.conftest import HERMES
from tests.data.call_forms import FORMS, each, with_calls
from tunesmith.data.call_syntax import Call, CallSyntax, syntax_of

PYTHONIC = with_calls(each("{{ '[' + name + '(' }}{% for k, v in given.items() %}{{ k + '=' ~ v }}{% endfor %})]"))
ARGUMENTS: dict[str, Any] = {
    "city": 'Łódź, "x" {y}\n[z] <b>it\'s</b>',
    "days": 3,
    "code": "012",
    "wet": True,
    "at": {"x": [1.5, None]},
}
TYPES = {
    "weather": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "code": {"type": "string"},
        "wet": {"type": "boolean"},
        "at": {"type": "object"},
    },
    "now": {},
}


def learned(tokenizer: Any, template: str, *, specials: bool = True) -> CallSyntax | None:
    tokenizer.chat_template = template
    return syntax_of(tokenizer, [tokenizer.eos_token], specials=specials)


def written(tokenizer: Any, calls: list[Call]) -> str:
    """What the template writes for an assistant that makes these calls, without the end of the turn."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call.message for call in calls]}]
    shown = tokenizer.apply_chat_template(turns, tokenize=False, tools=[])
    return str(shown).rpartition("assistant\n")[2].removesuffix("<|im_end|>\n")


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_read_back_as_the_template_writes_them(form: str, tokenizer: Any) -> None:
    syntax = learned(tokenizer, FORMS[form])
    assert syntax is not None
    calls = [("weather", ARGUMENTS), ("now", {"a": "b"})][: 1 if syntax.between is None else 2]
    assert len(calls) == (1 if form == "llama" else 2)
    made = [
        Call(name=name, arguments=json.dumps(given, ensure_ascii=False), id=f"abcdefgh{i}" if form == "mistral" else "")
        for i, (name, given) in enumerate(calls)
    ]
    text = written(tokenizer, made)
    assert syntax.split(text, TYPES) == (text[: len(text) - len(text.lstrip())] if form != "llama" else "", made)
    spoken = syntax.split("I look.\n" + text.lstrip(), TYPES)
    assert spoken == (("I look.\n", made) if syntax.opening else ("I look.\n" + text.lstrip(), []))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_certainly_a_call_is_text(form: str, tokenizer: Any) -> None:
    syntax = learned(tokenizer, FORMS[form])
    assert syntax is not None
    given = json.dumps(ARGUMENTS)
    text = written(tokenizer, [Call(name="weather", arguments=given, id="abcdefgh0")]).lstrip()
    assert len(syntax.split(text, TYPES)[1]) == 1
    cuts = [text[:at] for at in range(len(text.rstrip()))]  # a call that was cut off anywhere
    for broken in ["no call", text + " and more", text + text[:-1], *cuts]:
        assert syntax.split(broken, TYPES) == (broken, [])


def test_a_form_that_cannot_be_read_back_is_none(tokenizer: Any) -> None:
    assert learned(tokenizer, PYTHONIC) is None


def test_marks_that_are_special_tokens_are_gone_where_those_are_left_out(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"]})
    kept = learned(tokenizer, FORMS["mistral"])
    plain = learned(tokenizer, FORMS["mistral"], specials=False)
    assert kept is not None
    assert kept.opening == "[TOOL_CALLS]"
    assert plain is None or not plain.opening


@pytest.mark.parametrize(
    ("said", "schema", "value"),
    [
        ("12", {"type": "string"}, "12"),
        ("12", {"type": ["string", "null"]}, "12"),
        ("12", {"type": "integer"}, 12),
        ("12", {}, 12),
        ("Lima", {}, "Lima"),
        ("True", {"type": "boolean"}, True),
        ('["a"]', {"type": "array"}, ["a"]),
        ("\n  two\n", {"type": "string"}, "  two"),
    ],
)
def test_the_schema_says_what_a_marked_value_is(said: str, schema: Any, value: Any, tokenizer: Any) -> None:
    syntax = learned(tokenizer, FORMS["coder"])
    assert syntax is not None
    body = f"<parameter=a>{said}</parameter>"
    text = f"<tool_call><function=f>{body}</function></tool_call>"  # white space is the model's own affair
    [call] = syntax.split(text, {"f": {"a": schema}})[1]
    assert json.loads(call.arguments) == {"a": value}


def test_a_name_and_a_value_hold_no_halves_of_characters(tokenizer: Any) -> None:
    syntax = learned(tokenizer, HERMES)
    assert syntax is not None
    text = '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'
    assert syntax.split(text) == (text, [])
