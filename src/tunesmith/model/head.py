"""From a batch to the loss on supervised positions, in one call of the model.

`teach` gives a causal language model's `forward` one more argument, `supervise`. With it, the model runs its decoder,
picks the hidden states of the supervised positions, and returns their loss: no logits of the sequence are made. Going
through `forward` keeps what wraps it working: PEFT, DistributedDataParallel, FSDP, autocast, gradient checkpointing.

Shapes: B rows, T tokens a row, S supervised positions, H hidden size, V vocabulary.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import TunesmithError
from tunesmith.model.attention import PAD_INSTEAD, document_map
from tunesmith.model.quantize import bits_of
from tunesmith.objectives.supervised import LossOptions, Supervised, head_logits, linear_cross_entropy
from tunesmith.types import IGNORE_INDEX

logger = logging.getLogger(__name__)
CHECKED_TOKENS = 4
"""Size of each of the two documents that the first batch is checked with."""

OURS = ("labels", "lengths", "parents", "loss_options", "return_outputs")
"""What a batch holds beside the arguments of the model's own forward."""

# How a model's config says what its forward does to the head's product. A model that does something else is found by
# `_check`, and its own logits are used.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Where the loss is taken: indices (S,) into the B*T flattened positions, their next tokens (S,), weights (S,)."""

    positions: Tensor
    tokens: Tensor
    weights: Tensor | None = None


def next_token_targets(labels_BT: Tensor, weights_BT: Tensor | None = None, places_T: Tensor | None = None) -> Targets:
    """Shift labels by one: position t predicts the label of t + 1. The only place where labels are shifted.

    `places` says where in the row the token of each label is, when documents share prefixes; else that is its own.

    The first label of a row is never a target. In a flat row the same must hold for the first label of each document;
    the collator has set it to IGNORE_INDEX.
    """
    shifted = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
    positions = (shifted != IGNORE_INDEX).nonzero()[:, 0]
    weights = None
    if weights_BT is not None:
        weights = nn.functional.pad(weights_BT[:, 1:], (0, 1)).reshape(-1)[positions]
    places = positions if places_T is None else places_T[positions]
    return Targets(positions=places, tokens=shifted[positions], weights=weights)


@dataclass(kw_only=True, slots=True)
class _Path:
    """What the first batches showed. `fused`: whether the loss may be taken from the hidden states (None: not tried);
    `documents`: whether documents side by side were tried, and are kept apart."""

    fused: bool | None = None
    documents: bool = False


def teach(model: PreTrainedModel) -> None:
    """Let `model(..., supervise=Targets, loss_options=LossOptions)` return a `Supervised`; other calls are unchanged.
    With `return_outputs=True` it holds the model's outputs, too.

    `lengths`, the token counts of the documents in a flat row, goes with `supervise` and restricts attention to them;
    `parents` says which of them continue another (`document_map`).
    The first such call checks on a few tokens what the fast paths take for granted, and raises TunesmithError for a
    model whose tokens see later ones, or tokens of other documents.
    """
    original = model.forward
    plain = getattr(original, "__func__", None) or (lambda _self, *args, **kwargs: original(*args, **kwargs))
    path = _Path()

    @functools.wraps(plain)
    def forward(self: PreTrainedModel, *args: Any, supervise: Targets | None = None, **kwargs: Any) -> Any:
        if supervise is None:
            return plain(self, *args, **kwargs)
        assert not args  # a batch is given by name
        return _supervised(self, functools.partial(plain, self), path, supervise, kwargs)

    # A method, not a function: a deep copy of the model, and accelerate's wrapper, bind it to themselves.
    model.forward = MethodType(forward, model)


def _supervised(
    model: PreTrainedModel, original: Callable[..., Any], path: _Path, supervise: Targets, batch: Mapping[str, Any]
) -> Supervised:
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if value is not None and name not in OURS}
    options: LossOptions = batch.get("loss_options") or LossOptions()
    lengths = batch.get("lengths")
    if lengths is not None:
        inputs["attention_mask"] = document_map(lengths, batch.get("parents"))
    inputs["use_cache"] = False
    head = plain_head(model)
    if path.fused is None or (lengths is not None and not path.documents):
        _check(model, original, path, head, inputs["input_ids"], documents=lengths is not None)
    wanted = bool(batch.get("return_outputs"))
    if head is None or not path.fused or wanted:
        outputs = original(**inputs)
        return _from_outputs(outputs, supervise, options, wanted=wanted)
    hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)
    positions = supervise.positions.to(hidden.device)
    picked = hidden[positions].to(head.weight.device)
    tokens, weights = (None if x is None else x.to(picked.device) for x in (supervise.tokens, supervise.weights))
    assert tokens is not None
    return linear_cross_entropy(picked, head.weight, head.bias, tokens, weights, head_options(model, options))


def behind_virtual_tokens(
    model: nn.Module, batch: Mapping[str, Any], targets: Targets, options: LossOptions, *, return_outputs: bool = False
) -> Supervised:
    """The loss of padded rows (B, T) for a model that puts virtual tokens in front of each: `peft` makes embeddings of
    both, so the loss is taken from the logits of the last T positions, which are those of the outputs, too."""
    outputs = model(**batch, use_cache=False)
    outputs.logits = outputs.logits[:, -batch["input_ids"].shape[1] :]
    return _from_outputs(outputs, targets, options, wanted=return_outputs)


def _from_outputs(outputs: Any, targets: Targets, options: LossOptions, *, wanted: bool) -> Supervised:
    logits = outputs.logits.flatten(0, 1)[targets.positions.to(outputs.logits.device)]
    result = cross_entropy(logits, targets, options)
    return replace(result, outputs=outputs) if wanted else result


