"""What it costs until something happens: seconds of processor time, user and system, of all threads.

    python benchmarks/start.py --data alpaca_en_demo.json [--rounds 3] [--profile]

    help    `tunesmith --help`
    check   `tunesmith check` on 1,000 rows that no cache knows
    again   the same once more
    train   from `trainer.train()` to the first forward of the first step: LoRA on the demo model

Each measurement is a process of its own; the least of the rounds is shown, with the elapsed time of that round. With
`--profile`, the functions in which `train` spends it.
"""

import argparse
import cProfile
import json
import os
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROWS = 1000
SHOWN = 40


def commands(rows: Path) -> dict[str, list[str]]:
    tunesmith = [sys.executable, "-c", "from tunesmith.cli.main import main; main()"]
    check = [*tunesmith, "check", "--model", "demo", "--data", str(rows)]
    return {"help": [*tunesmith, "--help"], "check": check, "again": check}


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def of_process(command: list[str]) -> tuple[float, float]:
    """Processor time and elapsed time of a child."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return processor, time.perf_counter() - started


def train(rows: Path, *, profile: bool) -> tuple[float, float]:
    """Processor time and elapsed time from `train()` to the first forward of the first step."""
    from datasets import Dataset
    from peft import LoraConfig

    from tunesmith import SFTConfig, SFTTrainer

    reached: list[float] = []

    class Reached(Exception):
        pass

    class Timed(SFTTrainer):  # type: ignore[misc]
        def batch_loss(self, *_: Any, **__: Any) -> Any:
            reached.extend([time.process_time(), time.perf_counter()])
            raise Reached

    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model="demo",
            args=SFTConfig(output_dir=folder, report_to="none", use_cpu=True, disable_tqdm=True),
            train_dataset=Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()]),
            peft_config=LoraConfig(r=16, target_modules="all-linear"),
        )
        started = time.process_time(), time.perf_counter()
        if profile:
            profiler.enable()
        with suppress(Reached):
            trainer.train()
        profiler.disable()
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumulative").print_stats(SHOWN)
    return reached[0] - started[0], reached[1] - started[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a JSON list or lines of alpaca rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where `train` spends it")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(train(options.data, profile=options.profile)))
        return
    text = options.data.read_text(encoding="utf-8")
    listed = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        listed = listed[:ROWS]
        write(rows, listed)
        child = [sys.executable, __file__, "--data", str(rows), "--child"]
        if options.profile:
            subprocess.run([*child, "--profile"], check=True)
            return
        taken: dict[str, list[tuple[float, float]]] = {}
        for turn in range(options.rounds):
            for row in listed:  # rows that differ in each round are in no cache
                row["input"] = f"{row['input']} {os.getpid()}-{turn}".strip()
            write(rows, listed)
            for name, arguments in commands(rows).items():
                taken.setdefault(name, []).append(of_process(arguments))
            result = subprocess.run(child, check=True, stdout=subprocess.PIPE)
            processor, elapsed = json.loads(result.stdout.splitlines()[-1])
            taken.setdefault("train", []).append((processor, elapsed))
    print("| | processor seconds | elapsed |\n| --- | --- | --- |")
    for name, times in taken.items():
        print("| {} | {:.2f} | {:.2f} |".format(name, *min(times)))


if __name__ == "__main__":
    main()
