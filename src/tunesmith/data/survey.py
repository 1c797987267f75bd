"""What a chat template makes of conversations of every kind: which train, as one text or turn by turn, which don't.

A template alone has no tokenizer. It gets one of bytes, whose special tokens are what reads as one in the template and
in what it renders.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.data.chat import Rendering, RenderOptions, render
from tunesmith.data.sandbox import TooLong, time_limit
from tunesmith.data.template import REASONING_TAG, ChatTemplate
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation, Message

Kind = Literal["plain", "system", "multi-turn", "reasoning", "mixed", "parts", "tools", "parallel", "odd"]
Outcome = Literal["whole", "each", "refused"]

BAR = "|\uff5c"
"""The vertical line, and the wide one of DeepSeek's tokens."""
SPECIAL = re.compile(
    rf"<[{BAR}][^{BAR}<>\s'\"{{}}]{{1,40}}[{BAR}]>|<[{BAR}][a-z_]+>|<[a-z_]+[{BAR}]>|</?s>|<(?:bos|eos|sop|sep|pad)>"
    r"|<(?:start|end|beginning)_of_[a-z]+>|<[a-z]+:[a-z]+>|<SPECIAL_\d+>|\[/?[A-Z_]{3,24}\]|\[gMASK\]|\[\|[a-z]+\|\]"
    r"|\]~[a-z!]\]|\[e~\[|◁[^◁▷\s]+▷"
)
"""What reads as a special token."""
PLAIN = re.compile("tool_(?:call|resp)|tools?>|function", re.IGNORECASE)
"""What is one token in most vocabularies, but not special; so are tags of reasoning."""
END = re.compile(r"end|eos|eot|eom|stop|return|</", re.IGNORECASE)
BEGIN = re.compile(r"start|begin|open", re.IGNORECASE)

OF_ONE = re.compile(r"^message \d+ \(\w+\): | \([a-z ]+\)(?=:)|(?<=is not in the rendered text): .*")
QUOTED = re.compile(r"(?<= )(['\"]).*?\1(?=[,. ])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """A conversation that templates are tried with."""

    name: str
    kind: Kind
    conversation: Conversation


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What became of a talk: its documents, or the reason why there are none."""

    talk: Talk
    rendering: Rendering | None = None
    refusal: str = ""

    @property
    def outcome(self) -> Outcome:
        if self.rendering is None:
            return "refused"
        return "whole" if len(self.rendering.documents) == 1 else "each"


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """All trials of a template."""

    name: str
    end: str
    switches: tuple[dict[str, Any], ...]
    trials: tuple[Trial, ...]

    def counts(self, kind: Kind) -> Counter[Outcome]:
        """How many talks of a kind came out how."""
        return Counter(trial.outcome for trial in self.trials if trial.talk.kind == kind)

    def cell(self, kind: Kind) -> str:
        """How the talks of a kind came out: `each` where some of those with several turns need it."""
        counts = self.counts(kind)
        refused, trained = counts["refused"], "each" if counts["each"] else "whole"
        if not refused:
            return trained
        return "refused" if refused == counts.total() else f"{trained}, {refused} refused"

    def refusals(self) -> dict[str, list[str]]:
        """The reasons of what was refused, less what is of one talk in them, and the talks."""
        reasons: dict[str, list[str]] = {}
        for trial in self.trials:
            if trial.rendering is None:
                reason = OF_ONE.sub("", trial.refusal.partition("\n")[0])
                reasons.setdefault(QUOTED.sub("...", reason), []).append(trial.talk.name)
        return reasons

    def notes(self) -> dict[str, list[str]]:
        """What is worth knowing of trained talks, and which."""
        notes: dict[str, list[str]] = {}
        for trial in self.trials:
            for note in trial.rendering.notes if trial.rendering else ():
                notes.setdefault(note, []).append(trial.talk.name)
        return notes

    def as_json(self) -> dict[str, Any]:
        kinds = {kind: dict(self.counts(kind)) for kind in KINDS}
        return {
            "end": self.end,
            "switches": list(self.switches),
            "kinds": kinds,
            "refusals": self.refusals(),
            "notes": self.notes(),
        }


def surveyed(name: str, tokenizer: Any) -> Survey:
    """The survey of a tokenizer's template. Raises TunesmithError where it is none, or runs for too long."""
    template = ChatTemplate(tokenizer)
    template.program(None)
    try:
        with time_limit():
            trials = tuple(_tried(talk, template) for talk in TALKS)
    except TooLong as error:
        raise TunesmithError(f"the chat template of {name}: {error}") from error
    return Survey(name=name, end=template.eos, switches=tuple(map(dict, template.switches)), trials=trials)


def _tried(talk: Talk, template: ChatTemplate) -> Trial:
    try:
        return Trial(talk=talk, rendering=render(talk.conversation, template, RenderOptions()))
    except TunesmithError as error:
        return Trial(talk=talk, refusal=str(error))


# The conversations


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: Any, reasoning: str = "", calls: Sequence[tuple[str, dict[str, Any]]] = ()) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        named = ({"name": name, "arguments": arguments} for name, arguments in calls)
        message["tool_calls"] = [{"type": "function", "function": function} for function in named]
    return message


def _result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _tool(name: str, **properties: str) -> dict[str, Any]:
    schema = {key: {"type": kind, "description": f"the {key}"} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}", "parameters": parameters}}


TOOLS = [_tool("weather", city="string"), _tool("add", first="number", second="number")]
SYSTEM = {"role": "system", "content": "Answer in few words."}
CALL, OTHER_CALL = ("weather", {"city": "Taipei"}), ("add", {"first": 1, "second": 2})


