"""What `tunesmith doctor` looks at of the machine. Each check stands alone."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tunesmith.doctor.finding import Finding, Mark
from tunesmith.terminal.output import size

LITTLE_MEMORY, TOO_LITTLE_MEMORY = 4e9, 1e9
"""Bytes: what LoRA on the demo model takes and some more, and what does not even hold the libraries and a model."""
LITTLE_DISK, TOO_LITTLE_DISK = 5e9, 2e8
CPUINFO = Path("/proc/cpuinfo")


def processor() -> Iterator[Finding]:
    import torch

    info = CPUINFO.read_text(encoding="utf-8") if sys.platform == "linux" else ""
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
        means="Without AVX2 matrix products are several times slower."
        if slow
        else "On the CPU, products use these threads and instructions.",
        mend="take a processor since 2015, or a GPU; a virtual machine must be told to pass AVX2 on" if slow else "",
    )


def accelerators() -> Iterator[Finding]:
    import torch

    from tunesmith.model.devices import CPU, here

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield _gpu(i)
        return
    device = here().type
    if device == CPU:
        means = "Small models train on the CPU; from about a billion parameters on, take a GPU."
        yield Finding(name="GPU", mark="ok", found="none that torch can use", means=means)
        return
    count = torch.accelerator.device_count()
    yield Finding(name=f"device {device}", mark="ok", found=f"{count} of them", means="Training can use it.")


def _gpu(i: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(i)
    free, total = torch.cuda.mem_get_info(i)
    runs = _is_built_for(properties.major, properties.minor)
    return Finding(
        name=f"GPU {i}",
        mark="ok" if runs else "problem",
        found=f"{properties.name}, compute capability {properties.major}.{properties.minor}, {size(total)} of memory, "
        f"{size(free)} free",
        means="Training can use it."
        if runs
        else f"This torch is built for {', '.join(torch.cuda.get_arch_list())}, and not for this GPU.",
        mend="" if runs else "install a torch that is built for it, see pytorch.org/get-started",
    )


def _is_built_for(major: int, minor: int) -> bool:
    """Whether this torch has code for the compute capability. A binary for 8.0 runs on 8.6, and the portable "compute"
    code on everything later."""
    import torch

    built = [name.partition("_") for name in torch.cuda.get_arch_list()]
    numbers = [(kind, int(digits.rstrip("af"))) for kind, _, digits in built if digits.rstrip("af").isdigit()]
    fits = any(
        number <= 10 * major + minor and (kind == "compute" or number // 10 == major) for kind, number in numbers
    )
    return fits or not numbers or getattr(torch.version, "hip", None) is not None


def precision() -> Iterator[Finding]:
    from tunesmith.model.devices import here
    from tunesmith.model.precision import decide, describe, measure

    kind = here().type
    speeds = measure(kind)
    if not speeds["fp32"]:
        yield Finding(
            name="precision",
            mark="problem",
            found=f"no matrix product works on {kind}",
            means="Nothing can be trained on it.",
            mend="mend what is said of torch and the GPU; `use_cpu: true` trains on the CPU meanwhile",
        )
        return
    choice = decide(speeds, kind)
    yield Finding(
        name="precision",
        mark="ok",
        found=describe(choice, speeds, kind).removeprefix("precision "),
        means="Training takes fp32: no shorter format is faster here."
        if choice == "fp32"
        else f"Training takes {choice}, {speeds[choice] / speeds['fp32']:.1f} times as fast as fp32.",
    )


def memory() -> Iterator[Finding]:
    from tunesmith.model.devices import available

    free, total = available(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mark: Mark = "problem" if free < TOO_LITTLE_MEMORY else "note" if free < LITTLE_MEMORY else "ok"
    yield Finding(
        name="memory",
        mark=mark,
        found=f"{size(total)}, {size(free)} available",
        means="LoRA on 135 million parameters takes about 3 GB; `tunesmith plan` tells what a run takes.",
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
            means=f"Here go {wanted}" + ("." if mark == "ok" else "; a checkpoint of a large model takes many GB."),
            mend="" if mark == "ok" else move if not writable else f"free some, or {move}",
        )
