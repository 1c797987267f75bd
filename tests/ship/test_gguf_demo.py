"""The demo model answers from its GGUF as it does itself."""

from functools import cache
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

from tunesmith.model.generate import generate
from tunesmith.ship.gguf import export_gguf

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_demo_model_gives_the_same_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))  # once for weights and tokenizer
    done = export_gguf("demo", tmp_path, quant="q8_0", check=False)
    assert round(done.size / 1e6) == 145
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file="model.gguf")
    digits = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = digits  # what `smollm` stands for, and `transformers` doesn't read
    assert generate(model, tokenizer, [QUESTION], max_new_tokens=12) == ["The capital of France is Paris."]
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "Modelfile").read_text()
