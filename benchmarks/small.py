"""Where a small step goes: LoRA on the demo model, one row of some 200 tokens a step.

    python benchmarks/small.py --data alpaca_en_demo.json [--steps 12] [--tokens 200] [--functions] [--operations]

The parts of a step in seconds of the thread that trains, as nested measurements: what is left of each after the parts
below it were taken off. Two limits are measured in the same process: the time that the products need at the best rate
of a large product, and the time that products of the step's own shapes need by themselves (`roofline.py`).
`--functions` adds the profile of Python's functions, `--operations` that of torch's operations; both make a step
slower. On a machine that is busy, OMP_NUM_THREADS=1 tells better who computes: no thread waits for others.
"""

import argparse
import cProfile
import functools
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

WARM = 3


class Parts:
    """Time by part, without that of the parts within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[list[float]] = []

    def around(self, owner: Any, name: str, label: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._open.append([0.0])
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                (within,) = self._open.pop()
                self.seconds[label] += taken - within
                if self._open:
                    self._open[-1][0] += taken

        setattr(owner, name, timed)


def run(data: Path, steps: int, tokens: int, *, functions: bool, operations: bool) -> None:
    import tunesmith  # noqa: F401  (before torch)

    sys.path.insert(0, str(Path(__file__).parent))
    import roofline
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from train import flop_per_token

    from tunesmith import SFTConfig, SFTTrainer
    from tunesmith.train.guard import Guard
    from tunesmith.train.journal import Journal
    from tunesmith.train.keeper import Keeper
    from tunesmith.train.meter import Meter
    from tunesmith.train.recovery import Recovery

    rows = [row for row in json.loads(data.read_text(encoding="utf-8")) if len(row["output"]) > 5 * tokens]
    text = "{instruction}\n{input}\n\n{output}"
    parts, stamps, snapshots = Parts(), list[float](), list[dict[str, float]]()
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler, tracer = cProfile.Profile(), torch.profiler.profile(activities=activities)
    recorder = torch.profiler.profile(activities=activities, record_shapes=True)

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            stamps.append(time.perf_counter())
            snapshots.append(dict(parts.seconds))
            if functions and state.global_step == WARM:
                profiler.enable()
            if operations and state.global_step == WARM:
                tracer.start()
            if state.global_step == WARM + steps:
                profiler.disable()
                if operations:
                    tracer.stop()
                recorder.start()

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model="demo",
            args=SFTConfig(
                output_dir=folder,
                precision="fp32",
                per_device_train_batch_size=1,
                max_steps=steps + WARM + 1,
                max_length=tokens,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                sample_prompts=0,
                allow_no_eos=True,
            ),
            train_dataset=Dataset.from_list([{"text": text.format(**row)} for row in rows[: 2 * (steps + WARM + 1)]]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        for owner, name, label in (
            (SFTTrainer, "batch_loss", "forward and loss"),
            (trainer.accelerator, "backward", "backward"),
            (trainer.accelerator, "clip_grad_norm_", "clipping"),
            (torch.optim.AdamW, "step", "optimizer"),
            (transformers.Trainer, "get_batch_samples", "loader"),
            (transformers.Trainer, "log", "log: Trainer"),
            (transformers.trainer_callback.CallbackHandler, "call_event", "callbacks"),
            (Guard, "note", "guard"),
            (Guard, "check", "guard"),
            (Journal, "note_losses", "journal: losses"),
            (Journal, "note_batch", "journal: batches"),
            (Journal, "note_step", "journal: step"),
            (Meter, "add", "meter"),
            (Meter, "read", "meter"),
            (Meter, "report", "meter"),
            (Keeper, "note_step", "keeper"),
            (Keeper, "took", "keeper"),
            (Recovery, "step", "recovery, Trainer.training_step"),
            (torch.nn.Module, "zero_grad", "zero_grad"),
        ):
            parts.around(owner, name, label)
        trainer.train()
        recorder.stop()
        stamps, snapshots = stamps[WARM:], snapshots[WARM:]
        count = len(stamps) - 1
        step = (stamps[-1] - stamps[0]) / count
        median = statistics.median(b - a for a, b in pairwise(stamps))
        config, rate = trainer.model.config, roofline.rate(torch.float32)
        attention = 12 * config.num_hidden_layers * config.hidden_size * tokens * (tokens + 1) / 2 / rate
        shapes = roofline.products(recorder, config.hidden_size // config.num_attention_heads)
        limits = {
            "of a large product": tokens * flop_per_token(trainer.model, "lora") / rate + attention,
            "of its own shapes": roofline.seconds(shapes, torch.float32) + attention,
        }
    print(f"| a step of {tokens} tokens | {step:.3f} s, median {median:.3f} s | |\n| --- | --- | --- |")
    for name, limit in limits.items():
        print(f"| its products at the rate {name} | {limit:.3f} s | {limit / median:.0%} of the median |")
    known = 0.0
    for label in sorted(parts.seconds, key=lambda label: -parts.seconds[label]):
        taken = (snapshots[-1].get(label, 0.0) - snapshots[0].get(label, 0.0)) / count
        known += taken
        print(f"| {label} | {taken * 1e3:.1f} ms | {taken / step:.1%} |")
    print(f"| the rest of the loop | {(step - known) * 1e3:.1f} ms | {(step - known) / step:.1%} |")
    if functions:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(60)
    if operations:
        print(tracer.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a JSON list of alpaca rows")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--functions", action="store_true")
    parser.add_argument("--operations", action="store_true")
    options = parser.parse_args()
    run(options.data, options.steps, options.tokens, functions=options.functions, operations=options.operations)


if __name__ == "__main__":
    main()
