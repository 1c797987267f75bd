"""Two processes on the CPU give what one gives."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.train.runs import PAIR_ROWS, largest_difference, trained

REPO = Path(__file__).resolve().parents[2]
# Rows of unequal weight, a last batch that is not full, and an evaluation whose rows don't split evenly.
ROWS = [row | {"weight": 1.0 + i} for i, row in enumerate(PAIR_ROWS)]
EVAL_ROWS = ROWS[:5]
SETTINGS: dict[str, Any] = {
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
}

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from tests.models import tiny
from tests.train.test_distributed import EVAL_ROWS, ROWS, SETTINGS, measured
from tests.train.runs import trained
from tunesmith import SFTConfig, SFTTrainer

folder, tokenizer = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
args = SFTConfig(
    output_dir=str(folder), report_to="none", use_cpu=True, precision="fp32", disable_tqdm=True, save_strategy="no",
    logging_steps=1, max_grad_norm=0.0, gradient_accumulation_steps=2, **SETTINGS,
)
trainer = SFTTrainer(tiny("llama", len(tokenizer)), args, train_dataset=ROWS, eval_dataset=EVAL_ROWS,
                     processing_class=tokenizer)
weights, numbers = trained(trainer), measured(trainer)
if trainer.is_world_process_zero():
    save_file({name.removeprefix("module."): value for name, value in weights.items()}, folder / "weights.safetensors")
    (folder / "numbers.json").write_text(json.dumps(numbers))
torch.distributed.destroy_process_group()
"""


def measured(trainer: Any) -> dict[str, Any]:
    """What a run logged, and what it evaluates to."""
    names = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
    logs = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate()
    predicted = trainer.predict(EVAL_ROWS)
    return {
        "logs": logs,
        "eval": [evaluated[f"eval_{name}"] for name in names[:3]],
        "shapes": [list(predicted.predictions.shape), list(predicted.label_ids.shape)],
        "test_loss": predicted.metrics["test_loss"],
    }


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does(
    trainer_of: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(train_dataset=ROWS, eval_dataset=EVAL_ROWS, gradient_accumulation_steps=4, **SETTINGS)
    expected_weights = trained(trainer)
    expected = measured(trainer)

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "src")])}
    done = subprocess.run(
        [*command, str(script), str(tmp_path), str(tiny_model)],
        env=environment, cwd=REPO, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert largest_difference(load_file(tmp_path / "weights.safetensors"), expected_weights) < 1e-6
    assert found["shapes"] == expected["shapes"] == [[5, 23, 259], [5, 23]]
    for ours, theirs in zip([*found["logs"], found["eval"]], [*expected["logs"], expected["eval"]], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert found["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-5)
