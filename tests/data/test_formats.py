"""Every shape of row, every refusal, and no null of Arrow's in what a template sees."""

import json
from datetime import datetime
from typing import Any

import pytest
from datasets import Dataset

from tunesmith.data.formats import ArrowRow, FormatOptions, detect, format_row, parse, parse_rows
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation, Row, Text, Tokens

PLAIN = FormatOptions()
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes"}


def read(row: dict[str, Any], **options: Any) -> Row:
    made = FormatOptions(**options)
    return parse(row, detect(row, made), made)


def talk(row: dict[str, Any], **options: Any) -> Conversation:
    value = read(row, **options)
    assert isinstance(value, Conversation)
    return value


def fields(value: Conversation) -> list[dict[str, Any]]:
    return [message.fields for message in value.messages]


# Every format


def test_messages() -> None:
    turns = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, "there"]},
        {"role": "assistant", "content": "Yes", "reasoning_content": "Hm", "weight": 0.5},
    ]
    value = talk({"messages": turns, "weight": 2})
    assert fields(value) == [
        turns[0],
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "Yes", "reasoning_content": "Hm"},
    ]
    assert [message.weight for message in value.messages] == [1.0, 1.0, 0.5]
    assert (value.weight, value.prompt_length, value.tools, value.template_kwargs) == (2.0, None, None, {})


def test_tool_calls_and_results() -> None:
    call = {"id": "a1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a1", "name": "f", "content": "1"},
        {"role": "assistant", "content": "Yes", "tool_calls": []},
    ]
    assert fields(talk({"messages": turns})) == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        turns[2],
        ANSWER,  # templates ask whether `tool_calls` is there
    ]


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}', "weight": 0},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "Yes"},
    ]
    value = talk({"conversations": turns, "system": "Be brief", "tools": '[{"name": "f"}]'})
    assert fields(value) == [
        {"role": "system", "content": "Be brief"},
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "1"},
        ANSWER,
    ]
    assert [message.weight for message in value.messages] == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert value.tools == [{"name": "f"}]


def test_a_function_call_may_be_several() -> None:
    calls = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
    (message,) = fields(talk({"conversations": [{"from": "function_call", "value": calls}]}))
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f", "g"]


def test_either_names_of_turns_do_in_either_column() -> None:
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    assert fields(talk({"messages": sharegpt})) == fields(talk({"conversations": [USER, ANSWER]})) == [USER, ANSWER]


def test_prompt_and_completion_as_text() -> None:
    assert read({"prompt": "Q: Hi\nA:", "completion": " Yes", "weight": 0.5}) == Text(
        text="Q: Hi\nA: Yes", prompt="Q: Hi\nA:", weight=0.5
    )


def test_prompt_and_completion_as_messages() -> None:
    value = talk({"prompt": [USER], "completion": [ANSWER], "tools": [{"name": "f"}]})
    assert (fields(value), value.prompt_length, value.tools) == ([USER, ANSWER], 1, [{"name": "f"}])


def test_a_completion_may_be_one_message() -> None:
    value = talk({"prompt": [USER], "completion": {"from": "gpt", "value": "Yes"}})
    assert (fields(value), value.prompt_length) == ([USER, ANSWER], 1)


