"""A process that really holds more than `memory_limit` splits its micro-batches, and ends in the same weights."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.faults.children import ended, started
from tests.faults.figures import FIGURES
from tests.models import tiny
from tests.train.runs import largest_difference
from tunesmith import SFTConfig, SFTTrainer
from tunesmith.model import ways
from tunesmith.train import limits as memory

LENGTH, ROWS = 1024, 8
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 1024, "max_position_embeddings": LENGTH}
MIB = 2**20


class _Held(TrainerCallback):
    """What the process holds before training, and at most before a layer: where the limit is looked at."""

    def __init__(self, model: Any) -> None:
        self.before = self.most = memory.resident() or 0
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.register_forward_pre_hook(self._look)

    def _look(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.most = max(self.most, memory.resident() or 0)


def _long_rows(folder: Path, tokenizer: Path, limit: int | None, begun: Any) -> None:
    torch.set_num_threads(1)
    os.environ["TUNESMITH_HOME"] = str(folder / "home")
    ways.force(False)
    rows = [{"prompt": "ab" * (i + 1), "completion": "the mat " * (LENGTH // 8 - 2 * ROWS)} for i in range(ROWS)]
    settings: dict[str, Any] = {"output_dir": str(folder / "run"), "report_to": "none", "use_cpu": True}
    settings |= {"precision": "fp32", "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_length": LENGTH}
    settings |= {"per_device_train_batch_size": ROWS, "rehearse": "off", "self_test": "off", "save_strategy": "no"}
    settings |= {"memory_limit": None if limit is None else f"{limit // 10**6} MB", "disable_tqdm": True}
    model = tiny("llama", 259, **SIZES)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    trainer = SFTTrainer(model=model, args=SFTConfig(**settings), train_dataset=rows, processing_class=loaded)
    # What a process holds from its first forward and backward on belongs to before.
    model(input_ids=torch.arange(64)[None]).logits.sum().backward()
    model.zero_grad()
    held = _Held(model)
    trainer.train()
    trainer.save_model()
    found = {"before": held.before, "most": held.most, "events": [text for _, text in trainer.events]}
    (folder / "found.json").write_text(json.dumps(found))


def trained(folder: Path, tokenizer: Path, limit: int | None) -> dict[str, Any]:
    folder.mkdir()
    child, _ = started(_long_rows, folder, tokenizer, limit)
    assert ended(child) == 0
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found | {"weights": load_file(folder / "run" / "model.safetensors")}


@pytest.mark.skipif(memory.resident() is None, reason="this system does not tell how much memory a process has")
def test_over_the_limit_micro_batches_are_split_with_the_same_weights(tmp_path: Path, tiny_model: Path) -> None:
    free = trained(tmp_path / "free", tiny_model, None)
    assert free["events"] == []
    assert free["most"] > free["before"] + 100 * MIB
    limit = (free["before"] + 2 * free["most"]) // 3
    limited = trained(tmp_path / "limited", tiny_model, limit)
    print({name: value // MIB for name, value in (*((n, free[n]) for n in ("before", "most")), ("limit", limit))})
    print(limited["most"] // MIB, limited["events"])
    assert "memory_limit is" in limited["events"][0]
    assert "are split from now on, same gradients" in limited["events"][0]
    assert largest_difference(limited["weights"], free["weights"]) < 1e-6
    FIGURES["memory limits that were kept"] += 1
