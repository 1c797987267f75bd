"""Chat templates: a conversation to the text a model sees, and the spans of it that are supervised.

A template is a program; what it does with a message can depend on all others (Qwen 3 drops earlier reasoning). So
nothing is assembled from pieces: a conversation is rendered once, in full, and the spans are found *in that text*.

What is supervised of an assistant turn is what the model would have to generate: from the end of the generation prompt
through what ends the turn. White space that the template puts behind an end token is not.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
                                                           ~~~~~~~~~~~~~~~~

The messages before a turn, rendered with the generation prompt, end where the turn starts, and the messages through it
end where it ends, if both are beginnings of the full text. If not, because the template renders history otherwise than
the present, a message is found from what *follows* it: that is what two renderings with other contents both end with.
A turn that can't be found so, or whose text is not what the message says, is refused with the reason.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import dropwhile, pairwise, takewhile
from typing import Any, TypeAlias

from jinja2.runtime import new_context

from tunesmith.data.formats import template_arguments
from tunesmith.data.sandbox import compiled, refuse_long
from tunesmith.data.skipped import NotTheRow
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation, TrainOn

Fields: TypeAlias = Mapping[str, Any]
Marks: TypeAlias = list[tuple[int, int]]

PROBES = ("Xprobe answerX", "Yprobe answerY")
"""Two contents whose first and last characters differ: what two renderings share ends exactly at the content."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TAG = r"[<\[][^<>\[\]\s]*(?:think|thought|reason)[^<>\[\]\s]*[>\]]"
REASONING_TAG = re.compile(TAG, re.IGNORECASE)
REASONING_END = re.compile(rf"(?:{TAG}\s*)+\Z", re.IGNORECASE)
"""How a generation prompt ends that opens the reasoning, or closes it at once. History may lack this part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Characters [start, stop) of a rendered text, supervised with `weight`."""

    start: int
    stop: int
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A text and what is supervised of it.

    `prompt` is the number of characters before the completion of a prompt-completion row, else None.
    `special_tokens`: the tokenizer is to add its own, as it does to plain text. `closed`: the text ends with what is
    supervised, so that an end token belongs there.
    """

    text: str
    spans: tuple[Span, ...]
    prompt: int | None = None
    special_tokens: bool = False
    closed: bool = True

    @property
    def whole(self) -> bool:
        """Whether all tokens are treated alike: then nobody asks where a token's characters are."""
        return not self.prompt and all(span.start == 0 and span.stop == len(self.text) for span in self.spans)


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
        self._variables = {"documents": None, **tokenizer.special_tokens_map, **now, **template_arguments(kwargs or {})}
        self._tokenizer = tokenizer
        self.shows_calls = False  # not known yet
        self._programs: dict[bool, tuple[Any, bool, dict[str, Any]]] = {}
        tokens = tokenizer.added_tokens_decoder
        self.ends = tuple(tokens[i].content for i in end_ids(tokenizer) if i in tokens)
        special = {token.content for token in tokens.values() if token.special} | {*self.ends}
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def program(self, tools: list[Any] | None) -> tuple[Any, bool, dict[str, Any]]:
        """The template in the sandbox of `transformers`, whether it marks what is generated, and what it sees always.

        A tokenizer may have another template for conversations with tools.
        """
        if (key := tools is None) not in self._programs:
            try:
                source = self._tokenizer.get_chat_template(tools=tools)
                program = compiled(source)
            except Exception as error:
                raise NotTheRow(f"the chat template can't be read: {error}") from error
            self._programs[key] = program, bool(GENERATION.search(source)), {**program.globals, **self._variables}
        return self._programs[key]

    def pieces(self, text: str) -> list[str]:
        """`text` cut before and behind each special token."""
        cuts = [0, *(cut for match in self.special.finditer(text) for cut in match.span()), len(text)]
        return [text[start:stop] for start, stop in pairwise(cuts) if start < stop]


