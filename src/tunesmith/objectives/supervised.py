"""Cross-entropy of a linear head on supervised positions only, in chunks, without the logits of the sequence.

Shapes: S supervised positions, H hidden size, V vocabulary.

The logits of a chunk are made, turned into their gradient in place, and dropped: the gradient of the hidden states (and
of the head, where it is trained) is ready when the forward ends. The idea is that of fused linear cross-entropy (Liger
Kernel, Hsu et al. 2024, arXiv:2410.10989), here for every device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.linear import product

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk's fp32 logits. Larger chunks were no faster on a CPU, and the peak memory follows them."""
FINITE = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """What happens between the head's product and the loss.

    logits = softcap * tanh(scale * (h @ W.T + b) / softcap); `softcap` None leaves the tanh out. `smoothing` mixes in
    the uniform distribution. `dft` weighs each token by its own probability (Dynamic Fine-Tuning, arXiv:2508.05629).
    """

    scale: float = 1.0
    softcap: float | None = None
    smoothing: float = 0.0
    dft: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervised:
    """The outcome of a forward pass over S supervised positions.

    `loss` is the weighted sum over positions, with its graph; the rest has no graph: `nll` (S,) is each position's
    plain negative log-likelihood in nats, `entropy` (S,) that of the prediction, `correct` (S,) whether its most
    likely token is the target. `outputs` are those of the model, with the logits of all positions, where they were
    asked for.
    """

    loss: Tensor
    nll: Tensor
    entropy: Tensor
    correct: Tensor
    outputs: Any = None


def linear_cross_entropy(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_S: Tensor,
    weights_S: Tensor | None = None,
    options: LossOptions | None = None,
) -> Supervised:
    """Sum over S of weights * cross-entropy(head(hidden), targets), accumulated in fp32.

    `targets` int64 in [0, V); `weights` float or None for ones. With S = 0 the loss is zero and keeps its graph, so
    that a micro-batch without supervision still takes part in distributed training.
    """
    outputs = _LinearCrossEntropy.apply(
        hidden_SH, weight_VH, bias_V, targets_S, weights_S, options or LossOptions(), torch.is_grad_enabled()
    )
    return Supervised(loss=outputs[0], nll=outputs[1], entropy=outputs[2], correct=outputs[3])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        options: LossOptions,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        need_hidden, need_weight, need_bias = (need and with_grad for need in ctx.needs_input_grad[:3])
        ctx.grads = (
            torch.empty_like(hidden) if need_hidden else None,
            torch.zeros_like(weight, dtype=torch.float32) if need_weight else None,
            torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None,
        )
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        size = targets.shape[0]
        nll, entropy = (torch.empty(size, dtype=torch.float32, device=hidden.device) for _ in range(2))
        correct = torch.empty(size, dtype=torch.bool, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, size, rows):
            part = slice(start, min(start + rows, size))
            logits = head_logits(hidden[part], weight, bias, options)
            if bias is not None:
                logits.clamp_(min=FINITE)  # -inf times its probability 0 would be nan
            p = torch.softmax(logits, dim=-1)
            top, own = logits.amax(dim=-1), logits.gather(-1, targets[part, None])[:, 0]
            # At its largest logit, p is 1 over the sum that it was divided by.
            log_sum = -p.amax(dim=-1).log()
            nll[part] = top - own + log_sum
            correct[part] = own == top
            w = torch.ones_like(top) if weights is None else weights[part].float()
            mean = top + log_sum - logits.mean(dim=-1) if options.smoothing else None
            loss += _token_losses(nll[part], mean, options).mul_(w).sum()
            slope = None if options.softcap is None else 1 - (logits / options.softcap).square_()
            entropy[part] = top + log_sum - logits.mul_(p).sum(dim=-1)
            del logits
            if need_hidden or need_weight or need_bias:
                _gradient_(
                    p, slope, targets[part], nll[part], None if weights is None and not options.dft else w, options
                )
                _accumulate(ctx.grads, part, p, hidden, weight)
        ctx.mark_non_differentiable(nll, entropy, correct)
        return loss, nll, entropy, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions) -> Tensor:
    """fp32 logits (..., V) of hidden states (..., H), scaled and soft-capped in place: not for autograd."""
    logits = product(hidden.to(weight.dtype), weight, bias).float()
    if options.scale != 1.0:
        logits *= options.scale
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits


def _token_losses(nll: Tensor, mean: Tensor | None, options: LossOptions) -> Tensor:
    """`mean` is that of the nll of all tokens of the vocabulary, each position's."""
    losses = nll.clone() if mean is None else (1 - options.smoothing) * nll + options.smoothing * mean
    return losses * (-nll).exp() if options.dft else losses


def _gradient_(
    softmax: Tensor, slope: Tensor | None, targets: Tensor, nll: Tensor, weights: Tensor | None, options: LossOptions
) -> None:
    """Overwrite `softmax` with the gradient of the weighted loss by the head's product (before scale and softcap, whose
    derivative is `slope`)."""
    rows = torch.arange(len(targets), device=softmax.device)
    if options.smoothing:
        softmax -= options.smoothing / softmax.shape[-1]
    softmax[rows, targets] -= 1 - options.smoothing
    if weights is not None:
        softmax *= (weights * (-nll).exp() if options.dft else weights)[:, None]
    if slope is not None:
        softmax *= slope
    if options.scale != 1.0:
        softmax *= options.scale


def _accumulate(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    part: slice,
    dlogits: Tensor,
    hidden: Tensor,
    weight: Tensor,
) -> None:
    grad_hidden, grad_weight, grad_bias = grads
    d = dlogits.to(weight.dtype)
    if grad_hidden is not None:
        grad_hidden[part] = product(d, weight.t())
    if grad_weight is not None:
        grad_weight += product(d.t(), hidden[part].to(weight.dtype).t())
    if grad_bias is not None:
        grad_bias += dlogits.sum(dim=0)
