"""Causal attention within one document by products of matrices, for CPUs where that is faster than PyTorch's kernel.

PyTorch's attention on a CPU is a flash kernel whose products go through the BLAS in torch. Its backward shares out
whole heads, nine of them on two cores, and in bfloat16 it takes several times as long as in fp32.

In fp32 each block is a few products of oneDNN, and what lies between them happens in their epilogues where they have
one. In bfloat16 the forward is PyTorch's, and the backward is batches of bfloat16 products.

Shapes: N query heads, K key/value heads, G = N / K, Q queries, M keys (the queries' own are the last Q), H head size.
Rows (K, Q*G, H) are the queries of a key head: in fp32, row i*G + g is query i of the group's head g.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from tunesmith.model import ways
from tunesmith.model.linear import has_onednn, onednn, onednn_times

SHORTEST = {torch.float32: 192, torch.bfloat16: 32}
"""Tokens of a document from which on it is tried; below, the calls take longer than what they save."""
BLOCK = 256
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
LOG2E = math.log2(math.e)


def pays(q_NQH: Tensor, k_KMH: Tensor, v_KMH: Tensor) -> bool:
    """Whether `attend` can take queries, keys and values like these, and is the faster way, its backward included."""
    if q_NQH.device.type != "cpu" or q_NQH.dtype not in SHORTEST or v_KMH.shape[3] != q_NQH.shape[3]:
        return False
    if len({x.dtype for x in (q_NQH, k_KMH, v_KMH)}) > 1:
        return False
    if isinstance(q_NQH, FakeTensor):  # to count memory, which is about that of PyTorch's, its one call is faster
        return False
    half = q_NQH.dtype == torch.bfloat16
    if half and not (q_NQH.requires_grad and hasattr(torch.ops.aten, FLASH)):  # the forward is the same
        return False
    queries, keys = q_NQH.shape[2], k_KMH.shape[2]
    if queries * keys < SHORTEST[q_NQH.dtype] ** 2 or not has_onednn() or torch.compiler.is_compiling():
        return False
    heads, size = q_NQH.shape[1], q_NQH.shape[3]
    name = "attention in bfloat16" if half else "attention"
    length = math.isqrt(queries * keys).bit_length()
    kind = (name, length, queries == keys, heads, k_KMH.shape[1], size, q_NQH.requires_grad)
    inputs, scale = (q_NQH, k_KMH, v_KMH), size**-0.5
    return ways.is_faster(kind, ways.attempt(_plain, *inputs, scale), ways.attempt(attend, *inputs, scale))


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's attention."""
    before = k.shape[2] - q.shape[2]
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(before) if before else None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def attend(q_NQH: Tensor, k_KMH: Tensor, v_KMH: Tensor, scale: float) -> Tensor:
    """`q` (1, N, Q, H), `k` and `v` (1, K, M, H) to (1, N, Q, H): query i sees the keys up to M - Q + i."""
    way = _InBfloat16 if q_NQH.dtype == torch.bfloat16 else _Blockwise
    out: Tensor = way.apply(q_NQH, k_KMH, v_KMH, scale)
    return out


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        saved = rows, keys, values = _rows(q, k.shape[1]), k[0].contiguous(), v[0].contiguous()
        rows, groups = rows * scale, q.shape[1] // k.shape[1]
        out_rows, log_z = torch.empty_like(rows), rows.new_empty(rows.shape[:2])
        before = k.shape[2] - q.shape[2]
        for start, stop in _blocks(q.shape[2]):
            part, seen = slice(start * groups, stop * groups), before + stop
            hidden = _later(groups).t()[: (stop - start) * groups, : stop - start]
            for head in range(len(keys)):
                scores = onednn(rows[head, part], keys[head, :seen])
                scores[:, before + start :] += hidden
                p = torch.softmax(scores, dim=-1)
                out_rows[head, part] = onednn(p, values[head, :seen].t())
                # At its largest score, a row of p is 1 over the sum that it was divided by.
                log_z[head, part] = scores.amax(dim=-1) - p.amax(dim=-1).log()
        out = out_rows.unflatten(1, (-1, groups)).permute(1, 0, 2, 3).flatten(1, 2)
        ctx.save_for_backward(*saved, out, log_z)
        ctx.scale = scale
        return out.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, keys, values, out, log_z = ctx.saved_tensors
        groups = rows.shape[1] // len(out)
        d_rows = _rows(grad, len(keys))
        # FlashAttention 2 (Dao 2023, arXiv:2307.08691), section 3.1: dS = P * (dP - D), D the row sums of dO * O.
        d = (grad[0].transpose(0, 1) * out).sum(dim=-1).unflatten(1, (-1, groups))
        minus_d = d.transpose(0, 1).flatten(1).neg()
        # exp2, because exp goes through MKL's, which is slow on other makers' processors.
        minus_log_z, exponents = log_z * -LOG2E, rows * (ctx.scale * LOG2E)
        # Queries' gradients are (K, H, Q*G): oneDNN copies a left factor that is transposed, so it had better be small.
        d_q = torch.zeros_like(rows.transpose(1, 2), memory_format=torch.contiguous_format)
        d_k, d_v = torch.empty_like(keys), torch.empty_like(values)
        before = keys.shape[1] - len(out)
        blocks = [(start, stop, 0) for start, stop in _blocks(before)]
        blocks += [(before + start, before + stop, start) for start, stop in _blocks(len(out))]
        for start, stop, first in blocks:
            part, seen, size = slice(first * groups, None), slice(start, stop), stop - start
            for head in range(len(keys)):
                scores = onednn(keys[head, seen], exponents[head, part], minus_log_z[head, part])
                if start >= before:
                    scores[:, : size * groups] += _later(groups)[:size, : size * groups]
                p = torch.exp2(scores)  # (keys, rows), as all here
                d_scores = onednn_times(values[head, seen], d_rows[head, part], minus_d[head, part], p)
                d_v[head, seen] = onednn(p, d_rows[head, part].t())
                d_k[head, seen] = onednn(d_scores, rows[head, part].t())
                d_q[head, :, part] += onednn(keys[head, seen].t(), d_scores.t())
        d_q = d_q.mul_(ctx.scale).unflatten(2, (-1, groups)).permute(0, 3, 2, 1).flatten(0, 1)
        return d_q[None], d_k.mul_(ctx.scale)[None], d_v[None], None


