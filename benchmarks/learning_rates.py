"""Held-out loss of the demo model after short runs with several learning rates, for adapters and for all weights.

    python benchmarks/learning_rates.py [--rows 48] [--seeds 3] [--rates 2e-5 5e-5 1e-4 3e-4 1e-3 3e-3]

The task is that of chapter 3 of the guide: a sentence in, a line of a to-do list out; the tasks of the held-out rows
occur in no other. One epoch of steps of four rows, the rate falling to 0 in a straight line. A seed decides the order
of the rows and how the adapters begin.
"""

import argparse
import statistics
import tempfile
from random import Random
from typing import Any

from peft import LoraConfig
from transformers.trainer_callback import PrinterCallback

from tunesmith import SFTConfig, SFTTrainer

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TASKS = ("call Anna", "buy milk", "water the plants", "pay the rent", "feed the cat", "book a table", "wash the car")
HELD_OUT = ("visit grandma", "pack the suitcase", "charge the camera", "order new chairs")
RATES = (2e-5, 5e-5, 1e-4, 3e-4, 1e-3, 3e-3)


def rows_of(tasks: tuple[str, ...], count: int, seed: int) -> list[dict[str, Any]]:
    random, rows = Random(seed), []
    for _ in range(count):
        task, day = random.choice(tasks), random.choice(DAYS)
        turns = (
            ("system", "Write a to-do line."),
            ("user", f"Please remind me to {task} on {day}."),
            ("assistant", f"[ ] {task} @{day[:3].lower()}"),
        )
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def held_out_loss(way: str, rate: float, seed: int, count: int) -> float:
    """Of the run with this rate, after its end."""
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            learning_rate=rate,
            seed=seed,
            train_on="assistant",
            num_train_epochs=1,
            per_device_train_batch_size=4,
            precision="fp32",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model="demo",
            args=args,
            train_dataset=rows_of(TASKS, count, seed=0),
            eval_dataset=rows_of(HELD_OUT, 8, seed=1),
            peft_config=adapter if way == "LoRA" else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return float(trainer.evaluate()["eval_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare learning rates on the demo model.")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    options = parser.parse_args()
    for way in ("LoRA", "all weights"):
        for rate in options.rates:
            losses = [held_out_loss(way, rate, seed, options.rows) for seed in range(1, options.seeds + 1)]
            spread = f"from {min(losses):.3f} to {max(losses):.3f}"
            print(f"{way:<11} {rate:<7g} held-out loss {statistics.mean(losses):.3f} ({spread})", flush=True)


if __name__ == "__main__":
    main()
