"""Every shape of row, every refusal, and no null of Arrow's in what a template sees."""

import json
from datetime import datetime
from typing import Any

import pytest
from datasets import Dataset

from tunesmith.data.formats import ArrowRow, FormatOptions, Task, detect, format_row, parse, parse_rows, task_of
from tunesmith.data.messages import TurnOptions
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation, Row, Text, Tokens

PLAIN = FormatOptions()
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes"}
F = {"type": "function", "function": {"name": "f"}}


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
    assert value.tools == [F]


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
    assert (fields(value), value.prompt_length, value.tools) == ([USER, ANSWER], 1, [F])


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


def test_history_is_part_of_the_prompt() -> None:
    row = {"instruction": "Hi", "output": "Yes", "history": [["a", "b"], ["c", "d"]], "system": "Be brief"}
    for history in (row["history"], json.dumps(row["history"])):
        value = talk({**row, "history": history})
        assert [message["content"] for message in fields(value)] == ["Be brief", "a", "b", "c", "d", "Hi", "Yes"]
        assert [message.role for message in value.messages][1:] == ["user", "assistant"] * 3
        assert value.prompt_length == 6
    assert fields(talk({**row, "history": [], "system": ""})) == [USER, ANSWER]


@pytest.mark.parametrize(
    "system",
    [
        {"system": "Be brief"},
        {"system_prompt": "Be brief"},
        {"system": "Be brief", "system_prompt": "Be brief"},
        {"systemInstruction": {"parts": [{"text": "Be brief"}]}},
    ],
)
def test_a_system_prompt_beside_the_turns_comes_first(system: dict[str, Any]) -> None:
    told = {"role": "system", "content": "Be brief"}
    assert fields(talk({"messages": [USER, ANSWER], **system})) == [told, USER, ANSWER]
    assert fields(talk({"messages": [told, USER, ANSWER], **system})) == [told, USER, ANSWER]
    value = talk({"prompt": [USER], "completion": [ANSWER], **system})
    assert (fields(value), value.prompt_length) == ([told, USER, ANSWER], 2)


def test_anthropics_system_prompt_may_be_parts() -> None:
    parts = [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}]
    assert fields(talk({"messages": [USER], "system": parts}))[0] == {
        "role": "system",
        "content": [{"type": "text", "text": "Be brief"}],
    }


def test_gemini() -> None:
    turns = [
        {"role": "user", "parts": [{"text": "Hi"}]},
        {"role": "model", "parts": [{"text": "Hm", "thought": True}, {"text": "Yes"}]},
    ]
    assert fields(talk({"contents": turns})) == [USER, ANSWER | {"reasoning_content": "Hm"}]


def test_a_conversation_of_exchanges() -> None:
    exchanges = [{"human": "Hi", "assistant": "Yes"}, {"system": "", "input": "Hi", "output": "Yes"}]
    assert fields(talk({"conversation": exchanges})) == [USER, ANSWER, USER, ANSWER]


@pytest.mark.parametrize(
    ("columns", "weight"),
    [
        ({"weight": 2}, 2.0),
        ({"loss_weight": 0.5}, 0.5),
        ({"loss_scale": 2, "loss": True}, 2.0),
        ({"train": False}, 0.0),
        ({"masked": True}, 0.0),
        ({"loss": 0.7, "train": "yes"}, 1.0),  # a loss that was measured, and the name of a split
    ],
)
def test_a_row_says_how_much_it_is_trained_on(columns: dict[str, Any], weight: float) -> None:
    rows: list[dict[str, Any]] = [{"messages": [USER, ANSWER]}, {"text": "x"}, {"prompt": "x", "completion": "y"}]
    assert [read({**row, **columns}).weight for row in rows] == [weight] * 3
    assert read({"input_ids": [5], **columns}).weight == weight


def test_columns_that_no_tool_reads_may_be_there() -> None:
    others = {"label": 1, "images": [], "image": None, "audio": {"path": None}, "id": 7, "topic": "x", "history": "[]"}
    assert fields(talk({"messages": [USER, ANSWER], **others})) == [USER, ANSWER]
    assert read({"text": "Good.", "label": True, "context": "film"}) == Text(text="Good.")
    asked = {"instruction": "Hi", "output": "Yes", "input": "", "context": ""}
    assert fields(talk(asked)) == [USER, ANSWER]


def test_tools_may_be_named_functions() -> None:
    assert talk({"messages": [USER], "functions": [{"name": "f"}], "parallel_tool_calls": False}).tools == [F]


