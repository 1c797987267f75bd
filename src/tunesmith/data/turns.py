"""What inference sees before a turn of the assistant, and what the model has to generate there.

The prompt is that of inference, to the character: the messages before the turn with the generation prompt. The messages
through the turn, rendered without one, begin with it, and go on with what the model generates:

    prompt     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    through    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    generated                                                         ~~~~~~~~~~~~~~~~

White space that the template puts behind an end token is not generated.

Templates of reasoning models open or close the thinking in the generation prompt. Whether a turn has reasoning decides:
the template's own switch is turned so that the prompt fits. Where there is none, and the answer is rendered without the
block that the prompt opens, the model has to generate the block's end first (`closed`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import dropwhile, takewhile
from typing import Any

from tunesmith.data.template import (
    NO_ARGUMENTS,
    PROBES,
    REASONING_END,
    REASONING_TAG,
    Block,
    ChatTemplate,
    Fields,
    Marks,
    closing_tag,
    common_length,
    common_pieces,
    reasoning_fields,
    thinking_parts,
)
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation

THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What the model has to generate as a message, behind the `prompt` that inference renders for it.

    `arguments` switch the template's thinking for it. `closed`: the prompt opens the thinking, and what is generated
    closes it in a way that the template does not render. `dropped`: the message has reasoning that the template leaves
    out.
    """

    prompt: str
    generated: str
    arguments: Fields = field(default_factory=lambda: NO_ARGUMENTS)
    closed: bool = False
    dropped: bool = False

    @property
    def text(self) -> str:
        return self.prompt + self.generated

    @property
    def start(self) -> int:
        return len(self.prompt)

    @property
    def stop(self) -> int:
        return len(self.prompt) + len(self.generated)


class Chat:
    """A conversation bound to its template. `text` is the full rendering, `marks` its `{% generation %}` blocks.

    `reasonless` are the places where the template shows no reasoning, however it is asked: the role before, and whether
    the turn calls.
    """

    def __init__(self, conversation: Conversation, template: ChatTemplate) -> None:
        self.conversation, self.template = conversation, template
        self.messages = _adapted(conversation, template)
        self._texts: dict[tuple[int, bool, str], str] = {}
        self.reasonless: set[tuple[Any, bool]] = set()
        self.marks: Marks | None = [] if template.program(conversation.tools).marked else None
        self.text = self.render(self.messages, marks=self.marks)
        self._texts[len(self.messages), False, repr(NO_ARGUMENTS)] = self.text

    def render(
        self, messages: Sequence[Fields], *, ask: bool = False, arguments: Fields = NO_ARGUMENTS, marks: Any = None
    ) -> str:
        """Any messages as text, with the tools and arguments of the conversation."""
        own = {**arguments, **self.conversation.template_kwargs}
        return self.template.render(messages, tools=self.conversation.tools, arguments=own, ask=ask, marks=marks)

    def before(self, stop: int, *, ask: bool = False, arguments: Fields = NO_ARGUMENTS) -> str:
        """The messages before `stop` as text."""
        key = stop, ask, repr(arguments)
        if key not in self._texts:
            self._texts[key] = self.render(self.messages[:stop], ask=ask, arguments=arguments)
        return self._texts[key]

    def with_probes(
        self, index: int, stop: int | None, *, ask: bool = False, arguments: Fields = NO_ARGUMENTS
    ) -> list[str]:
        """The messages before `stop` as text, with either probe as the content of message `index`."""
        before, message, after = self.messages[:index], self.messages[index], self.messages[index + 1 : stop]
        parts = isinstance(message.get("content"), list)
        probes = [{"content": [{"type": "text", "text": probe}] if parts else probe} for probe in PROBES]
        talks = [[*before, {**message, **probe}, *after] for probe in probes]
        return [self.render(talk, ask=ask, arguments=arguments) for talk in talks]

    def after_content(
        self, index: int, stop: int | None = None, *, ask: bool = False, arguments: Fields = NO_ARGUMENTS
    ) -> str:
        """All that follows the content of message `index` when the messages before `stop` are rendered."""
        first, second = self.with_probes(index, stop, ask=ask, arguments=arguments)
        tail = first[len(first) - common_length(first[::-1], second[::-1]) :]
        if not first.removesuffix(tail).endswith(PROBES[0]):
            raise TunesmithError(f"the template does not show the content of message {index + 1} as it is")
        return tail

    def switches(self) -> Iterator[Fields]:
        """The template's switches that neither the run nor the row has set."""
        for arguments in self.template.switches:
            if not arguments.keys() & self.conversation.template_kwargs.keys():
                yield arguments


