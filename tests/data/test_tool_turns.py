"""Calls in the text of an answer, and what a template writes behind them."""

from typing import Any

import pytest

from tests.conftest import CHATML, HERMES
from tunesmith.data.tool_turns import Call, ToolTurns, reads_tools, split_calls, writes_blocks
from tunesmith.errors import TunesmithError

OTHER = HERMES.replace("<tool_call>", "[CALL]").replace("</tool_call>", "[/CALL]")
LAST = "{% if loop.last and message.role == 'assistant' and not message.reasoning_content %}<think></think>{% endif %}"
REASONING = "{{ '<think>' + message.reasoning_content + '</think>' if message.reasoning_content else '' }}"
CONTENT = "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
QWEN_3 = HERMES.replace(
    CONTENT, "{{ '<|im_start|>' + message.role + '\n' }}" + LAST + REASONING + "{{ message.content }}"
)
"""An empty block of reasoning stands in the last turn only."""
CHANGING = HERMES.replace(CONTENT, CONTENT + "{{ '(now)' if loop.last else '' }}")
ALONE = HERMES.replace(
    CONTENT, CONTENT + "{% if (message.tool_calls or []) | length > 1 %}{{ raise_exception('one') }}{% endif %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "reads", "writes"), [(CHATML, False, False), (HERMES, True, True), (OTHER, True, False)]
)
def test_the_template_says_how_calls_are_written(tokenizer: Any, template: str, reads: bool, writes: bool) -> None:
    tokenizer.chat_template = template
    assert (reads_tools(tokenizer), writes_blocks(tokenizer)) == (reads, writes)


def test_calls_are_split_from_the_text_before_them() -> None:
    call = Call(name="weather", arguments='{"city": "Łódź"}')
    assert split_calls(f"Let me see.\n{CALL}\n{CALL}\n", {"weather"}) == ("Let me see.\n", [call, call])


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        CALL.replace("weather", "other"),
        CALL.replace("</tool_call>", ""),
        f"{CALL} and text behind",
        CALL.replace('{"city": "Łódź"}', '"Łódź"'),
        CALL.replace('"name"', '"names"'),
        CALL.replace("}}", "}"),
        f"{CALL}<tool_call>\n[]\n</tool_call>",
        CALL.replace('"weather"', '["weather"]'),
        CALL.replace("Łódź", "\\ud800"),
    ],
)
def test_what_is_not_certainly_a_call_is_text(text: str) -> None:
    assert split_calls(text, {"weather"}) == (text, [])


def test_without_names_any_name_is_a_call() -> None:
    assert split_calls(CALL.replace("weather", "other"))[1] == [Call(name="other", arguments='{"city": "Łódź"}')]


@pytest.mark.parametrize("template", [HERMES, QWEN_3, ALONE])
def test_behind_a_call_stand_its_result_and_the_next_prompt(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    ids = ToolTurns(tokenizer, [tokenizer.eos_token_id]).behind([Call(name="add", arguments="{}")], ["4 <|im_end|>"])
    assert tokenizer.decode(ids) == "\n<|im_start|>tool\n4 <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.eos_token_id) == 1  # what the result says is text


@pytest.mark.parametrize(("template", "found"), [(HERMES, 2), (ALONE, 0)])
def test_more_calls_than_a_template_can_show_are_text(template: str, found: int, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    assert len(ToolTurns(tokenizer, [tokenizer.eos_token_id]).split(CALL * 2)[1]) == found


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (CHATML, "has no place for them"),
        (OTHER, "does not write a call as a JSON object between <tool_call>"),
        (CHANGING, "in another form once its result follows"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_by_name(template: str, problem: str, tokenizer: Any) -> None:
    tokenizer.chat_template, tokenizer.name_or_path = template, "some/model"
    with pytest.raises(TunesmithError, match=f"the chat template of some/model.*{problem}"):
        ToolTurns(tokenizer, [tokenizer.eos_token_id])
