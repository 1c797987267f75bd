"""Memory: kept between steps on a CPU, watched, and given back when it is out."""

import ctypes
import gc
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.data.samplers import document_lengths
from tunesmith.errors import TunesmithError
from tunesmith.model.devices import available

# From glibc's malloc.h; see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the allocator keep what a step frees for the next step; returns whether it could be told to.

    glibc gives every freed block of some MB back to the system, and a step of training frees gigabytes. The next one
    asks for them again, and the system clears page after page: a tenth of the time of a step. The peak of the memory
    stays about the same (with gradient checkpointing, holes between blocks raised it by a fifth), what lies between two
    peaks is not given back. Of other allocators nothing is known here.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))


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


# What `compute_metrics` gets: the logits of all rows of an evaluation at once, unless something makes less of them

LOGITS_SHARE = 0.5
"""Of the main memory that is free, so much may be filled with logits: metrics make copies."""
FLOAT = 4
"""Bytes of a logit: `transformers` keeps them as float32."""


def check_logits(trainer: Trainer, evaluated: Any) -> None:
    """Whether evaluating on `evaluated` (none, one data set, or several by name) holds few enough logits.

    Raises:
        TunesmithError: rows x longest row x vocabulary x 4 bytes are over `LOGITS_SHARE` of the memory that is free.
    """
    args = trainer.args
    reduced = trainer.preprocess_logits_for_metrics is not None or args.batch_eval_metrics
    if trainer.compute_metrics is None or reduced or args.prediction_loss_only:
        return
    vocabulary = int(cast(Any, trainer.model).config.get_text_config().vocab_size)
    for name, dataset in (evaluated if isinstance(evaluated, Mapping) else {"eval": evaluated}).items():
        # How long a stream is, nobody knows.
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names and len(dataset):
            lengths = document_lengths(dataset)
            _check_one(name, len(lengths), int(lengths.max()), vocabulary)


def _check_one(name: str, rows: int, longest: int, vocabulary: int) -> None:
    held, free = rows * longest * vocabulary * FLOAT, available()
    if held <= LOGITS_SHARE * free:
        return
    raise TunesmithError(
        f"{name} data: compute_metrics would hold {held:,} bytes of logits ({rows:,} rows x {longest:,} tokens x "
        f"{vocabulary:,} words x {FLOAT} bytes), and {free:,} are free. Write "
        "preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1), which leaves a token's id of each "
        "row of logits; or set batch_eval_metrics: true and take compute_result in compute_metrics, which then gets a "
        "batch at a time"
    )
