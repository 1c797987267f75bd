"""Pairs a second, memory and loss of DPO with LoRA: ours beside our own path without sharing, and beside TRL, in turns,
on the same model, pairs and settings.

    python benchmarks/preference.py --data dpo_en_demo.json [--modes data,long] [--peers unshared,trl] [--turns 3]
                                    [--steps 4] [--rows 4] [--json out.json]

`data` has the pairs of the file (`conversations`, `chosen`, `rejected`); `long` has made ones, a prompt of 600 tokens
and two answers of 100. All are pairs of texts, which both sides make into the same tokens. Each measurement is a
process of its own: AdamW, fp32, the pairs in the same order, without gradient checkpointing.

    ours         the prompt of a pair once
    unshared     ours with the prompt of a pair twice: no setting does that, so the benchmark takes sharing away
    trl          TRL's fastest setting on a CPU
    ...-before   the same with `precompute_ref_log_probs`; what it takes before the first step is printed beside

The first two steps are left out of the rates, as in `benchmarks/train.py`. CPU seconds are of all threads; on a machine
that others use, they say more than the clock. `predicted` is the ratio of the arithmetic that the counts of tokens ask
for: a computed token takes 6 x (weights in products) FLOP, 2 of them for the reference, and a scored token as much of
the head. Padding is computed, too. Needs `pip install -e '.[bench]'`.
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
from random import Random
from typing import Any

from train import RANK, WARM, demo, processor

MODES = ("data", "long")
SIDES = ("ours", "unshared", "trl", "ours-before", "unshared-before", "trl-before")
LENGTH = 1024
PROMPT, ANSWER = 600, 100
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he")
"""Words that are a token each, a space in front of them included."""

Row = dict[str, str]


def rows_of(mode: str, data: Path, count: int) -> list[Row]:
    """`count` pairs of texts."""
    if mode == "long":
        random = Random(0)

        def text(size: int) -> str:
            return "".join(f" {random.choice(WORDS)}" for _ in range(size))

        return [{"prompt": text(PROMPT), "chosen": text(ANSWER), "rejected": text(ANSWER)} for _ in range(count)]
    rows = []
    for row in json.loads(data.read_text(encoding="utf-8")):
        prompt = "".join(f"{turn['value']}\n\n" for turn in row["conversations"])
        rows.append({"prompt": prompt, "chosen": row["chosen"]["value"], "rejected": row["rejected"]["value"]})
    return rows[:count]


def run(side: str, mode: str, data: Path, steps: int, count: int) -> dict[str, Any]:
    """Train `steps` steps of `count` pairs: the seconds, CPU seconds and loss of each, what goes through the model, the
    seconds before the first step, and the peak memory."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    way, _, before = side.partition("-")
    if way == "trl":
        from trl import DPOConfig, DPOTrainer
    else:
        from tunesmith import DPOConfig, DPOTrainer
        from tunesmith.data import batches

        if way == "unshared":
            batches.flat_row = lambda groups, *, across: None

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.cpu: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started[0])
            self.cpu.append(time.process_time() - self.started[1])

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    computed: list[int] = []
    scored: list[int] = []

    class Ordered(DPOTrainer):  # type: ignore[misc, valid-type]
        """Batches in the order of the pairs, so that all sides see the same; and their tokens are counted."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            samples, number = super().get_batch_samples(*args, **kwargs)
            for batch in samples:
                ours = way != "trl"
                computed.append(batch.computed_tokens if ours else batch["input_ids"].numel())
                scored.append(int(batch.supervised if ours else batch["completion_mask"].sum()))
            return samples, number

    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=count,
        max_steps=steps,
        max_length=LENGTH,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        precompute_ref_log_probs=bool(before),
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({"share_prefix": "off"} if way == "unshared" else {}),
    )
    torch.manual_seed(0)
    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(demo(), dtype=torch.float32)
    started = time.perf_counter()
    trainer = Ordered(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows_of(mode, data, count * steps)),
        processing_class=AutoTokenizer.from_pretrained(demo()),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    made = time.perf_counter() - started
    trainer.train()
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.dim() == 2}
    head = trainer.model.get_output_embeddings().weight.numel()
    body = sum(weight.numel() for name, weight in weights.items() if "lora_" not in name) - head
    passes = 4 if before else 6
    return {
        "seconds": clock.seconds[WARM:],
        "cpu": clock.cpu[WARM:],
        "losses": clock.losses,
        "computed": sum(computed[WARM:steps]),
        "flop": passes * (body * sum(computed[WARM:steps]) + head * sum(scored[WARM:steps])),
        "first": clock.seconds[:WARM],
        "before": made,
        "pairs": count * (steps - WARM),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure(side: str, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--data", str(arguments.data), "--side", side, "--modes", mode]
    command += ["--steps", str(arguments.steps), "--rows", str(arguments.rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result |= {name: result["pairs"] / sum(result[of]) for name, of in (("rate", "seconds"), ("cpu_rate", "cpu"))}
    return result


def compare(mode: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each peer beside ours: the medians of the ratios of the turns."""
    peers = arguments.peers.split(",")
    sides = list(dict.fromkeys(side for peer in peers for side in (_ours(peer), peer)))
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(arguments.turns):
        for side in sides if turn % 2 == 0 else reversed(sides):
            last = measure(side, mode, arguments)
            runs[side].append(last)
            print(
                f"{mode}, turn {turn + 1}, {side}: {last['rate']:.2f} pairs/s, {last['cpu_rate']:.2f} a CPU second, "
                f"{last['peak_mb']:,.0f} MB, {last['computed']:,} tokens computed, {last['before']:.1f} s before the "
                f"steps, steps 1 and 2 {' + '.join(f'{s:.1f}' for s in last['first'])} s, losses "
                + " ".join(f"{loss:.4f}" for loss in last["losses"]),
                flush=True,
            )
    found = []
    for peer in peers:
        both = list(zip(runs[_ours(peer)], runs[peer], strict=True))

        def ratio(name: str, both: list[Any] = both) -> float:
            return statistics.median(ours[name] / theirs[name] for ours, theirs in both)

        found.append(
            {
                "mode": mode,
                "peer": peer,
                "rate": [statistics.median(run["rate"] for run in runs[side]) for side in (peer, _ours(peer))],
                "peak_mb": [statistics.median(run["peak_mb"] for run in runs[side]) for side in (peer, _ours(peer))],
                "speed": ratio("rate"),
                "worst": min(ours["rate"] / theirs["rate"] for ours, theirs in both),
                "cpu": ratio("cpu_rate"),
                "predicted": 1 / ratio("flop"),
                "memory": ratio("peak_mb"),
                "loss_difference": max(
                    abs(a - b) for ours, theirs in both for a, b in zip(ours["losses"], theirs["losses"], strict=True)
                ),
                "runs": {side: runs[side] for side in (_ours(peer), peer)},
            }
        )
    return found


