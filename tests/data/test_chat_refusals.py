"""Conversations and templates that are refused, and why: what can't be right must not be trained on."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest

from tests.data.styles import (
    assistant,
    calls,
    conversation,
    render,
    supervised,
    template,
    user,
    with_template,
    words,
)
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation

ONE = [user("Hi"), assistant("Yes")]
TWO = [user("Hi"), assistant("Yes"), user("Why?"), assistant("No")]


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("chatml", [user("Hi"), calls("f")], "does not show tool calls"),
        (
            "llama2",
            [user("Hi"), user("Hi"), assistant("Yes")],
            r"\(user user assistant\): roles must alternate[^\n]*\nNeighbours .*: `merge_turns: true`$",
        ),
        (
            "gemma",
            [assistant("Yes"), user("Hi"), assistant("Yes")],
            r"must alternate[^\n]*\nIt begins with the assistant: put a message of the user before it, or",
        ),
        ("gemma", [user("Hi"), assistant("Yes"), assistant("No")], "Conversation roles must alternate"),
        ("llama2", [user("Hi"), assistant("Yes"), assistant("No")], "roles must alternate"),
    ],
)
def test_what_cannot_be_supervised_with_certainty_is_refused(name: str, messages: Any, message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        render(conversation(messages), template(name))


def test_an_answer_that_the_template_rewrites_is_refused() -> None:
    shouting = words("chatml", "<|im_end|>").chat_template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(TunesmithError, match="changes what the assistant says, from 'Yes' to 'YES"):
        render(conversation(ONE), with_template(shouting), "assistant")


def test_an_answer_behind_an_answer_that_inference_has_no_header_for_is_refused() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}<|im_start|>assistant\n{% endif %}"
    )
    in_a_row = [user("Hi"), assistant("Yes"), assistant("No"), user("Why?"), assistant("Well")]
    once = with_template(source.replace("<|im_end|>\n{% endfor", "{{ '<|im_end|>' if not loop.last }}\n{% endfor"))
    with pytest.raises(TunesmithError, match=r"message 3 .*asks for no answer behind an answer[^$]*merge_turns: true"):
        render(conversation(in_a_row), once)


def test_an_answer_that_changes_what_follows_it_is_refused() -> None:
    # Every turn but the last says how long the answer was.
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '!' * (m.content | length) if not loop.last }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for talk, refused in ((TWO, "message 2"), ([*ONE, *TWO], "message 2")):
        with pytest.raises(
            TunesmithError, match=rf"{refused} \(assistant\): [^$]*`turns: whole` with `prompt_mismatch"
        ):
            render(conversation(talk), with_template(source))


def test_a_template_that_turns_the_order_around_is_refused() -> None:
    source = "{% for m in messages | reverse %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(
        TunesmithError, match=r"message 2 .*changes what the assistant says, from 'Yes' to '<\|im_end\|>'"
    ):
        render(conversation(TWO), with_template(source))
    with pytest.raises(TunesmithError, match=r"message 2 .*the template does not show|its end can't be found"):
        render(conversation(TWO), with_template(source), turns="whole", prompt_mismatch="accept")


def test_completions_must_begin_with_an_answer() -> None:
    with pytest.raises(TunesmithError, match="'completion' must begin with a message of the assistant"):
        supervised("chatml", [user("Hi"), user("Why?"), assistant("Yes")], "completion", prompt_length=1)
    with pytest.raises(TunesmithError, match="train_on: completion needs 'prompt' and 'completion'"):
        supervised("chatml", ONE, "completion")


def test_weights_of_other_messages_are_refused_where_they_would_count() -> None:
    messages = [{**user("Hi"), "weight": 0.5}, assistant("Yes")]
    with pytest.raises(TunesmithError, match=r"message 1 has weight 0.5; only assistant turns can"):
        supervised("chatml", messages, "all")
    assert supervised("chatml", [{**user("Hi"), "weight": 0.0}, assistant("Yes")], "all") == ["Yes<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "refuses the conversation"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{{ messages[0].update({'role': 'x'}) }}", "refuses the conversation"),
        ("{{ ''.join.__globals__['x'] }}", "refuses the conversation"),
        ("{{ strftime_now.__self__.year }}", "refuses the conversation"),
        ("{% for %}", "can't be read"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('No such role') }}", "No such role"),
    ],
)
def test_templates_run_in_a_sandbox(source: str, message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        render(conversation(ONE), with_template(source), "assistant")


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(TunesmithError, match=r"no chat template; name one in `chat_template_path`"):
        ChatTemplate(words("", "</s>"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"messages": []}, "'messages' can't be given"),
        ({"add_generation_prompt": True}, "'add_generation_prompt' can't be given"),
        ({"day": datetime(2024, 1, 1)}, r"chat_template_kwargs: 'day' has datetime"),
    ],
)
def test_arguments_that_are_not_the_templates_are_refused(kwargs: Mapping[str, Any], message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        ChatTemplate(words("chatml", "<|im_end|>"), kwargs)


def test_a_row_is_named_in_the_error() -> None:
    encoder = Encoder(words("chatml", "<|im_end|>"), EncodeOptions(train_on="assistant"))
    rows: list[tuple[str, Conversation]] = [
        ("row 0", conversation([user("Hi")])),
        ("rows.jsonl, line 2", conversation([user("Hi"), calls("f")])),
    ]
    with pytest.raises(TunesmithError, match=r"^rows.jsonl, line 2: the chat template does not show tool calls"):
        encoder.encode(rows, Counts())
