"""Calls in the text of an answer, and what a template writes behind them."""

from typing import Any

import pytest

from tests.conftest import CHATML, HERMES
from tunesmith.data.call_syntax import Call
from tunesmith.data.tool_turns import ToolTurns, reads_tools
from tunesmith.errors import TunesmithError

UNREADABLE = HERMES.replace("(call.function.arguments | tojson)", "(call.function.arguments | length | string)")
SCHEMAS: list[Any] = [{"function": {"name": name, "parameters": {"properties": {}}}} for name in ("add", "weather")]
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


@pytest.mark.parametrize(("template", "reads"), [(CHATML, False), (HERMES, True)])
def test_the_template_says_whether_it_has_a_place_for_tools(tokenizer: Any, template: str, reads: bool) -> None:
    tokenizer.chat_template = template
    assert reads_tools(tokenizer) == reads


@pytest.mark.parametrize("template", [HERMES, QWEN_3, ALONE])
def test_behind_a_call_stand_its_result_and_the_next_prompt(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    turns = ToolTurns(tokenizer, [tokenizer.eos_token_id], SCHEMAS)
    ids = turns.behind([Call(name="add", arguments="{}")], ["4 <|im_end|>"])
    assert tokenizer.decode(ids) == "\n<|im_start|>tool\n4 <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.eos_token_id) == 1  # what the result says is text


@pytest.mark.parametrize(("template", "found"), [(HERMES, 2), (ALONE, 0)])
def test_more_calls_than_a_template_can_show_are_text(template: str, found: int, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    ids = tokenizer(CALL * 2)["input_ids"]
    assert len(ToolTurns(tokenizer, [tokenizer.eos_token_id], SCHEMAS).split(ids)[1]) == found


def test_special_tokens_of_a_turn_are_no_text(tokenizer: Any) -> None:
    tokenizer.chat_template = HERMES
    turns = ToolTurns(tokenizer, [tokenizer.eos_token_id], SCHEMAS)
    text = f"<|im_start|>Hm.\n{CALL}"
    [call] = turns.split(tokenizer(text)["input_ids"])[1]
    assert turns.split(tokenizer(text)["input_ids"])[0] == "Hm.\n"
    assert (call.name, call.message["function"]["arguments"]) == ("weather", {"city": "Łódź"})
    assert turns.split(tokenizer("<|im_start|>Hm.")["input_ids"]) == ("Hm.", [])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (CHATML, "has no place for them"),
        (UNREADABLE, "does not write calls in a form that can be read back"),
        (CHANGING, "in another form once its result follows"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_by_name(template: str, problem: str, tokenizer: Any) -> None:
    tokenizer.chat_template, tokenizer.name_or_path = template, "some/model"
    with pytest.raises(TunesmithError, match=f"the chat template of some/model.*{problem}"):
        ToolTurns(tokenizer, [tokenizer.eos_token_id], SCHEMAS)