def end_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that can end a text: the end-of-sequence token, and special tokens that have no other role."""
    roles = ("bos_token_id", "unk_token_id", "pad_token_id", "mask_token_id", "cls_token_id")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {getattr(tokenizer, role, None) for role in roles}
    return frozenset(special | {tokenizer.eos_token_id} - {None})


class Chat:
    """A conversation bound to its template. `text` is the full rendering, `marks` its `{% generation %}` blocks."""

    def __init__(self, conversation: Conversation, template: ChatTemplate) -> None:
        from transformers.utils import chat_template_utils as hf

        self.conversation, self.template = conversation, template
        self._program, marked, variables = template.program(conversation.tools)
        self._variables = variables | conversation.template_kwargs | {"tools": conversation.tools}
        # Newer transformers show a message's reasoning to the template under all of its usual names.
        aliased = getattr(hf, "_alias_reasoning_fields", list)
        self.messages: list[Fields] = aliased([message.fields for message in conversation.messages])
        self.marks: Marks | None = [] if marked else None
        self.text = self.render(self.messages, marks=self.marks)

    def render(self, messages: Sequence[Fields], *, ask: bool = False, marks: Marks | None = None) -> str:
        """`messages` as text, with the generation prompt when asked; `{% generation %}` blocks are added to `marks`.

        As `Template.render`, less the copying of variables that it does for each call.
        """
        variables = {**self._variables, "messages": messages, "add_generation_prompt": ask}
        context = new_context(self._program.environment, None, self._program.blocks, variables, shared=True)
        try:
            if marks is None:
                return "".join(refuse_long(self._program.root_render_func(context)))
            with self._program.environment.activate_tracker(blocks := list[str](), marks):
                for block in refuse_long(self._program.root_render_func(context)):
                    blocks.append(block)  # one by one: the tracker counts their characters meanwhile
            return "".join(blocks)
        except Exception as error:  # a template is a program: whatever it raises, it refuses
            roles = " ".join(str(message.get("role")) for message in messages)
            raise TunesmithError(f"the chat template refuses the conversation ({roles}): {error}") from error

    def with_probes(self, index: int, stop: int | None, *, ask: bool = False) -> list[str]:
        """The messages before `stop` as text, with either probe as the content of message `index`."""
        before, message, after = self.messages[:index], self.messages[index], self.messages[index + 1 : stop]
        parts = isinstance(message.get("content"), list)
        probes = [{"content": [{"type": "text", "text": probe}] if parts else probe} for probe in PROBES]
        return [self.render([*before, {**message, **probe}, *after], ask=ask) for probe in probes]

    def after_content(self, index: int, stop: int | None = None, *, ask: bool = False) -> str:
        """All that follows the content of message `index` when the messages before `stop` are rendered."""
        first, second = self.with_probes(index, stop, ask=ask)
        tail = first[len(first) - _common_length(first[::-1], second[::-1]) :]
        if not first.removesuffix(tail).endswith(PROBES[0]):
            raise TunesmithError(f"the template does not show the content of message {index + 1} as it is")
        return tail


def render(conversation: Conversation, template: ChatTemplate, train_on: TrainOn) -> Rendered:
    """`conversation` as text with its supervised spans; no spans when nothing of it is to be trained on.

    Raises TunesmithError when a span can't be determined with certainty, and when the prompt that inference would
    render is not the beginning of the text that would be trained on.
    """
    chat, prompt = Chat(conversation, template), conversation.prompt_length
    _check_calls(chat)
    if train_on == "all":
        return Rendered(text=chat.text, spans=_everything(chat), closed=conversation.messages[-1].weight > 0)
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant" and i >= (prompt or 0)]
    if train_on == "completion" and prompt is None:
        raise NotTheRow("train_on: completion needs 'prompt' and 'completion'; for conversations use assistant")
    if train_on == "completion" and turns[:1] != [prompt]:
        raise TunesmithError("'completion' must begin with a message of the assistant")
    turns = turns[-1:] if train_on == "last_assistant" else turns
    weights = {i: conversation.messages[i].weight * conversation.weight for i in turns}
    exact = prompt if train_on == "completion" else None
    ranges = {i: _turn(chat, i, exact=i == exact) for i in turns if weights[i] > 0}
    if any(before[1] > after[0] for before, after in pairwise(ranges.values())):
        raise TunesmithError("two turns overlap in the rendered text: the template changes the order of messages")
    spans = tuple(Span(start=start, stop=stop, weight=weights[i]) for i, (start, stop) in ranges.items())
    begin, closed = ranges[prompt][0] if prompt in ranges else None, len(chat.messages) - 1 in ranges
    return Rendered(text=chat.text, spans=spans, prompt=begin, closed=closed)


def _everything(chat: Chat) -> tuple[Span, ...]:
    """Spans that cover the whole text; assistant turns with a weight of their own have it."""
    whole, spans, position = chat.conversation.weight, list[Span](), 0
    for i, message in enumerate(chat.conversation.messages):
        if message.weight == 1.0:
            continue
        if message.role != "assistant":
            raise TunesmithError(f"message {i + 1} has weight {message.weight}; only assistant turns can have one")
        start, stop = _turn(chat, i)
        spans += Span(start=position, stop=start), Span(start=start, stop=stop, weight=message.weight)
        position = stop
    spans.append(Span(start=position, stop=len(chat.text)))
    weighted = (Span(start=span.start, stop=span.stop, weight=span.weight * whole) for span in spans)
    return tuple(span for span in weighted if span.weight > 0 and span.start < span.stop)


def _turn(chat: Chat, index: int, *, exact: bool = False) -> tuple[int, int]:
    """Start and stop in the full text of what the model generates as message `index`.

    With `exact`, and in the last message, only the prompt that inference would render may stand before it.
    """
    text, template, last = chat.text, chat.template, index == len(chat.messages) - 1
    try:
        start = _start(chat, index, exact=exact or last)
        stop, cut = _stop(chat, index, start)
        _check_answer(chat, index, start, stop)
        bare = start + len(text[start:stop].rstrip())
        if not cut and text.endswith(template.ends, start, bare):
            stop = _without_closing(chat, start, bare) if last and chat.marks is None else bare
        elif not cut and chat.marks is None:  # as in GLM, where the header of the next message is what ends this one
            header = template.special.match(text, stop)
            stop = header.end() if header and header[0] in template.ends else stop
        _check_marked(chat, start, stop)
    except TunesmithError as error:
        hint = "" if last else "\nTo leave this turn out, give the message `weight: 0`"
        raise TunesmithError(f"message {index + 1} (assistant): {error}{hint}") from error
    return start, stop


def _start(chat: Chat, index: int, *, exact: bool) -> int:
    """Where the generation prompt of message `index` ends in the full text."""
    if not index:
        return _first_start(chat, exact=exact)
    text, prompt = chat.text, chat.render(chat.messages[:index], ask=True)
    if text.startswith(prompt):
        return len(prompt)
    if exact:
        raise TunesmithError(_not_a_prefix(prompt, text))
    # What follows the message before, up to the generation prompt's end, follows it in the full text as well.
    tail, rest = chat.after_content(index - 1, index, ask=True), chat.after_content(index - 1)
    for header in (tail, REASONING_END.sub("", tail)):
        if text.endswith(rest) and rest.startswith(header) and header.strip():
            return len(text) - len(rest) + len(header)
    raise TunesmithError(_not_a_prefix(prompt, text))


def _first_start(chat: Chat, *, exact: bool) -> int:
    """Where the generation prompt ends of a conversation that begins with the assistant.

    Nothing can be rendered before such a turn, so the header is looked for in front of its content.
    """
    user = [{"role": "user", "content": PROBES[0]}]
    prompt, (first, second) = chat.render(user, ask=True), chat.with_probes(0, None)
    header, before = prompt[_common_length(prompt, chat.render(user)) :], first[: _common_length(first, second)]
    for candidate in (header,) if exact else (header, REASONING_END.sub("", header)):
        start = before.rfind(candidate) + len(candidate)
        if candidate.strip() and candidate in before and chat.text.startswith(before[:start]):
            return start
    raise TunesmithError("the conversation begins with it, and the template does not show where its text starts")


def _not_a_prefix(prompt: str, text: str) -> str:
    same = _common_length(prompt, text)
    part = slice(max(0, same - 40), same + 40)
    return (
        "the prompt that inference would render is not the beginning of the text to train on. They part at character "
        f"{same}:\n  inference: ...{prompt[part]!r}\n  training:  ...{text[part]!r}\n"
        "Use a template that renders both alike, or set its arguments (chat_template_kwargs) so that it does"
    )


def _stop(chat: Chat, index: int, start: int) -> tuple[int, bool]:
    """Where message `index` ends in the full text, with what white space follows it, and whether its end is cut off.

    An end that the template writes in its place once the conversation goes on is not what the model generates.
    """
    text, template = chat.text, chat.template
    through = text if index == len(chat.messages) - 1 else chat.render(chat.messages[: index + 1])
    if text.startswith(through) and start <= len(through):
        return len(through), False
    # Either the text before this turn changed, or this turn: is what was generated still here?
    prompt = chat.render(chat.messages[:index], ask=True) if index else ""
    for before in (prompt, REASONING_END.sub("", prompt)):
        turn = through.removeprefix(before).rstrip() if before and through.startswith(before) else ""
        if turn.endswith(template.ends) and text.startswith(turn, start):
            return start + len(turn), False
    # This turn did. Its end is what follows its content now as it followed it then.
    then, rest = chat.after_content(index, index + 1), chat.after_content(index)
    end = _common_pieces(template.pieces(then), rest)
    stop = len(text) - len(rest) + len(end)
    if not text.endswith(rest[len(end) :]) or stop < start or not text[start:stop].endswith(end.lstrip()):
        raise TunesmithError("its end can't be found in the rendered text: its content changes what comes after it")
    return stop, bool(then[len(end) :].strip()) and not end.rstrip().endswith(template.ends)


def _common_pieces(pieces: Sequence[str], text: str) -> str:
    """The longest run of the first `pieces` that `text` begins with."""
    same = ""
    while len(pieces) and text.startswith(same + pieces[0]):
        same, pieces = same + pieces[0], pieces[1:]
    return same


def _common_length(first: str, second: str) -> int:
    """How many characters two texts begin with alike; by halves, as whole pieces compare fast."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def _answer_texts(content: Any) -> list[str]:
    """What an assistant says to the user: each text without the reasoning before it."""
    texts = [content or ""] if not isinstance(content, list) else [part["text"] for part in content]
    return [answer for text in texts if (answer := REASONING_TAG.split(text)[-1].strip())]