def test_instructions() -> None:
    value = talk({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief"})
    assert fields(value) == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert value.prompt_length == 2
    for nothing in ({}, {"input": ""}, {"input": None}):
        assert fields(talk({"instruction": "Hi", "output": "Yes", **nothing})) == [USER, ANSWER]


def test_questions_and_answers_named_by_columns() -> None:
    row = {"question": "Hi", "answer": "Yes"}
    assert read(row, columns={"prompt": "question", "completion": "answer"}) == Text(text="HiYes", prompt="Hi")
    assert fields(talk(row, columns={"instruction": "question", "output": "answer"})) == [USER, ANSWER]


def test_a_column_that_is_mapped_is_not_read_under_its_own_name_too() -> None:
    asked = {"input": "Hi", "target": "Yes"}
    assert fields(talk(asked, columns={"instruction": "input", "output": "target"})) == [USER, ANSWER]
    answered = {"question": "Hi", "input": "Yes"}
    assert fields(talk(answered, columns={"instruction": "question", "output": "input"})) == [USER, ANSWER]
    told = {"system": "Hi", "output": "Yes"}
    assert fields(talk(told, columns={"instruction": "system"})) == [USER, ANSWER]


def test_two_columns_may_change_places() -> None:
    row = {"prompt": "Yes", "completion": "Hi"}
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert read(row, columns=swapped) == Text(text="HiYes", prompt="Hi")


def test_a_column_may_have_two_names() -> None:
    row = {"body": "Hi", "answer": "Yes"}
    both = {"instruction": "body", "input": "body", "output": "answer"}
    assert fields(talk(row, columns=both)) == [{"role": "user", "content": "Hi\n\nHi"}, ANSWER]
    kept = {"instruction": "Hi", "output": "Yes"}
    assert fields(talk(kept, columns={"instruction": "instruction", "system": "instruction"})) == [
        {"role": "system", "content": "Hi"},
        USER,
        ANSWER,
    ]


def test_text() -> None:
    assert read({"text": "Hi", "label": 1}) == Text(text="Hi")
    assert read({"body": "Hi", "text": 7}, text_field="body") == Text(text="Hi")


def test_tokens() -> None:
    assert read({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}) == Tokens(input_ids=[5, 6, 7])
    assert read({"input_ids": [5, 6], "labels": [-100, 6], "weight": 2.0}) == Tokens(
        input_ids=[5, 6], labels=[-100, 6], weight=2.0
    )


def test_masks_of_tokens_become_labels() -> None:
    row = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    assert read(row) == Tokens(input_ids=[5, 6, 7, 8], labels=[-100, 6, -100, 8])


def test_columns_say_which_format_is_meant() -> None:
    row = {"messages": [USER, ANSWER], "text": "Hi", "prompt": "P", "completion": "C"}
    assert isinstance(read(row), Conversation)
    assert read(row, columns={"text": "text"}) == Text(text="Hi")
    assert read(row, columns={"prompt": "prompt"}) == Text(text="PC", prompt="P")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("Hi", Text(text="Hi")),
        (("Hi", "Yes"), Text(text="HiYes", prompt="Hi")),
        ({"prompt": "Hi", "completion": "Yes"}, Text(text="HiYes", prompt="Hi")),
        ([USER, ANSWER], talk({"messages": [USER, ANSWER]})),
        (([USER], [ANSWER]), talk({"prompt": [USER], "completion": [ANSWER]})),
        (
            {"messages": [USER, ANSWER], "tools": [{"name": "f"}]},
            talk({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}),
        ),
    ],
)
def test_formatting_func_returns_text_messages_or_a_pair(made: Any, expected: Row) -> None:
    assert format_row({"any": 1}, FormatOptions(formatting_func=lambda row: made)) == expected


# Arrow's nulls


def test_no_null_of_arrows_reaches_messages_or_tools() -> None:
    def tool(name: str, **properties: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}

    rows: list[dict[str, Any]] = [
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
            ],
            "tools": [tool("f", x={"type": "integer", "enum": [1, None]})],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {
            "messages": [
                {"role": "user", "content": "Hi", "name": "Ann"},
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "g", "arguments": {"y": "a", "z": {"u": 1}}}}],
                },
                {"role": "tool", "content": "1", "tool_call_id": "c"},
                {"role": "assistant", "content": "Yes", "reasoning_content": "Hm", "weight": 0.5},
            ],
            "tools": [tool("g", y={"type": "string", "items": {"type": "string"}}), tool("h")],
            "chat_template_kwargs": {"date": "today"},
        },
        {"messages": [USER, ANSWER]},
    ]
    for row, padded in zip(rows, Dataset.from_list(rows), strict=True):
        given, seen = talk(row), talk(ArrowRow(padded))
        assert fields(seen) == fields(given)
        assert seen == given
        assert json.dumps(seen.tools) == json.dumps(row.get("tools"))
        assert "null" not in json.dumps(fields(seen))


