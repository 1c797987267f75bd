"""From a batch to predictions at the positions that count, in one call of the model, without logits of the sequence.

`answer_objectives` gives a causal language model's `forward` two more arguments, `targets` and `objective`. With them,
the model runs its decoder, picks the hidden states of the target positions, and returns what the objective makes of
these `Predictions`: a loss, log-probabilities. Going through `forward` keeps what wraps it working: PEFT,
DistributedDataParallel, FSDP, autocast, gradient checkpointing.

Shapes: B rows, T tokens a row, S target positions, H hidden size, V vocabulary.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeAlias, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.data.batches import Targets
from tunesmith.errors import TunesmithError
from tunesmith.model.attention import PAD_INSTEAD, document_map
from tunesmith.model.linear import product, shapes_cost
from tunesmith.model.quantize import bits_of

logger = logging.getLogger(__name__)
BALANCING = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""What models' functions for the load-balancing loss take."""
SIZES, SHORTEST_STEP = 16, 8
"""Lengths that a row is filled up to, from a power of two to the next, and the tokens between two lengths at the
least. Less than a sixteenth of a row's tokens is added, or up to 7 to a short one."""
CHECKED_TOKENS = 4
"""Size of each of the two documents that the first batch is checked with."""

# How a model's config says what its forward does to the head's product. A model that does something else is found by
# `_check`, and its own logits are used.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitForm:
    """What a model does to the product of its head: logits = softcap * tanh(scale * product / softcap); without a
    `softcap`, scale * product."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """What a model predicts at S positions, not yet in numbers, and the tokens that follow there.

    `hidden` (S, H) with the head's `weight` (V, H) and `bias` (V,) or None, from which an objective makes logits a
    chunk at a time; or, where only the model itself can make logits, these: `hidden` (S, V) without a weight.
    `tokens` int64 (S,) in [0, V); `weights` float (S,), or None for ones.
    """

    hidden: Tensor
    tokens: Tensor
    weights: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    form: LogitForm = LogitForm()


Objective: TypeAlias = Callable[[Predictions], Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an objective made of the predictions, the model's own `outputs`, where they were wanted, and of a mixture of
    experts the load-balancing loss (scalar), where that is trained. Not a tuple, in which `accelerate` would turn all
    logits into float32, and without slots: DeepSpeed reads `vars()` of it."""

    outcome: Any
    outputs: Any = None
    router_loss: Tensor | None = None


def head_logits(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, form: LogitForm) -> Tensor:
    """fp32 logits (..., V) in new memory from hidden states (..., H), or from logits where there is no `weight`; scaled
    and soft-capped in place: not for autograd."""
    if weight is None:
        return hidden.to(torch.float32, copy=True)
    logits = product(hidden.to(weight.dtype), weight, bias).float()
    if form.scale != 1.0:
        logits *= form.scale
    if form.softcap is not None:
        logits.div_(form.softcap).tanh_().mul_(form.softcap)
    return logits


@dataclass(kw_only=True, slots=True)
class _Path:
    """What the first batches showed. `fused`: whether logits may be made from the hidden states (None: not tried);
    `documents`: whether documents side by side were tried, and are kept apart. `may_fill`: whether tokens may be added
    that nothing is learned of."""

    fused: bool | None = None
    documents: bool = False
    may_fill: bool = True


def answer_objectives(model: PreTrainedModel, *, routers: bool = False) -> None:
    """Let `model(..., targets=Targets, objective=Objective)` return an `Answer`, with `with_outputs=True` with the
    model's own outputs in it, logits of all positions among them. Other calls are unchanged.

    `lengths`, the token counts of the documents in a flat row, restricts attention to them; `parents` says which of
    them continue another (`document_map`). With `routers`, answers have the load-balancing loss of the batch's tokens,
    padding left out.
    The first such call checks on a few tokens what the fast paths take for granted, and raises TunesmithError for a
    model whose tokens see later ones, or tokens of other documents.
    """
    original = model.forward
    balance = Routers(model) if routers else None
    plain = getattr(original, "__func__", None) or (lambda _self, *args, **kwargs: original(*args, **kwargs))
    path, config = _Path(may_fill=not routers), model.config.get_text_config()  # a router balances all tokens

    @functools.wraps(plain)
    def forward(self: PreTrainedModel, *args: Any, objective: Objective | None = None, **kwargs: Any) -> Any:
        if objective is None:
            return plain(self, *args, **kwargs)
        assert not args  # a batch is given by name
        # Of a batch that is a row of documents, the model can't take its load-balancing loss itself.
        quiet = {"output_router_logits": False} if getattr(config, "output_router_logits", False) else {}
        answer = functools.partial(_predicted, self, functools.partial(plain, self, **quiet), path, objective, kwargs)
        return answer() if balance is None else balance.with_loss(self, answer, kwargs)

    # A method, not a function: a deep copy of the model, and accelerate's wrapper, bind it to themselves.
    model.forward = MethodType(forward, model)


