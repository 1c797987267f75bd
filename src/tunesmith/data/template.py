"""A tokenizer's chat template: the program, what it takes of a message, and which of its arguments switch the thinking.

Nobody writes down what a template takes. It is found out by rendering probes: whether a content may be a string,
whether the arguments of a tool call are an object or JSON text, which arguments change how a generation prompt ends,
and how the template writes reasoning before an answer.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from jinja2 import nodes
from jinja2.runtime import new_context

from tunesmith.data.formats import template_arguments
from tunesmith.data.sandbox import TooLong, compiled, refuse_long
from tunesmith.data.skipped import NotTheRow
from tunesmith.errors import TunesmithError

Fields: TypeAlias = Mapping[str, Any]
Marks: TypeAlias = list[tuple[int, int]]

PROBES = ("Xprobe answerX", "Yprobe answerY")
"""Two contents whose first and last characters differ: what two renderings share ends exactly at the content."""
REASON = "Zprobe reasonZ"
NO_ARGUMENTS: Fields = MappingProxyType({})
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SWITCH = re.compile("think|reason", re.IGNORECASE)
"""What the argument is called that switches the thinking."""
TAG = r"(?:[<\[◁][^<>\[\]\s◁▷]*(?:think|thought|reason)[^<>\[\]\s◁▷]*[>\]▷]|<\|channel>thought|<channel\|>)"
REASONING_TAG = re.compile(TAG, re.IGNORECASE)
REASONING_END = re.compile(rf"(?:{TAG}\s*)+\Z", re.IGNORECASE)
"""How a generation prompt ends that opens the reasoning, or closes it at once."""
EMPTY_BLOCK = re.compile(rf"({TAG})(\s*)({TAG})(\s*)", re.IGNORECASE)
LINES = re.compile(rf"({TAG}|(?<=\n))", re.IGNORECASE)
TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "probe"}}},
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reasoning:
    """How a template writes the reasoning of an answer: what stands between the generation prompt and it (nothing where
    the prompt opens it), and what between it and the answer."""

    opening: str
    closing: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What a generation prompt ends with behind the assistant's header: nothing, an open or a closed reasoning block.

    `closing` is what has to be generated to close an open one.
    """

    text: str = ""
    kind: Literal["", "open", "closed"] = ""
    closing: str = ""


