"""The JSON of OpenAI's interface: requests become checked values, and answers become objects or server-sent events.

What a request asks for and can't be honoured is refused, never ignored.
"""

import inspect
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunesmith.data.call_syntax import Call, Functions, Properties
from tunesmith.errors import nearest
from tunesmith.model.generate import Sampling
from tunesmith.text import shorten

Body = Mapping[str, Any]
GREEDY = 1e-5
"""Below this temperature, dividing by it would overflow; the likeliest token is certain already."""
SEEDS = range(-(2**63), 2**64)

DONE = "data: [DONE]\n\n"

IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
"""Fields that change no answer."""
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "best_of": 1,
    "echo": False,
    "suffix": "",
}
"""Fields that are not built, with the one value that asks for nothing."""
COMMON = frozenset(("model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop"))
CHAT = COMMON | frozenset(
    ("messages", "max_completion_tokens", "tools", "tool_choice", "chat_template_kwargs", "specials_in_content")
)
SPECIALS = ("text", "keep")
"""What text of a message is that reads as a control token: ordinary characters, or the token where the model was
trained so."""
COMPLETION = COMMON | {"prompt"}
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"))
TEMPLATE_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "documents",
    "kwargs",
}
"""Those that say how, or by which program, a conversation is rendered: not for a client to say."""


MOST_STOPS = 64
STOP_CHARACTERS = 10_000


class RequestError(Exception):
    """Answered with the HTTP status `status` and the interface's error object."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What both kinds of requests say about the answer."""

    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """`arguments` are the chat template's, tools among them. `functions` are the tools by name, with the schemas of
    their arguments. `keep_specials`: text that reads as a control token is to be one."""

    messages: list[dict[str, Any]]
    arguments: dict[str, Any]
    functions: Functions
    keep_specials: bool = False


# Requests


def shown(value: Any) -> str:
    """`value` in an error, which is no longer than a line, whatever was sent."""
    return shorten(repr(value))


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object in a request's body. Raises RequestError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(raw, parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeEncodeError as error:
        raise RequestError("a text in the body has half a surrogate pair, such as \\ud83d alone") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    return body


def parse_options(body: Body, known: frozenset[str], defaults: Sampling) -> Options:
    """The settings in `body`, whose fields must be among `known`; `defaults` are those that it leaves out."""
    _refuse_unknown(body, known)
    stream = _flag(body, "stream")
    extra = body.get("stream_options")
    if extra is not None and not (stream and isinstance(extra, dict)):
        raise RequestError("stream_options is an object, and only for stream: true", param="stream_options")
    unknown = sorted((extra or {}).keys() - {"include_usage", "include_obfuscation"})
    if unknown:
        raise RequestError(f"unknown field stream_options.{unknown[0]}", param="stream_options")
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise RequestError("stop must be a text, or a list of texts, none of them empty", param="stop")
    if len(stops) > MOST_STOPS or sum(map(len, stops)) > STOP_CHARACTERS:  # each is looked for after each token
        raise RequestError(
            f"stop has {len(stops):,} texts of {sum(map(len, stops)):,} characters; at most {MOST_STOPS} of together "
            f"{STOP_CHARACTERS:,} are looked for",
            param="stop",
        )
    return Options(
        sampling=_sampling(body, defaults),
        seed=_whole(body, "seed", SEEDS),
        stops=tuple(stops),
        stream=stream,
        include_usage=_flag(extra or {}, "include_usage"),
    )


def parse_prompt(body: Body, vocabulary: int) -> str | list[int]:
    """A completion's prompt: text, or token ids below `vocabulary`; alone, or in a list of one."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(i) is int and 0 <= i < vocabulary for i in prompt):
        return prompt
    raise RequestError(
        f"prompt must be one text that is not empty, or a list of token ids below {vocabulary}", param="prompt"
    )


def parse_chat(body: Body) -> Chat:
    """The conversation, as chat templates take it."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list with at least one message", param="messages")
    arguments = body.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise RequestError("chat_template_kwargs must be an object", param="chat_template_kwargs")
    refused = sorted(arguments.keys() & TEMPLATE_ARGUMENTS)
    if refused:
        raise RequestError(f"chat_template_kwargs can't set {refused[0]}", param="chat_template_kwargs")
    specials = body.get("specials_in_content") or "text"
    if specials not in SPECIALS:
        raise RequestError(f"specials_in_content is one of {', '.join(SPECIALS)}", param="specials_in_content")
    tools = _tools(body)
    return Chat(
        keep_specials=specials == "keep",
        messages=[_message(message, f"messages[{i}]") for i, message in enumerate(messages)],
        arguments=arguments | ({"tools": tools} if tools else {}),
        functions={tool["function"]["name"]: _properties(tool["function"]) for tool in tools},
    )


def _properties(function: Body) -> Properties:
    schema = function.get("parameters")
    found = schema.get("properties") if isinstance(schema, dict) else None
    return {name: of for name, of in found.items() if isinstance(of, dict)} if isinstance(found, dict) else {}


def _refuse_unknown(body: Body, known: frozenset[str]) -> None:
    for name, value in body.items():
        if name in known or name in IGNORED or value is None:
            continue
        if name not in NEUTRAL:
            hint = nearest(name, known)
            raise RequestError(
                f"unknown or unsupported field {shown(name)}{hint}", param=name, code="unsupported_parameter"
            )
        neutral = NEUTRAL[name]
        if value != neutral or isinstance(value, bool) != isinstance(neutral, bool):
            raise RequestError(f"{name} can't be honoured here; leave it out", param=name, code="unsupported_parameter")


