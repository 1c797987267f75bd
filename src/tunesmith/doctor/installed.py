"""What `tunesmith doctor` looks at of what is installed. Each check stands alone."""

import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.doctor.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

TOLD = ("transformers", "peft", "datasets")
"""The libraries whose versions explain most; the others are counted, and listed in the JSON."""


def python() -> Iterator[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding(
        name="Python",
        mark="ok" if supported else "problem",
        found=f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        means="tunesmith runs on 3.11 to 3.13.",
        mend="" if supported else "install one of these, and tunesmith with it",
    )


def torch_build() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding(
            name="torch",
            mark="problem",
            found=f"can't be imported: {error}",
            means="Nothing can be trained without it.",
            mend="pip install --force-reinstall torch",
        )
        return
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "no GPU of NVIDIA or AMD"
    unused = _has_nvidia() and not torch.cuda.is_available()
    driver = "update the NVIDIA driver" if cuda else "install the CUDA build of torch, as pytorch.org/get-started says"
    yield Finding(
        name="torch",
        mark="note" if unused else "ok",
        found=f"{torch.__version__}, built for {build}",
        means="There is an NVIDIA GPU that torch can't use: training runs on the CPU, many times slower."
        if unused
        else f"Training runs on {_device()}.",
        mend=driver if unused else "",
    )


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _device() -> str:
    from tunesmith.model.devices import here

    kind = here().type
    return {"cpu": "the CPU", "cuda": "the GPU"}.get(kind, kind)


def libraries() -> Iterator[Finding]:
    """The versions of what tunesmith imports, against the ranges that it asks for."""
    found = []
    for requirement in _requirements():
        name, wanted = requirement.name, requirement.specifier
        installed = installed_version(name)
        if installed and wanted.contains(installed, prereleases=True):
            found.append(name)
            continue
        yield Finding(
            name=name,
            mark="problem",
            found=f"{installed or 'not installed'}; {wanted} is needed",
            means="tunesmith was not tested with it." if installed else "tunesmith does not run without it.",
            mend=f"pip install '{name}{wanted}'",
        )
    if found:
        told = [name for name in TOLD if name in found] or found[:1]
        more = f" and {len(found) - len(told)} more" if len(found) > len(told) else ""
        yield Finding(
            name="libraries",
            mark="ok",
            found=", ".join(f"{name} {installed_version(name)}" for name in told) + more,
            means="These are versions that tunesmith asks for.",
        )


def versions() -> dict[str, str]:
    """Those of all libraries that tunesmith imports and that are installed."""
    found = {requirement.name: installed_version(requirement.name) for requirement in _requirements()}
    return {name: installed for name, installed in found.items() if installed}


def _requirements() -> "list[Requirement]":
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in requires("tunesmith") or ()]
    return [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]


def installed_version(package: str) -> str:
    """Nothing where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def demo_model() -> Iterator[Finding]:
    from tunesmith.model.demo_model import GGUF_NAME, GGUF_SIZE, INSTALL, PACKAGE, REINSTALL

    spec = find_spec(PACKAGE)
    files = [Path(place) / GGUF_NAME for place in (spec and spec.submodule_search_locations) or ()]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    whole = GGUF_SIZE in sizes
    yield Finding(
        name="demo model",
        mark="ok" if whole else "note",
        found="SmolLM2-135M-Instruct" if whole else "damaged" if sizes else "not installed",
        means="`tunesmith demo` and `--model demo` work without the network."
        if whole
        else "`tunesmith demo` and `--model demo` don't work; your own models do.",
        mend="" if whole else REINSTALL if sizes else INSTALL,
    )
