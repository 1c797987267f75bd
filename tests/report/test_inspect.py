"""The inspect view shows every token once, readable, with the mask that training uses; data can't break out of it, in a
terminal or in a page."""

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.tokenize import Counts
from tunesmith.report.inspect import (
    BYTES,
    REPLACEMENT,
    Document,
    InspectedRow,
    Piece,
    Vocabulary,
    count_facts,
    inspect_row,
    legend,
    page,
    pieces,
    shown,
    terminal,
)
from tunesmith.types import IGNORE_INDEX

SPECIAL = ["<|im_start|>", "<|im_end|>"]
START, END = 0, 1
END_NAME = SPECIAL[END]


def byte_level(*merges: bytes) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 2 special tokens, the 256 bytes, then a token for each of `merges`.

    A merge joins a token that is there, its beginning, with one byte.
    """
    char = {value: name for name, value in BYTES.items()}
    names = [*SPECIAL, *(char[byte] for byte in range(256))]
    pairs = [("".join(char[byte] for byte in merge[:-1]), char[merge[-1]]) for merge in merges]
    vocab = {name: index for index, name in enumerate([*names, *("".join(pair) for pair in pairs)])}
    backend = Tokenizer(models.BPE(vocab, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_NAME, extra_special_tokens=[SPECIAL[0]])


BYTEWISE = byte_level()
WORDS = Vocabulary.of(BYTEWISE)


def encode(text: str, tokenizer: PreTrainedTokenizerFast = BYTEWISE) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def found_in(ids: Sequence[int], words: Vocabulary = WORDS) -> list[tuple[str, tuple[int, ...]]]:
    return [(piece.text, piece.ids) for piece in pieces(ids, ids, None, [len(ids)], words)]


def inspected(*parts: tuple[str, float], title: str = "example 1 of 1") -> InspectedRow:
    """A row of one document: texts with their weights, 0 for those that are not supervised."""
    ids = [token for text, _ in parts for token in encode(text)]
    weights = [weight for text, weight in parts for _ in encode(text)]
    labels = [token if weight else IGNORE_INDEX for token, weight in zip(ids, weights, strict=True)]
    return inspect_row(title, ids, labels, weights, [len(ids)], WORDS)


def plain(row: InspectedRow, *, ids: bool = False) -> list[str]:
    """The lines of a row in a terminal without colours, without its heading."""
    return terminal(row, plain=True, ids=ids).plain.splitlines()[1:]


# Tokens to pieces


def test_a_character_of_several_tokens_is_one_piece_with_all_their_ids() -> None:
    ids = encode("a中🚀")
    assert len(ids) == 8
    assert found_in(ids) == [("a", (ids[0],)), ("中", tuple(ids[1:4])), ("🚀", tuple(ids[4:]))]


def test_tokens_that_overlap_in_their_characters_are_one_piece() -> None:
    first, second = "中".encode(), "文".encode()
    bridge = first[2:] + second[:1]
    tokenizer = byte_level(bridge)
    ids = encode("中文", tokenizer)
    assert len(ids) == 5  # two bytes, the bridge, two bytes
    assert found_in(ids, Vocabulary.of(tokenizer)) == [("中文", tuple(ids))]


def test_a_character_that_was_cut_off_is_written_as_bytes() -> None:
    ids = encode("a中")[:-1]
    assert found_in(ids) == [("a", (ids[0],)), (r"\xe4", (ids[1],)), (r"\xb8", (ids[2],))]


def test_bytes_after_a_character_that_was_cut_off_are_written_out_too() -> None:
    # E5 A1 is the beginning of a character: decoders write one replacement for both.
    assert [text for text, _ in found_in(encode("塞")[:2])] == [r"\xe5", r"\xa1"]


def test_a_replacement_character_that_is_in_the_data_is_shown_and_does_not_swallow_its_neighbours() -> None:
    bad = REPLACEMENT.encode()
    tokenizer = byte_level(bad[:2], bad)
    ids = encode(f"x{REPLACEMENT}y中", tokenizer)
    texts = [text for text, _ in found_in(ids, Vocabulary.of(tokenizer))]
    assert texts == ["x", REPLACEMENT, "y", "中"]


def test_a_piece_never_mixes_supervision_weights_documents_or_special_tokens() -> None:
    one, two, three = encode("中")
    ids = [one, two, three, one, END, one, two, three]
    labels = [IGNORE_INDEX, two, three, one, END, *[one, two, three]]
    found = pieces(ids, labels, [1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0], [4, 4], WORDS)
    assert [(piece.text, piece.weight, piece.special, piece.document) for piece in found] == [
        (r"\xe4", 0.0, False, 0),
        (r"\xb8", 1.0, False, 0),
        (r"\xad", 0.5, False, 0),
        (r"\xe4", 1.0, False, 0),
        ("<|im_end|>", 1.0, True, 1),
        ("中", 1.0, False, 1),
    ]


def test_a_token_of_weight_0_counts_as_unsupervised() -> None:
    (piece,) = pieces([70], [70], [0.0], [1], WORDS)
    assert not piece.supervised


TEXT = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=30)
MERGES = ("中".encode()[:2], "中".encode()[2:] + "文".encode()[:1], b"ab", "é".encode(), "🚀".encode()[:2])
MERGED = byte_level(*MERGES)
MERGED_WORDS = Vocabulary.of(MERGED)


@settings(deadline=None)
@given(st.lists(TEXT | st.text("中文ab é🚀\n", max_size=30), max_size=4), st.data())
def test_pieces_hold_every_id_in_order_and_the_text_of_every_document(texts: list[str], data: st.DataObject) -> None:
    documents = [encode(text, MERGED) for text in texts]
    ids = [token for document in documents for token in document]
    found = pieces(ids, ids, None, [len(document) for document in documents], MERGED_WORDS)
    assert [token for piece in found for token in piece.ids] == ids
    for number, text in enumerate(texts):
        assert "".join(piece.text for piece in found if piece.document == number) == text
    # Any mask at all: nothing is lost, and nothing unreadable is shown.
    labels = [data.draw(st.sampled_from([token, IGNORE_INDEX])) for token in ids]
    masked = pieces(ids, labels, None, [len(document) for document in documents], MERGED_WORDS)
    assert [piece.supervised for piece in masked for _ in piece.ids] == [label != IGNORE_INDEX for label in labels]
    assert [token for piece in masked for token in piece.ids] == ids
    assert not any(REPLACEMENT in piece.text for piece in masked)


def test_spaces_of_a_sentencepiece_tokenizer_are_kept_and_its_bytes_joined() -> None:
    names = ["<unk>", "</s>", "▁Hi", "▁there", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    rocket = [vocab[f"<0x{byte:02X}>"] for byte in "🚀".encode()]
    ids = [2, 3, 4, *rocket, 3, *rocket[:2], 1]
    texts = [text for text, _ in found_in(ids, Vocabulary.of(tokenizer))]
    assert texts == ["Hi", " there", "!", "🚀", " there", "<0xF0>", "<0x9F>", "</s>"]


def test_real_chinese_text_is_readable_whatever_its_tokens(shared_data: Path) -> None:
    rows = json.loads((shared_data / "alpaca_zh_demo.json").read_text(encoding="utf-8"))[:60]
    outputs = [row["output"] for row in rows]
    shared = 0
    for text in outputs:
        found = found_in(encode(text, MERGED), MERGED_WORDS)
        assert "".join(text for text, _ in found) == text
        shared += sum(len(ids) > 1 for _, ids in found)
    assert shared > 1000


# What is shown in the place of white space and hidden characters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two words", "two words"),
        ("double  space", "double··space"),
        (" leading, trailing ", "·leading, trailing·"),
        ("end \nnew", "end·⏎\nnew"),
        ("if x:\n  y", "if x:⏎\n··y"),
        ("a\tb", "a⇥b"),
        ("a\r\nb", "a\\r⏎\nb"),
        ("\x1b[31mred\x07\x00\x7f\x9b", r"\x1b[31mred\x07\x00\x7f\x9b"),
        ("no\u00a0break, zero\u200bwidth, \ufeffmark", r"no\xa0break, zero\u200bwidth, \ufeffmark"),
        ("\u202eoverride\u2066", r"\u202eoverride\u2066"),
        ("line\u2028paragraph\u2029", r"line\u2028paragraph\u2029"),
        ("می\u200cرود", "می\u200cرود"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("\u200d", r"\u200d"),
        ("中\u3000文", "中\u3000文"),
        ("e\u0301 ❤\ufe0f", "e\u0301 ❤\ufe0f"),
    ],
)
def test_white_space_is_visible_where_it_matters_and_no_hidden_character_gets_through(text: str, expected: str) -> None:
    row = inspected((text, 0.0)).documents[0].pieces
    assert "".join(part for _, parts in shown(row) for part, _ in parts) == expected


def test_spaces_at_the_edge_of_what_is_supervised_are_visible() -> None:
    assert plain(inspected(("is ", 0), ("Paris", 1))) == ["is·⟦Paris⟧"]
    assert plain(inspected(("is", 0), (" Paris", 1))) == ["is⟦·Paris⟧"]


def test_a_mark_is_told_from_the_same_character_in_the_data() -> None:
    (_, first), (_, second) = shown((Piece(text="·", ids=(1,)), Piece(text=" ", ids=(2,))))
    assert (first, second) == ([("·", False)], [("·", True)])


# The terminal


def test_the_documented_example_without_colours() -> None:
    row = inspected(("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", 0), ("Hello!<|im_end|>", 1), ("\n", 0))
    assert terminal(row, plain=True, ids=False).plain == (
        "example 1 of 1: 29 tokens, 7 supervised (24%), ends with <|im_end|>\n"
        "<|im_start|>user⏎\n"
        "Hi<|im_end|>⏎\n"
        "<|im_start|>assistant⏎\n"
        "⟦Hello!<|im_end|>⟧⏎\n"
    )


def test_ids_follow_their_token_and_stay_on_its_line() -> None:
    a, newline, rocket = encode("a")[0], encode("\n")[0], encode("🚀")
    listed = ",".join(map(str, rocket))
    assert plain(inspected(("a\n", 0), ("🚀", 1)), ids=True) == [f"a⟨{a}⟩⏎⟨{newline}⟩", f"⟦🚀⟨{listed}⟩⟧"]


def test_the_closing_mark_stands_on_the_line_that_it_closes() -> None:
    assert plain(inspected(("a", 0), ("b\n", 1), ("c", 0))) == ["a⟦b⏎⟧", "c"]


def test_a_weight_other_than_1_is_a_number_at_the_front() -> None:
    row = inspected(("a", 0), ("half", 0.5), ("full", 1), ("b", 0))
    assert plain(row) == ["a⟦×0.5 half⟧⟦full⟧b"]  # noqa: RUF001
    assert "weight 0.5 and 1" in row.summary()


def test_with_colours_supervised_text_has_a_background_and_nothing_else_has() -> None:
    row = inspected(("<|im_start|>ask", 0), ("say<|im_end|>", 1), ("after", 0))
    console = Console(color_system="256", force_terminal=True, width=200)
    text = terminal(row, plain=False, ids=False)
    start = text.plain.index("<|im_start|>")
    backgrounds = {"": "", "bg": ""}
    for offset in range(start, len(text)):
        style = text.get_style_at_offset(console, offset)
        backgrounds["bg" if style.bgcolor else ""] += text.plain[offset]
    assert backgrounds == {"": "<|im_start|>askafter\n", "bg": "say<|im_end|>"}


def test_with_colours_neighbouring_supervised_tokens_differ() -> None:
    text = terminal(inspected(("ab", 1)), plain=False, ids=False)
    console = Console(color_system="256", force_terminal=True)
    at = text.plain.index("\n") + 1
    assert text.get_style_at_offset(console, at) != text.get_style_at_offset(console, at + 1)


@pytest.mark.parametrize("is_plain", [True, False])
def test_data_cannot_send_control_sequences_or_markup_to_the_terminal(is_plain: bool) -> None:
    console = Console(color_system=None, force_terminal=False, width=300)
    with console.capture() as capture:
        row = inspected(("\x1b]0;title\x07 [bold]x[/bold] \x9b1m\r", 1))
        console.print(terminal(row, plain=is_plain, ids=False), soft_wrap=True)
    output = capture.get()
    assert not any(char < " " and char != "\n" for char in output)
    assert "\x9b" not in output
    assert "[bold]x[/bold]" in output


def test_documents_of_a_pack_are_told_apart() -> None:
    ids = [START, *encode("ab"), END, START, *encode("c")]
    labels = [IGNORE_INDEX, *ids[1:4], IGNORE_INDEX, ids[5]]
    row = inspect_row("pack 2 of 9", ids, labels, None, [4, 2], WORDS)
    assert terminal(row, plain=True, ids=False).plain.splitlines() == [
        "pack 2 of 9: 6 tokens, 4 supervised (67%), 2 documents, 1 of them with an end token",
        "── document 1 of 2: 4 tokens, 3 supervised (75%), ends with <|im_end|>",
        "<|im_start|>⟦ab<|im_end|>⟧",
        "── document 2 of 2: 2 tokens, 1 supervised (50%), no end token is learned, the last is “c”",
        "<|im_start|>⟦c⟧",
    ]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([("ask", 0.0), ("say<|im_end|>", 1.0)], "ends with <|im_end|>"),
        ([("ask", 0.0), ("say<|im_end|>\n", 1.0)], "ends with <|im_end|>"),
        ([("ask", 0.0), ("say", 1.0), ("<|im_end|>", 0.0)], "no end token is learned, the last is “y”"),
        ([("ask", 0.0), ("\x1b", 1.0)], r"no end token is learned, the last is “\x1b”"),
    ],
)
def test_the_summary_says_whether_an_end_token_is_learned(parts: list[tuple[str, float]], expected: str) -> None:
    assert inspected(*parts).summary().endswith(f", {expected}")


def test_a_document_without_supervision_has_no_end() -> None:
    assert inspected(("ask", 0)).summary() == "3 tokens, 0 supervised (0%)"
    assert Document(pieces=()).summary() == "0 tokens, 0 supervised (0%)"


def test_the_legend_shows_the_marks_in_use() -> None:
    assert "⟦supervised⟧" in legend(plain=True).plain
    assert "⟦" not in legend(plain=False).plain


# Counts


def test_the_counts_name_what_was_dropped_and_where() -> None:
    counts = Counts(rows=1200, examples=1190, tokens=5000, supervised=1000, truncated=3, lost_tokens=70)
    for line in range(7):
        counts.drop("no supervised token", f"x.jsonl, line {line}")
    counts.drop("longer than max_length 9", "x.jsonl, line 40")
    assert count_facts(counts) == [
        ("rows", "1,200, which make 1,190 examples; 3 truncated, losing 70 tokens"),
        ("tokens", "5,000, 1,000 supervised (20%)"),
        ("dropped", "7: no supervised token (" + ", ".join(f"x.jsonl, line {line}" for line in range(5)) + ", ...)"),
        ("dropped", "1: longer than max_length 9 (x.jsonl, line 40)"),
    ]


# The HTML page


class Reader(HTMLParser):
    """Text by the innermost class, the tags and their attributes; fails where tags are not closed in order."""

    VOID = ("meta", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.text: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1][1] if self.open else "", data))

    def tokens(self) -> str:
        """The text of all token spans, marks included, behind the legend's."""
        start = next(i for i, (_, data) in enumerate(self.text) if data.startswith("example"))
        return "".join(data for name, data in self.text[start:] if name.startswith("t ") or name in ("t", "m"))


