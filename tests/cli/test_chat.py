"""`tunesmith chat` answers as the model does, keeps the conversation, and prints answers alone to stdout."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tunesmith.cli.chat import Conversation
from tunesmith.cli.main import app
from tunesmith.errors import TunesmithError
from tunesmith.model import generate as generation
from tunesmith.model.generate import Sampling, generate
from tunesmith.model.load import load_run, load_tokenizer

RUNNER = CliRunner()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """What the model was asked, in place of the tiny model's random answers: its answer is the number of messages."""
    asked: list[list[dict[str, str]]] = []

    def stream(model: Any, tokenizer: Any, messages: Any, write: Any, sampling: Sampling, **_: Any) -> str:
        if messages[-1]["content"] == "too long":
            raise TunesmithError("the prompt has 300 tokens")
        if messages[-1]["content"] == "stop":
            write("half an ans")
            raise KeyboardInterrupt
        asked.append(list(messages))
        write(f"answer {len(messages)}")
        return f"answer {len(messages)}"

    monkeypatch.setattr(generation, "stream", stream)
    return asked


def test_a_prompt_is_answered_as_the_model_answers_it(tiny_model: Path) -> None:
    result = RUNNER.invoke(app, ["chat", str(tiny_model), "--prompt", "hello", "--max-new-tokens", "5"])
    model, tokenizer = load_run(str(tiny_model))
    [expected] = generate(model, tokenizer, [[{"role": "user", "content": "hello"}]], max_new_tokens=5)
    assert result.exit_code == 0
    assert result.stdout == f"{expected}\n"


def test_a_conversation_is_kept_until_reset(tiny_model: Path, heard: list[list[dict[str, str]]]) -> None:
    lines = "one\n\n  two  \n/reset\nthree\n/exit\nnever\n"
    result = RUNNER.invoke(app, ["chat", str(tiny_model), "--system", "be brief"], input=lines)
    assert result.exit_code == 0
    assert result.stdout == "answer 2\nanswer 4\nanswer 2\n"
    system = {"role": "system", "content": "be brief"}
    assert heard[1] == [
        system,
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "answer 2"},
        {"role": "user", "content": "two"},
    ]
    assert heard[2] == [system, {"role": "user", "content": "three"}]


def test_a_turn_that_fails_or_is_stopped_leaves_the_conversation_going(
    tiny_model: Path, heard: list[list[dict[str, str]]]
) -> None:
    result = RUNNER.invoke(app, ["chat", str(tiny_model)], input="one\ntoo long\nstop\n/what\ntwo\n")
    assert result.exit_code == 0
    assert [len(messages) for messages in heard] == [1, 3]
    assert "error: the prompt has 300 tokens" in result.stderr
    assert "stopped; this turn is forgotten" in result.stderr
    assert "unknown command /what" in result.stderr


def test_without_a_template_each_text_stands_alone(tiny_model: Path, heard: list[list[dict[str, str]]]) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = None
    conversation = Conversation(None, tokenizer, None, Sampling())
    conversation.answer("one")
    conversation.answer("two")
    assert [[message["content"] for message in messages] for messages in heard] == [["one"], ["two"]]
    with pytest.raises(TunesmithError, match="no place for a system message"):
        Conversation(None, tokenizer, "be brief", Sampling())


@pytest.mark.parametrize(("option", "value"), [("--temperature", "-1"), ("--top-p", "2"), ("--max-new-tokens", "0")])
def test_an_impossible_setting_is_refused_before_anything_is_loaded(option: str, value: str) -> None:
    result = RUNNER.invoke(app, ["chat", "owner/nowhere", "--prompt", "x", option, value])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {option[2:].replace('-', '_')} is ")
