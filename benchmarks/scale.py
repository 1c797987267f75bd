"""Several processes against one on the demo model: tokens a second, memory of a process, bytes sent, efficiency.

    python benchmarks/scale.py [--processes 2] [--steps 8] [--rounds 3] [--methods lora full] [--set shard=full]
                               [--json out.json]

A step has the same rows in both, and all cores: one process computes on all of them, several on a part each. Both are
run in turns, `--rounds` times, each run in processes of its own; what is printed is the median. `--set` gives the runs
of several processes a setting besides. Bytes are those that crossed the loopback device while steps were taken, so
nothing else should use it. Efficiency is the speed of several over that of one; processor time is given a token, as
other programs disturb it less.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

METHODS = ("lora", "full")
ROWS, LENGTH = 8, 128
WARM = 2
"""Steps at the beginning that do not count: ways to compute compete in the first."""


def sent() -> int:
    """Bytes that the loopback device has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def work(method: str, steps: int, output: Path, settings: dict[str, str]) -> None:
    """What each process does; the first writes the numbers to `output`."""
    import warnings

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    from tunesmith import SFTConfig, SFTTrainer
    from tunesmith.model.load import load_model, load_tokenizer
    from tunesmith.settings.coerce import coerce
    from tunesmith.settings.recipe import every_setting

    warnings.filterwarnings("ignore")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(100, 40000, (LENGTH,)).tolist()} for _ in range(ROWS * steps)]
    more: dict[str, Any] = {name: coerce(value, every_setting()[name].kind) for name, value in settings.items()}
    args = SFTConfig(
        output_dir=str(output / "run"),
        per_device_train_batch_size=ROWS // processes,
        max_steps=steps,
        precision="fp32",
        use_cpu=True,
        allow_no_eos=True,
        save_strategy="no",
        self_test="off",
        rehearse="off",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    SFTTrainer.draw_page = None
    trainer = SFTTrainer(
        load_model("demo", dtype=torch.float32),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer("demo"),
        peft_config=lora if method == "lora" else None,
    )
    bytes_before, lines = [0, 0], list[Any]()

    class Counter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (WARM, steps):
                bytes_before[state.global_step == steps] = sent()

    trainer.add_callback(Counter())
    trainer.listeners.append(lines.append)
    trainer.train()
    if not trainer.is_world_process_zero():
        return
    taken = [line for line in lines if "loss" in line][WARM:]
    own = taken[-1].get("processes") or [{"memory_mb": taken[-1]["memory_mb"], "waited": 0.0}]
    result = {
        "speed": median(line["tokens_per_second"] for line in taken),
        "memory": max(process["memory_mb"] for process in own),
        "waited": max(process["waited"] for process in own),
        "bytes": (bytes_before[1] - bytes_before[0]) / (steps - WARM),
        "tokens": sum(line["tokens"] for line in lines if "loss" in line),
    }
    (output / "result.json").write_text(json.dumps(result))


def measured(method: str, processes: int, steps: int, settings: list[str]) -> dict[str, float]:
    """One run in `processes` of its own."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["--work", folder, "--methods", method, "--steps", str(steps)]
        own += [word for setting in settings if processes > 1 for word in ("--set", setting)]
        command = [sys.executable, __file__, *own]
        if processes > 1:
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command = [sys.executable, *start, __file__, *own]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(done.stderr)
        result: dict[str, float] = json.loads((Path(folder) / "result.json").read_text())
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result | {"milliseconds": 1000 * used / result["tokens"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        settings = dict(setting.split("=", 1) for setting in arguments.set)
        work(arguments.methods[0], arguments.steps, arguments.work, settings)
        return
    print("| | processes | tokens/s | efficiency | MB a process | MB sent a step | waited | CPU ms a token |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    found: dict[str, dict[int, dict[str, float]]] = {}
    for method in arguments.methods:
        runs: dict[int, list[dict[str, float]]] = {1: [], arguments.processes: []}
        for _ in range(arguments.rounds):
            for processes, results in runs.items():
                results.append(measured(method, processes, arguments.steps, arguments.set))
        found[method] = {
            processes: {name: median(result[name] for result in results) for name in results[0]}
            for processes, results in runs.items()
        }
        for processes, values in found[method].items():
            efficiency = values["speed"] / found[method][1]["speed"]
            print(
                f"| {method} | {processes} | {values['speed']:,.0f} | {efficiency:.0%} | {values['memory']:,.0f} | "
                f"{values['bytes'] / 1e6:,.1f} | {values['waited']:.0%} | {values['milliseconds']:,.1f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
