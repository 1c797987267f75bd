"""A tokenizer's metadata make llama.cpp's tokenizers do what it does, or it is refused by name."""

from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf import gguf_tokenizer_mapping as hf

from tests.conftest import CHATML
from tests.ship.folders import PRE_TOKENIZERS, byte_tokenizer, piece_tokenizer
from tunesmith.errors import TunesmithError
from tunesmith.ship.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, QWEN35_SPLIT, plain_jinja, tokenizer_metadata


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_name_of_a_pre_tokenizer_is_read_off_itself(pre: str) -> None:
    made = tokenizer_metadata(byte_tokenizer(pre), 290)
    assert (made.model, made.pre) == ("gpt2", pre)
    assert ("GGUF can't say that the tokenizer composes" in " ".join(made.notes)) == (pre == "qwen2")


def test_a_word_that_is_a_token_is_taken_whole_or_merged() -> None:
    tokenizer = byte_tokenizer("llama-bpe")
    tokenizer.backend_tokenizer.model.ignore_merges = False
    assert tokenizer_metadata(tokenizer, 290).pre == "smaug-bpe"


def test_the_rules_are_those_that_transformers_knows_by_these_names() -> None:
    known = {"llama-bpe": LLAMA3_SPLIT, "smaug-bpe": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT, "qwen35": QWEN35_SPLIT}
    assert {name: hf.GGUF_PRE_TOKENIZER_SPLITS[name] for name in known} == known