def _adapted(conversation: Conversation, template: ChatTemplate) -> list[Fields]:
    """The messages as the template takes them: contents as a string or as parts, calls in its style."""
    from transformers.utils import chat_template_utils as hf

    # Newer transformers show a message's reasoning to the template under all of its usual names.
    aliased = getattr(hf, "_alias_reasoning_fields", list)
    messages: list[Fields] = aliased([message.fields for message in conversation.messages])
    calling = any("tool_calls" in message for message in messages)
    style = template.call_style if calling else None
    adapted, open_calls, parts = list[Fields](), list[Fields](), template.wants_parts
    thinks_in_parts = template.thinks_in_parts
    for message in messages:
        fields = {**message}
        content = fields.get("content")
        if fields.get("role") == "assistant" and template.reasoning is not None:
            fields = _with_reasoning_apart(fields)
            content = fields.get("content")
            reasoning = next((fields[name] for name in reasoning_fields("") if fields.get(name)), None)
            fields = fields if reasoning is None else {**reasoning_fields(reasoning), **fields}
        if isinstance(content, list):  # as one text: some templates show only the first part
            fields["content"] = content = "".join(part["text"] for part in content)
        if parts and isinstance(content, str):
            fields["content"] = [{"type": "text", "text": content}]
        if style is not None and "tool_calls" in fields:
            fields["tool_calls"] = style.calls(fields["tool_calls"])
            fields["content"] = fields.get("content") or style.content
            open_calls = [*fields["tool_calls"]]
        elif fields.get("role") == "tool" and open_calls:
            fields = _answering(fields, open_calls, style)
        if thinks_in_parts and fields.get("reasoning_content") and fields.get("role") == "assistant":
            fields = thinking_parts(fields)
        adapted.append(fields)
    return adapted


