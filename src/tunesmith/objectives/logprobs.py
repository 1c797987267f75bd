"""Log-probabilities of the tokens that follow at S positions, in chunks: no (S, V) logits are ever held at once.

Every objective is a function of these. `token_logprobs` is for those that weigh tokens only when the forward is over (a
preference, a policy): its backward takes a weight for each token. The gradient of a token's hidden state is its weight
times that of its log-probability, which is ready when the forward ends; only the gradient of a head that is trained
needs the logits of a chunk once more. Supervised loss (`objectives.supervised`) is built from the same parts.

Shapes: S positions, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.head import LogitForm, Predictions, head_logits
from tunesmith.model.linear import product, shapes_cost

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk's fp32 logits. Larger chunks were no faster on a CPU, and the peak memory follows them."""
LAST_FEW = 16
"""Sizes of parts are multiples of it, but for the last one."""
FINITE = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogProbs:
    """`logprobs` (S,) fp32, in nats, with their graph; without one, `entropy` (S,) of each prediction, and `correct`
    (S,), whether its most likely token is the one that follows. `collision` (S,), where it was asked for, is the log of
    the probability that two tokens drawn from the prediction are the same, the sum of all squared probabilities, and
    `mean_logit` (S,), where that was asked for, the mean of the prediction's logits."""

    logprobs: Tensor
    entropy: Tensor
    correct: Tensor
    collision: Tensor | None = None
    mean_logit: Tensor | None = None


def token_logprobs(
    predictions: Predictions, *, with_collision: bool = False, with_mean_logit: bool = False
) -> TokenLogProbs:
    """The log-probability of each of the S tokens. With S = 0 it is empty and keeps its graph, so that a micro-batch
    without targets still takes part in distributed training."""
    collision, mean_logit = (
        torch.empty(len(predictions.tokens), device=predictions.tokens.device) if wanted else None
        for wanted in (with_collision, with_mean_logit)
    )
    logprobs, entropy, correct = _TokenLogProbs.apply(
        predictions.hidden,
        predictions.weight,
        predictions.bias,
        predictions.tokens,
        predictions.form,
        collision,
        mean_logit,
        torch.is_grad_enabled(),
    )
    return TokenLogProbs(
        logprobs=logprobs, entropy=entropy, correct=correct, collision=collision, mean_logit=mean_logit
    )


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tokens: Tensor,
        form: LogitForm,
        collision: Tensor | None,
        mean_logit: Tensor | None,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = ctx.needs_input_grad[:3]
        # Of the model's own logits (no weight), the gradient is as large as they are, and takes no product to make.
        ready = with_grad and weight is not None and needed == (True, False, False)
        by_nll = Gradients.empty(hidden, weight, bias, needed) if ready else None
        outcome = Outcome.empty(tokens)
        for part in chunks(hidden, weight):
            chunk = Chunk.of(hidden[part], weight, bias, tokens[part], form, with_mean=mean_logit is not None)
            outcome.take(part, chunk)
            if collision is not None:
                collision[part] = torch.linalg.vecdot(chunk.p, chunk.p).log()
            if mean_logit is not None and chunk.mean_logit is not None:
                mean_logit[part] = chunk.mean_logit
            if by_nll is not None:
                by_nll.add(part, chunk.gradient(None), hidden, weight)
        ctx.save_for_backward(*((by_nll.hidden,) if by_nll is not None else (hidden, weight, bias, tokens)))
        ctx.form, ctx.ready = form, ready
        ctx.mark_non_differentiable(outcome.entropy, outcome.correct)
        return outcome.nll.neg(), outcome.entropy, outcome.correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.ready:
            [by_nll] = ctx.saved_tensors
            return (by_nll * -grad.float()[:, None]).to(by_nll.dtype), *(None,) * 7
        hidden, weight, bias, tokens = ctx.saved_tensors
        gradients = Gradients.empty(hidden, weight, bias, ctx.needs_input_grad[:3])
        for part in chunks(hidden, weight):
            chunk = Chunk.of(hidden[part], weight, bias, tokens[part], ctx.form)
            gradients.add(part, chunk.gradient(-grad[part].float()), hidden, weight)
        return *gradients.of_inputs(), *(None,) * 5


# The parts, which supervised loss is made of, too


def chunks(hidden: Tensor, weight: Tensor | None) -> Iterator[slice]:
    """Parts of the S positions whose logits fill a chunk. Where new shapes cost, the last few are a part of their own,
    so that parts have one of few sizes."""
    vocabulary = hidden.shape[-1] if weight is None else weight.shape[0]
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    few = LAST_FEW if weight is not None and shapes_cost(weight) else 1
    for start in range(0, hidden.shape[0], rows):
        stop = min(start + rows, hidden.shape[0])
        last = stop if stop - start == rows else stop - (stop - start) % few
        if start < last:
            yield slice(start, last)
        if last < stop:
            yield slice(last, stop)


