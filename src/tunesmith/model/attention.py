"""Attention over documents that lie side by side in one row, without padding and without FlashAttention.

A flat batch is one row of T tokens that holds D documents one after another. `transformers` hands a 4-D attention mask
through to every layer unchanged; in its place we send the *document map*, the D+1 token offsets at which documents
start and end, in a tensor of shape (1, 1, 1, D+1). Each layer then attends within documents. Because the map travels as
an argument of the layers, gradient checkpointing sees the same documents when it computes a layer again.

On CUDA a kernel that takes all documents at once is used where there is one (`attention_cuda`); everywhere else, each
document goes through PyTorch's own attention, or on a CPU through blocks of products where they pay (`attention_cpu`).

Shapes: B batch, T tokens, D documents, N query heads, K key/value heads, H head size.
"""

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.errors import TunesmithError
from tunesmith.model import attention_cpu, attention_cuda
from tunesmith.model.attention_cuda import Call

PREFIX = "tunesmith_"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# What a layer may pass to its attention. An argument outside these sets is an error by name: ignoring it could train
# another model than the one that was loaded.
HANDLED = {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal"}
HARMLESS = {
    *("position_ids", "position_embeddings", "cache_position", "use_cache", "deterministic"),
    *("output_attentions", "output_router_logits"),
}
BLOCK = 256
"""Queries of one call on a CPU where a mask says what they see: a kernel skips no key that a mask hides."""
PAD_INSTEAD = "set padding_free: false (and packing: false) to train this model"


def document_map(lengths: Sequence[int], parents: Sequence[int] | None = None) -> Tensor:
    """Token offsets of documents of `lengths`: int32 of shape (1, 1, 1, D+1), kept on the CPU.

    It stays there on every device: its numbers choose slices, and reading them off an accelerator would wait for it.
    With `parents`, for each document the one before it that it continues, or -1 (`data.prefix`), the shape is
    (1, 1, 2, D+1), and the second row begins with them.
    """
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = [offsets] if parents is None else [offsets, torch.tensor([*parents, -1], dtype=torch.int32)]
    return torch.stack(rows)[None, None]


def is_document_map(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[:2] == (1, 1)


def supports_documents(model: PreTrainedModel) -> str:
    """Why `model` can't attend over documents in one row, or an empty string when it can.

    Such a model is trained on padded batches instead. Layers that carry a state along the row (Mamba, linear
    attention) would leak it from one document to the next, and chunked attention counts from the start of the row.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} carries a state from token to token"
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(model).__name__} is an encoder-decoder model"
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [])
    unknown = sorted(kinds - KNOWN_LAYERS - {"attention"})
    return f"its layers of type {', '.join(unknown)} do not keep documents apart" if unknown else ""


def use_documents(model: PreTrainedModel) -> None:
    """Switch `model` to document attention. Other masks go to the implementation it had, so generation still works."""
    base = model.config._attn_implementation
    if not base.startswith(PREFIX):
        register(base)
        model.set_attn_implementation(PREFIX + base)


def register(base: str) -> None:
    """Register document attention over `base` ("sdpa", "eager", ...) with `transformers`' two interfaces."""

    # The names are those that transformers gives the arguments: some models pass them by name.
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if attention_mask is None or not is_document_map(attention_mask):
            # "eager" is not in the registry: each modeling file has a function of its own.
            own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(base, own)
            return attend(module, query, key, value, attention_mask, **kwargs)
        return attend_documents(module, query, key, value, attention_mask, **kwargs), None

    AttentionInterface.register(PREFIX + base, forward)
    AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def attend_documents(
    module: nn.Module, q_NTH: Tensor, k_KTH: Tensor, v_KTH: Tensor, documents: Tensor, **kwargs: Any
) -> Tensor:
    """Causal attention within each document.

    `q` is (1, N, T, H), `k` and `v` are (1, K, T, H) with N a multiple of K. Returns (1, T, N, H). Layers with a
    window, a softcap or sinks are computed as their own `eager` implementation does.
    Raises TunesmithError for a layer that attends in another way: with an argument that is not known here, not
    causally, or within a window that it leaves to the mask.
    """
    offsets, *more = documents[0, 0].tolist()
    lengths = [stop - start for start, stop in pairwise(offsets)]
    runs = _runs(more[0][:-1] if more else [-1] * len(lengths))
    longest = max(sum(lengths[segment] for segment in path) for path, _ in runs)
    _refuse_other_attention(module, longest, kwargs)
    scaling = kwargs.get("scaling")
    call = Call(
        scale=q_NTH.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=kwargs.get("dropout", 0.0) if module.training else 0.0,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    kernel = attention_cuda.pick(q_NTH, v_KTH, call)
    if kernel is not None and not more:
        return attention_cuda.attend(kernel, q_NTH, k_KTH, v_KTH, documents, call)
    if q_NTH.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # As PyTorch's attention does: rotary embeddings may have made queries and keys fp32 again.
        q_NTH, k_KTH, v_KTH = (x.to(torch.get_autocast_dtype("cpu")) for x in (q_NTH, k_KTH, v_KTH))
    attend = _attend_sdpa if call.softcap is None and call.sinks is None else _attend_eager
    # One `split` has one cat as its backward; slices each allocate a gradient of the whole row.
    q = q_NTH.split([sum(lengths[segment] for segment in path[-own:]) for path, own in runs], dim=2)
    k, v = (_seen_by(runs, x.split(lengths, dim=2)) for x in (k_KTH, v_KTH))
    outputs = [attend(*heads, call).transpose(1, 2) for heads in zip(q, k, v, strict=True)]
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()


def _runs(parents: Sequence[int]) -> list[tuple[list[int], int]]:
    """Segments of a row as runs of those that each continue the one before them, in which all attention is causal.

    For each run the segments that its last one attends to, itself included, and how many of them, the last ones, are
    the run.

    segments [a][b][c][d], parents -1 0 1 0    runs  a b c: ([0, 1, 2], 3)  d: ([0, 3], 1)
    """
    paths: list[list[int]] = []
    runs: list[tuple[list[int], int]] = []
    for segment, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), segment])
        own = runs.pop()[1] + 1 if segment and parent == segment - 1 else 1
        runs.append((paths[-1], own))
    return runs