def _ours(peer: str) -> str:
    """The side that is measured beside `peer`: with references computed before, where it has them."""
    return "ours-before" if peer.endswith("-before") else "ours"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--peers", default="unshared,trl,unshared-before,trl-before")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=WARM + 2)
    parser.add_argument("--rows", type=int, default=4, help="Pairs a step.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps <= WARM:
        parser.error(f"--steps {arguments.steps}: the first {WARM} are not measured; write more")
    if arguments.side:
        print(json.dumps(run(arguments.side, arguments.modes, arguments.data, arguments.steps, arguments.rows)))
        return
    demo()  # converted before the first clock starts
    results = [result for mode in arguments.modes.split(",") for result in compare(mode, arguments)]
    print(f"\n{processor()}, {arguments.rows} pairs a step\n")
    titles = "pairs|beside|its pairs/s|ours|ratio|worst|by CPU time|predicted|its MB|ours|ratio|losses differ by"
    print("| " + titles.replace("|", " | ") + " |\n" + "| --- " * 12 + "|")
    for r in results:
        print(
            f"| {r['mode']} | {r['peer']} | {r['rate'][0]:.2f} | {r['rate'][1]:.2f} | {r['speed']:.2f}x "
            f"| {r['worst']:.2f}x | {r['cpu']:.2f}x | {r['predicted']:.2f}x | {r['peak_mb'][0]:,.0f} "
            f"| {r['peak_mb'][1]:,.0f} | {r['memory']:.2f} | {r['loss_difference']:.1e} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
