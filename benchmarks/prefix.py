"""Rows per second with and without sharing what all rows of a batch begin with.

    python benchmarks/prefix.py [--pairs 3] [--steps 2] [--json out.json]

Rows of a shared preamble of 600 tokens and 150 tokens of their own, of which the last 100 are trained on: LoRA on the
demo model, 16 rows a step. Both sides are ours, in processes of their own and in turns.
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

PREAMBLE, OWN, TRAINED, ROWS = 600, 150, 100, 16


def run(share: str, steps: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    from tunesmith import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    torch.manual_seed(0)
    front = torch.randint(100, 40000, (PREAMBLE,)).tolist()
    rows = [[*front, *torch.randint(100, 40000, (OWN,)).tolist()] for _ in range(ROWS * (steps + 1))]
    labels = [[*[-100] * (len(row) - TRAINED), *row[-TRAINED:]] for row in rows]
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS,
        max_steps=steps + 1,
        share_prefix=share,  # type: ignore[arg-type]
        precision="fp32",
        use_cpu=True,
        allow_no_eos=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_dict({"input_ids": rows, "labels": labels})
    trainer = SFTTrainer("demo", args, train_dataset=data, peft_config=lora, callbacks=[clock])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rate": ROWS * steps / sum(clock.seconds[1:]), "peak_mb": peak, "losses": losses}


def measure(share: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--share", share, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
    print(f"share_prefix {share}: {found['rate']:.2f} rows/s, {found['peak_mb']:,.0f} MB, losses {losses}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--share", choices=("auto", "off"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.share:
        print(json.dumps(run(arguments.share, arguments.steps)))
        return
    pairs = [[measure(share, arguments.steps) for share in ("off", "auto")] for _ in range(arguments.pairs)]
    ratio = statistics.median(shared["rate"] / apart["rate"] for apart, shared in pairs)
    print(f"\nmedian ratio: {ratio:.1f}x rows per second with shared prefixes")
    if arguments.json:
        arguments.json.write_text(json.dumps({"pairs": pairs, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
