"""What a run did and what it leaves, in JSON's types: `json` writes floats such that they are read back to the bit."""

import hashlib
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PrinterCallback

from tunesmith import SFTTrainer

Facts = dict[str, Any]


def finished(trainer: SFTTrainer, **arguments: Any) -> Facts:
    """Trains, evaluates and saves; the facts of that."""
    trainer.remove_callback(PrinterCallback)
    trainer.train(**arguments)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    folder, model = Path(str(trainer.args.output_dir)), trainer.model
    assert model is not None
    named = dict(model.named_parameters())
    return {
        "log": [timeless(entry) for entry in trainer.state.log_history],
        "metrics": [timeless(entry) for entry in lines(folder / "metrics.jsonl")],
        "eval": timeless(metrics),
        "data": data(trainer),
        "weights": {
            "trained": digest({name: value for name, value in named.items() if value.requires_grad}),
            "all": digest(named),
        },
        "tensors": {str(path.relative_to(folder)): digest(load_file(path)) for path in below(folder, ".safetensors")},
        "examples": content(folder / "examples.json"),
        "preflight": content(folder / "preflight.json"),
        "samples": [timeless(entry) for entry in lines(folder / "samples.jsonl")],
        "skipped": lines(folder / "skipped_rows.jsonl"),
        "files": files(folder),
    }


def timeless(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`entry` without what depends on how fast the machine is, and on what else it holds in memory."""
    return {
        name: value
        for name, value in entry.items()
        if name not in ("seconds", "memory_mb") and not name.endswith(("_runtime", "_per_second"))
    }


def data(trainer: SFTTrainer) -> dict[str, Any]:
    """What was made of the rows, by split."""
    evaluated = trainer.eval_dataset
    parts = evaluated if isinstance(evaluated, Mapping) else {} if evaluated is None else {"": evaluated}
    splits = {"train": trainer.train_dataset} | {f"eval {name}".strip(): rows for name, rows in parts.items()}
    return {name: prepared(rows) for name, rows in splits.items()}


def prepared(rows: Any) -> dict[str, Any]:
    """Counts, and a digest of each column; of a stream, those of its first rows."""
    listed: list[dict[str, Any]] = list(islice(rows, 16)) if isinstance(rows, IterableDataset) else list(rows)
    names = ("input_ids", "labels", "weights", "seq_lengths")
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in listed] for name in names}
    return {
        "rows": len(listed),
        "tokens": sum(map(len, columns["input_ids"])),
        "supervised": sum(label != -100 for labels in columns["labels"] for label in labels),
    } | {name: short(json.dumps(values).encode()) for name, values in columns.items()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def below(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())


def files(folder: Path) -> dict[str, list[str]]:
    """The names of all files, by folder."""
    found: dict[str, list[str]] = {}
    for path in below(folder):
        found.setdefault(str(path.parent.relative_to(folder)), []).append(path.name)
    return found


def lines(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n") if line]  # texts may hold line breaks of other kinds


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
