"""Where a turn is in the full rendering of a conversation, though inference would have rendered another prompt for it.

A message is found from what *follows* it: that is what two renderings with other contents both end with. A turn that
can't be found so, or whose text is not what the message says, is refused with the reason.
"""

from tunesmith.data.template import REASONING_END, common_pieces
from tunesmith.data.turns import Chat, not_a_prefix, said, turn_of
from tunesmith.errors import TunesmithError
from tunesmith.types import Span


def everything(chat: Chat) -> tuple[Span, ...]:
    """Spans that cover the whole text; assistant turns with a weight of their own have it."""
    whole, spans, position = chat.conversation.weight, list[Span](), 0
    for i, message in enumerate(chat.conversation.messages):
        if message.weight == 1.0:
            continue
        if message.role != "assistant":
            raise TunesmithError(f"message {i + 1} has weight {message.weight}; only assistant turns can have one")
        start, stop, _ = located(chat, i)
        spans += Span(start=position, stop=start), Span(start=start, stop=stop, weight=message.weight)
        position = stop
    spans.append(Span(start=position, stop=len(chat.text)))
    weighted = (Span(start=span.start, stop=span.stop, weight=span.weight * whole) for span in spans)
    return tuple(span for span in weighted if span.weight > 0 and span.start < span.stop)


def located(chat: Chat, index: int) -> tuple[int, int, bool]:
    """Start and stop in the full text of message `index`, from behind the header of the assistant, and whether it is
    there as inference has it.

    Raises TunesmithError when they can't be told with certainty.
    """
    try:
        turn = turn_of(chat, index)
        if chat.text.startswith(turn.text):
            return turn.start, turn.stop, True
    except TunesmithError:
        pass
    try:
        start = _start(chat, index)
        stop = _stop(chat, index)
        _, answer = said(chat.messages[index])
        if stop < start or answer not in chat.text[start:stop]:
            raise TunesmithError("its end can't be found in the rendered text: its content changes what comes after it")
    except TunesmithError as error:
        raise TunesmithError(f"message {index + 1} (assistant): {error}") from error
    return start, stop, False


def _start(chat: Chat, index: int) -> int:
    """Where the header of message `index` ends in the full text."""
    if not index:
        raise TunesmithError("the conversation begins with it, and the template does not show where its text starts")
    # What follows the message before, up to the generation prompt's end, follows it in the full text as well.
    tail, rest = chat.after_content(index - 1, index, ask=True), chat.after_content(index - 1)
    for header in (tail, REASONING_END.sub("", tail)):
        if chat.text.endswith(rest) and rest.startswith(header) and header.strip():
            return len(chat.text) - len(rest) + len(header)
    raise TunesmithError(not_a_prefix(chat.before(index, ask=True), chat.text))


def _stop(chat: Chat, index: int) -> int:
    """Where message `index` ends in the full text: its end is what follows its content now as it did when it was the
    last."""
    text, then, rest = chat.text, chat.after_content(index, index + 1), chat.after_content(index)
    end = common_pieces(chat.template.pieces(then), rest)
    stop = len(text) - len(rest) + len(end)
    if not text.endswith(rest[len(end) :]) or not text[:stop].endswith(end.lstrip()):
        raise TunesmithError("its end can't be found in the rendered text: its content changes what comes after it")
    return stop - (len(end) - len(end.rstrip()))
