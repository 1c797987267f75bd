"""Tokens per second, memory and loss of training: ours against TRL's, in turns, on the same model, rows and settings.

    python benchmarks/train.py --data alpaca_en_demo.json [--pairs 3] [--steps 4] [--json out.json] [--plot out.svg]
                               [--modes lora,full,packed,lora-bf16,packed-bf16]

Each measurement is a process of its own: AdamW, the rows in the same order, no gradient checkpointing; fp32, or where a
mode ends in -bf16, bfloat16 on both sides. Tokens are those of the rows, never padding. The first two steps are left
out of the rates: they also load libraries, check the model and, where the second has more tokens, take memory from the
system for the first time. Needs `pip install -e '.[bench]'`.

The roofline is the rate of the best large product of the same process in its format, by either library inside torch.
Products are counted as 2 FLOP for each multiply-add: 4 x (weights in products) a token for adapters on a frozen model
(forward, and the gradient of the inputs), 6 x for full training; 6 x the own weights of adapters; and attention's,
of each token with those before it in its document: 4 x layers x width for each such pair forward, twice that backward.
What is computed in vain, masked pairs for one, counts as nothing.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = 8
LENGTH = 2048
RANK = 16
MODES = ("lora", "full", "packed", "lora-bf16", "packed-bf16")
WARM = 2
"""Steps that are left out of the rates."""


def run(side: str, mode: str, data: Path, steps: int) -> dict[str, Any]:
    """Train `steps` steps; the seconds and tokens of each step but the first, the loss of each, the peak memory."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    if side == "ours":
        from tunesmith import SFTConfig, SFTTrainer
    else:
        from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    tokens: list[int] = []
    pairs: list[int] = []

    class Ordered(SFTTrainer):  # type: ignore[misc, valid-type]
        """Batches in the order of the rows, so that both sides see the same; and their tokens are counted."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            samples, count = super().get_batch_samples(*args, **kwargs)
            tokens.append(sum(_tokens(batch) for batch in samples))
            pairs.append(sum(length * (length + 1) // 2 for batch in samples for length in batch.get("lengths", ())))
            return samples, count

    mode, half = mode.removesuffix("-bf16"), mode.endswith("-bf16")
    packed = mode == "packed"
    rows = json.loads(data.read_text(encoding="utf-8"))
    rows = rows if packed else rows[: ROWS * steps]
    text = "{instruction}\n{input}\n\n{output}<|im_end|>"
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1 if packed else ROWS,
        packing=packed,
        max_length=LENGTH if packed else 1024,
        max_steps=steps,
        learning_rate=1e-3 if mode != "full" else 2e-5,
        bf16=half,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    from datasets import Dataset

    dtype = torch.bfloat16 if half else torch.float32
    clock = Clock()
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Ordered(
        AutoModelForCausalLM.from_pretrained(demo(), dtype=dtype),
        args,
        train_dataset=Dataset.from_list([{"text": text.format(**row)} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(demo()),
        peft_config=None if mode == "full" else lora,
        callbacks=[clock],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    config = trainer.model.config
    flop = sum(tokens[WARM:steps]) * flop_per_token(trainer.model, mode)
    flop += sum(pairs[WARM:steps]) * 3 * 4 * config.num_hidden_layers * config.hidden_size
    return {
        "seconds": clock.seconds[WARM:],
        "tokens": tokens[WARM:steps],
        "losses": clock.losses,
        "peak_mb": peak,
        "roofline": roofline(dtype),
        "flop": flop,
    }


def _tokens(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def flop_per_token(model: Any, mode: str) -> float:
    products = adapters = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            adapters += parameter.numel()
        elif parameter.dim() == 2:  # the embedding is the head as well
            products += parameter.numel()
    return (6 if mode == "full" else 4) * products + 6 * adapters


def roofline(dtype: Any) -> float:
    """GFLOP/s of the best large product."""
    import torch

    from tunesmith.model.linear import onednn

    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = float("inf")
    for _ in range(8):
        for way in (torch.nn.functional.linear, onednn):
            started = time.perf_counter()
            way(a, b)
            best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best / 1e9


def demo() -> str:
    from tunesmith.model.demo_model import demo_model_path

    return str(demo_model_path())


def measure(side: str, mode: str, data: Path, steps: int) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--data", str(data), "--side", side, "--modes", mode, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["rate"] = sum(found["tokens"]) / sum(found["seconds"])
    found["share"] = found["flop"] / sum(found["seconds"]) / found["roofline"] / 1e9
    return found


def compare(mode: str, data: Path, steps: int, pairs: int) -> dict[str, Any]:
    """Pairs of measurements in turns, and the medians of their ratios."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for pair in range(pairs):
        for side, results in found.items():
            results.append(measure(side, mode, data, steps))
            last = results[-1]
            print(
                f"{mode}, pair {pair + 1}, {side}: {last['rate']:.1f} tokens/s, {last['peak_mb']:,.0f} MB, "
                + (f"{last['share']:.0%} of {last['roofline']:.0f} GFLOP/s, " if side == "ours" else "")
                + "losses "
                + " ".join(f"{loss:.4f}" for loss in last["losses"]),
                flush=True,
            )
    both = list(zip(found["ours"], found["trl"], strict=True))
    return {
        "mode": mode,
        "runs": found,
        "rate": {side: statistics.median(run["rate"] for run in runs) for side, runs in found.items()},
        "peak_mb": {side: statistics.median(run["peak_mb"] for run in runs) for side, runs in found.items()},
        "speed": statistics.median(ours["rate"] / trl["rate"] for ours, trl in both),
        "memory": statistics.median(ours["peak_mb"] / trl["peak_mb"] for ours, trl in both),
        "share": statistics.median(run["share"] for run in found["ours"]),
        "loss_difference": max(
            abs(a - b) for ours, trl in both for a, b in zip(ours["losses"], trl["losses"], strict=True)
        ),
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3))
    labels = [r["mode"].replace("-bf16", "\nbfloat16") for r in results]
    sides = (("trl", -0.2, "TRL", "#9aa5b1"), ("ours", 0.2, "tunesmith", "#d9622b"))
    for axis, key, title in ((axes[0], "rate", "tokens per second"), (axes[1], "peak_mb", "peak memory, MB")):
        for side, shift, name, color in sides:
            bars = axis.bar(
                [i + shift for i in range(len(results))], [r[key][side] for r in results], 0.4, label=name, color=color
            )
            axis.bar_label(bars, fmt="{:,.0f}", fontsize=7, padding=1)
        axis.set_xticks(range(len(results)), labels, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run(arguments.side, arguments.modes, arguments.data, arguments.steps)))
        return
    demo()  # converted before the first clock starts
    modes = arguments.modes.split(",")
    results = [compare(mode, arguments.data, arguments.steps, arguments.pairs) for mode in modes]
    print("\n| training | TRL tokens/s | ours | ratio | TRL MB | ours | ratio | of the roofline | loss differs by |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in results:
        print(
            f"| {r['mode']} | {r['rate']['trl']:.1f} | {r['rate']['ours']:.1f} | {r['speed']:.1f}x "
            f"| {r['peak_mb']['trl']:,.0f} | {r['peak_mb']['ours']:,.0f} | {r['memory']:.2f} "
            f"| {r['share']:.0%} | {r['loss_difference']:.1e} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
