"""Random conversations in every style: what is supervised is what the style says, character by character.

The tokenizer works on bytes and has merges that cross the bounds of characters and words, so tokens straddle spans. The
expected labels come from a slow loop over the offsets of every token.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.styles import STYLES, Style, assistant, bytes_, conversation, system, user
from tunesmith.data.chat import ChatTemplate, Rendered, render
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder
from tunesmith.types import IGNORE_INDEX

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


def expected(style: Style, messages: list[dict[str, Any]]) -> tuple[str, list[bool]]:
    """The text, and for each character whether the model generates it."""
    pieces = list(style.pieces(messages))
    marks = [generated for piece, generated in pieces for _ in piece]
    return "".join(piece for piece, _ in pieces), marks


def expected_example(encoder: Encoder, style: Style, text: str, marks: list[bool], answered: bool) -> Any:
    """Ids and labels: a token is supervised when all of its characters are."""
    (tokens,) = encoder.tokenize([("row 0", Rendered(text=text, spans=(), prompt=1))])
    ids, offsets = tokens.ids, tokens.offsets
    labels = [i if all(marks[start:stop]) else IGNORE_INDEX for i, (start, stop) in zip(ids, offsets, strict=True)]
    if answered and style.name in ("endless", "glm"):  # whose templates end no text
        ids.append(encoder.tokenizer.eos_token_id)
        labels.append(encoder.tokenizer.eos_token_id)
    return ids, labels


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_the_supervised_text_is_the_turns_as_rendered_and_their_ends(style: Style) -> None:
    tokenizer = bytes_(style.name, style.eos, style.bos)
    template = ChatTemplate(tokenizer)
    encoder = Encoder(tokenizer, EncodeOptions(train_on="assistant", max_length=None))

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(conversations(style))
    def check(messages: list[dict[str, Any]]) -> None:
        text, marks = expected(style, messages)
        row = conversation(messages)
        rendered = render(row, template, "assistant")
        assert rendered.text == text
        assert "".join(text[span.start : span.stop] for span in rendered.spans) == "".join(
            character for character, mark in zip(text, marks, strict=True) if mark
        )
        answered = messages[-1]["role"] == "assistant"
        ids, labels = expected_example(encoder, style, text, marks, answered)
        examples = encoder.encode([("row 0", row)], Counts())
        if all(label == IGNORE_INDEX for label in labels):
            assert examples == []
        else:
            assert [(example.input_ids, example.labels) for example in examples] == [(ids, labels)]
            whole = tokenizer(text, add_special_tokens=False).input_ids
            assert ids[: len(whole)] == whole

    check()
