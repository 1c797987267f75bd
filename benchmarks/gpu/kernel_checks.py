"""Attention over documents against plain attention in fp64: values and gradients, in each format and kernel.

Shapes: T tokens, D documents, N query heads, K key/value heads, H head size.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.gpu.verdicts import Place, Trial, Verdict, judged, left_out
from tunesmith.model import attention_cuda, precision
from tunesmith.model.attention import attend_documents, document_map
from tunesmith.model.attention_cuda import FLASH_2, PYTORCH, Backend, Call

BY_DOCUMENT = "document by document"
DTYPES = precision.DTYPES
NOISE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""How far a result may be off in its format, as the norm of the difference over that of the exact result. On a CPU,
attention is 0.6%, 0.07% and 5e-7 off."""
SHIFT = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-5}
"""How far it may be too large or too small as a whole, as a share. Rounding cancels out in that: on a CPU 0.15%, 0.01%
and 6e-8 remain. A scale that is 1% off shows here, below the noise of bfloat16."""
CALLS = {
    "causal": Call(scale=0.125),
    "a window of 5": Call(scale=0.125, window=5),
    "softcap": Call(scale=0.125, softcap=1.0),
    "sinks": Call(scale=0.125, sinks=torch.tensor([0.5, -0.5, 1.0, 0.0])),
}
CAN = {PYTORCH: ("causal", "a window of 5"), FLASH_2: ("causal", "a window of 5", "softcap"), BY_DOCUMENT: tuple(CALLS)}
HEADS = (4, 2, 2)
TREE_LENGTHS, TREE_PARENTS = (9, 4, 6, 3, 8, 1, 5), (-1, 0, 1, 1, 0, -1, 5)
"""The longest path has three segments, and a tree of two stands beside it."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`q` (1, N, T, H), `k` and `v` (1, K, T, H) to (1, T, N, H)."""


def attention(place: Place) -> Iterator[tuple[str, Trial]]:
    for kernel, calls in CAN.items():
        for name, dtype in DTYPES.items():
            if dtype != torch.float32 or kernel == BY_DOCUMENT:
                for call in calls:
                    yield f"{kernel}, {name}, {call}", partial(_kernel, place, kernel, dtype, CALLS[call])
    for name, dtype in DTYPES.items():
        yield f"what a run takes in {name}", partial(_taken, place, dtype)
    for dtype in (torch.bfloat16, torch.float16):
        yield f"speed, {str(dtype).removeprefix('torch.')}", partial(_speed, place, dtype)
    for name, dtype in DTYPES.items():
        for call in ("causal", "a window of 5", "softcap"):
            yield f"tree of prefixes, {name}, {call}", partial(_tree, place, dtype, CALLS[call])


def formats(place: Place) -> Iterator[tuple[str, Trial]]:
    yield "precision", partial(_choice, place)


# Attention


def _kernel(place: Place, kernel: str, dtype: torch.dtype, call: Call) -> Verdict:
    if reason := _missing(kernel):
        return left_out(reason)
    shapes = place.size([([7, 1, 12, 5], 64), ([513, 64, 1, 1500, 130], 64), ([300, 20], 128)], [([7, 1, 12, 5], 64)])
    worst = (0.0, 0.0)
    for lengths, head in shapes:
        inputs = _inputs(sum(lengths), head, dtype)
        on_device = _on_device(call, inputs[0], dtype)

        def exact(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] = lengths) -> Tensor:
            return _plain(q, k, v, _seen(lengths, [-1] * len(lengths), call.window), call)

        worst = _worse(worst, _errors(_through(kernel, lengths, on_device, dtype), exact, inputs))
    return _verdict(worst, dtype)


def _tree(place: Place, dtype: torch.dtype, call: Call) -> Verdict:
    lengths = [place.size(20, 1) * length for length in TREE_LENGTHS]
    documents = document_map(lengths, TREE_PARENTS)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_documents(nn.Module(), q, k, v, documents, **_arguments(call))

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _plain(q, k, v, _seen(lengths, TREE_PARENTS, call.window), call)

    return _verdict(_errors(ours, exact, _inputs(sum(lengths), 64, dtype)), dtype)


