"""Turns of every tool become OpenAI's messages with the weights that they state, or are refused by name."""

from typing import Any

import pytest

from tunesmith.data.messages import TurnOptions, names_in, read_turns
from tunesmith.errors import TunesmithError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes"}
CALLS = {"role": "assistant", "content": "", "tool_calls": []}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def fields(*turns: Any, known: tuple[str, ...] | None = None, merge: bool = False) -> list[dict[str, Any]]:
    options = TurnOptions(known_roles=known, merge_turns=merge)
    return [message.fields for message in read_turns(list(turns), "messages", options).messages]


def weights(*turns: Any, merge: bool = False) -> list[float]:
    return [message.weight for message in read_turns(list(turns), "messages", TurnOptions(merge_turns=merge)).messages]


# Who speaks


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("user", "user human Human USER prompter"),
        ("assistant", "assistant Assistant gpt GPT model bot ai AI chatbot chatgpt ChatGPT"),
        ("system", "system System"),
        ("developer", "developer"),
        ("tool", "tool observation observations function ipython tool_response tool-response function_response"),
    ],
)
def test_roles_have_other_names_in_every_form(role: str, names: str) -> None:
    for name in names.split():
        forms = {"role": name, "content": "x"}, {"from": name, "value": "x"}, {"role": name, "value": "x"}
        for turn in (*forms, {"from": name, "content": "x", "name": None}):
            assert fields(turn) == [{"role": role, "content": "x"}]


def test_an_unknown_role_is_refused_unless_the_template_mentions_it() -> None:
    turn = {"role": "asistant", "content": "x"}
    with pytest.raises(
        TunesmithError, match="message 1 of 'messages' has the role 'asistant'; did you mean 'assistant'"
    ):
        fields(turn)
    known = names_in("{% if message['role'] == \"critic\" or role == 'model' %}")
    assert known == ("critic", "model", "role")
    assert fields({"role": "critic", "content": "x"}, known=known) == [{"role": "critic", "content": "x"}]
    assert fields({"role": "model", "content": "x"}, known=known) == [{"role": "assistant", "content": "x"}]
    with pytest.raises(TunesmithError, match="role 'asistant'"):
        fields(turn, known=known)
    assert names_in({"default": "'a'", "tool_use": "'b'"}) == ("a", "b")
    assert names_in(None) is None


def test_developer_and_tool_are_what_the_template_calls_them() -> None:
    cases: list[tuple[tuple[str, ...] | None, str]] = [(None, "developer"), (("developer",), "developer")]
    for known, role in (*cases, (("system",), "system")):
        assert fields({"role": "developer", "content": "x"}, known=known) == [{"role": role, "content": "x"}]
    cases = [(("observation",), "observation"), (("observation", "tool"), "tool"), ((), "tool"), (None, "tool")]
    for known, role in cases:
        assert fields({"role": "observation", "content": "x"}, known=known) == [{"role": role, "content": "x"}]


# What is said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "text", "text": "a"}, "b"], [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        ([{"type": "text", "value": "a"}], [{"type": "text", "text": "a"}]),  # LLaMA-Factory
        ([{"type": "text", "text": "a", "cache_control": {"type": "x"}}], [{"type": "text", "text": "a"}]),
        ([{"type": "output_text", "text": "a"}, {"text": "b"}], [{"type": "text", "text": t} for t in "ab"]),
        ([{"type": "refusal", "refusal": "a"}], [{"type": "text", "text": "a"}]),
    ],
)
def test_parts_of_text(content: list[Any], expected: list[Any]) -> None:
    assert fields({"role": "assistant", "content": content}) == [{"role": "assistant", "content": expected}]


def test_anthropics_blocks() -> None:
    answer = [
        {"type": "thinking", "thinking": "Hm", "signature": "x"},
        {"type": "text", "text": "I will check."},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": None}},
        {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "1"}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "2", "is_error": True},
        {"type": "text", "text": "So?"},
    ]
    turns = [{"role": "assistant", "content": answer, "weight": 0}, {"role": "user", "content": results}]
    assert fields(*turns) == [
        {
            "role": "assistant",
            "content": "I will check.",
            "reasoning_content": "Hm",
            "tool_calls": [{"id": "t1"} | call("f", x=None), {"id": "t2"} | call("g")],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "1"},
        {"role": "tool", "tool_call_id": "t2", "content": "2"},
        {"role": "user", "content": "So?"},
    ]
    assert weights(*turns) == [0.0, 1.0, 1.0, 1.0]
    assert fields({"role": "user", "content": results[:1]}) == [{"role": "tool", "tool_call_id": "t1", "content": "1"}]


def test_parts_of_reasoning_and_calls_by_llama_factory_and_mistral() -> None:
    parts = [{"type": "reasoning", "value": "Hm"}, {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'}]
    expected = {"role": "assistant", "content": "", "reasoning_content": "Hm", "tool_calls": [call("f")]}
    assert fields({"role": "assistant", "content": parts}) == [expected]
    thinking = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}, {"type": "text", "text": "Yes"}]
    assert fields({"role": "assistant", "content": thinking}) == [ANSWER | {"reasoning_content": "Hm"}]


