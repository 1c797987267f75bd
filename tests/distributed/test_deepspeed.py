"""DeepSpeed's stages train as one process does, and leave whole weights. `.ci/versions` installs DeepSpeed for this."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.distributed.cases import trainer
from tests.forked import together
from tests.models import tiny
from tests.train.runs import largest_difference
from tunesmith import SFTTrainer, TunesmithError

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="runs where .ci/versions has installed deepspeed"),
]

# A case of `cases`, and what is set besides. DeepSpeed's norm of a gradient differs in the fifth digit: no clipping.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "short last step": ("short last step", {}),
    "accumulation": ("accumulation", {}),
    "padded": ("padded", {}),
    "packed, checkpointed": ("packed", {"gradient_checkpointing": True}),
    "shared prefixes": ("shared prefixes", {}),
    "a step of one row": ("a step of one row", {}),
    "LoRA": ("accumulation", {"lora": True}),
}
AUTO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")


def _train(folder: Path, tokenizer: Path, stage: int | None) -> None:
    """What a process does: all cases, one after another; the first writes what came of them."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    processes = int(os.environ["WORLD_SIZE"])
    SFTTrainer.draw_page = None
    # Weights that are small enough would stay whole.
    shared_out = {"stage": stage, "stage3_param_persistence_threshold": 0}
    zero = {**AUTO, "zero_optimization": shared_out, "zero_allow_untested_optimizer": True}
    for name, (case, settings) in CASES.items():
        shared = {} if stage is None else {"deepspeed": zero}
        model = str(folder.parent / "tied")
        made = trainer(case, processes, tokenizer, folder / name, folder=model, max_grad_norm=0.0, **settings, **shared)
        made.train()
        loss = made.evaluate()["eval_loss"]
        made.save_model(str(folder / name))
        if os.environ["RANK"] == "0":
            logs = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
            (folder / f"{name}.json").write_text(json.dumps([*logs, loss]))


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tiny("llama", len(tokenizer), tie_word_embeddings=True).save_pretrained(folder / "tied")
    for number, stage in ((1, None), (2, 2), (2, 3)):
        (folder / str(stage)).mkdir()
        together(number, _train, folder / str(stage), tiny_model, stage)
    return folder


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_deepspeed_train_as_one_without(name: str, stage: int, runs: Path) -> None:
    one, two = (json.loads((runs / of / f"{name}.json").read_text()) for of in ("None", str(stage)))
    assert two == pytest.approx(one, abs=1e-5)
    file = "adapter_model.safetensors" if name == "LoRA" else "model.safetensors"
    alone, shared = (load_file(runs / of / name / file) for of in ("None", str(stage)))
    assert shared.keys() - {"lm_head.weight"} == alone.keys() - {"lm_head.weight"}
    assert largest_difference(alone, {key: shared[key] for key in alone}) < 1e-6


def _untied(folder: Path, tokenizer: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    with pytest.raises(TunesmithError, match="write stage 2, or shard: full"):
        trainer("accumulation", 2, tokenizer, folder, deepspeed={**AUTO, "zero_optimization": {"stage": 3}}).train()


def test_a_head_of_its_own_is_refused_in_the_third_stage(tiny_model: Path, tmp_path: Path) -> None:
    together(2, _untied, tmp_path, tiny_model)
