"""Runs in processes of their own, which can be killed at any moment. They share what a server has imported."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

from tests.forked import finished, start
from tests.models import tiny
from tests.train.runs import UNEVEN_ROWS
from tunesmith import DataSource, SFTConfig, SFTTrainer
from tunesmith.model import ways

LORA: dict[str, Any] = {"target_modules": "all-linear", "lora_dropout": 0.2}
Settings = dict[str, Any]
MODES: dict[str, tuple[str, Settings]] = {
    "full": ("llama", {"packing": True, "max_length": 48, "per_device_train_batch_size": 1}),
    "sources": ("llama", {"per_device_train_batch_size": 3}),
    "stream": ("llama", {"per_device_train_batch_size": 4}),
    "padded": ("gpt_neo", {"per_device_train_batch_size": 4}),
}
STEPS = 10


class Killed(TrainerCallback):
    """Kills its process in the step `number`, at the event `event`, unless that is "never"."""

    def __init__(self, event: str, number: int) -> None:
        self._number = number
        if event != "never":
            setattr(self, event, self._at)

    def _at(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._number:
            os.kill(os.getpid(), signal.SIGKILL)


def rows_of(mode: str) -> Any:
    if mode == "sources":
        return {"one": DataSource(rows=UNEVEN_ROWS[:9], weight=2), "two": UNEVEN_ROWS[9:20]}
    if mode == "stream":  # read again and again: 5 micro-batches, so that an epoch ends within a step
        stream: IterableDataset = Dataset.from_list(UNEVEN_ROWS[:20]).to_iterable_dataset(num_shards=2)
        return stream
    return UNEVEN_ROWS


def trainer_of(mode: str, folder: Path, tokenizer: Path, **settings: Any) -> SFTTrainer:
    name, own = MODES[mode]
    model = tiny(name, 259, **({"attention_dropout": 0.1} if name == "llama" else {}))
    common: Settings = {"output_dir": str(folder / "run"), "report_to": "none", "use_cpu": True, "precision": "fp32"}
    common |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 3, "max_steps": STEPS}
    common |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "disable_tqdm": True, "self_test": "off"}
    common |= {"shuffle_dataset": mode in ("sources", "stream"), "shuffle_buffer_size": 6}
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**common | own | settings),
        train_dataset=rows_of(mode),
        processing_class=loaded,
        peft_config=None if mode == "full" else LoraConfig(**LORA),
    )


def run(mode: str, folder: Path, tokenizer: Path, kill: tuple[str, int], onednn: bool, settings: Settings) -> None:
    """Train; go on from what is in `folder`, if anything is. Writes `log.json` at the end."""
    torch.set_num_threads(1)
    os.environ["TUNESMITH_HOME"] = str(folder / "home")
    ways.force(onednn)
    trainer = trainer_of(mode, folder, tokenizer, **settings)
    trainer.add_callback(Killed(*kill))
    before = any((folder / "run").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=before)
    trainer.save_model()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    (folder / "log.json").write_text(json.dumps(log))


def in_a_child(
    mode: str,
    folder: Path,
    tokenizer: Path,
    kill: tuple[str, int] = ("never", 0),
    onednn: bool = False,
    **settings: Any,
) -> int:
    """The exit code of `run` in a process of its own; -9 where it was killed."""
    folder.mkdir(exist_ok=True)
    return finished(start(run, mode, folder, tokenizer, kill, onednn, settings))


def weights_in(folder: Path) -> dict[str, Tensor]:
    [file] = [*folder.glob("run/model.safetensors"), *folder.glob("run/adapter_model.safetensors")]
    return load_file(file)


def log_in(folder: Path) -> list[dict[str, float]]:
    log: list[dict[str, float]] = json.loads((folder / "log.json").read_text())
    return log
