"""What inference sees before a turn and what the model generates there, in the styles of many families, as text.

Each style is a template beside this file, tried with one conversation with a system message, several turns and
reasoning in the last, and one with a tool. Expected is how a turn's prompt ends, and in [[ ]] what is supervised.
"""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.data.styles import (
    TEMPLATES,
    Turns,
    assistant,
    calls,
    conversation,
    render,
    result,
    spans,
    system,
    template,
    user,
    with_template,
    words,
)
from tunesmith.data.chat import ACCEPTED, CLOSED, DROPPED, EACH, MARKED, Rendering
from tunesmith.data.survey import tokenizer_for
from tunesmith.data.template import ChatTemplate
from tunesmith.data.turns import said
from tunesmith.errors import TunesmithError

MIXED = [
    system("Be brief"),
    user("Hi"),
    assistant("Yes"),
    user("Why?"),
    assistant("Because", reasoning_content="Well"),
]
CALLING = [user("Hi"), calls("f", reasoning_content="Hm"), result("1"), assistant("Yes")]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
PROMPT = 14
"""So many characters of a prompt are shown."""

SUPERVISED: dict[str, tuple[list[str], list[str] | None]] = {
    "qwen35": (
        ["k>\n\n</think>\n\n[[Yes<|im_end|>]]", "stant\n<think>\n[[Well\n</think>\n\nBecause<|im_end|>]]"],
        [
            "stant\n<think>\n[[Hm\n</think>\n\n<tool_call>\n<function=f>\n<parameter=x>1</parameter>\n</function>\n</tool_call><|im_end|>]]",
            "k>\n\n</think>\n\n[[Yes<|im_end|>]]",
        ],
    ),
    "gemma4": (
        ["ght\n<channel|>[[Yes<turn|>]]", "\n<|turn>model\n[[<|channel>thought\nWell<channel|>Because<turn|>]]"],
        [
            '\n<|turn>model\n[[<|channel>thought\nHm<channel|><|tool_call>call:f{"x": 1}<tool_call|><turn|>]]',
            "ght\n<channel|>[[Yes<turn|>]]",
        ],
    ),
    "nemotron3": (
        ["think></think>[[Yes<|im_end|>]]", "stant\n<think>\n[[Well\n</think>\nBecause<|im_end|>]]"],
        [
            "stant\n<think>\n[[Hm\n</think>\n\n"
            '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n<|im_end|>]]',
            "think></think>[[Yes<|im_end|>]]",
        ],
    ),
    "deepseek31": (
        ["tant|></think>[[Yes<|end_of_sentence|>]]", "stant|><think>[[Well</think>Because<|end_of_sentence|>]]"],
        [
            'stant|><think>[[Hm</think><|call|>f<|sep|>{"x": 1}<|end_call|><|end_of_sentence|>]]',
            "tant|></think>[[Yes<|end_of_sentence|>]]",
        ],
    ),
    "drops_think": (
        ["tant|><think>\n[[\n</think>\n\nYes</s>]]", "tant|><think>\n[[Well\n</think>\n\nBecause</s>]]"],
        None,
    ),
    "glm47": (
        ["tant|></think>[[Yes<|user|>]]", "stant|><think>[[Well</think>Because]]"],
        ["stant|><think>[[Hm</think><tool_call>f<arg>x=1</tool_call><|observation|>]]", "tant|></think>[[Yes]]"],
    ),
    "minimax": (
        ["~b]ai\n<think>\n[[\n</think>\n\nYes[e~[]]", "~b]ai\n<think>\n[[Well\n</think>\n\nBecause[e~[]]"],
        [
            '~b]ai\n<think>\n[[Hm\n</think>\n\n\n<invoke name="f">{"x": 1}</invoke>[e~[]]',
            "~b]ai\n<think>\n[[\n</think>\n\nYes[e~[]]",
        ],
    ),
    "apriel": (
        [
            "soning steps:\n[[\n[BEGIN FINAL RESPONSE]\nYes\n<|end|>]]",
            "soning steps:\n[[Well\n[BEGIN FINAL RESPONSE]\nBecause\n<|end|>]]",
        ],
        None,
    ),
    "command_r7b": (
        [
            "END_THINKING|>[[<|START_RESPONSE|>Yes<|END_RESPONSE|><|END_OF_TURN_TOKEN|>]]",
            "END_THINKING|>[[<|START_RESPONSE|>Because<|END_RESPONSE|><|END_OF_TURN_TOKEN|>]]",
        ],
        None,
    ),
    "command_a": (
        ["HATBOT_TOKEN|>[[Yes<|END_OF_TURN_TOKEN|>]]", "HATBOT_TOKEN|>[[Because<|END_OF_TURN_TOKEN|>]]"],
        None,
    ),
    "harmony": (
        [
            "art|>assistant[[<|channel|>final<|message|>Yes<|return|>]]",
            "art|>assistant[[<|channel|>analysis<|message|>Well<|end|><|start|>assistant<|channel|>final<|message|>Because<|return|>]]",
        ],
        None,
    ),
    "mistral": (
        ["ief\n\nHi[/INST][[ Yes</s>]]", "f\n\nWhy?[/INST][[ Because</s>]]"],
        ['NST] Hi[/INST][[[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]</s>]]', "/TOOL_RESULTS][[ Yes</s>]]"],
    ),
    "mistral_ids": (
        ["INST]Hi[/INST][[Yes</s>]]", "ST]Why?[/INST][[Because</s>]]"],
        ['INST]Hi[/INST][[[TOOL_CALLS]f[CALL_ID]5oyWpMfiB[ARGS]{"x": 1}</s>]]', "/TOOL_RESULTS][[Yes</s>]]"],
    ),
    "kimi": (
        ["t<|im_middle|>[[<think></think>Yes<|im_end|>]]", "t<|im_middle|>[[<think>Well</think>Because<|im_end|>]]"],
        [
            "t<|im_middle|>[[<think>Hm</think>"
            '<|call_begin|>5oyWpMfiB<|call_argument|>{"x": 1}<|call_end|>f<|im_end|>]]',
            "t<|im_middle|>[[<think></think>Yes<|im_end|>]]",
        ],
    ),
    "granite": (
        ["|end_of_role|>[[Yes<|end_of_text|>]]", "|end_of_role|>[[Because<|end_of_text|>]]"],
        [
            '|end_of_role|>[[<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|end_of_text|>]]',
            "|end_of_role|>[[Yes<|end_of_text|>]]",
        ],
    ),
    "smollm3": (
        ["rt|>assistant\n[[Yes<|im_end|>]]", "rt|>assistant\n[[<think>\nWell\n</think>\nBecause<|im_end|>]]"],
        None,
    ),
    "llava": (["ST] Hi [/INST][[ Yes</s>]]", "] Why? [/INST][[ Because</s>]]"], None),
    "parts": (["rt|>assistant\n[[Yes<|im_end|>]]", "rt|>assistant\n[[Because<|im_end|>]]"], None),
    "llama31": (
        ["_header_id|>\n\n[[Yes<|eot_id|>]]", "_header_id|>\n\n[[Because<|eot_id|>]]"],
        ['_header_id|>\n\n[[{"name": "f", "parameters": {"x": 1}}<|eot_id|>]]', "_header_id|>\n\n[[Yes<|eot_id|>]]"],
    ),
    "hermes": (
        ["rt|>assistant\n[[Yes<|im_end|>]]", "rt|>assistant\n[[Because<|im_end|>]]"],
        [
            'rt|>assistant\n[[<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>]]',
            "rt|>assistant\n[[Yes<|im_end|>]]",
        ],
    ),
    "generation": (["rt|>assistant\n[[Yes<|im_end|>]]", "rt|>assistant\n[[Because<|im_end|>]]"], None),
    "generation_thinks": (
        ["k>\n\n</think>\n\n[[Yes<|im_end|>]]", "stant\n<think>\n[[Well\n</think>\n\nBecause<|im_end|>]]"],
        None,
    ),
    "json_arguments": (
        ["rt|>assistant\n[[Yes<|im_end|>]]", "rt|>assistant\n[[Because<|im_end|>]]"],
        ['rt|>assistant\n[[<tool_call>f {"x": 1}</tool_call><|im_end|>]]', "rt|>assistant\n[[Yes<|im_end|>]]"],
    ),
    "content_none": (
        ["rt|>assistant\n[[Yes<|im_end|>]]", "rt|>assistant\n[[Because<|im_end|>]]"],
        [
            'rt|>assistant\n[[<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>]]',
            "rt|>assistant\n[[Yes<|im_end|>]]",
        ],
    ),
    "first_call": (
        ["rt|>assistant\n[[Yes<|im_end|>]]", "rt|>assistant\n[[Because<|im_end|>]]"],
        [
            'rt|>assistant\n[[<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>]]',
            "rt|>assistant\n[[Yes<|im_end|>]]",
        ],
    ),
}
SWITCHED = {
    "qwen35": [{"enable_thinking": False}, {}],
    "gemma4": [{}, {"enable_thinking": True}],
    "nemotron3": [{"enable_thinking": False}, {}],
    "deepseek31": [{}, {"thinking": True}],
    "glm47": [{"enable_thinking": False}, {}],
    "generation_thinks": [{"enable_thinking": False}, {}],
}
"""The template's switch for each turn of MIXED; none where a style is not listed."""


