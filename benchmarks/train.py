"""Tokens per second, memory and loss of training: ours beside that of TRL and of transformers' own trainer, in turns,
on the same model, rows and settings.

    python benchmarks/train.py --data alpaca_en_demo.json [--pairs 3] [--steps 4] [--json out.json] [--plot out.svg]
                               [--peers trl,trl-default,trainer]
                               [--modes lora,full,packed,long,lora-bf16,full-bf16,packed-bf16]

Each measurement is a process of its own: AdamW, the rows in the same order; fp32, or where a mode ends in -bf16,
bfloat16 on both sides. `trl` is its fastest setting, without gradient checkpointing; `trl-default` leaves precision and
checkpointing as TRL sets them; `trainer` is `transformers.Trainer` with a padding collator. Tokens are those of the
rows, never padding. The first two steps are left out of the rates: they also load libraries, check the model and, where
the second has more tokens, take memory from the system for the first time. What they and everything else outside of
the later steps take is printed beside. Needs `pip install -e '.[bench]'`.

Two shares of a limit are told. `of the machine` divides the arithmetic by the rate of the best large product of the
same process in its format. Products are counted as 2 FLOP for each multiply-add: 4 x (weights in products) a token for
adapters on a frozen model (forward, and the gradient of the inputs), 6 x for full training; 6 x the own weights of
adapters; and attention's. `of the shapes` is what the step's own products would take alone (`benchmarks/roofline.py`).
"""

import argparse
import json
import platform
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
LONG = 4096
RANK = 16
MODES = ("lora", "full", "packed", "long", "lora-bf16", "full-bf16", "packed-bf16")
PEERS = ("trl", "trl-default", "trainer")
WARM = 2
"""Steps that are left out of the rates."""
TEXT = "{instruction}\n{input}\n\n{output}<|im_end|>"