def test_roles_of_the_template_and_merging_reach_the_messages() -> None:
    turns = TurnOptions(known_roles=("user", "critic"), merge_turns=True)
    row = {"prompt": [USER, USER], "completion": [ANSWER, {"role": "critic", "content": "No"}]}
    value = talk(row, turns=turns)
    assert [message["content"] for message in fields(value)] == ["Hi\n\nHi", "Yes", "No"]
    assert value.prompt_length == 1
    options = FormatOptions(formatting_func=lambda row: row, turns=turns)
    assert format_row(row, options) == value


def test_what_was_read_otherwise_is_noted() -> None:
    row = {"messages": [{"role": "developer", "content": "Be brief"}, USER, ANSWER]}
    value = talk(row, turns=TurnOptions(known_roles=("system",)))
    assert value.notes == (
        "messages of the role developer are given to the chat template as system: it has no developer",
    )
    assert value.messages[0].role == "system"
    assert talk(row).notes == ()


def test_text() -> None:
    assert read({"text": "Hi", "label": 1}) == Text(text="Hi")
    assert read({"body": "Hi", "text": 7}, text_field="body") == Text(text="Hi")


def test_tokens() -> None:
    assert read({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}) == Tokens(input_ids=[5, 6, 7])
    assert read({"input_ids": [5, 6], "labels": [-100, 6], "weight": 2.0}) == Tokens(
        input_ids=[5, 6], labels=[-100, 6], weight=2.0
    )


def test_masks_of_tokens_become_labels() -> None:
    assert read({"input_ids": [5, 6], "loss_mask": [0, 1]}) == Tokens(input_ids=[5, 6], labels=[-100, 6])
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
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"default": None}}}}]
    assert talk({"messages": [USER], "tools": json.dumps(tools)}).tools == tools
    assert talk({"messages": [USER], "tools": tools}).tools == tools
    call = {"function": {"name": "f", "arguments": {"x": None}}}
    row = {"messages": [{"role": "assistant", "content": None, "name": None, "tool_calls": [call]}]}
    called = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    assert fields(talk(row)) == [{"role": "assistant", "content": "", "tool_calls": [called]}]


