"""Which of two ways to compute the same is the faster one here: for these shapes, on this machine.

A fast path is worth its name only where it is one. Libraries of products differ by processor, by the shape of a product,
and by which factor is transposed; attention in blocks pays from some length on. So nothing is decided by a rule: when a
kind of call is met for the first time, both ways compute it in turns, and from then on the faster one does. The plain way
stays unless the other is clearly faster. All trials of a process together take about a second; what is met later stays
plain.

The choices are kept in checkpoints, since the ways round differently: a run that goes on computes as it did before.
"""

import time
from collections.abc import Callable, Hashable, Mapping

GAIN = 1.05
"""The plain way stays unless the other is so many times as fast."""
ROUNDS = 3
SECONDS = 1.0
"""Of all trials."""
FEW = 0.002
"""Seconds of a call that is tried more often, since a single one tells little."""

_chosen: dict[str, bool] = {}
_spent = 0.0
_forced: bool | None = None


def is_faster(kind: Hashable, plain: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether `other` is the faster way for this kind of call. Both compute the call that is at hand, and change
    nothing."""
    global _spent
    if _forced is not None:
        return _forced
    name = str(kind)
    if name not in _chosen:
        started = time.perf_counter()
        _chosen[name] = _spent < SECONDS and _tried(plain, other)
        _spent += time.perf_counter() - started
    return _chosen[name]


def _tried(plain: Callable[[], object], other: Callable[[], object]) -> bool:
    best = {plain: float("inf"), other: float("inf")}
    rounds = 0
    while rounds < ROUNDS or (rounds < 4 * ROUNDS and best[plain] < FEW):
        for way in best:  # in turns, so that another program's load meets both
            started = time.perf_counter()
            way()
            if rounds:  # the first call of each fills caches
                best[way] = min(best[way], time.perf_counter() - started)
        rounds += 1
    return best[plain] > GAIN * best[other]


def force(choice: bool | None) -> None:
    """Take the other way (true) or the plain one (false) for every kind of call; None lets them compete."""
    global _forced
    _forced = choice


def state() -> dict[str, bool]:
    """The choices so far, by kind of call."""
    return dict(_chosen)


def restore(choices: Mapping[str, bool]) -> None:
    """Compute as a run did that made these choices."""
    _chosen.clear()
    _chosen.update(choices)