def _taken(place: Place, dtype: torch.dtype) -> Verdict:
    """Whether a run takes the kernel that is there: one that fails on a small example is left alone, with a warning."""
    q, _, v = _inputs(8, 64, dtype)
    kernel = attention_cuda.pick(q, v, CALLS["causal"])
    expected = dtype != torch.float32 and not _missing(PYTORCH)
    return judged((kernel is not None) == expected, BY_DOCUMENT if kernel is None else kernel.name)


def _speed(place: Place, dtype: torch.dtype) -> Verdict:
    """Forward and backward of many short documents and of a few long ones: the kernel is to be no slower."""
    if reason := _missing(PYTORCH):
        return left_out(reason)
    milliseconds: dict[str, dict[str, float]] = {}
    for lengths in place.size([[256] * 32, [2048] * 4], [[16] * 4, [32] * 2]):
        inputs = _inputs(sum(lengths), 64, dtype)
        ways = {way: _through(way, lengths, CALLS["causal"], dtype) for way in (PYTORCH, BY_DOCUMENT)}
        shape = f"{len(lengths)} x {lengths[0]}"
        milliseconds[shape] = {way: _milliseconds(attend, inputs, place.size(10, 1)) for way, attend in ways.items()}
    found = "; ".join(
        f"{shape} tokens: {times[PYTORCH]:.2f} ms, {BY_DOCUMENT} {times[BY_DOCUMENT]:.2f} ms"
        for shape, times in milliseconds.items()
    )
    slower = any(times[PYTORCH] > 1.1 * times[BY_DOCUMENT] for times in milliseconds.values())
    return judged(place.rehearsed or not slower, found, milliseconds=milliseconds)


def _missing(kernel: str) -> str:
    """Why `kernel` can't be tried here; empty where it can."""
    if kernel == BY_DOCUMENT:
        return ""
    if torch.cuda.get_device_capability(attention_cuda.DEVICE) < (8, 0):
        return "the kernel is for GPUs of compute capability 8.0 and later"
    if kernel == PYTORCH:
        return "" if attention_cuda._pytorch() else "this torch has no attention of variable length, or none built in"
    if attention_cuda._flash2():
        return ""
    return "flash-attn is " + ("there, but can't be used" if find_spec("flash_attn") else "not installed")


def _through(kernel: str, lengths: Sequence[int], call: Call, dtype: torch.dtype) -> Attend:
    documents = document_map(lengths)
    if kernel == BY_DOCUMENT:

        def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with mock.patch.object(attention_cuda, "pick", return_value=None):
                return attend_documents(nn.Module(), q, k, v, documents, **_arguments(call))

        return apart
    run = attention_cuda._pytorch() if kernel == PYTORCH else attention_cuda._flash2()
    assert run is not None
    backend = Backend(name=kernel, run=run, dtype=dtype)
    return lambda q, k, v: attention_cuda.attend(backend, q, k, v, documents, call)


def _arguments(call: Call) -> dict[str, object]:
    """What a layer would pass."""
    return {"scaling": call.scale, "sliding_window": call.window, "softcap": call.softcap, "s_aux": call.sinks}


