"""The turns of long conversations: the same as one by one, from a number of renderings that does not grow with them."""

from typing import Any

import pytest

from tests.data.styles import assistant, calls, conversation, result, template, user
from tunesmith.data.alike import turns_of
from tunesmith.data.template import ChatTemplate
from tunesmith.data.turns import Chat, turn_of
from tunesmith.errors import TunesmithError


def agent(turns: int, exchanges: int = 1, **fields: Any) -> list[dict[str, Any]]:
    """A conversation of so many exchanges, each of a question, calls with their results, and an answer."""
    messages: list[dict[str, Any]] = []
    for exchange in range(exchanges):
        messages.append(user(f"Why? {exchange}"))
        for i in range(turns):
            messages += [calls("f" if i % 3 else "g", **fields), result(f"{i} of {exchange}")]
        messages.append(assistant("Because", **fields))
    return messages


def indices(chat: Chat) -> list[int]:
    return [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]


@pytest.mark.parametrize("fields", [{}, {"reasoning_content": "Hm"}], ids=["plain", "reasoning"])
@pytest.mark.parametrize("exchanges", [1, 2])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "llama3", "glm", "minimax", "deepseek31", "mistral_ids", "kimi"])
def test_the_turns_are_those_that_one_by_one_are(name: str, exchanges: int, fields: dict[str, Any]) -> None:
    talk, once = conversation(agent(9, exchanges, **fields)), template(name)
    chat, apart = Chat(talk, once), Chat(talk, once)
    assert turns_of(chat, indices(chat)) == {i: turn_of(apart, i) for i in indices(apart)}


@pytest.mark.parametrize("name", ["llama3", "glm", "kimi"])
def test_the_renderings_do_not_grow_with_the_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []
    original = ChatTemplate._rendered

    def counting(self: ChatTemplate, messages: Any, *args: Any) -> str:
        rendered.append(len(messages))
        return original(self, messages, *args)

    once, counts = template(name), []
    turns_of(chat := Chat(conversation(agent(9)), once), indices(chat))  # what the template takes is known then
    monkeypatch.setattr(ChatTemplate, "_rendered", counting)
    for turns in (10, 40):
        rendered.clear()
        talk = conversation(agent(turns))
        chat = Chat(talk, once)
        turns_of(chat, indices(chat))
        counts.append(len(rendered))
        assert sum(rendered) < 4 * len(talk.messages)
    assert counts[0] == counts[1] <= 12


def test_a_turn_that_differs_from_the_others_of_its_shape_is_not_taken_for_one_of_them() -> None:
    messages = agent(9)
    messages[7] = calls("f", "g")  # two calls in one turn
    messages[9] = assistant("")
    chat = Chat(conversation(messages), template("qwen3"))
    assert [turn_of(chat, i).generated for i in (5, 7)] == [turns_of(chat, indices(chat))[i].generated for i in (5, 7)]


def test_a_lost_call_in_the_middle_is_found() -> None:
    messages = agent(9)
    messages[7] = calls("f", "weather")
    chat = Chat(conversation(messages), template("first_call"))
    with pytest.raises(TunesmithError, match=r"message 8 \(assistant\)"):
        turns_of(chat, indices(chat))