class _InBfloat16(torch.autograd.Function):
    """PyTorch's forward, and a backward of products in bfloat16, whose sums are fp32 until they are written.

    A score less the logarithm of its row's sum is rounded as one number, which is small where it matters; a score alone
    would lose some percent. So the logarithm is two more columns of the query, and ones are two more of the key. The
    gradient of the scores takes D in the same way.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, log_z = _flash(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, log_z)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, log_z = ctx.saved_tensors
        heads, queries, size = q.shape[1:]
        before, groups = k.shape[2] - queries, heads // k.shape[1]
        # A power of two rounds nothing. The rest of the scale is for numbers that are small already.
        power = 2.0 ** round(math.log2(ctx.scale))
        rest = ctx.scale / power
        d = (grad.float() * out).sum(dim=-1)
        wide_q, wide_grad = _widened(q[0] * power, log_z[0] / -rest), _widened(grad[0], -d[0])
        wide_k, wide_v = (F.pad(x[0], (0, 2), value=1.0).transpose(1, 2) for x in (k, v))
        keys = k[0].contiguous()
        d_q = torch.empty_like(q[0], memory_format=torch.preserve_format)
        d_k, d_v = (torch.zeros(keys.shape, dtype=torch.float32) for _ in range(2))
        for start, stop in _blocks(queries):
            seen = slice(0, before + stop)
            # (K, G*Q, H + 2): row g*Q + i is query i of the group's head g
            rows, d_rows = (x[:, start:stop].unflatten(0, (-1, groups)).flatten(1, 2) for x in (wide_q, wide_grad))
            scores = torch.bmm(rows, wide_k[:, :, seen])
            p = (scores if rest == 1 else scores.mul_(rest)).exp_()
            p.unflatten(1, (groups, -1)).tril_(before + start)
            d_scores = torch.bmm(d_rows, wide_v[:, :, seen]).mul_(p)
            d_v[:, seen] += torch.bmm(p.transpose(1, 2), d_rows[..., :size])
            d_k[:, seen] += torch.bmm(d_scores.transpose(1, 2), rows[..., :size])
            d_part = torch.bmm(d_scores, keys[:, seen]).mul_(ctx.scale)
            d_q[:, start:stop] = d_part.unflatten(1, (groups, -1)).flatten(0, 1)
        d_k *= rest
        return d_q[None], d_k.to(k.dtype)[None], d_v.to(v.dtype)[None], None


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's attention: its output, and the logarithms of the sums of its rows (1, N, Q)."""
    kernel = getattr(torch.ops.aten, FLASH)
    queries, before = q.shape[2], k.shape[2] - q.shape[2]
    if not before:
        whole: tuple[Tensor, Tensor] = kernel(q, k, v, 0.0, True, scale=scale)
        return whole
    parts = []
    for start, stop in _blocks(queries):  # the kernel skips no key that a mask hides
        seen = slice(0, before + stop)
        hidden = q.new_full((stop - start, before + stop), -math.inf).triu(before + start + 1)
        part = q[:, :, start:stop], k[:, :, seen], v[:, :, seen]
        parts.append(kernel(*part, 0.0, False, attn_mask=hidden, scale=scale))
    out, log_z = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out, log_z


def _widened(x: Tensor, column: Tensor) -> Tensor:
    """`x` (N, Q, H) in bfloat16 with an fp32 `column` (N, Q) behind it, as two numbers whose sum it is to 16 bits."""
    high = column.to(x.dtype)
    low = (column - high).to(x.dtype)
    return torch.cat([x, high[..., None], low[..., None]], dim=-1)


def _rows(x_NQH: Tensor, heads: int) -> Tensor:
    """(1, N, Q, H) to rows (K, Q*G, H)."""
    return x_NQH[0].unflatten(0, (heads, -1)).transpose(1, 2).flatten(1, 2)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    """Starts and stops of parts of nearly equal size, at most BLOCK each."""
    step = math.ceil(size / max(1, math.ceil(size / BLOCK)))
    for start in range(0, size, step or 1):
        yield start, min(start + step, size)


@cache
def _later(groups: int) -> Tensor:
    """(BLOCK, BLOCK*G): minus infinity where a key comes after the query of the row, else 0."""
    later = torch.full((BLOCK, BLOCK), -math.inf).tril(-1)
    return later.repeat_interleave(groups, dim=1)
