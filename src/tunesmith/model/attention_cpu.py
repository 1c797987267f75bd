"""Causal attention within one document in blocks of products, for CPUs whose fp32 products are faster in oneDNN.

PyTorch's attention on a CPU is a flash kernel whose products go through the BLAS in torch, whatever the number format;
its backward shares out whole heads, nine of them on two cores. Here each block is a few products of oneDNN, and what
lies between them happens in their epilogues where they have one. Scores are fp32 always.

Shapes: N query heads, K key/value heads, G = N / K, Q queries, M keys (the queries' own are the last Q), H head size.
Rows (K, Q*G, H) are the queries of a key head: row i*G + g is query i of the group's head g.
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

SHORTEST = 192
"""Tokens of a document from which on blocks are tried; below, the calls take longer than what they save."""
BLOCK = 256
LOG2E = math.log2(math.e)


def pays(q_NQH: Tensor, k_KMH: Tensor, v_KMH: Tensor) -> bool:
    """Whether `attend` can take queries, keys and values like these, and is the faster way, its backward included."""
    if q_NQH.device.type != "cpu" or q_NQH.dtype == torch.float64 or v_KMH.shape[3] != q_NQH.shape[3]:
        return False
    if isinstance(q_NQH, FakeTensor):  # to count memory, which is about that of PyTorch's, its one call is faster
        return False
    queries, keys = q_NQH.shape[2], k_KMH.shape[2]
    if queries * keys < SHORTEST**2 or not has_onednn() or torch.compiler.is_compiling():
        return False
    heads, size = q_NQH.shape[1], q_NQH.shape[3]
    kind = ("attention", queries.bit_length(), keys.bit_length(), heads, k_KMH.shape[1], size, q_NQH.requires_grad)
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
    out: Tensor = _Blockwise.apply(q_NQH, k_KMH, v_KMH, scale)
    return out


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        saved = _rows(q, k.shape[1]), k[0].contiguous(), v[0].contiguous()
        rows, keys, values = (x.float() for x in saved)
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
        out = out_rows.unflatten(1, (-1, groups)).permute(1, 0, 2, 3).flatten(1, 2).to(q.dtype)
        ctx.save_for_backward(*saved, out, log_z)
        ctx.scale = scale
        return out.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        *saved, out, log_z = ctx.saved_tensors
        rows, keys, values = (x.float() for x in saved)
        groups = rows.shape[1] // len(out)
        d_rows = _rows(grad, len(keys)).float()
        # FlashAttention 2 (Dao 2023, arXiv:2307.08691), section 3.1: dS = P * (dP - D), D the row sums of dO * O.
        d = (grad[0].transpose(0, 1).float() * out).sum(dim=-1).unflatten(1, (-1, groups))
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
        gradients = (d_q, d_k.mul_(ctx.scale), d_v)
        return *(x[None].to(like.dtype) for x, like in zip(gradients, saved, strict=True)), None


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