class ChatTemplate:
    """A tokenizer's chat template with the arguments of the run.

    The time that a template sees is that of this object's making, so that all renderings have the same date. `special`
    matches special tokens, `ends` are those that can end a turn. Raises TunesmithError when there is no template.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        if tokenizer.chat_template is None:
            raise NotTheRow(
                "the rows are conversations, but the tokenizer has no chat template; name one in `chat_template_path`"
            )
        now = {"strftime_now": datetime.now().strftime}
        self.arguments = template_arguments(kwargs or {})
        self._variables = {"documents": None, **tokenizer.special_tokens_map, **now, **self.arguments}
        self._tokenizer = tokenizer
        self._programs: dict[bool, _Program] = {}
        self._blocks: dict[str, Block] = {}
        self._trailers: dict[str, str] = {}
        self.eos: str = tokenizer.eos_token
        tokens = tokenizer.added_tokens_decoder
        self.ends = tuple(tokens[i].content for i in end_ids(tokenizer) if i in tokens)
        self.special = special_pattern(tokenizer)

    def program(self, tools: list[Any] | None) -> "_Program":
        """The template in the sandbox of `transformers`. A tokenizer may have another one for rows with tools."""
        if (key := tools is None) not in self._programs:
            try:
                source = self._tokenizer.get_chat_template(tools=tools)
                self._programs[key] = _Program(source=source, program=compiled(source))
            except Exception as error:
                raise NotTheRow(f"the chat template can't be read: {error}") from error
        return self._programs[key]

    def render(
        self,
        messages: Sequence[Fields],
        *,
        tools: list[Any] | None = None,
        arguments: Fields = NO_ARGUMENTS,
        ask: bool = False,
        marks: Marks | None = None,
    ) -> str:
        """`messages` as text, with the generation prompt when asked; `{% generation %}` blocks are added to `marks`.

        A template that writes the generation prompt always is taken to do so when asked only. As `Template.render`,
        less the copying of variables that it does for each call. Raises TunesmithError with what the template says when
        it refuses.
        """
        text = self._rendered(messages, tools, arguments, ask, marks)
        return text if ask else text.removesuffix(self._unasked(arguments))

    def _rendered(
        self, messages: Sequence[Fields], tools: list[Any] | None, arguments: Fields, ask: bool, marks: Marks | None
    ) -> str:
        program = self.program(tools).program
        own = {"messages": messages, "tools": tools, "add_generation_prompt": ask}
        variables = {**program.globals, **self._variables, **arguments, **own}
        context = new_context(program.environment, None, program.blocks, variables, shared=True)
        try:
            if marks is None:
                return "".join(refuse_long(program.root_render_func(context)))
            with program.environment.activate_tracker(blocks := list[str](), marks):
                for block in refuse_long(program.root_render_func(context)):
                    blocks.append(block)  # one by one: the tracker counts their characters meanwhile
            return "".join(blocks)
        except TooLong:
            raise
        except Exception as error:  # a template is a program: whatever it raises, it refuses
            roles = [str(message.get("role")) for message in messages]
            refused = f"the chat template refuses the conversation ({' '.join(roles)}): {error}"
            raise TunesmithError("\n".join((refused, *_ways_on(roles, str(error), tools)))) from error

    def pieces(self, text: str) -> list[str]:
        """`text` cut before and behind each special token."""
        cuts = [0, *(cut for match in self.special.finditer(text) for cut in match.span()), len(text)]
        return [text[start:stop] for start, stop in pairwise(cuts) if start < stop]

    def _try(self, messages: Sequence[Fields], **how: Any) -> str:
        """The rendering, or nothing where the template refuses."""
        try:
            return self.render(messages, **how)
        except TunesmithError:
            return ""

    def _unasked(self, arguments: Fields) -> str:
        """The generation prompt that the template writes though nobody asked; nothing for most."""
        if (key := repr(arguments)) not in self._trailers:
            self._trailers[key] = ""  # until it is known
            question = self.shaped(_user(PROBES[0]))
            asked, plain = (self._try([question], ask=ask, arguments=arguments) for ask in (True, False))
            answer = self.shaped({"role": "assistant", "content": PROBES[1]})
            answered = self._try([question, answer], arguments=arguments)
            if asked == plain and PROBES[0] in answered[: answered.find(PROBES[1])]:
                same = common_length(plain[::-1], answered[::-1])
                pieces = self.cuts(plain[len(plain) - same :])
                starts = [i for i, piece in enumerate(pieces) if piece in self.headers]
                self._trailers[key] = "".join(pieces[starts[0] :]) if starts else ""
        return self._trailers[key]

    # What it takes of a message

    @cached_property
    def wants_parts(self) -> bool:
        """Whether it shows the content of a message only as a list of parts, as those of Idefics and LLaVA do."""
        if PROBES[0] in self._try([_user(PROBES[0])]):
            return False
        return PROBES[0] in self._try([_user([{"type": "text", "text": PROBES[0]}])])

    @cached_property
    def call_style(self) -> "CallStyle":
        """How it takes the calls of a message.

        Raises TunesmithError when it shows them in no way.
        """
        forms = [(text, ids) for text in (False, True) for ids in (False, True)]
        refused: TunesmithError | None = None
        for answered in (True, False):  # some refuse a call without its result, and some any result
            for text, ids in forms:
                shown = list[tuple[int, CallStyle]]()
                for content in ("", None):
                    style = CallStyle(text=text, ids=ids, content=content)
                    try:
                        call = self._shown_call(style, answered=answered)
                    except TunesmithError as error:
                        refused = refused or error
                        continue
                    if call:
                        shown.append((len(call), style))
                if shown:  # where a template takes both contents, it may show one of them as an answer of its own
                    return min(shown, key=lambda found: found[0])[1]
        raise TunesmithError(
            "the chat template does not show tool calls; set `chat_template_path` to one that does"
            + ("" if refused is None or "tool_calls" not in self.program([TOOL]).source else f"\nIt says: {refused}")
        )

    def _shown_call(self, style: "CallStyle", *, answered: bool) -> str:
        """A conversation with a call in this style as text; nothing where its arguments are not shown as JSON is."""
        call = {"type": "function", "function": {"name": "probe", "arguments": {"key": PROBES[0]}}}
        calls = style.calls([call])
        message = {"role": "assistant", "content": style.content, "tool_calls": calls}
        answer = style.result({"role": "tool", "name": "probe", "content": "probe"}, calls[0])
        talk = [self.shaped(turn) for turn in (_user("probe"), message, *([answer] if answered else []))]
        text = self.render(talk, tools=[TOOL])
        before, found, _ = text.partition(PROBES[0])
        return text if found and not before.endswith(("{'key': '", '\\"key\\": \\"')) else ""

    # How it switches the thinking

    @cached_property
    def switches(self) -> tuple[Fields, ...]:
        """Arguments that change the text before an answer, each with another value of a name that speaks of thinking.

        The values are those that the template compares with, true and false. Names that the run sets are left alone.
        """
        program = self.program(None)
        names = sorted(name for name in program.names if SWITCH.search(name) and name not in self.arguments)
        candidates = [{name: value} for name in names for value in (False, True, *program.compared(name))]
        messages = [self.shaped(_user(PROBES[0]))]
        plain, found = self._try(messages, ask=True), dict[str, Fields]()
        for arguments in candidates:
            text = self._try(messages, ask=True, arguments=arguments)
            if text and text != plain:
                found.setdefault(text, arguments)
        return tuple(found.values())

    @cached_property
    def reasoning(self) -> Reasoning | None:
        """How it writes the reasoning of a last answer; None where it has no form for any."""
        question = self.shaped({"role": "user", "content": PROBES[0]})
        spoken = self.shaped({"role": "assistant", "content": PROBES[1], **reasoning_fields(REASON)})
        answers = [thinking_parts(spoken) if self.thinks_in_parts else spoken]
        with suppress(TunesmithError):
            if "tool_calls" in self.program(None).source:
                call = {"type": "function", "function": {"name": PROBES[1], "arguments": {"key": "probe"}}}
                style = self.call_style
                answers.append({**spoken, "content": style.content, "tool_calls": style.calls([call])})
        for answer in answers:
            for arguments in (NO_ARGUMENTS, *self.switches):
                text = self._try([question, answer], arguments=arguments).partition(PROBES[0])[2]
                before, shown, rest = text.partition(REASON)
                between, spoke, _ = rest.partition(PROBES[1])
                if shown and spoke and between.strip():
                    asked = (self._try([question], ask=True, arguments=way) for way in (NO_ARGUMENTS, *self.switches))
                    tails = (text.partition(PROBES[0])[2] for text in asked)
                    opening = next((before[len(tail) :] for tail in tails if tail and before.startswith(tail)), "")
                    if answer is not answers[0]:  # of what follows, only the block's end
                        pieces = self.cuts(between)
                        stop = next(i for i, piece in enumerate(pieces) if piece.strip()) + 1
                        between = "".join(pieces[:stop])
                    return Reasoning(opening=opening, closing=between)
        return self._empty_reasoning()

    def _empty_reasoning(self) -> Reasoning | None:
        """The form of a block without reasoning that stands in a prompt or before an answer."""
        talk = [self.shaped(_user(PROBES[0])), self.shaped({"role": "assistant", "content": PROBES[1]})]
        texts = [self._try(talk[:1], ask=True, arguments=way) for way in (NO_ARGUMENTS, *self.switches)]
        for text in (*texts, self._try(talk).partition(PROBES[1])[0]):
            for opening, inside, closing, behind in EMPTY_BLOCK.findall(text.rpartition(PROBES[0])[2]):
                if closing_tag(opening) == closing:
                    before, after = (inside[:1], inside[1:]) if inside.strip(" ") else ("", "")
                    opened = any(prompt.endswith(opening + before) for prompt in texts)
                    return Reasoning(opening="" if opened else opening + before, closing=after + closing + behind)
        return None

    @cached_property
    def thinks_in_parts(self) -> bool:
        """Whether it shows reasoning only as a part of the content, as those of Mistral's reasoning models do."""
        if "thinking" not in self.program(None).source:
            return False
        question = self.shaped(_user(PROBES[0]))
        answer = {"role": "assistant", "content": PROBES[1], **reasoning_fields(REASON)}
        ways = (NO_ARGUMENTS, *self.switches)
        if any(REASON in self._try([question, self.shaped(answer)], arguments=way) for way in ways):
            return False
        text = self._try([question, thinking_parts(answer)]).partition(PROBES[0])[2]
        before, shown, _ = text.partition(PROBES[1])
        return bool(shown) and REASON in before and "type" not in before

    @cached_property
    def _closers(self) -> tuple[str, ...]:
        """What closes reasoning, as far as the template says: the tags in it, and what it cuts a content behind."""
        source = self.program(None).source
        tags = [tag for tag in REASONING_TAG.findall(source) if not closing_tag(tag)]
        shown = [self.reasoning.closing.strip()] if self.reasoning is not None else []
        cuts = [cut for cut in self.program(None).cut_behind if not (REASONING_TAG.fullmatch(cut) and closing_tag(cut))]
        return tuple(dict.fromkeys([*shown, *tags, *cuts]))

    def block(self, tail: str, rest: str) -> tuple[str, Block] | None:
        """What follows the assistant's header in `rest`, and the block that `tail` ends with.

        `tail` follows a message in the prompt of inference, `rest` where the answer is rendered. Both begin with the
        header. None where they have none in common.
        """
        pieces = self.cuts(tail)
        header = common_pieces(pieces, rest)
        if not header.strip():  # what stands before the header may differ
            for first in range(1, len(pieces)):
                header = "".join(pieces[first:])
                if header.strip() and header in rest:
                    return rest.partition(header)[2], Block()
            header = common_pieces(pieces, rest)
        own, more = tail[len(header) :], rest[len(header) :]
        if own and more.startswith(own.rstrip()):  # they differ in white space
            own, more = "", more[len(own.rstrip()) :].lstrip()
        if not own.strip():
            closer = next((closer for closer in self._closers if more.lstrip().startswith(closer)), "")
            text = next((piece for piece in reversed(pieces) if piece.strip()), "").strip()
            if REASONING_TAG.fullmatch(text):  # it is opened in the prompt, and where the answer is rendered, too
                closer = closer or closing_tag(text)
            if closer and text:
                return more, Block(text=text, kind="open", closing=self._closing(closer, tail))
            return more, Block(kind="closed" if tail.rstrip().endswith(self._closers) else "")
        if any(closer in own for closer in self._closers):
            return more, Block(text=own, kind="closed")
        if closer := self._closer_of(own, certain=not header.strip()):
            return more, Block(text=own.strip(), kind="open", closing=self._closing(closer, own))
        for first in range(len(pieces)):  # what stands before the header may differ
            header = "".join(pieces[first:])
            if header.strip() and header in rest:
                return rest.partition(header)[2], Block()
        return None if self.special.sub("", own).strip() else (more, Block())

    def _closer_of(self, opened: str, *, certain: bool) -> str:
        """What closes the reasoning that `opened` opens; nothing where that can't be told. With `certain`, it is not
        enough that the template has one way to close any."""
        tags = REASONING_TAG.findall(opened)
        if tags and (closing := closing_tag(tags[-1])) and closing in self.program(None).source:
            return closing
        if self.reasoning is not None and self.reasoning.opening.strip() in ("", opened.strip()):
            return self.reasoning.closing.strip()
        return self._closers[0] if len(self._closers) == 1 and not certain else ""

    def _closing(self, closer: str, opened: str) -> str:
        """`closer` with the white space that the template writes around it: as that behind what opens the block."""
        if self.reasoning is not None and closer in self.reasoning.closing:
            return self.reasoning.closing
        return f"\n{closer}\n\n" if opened.endswith("\n") else closer

    def block_of(self, arguments: Fields) -> Block:
        """The block that a plain generation prompt ends with."""
        if (key := repr(arguments)) not in self._blocks:
            question = self.shaped({"role": "user", "content": PROBES[0]})
            answer = self.shaped({"role": "assistant", "content": PROBES[1]})
            tail = self._try([question], ask=True, arguments=arguments).partition(PROBES[0])[2]
            rest = self._try([question, answer], arguments=arguments).partition(PROBES[0])[2]
            found = self.block(tail, rest)
            self._blocks[key] = Block() if found is None else found[1]
        return self._blocks[key]

    def cuts(self, text: str) -> list[str]:
        """`text` in pieces: special tokens, tags of reasoning, and lines with their ends."""
        return [part for piece in self.pieces(text) for part in LINES.split(piece) if part]

    def shaped(self, message: Fields) -> Fields:
        """A message whose content is a string, as the template takes it."""
        return _parts(message) if self.wants_parts else message

    @cached_property
    def headers(self) -> frozenset[str]:
        """The special tokens that a user's turn begins with: none of them ends an answer."""
        text = self._try([self.shaped(_user(PROBES[0]))])
        return frozenset(self.special.findall(text.partition(PROBES[0])[0].rpartition(self.eos)[2]))


