"""Random conversations in every style: what is supervised is what the style says, character by character.

The tokenizer works on bytes and has merges that cross the bounds of characters and words, so tokens straddle spans. The
expected labels come from a slow loop over the offsets of every token.
"""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.styles import STYLES, Style, assistant, bytes_, conversation, render, system, user
from tunesmith.data.chat import Rendering
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder
from tunesmith.types import IGNORE_INDEX, Rendered

# Characters of several bytes, white space at the ends, what looks like headers and like the probes of the code.
PARTS = [
    "a",
    "The",
    " ",
    "\n",
    "\n\n",
    "😀",
    " 你",
    "你好",
    "é",
    "!",
    ".",
    ":",
    "User: ",
    "\nAssistant: ",
    "### Response:\n",
]
PARTS += ["Xprobe answerX", "<b>", "[Round 1]", '{"a": 1}', "\u2028", "\t", "X", "Y"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=4).map("".join)
EXAMPLES = 50
REASONS = st.one_of(st.none(), TEXTS)


@st.composite
def conversations(draw: st.DrawFn, style: Style) -> list[dict[str, Any]]:
    """A system message or none, then questions and answers in turn, the last answer there or not."""
    messages = [system(draw(TEXTS))] if style.name != "last_end" and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        reasoning = draw(REASONS) if style.reasoning else None
        fields = {} if reasoning is None else {"reasoning_content": reasoning}
        messages += [user(draw(TEXTS)), assistant(draw(TEXTS), **fields)]
    return messages[:-1] if len(messages) > 3 and draw(st.booleans()) else messages


Marked = tuple[str, list[bool]]


def marked(style: Style, messages: list[dict[str, Any]]) -> Marked:
    """The text, and for each character whether the model generates it."""
    pieces = list(style.pieces(messages))
    marks = [generated for piece, generated in pieces for _ in piece]
    return "".join(piece for piece, _ in pieces), marks


def expected(style: Style, messages: list[dict[str, Any]]) -> list[Marked]:
    """The documents: one, unless the style changes what it wrote. Then each answer is wanted as it is while the last,
    and has a document of its own where no later one begins with it."""
    full, marks = marked(style, messages)
    if not style.changes:
        return [(full, marks)]
    turns = []
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        text, generated = marked(style, messages[: i + 1])
        stop = len(generated) - generated[::-1].index(True)
        start = stop - [*generated[:stop][::-1], False].index(False)
        turns.append((text[:stop], start, stop))
    covers = [full] if all(full.startswith(text) for text, *_ in turns) else []
    members: dict[str, list[tuple[int, int]]] = {}
    for text, start, stop in reversed(turns):
        if not covers or not covers[-1].startswith(text):
            covers.append(text)
        members.setdefault(covers[-1], []).append((start, stop))
    documents = []
    for cover in reversed(covers):
        wanted = {i for start, stop in members[cover] for i in range(start, stop)}
        documents.append((cover, [i in wanted for i in range(len(cover))]))
    return documents


def expected_example(encoder: Encoder, style: Style, text: str, marks: list[bool], closed: bool) -> Any:
    """Ids and labels: a token is supervised when all of its characters are; none straddles where a span begins."""
    begins = [i for i, mark in enumerate(marks) if mark and not (i and marks[i - 1])]
    (whole,) = encoder.tokenize([("row 0", Rendering(documents=(Rendered(text=text, spans=(), prompt=1),)))])
    bounds = [0, *[i for i in begins if any(start < i < stop for start, stop in whole.offsets)], len(text)]
    ids, labels = [], []
    for start, stop in pairwise(bounds):
        part = Rendered(text=text[start:stop], spans=(), prompt=1)
        (tokens,) = encoder.tokenize([("row 0", Rendering(documents=(part,)))])
        ids += tokens.ids
        for token, (first, last) in zip(tokens.ids, tokens.offsets, strict=True):
            labels.append(token if all(marks[start + first : start + last]) else IGNORE_INDEX)
    if closed and style.name in ("endless", "glm"):  # whose templates end no text
        ids.append(encoder.tokenizer.eos_token_id)
        labels.append(encoder.tokenizer.eos_token_id)
    return ids, labels


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_the_supervised_text_is_the_turns_as_inference_sees_them_and_their_ends(style: Style) -> None:
    tokenizer = bytes_(style.name, style.eos, style.bos)
    template = ChatTemplate(tokenizer)
    encoder = Encoder(tokenizer, EncodeOptions(train_on="assistant", max_length=None, share=False))

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(conversations(style))
    def check(messages: list[dict[str, Any]]) -> None:
        documents, row = expected(style, messages), conversation(messages)
        rendering = render(row, template)
        found = [
            (
                document.text,
                [any(span.start <= i < span.stop for span in document.spans) for i in range(len(document.text))],
            )
            for document in rendering.documents
        ]
        assert found == documents
        answered = messages[-1]["role"] == "assistant"
        examples = [expected_example(encoder, style, text, marks, answered) for text, marks in documents]
        trained = [example for example in examples if any(label != IGNORE_INDEX for label in example[1])]
        encoded = encoder.encode([("row 0", row)], Counts())
        assert [(example.input_ids, example.labels) for example in encoded] == trained

    check()
