"""Finished runs to push, and a record of one."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tunesmith.runs.record import Method, Origin, Prompt, RunRecord, Sample, SourceCount

QUESTION = [{"role": "user", "content": "What is two plus two?"}]


def record(**changes: Any) -> RunRecord:
    """Of a LoRA run on a data set from the hub and a file, evaluated on what the file held out."""
    chat = Origin.of_data("org/chat-rows:default")
    rows = Origin.of_data("/home/somebody/private/math.jsonl")
    counts = {"examples": 90, "tokens": 9000, "supervised_tokens": 4000}
    values: dict[str, Any] = {
        "versions": {"tunesmith": "0.1.0", "torch": "2.13.0"},
        "base_model": Origin.of_model("org/base"),
        "method": Method(kind="lora", rank=4, alpha=8.0, targets=("k_proj", "q_proj")),
        "trainable_parameters": 1_000,
        "total_parameters": 100_000,
        "data": (
            SourceCount(split="train", source="chat", origin=chat, **counts),
            SourceCount(split="train", source="math", origin=rows, **counts, dropped=3),
            SourceCount(split="math", source="math", origin=rows, examples=9, tokens=900, supervised_tokens=400),
        ),
        "settings": {"learning_rate": 2e-4, "max_length": 512, "packing": True, "train_on": "assistant"},
        "history": tuple(
            {"step": step, "loss": 3 / step} | ({"eval_math_loss": 4 / step} if step % 2 else {})
            for step in range(1, 6)
        ),
        "metrics": {"eval_math_loss": 0.5, "eval_math_mean_token_accuracy": 0.75, "eval_math_runtime": 3.0},
        "seconds": 3725.0,
        "device": "cpu",
        "prompts": (Prompt(prompt=tuple(QUESTION), expected="Four."), Prompt(prompt="a private row")),
        "samples": (Sample(prompt=Prompt(prompt=tuple(QUESTION), expected="4"), before="Five.", after="Four."),),
    }
    return RunRecord(**values | changes)


def full_run(folder: Path, model: Path, *, shards: int = 1, run_record: RunRecord | None = None) -> Path:
    """A run that saved a whole model: that in the folder `model`, with what a trainer leaves beside it."""
    shutil.copytree(model, folder)
    if shards > 1:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        places = {key: names[i % shards] for i, key in enumerate(sorted(weights))}
        for name in names:
            save_file({key: weights[key] for key in weights if places[key] == name}, folder / name, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _leftovers(folder)
    if run_record is not None:
        run_record.write(folder)
    return folder


def adapter_run(folder: Path, model: Path, *, run_record: RunRecord | None = None) -> Path:
    """A run that saved random LoRA adapters for the model in the folder `model`, and its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    _leftovers(folder)
    if run_record is not None:
        run_record.write(folder)
    return folder


LEFTOVERS = ("checkpoint-20/", "events.log", "optimizer.pt", "pytorch_model.bin", "recipe.yaml", "training_args.json")


def _leftovers(folder: Path) -> None:
    """What nobody but the user needs, or may see."""
    (folder / "checkpoint-20").mkdir(exist_ok=True)
    (folder / "checkpoint-20" / "optimizer.pt").write_bytes(b"state")
    for name in LEFTOVERS[1:]:
        (folder / name).write_text(f"secret of {folder}")
