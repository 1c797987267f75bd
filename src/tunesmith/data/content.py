"""What messages say, in the rendered text: none of it is lost, and none of it is taken for a control token.

A message can hold the text of a control token, `<|im_end|>` say. Rendered and tokenized, it would be one: the text of a
user could end his turn and open that of the system. Where such text is to stay text, it carries a mark through the
rendering, a character of Unicode's private use between its first two characters, by which it is found in the result.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.data.template import REASONING_TAG, Fields
from tunesmith.data.turns import Chat, shows
from tunesmith.errors import TunesmithError
from tunesmith.types import Rendered, Span

MARK = "\U0010fffd"
MARKED = re.compile(MARK)


def control_tokens(messages: Iterable[Fields], special: re.Pattern[str]) -> list[str]:
    """The texts of control tokens that stand in messages. Tags of reasoning aside, which templates take from them."""
    found = dict[str, None]()
    for message in messages:
        for text in _strings(message):
            if special.search(text):
                found.update(dict.fromkeys(special.findall(text)))
    return [token for token in found if len(token) > 1 and not REASONING_TAG.fullmatch(token)]


def marked(value: Any, tokens: Sequence[str]) -> Any:
    """A message, or several, with a mark in each of these texts."""
    match value:
        case str():
            for token in tokens:
                value = value.replace(token, token[0] + MARK + token[1:])
            return value
        case dict():
            return {key: marked(item, tokens) for key, item in value.items()}
        case list():
            return [marked(item, tokens) for item in value]
    return value


def without_marks(document: Rendered) -> Rendered:
    """The document without marks, and with the place of the first character of each text that had one: cut behind it,
    the text is no longer that of a token."""
    marks = [found.start() for found in MARKED.finditer(document.text)]

    def moved(place: int) -> int:
        return place - sum(mark < place for mark in marks)

    text = MARKED.sub("", document.text)
    spans = tuple(Span(start=moved(span.start), stop=moved(span.stop), weight=span.weight) for span in document.spans)
    literal = tuple(map(moved, marks))
    prompt = None if document.prompt is None else moved(document.prompt)
    return replace(document, text=text, spans=spans, prompt=prompt, literal=literal)


def check_shown(chat: Chat, texts: Sequence[str]) -> None:
    """What users, the system and tools say must be in one of the texts that are trained on.

    A template may write it in another form, or leave out by rule what was shown while it was the last. Raises
    TunesmithError for a message that it does not show at all.
    """
    for i, message in enumerate(chat.messages):
        content = message.get("content")
        if message.get("role") == "assistant":
            continue
        parts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
        if not all(any(shows(text, part.strip()) for text in texts) for part in parts) and not _shown(chat, i):
            raise TunesmithError(
                f"message {i + 1} ({message.get('role')}) is not in the rendered text: the chat template does not show "
                "it. Take it out of the row, or set `chat_template_path` to a template that shows it"
            )


def _shown(chat: Chat, index: int) -> bool:
    """Whether other contents of a message would give another text, now or while it is the last message."""
    for stop in (None, index + 1):
        try:
            first, second = chat.with_probes(index, stop)
        except TunesmithError:
            return True  # what it takes is decided by its content
        if first != second:
            return True
    return False


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for item in value.values():
                yield from _strings(item)
        case list():
            for item in value:
                yield from _strings(item)
