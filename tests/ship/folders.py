"""Folders of small models with tokenizers of the kinds that GGUF knows."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.conftest import CHATML
from tests.models import tiny
from tunesmith.ship.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT

TEXTS = ["the cat sat on the mat", "the hat that the cat sat on", "What is the capital of France?", "count to 10"] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def split(pattern: str) -> PreTokenizer:
    """Cut by a pattern, then to bytes, as Llama 3 and Qwen do."""
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": split(LLAMA3_SPLIT),
    "qwen2": split(QWEN2_SPLIT),
}


def byte_tokenizer(pre: str = "gpt-2", **settings: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML tokens and some merges, which cuts text as llama.cpp's `pre` does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    backend.model.ignore_merges = pre == "llama-bpe"
    defaults = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    chosen = {key: value for key, value in (defaults | settings).items() if value is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=["<|im_start|>"], **chosen)


def piece_tokenizer(**settings: Any) -> LlamaTokenizer:
    """SentencePiece's BPE with bytes, as Llama 2 has it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "c"), ("a", "t"), ("▁c", "at"), ("▁", "▁")]
    tokens += [*"▁thecasonmfWirpl?.,0123456789", *("".join(pair) for pair in merges)]
    return LlamaTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=merges, **settings)


def save(folder: Path, name: str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Path:
    """The folder of a tiny model of the architecture `name` with `tokenizer`, random in every parameter."""
    common = {"vocab_size": len(tokenizer), "bos_token_id": None, "pad_token_id": None}
    common["eos_token_id"] = tokenizer.eos_token_id
    tiny(name, **common | {"max_position_embeddings": 256} | settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