def test_a_null_that_is_no_padding_stays() -> None:
    tools = [{"name": "f", "parameters": {"x": {"type": "integer", "default": None}}}]
    assert talk({"messages": [USER], "tools": json.dumps(tools)}).tools == tools
    assert talk({"messages": [USER], "tools": tools}).tools == tools
    call = {"function": {"name": "f", "arguments": {"x": None}}}
    row = {"messages": [{"role": "assistant", "content": None, "name": None, "tool_calls": [call]}]}
    assert fields(talk(row)) == [{"role": "assistant", "content": "", "tool_calls": [call]}]


def test_tools_are_handed_on_in_their_order() -> None:
    tools = '[{"name": "f", "b": 1, "a": [3, {"z": 1, "c": null}]}]'
    assert json.dumps(talk({"messages": [USER], "tools": tools}).tools) == tools


def test_arguments_of_the_template_come_as_object_or_json() -> None:
    for given in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        assert talk({"messages": [USER], "chat_template_kwargs": given}).template_kwargs == {"enable_thinking": False}
    nothings: tuple[Any, ...] = (None, "", {})
    for nothing in nothings:
        assert talk({"messages": [USER], "chat_template_kwargs": nothing}).template_kwargs == {}
        assert talk({"messages": [USER], "tools": nothing or []}).tools is None


