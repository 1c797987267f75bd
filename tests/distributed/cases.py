"""Runs that one process and several must make alike, and what each process notes of them."""

import json
import logging
import os
from collections.abc import Mapping
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer

from tests.models import tiny
from tests.train.runs import REASONING, TALKS, trained
from tunesmith import SFTConfig, SFTTrainer
from tunesmith.runs.files import EXAMPLES

ALPHABET = "the quick brown fox jumps over the lazy dog, again and again"
ROWS = [
    {
        "prompt": f"{i} {ALPHABET[: 1 + i * 7 % 23]}",
        "completion": ALPHABET[i % 11 : 12 + i * 5 % 31],
        "weight": 1.0 + i % 3,
    }
    for i in range(29)
]
"""29 rows of 15 to 50 tokens, no two alike: a last step is never full."""
SAME_START = [
    {"prompt": "A system prompt that all rows begin with. " + str(row["prompt"]), "completion": "so"} for row in ROWS
]
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "num_train_epochs": 1}

# Rows of a step, micro-batches of one process, and settings. With 4 processes a micro-batch has 2 rows, or one.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "short last step": (8, 1, {"num_train_epochs": 2}),
    "evaluated before": (8, 1, {}),
    "accumulation": (4, 3, {}),
    "padded": (8, 1, {"padding_free": False}),
    "padded model": (4, 2, {"model": "gpt_neo"}),
    "grouped by length": (4, 2, {"train_sampling_strategy": "group_by_length"}),
    "packed": (4, 1, {"packing": True, "max_length": 64}),
    "shared prefixes": (8, 1, {"rows": SAME_START}),
    "answers in trees": (4, 1, {"rows": TALKS, "template": REASONING}),
    "a step of one row": (8, 1, {"rows": ROWS[:9]}),
    "drop_last": (8, 1, {"dataloader_drop_last": True}),
    "stream": (8, 1, {"stream": True, "max_steps": 5}),
    "stream, accumulation": (4, 2, {"stream": True, "max_steps": 3}),
    "stream in parts": (8, 1, {"stream": True, "stream_parts": 4, "shuffle_dataset": True, "max_steps": 8}),
    "stream in parts, padded": (4, 2, {"stream": True, "stream_parts": 4, "max_steps": 8, "padding_free": False}),
    "own loss": (4, 2, {"subclass": True}),
    "loss function": (8, 1, {"rows": ROWS[:9], "function": True}),
    "LoRA, AdamW": (8, 1, {"lora": True, "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 20}),
    "tokens": (1, 4, {"max_tokens_per_batch": 80, "num_train_epochs": 2}),
}


class OwnLoss(SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:  # type: ignore[override]
        assert isinstance(inputs["labels"], torch.Tensor)
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


def summed(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
    """The cross-entropy of a batch / the items of the step."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def trainer(name: str, processes: int, tokenizer_folder: Path, output: Path, **more: Any) -> Any:
    """The trainer of one of `processes` for a case."""
    rows, accumulation, own_settings = CASES[name]
    settings: dict[str, Any] = {"save_strategy": "no", "logging_steps": 1, **SGD, **own_settings, **more}
    if "max_tokens_per_batch" in settings:
        accumulation //= processes
    else:
        settings["per_device_train_batch_size"] = rows // processes
    own = {
        key: settings.pop(key, None)
        for key in ("model", "folder", "rows", "template", "stream", "subclass", "lora", "function", "tied")
    }
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = own["template"] or tokenizer.chat_template
    data: Any = Dataset.from_list(own["rows"] or ROWS)
    args = SFTConfig(
        output_dir=str(output), report_to="none", use_cpu=True, precision="fp32", disable_tqdm=True,
        gradient_accumulation_steps=accumulation, per_device_eval_batch_size=2,
        **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return (OwnLoss if own["subclass"] else SFTTrainer)(
        own["folder"] or tiny(own["model"] or "llama", len(tokenizer), tie_word_embeddings=bool(own["tied"])),
        args,
        # In parts, 9, 8, 8 and 4 rows: some processes have none left for the last steps of an epoch.
        train_dataset=data.to_iterable_dataset(num_shards=7 if args.stream_parts > 1 else 1) if own["stream"] else data,
        eval_dataset=Dataset.from_list((own["rows"] or ROWS)[:5]),
        processing_class=tokenizer,
        compute_loss_func=summed if own["function"] else None,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if own["lora"] else None,
    )


def noted(trainer: Any) -> Any:
    """The rows that reach the collator from now on, by their tokens; what a process gets in place of rows is none."""
    rows: list[Any] = []
    collate = trainer.data_collator

    def noting(batch: list[Mapping[str, Any]]) -> Any:
        rows.append([list(row["input_ids"]) for row in batch if any(label != -100 for label in row["labels"])])
        return collate(batch)

    trainer.data_collator = noting
    return rows


def run_all(folder: Path, tokenizer: Path, names: list[str]) -> None:
    """What a process does: all cases, one after another. Each writes its rows, the first what came of the run."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    SFTTrainer.draw_page = None
    for name in names:
        made = trainer(name, processes, tokenizer, folder / name)
        if name == "evaluated before":
            made.evaluate()
        seen = noted(made)
        weights = trained(made)
        logs = [entry for entry in made.state.log_history if "loss" in entry]
        evaluated = made.evaluate()
        (folder / f"{name}.{rank}.json").write_text(
            json.dumps(
                {
                    "rows": seen,
                    "logs": logs,
                    "eval": evaluated,
                    "steps": made.state.global_step,
                    "examples": _examples(folder / name) if rank == 0 else None,
                }
            )
        )
        if rank == 0:
            save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{name}.safetensors")


def _examples(run: Path) -> Any:
    """What a run says of its examples, but for what depends on the order of neighbours."""
    if not (run / EXAMPLES).exists():
        return None
    found = json.loads((run / EXAMPLES).read_text())
    easiest = sorted(entry["parts"] for entry in found["easiest"])
    names = ("rows", "mean", "first_step", "last_step", "histogram")
    return {name: found[name] for name in names} | {"easiest": easiest}


RESUMED = ("short last step", "grouped by length", "stream", "stream in parts", "LoRA, AdamW", "tokens")
"""Cases that are broken off, and gone on with by other numbers of processes."""


def run_up_to(folder: Path, tokenizer: Path, steps: int, end: int) -> None:
    """Train each of RESUMED up to a step, from the checkpoint in its folder, if there is one. The first process writes
    the weights and the log at step `end`."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    SFTTrainer.draw_page = None
    heard: SimpleQueue[logging.LogRecord] = SimpleQueue()
    logging.getLogger("tunesmith.train.keeper").addHandler(QueueHandler(heard))
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "logging_steps": 2, "max_steps": steps}
    for name in RESUMED:
        made = trainer(name, processes, tokenizer, folder / name, **saving)
        weights = trained(made, resume_from_checkpoint=any((folder / name).glob("checkpoint-*")))
        if rank == 0 and steps == end:
            save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{name}.safetensors")
            logs = [entry for entry in made.state.log_history if "loss" in entry]
            (folder / f"{name}.json").write_text(json.dumps(logs))
    while not heard.empty():
        assert "of the stream again" not in heard.get().getMessage()