HOSTILE = "<script>alert('&amp;')</script><img src=x onerror=\"x\">\n</div></section>]]>-->"


def test_the_page_escapes_data_in_every_place() -> None:
    row = inspected((HOSTILE, 0), (HOSTILE, 1), title=f"example {HOSTILE}")
    reader = Reader(page(HOSTILE, [(HOSTILE, HOSTILE)], [row]))
    assert reader.tokens() == HOSTILE.replace("\n", "⏎") * 2
    tags = {tag for tag, _ in reader.tags}
    assert tags.isdisjoint({"script", "img", "link", "iframe"})
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on") or name == "src"]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = page("t", [], [inspected(("a", 0), ("b<|im_end|>", 1))])
    assert not [word for word in ("http:", "https:", "url(", "@import", "<script", "src=", "href=") if word in html]
    assert "default-src 'none'" in html


def test_the_page_marks_supervised_and_special_tokens_and_weights() -> None:
    reader = Reader(page("t", [], [inspected(("ask", 0), ("sa", 0.25), ("y<|im_end|>", 1))]))
    spans = [attributes for _, attributes in reader.tags if "title" in attributes]
    names = [set((attributes["class"] or "").split()) - {"b"} for attributes in spans]
    assert names == [*[{"t"}] * 3, *[{"t", "s"}] * 3, {"t", "s", "x"}]
    a = encode("a")[0]
    assert [spans[index]["title"] for index in (0, 4, 6)] == [
        f"id {a}: not supervised",
        f"id {a}: supervised, weight 0.25",
        f"id {END}: supervised, weight 1",
    ]
    weights = [data for name, data in reader.text if name == "w"]
    assert weights[1:] == ["\N{MULTIPLICATION SIGN}0.25"]  # the first is the legend's


def test_the_page_has_all_ids_and_shows_them_on_demand() -> None:
    row = inspected(("é", 1))
    ids = ",".join(map(str, encode("é")))
    for wanted in (True, False):
        reader = Reader(page("t", [], [row], ids=wanted))
        assert [data for name, data in reader.text if name == "i"] == [ids]
        (box,) = (attributes for tag, attributes in reader.tags if tag == "input")
        assert ("checked" in box) is wanted


def test_the_page_separates_documents_and_warns_where_no_end_token_is_learned() -> None:
    ids = [*encode("ab"), END, *encode("c")]
    row = inspect_row("pack 1 of 1", ids, ids, None, [3, 1], WORDS)
    reader = Reader(page("t", [], [row]))
    assert [tag for tag, _ in reader.tags].count("section") == 2
    warnings = [data for name, data in reader.text if name == "warn"]
    assert warnings == ["1 tokens, 1 supervised (100%), no end token is learned, the last is “c”"]
