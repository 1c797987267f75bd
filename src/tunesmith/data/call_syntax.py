"""How a chat template writes tool calls: learned from what it renders, read back from what a model writes.

    opening | call | (between | call)* | closing

    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>                  in an object: Hermes, Qwen 2.5 and 3
    {"name": "add", "parameters": {"a": 1}}                                        in an object: Llama 3
    [TOOL_CALLS]add[ARGS]{"a": 1}                                                  before an object: Mistral, DeepSeek
    <tool_call><function=add><parameter=a>1</parameter></function></tool_call>     marked: Qwen 3 Coder, GLM, MiniMax

A form is kept only if calls that it renders are read back as they were. White space may differ from the template's.
"""

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from tunesmith.data.sandbox import TooLong, time_limit
from tunesmith.data.template import PROBES, ChatTemplate, common_length
from tunesmith.errors import TunesmithError

Properties = Mapping[str, Mapping[str, Any]]
"""The JSON schemas of a function's arguments, by name."""
Functions = Mapping[str, Properties]
UNKNOWN: Functions = MappingProxyType({})

NAMES = ("probe_the_weather", "probe_a_place")
KEYS = ("first_key", "other_key")
VALUES = ("Lima xy", "Oslo yx")
NUMBERS = (71, 72)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A probe.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": "A key."} for key in KEYS},
                "required": list(KEYS),
            },
        },
    }
    for name in NAMES
]
AWKWARD: Mapping[str, Any] = {
    "text": 'Łódź "x"\n{y} 5',
    "number": -1.5,
    "yes": True,
    "none": None,
    "list": ["a", 1],
    "object": {"in": {"text": "it's"}},
    "digits": "12",
}
"""Arguments that a form must give back."""
TYPES: Properties = {
    "text": {"type": "string"},
    "number": {"type": "number"},
    "yes": {"type": "boolean"},
    "none": {"type": "null"},
    "list": {"type": "array"},
    "object": {"type": "object"},
    "digits": {"type": "string"},
}
NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """`arguments` is JSON text, as OpenAI's interface has it; `id` is the one that the model wrote, if any."""

    name: str
    arguments: str
    id: str = ""

    @property
    def message(self) -> dict[str, Any]:
        """The call as messages have it, with its arguments as an object."""
        named = {"id": self.id} if self.id else {}
        return {"type": "function", "function": {"name": self.name, "arguments": json.loads(self.arguments)}, **named}


class Read(NamedTuple):
    """A call in a text, and where it ends."""

    name: str
    arguments: Mapping[str, Any]
    stop: int
    id: str = ""


class Form(Protocol):
    """Reads the call that begins at a place of a text. None: there is none."""

    def __call__(self, text: str, start: int, functions: Functions) -> Read | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CallSyntax:
    """`opening` is the first mark of calls, "" where a call stands bare: it must be the first thing said then.
    `between` is None where a template shows one call only."""

    opening: str
    begins: re.Pattern[str]
    between: re.Pattern[str] | None
    closing: re.Pattern[str]
    form: Form

    def split(self, text: str, functions: Functions = UNKNOWN) -> tuple[str, list[Call]]:
        """The text before the calls, and the calls. Where anything is not as it must be, text behind a call among it,
        all is text. `functions` settle what a value is that the form leaves open: digits may be a text."""
        begin = self.begins.search(text) if self.opening else self.begins.match(text)
        if begin is None:
            return text, []
        calls, at = list[Call](), begin.end()
        while True:
            call = self.form(text, at, functions)
            if call is None:
                return text, []
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            if not _is_whole(call.name + arguments):
                return text, []
            calls.append(Call(name=call.name, arguments=arguments, id=call.id))
            more = None if self.between is None else self.between.match(text, call.stop)
            if more is None:
                whole = self.closing.fullmatch(text, call.stop) is not None
                return (text[: begin.start()], calls) if whole else (text, [])
            at = more.end()