def finite_logits(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, form: LogitForm) -> Tensor:
    """`head_logits`, of which each is finite: -inf times its probability 0 would be nan."""
    logits = head_logits(hidden, weight, bias, form)
    return logits.clamp_(min=FINITE) if bias is not None or weight is None else logits


class Chunk:
    """The predictions of some positions in numbers: `p` (S, V), and of each position `nll`, `entropy`, `correct`, the
    log of the sum of all exponentials (`log_sum`), and with `with_mean` the mean of all logits (`mean_logit`)."""

    def __init__(self, logits: Tensor, tokens: Tensor, form: LogitForm, *, with_mean: bool = False) -> None:
        self._tokens, self._form = tokens, form
        self.p = torch.softmax(logits, dim=-1)
        top, own = logits.amax(dim=-1), logits.gather(-1, tokens[:, None])[:, 0]
        # At its largest logit, p is 1 over the sum that it was divided by.
        above_top = -self.p.amax(dim=-1).log()
        self.nll = top - own + above_top
        self.correct = own == top
        self.log_sum = top + above_top
        self.mean_logit = logits.mean(dim=-1) if with_mean else None
        # The derivative of the soft cap, before the logits are overwritten.
        self._slope = None if form.softcap is None else 1 - (logits / form.softcap).square_()
        self.entropy = self.log_sum - logits.mul_(self.p).sum(dim=-1)

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tokens: Tensor,
        form: LogitForm,
        *,
        with_mean: bool = False,
    ) -> "Chunk":
        """Of hidden states (S, H), or of logits (S, V) where there is no `weight`."""
        return cls(finite_logits(hidden, weight, bias, form), tokens, form, with_mean=with_mean)

    def gradient(self, weights: Tensor | None, smoothing: float = 0.0) -> Tensor:
        """(S, V): the gradient of the sum of weights * nll by the head's product, before scale and softcap; with
        `smoothing`, of the smoothed nll. Overwrites `p`."""
        d, rows = self.p, torch.arange(len(self._tokens), device=self.p.device)
        if smoothing:
            d -= smoothing / d.shape[-1]
        d[rows, self._tokens] -= 1 - smoothing
        if weights is not None:
            d *= weights[:, None]
        return self.through_form(d)

    def through_form(self, d: Tensor) -> Tensor:
        """(S, V): a gradient by the logits, in place made one by the head's product, before scale and softcap."""
        if self._slope is not None:
            d *= self._slope
        if self._form.scale != 1.0:
            d *= self._form.scale
        return d


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What is known of all S positions: `nll`, `entropy` and `correct`, each (S,)."""

    nll: Tensor
    entropy: Tensor
    correct: Tensor

    @classmethod
    def empty(cls, tokens: Tensor) -> "Outcome":
        nll, entropy = (torch.empty(len(tokens), dtype=torch.float32, device=tokens.device) for _ in range(2))
        return cls(nll=nll, entropy=entropy, correct=torch.empty(len(tokens), dtype=torch.bool, device=tokens.device))

    def take(self, part: slice, chunk: Chunk) -> None:
        self.nll[part], self.entropy[part], self.correct[part] = chunk.nll, chunk.entropy, chunk.correct


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """The gradients of hidden states, head and bias, as far as they are needed: the head's are summed in fp32."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dtypes: tuple[torch.dtype | None, ...]

    @classmethod
    def empty(cls, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, needed: Any) -> "Gradients":
        need_hidden, need_weight, need_bias = needed
        return cls(
            hidden=torch.empty_like(hidden) if need_hidden else None,
            weight=torch.zeros_like(weight, dtype=torch.float32) if need_weight and weight is not None else None,
            bias=torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None,
            dtypes=tuple(None if x is None else x.dtype for x in (hidden, weight, bias)),
        )

    @property
    def wanted(self) -> bool:
        return any(gradient is not None for gradient in (self.hidden, self.weight, self.bias))

    def add(self, part: slice, dlogits: Tensor, hidden: Tensor, weight: Tensor | None) -> None:
        """Add what the chunk `part` contributes; `dlogits` is the gradient by the head's product."""
        if weight is None:
            if self.hidden is not None:
                self.hidden[part] = dlogits
            return
        d = dlogits.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[part] = product(d, weight.t())
        if self.weight is not None:
            self.weight.add_(product(d.t(), hidden[part].to(weight.dtype).t()))
        if self.bias is not None:
            self.bias.add_(dlogits.sum(dim=0))

    def of_inputs(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """In the dtypes of the inputs, times `factor`."""
        return tuple(
            None if gradient is None else (gradient if factor is None else gradient * factor).to(dtype)
            for gradient, dtype in zip((self.hidden, self.weight, self.bias), self.dtypes, strict=True)
        )
