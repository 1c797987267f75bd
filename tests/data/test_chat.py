"""The supervised spans of every style of chat template, as literal token ids and as text, and what is refused."""

import re
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from tests.data.styles import (
    STYLES,
    Style,
    assistant,
    calls,
    conversation,
    render,
    result,
    spans,
    supervised,
    system,
    template,
    user,
    words,
)
from tunesmith.data import template as module
from tunesmith.data.chat import Rendering
from tunesmith.data.notes import UNANSWERED, UNASKED
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder
from tunesmith.errors import TunesmithError
from tunesmith.types import IGNORE_INDEX

TALK = [
    system("Be brief"),
    user("Hi"),
    assistant("Yes", reasoning_content="Hm"),
    user("Why?"),
    assistant("Because", reasoning_content="Well"),
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
WITH_TOOLS = [
    system("Be brief"),
    user("Hi"),
    calls("f"),
    result("1"),
    assistant("Yes"),
    user("Why?"),
    calls("f", "g"),
    result("1"),
    result("2"),
    assistant("Because"),
]

# The ids of `words` for TALK, `*` behind each supervised one. In the first: 3 <|im_start|>, 47 system, 45 a line break,
# 54 44 55 "Be brief", 4 <|im_end|>, 48 user, 51 Hi, 49 assistant, 52 Yes, 56 91 "Why?", 57 Because. With a `|` between
# the documents of a template that renders earlier answers otherwise.
LITERAL = {
    "chatml": "3 47 45 54 44 55 4 45 3 48 45 51 4 45 3 49 45 52* 4* 45 3 48 45 56 91 4 45 3 49 45 57* 4* 45",
    "generation": "3 47 45 54 44 55 4 45 3 48 45 51 4 45 3 49 45 52* 4* 45 3 48 45 56 91 4 45 3 49 45 57* 4* 45",
    "llama2": (
        "1 16 44 95 95 75 96 96 45 54 44 55 45 95 95 97 75 96 96 45 45 51 44 17 44* 52* 44* 2* 1 16 44 56 91 44 17 "
        "44* 57* 44* 2*"
    ),
    "llama3": (
        "1 5 47 6 45 45 54 44 55 7 5 48 6 45 45 51 7 5 49 6 45 45 52* 7* 5 48 6 45 45 56 91 7 5 49 6 45 45 57* 7*"
    ),
    "gemma": "1 9 48 45 54 44 55 45 45 51 10 45 9 50 45 52* 10* 45 9 48 45 56 91 10 45 9 50 45 57* 10* 45",
    "phi3": "13 45 54 44 55 14 45 11 45 51 14 45 12 45 52* 14* 45 11 45 56 91 14 45 12 45 57* 14* 45 15",
    "mistral": (
        "1 16 44 54 44 55 45 45 51 17 44* 52* 2* | 1 16 44 51 17 44 52 2 16 44 54 44 55 45 45 56 91 17 44* 57* 2*"
    ),
    "qwen3": (
        "3 47 45 54 44 55 4 45 3 48 45 51 4 45 3 49 45 36* 45* 59* 45* 37* 45* 45* 52* 4* | "
        "3 47 45 54 44 55 4 45 3 48 45 51 4 45 3 49 45 52 4 45 3 48 45 56 91 4 45 3 49 45 36* 45* 58* 45* 37* 45* "
        "45* 57* 4*"
    ),
    "deepseek": (
        "1 54 44 55 23 51 24 36 45 59* 45* 37* 45* 45* 52* 2* | "
        "1 54 44 55 23 51 24 52 2 23 56 91 24 36 45 58* 45* 37* 45* 45* 57* 2*"
    ),
    "merged_system": (
        "94 94 94 44 64 92 45 54 44 55 45 45 51 45 45 94 94 94 44 65 92 45 52* 2* 45 45 94 94 94 44 64 92 45 56 91 "
        "45 45 94 94 94 44 65 92 45 57* 2* 45 45"
    ),
    "stripped": "13 45 54 44 55 2 45 11 45 51 2 45 12 45 52* 2* 45 11 45 56 91 2 45 12 45 57* 2* 45",
    "endless": "46 92 44 54 44 55 45 66 92 44 51 45 67 92 44* 52* 45* 66 92 44 56 91 45 67 92 44* 57* 45* 2*",
    "glm": "25 26 13 45 54 44 55 11 45 51 12 45* 52* 11* 45 56 91 12 45* 57* 15*",
    "indexed": (
        "54 44 55 45 45 98 70 44 61 99 45 45 71 92 44 51 45 45 72 92 44* 52* 2* 45 45 98 70 44 62 99 45 45 71 92 44 "
        "56 91 45 45 72 92 44* 57* 2* 45 45"
    ),
    "harmony": (
        "28 47 30 54 44 55 14 28 48 30 51 14 28 49 29* 74* 30* 59* 14* 28* 49* 29* 73* 30* 52* 31* | "
        "28 47 30 54 44 55 14 28 48 30 51 14 28 49 29 73 30 52 14 28 48 30 56 91 14 28 49 29* 74* 30* 58* 14* "
        "28* 49* 29* 73* 30* 57* 31*"
    ),
    "last_end": "68 92 44 51 45 69 92 44* 52* 2* | 68 92 44 51 45 69 92 44 52 45 68 92 44 56 91 45 69 92 44* 57* 2*",
    "two_ends": "1 32 13 54 44 55 35 32 11 51 35 32 12 33* 52* 34* 35* 32 11 56 91 35 32 12 33* 57* 34* 35*",
}


@pytest.mark.parametrize("name", STYLES)
def test_ids_and_masks_of_every_style_are_these(name: str) -> None:
    style = STYLES[name]
    encoder = Encoder(words(style.name, style.eos, style.bos), EncodeOptions(train_on="assistant", share=False))
    talk = TALK[1:] if name == "last_end" else TALK  # which knows no system message
    examples = encoder.encode([("row 0", conversation(talk))], Counts())
    for example, document in zip(examples, LITERAL[name].split("|"), strict=True):
        ids = [int(token.rstrip("*")) for token in document.split()]
        marked = [token.endswith("*") for token in document.split()]
        assert example.input_ids == ids
        assert example.labels == [i if mark else IGNORE_INDEX for i, mark in zip(ids, marked, strict=True)]
        assert example.weights is None


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_the_text_is_what_inference_renders(style: Style) -> None:
    tokenizer = words(style.name, style.eos, style.bos)
    talk = TALK[1:] if style.name == "last_end" else TALK
    (document,) = render(conversation(talk), ChatTemplate(tokenizer), "all").documents
    assert document.text == tokenizer.apply_chat_template(talk, tokenize=False)
    for document in render(conversation(talk), ChatTemplate(tokenizer)).documents:
        for span in document.spans:
            index = next(i for i, message in enumerate(talk) if message["content"] in document.text[span.start :])
            prompt = tokenizer.apply_chat_template(talk[:index], tokenize=False, add_generation_prompt=True)
            assert document.text[: span.start] == prompt


def test_reasoning_has_the_names_it_has_at_inference() -> None:
    messages = [user("Hi"), assistant("Yes", reasoning="Hm")]
    tokenizer = words("qwen3", "<|im_end|>")
    rendered = render(conversation(messages), ChatTemplate(tokenizer))
    assert rendered.documents[0].text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert spans(rendered) == ["<think>\nHm\n</think>\n\nYes<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen3",
            [
                '<think>\n\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
                "<think>\n\n</think>\n\nYes<|im_end|>",
                '<think>\n\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
                '<tool_call>\n{"name": "g", "arguments": {"x": 2}}\n</tool_call><|im_end|>',
                "<think>\n\n</think>\n\nBecause<|im_end|>",
            ],
        ),
        (
            "mistral",
            [
                '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]</s>',
                " Yes</s>",
                '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"x": 2}}]</s>',
                " Because</s>",
            ],
        ),
        (
            "llama3",
            [
                '{"name": "f", "parameters": {"x": 1}}<|eom_id|>',
                "Yes<|eot_id|>",
                '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {"x": 2}}<|eom_id|>',
                "Because<|eot_id|>",
            ],
        ),
        (
            "glm",
            [
                '\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|observation|>',
                "\nYes<|user|>",
                '\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
                '<tool_call>{"name": "g", "arguments": {"x": 2}}</tool_call><|observation|>',
                "\nBecause",
            ],
        ),
    ],
)
def test_tool_calls_are_supervised_and_their_results_are_not(name: str, expected: list[str]) -> None:
    assert supervised(name, WITH_TOOLS, tools=TOOLS) == expected