def _check_answer(chat: Chat, index: int, start: int, stop: int) -> None:
    """The turn text[start:stop] must be what the message says and its end."""
    message, turn, template = chat.messages[index], chat.text[start:stop], chat.template
    texts = [] if message.get("tool_calls") else _answer_texts(message.get("content"))
    if lost := next((part for part in texts if part not in turn), None):
        change = f"from {lost[:80]!r} to {turn[:80]!r}"
        raise TunesmithError(f"the template changes what the assistant says, {change}: what is to be supervised?")
    tail = turn[turn.rindex(texts[-1]) + len(texts[-1]) :] if texts else ""
    end = template.special.search(tail)
    added = tail[end.end() :].strip() if end else ""
    if added and (template.special.sub("", added).strip() or chat.text[:start].rstrip().endswith(added)):
        raise TunesmithError(
            f"the template writes {added!r} behind the turn's end, which the model would learn to write too; a "
            "generation prompt belongs behind `add_generation_prompt` only. Mend the template"
        )


def _without_closing(chat: Chat, start: int, stop: int) -> int:
    """Where the last turn text[start:stop] ends, without a token that closes the whole text behind its own end.

    Phi 3 and others have one, which the model would never come to write: it goes when the conversation goes on.
    """
    text = chat.text
    if len(_ends(chat, text[start:stop])) < 2:
        return stop
    with suppress(TunesmithError):  # calls hide the content, or nothing may follow
        ends = _ends(chat, chat.after_content(len(chat.messages) - 1))
        longer = chat.render([*chat.messages, {"role": "user", "content": PROBES[0]}])
        position = len(text.rstrip()) - len("".join(ends).rstrip())
        common = _common_pieces(ends, longer.removeprefix(text[:position])).rstrip()
        return position + len(common) if common and len(ends) > 1 else stop
    return stop


