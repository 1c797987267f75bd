"""Pairs and judged answers are trained by two processes as by one, an uneven last step included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.forked import together
from tests.models import tiny
from tests.train.runs import largest_difference
from tunesmith import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from tunesmith.train.sharding import gathered

pytestmark = pytest.mark.processes
PAIRS = [{"prompt": f"q {i} " + "x" * (i % 5), "chosen": "a" * (1 + i % 7), "rejected": "b" * 3} for i in range(11)]
JUDGED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 > 0} for i, row in enumerate(PAIRS)]
CASES: dict[str, tuple[Any, Any, list[dict[str, Any]], dict[str, Any]]] = {
    "pairs": (DPOConfig, DPOTrainer, PAIRS, {}),
    "precomputed": (DPOConfig, DPOTrainer, PAIRS, {"precompute_ref_log_probs": True}),
    "judged": (KTOConfig, KTOTrainer, JUDGED, {"loss_type": "apo_zero_unpaired"}),
    "shared out": (DPOConfig, DPOTrainer, PAIRS, {"shard": "full"}),
    "shared out, accumulation": (DPOConfig, DPOTrainer, PAIRS, {"shard": "grad", "gradient_accumulation_steps": 2}),
    "adapters, shared out": (DPOConfig, DPOTrainer, PAIRS, {"shard": "full", "lora": True}),
    "judged, shared out": (KTOConfig, KTOTrainer, JUDGED, {"shard": "full", "loss_type": "apo_zero_unpaired"}),
}
ESTIMATED = "judged, estimated, shared out"
"""Whose estimate depends on how a step is divided: it must not hang where a process has no two answers."""


def _train(folder: Path, tokenizer: Path, processes: int) -> None:
    estimated = {ESTIMATED: (KTOConfig, KTOTrainer, JUDGED[:5], {"shard": "full"})}
    for name, (config, kind, rows, own_settings) in {**CASES, **estimated}.items():
        settings = dict(own_settings)
        lora = LoraConfig(r=4, target_modules="all-linear") if settings.pop("lora", False) else None
        accumulation = settings.get("gradient_accumulation_steps", 1)
        args = config(
            output_dir=str(folder / name),
            report_to="none",
            use_cpu=True,
            precision="fp32",
            disable_tqdm=True,
            per_device_train_batch_size=4 // processes // accumulation,
            num_train_epochs=1,
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_steps=1,
            **settings,
        )
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        torch.manual_seed(0)
        model = tiny("llama", len(loaded))
        data = {"train_dataset": rows, "eval_dataset": rows[:5]}
        trainer = kind(model, args=args, processing_class=loaded, peft_config=lora, **data)
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        logged.append(trainer.evaluate()["eval_loss"])
        weights = gathered(trainer.model, kept=trainer.is_world_process_zero())
        if trainer.is_world_process_zero():
            save_file({name: value.detach().clone() for name, value in weights.items()}, folder / f"{name}.st")
            (folder / f"{name}.json").write_text(json.dumps(logged))


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with those of each number of processes."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
        together(processes, _train, folder / str(processes), tiny_model, processes)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_preferences_as_one_does(name: str, runs: Path) -> None:
    one, two = (load_file(runs / str(processes) / f"{name}.st") for processes in (1, 2))
    assert largest_difference(one, two) < 1e-6
    logged = [json.loads((runs / str(processes) / f"{name}.json").read_text()) for processes in (1, 2)]
    assert len(logged[0]) == 4
    assert logged[1] == pytest.approx(logged[0], abs=1e-6)
    assert json.loads((runs / "2" / f"{ESTIMATED}.json").read_text())