def test_reasoning_that_history_drops_is_generated_where_inference_has_it() -> None:
    messages = [
        user("Hi"),
        calls("f", reasoning_content="Hm"),
        result("1"),
        assistant("Yes", reasoning_content="Hm"),
        user("Why?"),
        calls("g", reasoning_content="Well"),
        result("2"),
        assistant("Because", reasoning_content="Well"),
    ]
    call = '<tool_call>\n{{"name": "{}", "arguments": {{"x": 1}}}}\n</tool_call><|im_end|>'
    rendering = render(conversation(messages), template("qwen3"))
    assert [[document.text[span.start : span.stop] for span in document.spans] for document in rendering.documents] == [
        ["<think>\nHm\n</think>\n\n" + call.format("f"), "<think>\nHm\n</think>\n\nYes<|im_end|>"],
        ["<think>\nWell\n</think>\n\n" + call.format("g"), "<think>\nWell\n</think>\n\nBecause<|im_end|>"],
    ]
    assert rendering.documents[1].text.startswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + call.format("f") + "\n"
    )


@pytest.mark.parametrize("name", ["chatml", "qwen3", "glm", "llama3", "generation", "endless", "merged_system", "phi3"])
def test_two_answers_in_a_row_are_two_turns(name: str) -> None:
    turns = supervised(name, [user("Hi"), assistant("Yes"), assistant("No"), user("Why?"), assistant("Because")])
    assert [re.findall("Yes|No|Because", turn) for turn in turns] == [["Yes"], ["No"], ["Because"]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["Yes<|im_end|>", "No<|im_end|>"]),
        ("generation", ["Yes<|im_end|>", "No<|im_end|>"]),
        ("phi3", ["Yes<|end|>", "No<|end|>"]),
        ("glm", ["\nYes<|user|>", "\nNo"]),
        ("deepseek", ["\n</think>\n\nYes</s>", "\n</think>\n\nNo</s>"]),
        ("merged_system", ["Yes</s>", "No</s>"]),
    ],
)
def test_a_conversation_may_begin_with_the_assistant(name: str, expected: list[str]) -> None:
    assert supervised(name, [assistant("Yes"), user("Hi"), assistant("No")]) == expected


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("llama2", "  </s>"), ("phi3", "<|end|>")])
def test_of_an_empty_turn_its_end_is_supervised(name: str, end: str) -> None:
    assert supervised(name, [user("Hi"), assistant(""), user("Why?"), assistant("")]) == [end, end]


