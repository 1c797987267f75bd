"""Texts and conversations to supervised tokens: what straddles, what ends, what is cut, what weighs."""

import json
from functools import cache
from itertools import islice
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.data.styles import assistant, bytes_, conversation, system, user, words
from tunesmith.data.arrow import FlatExamples
from tunesmith.data.notes import GLUED, UNANSWERED
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder, joined, token_range, untrimmed
from tunesmith.errors import TunesmithError
from tunesmith.types import IGNORE_INDEX, Example, Row, Text, Tokens

EOS = 2
ONE = conversation([user("Hi"), assistant("Yes")])


def encode(tokenizer: Any, *rows: Row, **options: Any) -> tuple[list[Example], Counts]:
    counts = Counts()
    encoder = Encoder(tokenizer, EncodeOptions(**options))
    return encoder.encode([(f"row {i}", row) for i, row in enumerate(rows)], counts), counts


def marked(tokenizer: Any, row: Row, **options: Any) -> str:
    """The tokens of the one example of `row`, supervised ones in brackets."""
    ((example,), _) = encode(tokenizer, row, **options)
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    assert [label for label in example.labels if label != IGNORE_INDEX] == [
        i for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORE_INDEX
    ]
    return " ".join(
        token if label == IGNORE_INDEX else f"({token})" for token, label in zip(tokens, example.labels, strict=True)
    )