def _is_whole(text: str) -> bool:
    """Whether it has no half of a character, which can't be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# The forms


@dataclass(frozen=True, kw_only=True, slots=True)
class InObject:
    """A JSON object with the name and the arguments under keys of these names, and `others`."""

    name: str
    arguments: str
    others: frozenset[str]

    def __call__(self, text: str, start: int, functions: Functions) -> Read | None:
        found = _object(text, start)
        if found is None or found[0].keys() != {self.name, self.arguments, *self.others}:
            return None
        value, stop = found
        name, arguments, own = value[self.name], value[self.arguments], value.get("id", "")
        if not isinstance(name, str) or not isinstance(arguments, dict) or not isinstance(own, str):
            return None
        return Read(name, arguments, stop, own)


@dataclass(frozen=True, kw_only=True, slots=True)
class BeforeObject:
    """A name, and behind it an object: of JSON, or with bare keys and `quote` around its strings."""

    behind: re.Pattern[str]
    quote: str = ""

    def __call__(self, text: str, start: int, functions: Functions) -> Read | None:
        name = NAME.match(text, start)
        behind = name and self.behind.match(text, name.end())
        found = behind and (_bare_object(text, behind.end(), self.quote) if self.quote else _object(text, behind.end()))
        if not name or not behind or not found:
            return None
        return Read(name[0], found[0], found[1], behind.groupdict().get("id", ""))


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """A name, and behind it keys and values between marks. A value is a string as it is, or JSON.

    `opens` stands before the first key and `next` before a further one, `text` and `json` between a key and a value;
    `ends` stands behind the last value, `bare` behind a name without arguments.
    """

    opens: re.Pattern[str]
    next: re.Pattern[str]
    text: re.Pattern[str]
    json: re.Pattern[str]
    ends: re.Pattern[str]
    bare: re.Pattern[str] | None

    def __call__(self, text: str, start: int, functions: Functions) -> Read | None:
        name = NAME.match(text, start)
        if name is None:
            return None
        types = functions.get(name[0], {})
        arguments, mark = dict[str, Any](), self.opens.match(text, name.end())
        if mark is None:
            bare = self.bare and self.bare.match(text, name.end())
            return Read(name[0], {}, bare.end()) if bare else None
        while mark.re is not self.ends:
            key = NAME.match(text, mark.end())
            opened = key and (self.text.match(text, key.end()) or self.json.match(text, key.end()))
            if not key or not opened or key[0] in arguments:
                return None
            marks = [found for way in (self.next, self.ends) if (found := way.search(text, opened.end()))]
            if not marks:
                return None
            mark = min(marks, key=lambda found: found.start())
            said = text[opened.end() : mark.start()]
            is_text = opened.re is self.text if self.text != self.json else _is_text(types.get(key[0], {}))
            arguments[key[0]] = said if is_text else _value(said)
        return Read(name[0], arguments, mark.end())


def _is_text(schema: Mapping[str, Any]) -> bool:
    of = schema.get("type")
    return of == "string" or (isinstance(of, list) and "string" in of)


CONSTANTS = {"True": True, "False": False, "None": None}


def _value(said: str) -> Any:
    """What JSON means by it, or Python by a constant, a list or a dictionary; else the text itself."""
    if said.strip() in CONSTANTS:
        return CONSTANTS[said.strip()]
    with suppress(ValueError, RecursionError):
        return json.loads(said)
    with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = ast.literal_eval(said.strip())
        json.dumps(value)
        return value if isinstance(value, list | dict) else said
    return said


def _object(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object that begins there, and where it ends."""
    try:
        value, stop = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return (value, stop) if isinstance(value, dict) else None


def _bare_object(text: str, start: int, quote: str) -> tuple[dict[str, Any], int] | None:
    """The same of an object with bare keys and `quote` around its strings."""
    mark = re.escape(quote)
    string, key = rf"{mark}(?P<text>.*?){mark}", r"(?P<key>[\w.-]+)\s*:"
    piece = re.compile(rf"\s*(?:{string}|{key}|(?P<plain>[^\s{{}}\[\]:,<]+|[{{}}\[\],]))", re.DOTALL)
    parts, depth, at = list[str](), 0, start
    while found := piece.match(text, at):
        at = found.end()
        if found["text"] is not None:
            parts.append(json.dumps(found["text"]))
        elif found["key"] is not None:
            parts.append(json.dumps(found["key"]) + ":")
        else:
            plain = found["plain"]
            parts.append(json.dumps(CONSTANTS[plain]) if plain in CONSTANTS else plain)
            depth += (plain in "{[") - (plain in "}]")
            if depth == 0:
                break
    value = _object("".join(parts), 0)
    return None if value is None else (value[0], at)


# How a template's form is learned


def syntax_of(
    tokenizer: Any, stops: Collection[str], arguments: Mapping[str, Any] | None = None, *, specials: bool
) -> CallSyntax | None:
    """How the chat template writes calls, as they are read where an answer is decoded with its special tokens, or
    without. `stops` are the texts of the tokens that end an answer. None where no form fits."""
    try:
        with time_limit():
            return _learned(_Shown(tokenizer, stops, arguments, specials=specials))
    except (TunesmithError, TooLong):  # it shows no calls, or never ends
        return None


