"""Runs all small runs, to tell whether a change of the code changed what it computes.

    python tests/invariant/trajectories.py record FILE [RUN ...]    # on the old code
    python tests/invariant/trajectories.py compare FILE [RUN ...]   # on the new: every difference, to the last bit
    python tests/invariant/trajectories.py pin FILE                 # what test_trajectories.py compares with

They use what users use, and what is compared are files that they leave. Bits are those of one machine: of its processor
and its libraries. `PYTHONPATH` says where another `tunesmith` is than the installed one.
"""

import argparse
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before a library reads them
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where `tests` is

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from tests.invariant.facts import Facts, content, short
from tests.invariant.small_runs import RUNS, build_models
from tunesmith.model import ways


def run(name: str, models: Path, folder: Path) -> Facts:
    """The facts of a run, which writes below `folder`; the same each time on one machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in how many parts something is summed up decides how it is rounded
    ways.force(False)  # by default the faster library is taken, as measured
    set_seed(0)
    try:
        with warnings_of_ours() as said:
            found = RUNS[name](models, folder)
    finally:
        torch.set_num_threads(threads)
    found["warnings"] = [text.replace(str(folder), "RUN").replace(str(models), "MODELS") for text in said]
    facts: Facts = json.loads(json.dumps(found))
    return facts


@contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Kept(logging.WARNING), logging.getLogger("tunesmith")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


# What is compared


def pinned(facts: Facts) -> Facts:
    """What another machine finds, too, but for rounding: data, counts, names of files, and losses."""
    entries = [entry for entry in facts["metrics"] if "loss" in entry]
    steps = {
        name: [rounded(entry[name]) for entry in entries]
        for name in ("step", "loss", "grad_norm", "tokens", "supervised_tokens")
    }
    evaluations = [
        {name: rounded(value) for name, value in entry.items() if name == "step" or name.endswith("_loss")}
        for entry in facts["metrics"]
        if any(name.startswith("eval_") for name in entry)
    ]
    found = {"data": facts["data"], "files": facts["files"], "steps": steps, "evaluations": evaluations}
    return found | ({"resumed": pinned(facts["resumed"])} if "resumed" in facts else {})


def rounded(value: Any) -> Any:
    return float(f"{value:.8g}") if isinstance(value, float) else value


def differences(found: Any, expected: Any, tolerance: float = 0.0, place: str = "") -> Iterator[str]:
    """Each place where two values of JSON differ; floats by more than `tolerance` of the larger."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted(found.keys() | expected.keys()):
            if name not in found or name not in expected:
                yield f"{place}/{name}: only in what was {'expected' if name in expected else 'found'}"
            else:
                yield from differences(found[name], expected[name], tolerance, f"{place}/{name}")
    elif isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            yield f"{place}: {len(found)} items, expected {len(expected)}"
        for number, pair in enumerate(zip(found, expected, strict=False)):
            yield from differences(*pair, tolerance, f"{place}/{number}")
    elif isinstance(found, float) and isinstance(expected, float):
        if repr(found) != repr(expected) and not math.isclose(found, expected, rel_tol=tolerance):
            yield f"{place}: {found!r}, expected {expected!r} (relative {abs(found / (expected or 1.0) - 1):.1e})"
    elif type(found) is not type(expected) or found != expected:
        yield f"{place}: {found!r}, expected {expected!r}"


def dropout_mask() -> str:
    """Which numbers dropout draws after a seed: processors of other makes may draw others."""
    torch.manual_seed(0)
    return short(bytes(torch.nn.functional.dropout(torch.ones(256), 0.1).bool().tolist()))


# The commands


def readable(value: Any) -> str:
    """JSON with lists of numbers and texts on one line."""
    text = json.dumps(value, indent=1)  # in which no text has a line break of its own
    return re.sub(r"\[\n([^][{}]*)\n *\]", lambda match: "[" + re.sub(r"\n *", " ", match[1]).lstrip() + "]", text)


def all_of(names: Iterable[str]) -> dict[str, Facts]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNESMITH_HOME"] = str(Path(folder) / "home")
        build_models(Path(folder) / "models")
        for name in names:
            began = time.perf_counter()
            found[name] = run(name, Path(folder) / "models", Path(folder) / name)
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare", "pin"))
    parser.add_argument("file", type=Path)
    parser.add_argument("runs", nargs="*", help=f"only some of {', '.join(RUNS)}")
    given = parser.parse_args()
    if unknown := set(given.runs) - RUNS.keys():
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    names = given.runs or list(RUNS)
    disable_progress_bar()
    recorded = content(given.file) if given.command == "compare" else {}
    found = all_of(names)
    if given.command == "compare":
        told = list(differences(found, {name: recorded[name] for name in names}))
        print("\n".join([*told, f"{len(told)} differences in {len(names)} runs"]))
        return 1 if told else 0
    pins = {"dropout": dropout_mask(), "runs": {name: pinned(facts) for name, facts in found.items()}}
    given.file.write_text(readable(pins if given.command == "pin" else found) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