@cache
def llama(*, eos: bool = False) -> Any:
    """As Llama's: a word begins with the space before it, BOS in front (and EOS behind), unknown text in bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    for symbol in ["▁", "a", "b", ":", "▁a", "▁b"]:
        vocabulary[symbol] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    single = "<s> $A </s>" if eos else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def whole_words() -> Any:
    """A token for each word between white space, as classifiers of old have."""
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "Sentiment": 4, "positive": 5, ":": 6, "Yes": 7, "No": 8}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def metaspace(scheme: Any) -> Any:
    """As newer conversions of SentencePiece have it: the space in front comes with the words."""
    made = json.loads(llama().backend_tokenizer.to_str())
    made |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}}
    backend = Tokenizer.from_str(json.dumps(made))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, Any] = {
    "bytes": lambda: bytes_("", "</s>"),
    "llama": llama,
    "llama with an end": lambda: llama(eos=True),
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "words": lambda: words("", "</s>"),
    "whole words": whole_words,
}

# The bounds of what is supervised


def test_a_token_that_would_straddle_the_end_of_the_prompt_is_cut_there() -> None:
    tokenizer = bytes_("", "</s>")
    assert marked(tokenizer, Text(text="a: b", prompt="a:")) == "a : (Ġ) (b) (</s>)"
    assert marked(tokenizer, Text(text="a: b", prompt="a: ")) == "a :Ġ (b) (</s>)"
    assert marked(tokenizer, Text(text="a: b", prompt="a")) == "a (:Ġ) (b) (</s>)"


def test_a_token_that_straddles_the_end_of_a_span_is_not_in_it() -> None:
    encoding = untrimmed(bytes_("", "</s>")).encode("a: b")
    assert encoding.tokens == ["a", ":Ġ", "b"]
    spans = ((0, 1), (0, 2), (0, 3), (2, 4))
    assert [token_range(encoding, *span) for span in spans] == [(0, 1), (0, 1), (0, 2), (2, 3)]


PAIRS = [
    ("a:", " b"),
    ("a: ", "b"),
    ("a: ", "the"),
    ("Yes ", "No"),
    ("a ", "你"),
    ("你", "😀 你"),
    ("a\n", "\nb"),
    (" ", " a "),
    ("Sentiment: ", "positive"),
    ("a b", "b a"),
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_the_prompt_is_tokenized_as_inference_does_and_the_completion_is_learned_whole(
    kind: str, prompt: str, completion: str
) -> None:
    tokenizer = TOKENIZERS[kind]()
    ((example,), _) = encode(tokenizer, Text(text=prompt + completion, prompt=prompt))
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
    # What inference sends: the prompt, without an end token that the tokenizer would add.
    alone = tokenizer(prompt).input_ids
    assert example.input_ids[:first] == (alone[:-1] if alone[-1:] == [tokenizer.eos_token_id] else alone)
    assert example.labels[first:] == example.input_ids[first:]
    assert example.input_ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(example.input_ids[first:-1])
    assert kind in ("words", "whole words") or text.strip() == completion.strip()
    assert len(example.input_ids) - first > 1, "no token of the completion is learned"


def test_a_text_that_is_supervised_whole_has_the_ids_of_the_tokenizer() -> None:
    for tokenizer in (bytes_("", "</s>"), llama()):
        for text in ("a: b", "a", "你😀 你", "a\n\nb"):
            for row in (Text(text=text), Text(text=text, prompt="")):
                ((example,), _) = encode(tokenizer, row)
                assert example.input_ids == [*tokenizer(text).input_ids, tokenizer.eos_token_id]


def test_all_tokens_of_a_character_of_several_bytes_are_supervised() -> None:
    tokenizer = bytes_("", "</s>")
    assert marked(tokenizer, Text(text="a😀", prompt="a")) == "a (ð) (ŁĺĢ) (</s>)".replace("ŁĺĢ", "Łĺ) (Ģ")
    # A space and the first byte of the character would be one token.
    assert marked(tokenizer, Text(text="a 你", prompt="a ")) == "a Ġ (ä) (½) (ł) (</s>)"
    assert marked(tokenizer, Text(text="a 你", prompt="a")) == "a (Ġä) (½) (ł) (</s>)"


def test_bytes_that_stand_for_an_unknown_character_are_supervised() -> None:
    assert marked(llama(), Text(text="a é", prompt="a")) == "<s> ▁a (▁) (<0xC3>) (<0xA9>) (</s>)"
    assert marked(llama(), Text(text="éa", prompt="é")) == "<s> ▁ <0xC3> <0xA9> (a) (</s>)"


def test_offsets_count_white_space_whatever_the_tokenizer_says() -> None:
    tokenizer = bytes_("", "</s>")
    assert 'trim_offsets":true' in tokenizer.backend_tokenizer.to_str()
    trimmed = tokenizer.backend_tokenizer.encode("a the")
    assert trimmed.offsets[-1] == (2, 5)  # " the" is one token, and its space is left out
    # By these offsets the token would lie behind the prompt "a ", which it does not: it has to be cut.
    assert marked(tokenizer, Text(text="a the", prompt="a ")) == "a Ġ (t) (he) (</s>)"
    assert 'trim_offsets":true' in tokenizer.backend_tokenizer.to_str()  # the tokenizer itself is as it was


def test_offsets_are_mended_inside_a_sequence_of_processors() -> None:
    backend = Tokenizer.from_str(bytes_("", "</s>").backend_tokenizer.to_str())
    added = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", backend.token_to_id("</s>"))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>")
    assert marked(tokenizer, Text(text="a the", prompt="a ")) == "</s> a Ġ (t) (he) (</s>)"


def test_a_normalizer_that_drops_characters_moves_no_bound() -> None:
    backend = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Replace("*", ""), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert marked(tokenizer, Text(text="*A* *B*", prompt="*A* *")) == "a (b) (</s>)"


def test_special_tokens_in_the_text_are_read_as_the_tokenizer_reads_them() -> None:
    tokenizer = llama()
    assert marked(tokenizer, Text(text="a</s>")) == "(<s>) (▁a) (</s>)"
    literally = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", bos_token="<s>", split_special_tokens=True
    )
    ((example,), _) = encode(literally, Text(text="a</s>"))
    assert example.input_ids == [*literally("a</s>").input_ids, EOS]
    assert len(example.input_ids) > 6


# Beginning and end


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", "(<s>) (▁a) (</s>)"),
        ("<s>a", "(<s>) (▁a) (</s>)"),  # brought its own BOS
        ("a</s>", "(<s>) (▁a) (</s>)"),  # and its own EOS
        ("a</s> ", "(<s>) (▁a) (</s>) (▁) (▁)"),
        ("<s>a</s>", "(<s>) (▁a) (</s>)"),
    ],
)
def test_text_begins_with_one_bos_and_ends_with_one_eos(text: str, expected: str) -> None:
    assert marked(llama(), Text(text=text)) == expected
    if not text.endswith(" "):
        assert marked(llama(eos=True), Text(text=text)) == expected  # the tokenizer adds an EOS by itself


@pytest.mark.parametrize("eos", [False, True])
def test_the_end_of_a_completion_is_supervised_whoever_puts_it_there(eos: bool) -> None:
    assert marked(llama(eos=eos), Text(text="a: b", prompt="a:")) == "<s> ▁a : (▁b) (</s>)"
    assert marked(llama(eos=eos), Text(text="a:", prompt="a:")) == "<s> ▁a : (</s>)"


def test_an_end_token_of_the_prompt_is_no_end_of_an_empty_completion() -> None:
    examples, counts = encode(llama(), Text(text="a</s>", prompt="a</s>"))
    assert examples == []
    assert counts.dropped == {"nothing in it to train on": (1, ["row 0"])}


def test_an_unknown_word_at_the_end_does_not_count_as_an_end() -> None:
    tokenizer = words("", "</s>")
    assert marked(tokenizer, Text(text="Yes Zebra")) == "(Yes) ( ) (<unk>) (</s>)"


def test_conversations_have_the_special_tokens_of_their_template_only() -> None:
    tokenizer = llama()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}:{% endfor %}"
    row = conversation([user("a"), assistant("b")])
    assert marked(tokenizer, row, train_on="all") == "(<s>) (▁a) (:) (b) (:) (</s>)"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}:{% endfor %}"
    assert marked(tokenizer, row, train_on="assistant") == "▁a : (b) (:) (</s>)"  # as inference: no BOS
    tokenizer.chat_template = None


def test_no_end_is_put_behind_a_conversation_that_goes_on_or_whose_last_answer_is_left_out() -> None:
    tokenizer = bytes_("endless", "</s>")
    ends = [assistant("Yes", weight=0)], [user("Hi")]
    for last in ends:
        ((example,), counts) = encode(
            tokenizer, conversation([user("Hi"), assistant("Yes"), user("Why"), *last]), train_on="assistant"
        )
        assert tokenizer.eos_token_id not in example.input_ids
        assert counts.ends == counts.stops == {}
    left_out = conversation([user("Hi"), assistant("Yes", weight=0)])
    ((example,), counts) = encode(tokenizer, left_out, train_on="all")
    assert tokenizer.eos_token_id not in example.input_ids


def test_a_tokenizer_without_end_token_or_offsets_is_refused() -> None:
    backend = llama().backend_tokenizer
    with pytest.raises(TunesmithError, match="no end-of-sequence token; set `eos_token`"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=backend), EncodeOptions())

    class Slow:
        def __init__(self) -> None:
            self.eos_token_id, self.bos_token_id, self.added_tokens_decoder = 2, 1, dict[int, Any]()

    with pytest.raises(TunesmithError, match="Slow has no `tokenizers` backend"):
        Encoder(Slow(), EncodeOptions())


def test_ends_and_stops_are_counted() -> None:
    tokenizer = words("glm", "<|endoftext|>")
    talk = conversation([user("Hi"), assistant("Yes"), user("Why?"), assistant("No")])
    _, counts = encode(tokenizer, talk, ONE, train_on="assistant")
    header, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|endoftext|>"])
    assert counts.ends == {end: 2}
    assert counts.stops == {header: 1, end: 2}
    _, counts = encode(words("chatml", "<|im_end|>"), talk, ONE, train_on="all")
    assert counts.ends == counts.stops == {4: 2}  # the line break behind the last is left aside
    _, counts = encode(words("chatml", "<|im_end|>"), talk, train_on="assistant", max_length=10)
    assert (counts.ends, counts.stops, counts.truncated) == ({}, {}, 1)


# What is trained on


def test_what_is_supervised_by_default_follows_the_format() -> None:
    tokenizer = words("chatml", "<|im_end|>")
    whole = "(<|im_start|>) (user) (\n) (Hi) (<|im_end|>) (\n) (<|im_start|>) (assistant) (\n) (Yes) (<|im_end|>) (\n)"
    answer = "<|im_start|> user \n Hi <|im_end|> \n <|im_start|> assistant \n (Yes) (<|im_end|>) \n"
    pair = conversation([user("Hi"), assistant("Yes")], prompt_length=1)
    assert marked(tokenizer, ONE) == marked(tokenizer, pair, train_on="all") == whole
    assert marked(tokenizer, pair) == marked(tokenizer, ONE, train_on="assistant") == answer
    assert marked(tokenizer, Text(text="HiYes")) == "(<unk>) (<|im_end|>)"
    assert marked(tokenizer, Text(text="Hi Yes", prompt="Hi")) == "Hi ( ) (Yes) (<|im_end|>)"
    assert marked(tokenizer, Text(text="Hi Yes", prompt="Hi"), train_on="all") == "(Hi) ( ) (Yes) (<|im_end|>)"


@pytest.mark.parametrize(
    ("row", "train_on", "message"),
    [
        (Text(text="Hi"), "assistant", "row 0: train_on: assistant needs conversations; this row is plain text"),
        (Text(text="Hi"), "completion", "row 0: train_on: completion needs rows with 'prompt' and 'completion'"),
        (ONE, "completion", "row 0: train_on: completion needs 'prompt' and 'completion'"),
        (Tokens(input_ids=[3]), "assistant", "row 0: train_on: assistant needs text; this row is tokens"),
        (Tokens(input_ids=[3, 999]), None, "row 0: 'input_ids' has 999, but the tokenizer has"),
    ],
)
def test_rows_that_train_on_does_not_fit_are_refused(row: Row, train_on: Any, message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        encode(words("chatml", "<|im_end|>"), row, train_on=train_on)


def test_tokens_are_taken_as_they_are() -> None:
    size = len(words("chatml", "<|im_end|>"))
    (last,), _ = encode(words("chatml", "<|im_end|>"), Tokens(input_ids=[5, size - 1]))
    assert last.input_ids == [5, size - 1]
    with pytest.raises(TunesmithError, match=f"'input_ids' has {size}, but the tokenizer has {size}"):
        encode(words("chatml", "<|im_end|>"), Tokens(input_ids=[5, size]))
    rows = [Tokens(input_ids=[5, 6]), Tokens(input_ids=[5, 6], labels=[-100, 6], weight=0.5)]
    examples, _ = encode(words("chatml", "<|im_end|>"), *rows)
    assert examples == [
        Example(input_ids=[5, 6], labels=[5, 6]),
        Example(input_ids=[5, 6], labels=[-100, 6], weights=[0.5, 0.5]),
    ]


def test_weights_of_turns_and_rows_are_those_of_their_tokens() -> None:
    tokenizer = words("chatml", "<|im_end|>")
    talk = [user("Hi"), assistant("Yes", weight=0.5), user("Hi"), assistant("No")]
    ((example,), _) = encode(tokenizer, conversation(talk, weight=3.0), train_on="assistant")
    assert example.weights == [0] * 9 + [1.5] * 2 + [0] * 10 + [3.0] * 2 + [0]
    ((example,), _) = encode(tokenizer, Text(text="Hi Yes", prompt="Hi", weight=0.25))
    assert example.weights == [0, 0.25, 0.25, 0.25]  # the end token's too


def test_rows_of_weight_zero_or_without_text_are_dropped_and_counted() -> None:
    rows: list[Row] = [
        Text(text="Hi", weight=0.0),
        Text(text=""),
        Text(text=" \n"),
        conversation([user("Hi"), assistant("Yes", weight=0)]),
        conversation([user("Hi")]),
        Tokens(input_ids=[5, 6], weight=0.0),
        Tokens(input_ids=[5, 6], labels=[5, -100]),  # nothing predicts the first token
        ONE,
    ]
    examples, counts = encode(words("chatml", "<|im_end|>"), *rows[3:5], ONE, train_on="assistant")
    assert (len(examples), counts.rows, counts.examples) == (1, 3, 1)
    examples, counts = encode(words("chatml", "<|im_end|>"), *rows[:3], *rows[5:])
    assert (len(examples), counts.rows, counts.examples) == (1, 6, 1)
    assert counts.dropped == {"nothing in it to train on": (5, ["row 0", "row 1", "row 2", "row 3", "row 4"])}


@pytest.mark.parametrize(
    ("prompt", "answer", "notes"),
    [
        ("How much is it?", "50", [GLUED]),
        ("Hi", "Yes", [GLUED]),
        ("Hi", " Yes", []),
        ("Hi:", "Yes", []),
        ("多少", "50", []),
        ("Hi", "", [UNANSWERED]),
        ("Hi", " \n", [UNANSWERED]),
    ],
)
def test_what_is_odd_where_a_prompt_meets_its_answer_is_told(prompt: str, answer: str, notes: list[str]) -> None:
    _, counts = encode(words("", "</s>"), Text(text=prompt + answer, prompt=prompt))
    assert list(counts.notes) == notes


# Longer than max_length

LONG = Text(text="0 1 2 3 Yes No", prompt="0 1 2 3")  # 12 tokens with the end, 7 of them the prompt


def test_overlong_examples_are_cut_at_the_end() -> None:
    tokenizer = words("", "</s>")
    assert marked(tokenizer, LONG, max_length=12) == "0   1   2   3 ( ) (Yes) ( ) (No) (</s>)"
    assert marked(tokenizer, LONG, max_length=9) == "0   1   2   3 ( ) (Yes)"
    _, counts = encode(tokenizer, LONG, max_length=9)
    assert (counts.truncated, counts.lost_tokens, counts.ends) == (1, 3, {})
    for overlong in ("truncate", "drop", "split", "error"):  # just as long as it may be
        assert marked(tokenizer, LONG, max_length=12, overlong=overlong) == marked(tokenizer, LONG)
    _, counts = encode(tokenizer, LONG, max_length=7)
    assert counts.dropped == {"no supervised token within max_length 7": (1, ["row 0"])}
    assert (counts.truncated, counts.lost_tokens) == (0, 0)


def test_overlong_examples_are_dropped_and_counted() -> None:
    examples, counts = encode(words("", "</s>"), LONG, Text(text="Hi"), LONG, max_length=11, overlong="drop")
    assert len(examples) == 1
    assert counts.dropped == {"longer than max_length 11": (2, ["row 0", "row 2"])}


def test_overlong_examples_are_split() -> None:
    examples, counts = encode(words("", "</s>"), LONG, max_length=5, overlong="split")
    assert [len(example.input_ids) for example in examples] == [5, 2]
    assert [token for example in examples for token in example.input_ids][-1] == EOS
    assert (counts.truncated, counts.lost_tokens, counts.ends) == (1, 5, {EOS: 1})  # a piece of prompt only is no use
    examples, counts = encode(words("", "</s>"), Text(text=LONG.text), max_length=6, overlong="split")
    assert [len(example.input_ids) for example in examples] == [6, 6]
    assert counts.lost_tokens == 0


def test_overlong_examples_are_an_error_when_asked() -> None:
    with pytest.raises(TunesmithError, match=r"^row 0: 12 tokens, more than max_length 11 \(overlong: error\)"):
        encode(words("", "</s>"), LONG, max_length=11, overlong="error")


def test_a_prompt_is_shortened_from_the_left_and_keeps_its_bos() -> None:
    tokenizer = words("", "</s>")
    assert marked(tokenizer, LONG, max_length=9, truncate_prompt=True) == "  2   3 ( ) (Yes) ( ) (No) (</s>)"
    begins = Text(text="a: a: b", prompt="a: a:")
    assert marked(llama(), begins, max_length=6) == "<s> ▁a : ▁a : (▁b)"
    assert marked(llama(), begins, max_length=6, truncate_prompt=True) == "<s> : ▁a : (▁b) (</s>)"
    _, counts = encode(llama(), begins, max_length=6, truncate_prompt=True)
    assert (counts.truncated, counts.lost_tokens, counts.ends) == (1, 1, {EOS: 1})


def test_a_prompt_with_a_bos_of_its_own_gives_way_alike() -> None:
    texts = [Text(text=f"{bos}a a a b", prompt=f"{bos}a a a") for bos in ("", "<s>")]
    for limit in range(2, 8):
        plain, own = (encode(llama(), text, max_length=limit, truncate_prompt=True) for text in texts)
        assert own == plain


def test_a_prompt_that_is_too_short_to_give_way_stays() -> None:
    tokenizer = words("", "</s>")
    assert marked(tokenizer, LONG, max_length=6, truncate_prompt=True) == "3 ( ) (Yes) ( ) (No) (</s>)"
    assert encode(tokenizer, LONG, max_length=5, truncate_prompt=True)[0] == []
    short = Text(text="0 1 2 3 Yes No", prompt="0")
    assert marked(tokenizer, short, max_length=10, truncate_prompt=True) == "0 ( ) (1) ( ) (2) ( ) (3) ( ) (Yes) ( )"


def test_the_prompt_of_a_conversation_gives_way_too() -> None:
    pair = conversation([system("Be brief"), user("Hi"), assistant("Yes")], prompt_length=2)
    shown = marked(words("chatml", "<|im_end|>"), pair, max_length=8, truncate_prompt=True)
    assert shown == "<|im_end|> \n <|im_start|> assistant \n (Yes) (<|im_end|>) \n"


# Documents of one conversation

REASONED = conversation(
    [
        user("Hi"),
        assistant("Yes", reasoning_content="Hm"),
        user("Why"),
        assistant("Because", reasoning_content="Well"),
    ]
)


def shown(tokenizer: Any, example: Example) -> list[str]:
    """The segments of an example, supervised tokens in brackets."""
    assert example.parts is not None
    tokens = [
        token if label == IGNORE_INDEX else f"({token})"
        for token, label in zip(tokenizer.convert_ids_to_tokens(example.input_ids), example.labels, strict=True)
    ]
    rest = iter(tokens)
    return [" ".join(islice(rest, length)) for length in example.parts[0]]


def test_turns_that_history_renders_otherwise_are_documents_that_share_what_they_begin_with() -> None:
    tokenizer = words("qwen3", "<|im_end|>")
    ((example,), counts) = encode(tokenizer, REASONED, train_on="assistant")
    history = "<|im_end|> \n <|im_start|> user \n Why <|im_end|> \n <|im_start|> assistant \n"
    assert shown(tokenizer, example) == [
        "<|im_start|> user \n Hi <|im_end|> \n <|im_start|> assistant \n",
        f"Yes {history} (<think>) (\n) (Well) (\n) (</think>) (\n) (\n) (Because) (<|im_end|>)",
        "(<think>) (\n) (Hm) (\n) (</think>) (\n) (\n) (Yes) (<|im_end|>)",
    ]
    assert example.parts is not None
    assert example.parts[1] == [-1, 0, 0]
    assert (counts.ends, counts.stops) == ({tokenizer.eos_token_id: 1}, {tokenizer.eos_token_id: 2})
    assert (counts.examples, counts.tokens, counts.supervised) == (1, len(example.input_ids), 18)


def test_documents_of_a_conversation_are_divided_where_together_they_are_too_long() -> None:
    tokenizer = words("qwen3", "<|im_end|>")
    ((together,), _) = encode(tokenizer, REASONED, train_on="assistant")
    size = len(together.input_ids)
    ((whole,), counts) = encode(tokenizer, REASONED, train_on="assistant", max_length=size)
    assert (whole, counts.truncated) == (together, 0)
    (first, second), counts = encode(tokenizer, REASONED, train_on="assistant", max_length=size - 1)
    assert (first.parts, second.parts, counts.truncated, counts.lost_tokens) == (None, None, 0, 0)
    assert [sum(label != IGNORE_INDEX for label in example.labels) for example in (first, second)] == [9, 9]
    apart, _ = encode(tokenizer, REASONED, train_on="assistant", share=False)
    assert apart == [first, second]


def test_an_example_ends_where_all_of_its_documents_do() -> None:
    tokenizer = words("qwen3", "<|im_end|>")
    encoder, end = Encoder(tokenizer, EncodeOptions()), tokenizer.eos_token_id
    ids, hidden = [*range(30, 40), 41, end, 42, end], [IGNORE_INDEX] * 10
    parts = [10, 2, 2], [-1, 0, 0]
    found = []
    for answers in ([41, end, 42, end], [41, end, 42, IGNORE_INDEX], [41, end, IGNORE_INDEX, IGNORE_INDEX]):
        counts, example = Counts(), Example(input_ids=ids, labels=hidden + answers, parts=parts)
        encoder.count(FlatExamples.of([example, Example(input_ids=[5, end], labels=[5, end])]), counts)
        found.append((counts.ends[end], counts.stops[end]))
    assert found == [(2, 3), (1, 2), (2, 2)]  # the last has nothing supervised in its second document


def test_what_two_documents_supervise_at_one_place_is_learned_twice() -> None:
    twice = Example(input_ids=[*range(3, 20)], labels=[*range(3, 20)])
    assert joined([twice, twice], None) == [twice, twice]
    once = Example(input_ids=[*range(3, 21)], labels=[*[IGNORE_INDEX] * 17, 20])
    (tree,) = joined([twice, once], None)
    assert (tree.labels, tree.parts) == ([*range(3, 21)], ([17, 1], [-1, 0]))


def test_pieces_of_a_text_that_repeats_itself_are_not_joined() -> None:
    examples, counts = encode(words("", "</s>"), Text(text="Hi " * 40), max_length=20, overlong="split")
    assert (len(examples), counts.supervised) == (4, 80)  # nothing predicts the end, alone in the fifth


# Text that reads as a control token


@pytest.mark.parametrize("asked", ["a<|im_end|>b", "<|im_end|>", "<|im_start|><|im_end|> 你"])
@pytest.mark.parametrize("answered", ["Yes", "it is <|im_end|>, you see", "<|im_start|>"])
def test_text_of_a_message_that_reads_as_a_control_token_can_be_ordinary_characters(asked: str, answered: str) -> None:
    tokenizer = bytes_("chatml", "<|im_end|>")
    row = conversation([user(asked), assistant(answered)])
    ((example,), _) = encode(tokenizer, row, train_on="assistant", specials_in_content="text")
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    assert [token for token in tokens if token in tokenizer.get_added_vocab()] == ["<|im_start|>", "<|im_end|>"] * 2
    assert tokenizer.decode(example.input_ids) == (
        f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n"
    )
    learned = [label for label in example.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == f"{answered}<|im_end|>"
    assert learned[-1] == tokenizer.eos_token_id
    kept = conversation([user(asked), assistant("Yes")])
    ((example,), _) = encode(tokenizer, kept, train_on="assistant", specials_in_content="keep")
    assert example.input_ids.count(tokenizer.eos_token_id) == 3