# What is refused


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"the columns are \(none\)"),
        ({"mesages": [USER]}, r"the columns are mesages; did you mean 'messages'"),
        ({"a": 1, "promt": "x", "completion": "y"}, r"are a, completion, promt; did you mean 'prompt'"),
        ({"instruction": "x", "output": None}, r"the columns are instruction, output \(null\)"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "Hi"}, r"'messages' is text \(Hi\), expected a list of messages"),
        ({"messages": ["Hi"]}, r"message 1 of 'messages' is text \(Hi\), expected an object with 'role'"),
        ({"messages": [USER, {"content": "x"}]}, "message 2 of 'messages' has no 'role'; its keys are content"),
        ({"messages": [USER, {"role": "assistant"}]}, r"message 2 .* \(role 'assistant'\) has neither 'content' nor"),
        ({"messages": [{"role": "user", "content": 7}]}, r"content of message 1 of 'messages' is a number \(7\)"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "is an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1 of 'messages', part 1 is 'image'",
        ),
        ({"messages": [{"role": "user", "content": [3]}]}, r"part 1 is a number \(3\)"),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "'tool_calls' of message 1 of 'messages'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, r"must be a list of \{'function'"),
        ({"messages": [{**USER, "when": datetime(2024, 1, 1)}]}, "'messages' has datetime"),
        ({"messages": [{**USER, "weight": -1}]}, "'weight' is -1, expected a number of at least 0"),
        ({"messages": [USER], "weight": float("nan")}, "'weight' is nan"),
        ({"messages": [USER], "weight": True}, "'weight' is True"),
        ({"messages": [USER], "tools": "[{"}, "'tools' is text that is not JSON"),
        ({"messages": [USER], "tools": {"name": "f"}}, "'tools' is an object .*, expected a list, or its JSON text"),
        ({"messages": [USER], "tools": ["f"]}, r"tool 1 of 'tools' is text \(f\)"),
        ({"messages": [USER], "chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list"),
        (
            {"messages": [USER], "chat_template_kwargs": {"messages": []}},
            "'messages' can't be given to a chat template",
        ),
        ({"conversations": [{"from": "human"}]}, "'value' of message 1 of 'conversations' is null"),
        (
            {"conversations": [{"from": "bing", "value": "x"}]},
            "message 1 of 'conversations' is from 'bing'; expected one of",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f(1)"}]},
            r"\(function_call\) is 'f\(1\)'; expected JSON",
        ),
        ({"conversations": [{"from": "function_call", "value": '{"name": "f"}'}]}, "expected JSON"),
        ({"prompt": "x", "completion": [ANSWER]}, "both must be text, or both lists of messages"),
        ({"prompt": [USER], "completion": []}, "'completion' is empty"),
        ({"instruction": "x", "output": 7}, r"'output' is a number \(7\), expected text"),
        ({"instruction": "x", "output": "y", "input": ["z"]}, "'input' is a list"),
        ({"text": 7}, "'text' is a number"),
        ({"input_ids": [1, 2.5]}, "'input_ids' is a list .*, expected a list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 entries and 'input_ids' 2"),
        (
            {"input_ids": [1, 2], "labels": [2, -100]},
            "'labels' is 2 at place 0 where 'input_ids' is 1; labels are not shifted",
        ),
        ({"input_ids": [1, 2], "completion_mask": [1]}, "'completion_mask' has 1 entries"),
    ],
)
def test_a_broken_row_is_refused_with_the_reason(row: dict[str, Any], message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        read(row)


def test_preference_pairs_are_named_and_their_chosen_side_can_be_used() -> None:
    row = {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Yes"},
        "rejected": {},
    }
    with pytest.raises(
        TunesmithError, match=r"preference pairs .* `columns: {prompt: conversations, completion: chosen}`"
    ):
        read(row)
    assert fields(talk(row, columns={"prompt": "conversations", "completion": "chosen"})) == [USER, ANSWER]
    whole = {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}
    with pytest.raises(TunesmithError, match=r"`columns: {messages: chosen}`"):
        read(whole)
    assert fields(talk(whole, columns={"messages": "chosen"})) == [USER, ANSWER]
    with pytest.raises(TunesmithError, match=r"`columns: {prompt: prompt, completion: chosen}`"):
        read({"prompt": "Hi", "chosen": "Yes", "rejected": "No"})


def test_wrong_columns_are_refused() -> None:
    with pytest.raises(
        TunesmithError, match="columns: 'promt' is not a column that a format uses; did you mean 'prompt'"
    ):
        FormatOptions(columns={"promt": "question"})
    with pytest.raises(
        TunesmithError, match="no column 'query', which `columns` maps to 'prompt'; the row has question"
    ):
        read({"question": "x"}, columns={"prompt": "query"})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (["a", "b"], "returned a list of strings; it is called with one row and returns one string"),
        (None, "returned NoneType; it must return a string, a list of messages, or a"),
        ((1, 2, 3), "returned tuple"),
        (("a", [ANSWER]), "both must be text, or both lists"),
        ([], "'messages' is empty"),
    ],
)
def test_what_formatting_func_may_not_return(made: Any, message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        format_row({}, FormatOptions(formatting_func=lambda row: made))


def test_a_row_of_another_format_is_refused_with_its_place() -> None:
    rows: list[tuple[str, dict[str, Any]]] = [("row 0", {"text": "Hi"}), ("row 1", {"text": None, "messages": [USER]})]
    message = r"^row 1: no 'text', which the format 'text' of the first row needs; this row has messages$"
    with pytest.raises(TunesmithError, match=message):
        list(parse_rows(rows, PLAIN))


def test_rows_of_two_kinds_are_refused_with_the_place() -> None:
    rows: list[tuple[str, dict[str, Any]]] = [
        ("a.jsonl, line 1", {"prompt": "Hi", "completion": "Yes"}),
        ("a.jsonl, line 2", {"prompt": [USER], "completion": [ANSWER]}),
    ]
    with pytest.raises(
        TunesmithError, match=r"^a\.jsonl, line 2: this row is a prompt and a completion, both messages, the"
    ):
        list(parse_rows(rows, PLAIN))
    made = iter(["Hi", [USER, ANSWER]])
    with pytest.raises(TunesmithError, match=r"^row 1: this row is a conversation, the rows before it are each a text"):
        list(parse_rows([("row 0", {}), ("row 1", {})], FormatOptions(formatting_func=lambda row: next(made))))
