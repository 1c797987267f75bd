"""How much a run slows down beside others, against what its share of the processor explains.

    python benchmarks/beside.py --data alpaca_en_demo.json [--steps 6] [--rounds 2] [--cases "alone;one hog"]

    alone           nothing else runs
    torch first     the script imports torch before tunesmith, as one that begins with `from peft import LoraConfig`
    one hog, two hogs, and the same with torch first: beside programs that keep a core each busy
    two runs        two of them at once
    half a core     in a control group with half a core (needs root; with Linux control groups of version 1 or 2)

Each run is a process that trains LoRA on the demo model, two rows a step; the seconds of a step are the mean but for
the first. `share` is how many times slower it must be: with P processes' threads on C cores, each gets C/P of them. The
cases take turns, and the best round of each counts.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CORES = len(os.sched_getaffinity(0))
CPU_GROUPS = Path("/sys/fs/cgroup")


def child(data: Path, steps: int, *, torch_first: bool) -> None:
    """Train, and print the mean seconds of a step."""
    if torch_first:
        import torch  # noqa: F401
    import tunesmith

    stamps: list[float] = []
    from peft import LoraConfig
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: object, **__: object) -> None:
            stamps.append(time.perf_counter())

    rows = json.loads(data.read_text(encoding="utf-8"))[: 2 * steps]
    with tempfile.TemporaryDirectory() as folder:
        tunesmith.SFTTrainer(
            model="demo",
            args=tunesmith.SFTConfig(
                output_dir=folder,
                precision="fp32",
                per_device_train_batch_size=2,
                max_steps=steps,
                max_length=256,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            peft_config=LoraConfig(r=16, target_modules="all-linear"),
            callbacks=[Clock()],
        ).train()
    print(json.dumps((stamps[-1] - stamps[0]) / (len(stamps) - 1)))


def busy() -> None:
    while True:
        pass


@contextmanager
def hogs(count: int) -> Iterator[None]:
    processes = [multiprocessing.Process(target=busy, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def start(data: Path, steps: int, *, torch_first: bool, joins: Path | None = None) -> subprocess.Popen[str]:
    """A run, as a child; in the control group `joins`."""
    command = [sys.executable, __file__, "--data", str(data), "--steps", str(steps), "--child"]
    command += ["--torch-first"] if torch_first else []
    enter: Callable[[], object] | None = None
    if joins is not None:
        file = joins / "cgroup.procs"

        def enter() -> object:
            return file.write_text(str(os.getpid()))

    known = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=enter, env=known
    )


def seconds(run: "subprocess.Popen[str]") -> float:
    output, _ = run.communicate()
    return float(output.splitlines()[-1])


@contextmanager
def half_a_core() -> Iterator[Path]:
    """A control group that has it."""
    old = CPU_GROUPS / "cpu"
    group = (old if old.is_dir() else CPU_GROUPS) / f"tunesmith-beside-{os.getpid()}"
    group.mkdir()
    try:
        if old.is_dir():
            (group / "cpu.cfs_period_us").write_text("100000")
            (group / "cpu.cfs_quota_us").write_text("50000")
        else:
            (group / "cpu.max").write_text("50000 100000")
        yield group
    finally:
        group.rmdir()


def case(name: str, data: Path, steps: int) -> float:
    """The seconds of a step in this case; of two runs, of the slower."""
    torch_first = name.endswith("torch first")
    if name.startswith("half a core"):
        with half_a_core() as group:
            return seconds(start(data, steps, torch_first=torch_first, joins=group))
    beside = 1 if name.startswith("one hog") else 2 if name.startswith("two hogs") else 0
    with hogs(beside):
        runs = [start(data, steps, torch_first=torch_first) for _ in range(2 if name.startswith("two runs") else 1)]
        return max([seconds(run) for run in runs])


SHARES = {
    "alone": 1.0,
    "torch first": 1.0,
    "one hog": (CORES + 1) / CORES,
    "one hog, torch first": (CORES + 1) / CORES,
    "two hogs": (CORES + 2) / CORES,
    "two hogs, torch first": (CORES + 2) / CORES,
    "two runs": 2.0,
    "two runs, torch first": 2.0,
    "half a core": 2.0 * CORES,
    "half a core, torch first": 2.0 * CORES,
}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a JSON list of rows")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", default=";".join(SHARES), help="separated by ;")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--torch-first", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.data, options.steps, torch_first=options.torch_first)
        return
    names = ["alone", *(name for name in options.cases.split(";") if name != "alone")]
    taken = {name: float("inf") for name in names}
    for _ in range(options.rounds):
        for name in names:
            seconds_taken = case(name, options.data, options.steps)
            print(f"{name}: {seconds_taken:.2f} s a step", file=sys.stderr, flush=True)
            taken[name] = min(taken[name], seconds_taken)
    print(f"{processor()}, {CORES} cores\n\n| | seconds a step | times slower | share |\n| --- | --- | --- | --- |")
    for name in names:
        print(f"| {name} | {taken[name]:.2f} | {taken[name] / taken['alone']:.1f} | {SHARES[name]:.1f} |")


if __name__ == "__main__":
    main()
