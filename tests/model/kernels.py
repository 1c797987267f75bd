"""Stand-ins for attention kernels, with the signatures of the packages.

They compute the right result on the CPU, so that values and gradients go the whole way.
"""

import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def by_document(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float, left: int, softcap: float) -> Tensor:
    """(T, N, H) like a kernel, by PyTorch's attention of one document after the other."""
    outputs = []
    for start, stop in pairwise(cu.tolist()):
        groups = q.shape[1] // k.shape[1]
        mine, keys, values = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        keys, values = (x.repeat_interleave(groups, dim=0) for x in (keys, values))
        seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        seen = seen if left < 0 else seen.triu(-left)
        if softcap:
            scores = torch.tanh(mine @ keys.mT * scale / softcap) * softcap
            output = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values
        else:
            output = F.scaled_dot_product_attention(mine, keys, values, attn_mask=seen, scale=scale)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


class Kernels:
    """Puts stand-ins into `sys.modules`; `calls` has the arguments of each call, `named` the package's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.calls: list[dict[str, Any]] = []
        self.compute: Callable[..., Tensor] = by_document

    def add(self, module: str, name: str, function: Any) -> None:
        package = ModuleType(module)
        setattr(package, name, function)
        self.monkeypatch.setitem(sys.modules, module, package)

    def flash2(self) -> None:
        def flash_attn_varlen_func(
            q: Any,
            k: Any,
            v: Any,
            cu_seqlens_q: Any,
            cu_seqlens_k: Any,
            max_seqlen_q: int,
            max_seqlen_k: int,
            dropout_p: float = 0.0,
            softmax_scale: float | None = None,
            causal: bool = False,
            window_size: tuple[int, int] = (-1, -1),
            softcap: float = 0.0,
            alibi_slopes: Any = None,
            deterministic: bool = False,
            return_attn_probs: bool = False,
            block_table: Any = None,
        ) -> Any:
            self.calls.append(locals() | {"package": "flash_attn"})
            return self.compute(q, k, v, cu_seqlens_q, softmax_scale, window_size[0], softcap)

        self.add("flash_attn", "flash_attn_varlen_func", flash_attn_varlen_func)

    def torch(self) -> None:
        def varlen_attn(
            query: Any,
            key: Any,
            value: Any,
            cu_seq_q: Any,
            cu_seq_k: Any,
            max_q: int,
            max_k: int,
            *,
            return_aux: Any = None,
            scale: float | None = None,
            window_size: tuple[int, int] = (-1, -1),
            enable_gqa: bool = False,
        ) -> Any:
            self.calls.append(locals() | {"package": "torch"})
            assert enable_gqa or query.shape[1] == key.shape[1]
            return self.compute(query, key, value, cu_seq_q, scale, window_size[0], 0.0)

        self.add("torch.nn.attention.varlen", "varlen_attn", varlen_attn)
        self.monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