def test_questions_and_answers_that_say_nothing_are_told() -> None:
    def notes(*messages: Any, prompt: int | None = None) -> tuple[str, ...]:
        return render(replace(conversation([*messages]), prompt_length=prompt), template("chatml")).notes

    assert notes(user("Hi"), assistant(""), user(" \n"), assistant("Yes")) == (UNANSWERED, UNASKED)
    assert notes(user(""), assistant("Yes"), user(""), assistant("No")) == (UNASKED,)
    assert notes(user("Hi"), assistant(""), user("Why?"), assistant("Yes"), prompt=3) == ()
    assert notes(system(""), user("Hi"), assistant("Yes")) == ()
    called = render(conversation([user("Hi"), calls("f"), result(""), assistant("Yes")], tools=TOOLS), template("glm"))
    assert called.notes == ()


def test_contents_may_be_lists_of_parts() -> None:
    def parts(*texts: str) -> Any:
        return [{"type": "text", "text": text} for text in texts]

    messages = [user(parts("Hi", "?")), assistant(parts("Yes", " or ", "No"))]
    assert supervised("parts", messages) == ["Yes or No<|im_end|>"]


def test_reasoning_in_the_text_counts_as_reasoning() -> None:
    messages = [
        user("Hi"),
        assistant("<think>\nHm\n</think>\n\nYes"),
        user("Why?"),
        assistant("<think>\nWell\n</think>\n\nNo"),
    ]
    assert supervised("qwen3", messages) == [
        "<think>\nHm\n</think>\n\nYes<|im_end|>",
        "<think>\nWell\n</think>\n\nNo<|im_end|>",
    ]


def test_a_model_that_is_told_not_to_think_does_not_generate_the_empty_reasoning() -> None:
    talk = conversation([user("Hi"), assistant("Yes")])
    run = render(talk, template("qwen3", enable_thinking=False), "assistant")
    row = conversation([user("Hi"), assistant("Yes")], template_kwargs={"enable_thinking": True})
    assert spans(run) == ["Yes<|im_end|>"]
    assert spans(render(row, template("qwen3", enable_thinking=False), "assistant")) == [
        "<think>\n\n</think>\n\nYes<|im_end|>"
    ]


def test_all_renderings_of_a_run_have_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        ticks = 0

        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            cls.ticks += 1
            return cls(2024, 12, 31, 23, 59, cls.ticks)

    monkeypatch.setattr(module, "datetime", Clock)
    once = template("dated", eos="<|im_end|>")
    for _ in range(2):
        rendered = render(conversation(TALK), once)
        assert rendered.documents[0].text.startswith(
            "<|im_start|>system\nToday: 31 December 2024 23:59:01.000000<|im_end|>\n"
        )
        assert spans(rendered) == ["Yes<|im_end|>", "Because<|im_end|>"]


