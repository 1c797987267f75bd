"""The JSON that the interface answers with: whole, or as server-sent events."""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from tunesmith.serve.tools import Call

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A finished answer. `rest` is the end of its `text` that has not been streamed."""

    text: str
    rest: str
    calls: list[Call]
    reason: str
    usage: dict[str, int]


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def error(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The interface's error object."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The objects of one answer, which share an id. With `include_usage`, its last event counts tokens."""

    model: str
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        raise NotImplementedError

    def start(self) -> list[dict[str, Any]]:
        """What goes before the first piece."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def end(self, outcome: Outcome) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _with_usage(self, events: list[dict[str, Any]], counted: dict[str, int]) -> list[dict[str, Any]]:
        return [*events, {**events[-1], "choices": [], "usage": counted}] if self.include_usage else events

    def _object(self, kind: str, prefix: str, choice: dict[str, Any], streamed: bool) -> dict[str, Any]:
        made = {
            "id": f"{prefix}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, "logprobs": None, **choice}],
        }
        return made | {"usage": None} if streamed and self.include_usage else made


class ChatReply(Reply):
    """Of `/v1/chat/completions`."""

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": outcome.text, "refusal": None}
        if outcome.calls:
            message["tool_calls"] = _calls(outcome.calls, numbered=False)
            message["content"] = outcome.text if outcome.text.strip() else None
        choice = {"message": message, "finish_reason": outcome.reason}
        return self._object("chat.completion", "chatcmpl", choice, False) | {"usage": outcome.usage}

    def start(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def end(self, outcome: Outcome) -> list[dict[str, Any]]:
        events = [self.piece(outcome.rest)] if outcome.rest else []
        if outcome.calls:
            events.append(self._chunk({"tool_calls": _calls(outcome.calls, numbered=True)}))
        return self._with_usage([*events, self._chunk({}, outcome.reason)], outcome.usage)

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"delta": delta, "finish_reason": reason}
        return self._object("chat.completion.chunk", "chatcmpl", choice, True)


class CompletionReply(Reply):
    """Of `/v1/completions`."""

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        choice = {"text": outcome.text, "finish_reason": outcome.reason}
        return self._object("text_completion", "cmpl", choice, False) | {"usage": outcome.usage}

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk(text)

    def end(self, outcome: Outcome) -> list[dict[str, Any]]:
        events = [self.piece(outcome.rest)] if outcome.rest else []
        return self._with_usage([*events, self._chunk("", outcome.reason)], outcome.usage)

    def _chunk(self, text: str, reason: str | None = None) -> dict[str, Any]:
        return self._object("text_completion", "cmpl", {"text": text, "finish_reason": reason}, True)


def _calls(calls: list[Call], numbered: bool) -> list[dict[str, Any]]:
    return [
        ({"index": i} if numbered else {})
        | {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for i, call in enumerate(calls)
    ]