class Routers:
    """The load-balancing loss of a mixture-of-experts `model`, by the function of its own modeling file: E times the
    sum over E experts of the share of tokens that were sent there times the mean probability of being sent there.

    Raises TunesmithError for a model that has no such loss.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self._function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        takes = [] if self._function is None else list(inspect.signature(self._function).parameters)
        if not hasattr(config, "output_router_logits") or takes != BALANCING:
            raise TunesmithError(
                f"router_aux_loss_coef: {type(model).__name__} has no load-balancing loss that can be trained here; "
                "leave it unset, and output_router_logits off"
            )
        experts = [getattr(config, name, None) for name in ("num_experts", "num_local_experts")]
        self._experts = getattr(model, "num_experts", None) or next(number for number in experts if number)
        self._top = getattr(model, "num_experts_per_tok", None) or config.num_experts_per_tok

    def with_loss(self, model: PreTrainedModel, answer: Callable[[], Answer], batch: Mapping[str, Any]) -> Answer:
        """What `answer` says, and the loss of the decoder's last call in it."""
        logits: list[Any] = []
        decoder = model.base_model

        def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"output_router_logits": True}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            logits[:] = [output.router_logits]

        hooks = (decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(note))
        try:
            answered = answer()
        finally:
            for hook in hooks:
                hook.remove()
        assert self._function is not None
        loss = self._function(logits[0], self._experts, self._top, batch.get("attention_mask"))
        return replace(answered, router_loss=loss)


def _predicted(
    model: PreTrainedModel, original: Callable[..., Any], path: _Path, objective: Objective, batch: Mapping[str, Any]
) -> Answer:
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if value is not None}
    targets: Targets = inputs.pop("targets")
    with_outputs = bool(inputs.pop("with_outputs", False))
    lengths, parents = inputs.pop("lengths", None), inputs.pop("parents", None)
    if path.fused is None or (lengths is not None and not path.documents):
        _check(model, original, path, inputs["input_ids"], documents=lengths is not None)
    head = None if not path.fused or with_outputs else plain_head(model)
    if lengths is not None:
        if head is not None and path.may_fill and shapes_cost(head.weight):
            inputs, lengths, parents = _filled(inputs, lengths, parents)
        inputs["attention_mask"] = document_map(lengths, parents)
    inputs["use_cache"] = False
    if head is None:
        outputs = original(**inputs)
        outcome = objective(from_logits(outputs.logits, targets))
        return Answer(outcome=outcome, outputs=outputs if with_outputs else None)
    return Answer(outcome=objective(from_hidden(model, inputs, targets)))


def _filled(
    inputs: dict[str, Any], lengths: Sequence[int], parents: Sequence[int] | None
) -> tuple[dict[str, Any], Sequence[int], Sequence[int] | None]:
    """A flat row with one more document behind the others, which makes its length one of few; no other sees it, and
    nothing is predicted in it. Its tokens are the first ones of the row, whose values are as usual."""
    tokens = inputs["input_ids"].shape[1]
    size = -tokens % max(SHORTEST_STEP, (1 << tokens.bit_length() - 1) // SIZES)
    if size == 0 or inputs.keys() != {"input_ids", "position_ids"}:
        return inputs, lengths, parents
    positions = torch.arange(size, device=inputs["position_ids"].device)[None]
    inputs = {
        "input_ids": torch.cat([inputs["input_ids"], inputs["input_ids"][:, :size]], dim=1),
        "position_ids": torch.cat([inputs["position_ids"], positions], dim=1),
    }
    return inputs, [*lengths, size], None if parents is None else [*parents, -1]


def from_hidden(model: PreTrainedModel, inputs: Mapping[str, Any], targets: Targets) -> Predictions:
    """The predictions of a `model` with a plain head: its decoder's hidden states at the target positions."""
    head = plain_head(model)
    assert head is not None
    hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)
    picked = hidden[targets.positions.to(hidden.device)].to(head.weight.device)
    weights = None if targets.weights is None else targets.weights.to(picked.device)
    return Predictions(
        hidden=picked,
        tokens=targets.tokens.to(picked.device),
        weights=weights,
        weight=head.weight,
        bias=head.bias,
        form=logit_form(model),
    )


def from_logits(logits_BTV: Tensor, targets: Targets) -> Predictions:
    """The predictions in the model's own logits."""
    logits = logits_BTV.flatten(0, 1)[targets.positions.to(logits_BTV.device)]
    weights = None if targets.weights is None else targets.weights.to(logits.device)
    return Predictions(hidden=logits, tokens=targets.tokens.to(logits.device), weights=weights)