def test_a_template_of_its_own_for_tools_is_used_with_tools() -> None:
    tokenizer = words("chatml", "<|im_end|>")
    both = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", unk_token="<unk>")
    both.chat_template = {"default": tokenizer.chat_template, "tool_use": words("qwen3", "<|im_end|>").chat_template}
    messages = [user("Hi"), calls("f"), result("1"), assistant("Yes")]
    assert "<tool_call>" in render(conversation(messages, tools=TOOLS), ChatTemplate(both)).documents[0].text
    assert spans(render(conversation(TALK), ChatTemplate(both), "assistant")) == ["Yes<|im_end|>", "Because<|im_end|>"]


def test_a_template_without_generation_prompt_makes_the_model_write_the_header() -> None:
    expected = ["<|im_start|>assistant\nYes<|im_end|>", "<|im_start|>assistant\nNo<|im_end|>"]
    messages = [user("Hi"), assistant("Yes"), user("Why?"), assistant("No")]
    once = template("ignores_prompt", eos="<|im_end|>")
    assert spans(render(conversation(messages), once, "assistant")) == expected


def test_blocks_and_spans_supervise_the_same_tokens_as_transformers() -> None:
    tokenizer = words("generation", "<|im_end|>")
    encoder = Encoder(tokenizer, EncodeOptions(train_on="assistant"))
    (example,) = encoder.encode([("row 0", conversation(TALK))], Counts())
    theirs = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert example.input_ids == theirs["input_ids"]
    assert [int(label != IGNORE_INDEX) for label in example.labels] == theirs["assistant_masks"]


# What of a row is supervised


def test_last_assistant_supervises_the_last_turn_only() -> None:
    assert supervised("chatml", TALK, "last_assistant") == ["Because<|im_end|>"]


def test_a_completion_is_supervised_from_the_end_of_the_prompt() -> None:
    rendered = render(conversation(TALK, prompt_length=4), template("chatml"), "completion")
    assert spans(rendered) == ["Because<|im_end|>"]
    (document,) = rendered.documents
    assert document.prompt is not None
    assert document.text[: document.prompt].endswith("<|im_start|>assistant\n")


def test_of_a_completion_with_several_turns_the_answers_are_supervised() -> None:
    messages = [user("Hi"), calls("f"), result("1"), assistant("Yes")]
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    expected = ["<think>\n\n</think>\n\n" + call, "<think>\n\n</think>\n\nYes<|im_end|>"]
    assert supervised("qwen3", messages, "completion", prompt_length=1) == expected


def test_with_a_prompt_no_turn_of_it_is_supervised() -> None:
    assert supervised("chatml", TALK, "assistant", prompt_length=4) == ["Because<|im_end|>"]


def test_the_whole_text_is_one_span() -> None:
    rendered = render(conversation(TALK), template("chatml"), "all")
    assert spans(rendered) == [rendered.documents[0].text]


def weighted(rendered: Rendering) -> list[tuple[str, float]]:
    return [
        (document.text[span.start : span.stop], span.weight)
        for document in rendered.documents
        for span in document.spans
    ]


def test_weights_of_messages_and_rows_multiply_and_zero_supervises_nothing() -> None:
    messages = [user("Hi"), assistant("Yes", weight=0), user("Why?"), assistant("No", weight=0.5)]
    rendered = render(conversation(messages, weight=0.5), template("chatml"), "assistant")
    assert weighted(rendered) == [("No<|im_end|>", 0.25)]
    assert spans(render(conversation(messages, weight=0.0), template("chatml"))) == []


def test_a_turn_of_weight_zero_need_not_be_found() -> None:
    messages = [assistant("Yes", weight=0), user("Hi"), assistant("No")]
    assert supervised("mistral", messages) == [" No</s>"]
    with pytest.raises(TunesmithError, match=r"message 1 \(assistant\): the conversation begins with it[^$]*weight: 0"):
        supervised("mistral", [assistant("Yes"), user("Hi"), assistant("No")])


def test_in_the_whole_text_answers_have_their_own_weight() -> None:
    messages = [user("Hi"), assistant("Yes", weight=0), user("Why?"), assistant("No", weight=0.5)]
    rendered = render(conversation(messages, weight=2.0), template("chatml"), "all")
    assert weighted(rendered) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", 2.0),
        ("\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", 2.0),
        ("No<|im_end|>", 1.0),
        ("\n", 2.0),
    ]


def test_a_conversation_without_answers_has_nothing_to_train_on() -> None:
    for train_on in ("assistant", "last_assistant"):
        assert supervised("chatml", [user("Hi")], train_on) == []