@dataclass(frozen=True, kw_only=True)
class _Program:
    """A compiled template."""

    source: str
    program: Any

    @cached_property
    def marked(self) -> bool:
        """Whether it marks what is generated."""
        return bool(GENERATION.search(self.source))

    @cached_property
    def _tree(self) -> nodes.Template:
        tree: nodes.Template = self.program.environment.parse(self.source)
        return tree

    @property
    def names(self) -> set[str]:
        """The arguments that it may ask for: all names that it reads, those among them that it sets itself too."""
        return {node.name for node in self._tree.find_all(nodes.Name) if node.ctx == "load"}

    @property
    def cut_behind(self) -> list[str]:
        """The constants behind whose last occurrence it cuts a text: `split(constant)[-1]`, or `| last`."""
        cuts = []
        for node in self._tree.find_all((nodes.Getitem, nodes.Filter)):
            if isinstance(node, nodes.Filter):
                last = node.name == "last"
            else:
                last = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Neg)
            call = getattr(node, "node", None) if last else None
            if isinstance(call, nodes.Call) and isinstance(call.node, nodes.Getattr) and call.node.attr == "split":
                cuts += [arg.value for arg in call.args if isinstance(arg, nodes.Const)]
        return [cut for cut in cuts if isinstance(cut, str) and cut.strip()]

    def compared(self, name: str) -> Iterator[Any]:
        """The constants that it compares `name` with, or looks for it among."""
        for node in self._tree.find_all(nodes.Compare):
            sides = [node.expr, *(operand.expr for operand in node.ops)]
            if any(isinstance(side, nodes.Name) and side.name == name for side in sides):
                for side in sides:
                    yield from (constant.value for constant in _constants(side) if isinstance(constant.value, str))