def bare(name: str) -> ChatTemplate:
    return ChatTemplate(tokenizer_for((TEMPLATES / f"{name}.jinja").read_text()))


def shown(rendering: Rendering) -> list[str]:
    return [
        f"{document.text[max(0, span.start - PROMPT) : span.start]}[[{document.text[span.start : span.stop]}]]"
        for document in rendering.documents
        for span in document.spans
    ]


def in_parts(messages: Turns) -> list[dict[str, Any]]:
    """The messages with contents that are lists of two parts."""
    divided = ([{"type": "text", "text": text} for text in (m["content"][:1], m["content"][1:])] for m in messages)
    return [{**message, "content": parts} for message, parts in zip(messages, divided, strict=True)]


@pytest.mark.parametrize("name", SUPERVISED)
def test_what_inference_sees_is_the_prompt_and_what_it_generates_is_supervised(name: str) -> None:
    once, (mixed, calling) = bare(name), SUPERVISED[name]
    rendering = render(conversation(MIXED), once)
    assert shown(rendering) == mixed
    assert [*map(dict, rendering.arguments)] == SWITCHED.get(name, [{}, {}])
    assert render(conversation(in_parts(MIXED)), once) == rendering
    (plain,) = spans(render(conversation(MIXED[1:3]), once))
    assert plain == mixed[0].partition("[[")[2].removesuffix("]]").removesuffix("<|user|>")
    if calling is None:
        with pytest.raises(TunesmithError, match="the chat template does not show tool calls"):
            render(conversation(CALLING, tools=TOOLS), once)
    else:
        assert shown(render(conversation(CALLING, tools=TOOLS), once)) == calling


