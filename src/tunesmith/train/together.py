"""Several processes of one run: how they wait for each other, and whose error ended them."""

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from operator import itemgetter
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from tunesmith.runs.folder import error_number

T = TypeVar("T")
LOST = 75
"""The exit code of a process that ended because another did."""
AGENT = "TUNESMITH_AGENT"
"""The variable with the number of the process that started this one with others."""
LOOKING = 1.0
"""Seconds between two looks at whether that is still there."""
FOREVER = timedelta(days=365)
IN_FLIGHT = 3
"""Parts of the gradients that are under way at a time, each a copy."""
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


def leave_with_agent() -> None:
    """Ends this process where the one that started it is killed: nobody would end it then, nor start it again beside
    others. The others of the run, on this machine and elsewhere, are lost with it."""
    agent = int(os.environ.pop(AGENT, "0"))  # which is not that of what this one starts

    def look() -> None:
        while os.getppid() == agent:
            time.sleep(LOOKING)
        os._exit(LOST)

    if agent:
        threading.Thread(target=look, daemon=True).start()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process has failed, or is gone in the words of gloo and NCCL."""
    if isinstance(error, AnotherFailed | distributed.DistBackendError | distributed.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def part() -> None:
    """Closes the connections to other processes, as PyTorch asks for before a process ends. A process with open ones
    has been seen to abort at its end, when its work was done."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


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


def sum_over_processes(args: TrainingArguments) -> Callable[[int], int]:
    """A function that sums a number over all processes, which all must call. They wait for each other as long as it
    takes."""
    if args.world_size == 1:
        return lambda number: number
    group = distributed.new_group(timeout=FOREVER, backend="gloo")

    def summed(number: int) -> int:
        total = torch.tensor(number)
        distributed.all_reduce(total, group=group)
        return int(total)

    return summed


def in_order(numbers: Sequence[int], values: Sequence[T]) -> list[T]:
    """The values of all processes, by their numbers. Every process must bring its own, any number of them."""
    pairs: list[tuple[int, T]] = gather_object([*zip(numbers, values, strict=True)])
    return [value for _, value in sorted(pairs, key=itemgetter(0))]


class Waiting:
    """How long this process has waited for others, where they meet in a step, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counted(self, device: torch.device) -> Iterator[None]:
        """What is within waits. What was asked of the `device` before is over first."""
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


def average_gradients(model: DistributedDataParallel) -> None:
    """Make the gradients of each process their mean over all processes, which all must call this.

    It is what `model` would do during the last backward of a step, but behind it: until then a process can do its part
    of a step again without the others. A weight of which no process has a gradient keeps none.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        return
    having = torch.tensor([float(weight.grad is not None) for weight in weights], device=weights[0].device)
    distributed.all_reduce(having)
    of_some = [weight for weight, count in zip(weights, having.tolist(), strict=True) if count]
    under_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()
    for gradients in _buckets([_gradient(weight) for weight in of_some], model.bucket_bytes_cap):
        alone = len(gradients) == 1 and gradients[0].is_contiguous()
        flat = gradients[0].view(-1) if alone else torch.cat([gradient.reshape(-1) for gradient in gradients])
        flat.div_(distributed.get_world_size())
        under_way.append(([] if alone else gradients, flat, distributed.all_reduce(flat, async_op=True)))
        if len(under_way) >= IN_FLIGHT:
            _arrive(*under_way.popleft())
    while under_way:
        _arrive(*under_way.popleft())


def _gradient(weight: nn.Parameter) -> Tensor:
    if weight.grad is None:  # here, but not in another process, as of an expert that no token was sent to
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _buckets(gradients: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Neighbours of one type and device, together up to `limit` bytes; a larger one alone."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (gradient.dtype, gradient.device)
        if bucket and not (alike and size + gradient.nbytes <= limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def _arrive(gradients: list[Tensor], flat: Tensor, work: Any) -> None:
    work.wait()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


@contextmanager
def all_or_none(device: torch.device, *, numbered: bool = True) -> Iterator[None]:
    """What is within fails on every process where it fails on one: the others raise an OSError of the same number, or
    AnotherFailed where it was no error of the system, or with `numbered` false. Nobody waits in vain for a process that
    has gone on."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # raised below, when the others know
        failure = error
    own = 0 if failure is None else (error_number(failure) if numbered else None) or UNNUMBERED
    numbers = torch.tensor(own, device=device)
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    worst = int(numbers)
    if failure is not None and own == worst:
        raise failure
    if worst == UNNUMBERED:
        raise AnotherFailed("another process could not do its part; its own error says why")
    if worst:
        raise OSError(worst, f"{os.strerror(worst)}, on another process")
