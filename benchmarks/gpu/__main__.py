"""Proves on an NVIDIA GPU what tunesmith does there, and measures it: kernels, precision, training, memory, resuming.

    python -m benchmarks.gpu [--out build/gpu] [--only attention,training] [--rehearse]

From the root of a checkout, with what a run needs installed; no network. Writes gpu.json, gpu.html and a log of each
section into the folder. Each section is a process of its own with a limit of time: a crash or a hang of one leaves the
others alone, and all of it ends within ten minutes. The demo model is trained where it is installed, else a random
one. `--rehearse` runs all of it on a CPU, in tiny sizes, with stand-ins for kernels and memory, to prove this program.

Exit codes: 0 all passed, 1 something failed, 2 there is no GPU or a wrong argument.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.verdicts import Check, Place, Section, checks_of, judged

REPO = Path(__file__).resolve().parents[2]
ALL_SECONDS = 570
"""Of all sections together; one that begins later is not begun."""
SLOWER = 5
"""How many times as long a rehearsal may take: it proves no time."""
LAST_LINES = 5
"""Of the log of a section that crashed, on the page."""


def _trials(module: str, name: str, place: Place, **arguments: Any) -> Any:
    """The trials of a section, whose module is imported in its own process only: torch takes the GPU then."""
    return getattr(import_module(f"benchmarks.gpu.{module}"), name)(place, **arguments)


def _section(module: str, name: str, title: str, seconds: int, **environment: str) -> Section:
    return Section(
        name=name, title=title, trials=partial(_trials, module, name), seconds=seconds, environment=environment
    )


SECTIONS = (
    _section("machine_checks", "machine", "Machine, and what doctor says of it", 60),
    _section("kernel_checks", "formats", "Precision: what was timed, what is chosen", 40),
    _section("kernel_checks", "attention", "Attention against plain attention in fp64, values and gradients", 90),
    _section(
        "training_checks", "reference", "The model, and its losses on the CPU in fp32", 150, CUDA_VISIBLE_DEVICES=""
    ),
    _section("training_checks", "training", "Training beside the CPU's losses", 120),
    _section("training_checks", "savings", "Less memory", 60),
    _section("training_checks", "recovery", "Out of memory", 120),
    _section("training_checks", "resumed", "Going on from a checkpoint", 90),
    Section(
        name="deterministic",
        title="Going on from a checkpoint, deterministic",
        trials=partial(_trials, "training_checks", "resumed", deterministic=True),
        seconds=90,
        environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},  # read when cuBLAS starts
    ),
    _section("training_checks", "quantized", "8 and 4 bits", 120),
    _section("pace_checks", "speed", "Speed and memory, beside TRL where it is installed", 120),
    _section("training_checks", "compiled", "Compiled layers", 150),
    _section("training_checks", "demo", "The demo", 180),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="the folder to write into")
    parser.add_argument("--only", help="sections, separated by commas: " + ", ".join(s.name for s in SECTIONS))
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with stand-ins")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # the process of one
    options = parser.parse_args(arguments)
    place = Place(out=options.out.absolute(), rehearsed=options.rehearse)
    known = {section.name: section for section in SECTIONS}
    if options.section:
        return _run(known[options.section], place)
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(known)}")
    if reason := _no_tests() if place.rehearsed else _no_gpu():
        print(reason, file=sys.stderr)
        return 2
    result = examine([known[name] for name in known if name in names], place)
    return write(result, place)


def _no_gpu() -> str:
    """Why nothing can be measured here, in a sentence; empty where it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch can't be imported ({error}): install tunesmith with what it needs, pip install -e ."
    if torch.cuda.is_available() and torch.version.hip is None:
        return ""
    return "There is no NVIDIA GPU here that torch can use; --rehearse tries the program itself on the CPU."


def _no_tests() -> str:
    """Why nothing can be rehearsed here; empty where it can."""
    return "" if find_spec("pytest") else "A rehearsal takes the stand-ins of the tests: pip install -e '.[dev]'"


# Sections, one process each


def examine(sections: Sequence[Section], place: Place) -> dict[str, Any]:
    """Run the sections one after the other; what `gpu.json` holds."""
    began, patience = time.monotonic(), place.size(1, SLOWER)
    shutil.rmtree(place.out / "random-model", ignore_errors=True)  # a rehearsal's is smaller
    for folder in ("sections", "logs", "runs"):
        shutil.rmtree(place.out / folder, ignore_errors=True)
        (place.out / folder).mkdir(parents=True)
    entries = []
    for section in sections:
        print(f"==> {section.title}", flush=True)
        started = time.monotonic()
        left = began + patience * ALL_SECONDS - started
        checks = in_process_of_its_own(section, place, seconds=min(patience * section.seconds, left))
        for check in checks:
            print(f"{check.verdict.outcome:8}  {check.name}: {check.verdict.found}", flush=True)
        entries.append(
            {
                "name": section.name,
                "title": section.title,
                "seconds": time.monotonic() - started,
                "checks": [check.to_json() for check in checks],
            }
        )
    return {
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "rehearsed": place.rehearsed,
        "seconds": time.monotonic() - began,
        "sections": entries,
    }


def in_process_of_its_own(section: Section, place: Place, *, seconds: float) -> list[Check]:
    """The checks of a section, with one more that failed where it crashed or took more than `seconds`."""
    if seconds <= 0:
        return [_broken_off("did not begin: the time for all sections is over")]
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", section.name, "--out", str(place.out)]
    log = place.out / "logs" / f"{section.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command + ["--rehearse"] * place.rehearsed,
            cwd=REPO,
            env={**os.environ, **_environment(), **section.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=seconds)
            ended = f"crashed with exit code {status}" if status else ""
        except subprocess.TimeoutExpired:
            ended = f"was ended after {seconds:.0f} seconds"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    checks = place.checks(section.name)
    if ended:
        last = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        checks.append(_broken_off(f"{ended}; the end of {log}: {' | '.join(last)}"))
    return checks


def _broken_off(reason: str) -> Check:
    return Check(name="the section itself", verdict=judged(False, reason))


def _environment() -> dict[str, str]:
    """The checkout's own code, and no network."""
    paths = [str(REPO), str(REPO / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # a run in one process takes one
    return {
        "CUDA_VISIBLE_DEVICES": first_gpu,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
    }


def _run(section: Section, place: Place) -> int:
    """The process of one section: writes each check when it is over."""
    logging.basicConfig(level=logging.INFO)
    if place.rehearsed:
        from benchmarks.gpu.stand_ins import gpu_stand_ins

        context: Any = gpu_stand_ins()
    else:
        context = nullcontext()
    with context, place.lines(section.name).open("w", encoding="utf-8") as lines:
        for check in checks_of(section, place):
            lines.write(json.dumps(check.to_json()) + "\n")
            lines.flush()
    return 0


# What is left


def write(result: Mapping[str, Any], place: Place) -> int:
    """Write `gpu.json` and `gpu.html`; the exit code."""
    from benchmarks.gpu.result_page import result_page, verdict

    (place.out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (place.out / "gpu.html").write_text(result_page(result), encoding="utf-8")
    shutil.rmtree(place.out / "runs")
    print(f"\n{verdict(result).capitalize()}. The page: {place.out / 'gpu.html'}")
    return int(any(check["outcome"] == "failed" for section in result["sections"] for check in section["checks"]))


if __name__ == "__main__":
    sys.exit(main())