def _learned(shown: "_Shown") -> CallSyntax | None:
    texts = [shown.text(calls) for calls in PROOF[:-1]]
    with suppress(TunesmithError):  # some show one at a time
        texts.append(shown.text(PROOF[-1]))
    functions = dict.fromkeys(NAMES, TYPES)
    for learn in (_in_object, _before_object, _marked):
        syntax = learn(shown)
        if syntax is None:
            continue
        told = texts[:-1] if syntax.between is None and len(texts) == len(PROOF) else texts
        if all(_same(syntax.split(text, functions), calls) for text, calls in zip(told, PROOF, strict=False)):
            return syntax
    return None


def _same(found: tuple[str, list[Call]], calls: "Calls") -> bool:
    return not found[0].strip() and [(call.name, json.loads(call.arguments)) for call in found[1]] == list(calls)


Calls = Sequence[tuple[str, Mapping[str, Any]]]
TEXTS = dict(zip(KEYS, VALUES, strict=True))
PROOF: Sequence[Calls] = (
    [(NAMES[0], TEXTS)],
    [(NAMES[0], AWKWARD)],
    [(NAMES[0], AWKWARD), (NAMES[1], TEXTS)],
)
"""Calls that a form must give back; the last where a template shows several."""


class _Shown:
    """What a chat template writes where an assistant calls functions, from its header to the end of the turn, as the
    tokenizer gives it back."""

    def __init__(
        self, tokenizer: Any, stops: Collection[str], arguments: Mapping[str, Any] | None, *, specials: bool
    ) -> None:
        self._tokenizer, self._specials = tokenizer, specials
        self._template = ChatTemplate(tokenizer, arguments)
        self._style = self._template.call_style
        self._stop = re.compile("|".join(map(re.escape, sorted(stops, key=len, reverse=True))) or r"(?!)")
        self._plain = self._render([{"role": "assistant", "content": PROBES[1]}])
        self.ids: list[str] = []

    def text(self, calls: Calls) -> str:
        """Raises TunesmithError where the template refuses them."""
        given = [{"type": "function", "function": {"name": name, "arguments": dict(of)}} for name, of in calls]
        shown = self._style.calls(given)
        self.ids = [call["id"] for call in shown if "id" in call]
        asked = {"role": "assistant", "content": self._style.content, "tool_calls": shown}
        try:
            text = self._render([asked])
        except TunesmithError:  # some refuse a call without its result
            told = [
                self._style.result({"role": "tool", "name": name, "content": "?"}, call)
                for (name, _), call in zip(calls, shown, strict=True)
            ]
            text = self._render([asked, *told])
        same = common_length(text, self._plain)
        start = UNFINISHED.search(text, 0, same)
        turn = text[start.start() if start else same :]
        said = turn.find(calls[0][0])
        stop = self._stop.search(turn, max(said, 0))
        turn = turn[: stop.start()] if stop else turn
        ids = self._tokenizer(turn, add_special_tokens=False, verbose=False)["input_ids"]
        skip = not self._specials
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def _render(self, turns: Sequence[Mapping[str, Any]]) -> str:
        messages = [{"role": "user", "content": PROBES[0]}, *turns]
        text = self._template.render([self._template.shaped(message) for message in messages], tools=TOOLS)
        return text.rpartition(PROBES[0])[2]


UNFINISHED = re.compile(r"[<\[][^>\]\s]*\Z")
"""A mark that two renderings begin alike."""


def _pattern(text: str, ids: Sequence[str] = (), *, exact: bool = False) -> str:
    """A pattern of what a template writes: any white space in place of its own, any number in place of one, any id.

    `exact`, beside values: its own white space, or none.
    """
    places = "|".join([*map(re.escape, ids), r"\s+", r"\d+"])
    parts, named = list[str](), False
    for part in re.split(f"({places})", text):
        if part in ids:
            parts.append(rf"[0-9A-Za-z]{{{len(part)}}}" if named else rf"(?P<id>[0-9A-Za-z]{{{len(part)}}})")
            named = True
        elif part.isspace():
            parts.append(f"(?:{re.escape(part)})?" if exact else r"\s*")
        elif part.isdigit():
            parts.append(r"\d+")
        else:
            parts.append(re.escape(part))
    return "".join(parts)