def _seen_by(runs: Sequence[tuple[list[int], int]], segments: Sequence[Tensor]) -> list[Tensor]:
    """The keys, or values, that each run attends to (1, K, M, H), of those of all segments."""
    return [
        torch.cat([segments[segment] for segment in path], dim=2) if len(path) > 1 else segments[path[0]]
        for path, _ in runs
    ]


def _refuse_other_attention(module: nn.Module, longest: int, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    for argument in kwargs.keys() - HANDLED - HARMLESS:
        if kwargs[argument] is not None and kwargs[argument] is not False:
            raise TunesmithError(f"{name} passes {argument!r}, which document attention can't apply; {PAD_INSTEAD}")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise TunesmithError(f"{name} is not causal: its tokens see later ones. Take a causal language model")
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    # A layer that does not name its window, where the model may still mask with one.
    masked = hasattr(sys.modules[type(module).__module__], "create_sliding_window_causal_mask")
    if window and masked and "sliding_window" not in kwargs and longest > window:
        raise TunesmithError(
            f"{name} leaves its window of {window} tokens to the mask, and a document has {longest}; "
            f"shorten max_length to {window}, or {PAD_INSTEAD}"
        )


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: which keys a query sees. The queries belong to the last keys; with a window, a query sees
    the last `window` keys up to its own."""
    before = keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
    return seen if window is None else seen.triu(before + 1 - window)


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    windowed = call.window is not None and keys > call.window
    if not call.dropout and not windowed and attention_cpu.pays(q, k, v):
        return attention_cpu.attend(q, k, v, call.scale)
    if q.device.type != "cpu" or queries <= BLOCK or (queries == keys and not windowed):
        return _sdpa(q, k, v, call)
    parts = q.split(BLOCK, dim=2)
    seen = [keys - queries + min((i + 1) * BLOCK, queries) for i in range(len(parts))]
    blocks = [_sdpa(part, k[:, :, :stop], v[:, :, :stop], call) for part, stop in zip(parts, seen, strict=True)]
    return torch.cat(blocks, dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    windowed = call.window is not None and keys > call.window
    mask = None if queries == keys and not windowed else _causal(queries, keys, call.window, q.device)
    # On a CPU the kernel shares key heads itself. On CUDA, asking for that can rule out all but the slowest kernel.
    shared = q.device.type == "cpu"
    if not shared:
        k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=call.dropout, is_causal=mask is None, scale=call.scale, enable_gqa=shared
    )


def _attend_eager(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Gemma 2's soft-capped scores and gpt-oss's sinks, which scaled_dot_product_attention has no argument for."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    scores = q @ _repeat(k, heads).transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    seen = _causal(queries, keys, call.window, q.device)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.view(1, -1, 1, 1).expand(1, heads, queries, 1)], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., :keys]
    return F.dropout(weights, call.dropout) @ _repeat(v, heads)
