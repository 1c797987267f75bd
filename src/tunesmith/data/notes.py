"""What is odd about a row and legal: it is trained on, and `tunesmith check` names the rows."""

import re
from collections.abc import Iterator

from tunesmith.data.messages import REASONING
from tunesmith.types import Conversation

UNANSWERED = "with an empty answer, which teaches the model to say nothing"
UNASKED = "with an empty question"
GLUED = "whose answer follows the prompt with nothing between them, not even a space"
MEETING = re.compile(r"[A-Za-z0-9.?!][A-Za-z0-9]")
"""The last character of such a prompt, and the first of its answer."""
SAYS = (*REASONING, "tool_calls")
"""What a message may have in place of a text."""


def notes_on(conversation: Conversation) -> tuple[str, ...]:
    """Of questions and learned answers that say nothing, as cells of a table do that nobody filled in."""
    return tuple(dict.fromkeys(_empty_messages(conversation)))


def _empty_messages(conversation: Conversation) -> Iterator[str]:
    learned = conversation.prompt_length or 0
    for i, message in enumerate(conversation.messages):
        content = message.fields.get("content")
        if content and not (isinstance(content, str) and content.isspace()):
            continue
        if message.role == "user":
            yield UNASKED
        elif message.role == "assistant" and i >= learned and message.weight > 0:
            yield from () if any(map(message.fields.get, SAYS)) else (UNANSWERED,)


def notes_on_text(prompt: str, answer: str) -> tuple[str, ...]:
    """Of a prompt of plain text and its answer, which are joined as they are."""
    if not answer.strip():
        return (UNANSWERED,)
    return (GLUED,) if MEETING.match(prompt[-1:] + answer[:1]) else ()
