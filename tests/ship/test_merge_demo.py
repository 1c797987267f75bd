"""The demo model with adapters merges into a folder that answers as it did before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ship.merging import shake
from tunesmith.model.generate import generate
from tunesmith.model.load import load_model, load_tokenizer
from tunesmith.ship.merge import MergeOptions, merge

QUESTION = [[{"role": "user", "content": "What is the capital of France?"}]]


@pytest.mark.slow
def test_the_demo_model_merges_and_answers_as_with_adapters(tmp_path: Path) -> None:
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(load_model("demo"), config)
    shake(adapted)
    adapted.save_pretrained(str(tmp_path / "run"))
    load_tokenizer("demo").save_pretrained(tmp_path / "run")
    settings = tmp_path / "run" / "adapter_config.json"
    cache = "/elsewhere"  # of the machine that trained
    base = json.loads(settings.read_text())["base_model_name_or_path"]
    settings.write_text(settings.read_text().replace(base, f"{cache}/{Path(base).name}"))
    expected = generate(adapted.eval(), load_tokenizer("demo"), QUESTION, max_new_tokens=12)
    del adapted
    report = merge(tmp_path / "run", tmp_path / "merged", MergeOptions(max_shard_size="200MB"))
    assert report.base == "demo"
    assert report.drift is not None
    assert report.drift.relative < 1e-5
    assert report.drift.equal == report.drift.tokens > 30
    assert (report.files, report.dtype, report.untied) == (3, torch.float32, False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert generate(model, tokenizer, QUESTION, max_new_tokens=12) == expected