@pytest.mark.parametrize("name", [name for name in SUPERVISED if "generation" not in name])
def test_each_prompt_is_that_of_inference(name: str) -> None:
    tokenizer = tokenizer_for((TEMPLATES / f"{name}.jinja").read_text())
    rendering = render(conversation(MIXED), ChatTemplate(tokenizer))
    talk = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in MIXED]
    talk = talk if name in ("llava", "parts") else MIXED
    ends = [(document, span) for document in rendering.documents for span in document.spans]
    for stop, (document, span), arguments in zip((2, 4), ends, rendering.arguments, strict=True):
        prompt = tokenizer.apply_chat_template(talk[:stop], tokenize=False, add_generation_prompt=True, **arguments)
        assert document.text[: span.start] == prompt


# Without a switch


def test_where_nothing_closes_the_thinking_the_model_learns_to_close_it_and_it_is_said() -> None:
    rendering = render(conversation([user("Hi"), assistant("Yes")]), template("drops_think"))
    assert rendering.notes == (CLOSED,)
    assert rendering.documents[0].text == "<s><|User|>Hi<|Assistant|><think>\n\n</think>\n\nYes</s>"
    assert spans(rendering) == ["\n</think>\n\nYes</s>"]
    two = render(conversation([user("Hi"), assistant("Yes"), user("Why?"), assistant("No")]), template("drops_think"))
    assert two.notes == (CLOSED, EACH)
    assert spans(two) == ["\n</think>\n\nYes</s>", "\n</think>\n\nNo</s>"]


