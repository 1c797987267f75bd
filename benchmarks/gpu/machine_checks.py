"""What the checks ran on: GPU, driver, versions; and what `tunesmith doctor` says of it."""

import logging
import platform
import subprocess
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.verdicts import Place, Trial, Verdict, judged
from tunesmith.doctor.checks import CHECKS, Finding, examined
from tunesmith.text import size

LIBRARIES = ("tunesmith", "torch", "triton", "transformers", "peft", "accelerate", "datasets")
OPTIONAL = ("bitsandbytes", "flash-attn", "trl")
NOT_ASKED = {"hub"}
"""Checks of `doctor` that need the network."""


def machine(place: Place) -> Iterator[tuple[str, Trial]]:
    yield "GPU", partial(_gpu, place)
    yield "versions", _versions
    for finding in examined({name: check for name, check in CHECKS.items() if name not in NOT_ASKED}):
        yield f"doctor: {finding.name}", partial(_said, finding)


def _gpu(place: Place) -> Verdict:
    if place.rehearsed:
        return judged(True, f"none: a rehearsal on {platform.machine()}, with stand-ins", gpu="", driver="")
    about, driver = torch.cuda.get_device_properties(0), _driver()
    found = f"{about.name}, compute capability {about.major}.{about.minor}, {size(about.total_memory)}, driver {driver}"
    _ = torch.ones(8, device="cuda").sum().item()
    return judged(
        True,
        found,
        gpu=about.name,
        capability=f"{about.major}.{about.minor}",
        memory_bytes=about.total_memory,
        count=torch.cuda.device_count(),
        driver=driver,
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        logging.getLogger(__name__).warning("nvidia-smi does not tell the driver: %s", error)
        return "unknown"


def _versions() -> Verdict:
    found = {"Python": platform.python_version(), "CUDA of torch": torch.version.cuda or "none"}
    for name in (*LIBRARIES, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if found["tunesmith"] == "not installed":  # run from its folder
        import tunesmith

        found["tunesmith"] = tunesmith.__version__
    return judged(True, ", ".join(f"{name} {number}" for name, number in found.items()), **found)


def _said(finding: Finding) -> Verdict:
    """A note is no failure: what is missing then is said by the checks that need it."""
    return judged(
        finding.mark != "problem",
        f"{finding.mark}: {finding.found}. {finding.means}" + (f" To fix it: {finding.mend}" if finding.mend else ""),
        mark=finding.mark,
    )