def test_calls_and_refusals_by_openai() -> None:
    turns = [
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "audio": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": null}'}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "assistant", "content": "", "function_call": {"name": "g", "arguments": "{}"}},
        {"role": "function", "name": "g", "content": "2"},
        {"role": "assistant", "content": None, "refusal": "No."},
    ]
    assert fields(*turns) == [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c"} | call("f", x=None)]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "assistant", "content": "", "tool_calls": [call("g")]},
        {"role": "tool", "name": "g", "content": "2"},
        {"role": "assistant", "content": "No."},
    ]


def test_turns_of_calls_belong_to_the_answer_before_them() -> None:
    first, second = '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": "{}"}'
    turns: list[Any] = [
        USER,
        {"role": "assistant", "content": "I will check."},
        {"role": "tool_call", "content": first},
        {"role": "tool_call", "content": second},
        {"role": "tool_response", "content": "1"},
        {"from": "function_call", "value": f"[{first}, {second}]", "train": False},
        {"from": "function_call", "value": first},
    ]
    assert fields(*turns) == [
        USER,
        {"role": "assistant", "content": "I will check.", "tool_calls": [call("f", x=1), call("g")]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "", "tool_calls": [call("f", x=1), call("g"), call("f", x=1)]},
    ]
    assert weights(*turns) == [1.0, 1.0, 1.0, 0.0]
    unseen = {"role": "tool_call", "content": first, "loss": False}
    assert weights(ANSWER | {"loss": False}, unseen, {"role": "tool_call", "content": second}) == [0.0]
    with pytest.raises(TunesmithError, match=r"message 2 .* has the weight 0, and the answer .* 1; both are one turn"):
        fields(ANSWER, unseen)


def test_exchanges_are_turns_of_each_speaker() -> None:
    exchange = {"system": "Be brief", "human": "Hi", "assistant": "Yes", "loss": False}
    assert fields(exchange) == [{"role": "system", "content": "Be brief"}, USER, ANSWER]
    assert weights(exchange) == [1.0, 1.0, 0.0]
    assert fields({"system": "", "input": "Hi", "output": "Yes"}, {"human": "Hi"}) == [USER, ANSWER, USER]
    with pytest.raises(TunesmithError, match="message 1 of 'messages' has no 'role'; its keys are user, text"):
        fields({"user": "u17", "text": "Hi"})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(name: str) -> None:
    expected = [ANSWER | {"reasoning_content": "Hm"}]
    assert fields(ANSWER | {name: "Hm"}) == expected
    assert fields(ANSWER | {name: "Hm", "reasoning_content": "Hm"}) == expected
    assert fields(ANSWER | {"thinking": "", name: "Hm"}) == expected
    assert fields(ANSWER | {name: [{"type": "text", "text": "H"}, {"type": "text", "text": "m"}]}) == expected


def test_other_keys_stay_and_keep_their_order() -> None:
    (message,) = fields({"name": "Ann", "role": "user", "content": "Hi", "time": 3, "flag": None})
    assert list(message.items()) == [("role", "user"), ("content", "Hi"), ("name", "Ann"), ("time", 3)]


# Whether it is trained on


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"train": False}, 0.0),
        ({"train": True}, 1.0),
        ({"training": False}, 0.0),
        ({"loss": False}, 0.0),
        ({"loss": 0}, 0.0),
        ({"loss": 1}, 1.0),
        ({"masked": True}, 0.0),
        ({"masked": False}, 1.0),
        ({"loss_mask": 0}, 0.0),
        ({"weight": 0}, 0.0),
        ({"loss_weight": 0.5}, 0.5),
        ({"loss_scale": 2.0, "loss": True}, 2.0),
        ({"loss_scale": 0.0, "loss": False, "train": False}, 0.0),
        ({"train": None, "weight": None}, 1.0),
        ({"train_detail": []}, 0.0),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, 0.0),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": True}]}, 1.0),
        ({"content": [{"type": "text", "text": "Yes", "train": False}]}, 0.0),
        (
            {"content": [{"type": "text", "text": "Y", "weight": 0}, {"type": "text", "text": "es", "train": False}]},
            0.0,
        ),
        ({"content": [{"type": "text", "text": "Yes", "weight": 1}]}, 1.0),
    ],
)
def test_a_turn_says_whether_it_is_trained_on(keys: dict[str, Any], weight: float) -> None:
    assert weights(USER, ANSWER | keys) == [1.0, weight]
    (_, answer) = fields(USER, ANSWER | keys)
    assert answer.keys() == {"role", "content"}
    if "content" not in keys:
        sharegpt = {"from": "gpt", "value": "Yes"} | keys
        assert weights({"from": "human", "value": "Hi"}, sharegpt) == [1.0, weight]


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"train": False}, 0.0),
        ({"loss_weight": 0.0}, 0.0),
        ({"loss": True}, 1.0),  # ms-swift reads it of answers only
        ({"loss_scale": 2}, 1.0),
    ],
)
def test_a_turn_that_is_no_answer_may_say_that_it_is_not_trained_on(keys: dict[str, Any], weight: float) -> None:
    assert weights(USER | keys, ANSWER) == [weight, 1.0]