def test_a_template_that_leaves_the_thinking_open_in_the_answer_too_has_it_closed() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>\n' if m.role == 'assistant' and loop.last }}"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    rendering = render(conversation([user("Hi"), assistant("Yes")]), with_template(source))
    assert (spans(rendering), rendering.notes) == (["\n</think>\n\nYes<|im_end|>"], (CLOSED,))
    reasoned = render(conversation([user("Hi"), assistant("Yes", reasoning="Hm")]), with_template(source))
    assert (spans(reasoned), reasoned.notes) == (["Hm\n</think>\n\nYes<|im_end|>"], ())


def test_reasoning_is_a_part_of_the_content_where_the_template_shows_it_so_only() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}"
        "{{ '[THINK]' + part.thinking + '[/THINK]' if part.type == 'thinking' else part.text }}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for answer in (assistant("Yes", reasoning_content="Hm"), assistant("<think>Hm</think>Yes")):
        rendering = render(conversation([user("Hi"), answer]), with_template(source))
        assert (spans(rendering), rendering.notes) == (["[THINK]Hm[/THINK]Yes<|im_end|>"], ())


@pytest.mark.parametrize("opened", ["<think>\n", "<think>\n\n"])
def test_reasoning_that_the_answer_shows_is_not_said_twice(opened: str) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' if m.reasoning_content }}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n" + opened + "{% endif %}"
    )
    rendering = render(conversation([user("Hi"), assistant("Yes", reasoning_content="Hm")]), with_template(source))
    assert spans(rendering) == ["Hm\n</think>\n\nYes<|im_end|>"]
    assert rendering.documents[0].text.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + opened)


def test_the_header_that_ends_an_answer_ends_it_in_its_own_text_too() -> None:
    source = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content and loop.last }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [user("Hi"), assistant("Yes", reasoning_content="Hm"), user("Why?"), assistant("No")]
    rendering = render(conversation(messages), with_template(source))
    assert [document.text for document in rendering.documents] == [
        "<|user|>Hi<|assistant|><think>Hm</think>Yes<|user|>",
        "<|user|>Hi<|assistant|>Yes<|user|>Why?<|assistant|>No",
    ]
    assert spans(rendering) == ["<think>Hm</think>Yes<|user|>", "No"]


# What is wrong in a template and yet trains


def test_a_generation_prompt_that_is_written_always_is_not_supervised() -> None:
    rendering = render(conversation([user("Hi"), assistant("Yes")]), template("always_asks", eos="<|im_end|>"))
    assert rendering.documents[0].text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    assert spans(rendering) == ["Yes<|im_end|>"]


def test_a_turn_whose_prompt_counts_the_messages_has_the_count_of_inference() -> None:
    messages = [user("Hi"), assistant("Yes"), user("Why?"), assistant("No")]
    first, second = render(conversation(messages), template("counted")).documents
    assert first.text == "<|user|>1 of 1\nHi</s>\n<|assistant|>2 of 2\nYes</s>"
    assert second.text == (
        "<|user|>1 of 3\nHi</s>\n<|assistant|>2 of 3\nYes</s>\n<|user|>3 of 3\nWhy?</s>\n<|assistant|>4 of 4\nNo</s>"
    )


@pytest.mark.parametrize("name", ["generation_header", "generation_no_end"])
def test_blocks_that_differ_from_what_is_generated_are_noted_and_can_be_taken(name: str) -> None:
    talk, once = conversation([user("Hi"), assistant("Yes")]), template(name, eos="<|im_end|>")
    verified = render(talk, once)
    assert (spans(verified), verified.notes) == (["Yes<|im_end|>"], (MARKED,))
    own = {"generation_header": ["<|im_start|>assistant\nYes<|im_end|>\n"], "generation_no_end": ["Yes"]}[name]
    assert spans(render(talk, once, marks="template")) == own


# How a conversation is divided


def documents(rendering: Rendering) -> list[str]:
    return [document.text for document in rendering.documents]