def run(side: str, mode: str, data: Path, steps: int) -> dict[str, Any]:
    """Train `steps` steps: the seconds, tokens and loss of each, the seconds outside of the later steps, the peak
    memory, and for our side the shares of the limits."""
    started = time.perf_counter()
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    trainer_of, config_of = _classes(side)
    mode, half = mode.removesuffix("-bf16"), mode.endswith("-bf16")
    recorded = steps if side == "ours" else None  # one step more, for the shapes
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == recorded:
                profile.__enter__()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)
            if state.global_step - 1 == recorded:
                profile.__exit__(None, None, None)
            elif state.global_step == WARM:
                self.until_warm = time.perf_counter() - started

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    tokens: list[int] = []
    pairs: list[int] = []

    class Ordered(trainer_of):  # type: ignore[misc, valid-type]
        """Batches in the order of the rows, so that both sides see the same; and their tokens are counted."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            samples, count = super().get_batch_samples(*args, **kwargs)
            tokens.append(sum(_tokens(batch) for batch in samples))
            pairs.append(sum(length * (length + 1) // 2 for batch in samples for length in batch.get("lengths", ())))
            return samples, count

    packed = {"packing": True} if mode == "packed" else {}
    lengths = {} if side == "trainer" else {"max_length": {"packed": LENGTH, "long": LONG}.get(mode, 1024)} | packed
    precision = {} if side == "trl-default" else {"bf16": half, "gradient_checkpointing": False}
    args = config_of(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS if mode in ("lora", "full") else 1,
        max_steps=steps + (recorded is not None),
        learning_rate=1e-3 if mode != "full" else 2e-5,
        lr_scheduler_type="constant",
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **lengths,
        **precision,
    )

    dtype = torch.bfloat16 if half else torch.float32
    clock = Clock()
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(demo(), dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(demo())
    rows = _rows(mode, data, args.max_steps, tokenizer)
    trainer = Ordered(
        model,
        args,
        processing_class=tokenizer,
        callbacks=[clock],
        **_prepared(side, model, tokenizer, rows, None if mode == "full" else lora),
    )
    trainer.train()
    whole = time.perf_counter() - started - sum(clock.seconds[steps:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {
        "seconds": clock.seconds[WARM:steps],
        "tokens": tokens[WARM:steps],
        "losses": clock.losses[:steps],
        "first": clock.seconds[:WARM],
        "first_tokens": tokens[:WARM],
        "fixed": whole - sum(clock.seconds[:steps]),
        "until_warm": clock.until_warm,
        "peak_mb": peak,
    }
    if recorded is not None:
        result |= _shares(trainer.model, mode, dtype, result, tokens[steps], pairs, steps, profile)
    return result


def _classes(side: str) -> tuple[Any, Any]:
    if side == "ours":
        from tunesmith import SFTConfig, SFTTrainer
    elif side == "trainer":
        from transformers import Trainer, TrainingArguments

        return Trainer, TrainingArguments
    else:
        from trl import SFTConfig, SFTTrainer
    return SFTTrainer, SFTConfig


def _rows(mode: str, data: Path, steps: int, tokenizer: Any) -> list[str]:
    """The texts of as many steps; for long rows, texts one after another until a row has nearly as many tokens as it
    may have."""
    texts = [TEXT.format(**row) for row in json.loads(data.read_text(encoding="utf-8"))]
    if mode == "packed":
        return texts
    if mode != "long":
        return texts[: ROWS * steps]
    long, row, size = [], "", 0
    for text in texts:
        count = len(tokenizer(text)["input_ids"])
        if size + count > LONG - 8:
            long.append(row)
            row, size = "", 0
        row, size = row + text, size + count
    return long[:steps]


def _prepared(side: str, model: Any, tokenizer: Any, texts: list[str], lora: Any) -> dict[str, Any]:
    """What the trainer of a side takes for its data and adapters."""
    from datasets import Dataset

    dataset = Dataset.from_list([{"text": text} for text in texts])
    if side != "trainer":
        return {"train_dataset": dataset, "peft_config": lora}
    from peft import get_peft_model
    from transformers import DataCollatorForLanguageModeling

    if lora is not None:
        get_peft_model(model, lora)  # puts the adapters into the model itself
    return {
        "train_dataset": dataset.map(lambda row: tokenizer(row["text"]), remove_columns="text"),
        "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False),
    }


def _shares(
    model: Any, mode: str, dtype: Any, result: dict[str, Any], recorded: int, pairs: list[int], steps: int, profile: Any
) -> dict[str, float]:
    """The shares of the two limits; `recorded` are the tokens of the step that the profiler saw."""
    import roofline

    config = model.config
    attention = 3 * 4 * config.num_hidden_layers * config.hidden_size
    rate, spent = roofline.rate(dtype), sum(result["seconds"])
    flop = sum(result["tokens"]) * flop_per_token(model, mode) + sum(pairs[WARM:steps]) * attention
    alone = roofline.seconds(roofline.products(profile, config.hidden_size // config.num_attention_heads), dtype)
    limit = alone + pairs[steps] * attention / rate
    return {
        "machine": rate / 1e9,
        "of_machine": flop / spent / rate,
        "of_shapes": limit / recorded * sum(result["tokens"]) / spent,
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


def demo() -> str:
    from tunesmith.model.demo_model import demo_model_path

    return str(demo_model_path())


def measure(side: str, mode: str, data: Path, steps: int) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--data", str(data), "--side", side, "--modes", mode, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"rate": sum(result["tokens"]) / sum(result["seconds"])}


def compare(mode: str, peer: str, data: Path, steps: int, pairs: int) -> dict[str, Any]:
    """Pairs of measurements in turns, and the medians of their ratios."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], peer: []}
    for pair in range(pairs):
        for side, results in runs.items():
            last = measure(side, mode, data, steps)
            results.append(last)
            print(
                f"{mode}, pair {pair + 1}, {side}: {last['rate']:.1f} tokens/s, {last['peak_mb']:,.0f} MB, "
                + _limits(last)
                + f"steps 1 and 2 {' + '.join(f'{s:.1f}' for s in last['first'])} s, "
                + f"outside of steps {last['fixed']:.1f} s, losses "
                + " ".join(f"{loss:.4f}" for loss in last["losses"]),
                flush=True,
            )
    both = list(zip(runs["ours"], runs[peer], strict=True))
    ratios = [ours["rate"] / theirs["rate"] for ours, theirs in both]
    return {
        "mode": mode,
        "peer": peer,
        "processor": processor(),
        "runs": runs,
        "rate": {side: statistics.median(run["rate"] for run in results) for side, results in runs.items()},
        "peak_mb": {side: statistics.median(run["peak_mb"] for run in results) for side, results in runs.items()},
        "until_warm": {side: statistics.median(run["until_warm"] for run in results) for side, results in runs.items()},
        "speed": statistics.median(ratios),
        "worst": min(ratios),
        "memory": statistics.median(ours["peak_mb"] / theirs["peak_mb"] for ours, theirs in both),
        "of_machine": statistics.median(run["of_machine"] for run in runs["ours"]),
        "of_shapes": statistics.median(run["of_shapes"] for run in runs["ours"]),
        "loss_difference": max(
            abs(a - b) for ours, theirs in both for a, b in zip(ours["losses"], theirs["losses"], strict=True)
        ),
    }


def _limits(run: dict[str, Any]) -> str:
    """The shares of the limits, which are told of our side."""
    if "machine" not in run:
        return ""
    return f"{run['of_machine']:.0%} of {run['machine']:.0f} GFLOP/s, {run['of_shapes']:.0%} of the shapes, "


def processor() -> str:
    """The name of the processor and its widest vectors."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3))
    results = [r for r in results if r["peer"] == "trl"]
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
    parser.add_argument("--peers", default="trl")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--side", choices=("ours", *PEERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run(arguments.side, arguments.modes, arguments.data, arguments.steps)))
        return
    demo()  # converted before the first clock starts
    results = [
        compare(mode, peer, arguments.data, arguments.steps, arguments.pairs)
        for mode in arguments.modes.split(",")
        for peer in arguments.peers.split(",")
    ]
    print(f"\n{processor()}\n")
    titles = "training|peer|its tokens/s|ours|ratio|worst|its MB|ours|ratio|of the machine|of the shapes"
    titles += "|until step 2 is done|ours|losses differ by"
    print("| " + titles.replace("|", " | ") + " |\n" + "| --- " * 14 + "|")
    for r in sorted(results, key=lambda r: r["worst"]):
        peer = r["peer"]
        print(
            f"| {r['mode']} | {peer} | {r['rate'][peer]:.1f} | {r['rate']['ours']:.1f} | {r['speed']:.1f}x "
            f"| {r['worst']:.1f}x | {r['peak_mb'][peer]:,.0f} | {r['peak_mb']['ours']:,.0f} | {r['memory']:.2f} "
            f"| {r['of_machine']:.0%} | {r['of_shapes']:.0%} "
            f"| {r['until_warm'][peer]:.1f} s | {r['until_warm']['ours']:.1f} s | {r['loss_difference']:.1e} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