# Neighbours of one role


def test_neighbours_of_one_role_are_joined() -> None:
    system, parts = {"role": "system", "content": "A"}, [{"type": "text", "text": "Hm"}]
    result = {"role": "tool", "content": "1"}
    turns: list[Any] = [system, system, USER, USER | {"content": parts}, ANSWER, ANSWER, result, result, ANSWER]
    assert fields(*turns) == turns
    assert fields(*turns, merge=True) == [
        {"role": "system", "content": "A\n\nA"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "\n\nHm"}]},
        {"role": "assistant", "content": "Yes\n\nYes"},
        result,
        result,
        ANSWER,
    ]


def test_what_is_joined_keeps_its_order() -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [call("f")]}
    assert fields(ANSWER | {"reasoning": "Hm"}, calls, calls, merge=True) == [
        ANSWER | {"reasoning_content": "Hm", "tool_calls": [call("f"), call("f")]}
    ]
    for second in (ANSWER, ANSWER | {"reasoning": "Hm"}):
        assert len(fields(calls, second, merge=True)) == 2
    assert len(fields(ANSWER, ANSWER | {"reasoning": "Hm"}, merge=True)) == 2
    assert len(fields(USER | {"name": "Ann"}, USER | {"name": "Bob"}, merge=True)) == 2


def test_answers_that_are_joined_have_one_weight() -> None:
    unseen = ANSWER | {"train": False}
    assert weights(USER, unseen, unseen, merge=True) == [1.0, 0.0]
    with pytest.raises(
        TunesmithError, match=r"merge_turns: message 3 \(assistant\) has the weight 1 and the one before"
    ):
        weights(USER, unseen, ANSWER, merge=True)


# What is refused


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (ANSWER | {"train": False, "weight": 1}, "message 1 of 'messages' says two things .* 'train' and 'weight'"),
        (ANSWER | {"loss": True, "loss_weight": 0}, "says two things"),
        (ANSWER | {"weight": 1, "loss_scale": 2}, "says two things"),
        (ANSWER | {"train": "no"}, "'train' of message 1 of 'messages' is 'no', expected true or false"),
        (ANSWER | {"loss": 0.3}, "'loss' of message 1 of 'messages' is 0.3, expected true or false"),
        (ANSWER | {"loss_weight": -1}, "'loss_weight' of message 1 of 'messages' is -1, expected a number"),
        (ANSWER | {"mask": 1}, "'mask', which means yes here and no there; say `train: true`"),
        (
            ANSWER | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]},
            "'train_detail', which trains on some of its characters. Turns are trained on as a whole",
        ),
        (ANSWER | {"train_detail": [3]}, "'train_detail' of message 1 of 'messages' is a list"),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "a", "train": False}, "b"]},
            "has parts that are trained on and others that are not",
        ),
        (USER | {"train": True}, r"message 1 of 'messages' \(user\) is to be trained on \(train\), but only turns of"),
        (USER | {"loss_weight": 1.0}, r"is to be trained on \(loss_weight\)"),
        (ANSWER | {"channel": "analysis"}, "is in the channel 'analysis', .* write reasoning as 'reasoning_content'"),
        (ANSWER | {"audio": {"id": "a"}}, "has 'audio'; a turn can have text"),
        (ANSWER | {"refusal": "No."}, "both 'content' and 'refusal'"),
        (ANSWER | {"reasoning": "a", "thinking": "b"}, "different reasoning in 'reasoning' and 'thinking'"),
        (ANSWER | {"reasoning": 7}, "'reasoning' of message 1 of 'messages' is a number"),
        (
            ANSWER | {"tool_calls": [call("f")], "function_call": {"name": "f", "arguments": "{}"}},
            "both 'tool_calls' and 'function_call'",
        ),
        ({"role": "tool_call", "content": "f(1)"}, r"content of message 1 of 'messages' is 'f\(1\)'; expected JSON"),
        ({"role": "tool_call"}, "neither 'content' nor 'tool_calls'"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "part 1 is 'image_url'; a turn can have",
        ),
        ({"role": "user", "content": [{"type": ["text"], "text": "a"}]}, "'type' of message 1 .* is a list"),
        ({"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}, "part 1 is 'thinking'"),
        (
            {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}, "b"]},
            "part 2 is text behind a call",
        ),
        (
            {"role": "assistant", "content": ["b", {"type": "thinking", "thinking": "a"}]},
            "part 2 is reasoning behind the answer",
        ),
        ({"role": "user", "content": ["b", {"type": "tool_result", "content": "a"}]}, "part 2 is a result behind text"),
        (
            {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image", "source": {}}]}]},
            "part 1 holds an object .*'image'",
        ),
    ],
)
def test_a_turn_that_can_not_be_read_is_refused_by_name(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        fields(turn)
