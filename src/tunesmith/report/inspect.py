"""The inspect view: the tokens of a collated row, readable, with what is trained on set apart.

    row of the batch -> pieces (text, ids, weight) -> Document, InspectedRow -> `rich` text, or an HTML page

A piece is a token, or several that share a character: Chinese characters and emoji are often split over tokens. In a
terminal without colours the supervised text stands between marks, so that the mask is never lost:

    <|im_start|>user⏎
    Hi<|im_end|>⏎
    <|im_start|>assistant⏎
    ⟦Hello!<|im_end|>⟧⏎
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

from tunesmith.report.page import facts, whole_page
from tunesmith.text import counted
from tunesmith.types import IGNORE_INDEX

if TYPE_CHECKING:
    from tunesmith.data.tokenize import Counts

MOST_TOKENS = 8
"""Of a piece. A character has at most four bytes; more tokens than those are joined when they overlap."""
REPLACEMENT = "\ufffd"
OPEN, CLOSE = "⟦", "⟧"
TIMES = "\N{MULTIPLICATION SIGN}"

# Black on green, bold, whatever the terminal's own colours are; two greens in turn tell neighbouring tokens apart.
SUPERVISED = ("bold color(16) on color(114)", "bold color(16) on color(151)")
SUPERVISED_SPECIAL = "bold underline color(54) on color(114)"
UNSUPERVISED, UNSUPERVISED_SPECIAL = "dim", "magenta"
WEIGHT, IDS, BOUNDARY = "bold cyan", "cyan", "bold"

SCORED = ", scored at its end"
"""Behind the name of a side of a pair of which nothing is learned but its score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What the view needs of a tokenizer."""

    decode: Callable[[list[int]], str]
    """Token ids to text, special tokens and spaces as they are."""
    token: Callable[[int], str]
    """A token's own name."""
    special: frozenset[int]
    """The special tokens and the end-of-sequence token: what can end a text."""

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        """That of a `transformers` tokenizer."""
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        return cls(
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            token=lambda index: str(tokenizer.convert_ids_to_tokens(index)),
            special=frozenset(special | ({tokenizer.eos_token_id} - {None})),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Readable text of one token, or of the few that share its characters. They have one weight and one document."""

    text: str
    ids: tuple[int, ...]
    weight: float = 0.0
    """What its loss is multiplied with; 0 where it is not supervised."""
    special: bool = False
    document: int = 0

    @property
    def supervised(self) -> bool:
        return self.weight != 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """The pieces that attend to each other: an example, or what a pack holds of one."""

    pieces: tuple[Piece, ...]
    name: str = ""
    """What it is of a pair: the prompt, or one of the answers behind it."""

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def supervised(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.supervised)

    @property
    def last(self) -> Piece | None:
        """The last supervised piece, white space left aside: what a model tuned on this stops with if it is special."""
        return next((piece for piece in reversed(self.pieces) if piece.supervised and piece.text.strip()), None)

    @property
    def ends(self) -> bool:
        return self.last is not None and self.last.special

    def summary(self) -> str:
        """`152 tokens, 87 supervised (57%), ends with <|im_end|>`."""
        if self.name and not self.supervised:
            return f"{self.tokens:,} tokens, which both answers continue"
        parts = [f"{self.tokens:,} tokens, {_share(self.supervised, self.tokens)}"]
        weights = sorted({piece.weight for piece in self.pieces if piece.supervised})
        if weights not in ([], [1.0]):
            parts.append("weight " + " and ".join(f"{weight:g}" for weight in weights))
        if self.last is not None:
            name = "".join(part for part, _ in marked(self.last.text))
            parts.append(f"ends with {name}" if self.ends else f"no end token is learned, the last is “{name}”")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectedRow:
    """A prepared row; `title` says which ("example 3 of 998"). Packs have several documents, and so have conversations
    that are trained turn by turn; of these, `computed` tokens go through the model, those that they share once."""

    title: str
    documents: tuple[Document, ...]
    computed: int | None = None

    def summary(self) -> str:
        if len(self.documents) == 1:
            return self.documents[0].summary()
        tokens = sum(document.tokens for document in self.documents)
        supervised = sum(document.supervised for document in self.documents)
        ends = sum(document.ends for document in self.documents)
        answers = sum(document.name in ("chosen", "rejected") for document in self.documents)
        listed = f"{len(self.documents)} documents" if not answers else counted(answers // 2, "pair")
        documents = f"{listed}, {ends} of them with an end token"
        if answers:
            documents = f"{listed}, {ends} of {answers} answers with an end token"
        elif any(document.name.endswith(SCORED) for document in self.documents):
            pairs = sum(document.name.endswith(SCORED) for document in self.documents) // 2
            documents = f"{counted(pairs, 'pair')}, each side scored at its end"
        once = "" if self.computed in (None, tokens) else f" ({self.computed:,} computed: what documents share, once)"
        return f"{tokens:,} tokens{once}, {_share(supervised, tokens)}, {documents}"


def _share(supervised: int, tokens: int) -> str:
    return f"{supervised:,} supervised ({supervised / max(tokens, 1):.0%})"


def inspect_row(
    title: str,
    input_ids: Sequence[int],
    labels: Sequence[int],
    weights: Sequence[float] | None,
    lengths: Sequence[int],
    vocabulary: Vocabulary,
    names: Sequence[str] = (),
) -> InspectedRow:
    """A row's documents, one after another: T ids, labels (unshifted) and weights, their token counts, and of pairs
    their names."""
    row = pieces(input_ids, labels, weights, lengths, vocabulary)
    documents = tuple(
        Document(pieces=tuple(part), name=names[number] if names else "")
        for number, part in groupby(row, key=lambda piece: piece.document)
    )
    return InspectedRow(title=title, documents=documents)


# Tokens to pieces


def pieces(
    input_ids: Sequence[int],
    labels: Sequence[int],
    weights: Sequence[float] | None,
    lengths: Sequence[int],
    vocabulary: Vocabulary,
) -> list[Piece]:
    """The pieces of a row in order; all its ids are in them. Shapes as in `inspect_row`.

    A token of weight 0 counts as unsupervised: its loss is multiplied with 0.
    """
    weights = weights if weights is not None else [1.0] * len(input_ids)
    effective = [0.0 if label == IGNORE_INDEX else weight for label, weight in zip(labels, weights, strict=True)]
    row: list[Piece] = []
    start = 0
    for document, length in enumerate(lengths):
        context: tuple[int, ...] = ()
        stop = start + length
        while start < stop:
            special = input_ids[start] in vocabulary.special
            window = 1 if special else _window(input_ids, effective, start, stop, vocabulary)
            ids, text = _readable(tuple(input_ids[start : start + window]), context, vocabulary, special)
            row.append(Piece(text=text, ids=ids, weight=effective[start], special=special, document=document))
            context = ids
            start += len(ids)
    return row


def _window(ids: Sequence[int], weights: Sequence[float], start: int, stop: int, vocabulary: Vocabulary) -> int:
    """How many tokens from `start` could form a piece: of one weight, and none of them special."""
    size = 1
    most = min(MOST_TOKENS, stop - start)
    while size < most and weights[start + size] == weights[start] and ids[start + size] not in vocabulary.special:
        size += 1
    return size


def _readable(
    window: tuple[int, ...], context: tuple[int, ...], vocabulary: Vocabulary, special: bool
) -> tuple[tuple[int, ...], str]:
    """The fewest tokens at the front of `window` that are whole characters, and their text.

    Where there are none (a character that was cut off, or a replacement character that is in the data), one token with
    its bytes written out.
    """
    for size in range(1, len(window) + 1):
        text = vocabulary.token(window[0]) if special else _in_context(window[:size], context, vocabulary)
        if REPLACEMENT not in text:
            return window[:size], text or vocabulary.token(window[0])
    return window[:1], _bytes_shown(vocabulary.token(window[0]))


def _in_context(ids: tuple[int, ...], context: tuple[int, ...], vocabulary: Vocabulary) -> str:
    """What `ids` add to the text of `context`: decoders drop a first word's space, or put one before the others."""
    before = vocabulary.decode(list(context)) if context else ""
    whole = vocabulary.decode([*context, *ids])
    # After a character that was cut off, decoders may write one replacement for its bytes and for those that follow.
    joins = whole.startswith(before) and REPLACEMENT not in before
    return whole[len(before) :] if joins else vocabulary.decode(list(ids))


PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
"""The characters that byte-level tokenizers write bytes as (GPT-2's table), to those bytes."""


def _bytes_shown(token: str) -> str:
    r"""A byte-level token as text, with `\xe4` for bytes that are no character; other tokens as they are."""
    if not all(char in BYTES for char in token):
        return token
    return bytes(BYTES[char] for char in token).decode("utf-8", errors="backslashreplace")


# Characters that would not be seen

HIDDEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs")
"""Unicode's categories of control, format and private characters, and of separators."""
KEPT = "\u3000"
"""The ideographic space is as wide as a character, and seen."""
JOINERS = "\u200c\u200d"
"""Persian and many emoji are written with them; between characters they belong there."""


def shown(row: Sequence[Piece]) -> Iterator[tuple[Piece, list[tuple[str, bool]]]]:
    """Each piece with its text as it is shown: parts, and whether a part is a mark in the place of a character.

    A newline is ⏎ and a line break, a tab ⇥, a space · unless it lies between two words of the same supervision;
    control and invisible characters are written out, so that data can't steer the terminal.
    """
    for index, piece in enumerate(row):
        before = row[index - 1] if index else None
        after = row[index + 1] if index + 1 < len(row) else None
        left = before.text[-1:] if before and _continues(before, piece) else ""
        right = after.text[:1] if after and _continues(piece, after) else ""
        yield piece, marked(piece.text, left, right)


def _continues(first: Piece, second: Piece) -> bool:
    return first.weight == second.weight and not (first.special or second.special)


def marked(text: str, left: str = "", right: str = "") -> list[tuple[str, bool]]:
    """The parts of `text` between two neighbours, as in `shown`."""
    before, after = [left, *text[:-1]], [*text[1:], right]
    marks = [_mark(*neighbours) for neighbours in zip(before, text, after, strict=True)]
    runs = groupby(zip(text, marks, strict=True), key=lambda pair: pair[1] is not None)
    return [("".join(mark or char for char, mark in run), is_mark) for is_mark, run in runs]


def _mark(before: str, char: str, after: str) -> str | None:
    """What is shown in the place of `char`, or None for the character itself."""
    between = bool(before.strip() and after.strip())
    if char == " ":
        return None if between else "·"
    if char in "\n\t":
        return "⏎\n" if char == "\n" else "⇥"
    if char in KEPT or (char in JOINERS and between) or unicodedata.category(char) not in HIDDEN:
        return None
    return char.encode("unicode_escape").decode()


# What became of the data


def count_facts(counts: "Counts") -> list[tuple[str, str]]:
    """Labels and values of a page's head: rows, examples, tokens, what was dropped and where."""
    lost = f"; {counts.truncated:,} truncated, losing {counts.lost_tokens:,} tokens" if counts.truncated else ""
    about = [
        ("rows", f"{counts.rows:,}, which make {counts.examples:,} examples{lost}"),
        ("tokens", f"{counts.tokens:,}, {_share(counts.supervised, counts.tokens)}"),
    ]
    for reason, (count, places) in counts.dropped.items():
        more = ", ..." if count > len(places) else ""
        about.append(("dropped", f"{count:,}: {reason} ({', '.join(places)}{more})"))
    return about


# The terminal


def legend(*, plain: bool) -> Text:
    """The line that explains the view."""
    text = Text()
    if plain:
        text.append(f"{OPEN}supervised{CLOSE}  not supervised")
    else:
        for part, style in zip(("super", "vised"), SUPERVISED, strict=True):
            text.append(part, style)
        for part, style in (
            ("not supervised", UNSUPERVISED),
            ("special", UNSUPERVISED_SPECIAL),
            ("special, supervised", SUPERVISED_SPECIAL),
        ):
            text.append("  ").append(part, style)
    return text.append(f"  ⏎ newline  · space  ⇥ tab  {TIMES}0.5 weight\n")


def terminal(row: InspectedRow, *, plain: bool, ids: bool) -> Text:
    """A row as text for a terminal; `plain` marks supervision with ⟦ ⟧ instead of colours, `ids` adds token ids."""
    text = Text()
    text.append(row.title, BOUNDARY).append(f": {row.summary()}\n")
    for number, document in enumerate(row.documents, start=1):
        if len(row.documents) > 1:
            text.append(f"── {document.name or f'document {number} of {len(row.documents)}'}", BOUNDARY)
            text.append(f": {document.summary()}\n")
        for part, style in _fragments(document, plain=plain, ids=ids):
            text.append(part, style)
        if not text.plain.endswith("\n"):
            text.append("\n")
    return text


def _fragments(document: Document, *, plain: bool, ids: bool) -> list[tuple[str, str]]:
    """Parts of a document with their styles."""
    fragments: list[tuple[str, str]] = []
    number = 0
    for weight, run in groupby(shown(document.pieces), key=lambda pair: pair[0].weight):
        if weight and plain:
            fragments.append((OPEN, ""))
        if weight not in (0, 1):
            fragments.append((f"{TIMES}{weight:g} ", WEIGHT))
        for piece, parts in run:
            number += 1
            text = "".join(part for part, _ in parts)
            if piece.special:
                style = SUPERVISED_SPECIAL if piece.supervised else UNSUPERVISED_SPECIAL
            else:
                style = SUPERVISED[number % 2] if piece.supervised else UNSUPERVISED
            fragments.append((text.removesuffix("\n"), style))
            if ids:
                fragments.append((f"⟨{','.join(map(str, piece.ids))}⟩", IDS))
            if text.endswith("\n"):
                fragments.append(("\n", ""))
        if weight and plain:
            fragments.insert(len(fragments) - (fragments[-1][0] == "\n"), (CLOSE, ""))  # on the line that it closes
    return fragments


# The HTML page

STYLE = """
:root { --tint: light-dark(#edf0f3, #22272c); --green: light-dark(#bde8c6, #1d4d2b);
  --green2: light-dark(#d8f3dd, #163c21); --special: light-dark(#8a1a8a, #ee9bee); }
h3 { margin: 0; } .warn { font-weight: 600; }
.pack { border: 1px solid var(--line); border-radius: 6px; background: var(--code); }
.pack > section + section { border-top: 3px double var(--faint); }
.pack h3 { padding: .3rem .8rem 0; }
.tokens { padding: .6rem .8rem; font: 14px/1.75 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.t { color: var(--faint); padding: .1em 0; } .t.b { background: var(--tint); }
.s { color: var(--text); font-weight: 650; background: var(--green); border-bottom: 2px solid var(--edge); }
.s.b { background: var(--green2); } .x { color: var(--special); font-style: italic; }
.m { opacity: .6; font-weight: 400; font-style: normal; }
.w { font: 600 .75em system-ui, sans-serif; border: 1px solid var(--edge); border-radius: 3px; padding: 0 .25em; }
.i { display: none; font: .7em ui-monospace, monospace; color: var(--faint); padding: 0 .3em 0 .1em; }
.i::before { content: "\\2060"; } /* a word joiner: ids stay on the line of their token */
body:has(#ids:checked) .i { display: inline; }
.legend { position: sticky; top: 0; background: var(--page); border-bottom: 1px solid var(--line); padding: .5rem 0; }
.legend > label { margin-right: 1.2rem; }
"""

LEGEND = """<p class="legend">
<span><span class="t s">super</span><span class="t s b">vised</span></span>
<span><span class="t">not super</span><span class="t b">vised</span></span>
<span><span class="t x">special</span></span>
<span><span class="m">⏎</span> newline, <span class="m">·</span> space, <span class="m">⇥</span> tab</span>
<span><span class="w">&times;0.5</span> weight</span>
<label><input type="checkbox" id="ids"{checked}> token ids</label>
</p>
<p>Shades tell neighbouring tokens apart. Nothing predicts the first token of a document, so it is never trained on.</p>
"""


def page(title: str, about: Sequence[tuple[str, str]], rows: Sequence[InspectedRow], *, ids: bool = False) -> str:
    """The whole page. `about` are labels and values for its head; `ids` shows token ids from the start.

    Supervision is shown three times over (colour, weight of the letters, a line below), so that it needs no colour
    vision.
    """
    parts = [f"<h1>{escape(title)}</h1>\n", facts(about), LEGEND.format(checked=" checked" if ids else "")]
    return whole_page(title, [*parts, rows_html(rows)], STYLE)


def rows_html(rows: Sequence[InspectedRow]) -> str:
    """The rows alone, for a page that has `STYLE`."""
    return "".join(part for row in rows for part in _row(row))


def _row(row: InspectedRow) -> Iterator[str]:
    packed = len(row.documents) > 1
    lacks_end = not packed and not row.documents[0].ends
    yield f'<h2>{escape(row.title)} {_summary(row.summary(), lacks_end)}</h2>\n<div class="pack">\n'
    for number, document in enumerate(row.documents, start=1):
        name = document.name or f"document {number} of {len(row.documents)}"
        warns = not document.ends and document.name != "prompt"
        heading = f"{name} {_summary(document.summary(), warns)}"
        yield f"<section>{f'<h3>{heading}</h3>' if packed else ''}"
        yield from _document(document)
        yield "</section>\n"
    yield "</div>\n"


def _summary(text: str, warn: bool) -> str:
    attribute = ' class="warn"' if warn else ""
    return f"<small{attribute}>{escape(text)}</small>"


def _document(document: Document) -> Iterator[str]:
    yield '<div class="tokens">'
    last_weight = 0.0
    for number, (piece, parts) in enumerate(shown(document.pieces)):
        if piece.weight not in (0, 1, last_weight):
            yield f'<span class="w">&times;{piece.weight:g}</span>'
        last_weight = piece.weight
        classes = " ".join(["t", *["s"] * piece.supervised, *["x"] * piece.special, *["b"] * (number % 2)])
        # The ids of a newline stay on its line.
        line_break = "\n" if parts[-1][0].endswith("\n") else ""
        parts[-1] = (parts[-1][0].removesuffix("\n"), parts[-1][1])
        text = "".join(f'<span class="m">{escape(part)}</span>' if mark else escape(part) for part, mark in parts)
        yield f'<span class="{classes}" title="{escape(_title(piece))}">{text}</span>'
        yield f'<span class="i">{",".join(map(str, piece.ids))}</span>{line_break}'
    yield "</div>"


def _title(piece: Piece) -> str:
    """What the pointer shows over a piece."""
    ids = ", ".join(map(str, piece.ids))
    shared = f" ({len(piece.ids)} tokens share a character)" if len(piece.ids) > 1 else ""
    weight = "not supervised" if not piece.supervised else f"supervised, weight {piece.weight:g}"
    return f"id {ids}{shared}: {weight}"