def _talks() -> Iterator[tuple[Kind, str, list[dict[str, Any]]]]:
    yield "plain", "question", [_user("Who wrote Faust?"), _answer("Goethe wrote it.")]
    yield "plain", "lines", [_user("台北今天幾度"), _answer('二十五度。\n\n```python\nprint({"a": 1})\n```')]
    yield "plain", "padded", [_user(" spaces "), _answer("  around the answer ")]
    yield "system", "system", [SYSTEM, _user("Who wrote Faust?"), _answer("Goethe.")]
    first, second = _user("Is it warm?"), _user("And in Rome?")
    yield "multi-turn", "two turns", [first, _answer("It is."), second, _answer("Warmer still.")]
    turns = [turn for i in range(4) for turn in (_user(f"question {i}"), _answer(f"answer {i}"))]
    yield "multi-turn", "system, four turns", [SYSTEM, *turns]
    yield "multi-turn", "ends with a question", [first, _answer("It is."), second]
    reasons = _answer("It is.", "I look outside."), _answer("Warmer still.", "Rome is in the south.")
    yield "reasoning", "reasoning", [first, reasons[0]]
    yield "reasoning", "reasoning in two turns", [SYSTEM, first, reasons[0], second, reasons[1]]
    yield "reasoning", "reasoning in the text", [first, _answer("<think>\nI look outside.\n</think>\n\nIt is.")]
    yield "mixed", "reasoning in the second", [first, _answer("It is."), second, reasons[1]]
    yield "mixed", "reasoning in the first", [first, reasons[0], second, _answer("Warmer still.")]
    yield "parts", "parts of the user", [_user(_parts("Is it ", "warm?")), _answer("It is.")]
    all_parts = [_user(_parts("Is it warm?")), _answer(_parts("It is, ", "a little."))]
    yield "parts", "parts of all", all_parts
    asked = _user("What is the weather in Taipei?")
    called, resulted = _answer("", calls=[CALL]), _result("25 degrees")
    yield "tools", "a call", [asked, called, resulted, _answer("It is warm.")]
    yield (
        "tools",
        "a call after a call",
        [SYSTEM, asked, called, resulted, _answer("", calls=[OTHER_CALL]), _result("3")],
    )
    reasoned = _answer("", "I have to look.", [CALL])
    yield "tools", "reasoning before a call", [asked, reasoned, resulted, _answer("It is warm.", "25 is warm.")]
    both = _answer("", calls=[CALL, OTHER_CALL])
    yield "parallel", "two calls", [asked, both, resulted, _result("3"), _answer("It is warm.")]
    yield "odd", "text beside a call", [asked, _answer("I look it up.", calls=[CALL]), resulted, _answer("It is warm.")]
    yield "odd", "two questions in a row", [first, second, _answer("It is.")]
    yield "odd", "two answers in a row", [first, _answer("A moment."), _answer("It is."), second, _answer("Warmer.")]
    yield "odd", "begins with the assistant", [_answer("Good day."), first, _answer("It is.")]


def _conversation(messages: Sequence[dict[str, Any]]) -> Conversation:
    calls = any("tool_calls" in message for message in messages)
    return Conversation(messages=tuple(Message(fields=message) for message in messages), tools=TOOLS if calls else None)


TALKS = tuple(Talk(name=name, kind=kind, conversation=_conversation(talk)) for kind, name, talk in _talks())
KINDS: tuple[Kind, ...] = tuple(dict.fromkeys(talk.kind for talk in TALKS))


# A tokenizer for a template alone


def tokenizer_for(source: str) -> Any:
    """A tokenizer of bytes with the template, its special tokens, and the end token that its turns seem to have."""
    tokenizer = _of_bytes(source, SPECIAL.findall(source))
    try:
        with time_limit():
            texts = [*_rendered(tokenizer)]
    except TooLong as error:
        raise TunesmithError(f"the chat template can't be rendered: {error}") from error
    tokenizer = _of_bytes(
        source, [*SPECIAL.findall(source), *(token for text in texts for token in SPECIAL.findall(text))]
    )
    if end := _end_token(texts):
        tokenizer.eos_token = end
    return tokenizer


def _of_bytes(source: str, special: Sequence[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    backend = Tokenizer(
        models.BPE(vocab={sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokens = [token for token in special if not REASONING_TAG.fullmatch(token) and not PLAIN.search(token)]
    found = [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys([*names.values(), *tokens])]
    backend.add_special_tokens(found)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = source
    return tokenizer


def _rendered(tokenizer: Any) -> Iterator[str]:
    """What the template makes of a few conversations, of those that it takes."""
    template = ChatTemplate(tokenizer)
    for talk in TALKS:
        messages = [template.shaped(message.fields) for message in talk.conversation.messages]
        for tools in {id(None): None, id(TOOLS): TOOLS}.values():
            try:
                yield template.render(messages, tools=tools)
            except TunesmithError:
                continue


def _end_token(texts: Sequence[str]) -> str:
    """The first token behind an answer that ends a turn of the user, too, and has the name of an end."""
    ask, answer, again = "Is it warm?", "It is.", "And in Rome?"
    for text in texts:
        _, asked, rest = text.partition(ask)
        between, answered, after = rest.partition(answer)
        tail, _, _ = after.partition(again)
        if not asked or not answered:
            continue
        behind = SPECIAL.findall(tail)
        common = [token for token in behind if token in SPECIAL.findall(between)]
        named = [token for token in (*common, *behind) if END.search(token) and not BEGIN.search(token)]
        if found := [*named, *behind]:
            return found[0]
    return ""