def test_turns_are_whole_or_each_or_as_few_texts_as_there_can_be() -> None:
    chatml, qwen3 = template("chatml"), template("qwen3")
    first = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>"
    second = first + "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause<|im_end|>"
    talk = conversation([user("Hi"), assistant("Yes"), user("Why?"), assistant("Because")])
    assert documents(render(talk, chatml)) == documents(render(talk, chatml, turns="whole")) == [second + "\n"]
    assert documents(render(talk, chatml, turns="each")) == [first, second]
    assert len(documents(render(talk, qwen3))) == 2
    with pytest.raises(
        TunesmithError, match=r"message 2 \(assistant\): [^$]*turns: whole trains on one text\. With `turns: auto`"
    ):
        render(talk, qwen3, turns="whole")


def test_the_form_of_history_can_be_accepted() -> None:
    talk = conversation(MIXED)
    rendering = render(talk, template("qwen3"), turns="whole", prompt_mismatch="accept")
    assert spans(rendering) == ["Yes<|im_end|>", "<think>\nWell\n</think>\n\nBecause<|im_end|>"]
    assert rendering.notes == (ACCEPTED,)
    assert documents(rendering) == [words("qwen3", "<|im_end|>").apply_chat_template(MIXED, tokenize=False)]


def test_turns_that_share_a_text_are_together_in_it() -> None:
    messages = [user("Hi"), calls("f"), result("1"), assistant("Yes"), user("Why?"), assistant("No")]
    rendering = render(conversation(messages), template("qwen3"))
    assert [len(document.spans) for document in rendering.documents] == [1, 1, 1]
    reasoned = [{**m, "reasoning_content": "Hm"} if m["role"] == "assistant" else m for m in messages]
    assert [len(document.spans) for document in render(conversation(reasoned), template("qwen3")).documents] == [2, 1]


# Calls


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("first_call", [user("Hi"), calls("one", "two")], r"does not show 'two' of call 2.*divide the message"),
        ("first_call", [user("Hi"), {**calls("f"), "content": "Wait"}], r"says beside its calls, 'Wait'\. Take it out"),
        ("content_none", [user("Hi"), {**calls("f"), "content": "Wait"}], r"does not show 'f' of call 1"),
        ("llama31", [user("Hi"), calls("f", "g")], "one call at a time!"),
    ],
)
def test_a_call_or_a_text_that_is_lost_is_refused(name: str, messages: Sequence[Any], message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        render(conversation(messages, tools=TOOLS), bare(name))


def test_calls_have_the_ids_that_rows_give_and_results_those_of_their_calls() -> None:
    messages = [user("Hi"), calls("f", "g"), result("1"), result("2"), assistant("Yes")]
    (document,) = render(conversation(messages, tools=TOOLS), bare("mistral_ids")).documents
    first, second = (document.text.partition(f"[TOOL_CALLS]{name}[CALL_ID]")[2][:9] for name in "fg")
    assert first != second
    assert f"[TOOL_RESULTS]{first} 1[/TOOL_RESULTS][TOOL_RESULTS]{second} 2[/TOOL_RESULTS]" in document.text
    for call, i in zip(messages[1]["tool_calls"], ("aaaaaaaaa", "bbbbbbbbb"), strict=True):
        call["id"] = i
    messages[2:4] = [{**result("2"), "tool_call_id": "bbbbbbbbb"}, {**result("1"), "tool_call_id": "aaaaaaaaa"}]
    (document,) = render(conversation(messages, tools=TOOLS), bare("mistral_ids")).documents
    assert "[TOOL_RESULTS]bbbbbbbbb 2[/TOOL_RESULTS][TOOL_RESULTS]aaaaaaaaa 1[/TOOL_RESULTS]" in document.text


def test_a_result_has_the_name_of_the_call_that_it_answers() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.role == 'tool' }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    named = {**result("3"), "name": "own"}
    messages = [user("Hi"), calls("f", "g", "h"), result("1"), result("2"), named, assistant("Yes")]
    (document,) = render(conversation(messages, tools=TOOLS), with_template(source)).documents
    answers = document.text.partition("<|im_start|>tool")[2].split("<|im_start|>tool")
    assert [answer.partition("<|im_end|>")[0] for answer in answers] == [" f\n1", " g\n2", " own\n3"]


# Reasoning