def _ends(chat: Chat, text: str) -> list[str]:
    """The special tokens that `text` ends with, and the white space between them."""
    special, pieces = chat.template.special.fullmatch, chat.template.pieces(text)[::-1]
    ends = [*takewhile(lambda piece: special(piece) or piece.isspace(), pieces)][::-1]
    return [*dropwhile(str.isspace, ends)]


def _check_calls(chat: Chat) -> None:
    """A template that knows nothing of tools leaves calls out without a word."""
    index = next((i for i, message in enumerate(chat.messages) if "tool_calls" in message), -1)
    if index < 0 or chat.template.shows_calls:
        return
    first, *others = chat.messages[index]["tool_calls"]
    name = {"name": PROBES[0]}
    call = first | name | {"function": first.get("function", first) | name}
    message = {**chat.messages[index], "tool_calls": [call, *others]}
    if PROBES[0] not in chat.render([*chat.messages[:index], message, *chat.messages[index + 1 :]]):
        raise TunesmithError("the chat template does not show tool calls; set `chat_template_path` to one that does")
    chat.template.shows_calls = True


def _check_marked(chat: Chat, start: int, stop: int) -> None:
    """Where the template marks what is generated, it must mark this turn and no more, white space at the ends aside."""
    if chat.marks is None:
        return
    text, merged = chat.text, Marks()
    for mark in chat.marks:
        joins = merged and not text[merged[-1][1] : mark[0]].strip()
        merged.append((merged.pop()[0], mark[1]) if joins else mark)
    turn = text[start:stop].strip()
    marked = [text[first:last].strip() for first, last in merged if first < stop and last > start]
    if [part for part in marked if part] != [turn] * bool(turn):
        raise TunesmithError(
            f"the {{% generation %}} blocks of the template mark {[part[-60:] for part in marked]} of it, but the "
            f"model generates {turn[-60:]!r}. Mend the template: a block goes from behind the generation prompt "
            "through the token that ends the turn"
        )
