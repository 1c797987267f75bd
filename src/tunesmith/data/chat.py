"""Conversations to documents: the text a model sees, and the spans of it that are supervised.

A template is a program; what it does with a message can depend on all others (Qwen 3 drops earlier reasoning). So
nothing is assembled from pieces. Each supervised turn has the prompt that inference renders for it, and what the model
has to generate behind that (`data.turns`). A document is a text in which that holds for some of the turns:

- Where it holds for all in the full rendering, that is the one document (`whole`).
- Where the template renders history otherwise than the present, a turn that the later text does not repeat has a
  document of its own, which ends with it. Documents of one conversation begin alike, and share what they begin with.

For example, under a template that drops earlier reasoning (the generated parts are underlined):

    user: Hi  assistant: <think>Hm</think> Yes
                         ~~~~~~~~~~~~~~~~~~~~~
    user: Hi  assistant: Yes  user: Why?  assistant: <think>Well</think> Because
                                                     ~~~~~~~~~~~~~~~~~~~~~~~~~~~
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from tunesmith.data.alike import turns_of
from tunesmith.data.content import check_shown, control_tokens, marked, without_marks
from tunesmith.data.history import everything, located
from tunesmith.data.notes import notes_on
from tunesmith.data.skipped import NotTheRow
from tunesmith.data.template import ChatTemplate, Fields
from tunesmith.data.turns import Chat, Turn, not_a_prefix, said, shows
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation, Rendered, Span, TrainOn

Turns = Literal["auto", "whole", "each"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderOptions:
    """What is supervised of a conversation, and how it is divided. See SFTConfig for the fields."""

    train_on: TrainOn | None = None
    turns: Turns = "auto"
    prompt_mismatch: Literal["error", "accept"] = "error"
    marks: Literal["verified", "template"] = "verified"
    drop_reasoning: Literal["note", "error"] = "note"
    specials_in_content: Literal["keep", "text", "error"] = "keep"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """The documents of a conversation, and what is worth knowing of how they came about."""

    documents: tuple[Rendered, ...]
    notes: tuple[str, ...] = ()
    arguments: tuple[Fields, ...] = field(default=())
    """The template's switches that its turns were rendered with, one for each turn."""


EACH = "trained turn by turn, as inference sees each: the template renders earlier answers in another form"
CLOSED = "learn to end the thinking at once: the prompt opens it, and the template has no switch for it"
DROPPED = "with reasoning that the chat template does not show"
ACCEPTED = "trained in the form that history has, which is not what inference sees (prompt_mismatch: accept)"
SPECIALS = "with text in a message that reads as a control token, such as {}"
MARKED = "whose {% generation %} blocks differ from what the model generates; what it generates is supervised"


def render(conversation: Conversation, template: ChatTemplate, options: RenderOptions) -> Rendering:
    """`conversation` as documents with their supervised spans; no spans when nothing of it is to be trained on.

    Raises TunesmithError when a span can't be determined with certainty, and when a message is lost in the rendering.
    """
    control = control_tokens((message.fields for message in conversation.messages), template.special)
    notes = (*conversation.notes, *notes_on(conversation))
    if not control:
        rendering = _rendered(conversation, template, options)
        return replace(rendering, notes=(*notes, *rendering.notes)) if notes else rendering
    if options.specials_in_content == "error":
        raise TunesmithError(
            f"a message has the text {control[0]!r}, which reads as a control token (specials_in_content: error); take "
            "it out of the row, or write specials_in_content: text to train on it as ordinary characters"
        )
    notes = (*notes, SPECIALS.format(control[0]))
    if options.specials_in_content == "keep":
        rendering = _rendered(conversation, template, options)
        return replace(rendering, notes=(*notes, *rendering.notes))
    messages = tuple(replace(message, fields=marked(message.fields, control)) for message in conversation.messages)
    rendering = _rendered(replace(conversation, messages=messages), template, options)
    documents = tuple(without_marks(document) for document in rendering.documents)
    return replace(rendering, documents=documents, notes=(*notes, *rendering.notes))


def _rendered(conversation: Conversation, template: ChatTemplate, options: RenderOptions) -> Rendering:
    chat, prompt, train_on = Chat(conversation, template), conversation.prompt_length, options.train_on or "assistant"
    others = [message.weight for message in conversation.messages if message.role != "assistant"]
    if train_on == "all" and others and not any(others):  # rows of tools in which a turn says that it is not trained on
        train_on = "assistant"
    if train_on == "all":
        if options.turns == "each" or options.marks == "template":
            unused = "turns: each" if options.turns == "each" else "marks: template"
            raise NotTheRow(
                f"{unused} says how answers are trained, and here all is trained on: set train_on: assistant"
            )
        closed = conversation.messages[-1].weight > 0
        return _one_text(chat, Rendered(text=chat.text, spans=everything(chat), closed=closed), options)
    supervised = _supervised(conversation, train_on)
    weights = {i: conversation.messages[i].weight * conversation.weight for i in supervised}
    supervised = [i for i in supervised if weights[i] > 0]
    if options.marks == "template" and chat.marks is not None and supervised:
        return _one_text(chat, _marked(chat, weights), options)
    if options.turns == "whole" and options.prompt_mismatch == "accept":
        return _accepted(chat, supervised, weights, options)
    turns = turns_of(chat, supervised)
    notes = list[str]()
    for turn in turns.values():
        notes += [CLOSED] * turn.closed + [DROPPED] * turn.dropped
    _check_reasoning(notes, options)
    covers = _covers(chat, turns, each=options.turns == "each")
    check_shown(chat, [chat.text, *(text for text, _ in covers)])
    if len(covers) > 1:
        notes.append(EACH)
        if options.turns == "whole":
            raise TunesmithError(_not_whole(chat, turns))
    if chat.marks is not None and any(_differs(chat, turn) for turn in turns.values()):
        notes.append(MARKED)
    documents = tuple(
        Rendered(
            text=text,
            spans=tuple(Span(start=turns[i].start, stop=turns[i].stop, weight=weights[i]) for i in members),
            prompt=turns[members[0]].start if prompt in members else None,
            closed=text is not chat.text or members[-1] == len(chat.messages) - 1,
        )
        for text, members in covers
    ) or (Rendered(text=chat.text, spans=(), closed=False),)
    return Rendering(
        documents=documents, notes=tuple(dict.fromkeys(notes)), arguments=tuple(t.arguments for t in turns.values())
    )