def common_length(first: str, second: str) -> int:
    """How many characters two texts begin with alike; by halves, as whole pieces compare fast."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def common_pieces(pieces: Sequence[str], text: str) -> str:
    """The longest run of the first `pieces` that `text` begins with."""
    same = ""
    while len(pieces) and text.startswith(same + pieces[0]):
        same, pieces = same + pieces[0], pieces[1:]
    return same


def _ways_on(roles: Sequence[str], rule: str, tools: list[Any] | None) -> Iterator[str]:
    """What can be done about a conversation that a template refuses by a rule about roles, or for want of tools."""
    if tools is None and "NoneType" in rule:
        yield "If it is a template for rows with tools, this row has none: set `chat_template_path` to another one"
    turns = [role for role in roles if role not in ("system", "developer")]
    if any(first == second != "tool" for first, second in pairwise(turns)):
        yield "Neighbours of one role can be joined to one message: `merge_turns: true`"
    if turns[:1] == ["assistant"] and len(turns) > 1:
        yield "It begins with the assistant: put a message of the user before it, or leave that message out"
    if len(turns) < len(roles) and "system" in rule.lower():
        yield "Put what the system says at the beginning of the user's first message"


def _constants(node: nodes.Node) -> list[nodes.Const]:
    return [node] if isinstance(node, nodes.Const) else list(node.find_all(nodes.Const))


@dataclass(frozen=True, kw_only=True, slots=True)
class CallStyle:
    """How a template takes tool calls: their arguments as an object or as JSON `text`, with `ids` or without, and which
    `content` a message has that says nothing beside them."""

    text: bool = False
    ids: bool = False
    content: str | None = ""

    def calls(self, calls: Sequence[Fields]) -> list[dict[str, Any]]:
        """The calls of a message, in OpenAI's form with arguments as objects, as the template takes them."""
        return [self._call(call, i) for i, call in enumerate(calls)]

    def _call(self, call: Fields, index: int) -> dict[str, Any]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if self.text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        named = {**call, "function": {**function, "arguments": arguments}} if "function" in call else {**call}
        if self.ids and "id" not in call:
            named["id"] = call_id(function, index)
        return named

    def result(self, message: Fields, call: Fields | None) -> dict[str, Any]:
        """The result of a call, with the call's id where the template asks for one."""
        if not self.ids or call is None or "tool_call_id" in message or "id" not in call:
            return {**message}
        return {**message, "tool_call_id": call["id"]}