def _check(
    model: PreTrainedModel,
    original: Callable[..., Any],
    path: _Path,
    head: nn.Linear | None,
    input_ids: Tensor,
    *,
    documents: bool,
) -> None:
    """Try on two short documents, the first tokens of a batch, what the fast paths take for granted, and note it.

    Raises TunesmithError when tokens see later ones, or when documents in one row see each other.
    """
    size = min(CHECKED_TOKENS, input_ids.shape[1] // 2)
    if size == 0:
        return
    row = input_ids[:1, : 2 * size]
    with in_evaluation(model), torch.no_grad():
        apart = original(input_ids=row.view(2, size), use_cache=False).logits
        whole = original(input_ids=row, use_cache=False).logits
        _refuse_nan(model, apart)
        exact = _is_exact(model, apart)
        if not _close(whole[0, :size], apart[0], exact):
            raise TunesmithError(
                f"a token of {type(model).__name__} sees the tokens behind it, so it can't learn to predict them; "
                "take a causal language model (an encoder such as BERT needs is_decoder=True in its config)"
            )
        path.fused = head is not None and _is_product(model, head, row.view(2, size), apart, exact)
        if documents:
            _check_documents(model, original, row, apart, exact)
            path.documents = True
    if not path.fused:
        logger.info("%s: the loss is taken from its own logits, which needs more memory", type(model).__name__)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation, and afterwards each in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _refuse_nan(model: PreTrainedModel, logits: Tensor) -> None:
    if logits.isnan().any():
        raise TunesmithError(
            f"{type(model).__name__} gives NaN for its first tokens: its weights are damaged, or its numbers too large "
            "for this precision; set precision: fp32, or bf16 in place of fp16"
        )


def _is_product(model: PreTrainedModel, head: nn.Linear, input_ids: Tensor, logits: Tensor, exact: bool) -> bool:
    """Whether the model's `logits` are what `linear_cross_entropy` would make of the output of its decoder."""
    if model.base_model is model:
        return False
    hidden = getattr(model.base_model(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.in_features:
        return False
    found = head_logits(hidden.to(head.weight.device), head.weight, head.bias, head_options(model))
    return found.shape == logits.shape and _close(found.to(logits.device), logits, exact)


def _check_documents(
    model: PreTrainedModel, original: Callable[..., Any], row: Tensor, apart: Tensor, exact: bool
) -> None:
    size = row.shape[1] // 2
    positions = torch.arange(size, device=row.device).repeat(2)[None]
    found = "they don't give the outputs that they give apart"
    try:
        mask = document_map([size, size])
        together = original(input_ids=row, attention_mask=mask, position_ids=positions, use_cache=False).logits
        if _close(together[0, size:], apart[1], exact):
            return
    except RuntimeError as error:
        found = str(error)
    raise TunesmithError(f"{type(model).__name__} can't take documents side by side ({found}); {PAD_INSTEAD}")


def _is_exact(model: PreTrainedModel, logits: Tensor) -> bool:
    """Whether logits are equal to rounding in fp32. Products in 8 bits round by what else is in the batch."""
    whole = logits.dtype == torch.float32 and not torch.is_autocast_enabled(logits.device.type)
    return whole and bits_of(model) != "8bit"


def _close(found: Tensor, expected: Tensor, exact: bool) -> bool:
    """Whether logits (..., V) agree at most positions: a router that is in doubt may send a few tokens elsewhere."""
    found, expected = found.float(), expected.float()
    error = (found - expected).abs().amax(dim=-1)
    return bool(error.median() <= (1e-3 if exact else 0.1) * expected.abs().amax())


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer when it is an ordinary linear layer, else None: an adapter or a quantized layer on the head
    computes more than a product with its weight, and takes the path through the model's own logits."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    return head if type(head) is nn.Linear else None


def head_options(model: PreTrainedModel, options: LossOptions | None = None) -> LossOptions:
    """`options` with the logit scaling and soft-capping that the model's own forward applies."""
    options, config = options or LossOptions(), model.config.get_text_config()
    scale, softcap = options.scale, options.softcap
    for name in FACTORS:
        scale *= _number(config, name) or 1.0
    for name in DIVISORS:
        scale /= _number(config, name) or 1.0
    for name in SOFTCAPS:
        softcap = _number(config, name) or softcap
    return LossOptions(scale=scale, softcap=softcap, smoothing=options.smoothing, dft=options.dft)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int | float) else None


def cross_entropy(logits_SV: Tensor, targets: Targets, options: LossOptions) -> Supervised:
    """The loss of `linear_cross_entropy` from finished logits, by autograd: for heads that are not a plain product."""
    logits, tokens = logits_SV.float(), targets.tokens.to(logits_SV.device)
    log_z = torch.logsumexp(logits, dim=-1)
    nll = log_z - logits.gather(-1, tokens[:, None])[:, 0]
    losses = nll
    if options.smoothing:
        losses = (1 - options.smoothing) * nll + options.smoothing * (log_z - logits.mean(dim=-1))
    if options.dft:
        losses = losses * (-nll).detach().exp()
    if targets.weights is not None:
        losses = losses * targets.weights.to(losses.device)
    with torch.no_grad():
        probabilities = torch.softmax(logits, dim=-1)
        entropy = log_z - (probabilities * logits.nan_to_num(neginf=0.0)).sum(dim=-1)
        correct = logits.argmax(dim=-1) == tokens
    return Supervised(loss=losses.sum(), nll=nll.detach(), entropy=entropy, correct=correct)
