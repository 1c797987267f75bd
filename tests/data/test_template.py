"""What a template takes, how it writes reasoning and which arguments switch it: found by rendering probes."""

import pytest

from tests.data.styles import TEMPLATES, user, with_template
from tunesmith.data.survey import tokenizer_for
from tunesmith.data.template import CallStyle, ChatTemplate, Reasoning, closing_tag
from tunesmith.errors import TunesmithError


def bare(name: str, **arguments: object) -> ChatTemplate:
    return ChatTemplate(tokenizer_for((TEMPLATES / f"{name}.jinja").read_text()), arguments)


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("qwen35", [{"enable_thinking": False}]),
        ("gemma4", [{"enable_thinking": True}]),
        ("deepseek31", [{"thinking": True}]),
        ("smollm3", [{"enable_thinking": False}]),
        ("minimax", []),
        ("chatml", []),
    ],
)
def test_a_switch_is_found_by_trying(name: str, switches: list[dict[str, bool]]) -> None:
    assert [*map(dict, bare(name).switches)] == switches
    assert bare(name, **{key: True for switch in switches for key in switch}).switches == ()


def test_the_values_of_a_switch_are_those_that_the_template_compares_it_with_even_where_it_sets_a_default() -> None:
    source = (
        "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'no_think' %}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{{ '<think>\n' if reasoning_effort in ['low', 'high'] else '<think></think>' }}{% endif %}"
    )
    assert [*map(dict, with_template(source).switches)] == [{"reasoning_effort": "low"}]


@pytest.mark.parametrize(
    ("name", "reasoning"),
    [
        ("qwen35", Reasoning(opening="", closing="\n</think>\n\n")),
        ("qwen3", Reasoning(opening="<think>\n", closing="\n</think>\n\n")),
        ("gemma4", Reasoning(opening="<|channel>thought\n", closing="<channel|>")),
        ("kimi", Reasoning(opening="<think>", closing="</think>")),
        ("smollm3", Reasoning(opening="<think>\n", closing="\n</think>\n")),
        ("apriel", Reasoning(opening="", closing="\n[BEGIN FINAL RESPONSE]\n")),
        (
            "harmony",
            Reasoning(
                opening="<|channel|>analysis<|message|>", closing="<|end|><|start|>assistant<|channel|>final<|message|>"
            ),
        ),
        ("chatml", None),
        ("drops_think", None),
    ],
)
def test_the_form_of_reasoning_is_read_from_an_answer_or_from_an_empty_block(
    name: str, reasoning: Reasoning | None
) -> None:
    assert bare(name).reasoning == reasoning


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("hermes", CallStyle()),
        ("mistral_ids", CallStyle(ids=True)),
        ("json_arguments", CallStyle(text=True)),
        ("content_none", CallStyle(content=None)),
    ],
)
def test_the_style_of_calls_is_found_by_trying(name: str, style: CallStyle) -> None:
    assert bare(name).call_style == style


def test_a_template_that_fails_on_calls_is_quoted() -> None:
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{{ messages.append(1) }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(TunesmithError, match=r"does not show tool calls[^$]*It says: .* of 'list' object is unsafe"):
        _ = with_template(source).call_style


@pytest.mark.parametrize(("name", "parts"), [("parts", True), ("llava", True), ("chatml", False)])
def test_parts_are_given_where_a_string_is_not_shown(name: str, parts: bool) -> None:
    assert bare(name).wants_parts is parts


def test_a_generation_prompt_that_nobody_asked_for_is_left_out() -> None:
    once = bare("always_asks")
    plain, asked = (once.render([user("Hi")], ask=ask) for ask in (False, True))
    assert (plain, asked[len(plain) :]) == ("<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("tag", "closing"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|channel>thought", "<channel|>"),
        ("</think>", ""),
        ("<channel|>", ""),
    ],
)
def test_tags_close_each_other(tag: str, closing: str) -> None:
    assert closing_tag(tag) == closing