def call_id(function: Fields, index: int) -> str:
    """Nine letters and digits, as Mistral's templates ask for: of the same call always the same."""
    from hashlib import blake2b

    digest = blake2b(repr((index, function)).encode("utf-8", "surrogatepass")).digest()
    signs = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return "".join(signs[byte % len(signs)] for byte in digest[:9])


def closing_tag(tag: str) -> str:
    """The tag that closes what `tag` opens; nothing where `tag` closes something itself."""
    inner, name = tag[:1], tag[1:]
    if "channel" in tag:
        return "<channel|>" if tag.startswith("<|") else ""
    for begin, end in (("START", "END"), ("start", "end"), ("begin", "end"), ("BEGIN", "END")):
        if begin in tag:
            return tag.replace(begin, end)
    if not tag or name.startswith("/") or re.search("end|/", tag, re.IGNORECASE):
        return ""
    return f"{inner}/{name}"


def thinking_parts(message: Fields) -> dict[str, Any]:
    """An answer whose reasoning is a part of its content."""
    content, reasoning = message["content"], message["reasoning_content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    parts = [{"type": "thinking", "thinking": reasoning}, *([{"type": "text", "text": text}] if text else [])]
    return {**message, "content": parts}


def reasoning_fields(text: str) -> dict[str, str]:
    """A message's reasoning under all of the names that templates ask for."""
    return {"reasoning_content": text, "reasoning": text, "thinking": text}


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _parts(message: Fields) -> dict[str, Any]:
    """A message whose content is a list of parts."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches the special tokens of a tokenizer, and those that can end a text."""
    tokens = tokenizer.added_tokens_decoder
    special = {token.content for token in tokens.values() if token.special}
    special |= {tokens[i].content for i in end_ids(tokenizer) if i in tokens}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")


def end_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that can end a text: the end-of-sequence token, and special tokens that have no other role."""
    roles = ("bos_token_id", "unk_token_id", "pad_token_id", "mask_token_id", "cls_token_id")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {getattr(tokenizer, role, None) for role in roles}
    return frozenset(special | {tokenizer.eos_token_id} - {None})