def _inputs(tokens: int, head: int, dtype: torch.dtype) -> list[Tensor]:
    """`q`, `k` and `v` in the layout that layers hand over: a transposed view."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, tokens, heads, head, generator=generator)
        .to(attention_cuda.DEVICE, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in HEADS
    ]


def _on_device(call: Call, like: Tensor, dtype: torch.dtype) -> Call:
    if call.sinks is None:
        return call
    return Call(scale=call.scale, sinks=call.sinks.to(like.device, dtype))


# What is exact


def _seen(lengths: Sequence[int], parents: Sequence[int], window: int | None) -> Tensor:
    """(T, T) bool: whether a token (row) sees another. It sees its own segment up to itself, and all of the segments
    that this one continues; within a window, by position in the document."""
    stops = torch.tensor([0, *lengths]).cumsum(0).tolist()
    segments = [torch.arange(start, stop) for start, stop in pairwise(stops)]
    seen = torch.zeros(stops[-1], stops[-1], dtype=torch.bool)
    paths: list[Tensor] = []
    for own, parent in zip(segments, parents, strict=True):
        path = torch.cat([paths[parent], own]) if parent >= 0 else own
        paths.append(path)
        place = torch.arange(len(path))
        behind = place[-len(own) :, None] - place  # how far each of the segment's tokens is behind those of the path
        seen[own[:, None], path] = (behind >= 0) & (behind < (window or len(path)))
    return seen


def _plain(q_NTH: Tensor, k_KTH: Tensor, v_KTH: Tensor, seen_TT: Tensor, call: Call) -> Tensor:
    """All scores of a row at once, in the format of the inputs."""
    heads = q_NTH.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_KTH, v_KTH))
    scores = q_NTH @ k.transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.masked_fill(~seen_TT.to(scores.device), float("-inf"))
    if call.sinks is not None:
        sinks = call.sinks.to(scores).view(1, -1, 1, 1).expand(1, heads, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return (scores.softmax(dim=-1)[..., : k.shape[2]] @ v).transpose(1, 2)


def _errors(ours: Attend, exact: Attend, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """The noise and the shift of the worst of the output and its three gradients."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    output, expected = ours(*inputs), exact(*doubles)
    towards = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    mine = (output.detach(), *torch.autograd.grad(output, list(inputs), towards))
    right = (expected.detach(), *torch.autograd.grad(expected, doubles, towards.double()))
    worst = (0.0, 0.0)
    for x, y in zip(mine, right, strict=True):
        x = x.double()
        noise, shift = float((x - y).norm() / y.norm()), abs(float((x * y).sum() / (y * y).sum()) - 1)
        worst = _worse(worst, (noise, shift))
    return worst


def _worse(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """The larger noise and shift; no number is the worst."""
    pairs = zip(one, other, strict=True)
    noise, shift = (float("inf") if a != a or b != b else max(a, b) for a, b in pairs)
    return noise, shift


def _verdict(error: tuple[float, float], dtype: torch.dtype) -> Verdict:
    noise, shift = error
    return judged(
        noise <= NOISE[dtype] and shift <= SHIFT[dtype],
        f"{noise:.1e} off (at most {NOISE[dtype]:g}), as a whole {shift:.1e} (at most {SHIFT[dtype]:g})",
        noise=noise,
        shift=shift,
    )


# Time


def _milliseconds(attend: Attend, inputs: Sequence[Tensor], calls: int) -> float:
    """The best of three turns of so many calls, forward and backward."""
    best, towards = float("inf"), torch.ones_like(attend(*inputs))
    for _ in range(4):  # the first one loads the kernel
        with _waited_for():
            started = time.perf_counter()
            for _ in range(calls):
                torch.autograd.grad(attend(*inputs), list(inputs), towards)
        best = min(best, time.perf_counter() - started)
    return 1000 * best / calls


@contextmanager
def _waited_for() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _choice(place: Place) -> Verdict:
    """The short timing of `precision: auto` against one of many products in turn, by which the same is to be chosen."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    speeds = precision.measure(kind)
    choice = precision.decide(speeds, kind)
    lasting = {name: _lasting(kind, dtype, place.size(4096, 64)) for name, dtype in DTYPES.items() if speeds[name]}
    again = precision.decide(lasting, kind)
    return judged(
        place.rehearsed or choice == again,
        f"{precision.describe(choice, speeds, kind).removeprefix('precision ')}; over 50 products "
        + ", ".join(f"{name} {rate:,.0f}" for name, rate in lasting.items())
        + f", by which it would be {again}",
        choice=choice,
        gflops=dict(speeds),
        lasting_gflops=dict(lasting),
    )


def _lasting(kind: str, dtype: torch.dtype, size: int) -> float:
    """GFLOP/s of 50 products that follow each other."""
    a, b = (torch.randn(size, size, device=kind).to(dtype) for _ in range(2))
    for calls in (5, 50):
        with _waited_for():
            started = time.perf_counter()
            for _ in range(calls):
                _ = a @ b
    return 50 * 2 * size**3 / (time.perf_counter() - started) / 1e9
