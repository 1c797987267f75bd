"""Attention over all documents of a flat row in one kernel, on CUDA GPUs that have such a kernel.

PyTorch's own `torch.nn.attention.varlen` is the kernel of every GPU from Ampere (8.0) on; FlashAttention 2
(`flash_attn`, from 2.6 on) only computes what it can't: dropout, softcaps, and heads whose size is no multiple of 8. On
Hopper, `torch.nn.attention.activate_flash_attention_impl("FA3")` makes PyTorch's kernel FlashAttention 3. The method is
that of FlashAttention (Dao 2023, arXiv:2307.08691). Where there is no kernel, `pick` returns None and attention goes
document by document.

Nothing here was run on a GPU: it follows the packages' documented signatures and is tested with stand-ins for them.
For that reason `pick` tries the kernel on two small documents, forward and backward, and takes it only if it agrees
with the plain computation.

Shapes: T tokens, D documents, N query heads, K key/value heads, H head size.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

logger = logging.getLogger(__name__)
DEVICE = "cuda"
LARGEST_HEAD = 256
PYTORCH, FLASH_2 = "PyTorch's varlen attention", "FlashAttention 2"
TRIED = (9, 6)
"""Lengths of the two documents that a kernel is tried on."""
TRIED_WINDOW = 4
TRIED_SOFTCAP = 1.0
TOLERANCE = 5e-2
"""Of outputs and gradients, against the largest value of each: with the 8 bits of bfloat16 they are 1% off on this
example, with a key too many, another scale or another order of heads at least one of them is 14% off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What one layer asks: `window` is the number of keys that a query sees, itself included, or None for all; `sinks`
    (N,) are scores that take a share of each head's weights and give no value, as in gpt-oss."""

    scale: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Offsets:
    """Where documents start and end: `cu` (D+1,) int32 on the device, and the length of the longest."""

    cu: Tensor
    longest: int


Run = Callable[[Tensor, Tensor, Tensor, Offsets, Call], Tensor]
"""`q` (T, N, H), `k` and `v` (T, K, H) to the output (T, N, H)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A kernel, and the dtype that it gets its inputs in."""

    name: str
    run: Run
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class _Need:
    """What a kernel must be able to do, as far as it decides whether there is one."""

    head: int
    windowed: bool
    softcap: bool
    dropout: bool


def pick(q_NTH: Tensor, v_KTH: Tensor, call: Call) -> Backend | None:
    """The kernel for layers like this one, or None: no CUDA, no 16-bit floats, no kernel, or a wrong one.

    `q` is (1, N, T, H), `v` is (1, K, T, H). Under autocast their dtype may still be fp32; what counts is autocast's.
    Settled once for each device, dtype, head size and need.
    """
    kind = q_NTH.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q_NTH.dtype
    head = q_NTH.shape[-1]
    if kind != DEVICE or call.sinks is not None or head > LARGEST_HEAD or v_KTH.shape[-1] != head:
        return None
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    need = _Need(
        head=head, windowed=call.window is not None, softcap=call.softcap is not None, dropout=call.dropout > 0
    )
    return _kernel_for(q_NTH.device, dtype, need)


def attend(backend: Backend, q_NTH: Tensor, k_KTH: Tensor, v_KTH: Tensor, documents: Tensor, call: Call) -> Tensor:
    """Causal attention within each document: `q` (1, N, T, H), `k` and `v` (1, K, T, H) to (1, T, N, H).

    `documents` is the document map, int32 (1, 1, 1, D+1); the kernel's copy of it is made once for all layers. The
    output has the backend's dtype, which is that of `q` except under autocast.
    """
    q, k, v = (x[0].transpose(0, 1).to(backend.dtype) for x in (q_NTH, k_KTH, v_KTH))
    return backend.run(q, k, v, _offsets(documents, q.device), call)[None]


# Where documents lie, on the device

_ON_DEVICE: Any = WeakTensorKeyDictionary()  # of a document map, while it lives


def _offsets(documents: Tensor, device: torch.device) -> Offsets:
    copies: dict[torch.device, Offsets] = _ON_DEVICE.setdefault(documents, {})
    if device not in copies:
        flat = documents.view(-1)
        # Not waited for: the copy is ordered before the kernels that read it.
        copies[device] = Offsets(cu=flat.to(device, non_blocking=True), longest=int(flat.diff().max()))
    return copies[device]


# Which kernel


@cache
def _kernel_for(device: torch.device, dtype: torch.dtype, need: _Need) -> Backend | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0) or torch.version.hip is not None or not _fits_backward(capability, need):
        return None
    if need.dropout or need.softcap or need.head % 8:
        name, run = FLASH_2, _flash2()
    else:
        name, run = PYTORCH, _pytorch()
    if run is None:
        return None
    backend = Backend(name=name, run=run, dtype=dtype)
    problem = _problem(backend, device, need)
    if problem:
        logger.warning("%s is not used for attention: %s", name, problem)
        return None
    logger.info("Attention over documents: %s", name)
    return backend