def _syntax(opening: str, between: str | None, closing: str, form: Form, ids: Sequence[str]) -> CallSyntax:
    opening = opening.lstrip()
    known = min((opening.find(one) for one in ids if one in opening), default=len(opening))
    mark = re.match(r"[^\s\d]*", opening[:known])  # a model may write other white space and numbers
    return CallSyntax(
        opening=mark[0] if mark else "",
        begins=re.compile((_pattern(opening, ids) or r"\s*") + (r"\s*" if opening else "")),
        between=None if between is None else re.compile(rf"\s*{_pattern(between, ids)}\s*"),
        closing=re.compile(rf"\s*{_pattern(closing.rstrip(), ids)}\s*"),
        form=form,
    )


def _several(shown: _Shown, first: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    try:
        return shown.text([(NAMES[0], first), (NAMES[1], other)])
    except TunesmithError:
        return None


def _in_object(shown: _Shown) -> CallSyntax | None:
    def place(text: str, name: str) -> tuple[int, int, dict[str, Any]] | None:
        at = text.find(name)
        for brace in re.finditer(r"\{", text[: max(at, 0)]):
            found = _object(text, brace.start())
            if found and name in found[0].values() and TEXTS in found[0].values():
                return brace.start(), found[1], found[0]
        return None

    text = shown.text([(NAMES[0], TEXTS)])
    found = place(text, NAMES[0])
    if found is None:
        return None
    start, stop, value = found
    named, given = (next(key for key, of in value.items() if of == what) for what in (NAMES[0], TEXTS))
    form = InObject(name=named, arguments=given, others=frozenset(value.keys() - {named, given}))
    two = _several(shown, TEXTS, TEXTS)
    other = two and place(two, NAMES[1])
    between = two[stop : other[0]] if two and other else None
    return _syntax(text[:start], between, text[stop:], form, shown.ids)


def _before_object(shown: _Shown) -> CallSyntax | None:
    text = shown.text([(NAMES[0], TEXTS)])
    name, brace = text.find(NAMES[0]), text.find("{", text.find(NAMES[0]) + len(NAMES[0]))
    if name < 0 or brace < 0:
        return None
    quoted = re.compile(rf"\{{\s*{KEYS[0]}\s*:\s*(?P<quote>\S+?){VALUES[0]}").match(text, brace)
    quote = quoted["quote"] if quoted else ""
    read = _bare_object(text, brace, quote) if quote else _object(text, brace)
    if read is None or read[0] != TEXTS:
        return None
    form = BeforeObject(
        behind=re.compile(rf"\s*{_pattern(text[name + len(NAMES[0]) : brace], shown.ids)}\s*"), quote=quote
    )
    two = _several(shown, TEXTS, TEXTS)
    other = two.find(NAMES[1]) if two else -1
    between = two[read[1] : other] if two and other >= 0 else None
    return _syntax(text[:name], between, text[read[1] :], form, shown.ids)


def _marked(shown: _Shown) -> CallSyntax | None:
    def marks(text: str, values: Sequence[Any]) -> list[str] | None:
        """What stands around a name, two keys and two values."""
        around, at = list[str](), 0
        for said in (NAMES[0], KEYS[0], str(values[0]), KEYS[1], str(values[1])):
            found = text.find(said, at)
            if found < 0:
                return None
            around.append(text[at:found])
            at = found + len(said)
        return [*around, text[at:]]

    text = marks(shown.text([(NAMES[0], TEXTS)]), VALUES)
    numbers = marks(shown.text([(NAMES[0], dict(zip(KEYS, NUMBERS, strict=True)))]), NUMBERS)
    if text is None or numbers is None or not all((text[1], text[2], text[3], text[5])):
        return None
    opening, first, is_text, following, _, rest = text
    try:
        alone = shown.text([(NAMES[0], {})]).partition(NAMES[0])[2]
    except TunesmithError:
        alone = ""
    size = common_length(rest[::-1], alone[::-1])
    closing, end, bare = rest[len(rest) - size :], rest[: len(rest) - size], alone[: len(alone) - size]
    two = _several(shown, TEXTS, TEXTS)
    other = two.find(NAMES[1]) if two else -1
    between = two[two.find(VALUES[1]) + len(VALUES[1]) + len(end) : other] if two and other >= 0 else None
    after = "|".join([_pattern(part) for part in (between, closing) if part and part.strip()] or [r"\Z"])
    form = Marked(
        opens=re.compile(_pattern(first)),
        next=re.compile(_pattern(following, exact=True)),
        text=re.compile(_pattern(is_text, exact=True)),
        json=re.compile(_pattern(numbers[2], exact=True)),
        ends=re.compile(rf"{_pattern(end, exact=True)}(?=\s*(?:{after}))"),
        bare=re.compile(_pattern(bare)) if alone else None,
    )
    return _syntax(opening, between, closing, form, shown.ids)