def test_tools_are_handed_on_in_their_order() -> None:
    tools = '[{"type": "function", "function": {"name": "f", "b": 1, "a": [3, {"z": 1, "c": null}]}}]'
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
        ({f"c{i:05}": "a" for i in range(20_000)}, r"the columns are c00000, .*, c00049 and 19,950 more\n"),
        ({"a": 1, "promt": "x", "completion": "y"}, r"are a, promt, completion; did you mean 'prompt'"),
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
        (
            {"messages": [{**USER, "weight": -1}]},
            "'weight' of message 1 of 'messages' is -1, expected a number from 0 to 1,000,000",
        ),
        ({"messages": [USER], "weight": float("nan")}, "'weight' of the row is nan"),
        ({"messages": [USER], "weight": 1e38}, r"'weight' of the row is 1e\+38, expected a number from 0 to 1,000,000"),
        ({"messages": [USER], "weight": 10**400}, r"'weight' of the row is 10{76}\.\.\., expected a number"),
        ({"messages": [USER], "weight": True}, "'weight' of the row is True"),
        ({"messages": [USER], "tools": "[{"}, "'tools' is text that is not JSON"),
        ({"messages": [USER], "tools": {"name": "f"}}, "'tools' is an object .*, expected a list, or its JSON text"),
        ({"messages": [USER], "tools": ["f"]}, r"tool 1 of 'tools' is text \(f\)"),
        ({"messages": [USER], "chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list"),
        (
            {"messages": [USER], "chat_template_kwargs": {"messages": []}},
            "'messages' can't be given to a chat template",
        ),
        ({"conversations": [{"from": "human"}]}, r"message 1 of 'conversations' \(role 'user'\) has neither"),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            r"round 1 of 'history' .*, expected \[question, answ",
        ),
        (
            {"instruction": "x", "output": "y", "history": [["a", None]]},
            "round 1 of 'history' is null .*, expected text",
        ),
        ({"system": "A", "messages": [{"role": "system", "content": "B"}]}, "a system prompt in a column, and another"),
        ({"system": "A", "system_prompt": "B", "messages": [USER]}, "'system' and 'system_prompt' differ"),
        ({"messages": [USER], "tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "'tools' and 'functions', and"),
        (
            {"messages": [USER], "weight": 1, "loss_weight": 2},
            "says two things of its training, with 'weight' and 'loss_w",
        ),
        ({"input_ids": [1, 2], "loss_scale": [0.5, 1]}, "'loss_scale' has a weight for each token"),
        (
            {"contents": [{"role": "user", "parts": [{"functionCall": {"name": "f"}}]}]},
            "part 1 is 'functionCall'; of Gem",
        ),
        ({"contents": [{"role": "user", "parts": [{"inlineData": {}, "text": ""}]}]}, "part 1 is 'inlineData'"),
        # What would be lost
        ({"messages": [USER, ANSWER], "image": "a.jpg"}, r"the row has images \('image'\), and only text"),
        ({"text": "A dog", "images": [{"bytes": None, "path": "a.jpg"}]}, "the row has images"),
        ({"prompt": "x", "completion": "y", "audio": {"path": "a.wav"}}, "the row has sounds"),
        (
            {"messages": [USER, ANSWER], "label": False},
            r"'label' is false: .*\(KTO\).* keep the rows whose 'label' is true",
        ),
        ({"prompt": "x", "completion": "y", "label": True}, "'label' is true: a row for preference training"),
        ({"conversations": [USER, ANSWER], "kto_tag": True}, "'kto_tag' is true: a row for preference training"),
        ({"messages": [USER, ANSWER], "history": [["a", "b"]]}, "'history' would be lost: the format 'messages' does"),
        ({"prompt": "x", "completion": "y", "history": [["a", "b"]]}, "'history' would be lost"),
        (
            {"prompt": "x", "completion": "y", "system": "z"},
            "`columns: {instruction: prompt, output: completion}` makes",
        ),
        ({"prompt": "x", "completion": "y", "tools": [{"name": "f"}]}, "'tools' would be lost"),
        (
            {"instruction": "x", "output": "y", "context": "z"},
            r"'context' would be lost.*\n?.*`columns: {input: context}`",
        ),
        (
            {"conversations": [USER, ANSWER], "mask": "User"},
            "'mask' is 'User', in NeMo's format .*`train_on: assistant`",
        ),
        # The line to write
        (
            {"question": "x", "answer": "y"},
            "Write `columns: {instruction: question, output: answer}`, or `columns: {pro",
        ),
        (
            {"input": "x", "output": "y"},
            "Write `columns: {instruction: input}`, or `columns: {prompt: input, completion: o",
        ),
        ({"query": "x", "response": "y"}, "Write `columns: {instruction: query, output: response}`"),
        ({"problem": "x", "solution": "y"}, "Write `columns: {instruction: problem, output: solution}`"),
        ({"dialog": [USER, ANSWER]}, "Write `columns: {messages: dialog}`, or a `formatting_func`"),
        ({"input": [USER], "output": [ANSWER]}, "Write `columns: {prompt: input, completion: output}`, or"),
        ({"prompt": [USER], "answer": "y"}, "Other names: `columns: {instruction: question, output: answer}`, or"),
        ({"instruction": "x", "output": None}, "'output' is null, which the format 'instruction' needs"),
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


def test_the_way_on_names_the_columns_of_the_row() -> None:
    row = {"question": "x", "answer": "y", "system_prompt": "z"}
    way = r"'system_prompt' would be lost.* `columns: {instruction: question, output: answer}` makes a conversation"
    with pytest.raises(TunesmithError, match=way):
        read(row, columns={"prompt": "question", "completion": "answer"})
    value = talk(row, columns={"instruction": "question", "output": "answer"})
    assert [message["content"] for message in fields(value)] == ["z", "x", "y"]


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
    with pytest.raises(TunesmithError, match=r"`columns: {messages: chosen_messages}`"):
        read({"chosen_messages": [USER, ANSWER], "rejected_messages": [USER, ANSWER]})
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


@pytest.mark.parametrize(
    ("row", "columns", "task"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {}, "pairs"),
        ({"prompt": "p", "good": "a", "bad": "b"}, {"chosen": "good", "rejected": "bad"}, "pairs"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"completion": "chosen"}, "supervised"),
        ({"prompt": "p", "completion": "a", "label": True}, {}, "judged"),
        ({"messages": [{"role": "user", "content": "a"}], "kto_tag": False}, {}, "judged"),
        ({"prompt": "p", "completion": "a", "label": "spam"}, {}, "supervised"),
        ({"prompt": "p", "completion": "a", "label": 1}, {}, "supervised"),
        ({"text": "t", "label": True}, {}, "supervised"),
    ],
)
def test_what_a_row_is_for_shows_in_its_columns(row: dict[str, Any], columns: dict[str, str], task: Task) -> None:
    assert task_of(row, columns) == task
