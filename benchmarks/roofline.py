"""How near the limit of this machine a training step comes: the time that its products alone would take, at the rate
that their very shapes reach here, against the time that the step took.

A step is recorded by torch's profiler, with the shapes of its matrix products. Each shape is then timed by itself, in
both layouts and with both libraries that torch carries, and the best counts. Attention is counted by its arithmetic,
4 x layers x width FLOP for each pair of a token and one before it in its document forward, twice that backward, at the
rate of the best large product. Nothing else of a step counts: norms, activations, the optimizer, Python are all above
the limit.
"""

import time
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.model.linear import onednn

LARGE = 2048
ROUNDS = 5
Shape = tuple[int, int, int]
"""Rows, inner size and columns of a product."""


def products(profile: Any, head: int) -> Counter[Shape]:
    """The matrix products of a profile and how often each was computed; without those of attention, which have the size
    of a `head` in one dimension."""
    shapes: Counter[Shape] = Counter()
    for event in profile.key_averages(group_by_input_shape=True):
        sizes = [size for size in event.input_shapes if len(size) == 2]
        if event.key in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (rows, inner), (_, columns) = sizes[-2:]
        elif event.key == "mkldnn::_linear_pointwise":
            (rows, inner), (columns, _) = sizes[:2]
        else:
            continue
        if head not in (rows, inner, columns):
            shapes[rows, inner, columns] += event.count
    return shapes


def seconds(shapes: Counter[Shape], dtype: torch.dtype) -> float:
    """The time that these products take by themselves."""
    return sum(count * _best(*shape, dtype) for shape, count in shapes.items())


def rate(dtype: torch.dtype) -> float:
    """FLOP/s of the best large product."""
    return 2 * LARGE**3 / _best(LARGE, LARGE, LARGE, dtype)


def _best(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    turned = b.t().contiguous().t()
    ways = [(library, weight) for library in (F.linear, onednn) for weight in (b, turned)]
    best = float("inf")
    for _ in range(ROUNDS):
        for library, weight in ways:
            started = time.perf_counter()
            library(a, weight)
            best = min(best, time.perf_counter() - started)
    return best
