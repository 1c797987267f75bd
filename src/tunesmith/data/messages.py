"""Turns of a conversation as different tools write them, to messages in the form of OpenAI's chat API.

What comes out: `role` is system, user, assistant, tool, developer, or another role that the chat template mentions.
`content` is text, or a list of parts {"type": "text", "text": ...}. An assistant may have `tool_calls` (`data.calls`)
and `reasoning_content`, a tool `tool_call_id` and `name`. Other keys stay as they are, since templates may read them.

One turn can become several messages (results of tools in Anthropic's form), and several turns one (calls as turns).
What a turn says of its own training is its weight:

    {"from": "gpt", "value": "Hi", "train": false}  ->  {"role": "assistant", "content": "Hi"}, weight 0
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.data.calls import calls_of
from tunesmith.data.values import shown, string
from tunesmith.errors import TunesmithError, nearest
from tunesmith.text import shorten
from tunesmith.types import Message

Fields = dict[str, Any]

CALL = "call"
"""Not a role, but turns that consist of calls: messages of the assistant."""
ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatbot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "observations", "ipython", "function"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "function_response", "function_result"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
"""The names of roles, in small letters, and what they are here."""
QUOTED_NAME = re.compile(r"""(["'])([A-Za-z][\w-]*)\1""")
DEVELOPER_AS_SYSTEM = "messages of the role developer are given to the chat template as system: it has no developer"

FLAGS = ("train", "training", "loss", "loss_mask", "step_loss_mask", "masked")
"""Keys that say whether a turn is trained on, yes or no; `masked` says the opposite."""
HEAVIEST = 1_000_000
"""A weight, or a margin of a pair: float32 holds what they are multiplied with and summed to."""
FACTORS = ("weight", "loss_weight", "loss_scale")
DETAILS = ("train_detail", "training_detail")
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
REASONING_PARTS = ("thinking", "reasoning")
CALL_PARTS = ("tool_use", "tool_call")
SPEAKERS = {"system": "system", "human": "user", "user": "user", "input": "user"} | dict.fromkeys(
    ("assistant", "gpt", "bot", "output"), "assistant"
)
"""Keys of an object that is a whole exchange: {"human": "Hi", "assistant": "Hello!"}."""
PARTLY = (
    "Turns are trained on as a whole. To train on a part of this one, write the row as text, with what is not to be "
    "trained on in 'prompt' and the rest in 'completion'"
)


ONLY_TEXT = "a turn can have text, reasoning and calls of tools, and nothing else can be trained on"


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnOptions:
    """How turns are read.

    `known_roles`: the names in the chat template's source (`names_in`), roles among them; None when it is not known.
    `merge_turns`: neighbours of one role become one message.
    """

    known_roles: tuple[str, ...] | None = None
    merge_turns: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """Messages, and what a report is to say once of how they were read."""

    messages: tuple[Message, ...]
    notes: tuple[str, ...] = ()


def names_in(template: "str | Mapping[str, str] | None") -> tuple[str, ...] | None:
    """All quoted names in the source of a chat template, or of several; None without one."""
    if template is None:
        return None
    sources = [template] if isinstance(template, str) else template.values()
    return tuple(sorted({match[2] for source in sources for match in QUOTED_NAME.finditer(source)}))


def read_turns(turns: Any, column: str, options: TurnOptions) -> Turns:
    """The turns of a column as messages. Raises TunesmithError that names the turn and what is wrong with it."""
    if not isinstance(turns, list | tuple):
        raise TunesmithError(f"{column!r} is {shown(turns)}, expected a list of messages")
    if not turns:
        raise TunesmithError(f"{column!r} is empty")
    messages: list[Message] = []
    notes: dict[str, None] = {}
    calling = False  # whether the last message ends with a turn of calls
    for i, source in enumerate(turns):
        place = f"message {i + 1} of {column!r}"
        if not isinstance(source, dict):
            raise TunesmithError(f"{place} is {shown(source)}, expected an object with 'role' and 'content'")
        if (simple := _simple(source)) is not None:
            messages.append(simple)
            calling = False
            continue
        for part in _exchange(source):
            turn = _Turn(part, place, options)
            notes |= dict.fromkeys(turn.notes)
            if turn.role == CALL and messages and messages[-1].role == "assistant":
                messages[-1] = _with_calls(messages[-1], turn, calling=calling)
            else:
                messages += turn.messages()
            calling = turn.role == CALL
    return Turns(messages=tuple(_merged(messages) if options.merge_turns else messages), notes=tuple(notes))


def _simple(turn: Fields) -> Message | None:
    """The message of a turn that says who speaks and what, and nothing else, as most do."""
    name, content = (turn.get("role"), turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
    role = ROLES.get(name) if type(name) is str else None
    if len(turn) != 2 or type(content) is not str or role not in ("system", "user", "assistant"):
        return None
    return Message(fields={"role": role, "content": content})


def _exchange(turn: Fields) -> Iterator[Fields]:
    """The turns of an object that holds several, each under its speaker; else the turn itself."""
    speakers = [name for name in SPEAKERS if turn.get(name) not in (None, "")]
    rest = {name: value for name, value in turn.items() if name not in SPEAKERS}
    both = {"user", "assistant"} <= {SPEAKERS[name] for name in speakers}
    if rest.keys() & {"role", "from", "content", "value", "parts"} or not speakers or (rest and not both):
        yield turn
        return
    for name in speakers:
        said = {"role": SPEAKERS[name], "content": turn[name]}
        yield said | rest if SPEAKERS[name] == "assistant" else said


def _with_calls(message: Message, turn: "_Turn", *, calling: bool) -> Message:
    """A message of the assistant with the calls of the turn behind it, which belong to the same answer.

    The first of several calls decides whether they are trained on, as in ms-swift; a later one need not say it.
    """
    if turn.weight is None and calling:
        turn.weight = message.weight
    (following,) = turn.messages()
    if following.weight != message.weight:
        raise TunesmithError(
            f"{turn.place} has the weight {following.weight:g}, and the answer that its calls belong to "
            f"{message.weight:g}; both are one turn, so give them the same"
        )
    calls = [*message.fields.get("tool_calls", ()), *following.fields["tool_calls"]]
    return replace(message, fields=message.fields | {"tool_calls": calls})


class _Turn:
    """One turn, read key by key: what a key means is taken out of `rest`, and what is left there stays a key."""

    def __init__(self, turn: Fields, place: str, options: TurnOptions) -> None:
        self.rest = {name: value for name, value in turn.items() if value is not None}
        self.place, self.options = place, options
        self.notes: list[str] = []
        self.role = self._role()
        self.answers = self.role in ("assistant", CALL)
        self.texts: list[Fields] = []
        self.reasoning: list[str] = []
        self.calls: list[Fields] = []
        self.results: list[Fields] = []
        self.trained_parts: set[bool | None] = set()
        self.content = self._content()
        if self.answers:
            self._read_answer()
        self.weight = self._weight()

    def _role(self) -> str:
        key = "role" if "role" in self.rest else "from"
        if (name := self.rest.pop(key, None)) is None:
            raise TunesmithError(f"{self.place} has no 'role'; its keys are {', '.join(self.rest) or '(none)'}")
        string(name, f"{key!r} of {self.place}")
        known = self.options.known_roles
        role = ROLES.get(name.strip().casefold().replace("-", "_"))
        if known is not None and name in known and (role is None or (role == "tool" and role not in known)):
            return name  # a role of this template
        if role is None:
            raise TunesmithError(
                f"{self.place} has the role {name!r}{nearest(name.casefold(), ROLES)}\n"
                "Expected is system, user, assistant, tool or developer, or a role that the chat template mentions."
            )
        if known is not None and role == "developer" and role not in known:
            self.notes.append(DEVELOPER_AS_SYSTEM)
            return "system"
        return role

    def messages(self) -> list[Message]:
        """What the turn is: results of tools, each a message, and the turn itself unless it is nothing else."""
        weight = 1.0 if self.weight is None else self.weight
        fields: Fields = {"role": "assistant" if self.role == CALL else self.role}
        if self.content is not None:
            fields["content"] = self.content
        elif self.calls:
            fields["content"] = ""
        elif not self.results:
            keys = ", ".join(self.rest) or "(none)"
            what = f"(role {fields['role']!r}) has neither 'content' nor 'tool_calls'"
            raise TunesmithError(f"{self.place} {what}; its other keys are {keys}")
        if not self.rest.get("tool_calls"):
            self.rest.pop("tool_calls", None)  # templates ask whether the key is there
        fields |= self.rest | ({"tool_calls": self.calls} if self.calls else {})
        own = [fields] if self.content or not self.results else []
        return [Message(fields=message, weight=weight) for message in (*self.results, *own)]

    # What is said

    def _content(self) -> Any:
        """The content, or None; what its parts hold besides text goes to the other attributes."""
        name = "value" if "content" not in self.rest and "value" in self.rest else "content"
        content = self.rest.pop(name, None)
        gemini = content is None and isinstance(self.rest.get("parts"), list)
        if gemini:
            parts = enumerate(self.rest.pop("parts"))
            content = [_of_gemini(part, f"{self.place}, part {i + 1}") for i, part in parts]
        if self.role == CALL:
            self.calls += calls_of(content, f"{name} of {self.place}") if content else []
            return None
        if not isinstance(content, list):
            return content if content is None else string(content, f"{name} of {self.place}")
        for i, part in enumerate(content):
            self._read_part(part, f"{self.place}, part {i + 1}")
        others = self.reasoning or self.calls or self.results or gemini
        if len(self.texts) > 1 or not others:
            return self.texts
        return self.texts[0]["text"] if self.texts else None

    def _read_part(self, part: Any, place: str) -> None:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise TunesmithError(f"{place} is {shown(part)}; {ONLY_TEXT}")
        kind = part["type"] if part.get("type") is not None else "text" if "text" in part else ""
        if not isinstance(kind, str):
            raise TunesmithError(f"'type' of {place} is {shown(kind)}, expected text")
        value = next((part[name] for name in (kind, "text", "value", "content") if part.get(name) is not None), None)
        self._note_training(part, place)
        if kind in TEXT_PARTS and isinstance(value, str):
            if self.calls:
                raise TunesmithError(f"{place} is text behind a call of a tool; make it a message of its own")
            self.texts.append({"type": "text", "text": value})
        elif kind in REASONING_PARTS and self.answers:
            if self.texts or self.calls:
                raise TunesmithError(f"{place} is reasoning behind the answer; make it a message of its own")
            self.reasoning.append(self._joined(value, place))
        elif kind in CALL_PARTS and self.answers:
            self.calls += calls_of(part.get("value", part), place)
        elif kind == "tool_result" and not self.answers:
            if self.texts:
                raise TunesmithError(f"{place} is a result behind text; results of tools come first")
            identity = {"tool_call_id": part["tool_use_id"]} if part.get("tool_use_id") else {}
            content = self._joined(part.get("content") or "", place)
            self.results.append({"role": "tool", **identity, "content": content})
        else:
            raise TunesmithError(f"{place} is {kind!r}; {ONLY_TEXT}")

    def _joined(self, value: Any, place: str) -> str:
        """A text, or the texts of a list of parts."""
        if not isinstance(value, list):
            return string(value, place)
        texts = []
        for part in value:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                raise TunesmithError(f"{place} holds {shown(part)}; {ONLY_TEXT}")
            if isinstance(part, dict):
                self._note_training(part, place)
            texts.append(text)
        return "".join(texts)

    def _read_answer(self) -> None:
        """What an assistant's turn has beside its content."""
        if self.rest.pop("audio", None):
            raise TunesmithError(f"{self.place} has 'audio'; {ONLY_TEXT}")
        self.rest.pop("annotations", None)  # of the content, which has it all
        if (channel := self.rest.get("channel")) in ("analysis", "commentary"):
            raise TunesmithError(
                f"{self.place} is in the channel {channel!r}, which chat templates do not read; write reasoning as "
                "'reasoning_content', and calls as 'tool_calls', of the answer that they belong to"
            )
        if refusal := self.rest.pop("refusal", None):
            # The API shows an answer under another name when it refuses; the model wrote it as it writes any other.
            if self.content and self.content != refusal:
                raise TunesmithError(f"{self.place} has both 'content' and 'refusal'; keep the one that is the answer")
            self.content = string(refusal, f"'refusal' of {self.place}")
        if calls := self.rest.pop("tool_calls", None):
            self.calls += calls_of(calls, f"'tool_calls' of {self.place}")
        if legacy := self.rest.pop("function_call", None):
            if calls:
                raise TunesmithError(f"{self.place} has both 'tool_calls' and 'function_call'; keep 'tool_calls'")
            self.calls += calls_of(legacy, f"'function_call' of {self.place}")
        names = [name for name in REASONING if name in self.rest]
        given = {repr(name): self._joined(self.rest.pop(name), f"{name!r} of {self.place}") for name in names}
        if self.reasoning:
            given["'content'"] = "\n\n".join(self.reasoning)
        if len(texts := {text for text in given.values() if text}) > 1:
            raise TunesmithError(f"{self.place} has different reasoning in {' and '.join(given)}; keep one of them")
        if given:
            self.rest["reasoning_content"] = next(iter(texts), "")

    # Whether it is trained on

    def _note_training(self, part: Fields, place: str) -> None:
        """What a part of the content says of its training, in Axolotl's form."""
        flag = part.get("train")
        if flag is None and (weight := part.get("weight")) is not None:
            flag = bool(weight_of(weight, f"'weight' of {place}"))
        self.trained_parts.add(None if flag is None else flag_of(flag, f"'train' of {place}"))

    def _weight(self) -> float | None:
        """What the turn says of its own training; None when it says nothing."""
        if "mask" in self.rest:
            raise TunesmithError(
                f"{self.place} has 'mask', which means yes here and no there; say `train: true`, or `train: false`"
            )
        flags, factors = stated_training(self.rest, self.place)
        for name in [name for name in (*FLAGS, *FACTORS) if name in self.rest]:
            del self.rest[name]
        for name in [name for name in DETAILS if name in self.rest]:
            flags[name] = self._trained_detail(name, self.rest.pop(name))
        if self.trained_parts - {None}:
            if len(self.trained_parts - {None} | {True for flag in self.trained_parts if flag is None}) > 1:
                raise TunesmithError(f"{self.place} has parts that are trained on and others that are not. {PARTLY}")
            flags["train of its parts"] = True in self.trained_parts
        if not self.answers:
            flags, factors = self._of_others(flags, factors)
        return agreed_weight(flags, factors, self.place)

    def _of_others(self, flags: dict[str, bool], factors: dict[str, float]) -> tuple[dict[str, bool], dict[str, float]]:
        """What a turn says that is not an answer: that it is not trained on, since the other can't be done.

        ms-swift reads `loss` and `loss_scale` of answers only.
        """
        asks = [name for name, flag in flags.items() if flag and name != "loss"]
        if asks := asks + [name for name in ("loss_weight",) if factors.get(name)]:
            raise TunesmithError(
                f"{self.place} ({self.role}) is to be trained on ({asks[0]}), but only turns of the assistant are "
                "trained one by one. Take the key out; with `train_on: all` every turn is trained on"
            )
        factors = {name: factor for name, factor in factors.items() if name == "weight" or not factor}
        return {name: flag for name, flag in flags.items() if not flag}, factors

    def _trained_detail(self, name: str, detail: Any) -> bool:
        """Whether spans of characters cover the whole content, or nothing of it. Raises TunesmithError for a part."""
        spans = detail if isinstance(detail, list) else [detail]
        if not all(isinstance(span, dict) and isinstance(span.get("train"), bool) for span in spans):
            expected = '{"begin_offset": 0, "end_offset": 8, "train": false}'
            raise TunesmithError(f"{name!r} of {self.place} is {shown(detail)}, expected a list of {expected}")
        if not any(span["train"] for span in spans):
            return False
        size = len(self.content) if isinstance(self.content, str) else 0
        first, last = spans[0].get("begin_offset", 0), spans[-1].get("end_offset", 0)
        if len(spans) == 1 and first == 0 and size and last >= size - 1:
            return True
        raise TunesmithError(f"{self.place} has {name!r}, which trains on some of its characters. {PARTLY}")


def _of_gemini(part: Any, place: str) -> Fields:
    """A part of Gemini's `parts`: text, or reasoning."""
    kinds = sorted(part.keys() - {"thought", "thoughtSignature", "text"}) if isinstance(part, dict) else ["no object"]
    if kinds or not isinstance(part.get("text"), str):
        raise TunesmithError(
            f"{place} is {', '.join(kinds) or 'without text'!r}; of Gemini's parts only text can be read. Write calls "
            "as `messages` with 'tool_calls'"
        )
    return {"type": "thinking" if part.get("thought") else "text", "text": part["text"]}


# What rows and turns say of their training


def weight_of(value: Any, place: str) -> float:
    """A weight: a number from 0 to `HEAVIEST`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= HEAVIEST:
        raise TunesmithError(f"{place} is {shorten(repr(value))}, expected a number from 0 to {HEAVIEST:,}")
    return float(value)


def flag_of(value: Any, place: str) -> bool:
    """Yes or no, also as 1 and 0."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise TunesmithError(f"{place} is {value!r}, expected true or false")
    return bool(value)


def stated_training(fields: Mapping[str, Any], place: str) -> tuple[dict[str, bool], dict[str, float]]:
    """The keys of a turn or row that say whether it is trained on, and those that say how much."""
    flags = {
        name: flag_of(fields[name], f"{name!r} of {place}") != (name == "masked")
        for name in FLAGS
        if fields.get(name) is not None
    }
    factors = {
        name: weight_of(fields[name], f"{name!r} of {place}") for name in FACTORS if fields.get(name) is not None
    }
    return flags, factors


def agreed_weight(flags: Mapping[str, bool], factors: Mapping[str, float], place: str) -> float | None:
    """The weight that all keys say together; None when there is none. Raises TunesmithError when two disagree."""
    trained = {*flags.values(), *(factor > 0 for factor in factors.values())}
    if len(trained) > 1 or len({*factors.values()}) > 1:
        raise TunesmithError(
            f"{place} says two things of its training, with {' and '.join(map(repr, (*flags, *factors)))}; keep one"
        )
    if not trained:
        return None
    return next(iter(factors.values()), float(True in trained))


# Neighbours of one role


def _merged(messages: Sequence[Message]) -> list[Message]:
    """`messages` with neighbours of one role joined by a blank line; each result of a tool stays alone."""
    result: list[Message] = []
    for i, message in enumerate(messages):
        before = result[-1] if result else None
        if before is None or message.role == "tool" or not _of_one(before.fields, message.fields):
            result.append(message)
            continue
        if before.weight != message.weight:
            raise TunesmithError(
                f"merge_turns: message {i + 1} ({message.role}) has the weight {message.weight:g} and the one before "
                f"it {before.weight:g}; give both the same"
            )
        result[-1] = replace(before, fields=_joined_fields(before.fields, message.fields))
    return result


def _of_one(first: Fields, second: Fields) -> bool:
    """Whether two messages can be one: of one speaker, and nothing of the second belongs before what the first ends
    with."""
    late = first.get("tool_calls") and second["content"]
    reasons = second.get("reasoning_content") and (first["content"] or first.get("tool_calls"))
    return first["role"] == second["role"] and first.get("name") == second.get("name") and not late and not reasons


def _joined_fields(first: Fields, second: Fields) -> Fields:
    contents = [content for content in (first["content"], second["content"]) if content]
    content: Any = "\n\n".join(contents) if all(isinstance(text, str) for text in contents) else []
    for text in contents if content == [] else ():
        parts = [dict(part) for part in text] if isinstance(text, list) else [{"type": "text", "text": text}]
        if content:
            parts[0]["text"] = "\n\n" + parts[0]["text"]
        content += parts
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    reasoning = [fields["reasoning_content"] for fields in (first, second) if fields.get("reasoning_content")]
    joined = first | second | {"content": content} | ({"tool_calls": calls} if calls else {})
    return joined | ({"reasoning_content": "\n\n".join(reasoning)} if reasoning else {})