def test_reasoning_that_no_template_shows_is_noted_or_an_error() -> None:
    talk = conversation([user("Hi"), assistant("Yes", reasoning_content="Hm")])
    assert render(talk, template("chatml")).notes == (DROPPED,)
    with pytest.raises(
        TunesmithError, match=r"reasoning that the chat template does not show \(drop_reasoning: error\)"
    ):
        render(talk, template("chatml"), drop_reasoning="error")
    assert render(talk, template("qwen3"), drop_reasoning="error").notes == ()


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>\nHm\n</think>\n\nYes", "Hm", "Yes"),
        ("Hm\n</think>\n\nYes", "Hm", "Yes"),
        ("[THINK]Hm[/THINK]Yes", "Hm", "Yes"),
        ("</think>Yes", "", "Yes"),
        ("Write <reason>x</reason> here", "", "Write <reason>x</reason> here"),
        ("End it with [/THINK], and that is all", "", "End it with [/THINK], and that is all"),
        ("Say <think>a</think> first", "", "Say <think>a</think> first"),
        ("<think>Hm</think>Say </think> too", "Hm", "Say </think> too"),
    ],
)
def test_only_at_the_beginning_a_block_in_the_text_is_reasoning(content: str, reasoning: str, answer: str) -> None:
    assert said(assistant(content)) == (reasoning, answer)


def test_tags_in_an_answer_stay_in_it() -> None:
    answer = "Write <reason>x</reason> here"
    (document,) = render(conversation([user("Hi"), assistant(answer)]), bare("nemotron3")).documents
    assert document.text.endswith(f"<think></think>{answer}<|im_end|>\n")


def test_a_switch_that_the_run_or_the_row_sets_is_left_alone() -> None:
    tokenizer = tokenizer_for((TEMPLATES / "qwen35.jinja").read_text())
    talk = [user("Hi"), assistant("Yes")]
    for on, expected in ((True, ["\n</think>\n\nYes<|im_end|>"]), (False, ["Yes<|im_end|>"])):
        run = render(conversation(talk), ChatTemplate(tokenizer, {"enable_thinking": on}))
        row = render(conversation(talk, template_kwargs={"enable_thinking": on}), ChatTemplate(tokenizer))
        assert spans(run) == spans(row) == expected
        assert [*map(dict, run.arguments)] == [{}]


THOUGHT = [user("Hi"), assistant("Yes", reasoning_content="Hm"), user("Why?"), assistant("Because")]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"turns": "whole", "prompt_mismatch": "accept"}, "chatml"),
        ({"marks": "template"}, "generation"),
        ({"train_on": "all"}, "chatml"),
    ],
    ids=str,
)
def test_reasoning_that_is_lost_is_told_in_whatever_way_a_row_is_rendered(options: dict[str, Any], name: str) -> None:
    talk = conversation(THOUGHT)
    assert render(talk, template(name), **options).notes == (DROPPED,)
    with pytest.raises(TunesmithError, match="drop_reasoning: error"):
        render(talk, template(name), **options, drop_reasoning="error")


def test_what_is_as_inference_sees_it_needs_no_acceptance() -> None:
    talk = conversation([user("Hi"), assistant("Yes"), user("Why?"), assistant("Because")])
    assert render(talk, template("chatml"), turns="whole", prompt_mismatch="accept").notes == ()


def test_blocks_of_the_template_have_the_weight_of_the_answers_and_stand_for_all_of_them() -> None:
    halves = [user("Hi"), assistant("Yes", weight=0.5), user("Why?"), assistant("Because", weight=0.5)]
    (document,) = render(conversation(halves, weight=0.5), template("generation"), marks="template").documents
    assert [span.weight for span in document.spans] == [0.25, 0.25]
    for train_on, talk in (
        ("last_assistant", conversation(THOUGHT)),
        ("completion", conversation(THOUGHT, prompt_length=3)),
        ("assistant", conversation([user("Hi"), assistant("Yes", weight=0), user("Why?"), assistant("Because")])),
    ):
        with pytest.raises(TunesmithError, match="marks: template supervises the blocks of all answers alike"):
            render(talk, template("generation"), train_on, marks="template")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"turns": "each"}, {"marks": "template"}], ids=str)
def test_how_answers_are_trained_is_not_ignored_where_all_is(options: dict[str, Any]) -> None:
    with pytest.raises(TunesmithError, match=r"(turns: each|marks: template) says .* set train_on: assistant"):
        render(conversation(THOUGHT), template("generation"), "all", **options)