def _sampling(body: Body, defaults: Sampling) -> Sampling:
    limits = {
        name: value
        for name in ("max_completion_tokens", "max_tokens")
        if (value := _whole(body, name, range(1, 2**31))) is not None
    }
    if len(set(limits.values())) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    temperature = _number(body, "temperature", 2.0, defaults.temperature)
    top_p = _number(body, "top_p", 1.0, defaults.top_p)
    greedy = temperature < GREEDY or top_p == 0
    return Sampling(
        max_new_tokens=next(iter(limits.values()), defaults.max_new_tokens),
        temperature=0.0 if greedy else temperature,
        top_p=top_p or 1.0,
    )


def _flag(body: Body, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} is {shown(value)}; write true or false", param=name)
    return bool(value)


def _whole(body: Body, name: str, allowed: range) -> int | None:
    value = body.get(name)
    if value is not None and (type(value) is not int or value not in allowed):
        raise RequestError(
            f"{name} is {shown(value)}; write a whole number from {allowed.start} to {allowed.stop - 1}", param=name
        )
    return value


def _number(body: Body, name: str, most: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise RequestError(f"{name} is {shown(value)}; write a number from 0 to {most:g}", param=name)
    return float(value)


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{place} must be an object with role and content", param=place)
    fields = {name: value for name, value in message.items() if value is not None}
    role = fields.get("role")
    if role not in ROLES:
        raise RequestError(
            f"role of {place} is {shown(role)}; it must be one of {', '.join(ROLES)}", param=f"{place}.role"
        )
    unknown = sorted(name for name, value in fields.items() if name not in MESSAGE and value != [])
    if unknown:
        raise RequestError(f"{place} has the unsupported field {unknown[0]}", param=f"{place}.{unknown[0]}")
    texts = {name: fields[name] for name in ("name", "tool_call_id", "reasoning_content") if name in fields}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise RequestError(f"{name} of {place} must be a text", param=f"{place}.{name}")
    calls = fields.get("tool_calls") or []
    if calls and role != "assistant":
        raise RequestError(f"{place} has tool_calls, but its role is {role}", param=f"{place}.tool_calls")
    read = {"tool_calls": _read_calls(calls, f"{place}.tool_calls")} if calls else {}
    role = "system" if role == "developer" else role  # as chat templates know it, by its earlier name
    return {"role": role, "content": _content(fields, bool(calls), place)} | texts | read


def _content(message: Body, may_lack: bool, place: str) -> str:
    content = message.get("content")
    if content is None and may_lack:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        other = next((part.get("type") for part in content if part.get("type") != "text"), None)
        if other is not None:
            raise RequestError(
                f"content of {place} has a part of type {shown(other)}; here are texts only", param=place
            )
        if all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
    raise RequestError(f"content of {place} must be a text, or a list of text parts", param=f"{place}.content")


def _read_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls as chat templates take them: arguments are an object, not the text of one."""
    read = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        try:
            arguments = json.loads(function["arguments"])  # type: ignore[index]
            if not (isinstance(arguments, dict) and isinstance(function["name"], str)):  # type: ignore[index]
                raise ValueError
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise RequestError(
                f"{place} must be a list of {{'id', 'type', 'function': {{'name', 'arguments'}}}}, where arguments is "
                "the JSON text of an object",
                param=place,
            ) from error
        read.append({**call, "function": {**function, "arguments": arguments}})  # type: ignore[dict-item]
    return read


def _tools(body: Body) -> list[dict[str, Any]]:
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise RequestError("tools must be a list", param="tools")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"tools[{i}] must be {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}",
                param=f"tools[{i}]",
            )
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise RequestError("tool_choice can be auto or none only: a model can't be made to call", param="tool_choice")
    return [] if choice == "none" else tools


# Answers


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


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The objects of one answer, which share an id: of `/v1/chat/completions`, or with `is_chat` False of
    `/v1/completions`. With `include_usage`, its last event counts tokens."""

    model: str
    is_chat: bool
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        choice: dict[str, Any] = {"text": outcome.text}
        if self.is_chat:
            choice = {"message": {"role": "assistant", "content": outcome.text, "refusal": None}}
        if outcome.calls:
            content = outcome.text if outcome.text.strip() else None
            choice["message"] |= {"content": content, "tool_calls": [_call(call) for call in outcome.calls]}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._object(kind, choice, outcome.reason) | {"usage": outcome.usage}

    def start(self) -> list[dict[str, Any]]:
        """The events before the first piece."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.is_chat else []

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text} if self.is_chat else text)

    def end(self, outcome: Outcome) -> list[dict[str, Any]]:
        events = [self.piece(outcome.rest)] if outcome.rest else []
        if outcome.calls:
            calls = [{"index": i, **_call(call)} for i, call in enumerate(outcome.calls)]
            events.append(self._chunk({"tool_calls": calls}))
        last = self._chunk({} if self.is_chat else "", outcome.reason)
        return [*events, last, *([last | {"choices": [], "usage": outcome.usage}] if self.include_usage else [])]

    def _chunk(self, delta: dict[str, Any] | str, reason: str | None = None) -> dict[str, Any]:
        kind, name = ("chat.completion.chunk", "delta") if self.is_chat else ("text_completion", "text")
        value = self._object(kind, {name: delta}, reason)
        return value | {"usage": None} if self.include_usage else value

    def _object(self, kind: str, choice: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, "logprobs": None, **choice, "finish_reason": reason}],
        }


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