def _fits_backward(capability: tuple[int, int], need: _Need) -> bool:
    """The backward of large heads needs the shared memory of a data-centre GPU (8.0, 9.0, 10.x); the others take them
    at full size and without dropout only, as PyTorch's own selection of kernels has it."""
    small = capability[0] == 12 or (capability[0] == 8 and capability[1] != 0)
    return not small or need.head <= 192 or (need.head > 224 and not need.dropout)


def _pytorch() -> Run | None:
    function = _imported("torch.nn.attention.varlen", "varlen_attn", {"scale", "window_size", "enable_gqa"})
    if function is None or not torch.backends.cuda.is_flash_attention_available():
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Offsets, call: Call) -> Tensor:
        cu, longest, window = offsets.cu, offsets.longest, _window(call, offsets)
        gqa = q.shape[1] != k.shape[1]
        output: Tensor = function(
            q, k, v, cu, cu, longest, longest, scale=call.scale, window_size=window, enable_gqa=gqa
        )
        return output

    return run


def _flash2() -> Run | None:
    function = _imported("flash_attn", "flash_attn_varlen_func", {"window_size", "softcap", "deterministic"})
    if function is None:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Offsets, call: Call) -> Tensor:
        output: Tensor = function(
            q,
            k,
            v,
            cu_seqlens_q=offsets.cu,
            cu_seqlens_k=offsets.cu,
            max_seqlen_q=offsets.longest,
            max_seqlen_k=offsets.longest,
            dropout_p=call.dropout,
            softmax_scale=call.scale,
            causal=True,
            window_size=_window(call, offsets),
            softcap=call.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return output

    return run


def _window(call: Call, offsets: Offsets) -> tuple[int, int]:
    """How many keys before and behind its own a query sees; -1 is no limit."""
    return (-1, 0) if call.window is None or call.window >= offsets.longest else (call.window - 1, 0)


def _imported(module: str, name: str, parameters: set[str]) -> Callable[..., Any] | None:
    """The function, if it exists and takes `parameters`: older versions lack some, and FlashAttention 4 is a package
    of FlashAttention 2's name without the function."""
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError) as error:  # built for another version of torch
        logger.warning("%s is installed and can't be imported: %s", module, error)
        return None
    if function is None or not parameters <= inspect.signature(function).parameters.keys():
        return None
    return function


# Whether a kernel is right


def _problem(backend: Backend, device: torch.device, need: _Need) -> str:
    """What is wrong with the kernel's outputs and gradients on two short documents; nothing when they are right."""
    call = Call(
        scale=4 * need.head**-0.5,  # for scores that tell keys apart, and that the softcap bends
        window=TRIED_WINDOW if need.windowed else None,
        softcap=TRIED_SOFTCAP if need.softcap else None,
    )
    documents = torch.tensor([0, *TRIED], dtype=torch.int32).cumsum(0, dtype=torch.int32).view(1, 1, 1, -1)
    tokens = sum(TRIED)
    # Not random numbers: those of the run must not depend on what is installed.
    q, k, v = (
        torch.sin(torch.arange(heads * tokens * need.head, device=device) * step).view(1, heads, tokens, need.head)
        for heads, step in ((2, 0.37), (1, 0.73), (1, 1.31))
    )
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        inputs = tuple(x.to(backend.dtype).requires_grad_() for x in (q, k, v))
        exact = tuple(x.detach().float().requires_grad_() for x in inputs)
        expected = plain(exact[0], exact[1], exact[2], TRIED, call)
        try:
            output = attend(backend, inputs[0], inputs[1], inputs[2], documents, call)
            pairs = list(zip(_with_gradients(output, inputs), _with_gradients(expected, exact), strict=True))
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return f"it failed on a small example ({error})"
    errors = [float((mine.float() - right).abs().max() / right.abs().max()) for mine, right in pairs]
    if all(error <= TOLERANCE for error in errors):
        return ""
    percent = ", ".join(f"{error:.0%}" for error in errors)
    return f"on a small example its outputs and gradients differ from plain attention's by {percent}"


def _with_gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    rising = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, rising.to(output.dtype))]


def plain(q_NTH: Tensor, k_KTH: Tensor, v_KTH: Tensor, lengths: Sequence[int], call: Call) -> Tensor:
    """What a kernel computes, dropout aside, in the plainest way: `q` (1, N, T, H), `k` and `v` (1, K, T, H) to
    (1, T, N, H)."""
    heads, tokens = q_NTH.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_KTH, v_KTH))
    scores = q_NTH @ k.transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    seen = torch.zeros(tokens, tokens, dtype=torch.bool, device=scores.device)
    stops = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for start, stop in pairwise(stops):
        seen[start:stop, start:stop] = True
    seen = seen.tril().triu(1 - (call.window or tokens))
    return (scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ v).transpose(1, 2)
