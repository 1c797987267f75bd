"""Several processes of one run: how they wait for each other, and whose error ended them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from transformers import TrainingArguments

from tunesmith.runs.folder import error_number

LOST = 75
"""The exit code of a process that ended because another did."""
FOREVER = timedelta(days=365)
UNNUMBERED = max(errno.errorcode) + 1
"""Stands for an error that is none of the system."""
_SIGNS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "remote process exited",
    "NCCL",
    "ncclRemote",
)


class AnotherFailed(RuntimeError):
    """Another process could not do its part of what all do together."""


def number_of_processes() -> int:
    """As whoever started this process says."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process has failed, or is gone in the words of gloo and NCCL."""
    if isinstance(error, AnotherFailed | distributed.DistBackendError | distributed.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def in_turn(args: TrainingArguments) -> Iterator[None]:
    """The first process of each machine does what is within before the others, which find it in the cache then.

    They wait as long as it takes: what is within may last longer than a collective of the training may. Where one
    fails, the others do.
    """
    if args.world_size == 1 or not distributed.is_initialized():
        yield
        return
    group = distributed.new_group(timeout=FOREVER, backend="gloo")
    first = args.local_process_index == 0
    if not first:
        distributed.barrier(group)
    yield
    if first:
        distributed.barrier(group)
    distributed.barrier(group)


@contextmanager
def all_or_none(device: torch.device) -> Iterator[None]:
    """What is within fails on every process where it fails on one: the others raise an OSError of the same number, or
    AnotherFailed where it was no error of the system. Nobody waits in vain for a process that has gone on."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # raised below, when the others know
        failure = error
    own = 0 if failure is None else error_number(failure) or UNNUMBERED
    numbers = torch.tensor(own, device=device)
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    worst = int(numbers)
    if failure is not None and own == worst:
        raise failure
    if worst == UNNUMBERED:
        raise AnotherFailed("another process could not do its part; its own error says why")
    if worst:
        raise OSError(worst, f"{os.strerror(worst)}, on another process")