def _with_reasoning_apart(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning is in its text, with the reasoning in the fields that templates have for it."""
    if any(message.get(name) for name in reasoning_fields("")):
        return message
    reasoning, answer = said(message)
    return {**message, "content": answer, **reasoning_fields(reasoning)} if reasoning else message


def _answering(message: dict[str, Any], open_calls: list[Fields], style: Any) -> dict[str, Any]:
    """A result with the name and the id of the call that it answers: that of its id, else the next in order."""
    wanted = message.get("tool_call_id")
    call = next((call for call in open_calls if wanted is not None and call.get("id") == wanted), open_calls[0])
    if call in open_calls and len(open_calls) > 1:
        open_calls.remove(call)
    name = call.get("function", call).get("name")
    named = message if "name" in message else {**message, "name": name}
    return style.result(named, call) if style is not None else named


# A turn


def turn_of(chat: Chat, index: int) -> Turn:
    """The turn of message `index`.

    Raises TunesmithError when what the model has to generate can't be told with certainty.
    """
    try:
        turn = _best(chat, index)
    except TunesmithError as error:
        raise _of_message(chat, index, error) from error
    check_turn(chat, index, turn)
    return turn


def check_turn(chat: Chat, index: int, turn: Turn) -> None:
    """Raises TunesmithError unless the turn is what the message says, and its end."""
    try:
        _check_answer(chat, index, turn)
        _check_calls(chat, index, turn)
    except TunesmithError as error:
        raise _of_message(chat, index, error) from error


def _of_message(chat: Chat, index: int, error: TunesmithError) -> TunesmithError:
    hint = "" if index == len(chat.messages) - 1 else "\nTo leave this turn out, give the message `weight: 0`"
    return TunesmithError(f"message {index + 1} (assistant): {error}{hint}")


def _best(chat: Chat, index: int) -> Turn:
    """The first way to render the turn in which the prompt fits it: plain, else with a switch, else closed by hand."""
    reasoning, _ = said(chat.messages[index])
    shape = chat.messages[index - 1].get("role") if index else None, bool(chat.messages[index].get("tool_calls"))
    if reasoning and shape in chat.reasonless and (turn := _exact(chat, index, NO_ARGUMENTS)) is not None:
        return replace(turn, dropped=reasoning not in turn.generated)
    ways = [NO_ARGUMENTS, *chat.switches()]
    exact, composed = dict[int, Turn](), dict[int, Turn]()
    for i, arguments in enumerate(ways):
        turn = _exact(chat, index, arguments)
        if turn is not None:
            exact[i] = turn
            if _fits(chat, turn, reasoning):
                return turn
        if (turn is None or reasoning) and (turn := _composed(chat, index, reasoning, arguments)) is not None:
            composed[i] = turn
            if not turn.closed and not turn.dropped and not reasoning:
                return turn
    ended = [turn for turn in exact.values() if not reasoning and _ends_thinking(chat, turn)]
    if not ended and not reasoning:  # the prompt opens the thinking, and the template leaves it open
        tried = ((i, _composed(chat, index, reasoning, turn.arguments)) for i, turn in exact.items())
        composed |= {i: turn for i, turn in tried if turn is not None}
    opened = [turn for turn in composed.values() if chat.template.block_of(turn.arguments).kind == "open"]
    turns = [*ended, *opened, *composed.values(), *exact.values()]
    for turn in turns:
        if not turn.dropped and (not reasoning or reasoning in turn.generated):
            return turn
    if turns:
        if 0 in exact:
            chat.reasonless.add(shape)
        return replace(exact.get(0) or turns[0], dropped=True)
    raise TunesmithError(
        not_a_prefix(_prompt(chat, index, NO_ARGUMENTS), chat.before(index + 1))
        + "\nTo train it in the form that the whole text has: `turns: whole` with `prompt_mismatch: accept`"
    )


def _fits(chat: Chat, turn: Turn, reasoning: str) -> bool:
    """Whether a turn's prompt fits what it says: reasoning is generated, and none is opened where there is none."""
    if reasoning:
        return reasoning in turn.generated
    block = chat.template.block_of(turn.arguments)
    return block.kind != "open" or not turn.prompt.rstrip().endswith(block.text)


def _ends_thinking(chat: Chat, turn: Turn) -> bool:
    """Whether a turn begins with the end of the thinking that its prompt opens."""
    closing = chat.template.block_of(turn.arguments).closing.strip()
    return bool(closing) and turn.generated.lstrip().startswith(closing)


def _exact(chat: Chat, index: int, arguments: Fields) -> Turn | None:
    """The turn where the rendering through it begins with the prompt of inference."""
    with suppress(TunesmithError) if arguments else nullcontext():
        prompt, through = _prompt(chat, index, arguments), chat.before(index + 1, arguments=arguments)
        if through.startswith(prompt):
            generated = _through_its_end(chat, index, prompt, through, arguments)
            return Turn(prompt=prompt, generated=generated, arguments=arguments)
    return None


def _prompt(chat: Chat, index: int, arguments: Fields) -> str:
    """What inference renders before message `index`."""
    return chat.before(index, ask=True, arguments=arguments) if index else _first_prompt(chat)


def _first_prompt(chat: Chat) -> str:
    """What stands before the answer of a conversation that begins with the assistant.

    Nothing can be rendered before such a turn, so the header is looked for in front of its content.
    """
    user = [chat.template.shaped({"role": "user", "content": PROBES[0]})]
    prompt, (first, second) = chat.render(user, ask=True), chat.with_probes(0, 1)
    header, before = prompt[common_length(prompt, chat.render(user)) :], first[: common_length(first, second)]
    for candidate in (header, REASONING_END.sub("", header)):
        start = before.rfind(candidate) + len(candidate)
        if candidate.strip() and candidate in before and chat.before(1).startswith(before[:start]):
            return before[:start]
    raise TunesmithError("the conversation begins with it, and the template does not show where its text starts")


def _through_its_end(chat: Chat, index: int, prompt: str, through: str, arguments: Fields) -> str:
    """What follows `prompt` in `through`, up to what ends the turn."""
    template, start = chat.template, len(prompt)
    through = through[: _first_end(chat, index, start, through)]
    stop = start + len(through[start:].rstrip())
    if through.endswith(template.ends, start, stop):
        return _without_openers(chat, index, through[start:stop])
    # As in GLM, where the header of the next message is what ends this one.
    if index + 1 < len(chat.messages) and chat.messages[index + 1].get("role") != "assistant":
        further = chat.before(index + 2, arguments=arguments)
        behind = further[len(through) :] if further.startswith(through) else ""
        if not behind and not chat.messages[index].get("tool_calls"):  # history has the turn in another form
            with suppress(TunesmithError):
                behind = chat.after_content(index, index + 2, arguments=arguments)
        header = template.special.match(behind)
        if header and header[0] in template.ends:
            return through[start:] + header[0]
    return through[start:]


def _first_end(chat: Chat, index: int, start: int, through: str) -> int:
    """Where the text ends that is generated at most: with the first end-of-sequence token behind what the turn says."""
    message = chat.messages[index]
    texts = [said(message)[1]]
    if calls := message.get("tool_calls"):
        texts = [str(calls[-1].get("function", calls[-1]).get("name"))]
        texts += _texts(chat.conversation.messages[index].fields, len(calls))
        texts += [json.dumps(text, ensure_ascii=False)[1:-1] for text in texts]
        texts = [text for text in texts if text]
    said_until = max(place + len(text) if (place := through.rfind(text, start)) >= 0 else -1 for text in texts)
    end = through.find(chat.template.eos, said_until) if said_until >= 0 else -1
    return end + len(chat.template.eos) if end >= 0 else len(through)


def _without_openers(chat: Chat, index: int, generated: str) -> str:
    """The turn without what follows its end token: the beginning of another turn, or the end of the whole text.

    Phi 3 and others close the whole text with a token, which the model would never come to write: it goes when the
    conversation goes on.
    """
    ends = _ends(chat, generated)
    while len(ends) > 1 and (ends[-1].isspace() or ends[-1] in chat.template.headers):
        generated = generated[: -len(ends.pop())]
    while len(ends) > 1 and (ends[0].isspace() or ends[0] in chat.template.headers):
        ends = ends[1:]  # the header of an answer that is empty
    if sum(not end.isspace() for end in ends) < 2:
        return generated
    with suppress(TunesmithError):  # nothing may follow
        here = chat.before(index + 1)
        question = chat.template.shaped({"role": "user", "content": PROBES[0]})
        longer = chat.render([*chat.messages[: index + 1], question])
        position = here.rindex("".join(ends))
        common = common_pieces(ends, longer[position:]) if longer[:position] == here[:position] else ""
        if common.strip():
            return (generated[: len(generated) - len("".join(ends))] + common).rstrip()
    return generated


def _composed(chat: Chat, index: int, reasoning: str, arguments: Fields) -> Turn | None:
    """The turn where the template renders it without what ends the generation prompt, or without its reasoning.

    The prompt is that of inference. Of the rendering through the turn, all behind the assistant's header is what the
    model has to generate; reasoning that is not shown, and what closes it, come first.
    """
    template = chat.template
    if not index:
        return None
    with suppress(TunesmithError):
        prompt, through = _prompt(chat, index, arguments), chat.before(index + 1, arguments=arguments)
        for tail, rest in _behind_the_message_before(chat, index, arguments, prompt, through):
            if (found := template.block(tail, rest)) is None:
                continue
            more, block = found
            answer = _through_its_end(chat, index, through.removesuffix(more), through, arguments)
            return _joined(chat, Turn(prompt=prompt, generated=answer, arguments=arguments), block, reasoning)
    return None


def _joined(chat: Chat, turn: Turn, block: Block, reasoning: str) -> Turn:
    """The turn with its reasoning, or the end of reasoning that its prompt opens, before its answer."""
    generated, known = turn.generated, chat.template.reasoning
    answer = _behind_block(chat.template, generated, reasoning)
    if block.kind == "open":
        if reasoning and reasoning in generated:
            return replace(turn, generated=generated[generated.index(reasoning) :])
        return replace(turn, generated=reasoning + block.closing + answer.lstrip(), closed=not reasoning)
    if not reasoning:
        return replace(turn, generated=answer if block.kind == "closed" else generated)
    if block.kind == "" and known is not None and known.opening.strip():
        begun = next((piece for piece in chat.template.pieces(known.closing)[-1:] if answer.startswith(piece)), "")
        return replace(turn, generated=known.opening + reasoning + known.closing + answer.removeprefix(begun).lstrip())
    return replace(turn, generated=answer, dropped=True)


def _behind_the_message_before(
    chat: Chat, index: int, arguments: Fields, prompt: str, through: str
) -> Iterator[tuple[str, str]]:
    """What follows the message before a turn: in the prompt of inference, and in the rendering through the turn."""
    plain = chat.before(index, arguments=arguments)
    if prompt.startswith(plain) and through.startswith(plain) and len(prompt) > len(plain):
        yield prompt[len(plain) :], through[len(plain) :]
    tail = chat.after_content(index - 1, index, ask=True, arguments=arguments)
    rest = chat.after_content(index - 1, index + 1, arguments=arguments)
    if prompt.endswith(tail) and through.endswith(rest):
        yield tail, rest


def _behind_block(template: ChatTemplate, rest: str, reasoning: str) -> str:
    """A turn without the reasoning that it begins with, and without what encloses that."""
    closings = [] if template.reasoning is None else [template.reasoning.closing.strip()]
    if tag := REASONING_TAG.match(rest.lstrip()):
        closings.append(tag[0] if not closing_tag(tag[0]) else closing_tag(tag[0]))
    for closing in closings:
        before, found, after = rest.partition(closing)
        shown = bool(reasoning) and reasoning in before
        if found and (shown or REASONING_TAG.match(before.lstrip()) or not before.strip()):
            return after
    return rest


# What it says


def said(message: Fields) -> tuple[str, str]:
    """The reasoning of a message and its answer, both without white space around them.

    Reasoning has a field of its own, or stands at the beginning of the text, between a tag and the one that closes it;
    a text behind a prompt that opens the thinking may lack the first. Tags elsewhere are what the answer says.
    """
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    field = next((message[name] for name in ("reasoning_content", "reasoning", "thinking") if message.get(name)), "")
    tag = REASONING_TAG.match(text.lstrip())
    opening = tag[0] if tag and closing_tag(tag[0]) else ""
    inside, closed, answer = text.partition(closing_tag(opening) or THINK_END)
    if not closed or (not opening and THINK in inside):
        return str(field).strip(), text.strip()
    return str(field or inside.lstrip().removeprefix(opening)).strip(), answer.strip()


def _check_answer(chat: Chat, index: int, turn: Turn) -> None:
    """The turn must be what the message says and its end."""
    message, generated, template = chat.messages[index], turn.generated, chat.template
    reasoning, answer = said(message)
    if answer and answer not in generated:
        if message.get("tool_calls") and not any(line in generated for line in answer.splitlines() if line.strip()):
            raise TunesmithError(
                f"the template does not show what the assistant says beside its calls, {answer[:80]!r}. Take it out of "
                "the row, give it a message of its own, or set `chat_template_path` to a template that shows it"
            )
        if not generated.strip():
            raise TunesmithError(
                f"the template does not show what the assistant says, {answer[:80]!r}, while it is the last message; "
                "set `chat_template_path` to one that does"
            )
        change = f"from {answer[:80]!r} to {generated[:80]!r}"
        raise TunesmithError(f"the template changes what the assistant says, {change}: what is to be supervised?")
    first = next((text for text in (reasoning, answer) if text and text in generated), "")
    if first and template.eos in generated[: generated.index(first)]:
        raise TunesmithError(
            "the template asks for no answer behind an answer, so that the model would have to write the header "
            "between them. Join them to one message: `merge_turns: true`"
        )
    if message.get("tool_calls"):
        return
    tail = generated[generated.rindex(answer) + len(answer) :] if answer else ""
    end = template.special.search(tail)
    added = tail[end.end() :].strip() if end else ""
    if added and turn.prompt.rstrip().endswith(added):
        raise TunesmithError(
            f"the template writes {added!r} behind the turn's end, which the model would learn to write too; a "
            "generation prompt belongs behind `add_generation_prompt` only. Mend the template"
        )


def _check_calls(chat: Chat, index: int, turn: Turn) -> None:
    """Each call's name and the texts in its arguments must be generated in the turn."""
    for number, call in enumerate(chat.messages[index].get("tool_calls") or (), start=1):
        function = call.get("function", call)
        for value in (function.get("name"), *_texts(chat.conversation.messages[index].fields, number)):
            if value and not shows(turn.generated, value):
                raise TunesmithError(
                    f"the template does not show {value[:80]!r} of call {number}. Set `chat_template_path` to a "
                    "template that shows all calls of a message, or divide the message into one for each call"
                    + (", and one for the text beside them" if said(chat.messages[index])[1] else "")
                )


def _texts(message: Fields, number: int) -> Iterator[str]:
    """The texts in the arguments of a call, at any depth."""
    waiting = [message["tool_calls"][number - 1].get("function", message["tool_calls"][number - 1]).get("arguments")]
    while waiting:
        match waiting.pop():
            case str() as text:
                yield text
            case Mapping() as values:
                waiting += values.values()
            case list() as values:
                waiting += values


def shows(text: str, value: str) -> bool:
    """Whether `text` holds `value` as it is, or in JSON in one way or another."""
    if value in text:
        return True
    forms = {value.strip(), json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]}
    forms |= {json.dumps(form)[1:-1] for form in [*forms]}
    return any(form in text for form in forms)


# Texts


def not_a_prefix(prompt: str, text: str) -> str:
    """The message that says where the prompt of inference and the rendered text part."""
    same = common_length(prompt, text)
    part = slice(max(0, same - 40), same + 40)
    return (
        "the prompt that inference would render is not the beginning of the text to train on. They part at character "
        f"{same}:\n  inference: ...{prompt[part]!r}\n  training:  ...{text[part]!r}\n"
        "Use a template that renders both alike, or set its arguments (chat_template_kwargs) so that it does"
    )


def _ends(chat: Chat, text: str) -> list[str]:
    """The special tokens that `text` ends with, and the white space between them."""
    special, pieces = chat.template.special.fullmatch, chat.template.pieces(text)[::-1]
    ends = [*takewhile(lambda piece: special(piece) or piece.isspace(), pieces)][::-1]
    return [*dropwhile(str.isspace, ends)]
