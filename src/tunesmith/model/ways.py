"""Which of two ways to compute the same is the faster one here: for the shapes of a run, on this machine.

A fast path is worth its name only where it is one. Libraries of products differ by processor, by the shape of a product
and by which factor is transposed; attention in blocks pays from some length on. So nothing is decided by a rule: when a
kind of call is first met, both ways compute it in turns, and from then on the faster one does. The plain way stays
unless the other is clearly faster. All trials of a process together take about a second.

The ways round differently, so the choices are kept in checkpoints: a run that goes on computes as it did before. After
the first step nothing is tried any more. What is met later goes the way of what is most like it.
"""

import ast
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Kind: TypeAlias = tuple[str, int, *tuple[int | bool, ...]]
"""What is computed, the size that varies from call to call (a power of two), and what does not."""

GAIN = 1.05
"""The plain way stays unless the other is so many times as fast."""
ROUNDS = 3
SECONDS = 1.0
"""Of all trials."""
SHORT = 0.002
"""Seconds: a call that takes less is tried more often, since a single one tells little."""

_chosen: dict[Kind, bool] = {}
_spent = 0.0
_settled = False
_forced: bool | None = None


def is_faster(kind: Kind, plain: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether `other` is the faster way for this kind of call. Both compute the call that is at hand, and change
    nothing."""
    global _spent
    if _forced is not None:
        return _forced
    if kind not in _chosen:
        started = time.perf_counter()
        _chosen[kind] = _like(kind) if _settled or _spent > SECONDS else _tried(plain, other)
        _spent += time.perf_counter() - started
    return _chosen[kind]


def attempt(way: Callable[..., Tensor], *inputs: Any) -> Callable[[], None]:
    """A way of computing on copies of these inputs, forward and, where one of them wants a gradient, backward."""
    trained = any(isinstance(x, Tensor) and x.requires_grad for x in inputs) and torch.is_grad_enabled()

    def run() -> None:
        copies = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
        # Hooks of ours, so that those of a layer that is checkpointed, or offloaded, hear nothing of a trial.
        with torch.set_grad_enabled(trained), saved_tensors_hooks(_same, _same):
            out = way(*copies)
            if out.requires_grad:
                wanted = [x for x in copies if isinstance(x, Tensor) and x.requires_grad]
                torch.autograd.grad(out, wanted, torch.ones_like(out))

    return run


def _same(x: Tensor) -> Tensor:
    return x


def _tried(plain: Callable[[], object], other: Callable[[], object]) -> bool:
    best = {plain: float("inf"), other: float("inf")}
    rounds = 0
    while rounds < ROUNDS or (rounds < 4 * ROUNDS and min(best.values()) < SHORT):
        for way in best:  # in turns, so that another program's load meets both
            started = time.perf_counter()
            way()
            if rounds:  # the first call of each fills caches
                best[way] = min(best[way], time.perf_counter() - started)
        rounds += 1
    return best[plain] > GAIN * best[other]


def _like(kind: Kind) -> bool:
    """The choice for the kind that differs least in the size that varies; plain without one."""
    name, size, *rest = kind
    known = [other for other in _chosen if other[0] == name and [*other[2:]] == rest]
    return bool(known) and _chosen[min(known, key=lambda other: (abs(other[1] - size), other[1]))]


def force(choice: bool | None) -> None:
    """Take the other way (true) or the plain one (false) for every kind of call; None lets them compete."""
    global _forced
    _forced = choice


def forced() -> bool | None:
    """What `force` was told."""
    return _forced


def settle() -> None:
    """Try nothing any more: the first step is over."""
    global _settled
    _settled = True


def begin_anew() -> None:
    """A run begins: what it meets is tried, unless it was before."""
    global _settled, _spent
    _settled, _spent = False, 0.0


def state() -> dict[str, bool]:
    """The choices so far, by kind of call."""
    return {repr(kind): choice for kind, choice in _chosen.items()}


def restore(choices: Mapping[str, bool]) -> None:
    """Compute as a run did that made these choices."""
    _chosen.clear()
    _chosen.update({ast.literal_eval(kind): bool(choice) for kind, choice in choices.items()})
    settle()