def _one_text(chat: Chat, document: Rendered, options: RenderOptions, *notes: str) -> Rendering:
    """The full rendering as the one document, once nothing of the conversation is lost in it."""
    check_shown(chat, [chat.text])
    reasoning = (said(message)[0] for message in chat.messages if message.get("role") == "assistant")
    dropped = [DROPPED] * any(not shows(chat.text, text) for text in reasoning if text)
    _check_reasoning(dropped, options)
    return Rendering(documents=(document,), notes=(*notes, *dropped))


def _check_reasoning(notes: Sequence[str], options: RenderOptions) -> None:
    if options.drop_reasoning == "error" and DROPPED in notes:
        raise TunesmithError(
            "the row has reasoning that the chat template does not show (drop_reasoning: error); take it out of the "
            "row, or set `chat_template_path` to a template that shows it"
        )


def _supervised(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """The messages that `train_on` means."""
    prompt = conversation.prompt_length
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant" and i >= (prompt or 0)]
    if train_on == "completion" and prompt is None:
        raise NotTheRow("train_on: completion needs 'prompt' and 'completion'; for conversations use assistant")
    if train_on == "completion" and turns[:1] != [prompt]:
        raise TunesmithError("'completion' must begin with a message of the assistant")
    return turns[-1:] if train_on == "last_assistant" else turns


def _covers(chat: Chat, turns: Mapping[int, Turn], *, each: bool) -> list[tuple[str, list[int]]]:
    """Texts, with the turns that each of them holds as inference has them: as few as there can be, in order."""
    if not each and all(chat.text.startswith(turn.text) for turn in turns.values()):
        return [(chat.text, [*turns])] if turns else []
    covers: list[tuple[str, list[int]]] = []
    for i in sorted(turns, reverse=True):
        if covers and not each and covers[-1][0].startswith(turns[i].text):
            covers[-1][1].insert(0, i)
        else:
            covers.append((turns[i].text, [i]))
    return covers[::-1]


def _not_whole(chat: Chat, turns: Mapping[int, Turn]) -> str:
    index, turn = next((i, turn) for i, turn in turns.items() if not chat.text.startswith(turn.text))
    reason = not_a_prefix(turn.text, chat.text)
    return (
        f"message {index + 1} (assistant): {reason}\nturns: whole trains on one text. With `turns: auto` this turn has "
        "a text of its own; with `prompt_mismatch: accept` it is trained in the form that history has"
    )


def _accepted(chat: Chat, supervised: Sequence[int], weights: Mapping[int, float], options: RenderOptions) -> Rendering:
    """The full rendering with the turns where they are in it, whatever inference would render before them."""
    prompt, found = chat.conversation.prompt_length, {i: located(chat, i) for i in supervised}
    ranges = {i: (start, stop) for i, (start, stop, _) in found.items()}
    if any(before[1] > after[0] for before, after in pairwise(ranges.values())):
        raise TunesmithError("two turns overlap in the rendered text: the template changes the order of messages")
    spans = tuple(Span(start=start, stop=stop, weight=weights[i]) for i, (start, stop) in ranges.items())
    begin = ranges[prompt][0] if prompt in ranges else None
    document = Rendered(text=chat.text, spans=spans, prompt=begin, closed=len(chat.messages) - 1 in ranges)
    exact = all(is_exact for _, _, is_exact in found.values())
    return _one_text(chat, document, options, *([] if exact else [ACCEPTED]))


def _marked(chat: Chat, weights: Mapping[int, float]) -> Rendered:
    """The full rendering with the template's own `{% generation %}` blocks. They don't say whose turn each one is."""
    answers = [i for i, message in enumerate(chat.messages) if message.get("role") == "assistant"]
    if [*weights] != answers or len({*weights.values()}) > 1:
        raise TunesmithError(
            "marks: template supervises the blocks of all answers alike, and here some are left out or have a weight "
            "of their own; use marks: verified"
        )
    spans = tuple(Span(start=start, stop=stop, weight=weights[answers[0]]) for start, stop in chat.marks or ())
    return Rendered(text=chat.text, spans=spans, closed=False)


def _differs(chat: Chat, turn: Turn) -> bool:
    """Whether the template marks another part of the turn than what is generated, white space at the ends aside."""
    text, merged = chat.text, list[tuple[int, int]]()
    if not text.startswith(turn.text):
        return False
    for mark in chat.marks or ():
        joins = merged and not text[merged[-1][1] : mark[0]].strip()
        merged.append((merged.pop()[0], mark[1]) if joins else mark)
    marked = [text[first:last].strip() for first, last in merged if first < turn.stop and last > turn.start]
    return [part for part in marked if part] != [turn.generated.strip()] * bool(turn.generated.strip())
