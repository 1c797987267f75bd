"""Cross-entropy on supervised positions only, in chunks, without the logits of the sequence.

The logits of a chunk are made, turned into their gradient in place, and dropped: the gradient of the hidden states (and
of the head, where it is trained) is ready when the forward ends. The idea is that of fused linear cross-entropy (Liger
Kernel, Hsu et al. 2024, arXiv:2410.10989), here for every device.

Shapes: S supervised positions, H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.head import LogitForm, Predictions
from tunesmith.objectives.logprobs import Chunk, Gradients, Outcome, chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """`smoothing` mixes in the uniform distribution. `dft` weighs each token by its own probability (Dynamic
    Fine-Tuning, arXiv:2508.05629)."""

    smoothing: float = 0.0
    dft: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervised:
    """The loss over S supervised positions.

    `loss` is the weighted sum over positions, with its graph; the rest has no graph: `nll` (S,) is each position's
    plain negative log-likelihood in nats, `entropy` (S,) that of the prediction, `correct` (S,) whether its most
    likely token is the target.
    """

    loss: Tensor
    nll: Tensor
    entropy: Tensor
    correct: Tensor


def supervised_loss(predictions: Predictions, options: LossOptions | None = None) -> Supervised:
    """Sum over S of weights * cross-entropy, accumulated in fp32.

    With S = 0 the loss is zero and keeps its graph, so that a micro-batch without supervision still takes part in
    distributed training.
    """
    loss, nll, entropy, correct = _SupervisedLoss.apply(
        predictions.hidden,
        predictions.weight,
        predictions.bias,
        predictions.tokens,
        predictions.weights,
        predictions.form,
        options or LossOptions(),
        torch.is_grad_enabled(),
    )
    return Supervised(loss=loss, nll=nll, entropy=entropy, correct=correct)


class _SupervisedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tokens: Tensor,
        weights: Tensor | None,
        form: LogitForm,
        options: LossOptions,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needed = [need and with_grad for need in ctx.needs_input_grad[:3]]
        gradients = ctx.gradients = Gradients.empty(hidden, weight, bias, needed)
        outcome = Outcome.empty(tokens)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part in chunks(hidden, weight):
            chunk = Chunk.of(hidden[part], weight, bias, tokens[part], form, with_mean=options.smoothing > 0)
            outcome.take(part, chunk)
            losses = chunk.nll.clone()
            if chunk.mean_logit is not None:  # log_sum - mean_logit: the mean nll of all words
                losses = (1 - options.smoothing) * chunk.nll + options.smoothing * (chunk.log_sum - chunk.mean_logit)
            scales = None if weights is None else weights[part].float()
            if options.dft:
                losses *= (own := (-chunk.nll).exp())
            if scales is not None:
                losses *= scales
            loss += losses.sum()
            if options.dft:
                scales = own if scales is None else scales * own
            if gradients.wanted:
                gradients.add(part, chunk.gradient(scales, options.smoothing), hidden, weight)
        ctx.mark_non_differentiable(outcome.nll, outcome.entropy, outcome.correct)
        return loss, outcome.nll, outcome.entropy, outcome.correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.of_inputs(grad_loss), None, None, None, None, None
