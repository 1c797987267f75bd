"""A script with a trainer, unchanged, is started by other launchers, and makes the model of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.models import tiny
from tests.train.runs import TEXTS, largest_difference

pytestmark = pytest.mark.processes
SCRIPT = """
import sys

from datasets import Dataset

from tunesmith import SFTConfig, SFTTrainer

model, rows, output, size = sys.argv[1:]
args = SFTConfig(
    output_dir=output, per_device_train_batch_size=int(size), max_steps=3, optim="sgd", learning_rate=0.1,
    use_cpu=True, precision="fp32", report_to="none", save_strategy="no", self_test="off",
)
trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_json(rows))
trainer.train()
trainer.save_model()
"""
STARTS = {
    "one": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


def test_torchrun_and_accelerate_launch_make_the_model_of_one_process(tiny_model: Path, tmp_path: Path) -> None:
    tiny("llama", 259).save_pretrained(tmp_path / "model")
    for file in tiny_model.iterdir():
        if "tok" in file.name or "template" in file.name:
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "train.py").write_text(SCRIPT)
    env = {**os.environ, "TUNESMITH_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    for name, start in STARTS.items():
        words = ["train.py", "model", "rows.jsonl", name, "4" if name == "one" else "2"]
        done = subprocess.run(
            [sys.executable, *start, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
    one, *others = (load_file(tmp_path / name / "model.safetensors") for name in STARTS)
    for weights in others:
        assert largest_difference(one, weights) < 1e-6
