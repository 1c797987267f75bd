"""Memory: kept between steps on a CPU, watched, and given back when it is out."""

import ctypes
import gc
import os
import platform
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.errors import TunesmithError

# From glibc's malloc.h and Linux's mman.h; see mallopt(3) and madvise(2).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1
MADV_HUGEPAGE = 14


@cache
def keep_freed_memory() -> bool:
    """Let the allocator keep what a step frees for the next step; returns whether it could be told to.

    glibc gives every freed block of some MB back to the system, and a step of training frees gigabytes. The next one
    asks for them again, and the system clears page after page: a tenth of the time of a step. The peak of the memory
    stays about the same (with gradient checkpointing, holes between blocks raised it by a fifth), what lies between two
    peaks is not given back. Of other allocators nothing is known here.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, NEVER))
    if kept and platform.system() == "Linux":
        _ask_for_huge_pages(libc)
    return kept


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Let what the heap grows into, up to half the machine's memory, come in pages of 2 MB where the system has them on
    request ("madvise"): matrix products over small pages lose a twentieth of their time looking addresses up.

    None of that memory is taken until it is used. Where there is no such request, or so large a block, all stays as it
    was.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") * page // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block:
        start = -(-block // page) * page
        libc.madvise(start, (block + size - start) // page * page, MADV_HUGEPAGE)
        libc.free(block)


class MemoryLimit(RuntimeError):
    """The process has come to hold more than `memory_limit`."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was memory that `error` is about: a GPU's, the limit of ours, or what the system would give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | MemoryLimit):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text.lower())


def resident() -> int | None:
    """Bytes that the process has in main memory; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def limit_memory(model: nn.Module, limit: int) -> None:
    """Let each layer of `model` raise MemoryLimit, before it runs, when the process holds more than `limit` bytes.

    Raises TunesmithError where that can't be told, and when it holds more already.
    """
    held = resident()
    if held is None:
        raise TunesmithError("memory_limit: this system does not tell how much memory a process has; leave it out")
    if held > limit:
        raise TunesmithError(
            f"memory_limit is {limit / 1e9:.2f} GB, and the process holds {held / 1e9:.2f} GB before training; raise it"
        )

    def check(*_: object) -> None:
        now = resident() or 0
        if now > limit and torch.is_grad_enabled():
            raise MemoryLimit(f"{now / 1e9:.2f} GB, and memory_limit is {limit / 1e9:.2f} GB")

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(check)


def give_back() -> None:
    """Free what nobody holds, and give it back: to the GPU, and to the system."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
