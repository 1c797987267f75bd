"""Seconds of a training step by the tokens of its one flat batch: do they grow linearly, up to 16k?

    python benchmarks/scaling.py --data alpaca_en_demo.json [--tokens 1024,2048,4096,8192,16384] [--rounds 2]
                                 [--json out.json] [--plot out.svg]

LoRA on the demo model, fp32, the rows of the file side by side until the batch has so many tokens: forward, backward,
AdamW. Gradient checkpointing is on, so that 16k
tokens fit in 16 GB; it adds a forward to each step alike. The sizes take turns, and the fastest round of each counts.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any


def batches(data: Path, sizes: list[int]) -> dict[int, dict[str, Any]]:
    """A flat batch of each size: whole rows, the last one cut."""
    from transformers import AutoTokenizer

    from tunesmith.data.batches import FlatCollator

    tokenizer = AutoTokenizer.from_pretrained(demo())
    text = "{instruction}\n{input}\n\n{output}<|im_end|>"
    rows = [
        tokenizer(text.format(**row)).input_ids for row in json.loads(data.read_text(encoding="utf-8"))[: max(sizes)]
    ]
    found = {}
    for size in sizes:
        picked: list[dict[str, Any]] = []
        left = size
        for ids in rows:
            picked.append({"input_ids": ids[:left]})
            left -= len(picked[-1]["input_ids"])
            if left < 2:
                break
        found[size] = FlatCollator()(picked)
    return found


def demo() -> str:
    from tunesmith.model.demo_model import demo_model_path

    return str(demo_model_path())


def steps(data: Path, sizes: list[int], rounds: int) -> dict[int, float]:
    import torch
    from peft import LoraConfig, get_peft_model

    from tunesmith.model.linear import speed_up
    from tunesmith.model.load import load_model
    from tunesmith.objectives.supervised import supervised_loss
    from tunesmith.train.limits import keep_freed_memory
    from tunesmith.train.setup import ready_for_batches

    model = load_model("demo")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, lora).train()
    ready_for_batches(adapted, flat=True)
    speed_up(adapted)
    keep_freed_memory()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    best = dict.fromkeys(sizes, float("inf"))
    made = batches(data, sizes)
    for warm in (True, *[False] * rounds):
        for size in sizes[:1] if warm else sizes:
            batch = made[size]
            targets = batch.targets()
            started = time.perf_counter()
            adapted(**batch.inputs(), targets=targets, objective=supervised_loss).outcome.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if not warm:
                best[size] = min(best[size], time.perf_counter() - started)
    return best


def plot(seconds: dict[int, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4, 3))
    axis.plot(list(seconds), list(seconds.values()), marker="o")
    axis.set_xlabel("tokens in the batch")
    axis.set_ylabel("seconds a step")
    axis.set_xlim(0)
    axis.set_ylim(0)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", default="1024,2048,4096,8192,16384")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    seconds = steps(arguments.data, [int(size) for size in arguments.tokens.split(",")], arguments.rounds)
    print("| tokens | seconds | ms a token |\n| --- | --- | --- |")
    for size, taken in seconds.items():
        print(f"| {size:,} | {taken:.1f} | {1000 * taken / size:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(seconds, indent=2) + "\n")
    if arguments.plot:
        plot(seconds, arguments.plot)


if __name__ == "__main__":
    main()
