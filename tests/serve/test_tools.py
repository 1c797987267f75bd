"""Tools reach the model through the chat template, and its calls come back as calls, where their format is certain."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from tests.conftest import HERMES
from tests.data.call_forms import FORMS
from tests.serve.running import serving
from tunesmith.model.load import load_run

TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
ASKED: list[Any] = [{"role": "user", "content": "Rain?"}]


class Scripted(torch.nn.Module):
    """A head that says `ids` one after the other, whatever it is asked."""

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        super().__init__()
        self.ids, self.vocabulary, self.step = ids, vocabulary, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:2], self.vocabulary)
        logits[:, -1, self.ids[self.step % len(self.ids)]] = 1.0
        self.step += 1
        return logits


@contextmanager
def asked_for(tiny_model: Path, template: str, call: str) -> Iterator[OpenAI]:
    """A model that answers "I look.", and calls the tool."""
    model, tokenizer = load_run(str(tiny_model))
    tokenizer.chat_template = template
    ids = [*tokenizer(f"I look.\n{call}")["input_ids"], tokenizer.eos_token_id]
    model.lm_head = Scripted(ids, len(tokenizer))
    model.config.max_position_embeddings = 1024
    with serving(model, tokenizer) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture
def asking(tiny_model: Path) -> Iterator[OpenAI]:
    with asked_for(tiny_model, HERMES, CALL) as client:
        yield client


def test_a_call_comes_back_as_one_whole_and_streamed(asking: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "max_tokens": 200}
    choice = asking.chat.completions.create(**asked).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.\n")
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Łódź"})

    events = [event.choices[0] for event in asking.chat.completions.create(**asked, stream=True)]
    assert "".join(event.delta.content or "" for event in events) == "I look.\n"
    [called] = [event.delta.tool_calls[0] for event in events if event.delta.tool_calls]
    assert called.function is not None
    assert (called.index, called.function.name) == (0, "weather")
    assert events[-1].finish_reason == "tool_calls"

    # The whole turn goes back, as clients send it.
    answered = [*ASKED, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Sun"}]
    assert asking.chat.completions.create(**asked | {"messages": answered}).choices[0].finish_reason == "tool_calls"


def test_without_tools_there_are_no_calls(asking: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 200}
    assert asking.chat.completions.create(**asked).choices[0].message.content == f"I look.\n{CALL}"


def test_a_call_that_is_cut_off_is_text(asking: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "max_tokens": 30}
    events = [event.choices[0] for event in asking.chat.completions.create(**asked, stream=True)]
    assert "".join(event.delta.content or "" for event in events) == f"I look.\n{CALL}"[:30]
    assert events[-1].finish_reason == "length"


def test_a_call_in_another_form_has_the_types_of_its_schema(tiny_model: Path) -> None:
    parameters = {"type": "object", "properties": {"code": {"type": "string"}, "days": {"type": "integer"}}}
    tools: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    marked = "<parameter=code>\n012\n</parameter>\n<parameter=days>\n3\n</parameter>"
    call = f"<tool_call> <function=weather>\n{marked}\n</function>\n</tool_call>"  # the template has a line break
    with asked_for(tiny_model, FORMS["coder"], call) as client:
        asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 200}
        choice = client.chat.completions.create(**asked, tools=tools).choices[0]
        events = [event.choices[0] for event in client.chat.completions.create(**asked, tools=tools, stream=True)]
        other = client.chat.completions.create(**asked, tools=[_named(tools[0], "other")]).choices[0]
    [called] = choice.message.tool_calls or []
    assert called.type == "function"
    assert json.loads(called.function.arguments) == {"code": "012", "days": 3}
    assert "".join(event.delta.content or "" for event in events) == "I look.\n"
    assert events[-1].finish_reason == "tool_calls"
    assert other.message.content == f"I look.\n{call}"  # a name that is none of the tools is text


def _named(tool: Any, name: str) -> Any:
    return {**tool, "function": {**tool["function"], "name": name}}
