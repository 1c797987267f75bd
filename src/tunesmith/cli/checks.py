"""What `tunesmith doctor` looks at: what is installed, and the machine. Each check stands alone."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Mark = Literal["ok", "note", "problem"]
LITTLE_MEMORY, TOO_LITTLE_MEMORY = 4e9, 1e9
"""Bytes: what LoRA on the demo model takes and some more, and what does not even hold the libraries and a model."""
LITTLE_DISK, TOO_LITTLE_DISK = 5e9, 2e8


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found: `means` and `mend` say what follows from it, and what to do. A `problem` keeps training
    from working."""

    name: str
    mark: Mark
    found: str
    means: str = ""
    mend: str = ""


# What is installed


def python() -> Iterator[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding(
        name="Python",
        mark="ok" if supported else "problem",
        found=f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        means="" if supported else "tunesmith runs on Python 3.11, 3.12 and 3.13.",
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
    found = f"{torch.__version__}, built for {build}"
    if torch.cuda.is_available() or not _has_nvidia():
        yield Finding(name="torch", mark="ok", found=found)
        return
    yield Finding(
        name="torch",
        mark="note",
        found=found,
        means="There is an NVIDIA GPU that torch can't use: training runs on the CPU, many times slower.",
        mend="update the NVIDIA driver" if cuda else "install the CUDA build of torch, as pytorch.org/get-started says",
    )


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def libraries() -> Iterator[Finding]:
    """The versions of what tunesmith imports, against the ranges that it asks for."""
    from packaging.requirements import Requirement

    found = []
    for text in requires("tunesmith") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = ""
        if installed and requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{name} {installed}")
            continue
        yield Finding(
            name=name,
            mark="problem",
            found=f"{installed or 'not installed'}; {requirement.specifier} is needed",
            means="tunesmith was not tested with it." if installed else "tunesmith does not run without it.",
            mend=f"pip install '{name}{requirement.specifier}'",
        )
    yield Finding(name="libraries", mark="ok", found=", ".join(found))


def bitsandbytes() -> Iterator[Finding]:
    import torch

    from tunesmith.errors import TunesmithError
    from tunesmith.model.quantize import refuse_missing

    device = torch.accelerator.current_accelerator()
    try:
        refuse_missing("8-bit and 4-bit models and optimizers", "cpu" if device is None else device.type)
    except (TunesmithError, ImportError, OSError, RuntimeError) as error:
        yield Finding(
            name="bitsandbytes",
            mark="note",
            found=f"not usable: {error}",
            means="quantize and 8-bit optimizers are refused; everything else works.",
            mend="pip install 'bitsandbytes>=0.46.1,<1'" if find_spec("bitsandbytes") is None else "",
        )
        return
    yield Finding(name="bitsandbytes", mark="ok", found=f"{version('bitsandbytes')}: 8-bit and 4-bit models")


def flash_attention() -> Iterator[Finding]:
    """Whether attention over documents takes one kernel, tried on a small example as training would."""
    import torch

    packages = [
        f"{name} {version(name)}"
        for name, module in (("flash-attn", "flash_attn"), ("flash-attn-3", "flash_attn_interface"))
        if find_spec(module) is not None and _is_installed(name)
    ]
    installed = ", ".join(packages) or "not installed"
    if not torch.cuda.is_available():
        yield Finding(
            name="FlashAttention", mark="ok", found=f"{installed}; not needed: it is for NVIDIA GPUs, and there is none"
        )
        return
    from tunesmith.model.varlen import pick

    q_NTH = torch.zeros(1, 2, 8, 64, device="cuda", dtype=torch.bfloat16)
    kernel = pick(q_NTH, q_NTH)
    yield Finding(
        name="FlashAttention",
        mark="note" if kernel is None else "ok",
        found=installed if kernel is None else f"{installed}; attention takes {kernel.name}",
        means="Attention goes document by document, which is slower with many short ones." if kernel is None else "",
        mend="pip install flash-attn --no-build-isolation, on a GPU from Ampere on" if kernel is None else "",
    )


def _is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def demo_model() -> Iterator[Finding]:
    from tunesmith.model.demo import GGUF_NAME, GGUF_SIZE, INSTALL, PACKAGE, REINSTALL

    spec = find_spec(PACKAGE)
    files = [Path(place) / GGUF_NAME for place in (spec and spec.submodule_search_locations) or ()]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    whole = GGUF_SIZE in sizes
    yield Finding(
        name="demo model",
        mark="ok" if whole else "note",
        found="SmolLM2-135M-Instruct" if whole else "damaged" if sizes else "not installed",
        means="" if whole else "`tunesmith demo` and `--model demo` don't work; your own models do.",
        mend="" if whole else REINSTALL if sizes else INSTALL,
    )


# The machine


def processor() -> Iterator[Finding]:
    import torch

    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    lines = [line.partition(":") for line in info.splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in reversed(lines)}  # those of the first core win
    flags = {*fields.get("flags", fields.get("Features", "")).split()}
    known = {
        "AVX2": "avx2" in flags,
        "AVX-512": "avx512f" in flags,
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "AMX": "amx_tile" in flags,
        "SVE": "sve" in flags,
    }
    sets = ", ".join(name for name, there in known.items() if there) or torch.backends.cpu.get_cpu_capability()
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count()
    slow = bool(flags) and platform.machine() in ("x86_64", "AMD64") and not known["AVX2"]
    yield Finding(
        name="processor",
        mark="note" if slow else "ok",
        found=f"{fields.get('model name') or platform.processor() or platform.machine()}, {usable} of "
        f"{os.cpu_count()} cores usable, {torch.get_num_threads()} threads; {sets}",
        means="Without AVX2 matrix products are several times slower." if slow else "",
    )


def accelerators() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield _gpu(i)
        return
    device = torch.accelerator.current_accelerator()
    if device is not None:
        yield Finding(name=f"device {device.type}", mark="ok", found=f"{torch.accelerator.device_count()} of them")
        return
    yield Finding(name="GPU", mark="ok", found="none that torch can use: training runs on the CPU")


def _gpu(i: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(i)
    free, total = torch.cuda.mem_get_info(i)
    major, minor = properties.major, properties.minor
    # A binary for 8.0 runs on 8.6, and the portable "compute" code on everything later.
    built = [name.partition("_") for name in torch.cuda.get_arch_list()]
    numbers = [(kind, int(digits.rstrip("af"))) for kind, _, digits in built if digits.rstrip("af").isdigit()]
    fits = any(
        number <= 10 * major + minor and (kind == "compute" or number // 10 == major) for kind, number in numbers
    )
    runs = fits or not numbers or getattr(torch.version, "hip", None) is not None
    return Finding(
        name=f"GPU {i}",
        mark="ok" if runs else "problem",
        found=f"{properties.name}, compute capability {major}.{minor}, {size(total)} of memory, {size(free)} free",
        means="" if runs else f"This torch is built for {', '.join(torch.cuda.get_arch_list())}, and not for this GPU.",
        mend="" if runs else "install a torch that is built for it, see pytorch.org/get-started",
    )


def precision() -> Iterator[Finding]:
    import torch

    from tunesmith.precision import decide, describe, measure

    device = torch.accelerator.current_accelerator()
    kind = "cpu" if device is None else device.type
    speeds = measure(kind)
    yield Finding(
        name="precision", mark="ok", found=describe(decide(speeds, kind), speeds, kind).removeprefix("precision ")
    )


def memory() -> Iterator[Finding]:
    from tunesmith.model.devices import available

    free, total = available(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mark: Mark = "problem" if free < TOO_LITTLE_MEMORY else "note" if free < LITTLE_MEMORY else "ok"
    yield Finding(
        name="memory",
        mark=mark,
        found=f"{size(total)}, {size(free)} available",
        means="" if mark == "ok" else "LoRA on 135 million parameters takes about 3 GB; larger models more.",
        mend="" if mark == "ok" else "end other programs, or take a machine with more",
    )


def disks() -> Iterator[Finding]:
    from tunesmith.home import home

    for name, folder in (("cache folder", home()), ("this folder", Path.cwd())):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        writable = there.is_dir() and os.access(there, os.W_OK)
        unusable = free < TOO_LITTLE_DISK or not writable
        is_cache = name == "cache folder"
        # Runs can be written elsewhere; the cache is where TUNESMITH_HOME says.
        mark: Mark = "problem" if unusable and is_cache else "note" if unusable or free < LITTLE_DISK else "ok"
        wanted = "prepared data and the demo model" if is_cache else "runs, by default"
        move = "set TUNESMITH_HOME to another folder" if is_cache else "work in another folder"
        yield Finding(
            name=name,
            mark=mark,
            found=f"{folder}: {size(free)} free" + ("" if writable else ", not writable"),
            means="" if mark == "ok" else f"Here go {wanted}; a checkpoint of a large model takes many GB.",
            mend="" if mark == "ok" else move if not writable else f"free some, or {move}",
        )


def size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