@pytest.mark.parametrize(
    "rule",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        pre_tokenizers.Whitespace(),
    ],
)
def test_another_rule_is_refused_by_what_it_is(rule: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = rule
    with pytest.raises(
        TunesmithError, match=r"no name for here: \{.*Those of gpt-2, llama-bpe, qwen2, qwen35, smaug-bpe"
    ):
        tokenizer_metadata(tokenizer, 290)


def test_rows_types_and_merges() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_tokens(["[PAD292]"])
    made = tokenizer_metadata(tokenizer, 294)
    assert made.tokens[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert made.tokens[290:] == ("<think>", "[PAD292]", "[[PAD292]]", "[PAD293]")
    unused, user = TokenType.UNUSED, TokenType.USER_DEFINED
    assert made.types[:4] == (TokenType.CONTROL,) * 3 + (TokenType.NORMAL,)
    assert made.types[290:] == (user, user, unused, unused)
    assert made.merges[:2] == ("a t", "t h")
    assert len(made.merges) == 290 - 3 - 256
    assert made.scores == ()
    assert made.special == {"pad": 0, "eos": 2}


def test_byte_level_tokenizers_without_merges_are_refused() -> None:
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.model = models.BPE(vocab=backend.get_vocab(), merges=[])
    with pytest.raises(TunesmithError, match=r"has no merges, without which llama.cpp"):
        tokenizer_metadata(tokenizer, 290)


def test_more_tokens_than_embeddings_are_refused() -> None:
    with pytest.raises(TunesmithError, match="tokens up to number 289, but the model has 289 embeddings"):
        tokenizer_metadata(byte_tokenizer(), 289)


def test_all_end_tokens_are_named() -> None:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>", pad_token=None)
    made = tokenizer_metadata(tokenizer, 290, ends=[0, 7, 8, 999])
    assert made.ends == (0, 2, 7, 8)
    assert made.special == {"eos": 0, "eot": 2, "eom": 7}
    assert made.types[7] == TokenType.CONTROL
    assert made.notes == (f"GGUF names three end tokens; {made.tokens[8]} end an answer, too",)
    with pytest.raises(TunesmithError, match="has no end token"):
        tokenizer_metadata(byte_tokenizer(eos_token=None, chat_template=None), 290)


def with_bos(template: str | None) -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(bos_token="<|endoftext|>", chat_template=template)
    single = "<|endoftext|> $A"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


def test_the_bos_token_is_added_where_training_saw_it() -> None:
    """Chats are trained on as their template writes them, and llama.cpp would add the token to those, too."""
    assert tokenizer_metadata(with_bos(None), 290).add_bos
    assert tokenizer_metadata(with_bos("{{ bos_token }}" + CHATML), 290).add_bos
    without = tokenizer_metadata(with_bos(CHATML), 290)
    assert not without.add_bos
    assert without.notes == ("the chat template writes no <|endoftext|>, so add_bos_token is false in the file",)
    assert not tokenizer_metadata(byte_tokenizer(), 290).add_bos


def test_a_template_loses_the_marks_that_only_transformers_knows() -> None:
    marked = "{{ 'a\n' }}{%- generation %}{{- 'b' }}\n{% endgeneration -%} \nc"
    tokenizer = byte_tokenizer(chat_template=marked)
    plain = tokenizer_metadata(tokenizer, 290).chat_template
    assert plain == "{{ 'a\n' }}{%- if true %}{{- 'b' }}\n{% endif -%} \nc" == plain_jinja(marked)
    turns = [{"role": "user", "content": "x"}]
    before = tokenizer.apply_chat_template(turns, tokenize=False)
    tokenizer.chat_template = plain
    assert tokenizer.apply_chat_template(turns, tokenize=False) == before


def test_several_templates_keep_their_names() -> None:
    tokenizer = byte_tokenizer(chat_template={"default": CHATML, "tool_use": "{{ tools }}"})
    assert tokenizer_metadata(tokenizer, 290).chat_template == [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]


def test_pieces_get_scores_in_the_order_of_their_merges() -> None:
    tokenizer = piece_tokenizer(add_bos_token=True)
    tokenizer.add_tokens(["<think>"])
    rows = len(tokenizer)
    made = tokenizer_metadata(tokenizer, rows + 1)
    assert (made.model, made.pre, made.merges) == ("llama", "default", ())
    scores = dict(zip(made.tokens, made.scores, strict=True))
    assert [scores[piece] for piece in ("th", "the", "▁the", "▁c", "at", "▁cat", "▁▁")] == [0, -1, -2, -3, -4, -5, -6]
    assert scores["t"] == scores["<think>"] == -1e4
    types = dict(zip(made.tokens, made.types, strict=True))
    assert types["<unk>"] == TokenType.UNKNOWN
    assert types["<s>"] == types["</s>"] == TokenType.CONTROL
    assert types["<0x0A>"] == TokenType.BYTE
    assert types["<think>"] == TokenType.USER_DEFINED
    assert types["the"] == TokenType.NORMAL
    assert types[f"[PAD{rows}]"] == TokenType.UNUSED
    assert made.special == {"bos": 1, "unk": 0, "eos": 2}
    assert made.add_bos
    assert made.add_space_prefix
    assert made.notes[0].startswith("llama.cpp puts a space before the text behind every special token")
    assert not tokenizer_metadata(piece_tokenizer(add_prefix_space=False), rows).add_space_prefix


def test_merges_that_no_scores_can_say_are_refused() -> None:
    tokenizer = piece_tokenizer()
    backend = tokenizer.backend_tokenizer
    vocab = backend.get_vocab()
    for piece in ("a▁", "ca", "cat"):
        vocab[piece] = len(vocab)
    merges = [("c", "a"), ("ca", "t"), ("a", "t"), ("c", "at")]
    backend.model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True)
    with pytest.raises(TunesmithError, match="'cat' is joined in several places"):
        tokenizer_metadata(tokenizer, len(vocab))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: setattr(b, "normalizer", normalizers.Lowercase()), 'can\'t say how.*"Lowercase"'),
        (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Metaspace(split=True)), 'in a way.*"split": true'),
        (lambda b: setattr(b, "pre_tokenizer", None), "doesn't write spaces as ▁"),
        (
            lambda b: setattr(b, "model", models.BPE(vocab={"</s>": 2, "<0x00>": 0}, merges=[], byte_fallback=True)),
            "lacks 255 of the 256 byte tokens",
        ),
    ],
)
def test_pieces_that_llama_cpp_would_cut_otherwise_are_refused(change: Any, message: str) -> None:
    tokenizer = piece_tokenizer()
    change(tokenizer.backend_tokenizer)
    with pytest.raises(TunesmithError, match=message):
        tokenizer_metadata(tokenizer, 400)


def test_the_older_way_of_writing_spaces_is_known() -> None:
    tokenizer = piece_tokenizer()
    replace = normalizers.Replace(" ", "▁")
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    assert tokenizer_metadata(tokenizer, 400).add_space_prefix is True
    tokenizer.backend_tokenizer.normalizer = replace
    assert tokenizer_metadata(tokenizer, 400).add_space_prefix is False


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), "type Unigram.*by score instead of"),
        (models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"), "type WordLevel.*no such tokenizer"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused_by_name(model: Any, message: str) -> None:
    backend = Tokenizer(model)
    backend.decoder = decoders.Fuse()
    with pytest.raises(TunesmithError, match=message):
        tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a"), 10)
