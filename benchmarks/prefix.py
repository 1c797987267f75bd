"""Steps with and without computing once what rows begin with in common.

    python benchmarks/prefix.py [--case one tree] [--rows 8 32] [--layers 30] [--pairs 3] [--json out.json]

LoRA on the demo model, in two cases:

    one    rows of a shared preamble of 600 tokens and 150 tokens of their own, of which the last 100 are trained on
    tree   rows of three shared levels and 60 tokens of their own, all trained on: a system prompt of 300 tokens, one of
           4 sets of tool schemas of 200, one of 2 sets of examples for each of 100; drawn at random

`off` computes each row alone. `auto` is the default. `grouped` has rows with like beginnings in the same batch
(`train_sampling_strategy: group_by_prefix`). Each is a process of its own, and they take turns. CPU seconds are of all
threads; on a machine that others use, OMP_NUM_THREADS=1 keeps threads that wait out of them. `--layers 4` takes the
first four layers of the model: 32 rows apart need a lot of memory.
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

WAYS: dict[str, dict[str, str]] = {
    "off": {"share_prefix": "off"},
    "auto": {},
    "grouped": {"train_sampling_strategy": "group_by_prefix"},
}
TRAINED = {"one": 100, "tree": 60}
ROWS = 256
"""Of the data set, at the least: enough for batches of like rows."""


def row_of(case: str, random: Random) -> list[int]:
    """The tokens of a row."""

    def text(size: int, *name: int) -> list[int]:
        """The same tokens for the same name; without one, new ones."""
        source = Random(repr(name)) if name else random
        return [source.randint(100, 40000) for _ in range(size)]

    if case == "one":
        return text(600, 0) + text(150)
    tools, examples = random.randrange(4), random.randrange(2)
    return text(300, 0) + text(200, tools, 0) + text(100, tools, examples, 0) + text(60)


def run(case: str, way: str, rows: int, steps: int, layers: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from tunesmith import SFTConfig, SFTTrainer
    from tunesmith.model.load import resolve_model

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.cpu: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started[0])
            self.cpu.append(time.process_time() - self.started[1])

    torch.manual_seed(0)
    random = Random(0)
    ids = [row_of(case, random) for _ in range(max(ROWS, rows * (steps + 1)))]
    labels = [[*[-100] * (len(row) - TRAINED[case]), *row[-TRAINED[case] :]] for row in ids]
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        max_steps=steps + 1,
        precision="fp32",
        use_cpu=True,
        allow_no_eos=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **WAYS[way],  # type: ignore[arg-type]
    )
    clock = Clock()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    folder = resolve_model("demo")
    model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=layers, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = SFTTrainer(
        model, args, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[clock]
    )
    computed: list[int] = []
    take = trainer.get_batch_samples

    def noting(*arguments: Any) -> Any:
        batches, items = take(*arguments)
        computed.append(sum(batch.computed_tokens for batch in batches))
        return batches, items

    trainer.get_batch_samples = noting
    trainer.train()
    return {
        "rate": rows * steps / sum(clock.seconds[1:]),
        "cpu_seconds": sum(clock.cpu[1:]) / steps,
        "computed": sum(computed[1:]) / steps,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def measure(case: str, way: str, rows: int, steps: int, layers: int) -> dict[str, Any]:
    options = {"--case": case, "--way": way, "--rows": rows, "--steps": steps, "--layers": layers}
    command = [sys.executable, __file__, *(str(word) for option in options.items() for word in option)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
    print(
        f"{case}, {rows} rows a step, {way}: {found['computed']:,.0f} tokens computed, {found['cpu_seconds']:.2f} CPU "
        f"seconds a step, {found['rate']:.2f} rows/s, {found['peak_mb']:,.0f} MB, losses {losses}",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=TRAINED, nargs="+", default=[*TRAINED])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(run(arguments.case[0], arguments.way, arguments.rows[0], arguments.steps, arguments.layers)))
        return
    results = []
    for case in arguments.case:
        for rows in arguments.rows:
            ways = [way for way in WAYS if case == "tree" or way != "grouped"]
            turns = [
                {way: measure(case, way, rows, arguments.steps, arguments.layers) for way in ways}
                for _ in range(arguments.pairs)
            ]
            for way in ways[1:]:
                ratio = statistics.median(turn["off"]["cpu_seconds"] / turn[way]["cpu_seconds"] for turn in turns)
                print(f"{case}, {rows} rows a step: {way} takes {ratio:.2f} times less CPU than off", flush=True)
            results.append({"case": case, "rows": rows, "turns": turns})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
