"""The turns of a long conversation from few renderings.

A run of an agent has a hundred calls, and to render what inference sees before each of them takes a hundred times as
long as to render the conversation. But its turns are of few shapes: an answer to the user, a call after a result. Of
each shape the first turn is rendered as it is (`data.turns`), and so is the last turn of all. For the others it is
enough that between the message before and the turn, and between the turn and the message after, the text is the same:

    ... 25 degrees</result>|<assistant>|CALL|<end><tool><result>|{"temp": 20} ...
        message before      the same    turn  the same          message after

Where the messages are in the text is seen from another rendering, in which they have marks around them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.data.template import Fields
from tunesmith.data.turns import Chat, Turn, check_turn, said, turn_of
from tunesmith.errors import TunesmithError

FEW = 6
"""So many turns are rendered one by one."""
MARKS = re.compile("[\U00100000-\U0010f000]")
FIRST_MARK = 0x100000
MOST_MESSAGES = (0x10F000 - FIRST_MARK) // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """What stands before and behind the turns of one shape, up to the messages around them: the text `before`, the
    token that is their `end`, and the special tokens `behind` that. Without such a token, the text behind them."""

    before: str
    end: str
    behind: str | list[str]
    dropped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """The rendering of so many messages, and where their contents are in it: start and stop by message."""

    messages: int
    text: str
    places: dict[int, tuple[int, int]]
    arguments: Fields


def turns_of(chat: Chat, indices: Sequence[int]) -> dict[int, Turn]:
    """The turns of these messages, as `turn_of` gives each."""
    if len(indices) <= FEW:
        return {i: turn_of(chat, i) for i in indices}
    if (turns := _run(chat, indices, len(chat.messages))) is not None:
        return turns
    turns = {}
    for run in _exchanges(chat, indices):
        turns |= _exchange(chat, run) if len(run) > FEW else {i: turn_of(chat, i) for i in run}
    return turns


def _exchange(chat: Chat, run: Sequence[int]) -> dict[int, Turn]:
    """The turns that follow one message of the user."""
    *calls, last = run
    if (turns := _run(chat, run, last + 1)) is not None:
        return turns
    if (turns := _run(chat, calls, last)) is not None:  # the last answer may change how those before it are rendered
        return turns | {last: turn_of(chat, last)}
    return {i: turn_of(chat, i) for i in run}


def _exchanges(chat: Chat, indices: Sequence[int]) -> list[list[int]]:
    """The turns between one message of the user and the next: templates drop reasoning where the user speaks again."""
    runs: list[list[int]] = []
    for i in indices:
        spoken = runs and any(message.get("role") == "user" for message in chat.messages[runs[-1][-1] : i])
        if spoken or not runs:
            runs.append([])
        runs[-1].append(i)
    return runs


def _run(chat: Chat, indices: Sequence[int], stop: int) -> dict[int, Turn] | None:
    """Turns that the rendering of the messages before `stop` all holds as inference has them; None where it does not,
    or where that can't be told."""
    turns, forms = {i: turn_of(chat, i) for i in (indices[0], indices[-1])}, dict[tuple[object, ...], _Form]()
    text = _marked(chat, stop, turns[indices[0]].arguments)
    if text is None:
        return None
    for i in indices:
        shape = _shape(chat, i, stop)
        if shape in forms:
            turn = _cut(chat, i, text, forms[shape])
            if turn is None or (i in turns and turn != turns[i]):
                return None
            turns[i] = turn
            continue
        turn = turns.setdefault(i, turns.get(i) or turn_of(chat, i))
        if i == indices[-1] and turn.text.startswith(text.text.rstrip()):
            continue  # what ends it may be the header of a message behind this text
        form = _form(chat, i, text, turn)
        if form is None:
            return None
        forms[shape] = form
    return {i: turns[i] for i in indices}


def _shape(chat: Chat, index: int, stop: int) -> tuple[object, ...]:
    """What of the messages around a turn, and of itself, a template may look at."""
    message = chat.messages[index]
    around = [chat.messages[i].get("role") for i in (index - 1, index + 1) if 0 <= i < stop]
    reasoning, answer = said(message)
    return *around, bool(reasoning), bool(answer), bool(message.get("tool_calls"))


def _marked(chat: Chat, stop: int, arguments: Fields) -> _Text | None:
    """The rendering of the messages before `stop`, with the places of all but the assistant's; None where marks change
    it."""
    text, marked = chat.before(stop, arguments=arguments), list[Fields]()
    for i, message in enumerate(chat.messages[:stop]):
        content = message.get("content")
        core = content.strip() if isinstance(content, str) and message.get("role") != "assistant" else ""
        if core and isinstance(content, str):
            first, last = (chr(FIRST_MARK + 2 * i + side) for side in (0, 1))
            message = {**message, "content": content.replace(core, first + core + last, 1)}
        marked.append(message)
    if stop > MOST_MESSAGES or MARKS.search(text):
        return None
    try:
        shown = chat.render(marked, arguments=arguments)
    except TunesmithError:
        return None
    if MARKS.sub("", shown) != text:
        return None
    starts, places = dict[int, int](), dict[int, tuple[int, int]]()
    for count, mark in enumerate(MARKS.finditer(shown)):
        i, side = divmod(ord(mark[0]) - FIRST_MARK, 2)
        if side == 0:
            starts[i] = mark.start() - count
        elif i in starts and i not in places:
            places[i] = starts[i], mark.start() - count
        else:
            return None  # it is shown twice
    return _Text(messages=stop, text=text, places=places, arguments=arguments)


def _form(chat: Chat, index: int, text: _Text, turn: Turn) -> _Form | None:
    """What is around a turn that was rendered as it is."""
    before, limit = text.places.get(index - 1), _limit(text, index)
    if turn.arguments != text.arguments or turn.closed or before is None or limit is None:
        return None
    if not text.text.startswith(turn.text):
        return None
    end = next((end for end in chat.template.ends if turn.generated.endswith(end)), "")
    behind = text.text[turn.stop : limit]
    if end and end in behind:
        return None
    return _Form(
        before=text.text[before[1] : turn.start],
        end=end,
        behind=[*chat.template.special.findall(behind)] if end else behind,
        dropped=turn.dropped,
    )


def _cut(chat: Chat, index: int, text: _Text, form: _Form) -> Turn | None:
    """The turn between what stands around it."""
    before, limit = text.places.get(index - 1), _limit(text, index)
    if before is None or limit is None or not text.text.startswith(form.before, before[1]):
        return None
    start = before[1] + len(form.before)
    if form.end:
        stop = text.text.rfind(form.end, start, limit) + len(form.end)
        alike = chat.template.special.findall(text.text[stop:limit]) == form.behind
    else:
        stop = limit - len(form.behind)
        alike = text.text[stop:limit] == form.behind
    if not alike or stop <= start:
        return None
    generated = text.text[start:stop]
    turn = Turn(prompt=text.text[:start], generated=generated, arguments=text.arguments, dropped=form.dropped)
    check_turn(chat, index, turn)
    return turn


def _limit(text: _Text, index: int) -> int | None:
    """Where the text ends that can belong to a turn: with the text, or where the next message begins."""
    if index + 1 == text.messages:
        return len(text.text)
    return text.places[index + 1][0] if index + 1 in text.places else None