def outputs_behind_virtual_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The outputs of a model that puts virtual tokens in front of each padded row (B, T), with the logits of the last T
    positions. `peft` makes embeddings of both, so only the model's own logits can be had."""
    # `peft` counts the positions of virtual tokens itself.
    outputs = model(**{name: value for name, value in inputs.items() if name != "position_ids"}, use_cache=False)
    outputs.logits = outputs.logits[:, -inputs["input_ids"].shape[1] :]
    return outputs


def _check(
    model: PreTrainedModel, original: Callable[..., Any], path: _Path, input_ids: Tensor, *, documents: bool
) -> None:
    """Try on two short documents, the first tokens of a batch, what the fast paths take for granted, and note it.

    Processes that share the weights of a model out try it together, so a batch of one token is tried, too.

    Raises TunesmithError when tokens see later ones, or when documents in one row see each other.
    """
    row = input_ids[:1]
    if row.shape[1] == 1:
        row = torch.cat([row, (row + 1) % cast(Any, model.get_input_embeddings()).weight.shape[0]], dim=1)
    size = min(CHECKED_TOKENS, row.shape[1] // 2)
    row = row[:, : 2 * size]
    with in_evaluation(model), torch.no_grad():
        apart = original(input_ids=row.view(2, size), use_cache=False).logits
        whole = original(input_ids=row, use_cache=False).logits
        if apart.isnan().any():
            raise TunesmithError(
                f"{type(model).__name__} gives NaN for its first tokens: its weights are damaged, or its numbers too "
                "large for this precision; set precision: fp32, or bf16 in place of fp16"
            )
        exact = _is_exact(model, apart)
        if not _close(whole[0, :size], apart[0], exact):
            raise TunesmithError(
                f"a token of {type(model).__name__} sees the tokens behind it, so it can't learn to predict them; "
                "take a causal language model (an encoder such as BERT needs is_decoder=True in its config)"
            )
        path.fused = _is_product(model, row.view(2, size), apart, exact)
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


def _is_product(model: PreTrainedModel, input_ids: Tensor, logits: Tensor, exact: bool) -> bool:
    """Whether the model's `logits` are what `head_logits` makes of the output of its decoder."""
    head = plain_head(model)
    if head is None or model.base_model is model:
        return False
    hidden = getattr(model.base_model(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.in_features:
        return False
    ours = head_logits(hidden.to(head.weight.device), head.weight, head.bias, logit_form(model))
    return ours.shape == logits.shape and _close(ours.to(logits.device), logits, exact)


def _check_documents(
    model: PreTrainedModel, original: Callable[..., Any], row: Tensor, apart: Tensor, exact: bool
) -> None:
    size = row.shape[1] // 2
    positions = torch.arange(size, device=row.device).repeat(2)[None]
    problem = "they don't give the outputs that they give apart"
    try:
        mask = document_map([size, size])
        together = original(input_ids=row, attention_mask=mask, position_ids=positions, use_cache=False).logits
        if _close(together[0, size:], apart[1], exact):
            return
    except RuntimeError as error:
        problem = str(error)
    raise TunesmithError(f"{type(model).__name__} can't take documents side by side ({problem}); {PAD_INSTEAD}")


def _is_exact(model: PreTrainedModel, logits: Tensor) -> bool:
    """Whether logits are equal to rounding in fp32. Products in 8 bits round by what else is in the batch."""
    whole = logits.dtype == torch.float32 and not torch.is_autocast_enabled(logits.device.type)
    return whole and bits_of(model) != "8bit"


def _close(logits: Tensor, expected: Tensor, exact: bool) -> bool:
    """Whether logits (..., V) agree at most positions: a router that is in doubt may send a few tokens elsewhere."""
    logits, expected = logits.float(), expected.float()
    error = (logits - expected).abs().amax(dim=-1)
    return bool(error.median() <= (1e-3 if exact else 0.1) * expected.abs().amax())


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer when it is an ordinary linear layer, else None: an adapter or a quantized layer on the head
    computes more than a product with its weight, and takes the path through the model's own logits."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    return head if type(head) is nn.Linear else None


def logit_form(model: PreTrainedModel) -> LogitForm:
    """The logit scaling and soft-capping that the model's own forward applies."""
    config = model.config.get_text_config()
    scale, softcap = 1.0, None
    for name in FACTORS:
        scale *= _number(config, name) or 1.0
    for name in DIVISORS:
        scale /= _number(config, name) or 1.0
    for name in SOFTCAPS:
        softcap = _number(config, name) or softcap
    return LogitForm(scale=scale, softcap=softcap)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int | float) else None
