"""The built-in chat templates: what they render, and what is trained of it."""

from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import (
    PreTrainedTokenizerFast,
)

from tests.data.styles import render
from tests.data.styles import spans as spans_of
from tests.model.token_models import RENDERED, TALK, small_tokenizer
from tunesmith.data.template import ChatTemplate
from tunesmith.model.tokens import BUILT_IN, TEMPLATES, extend_tokenizer
from tunesmith.types import Conversation, Message

END = {name: template.eos or "<|endoftext|>" for name, template in BUILT_IN.items()}
SPACE = {name: " " if name in ("mistral", "plain") else "" for name in BUILT_IN}  # before an answer
each_template = pytest.mark.parametrize("name", BUILT_IN)


def with_template(name: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    tokenizer = small_tokenizer(**kwargs)
    extend_tokenizer(tokenizer, name)
    return tokenizer


def shown(name: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return str(with_template(name).apply_chat_template(messages, tokenize=False, **kwargs))


def test_the_package_has_the_templates_that_the_specification_names() -> None:
    assert set(BUILT_IN) == {"chatml", "llama3", "zephyr", "mistral", "gemma", "alpaca", "plain"} == set(RENDERED)
    assert {file.name for file in TEMPLATES.iterdir()} == {f"{name}.jinja" for name in BUILT_IN}


@each_template
def test_a_conversation_with_a_system_message_and_two_turns_is_rendered_as_written_here(name: str) -> None:
    assert shown(name, TALK) == RENDERED[name]


@each_template
@pytest.mark.parametrize("length", [2, 4])
def test_what_inference_renders_is_the_beginning_of_the_conversation_up_to_the_answer(name: str, length: int) -> None:
    prompt = shown(name, TALK[:length], add_generation_prompt=True)
    answer = SPACE[name] + TALK[length]["content"] + END[name]
    assert RENDERED[name].startswith(prompt + answer)


@each_template
def test_a_conversation_without_a_system_message_has_the_same_turns(name: str) -> None:
    turns = RENDERED[name].replace("Be brief.\n\n", "", 1) if name in ("mistral", "gemma") else RENDERED[name]
    turns = turns[turns.index({"alpaca": "\n\n###", "plain": "User", "chatml": "<|im_start|>user", "zephyr": "<|user|>",
                               "llama3": "<|start_header_id|>user"}.get(name, turns[:1])) :]  # fmt: skip
    introduction = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert shown(name, TALK[1:]) == (introduction if name == "alpaca" else "") + turns


@each_template
@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "completion"])
def test_the_trained_spans_are_the_answers_with_their_end_token(name: str, train_on: Any) -> None:
    messages = tuple(Message(fields=message) for message in TALK)
    conversation = Conversation(messages=messages, prompt_length=4 if train_on == "completion" else None)
    rendered = render(conversation, ChatTemplate(with_template(name)), train_on)
    answers = [SPACE[name] + text + END[name] for text in ("Hello", "See you")]
    assert not rendered.notes  # the {% generation %} blocks mark just that
    assert spans_of(rendered) == (answers if train_on == "assistant" else answers[1:])


@each_template
def test_the_generation_blocks_cover_an_answer_from_behind_the_prompt_through_its_end_token(name: str) -> None:
    tokenizer = with_template(name)
    encoded: Any = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "".join(SPACE[name] + text + END[name] for text in ("Hello", "See you"))


@each_template
@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([{"role": "tool", "content": "4"}], None),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], None),
        ([TALK[1], {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}], None),
        (TALK, [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    ],
    ids=["tool message", "content of parts", "tool call", "tools"],
)
def test_what_a_template_has_no_place_for_is_refused(name: str, messages: Any, tools: Any) -> None:
    with pytest.raises(TemplateError, match=rf"The {name} template (takes|has no place)"):
        shown(name, messages, tools=tools)


@pytest.mark.parametrize("name", ["mistral", "gemma"])
@pytest.mark.parametrize(
    "roles", ["user user", "assistant", "user assistant assistant", "user system", "system system"]
)
def test_templates_of_strict_turns_refuse_another_order(name: str, roles: str) -> None:
    with pytest.raises(TemplateError, match=f"The {name} template takes user and assistant messages in turn"):
        shown(name, [{"role": role, "content": "Hi"} for role in roles.split()])


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_system_message_that_could_not_be_put_anywhere_is_refused(name: str) -> None:
    with pytest.raises(TemplateError, match="needs a user message behind a system message"):
        shown(name, TALK[:1], add_generation_prompt=True)


@each_template
def test_texts_begin_as_the_tokenizer_begins_them(name: str) -> None:
    plain = with_template(name, bos="<s>").apply_chat_template(TALK, tokenize=False)
    assert plain == "<s>" + RENDERED[name]
