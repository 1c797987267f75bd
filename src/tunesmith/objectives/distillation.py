"""Losses that bring a student's predictions near those of its teacher, in chunks, with exact gradients.

With p the teacher's and q the student's distribution over the next token, both at a temperature T, the divergence of a
position is the generalized Jensen-Shannon divergence (Agarwal et al. 2023, arXiv:2306.13649, eq. 1)

    D(p, q) = beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q,

whose ends are, as in that paper, KL(p || q) for beta = 0 and KL(q || p) for beta = 1. No factor T^2 is applied.

Of a teacher that has said only its K likeliest tokens, p and q are distributions over K + 1 events: each of these
tokens, and "any other token". That is a lower bound of the divergence over all tokens, and equal to it where p and q
have the same proportions among the others.

Shapes: S positions, H hidden size, V vocabulary, K likeliest tokens, J events.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tunesmith.model.head import LogitForm, Predictions
from tunesmith.objectives.logprobs import Chunk, Gradients, Outcome, chunks, finite_logits


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationOptions:
    """`beta` from 0 to 1 chooses the divergence, `temperature` flattens both distributions. `supervised` is the share
    of the loss that is the cross-entropy of the tokens themselves, at temperature 1; the divergence has the rest."""

    beta: float = 0.0
    temperature: float = 1.0
    supervised: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TopLogProbs:
    """What a teacher says of its likeliest tokens: `tokens` int64 (S, K), and `logprobs` fp32 (S, K + 1) at the
    temperature of the loss, in nats, the last one that of any other token."""

    tokens: Tensor
    logprobs: Tensor


Teacher: TypeAlias = Predictions | TopLogProbs


@dataclass(frozen=True, kw_only=True, slots=True)
class Distilled:
    """`loss` is the weighted sum over S positions, with its graph. The rest has none, each (S,): the `divergence` in
    nats, and of the tokens that follow the negative log-likelihood, and as in `objectives.supervised.Supervised`
    `entropy` and `correct`."""

    loss: Tensor
    divergence: Tensor
    nll: Tensor
    entropy: Tensor
    correct: Tensor


def distillation_loss(
    predictions: Predictions,
    teacher: Teacher,
    options: DistillationOptions,
    imitated: Tensor | None = None,
) -> Distilled:
    """Sum over S of weights * ((1 - supervised) * divergence + supervised * cross-entropy), in fp32.

    `imitated` bool (S,): positions that learn from the teacher alone, whatever `supervised` says, such as those of the
    student's own answers. A teacher with embeddings of another size, padded behind the vocabulary, is compared over
    the tokens that both have.
    """
    if isinstance(teacher, Predictions):
        common = min(vocabulary_of(predictions), vocabulary_of(teacher))
        predictions, teacher = first_tokens(predictions, common), first_tokens(teacher, common)
    shares = torch.full(predictions.tokens.shape, options.supervised, device=predictions.hidden.device)
    if imitated is not None:
        shares.masked_fill_(imitated.to(shares.device), 0.0)
    loss, divergence, nll, entropy, correct = _DistillationLoss.apply(
        predictions.hidden,
        predictions.weight,
        predictions.bias,
        predictions.tokens,
        predictions.weights,
        predictions.form,
        teacher,
        options,
        shares,
        torch.is_grad_enabled(),
    )
    return Distilled(loss=loss, divergence=divergence, nll=nll, entropy=entropy, correct=correct)


def vocabulary_of(predictions: Predictions) -> int:
    """V, padding of the embeddings included."""
    return int((predictions.hidden if predictions.weight is None else predictions.weight.t()).shape[-1])


def first_tokens(predictions: Predictions, count: int) -> Predictions:
    """Predictions over the first `count` tokens of the vocabulary."""
    if count == vocabulary_of(predictions):
        return predictions
    if predictions.weight is None:
        return replace(predictions, hidden=predictions.hidden[:, :count])
    bias = None if predictions.bias is None else predictions.bias[:count]
    return replace(predictions, weight=predictions.weight[:count], bias=bias)


@torch.no_grad()
def top_logprobs(predictions: Predictions, count: int, temperature: float) -> TopLogProbs:
    """The `count` likeliest tokens at each of S positions, below V, the likeliest first."""
    hidden, weight = predictions.hidden, predictions.weight
    tokens = torch.empty(len(hidden), count, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(len(hidden), count + 1, dtype=torch.float32, device=hidden.device)
    for part in chunks(hidden, weight):
        logits = finite_logits(hidden[part], weight, predictions.bias, predictions.form)
        log_p = torch.log_softmax(logits.div_(temperature), dim=-1)
        logprobs[part, :count], tokens[part] = log_p.topk(count, dim=-1)
        logprobs[part, count] = log_p.scatter_(1, tokens[part], -math.inf).logsumexp(dim=-1)
    return TopLogProbs(tokens=tokens, logprobs=logprobs)


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor | float]:
    """D (S,) of two distributions over J events, each given as its logarithms (S, J); the derivatives (S, J) of D by
    log q, up to a multiple of q; and their sum (S,).

    A normalized q has no freedom along such a multiple: with log q = u - logsumexp(u), the derivative by u is the one
    by log q, less q times the sum of these. All three are exactly 0 where p and q are equal.
    """
    ratio = log_p - log_q
    if beta == 0:
        p = log_p.exp()
        return (p * ratio).sum(dim=-1), p.neg_(), -1.0
    q = log_q.exp()
    if beta == 1:
        slopes = -q * ratio
        return (values := slopes.sum(dim=-1)), slopes, values
    # log (q / m) by whichever of p and q is larger, so that no exponential overflows.
    above = -(ratio + torch.log1p((1 - beta) * torch.expm1(-ratio.clamp(min=0))))
    to_mean = torch.where(ratio > 0, above, -torch.log1p(beta * torch.expm1(ratio.clamp(max=0))))
    slopes = q.mul_(to_mean).mul_(1 - beta)
    of_student = slopes.sum(dim=-1)
    of_teacher = (log_p.exp() * (ratio + to_mean)).sum(dim=-1)
    return beta * of_teacher + of_student, slopes, of_student


class _Events:
    """The events that a chunk's distributions are compared over, and the way back from these to the tokens.

    `log_q` (S, V) is the student's distribution over the tokens.
    """

    def __init__(self, log_q: Tensor, teacher: Teacher, part: slice, temperature: float) -> None:
        self._log_q, self._tokens = log_q, None
        self.teacher, self.student = log_q, log_q
        if isinstance(teacher, Predictions):
            logits = finite_logits(teacher.hidden[part], teacher.weight, teacher.bias, teacher.form)
            self.teacher = torch.log_softmax(logits.div_(temperature).to(log_q.device), dim=-1)
            return
        self._tokens = teacher.tokens[part].to(log_q.device)
        self.teacher = teacher.logprobs[part].to(log_q.device)
        self._others = log_q.scatter(1, self._tokens, -math.inf)
        self._rest = self._others.logsumexp(dim=-1, keepdim=True)
        self.student = torch.cat([log_q.gather(1, self._tokens), self._rest], dim=-1)

    def by_logits(self, slopes: Tensor, total: Tensor | float) -> Tensor:
        """(S, V): the derivatives by the student's logits / temperature, from those by its events' logarithms."""
        d = self._log_q.exp()
        d *= -total if isinstance(total, float) else -total[:, None]
        if self._tokens is None:
            return d.add_(slopes)
        d.addcmul_(self._others.sub_(self._rest).exp_(), slopes[:, -1:])
        return d.scatter_add_(1, self._tokens, slopes[:, :-1])


class _DistillationLoss(torch.autograd.Function):
    """As in `objectives.supervised`, the gradient is ready when the forward ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tokens: Tensor,
        weights: Tensor | None,
        form: LogitForm,
        teacher: Teacher,
        options: DistillationOptions,
        shares: Tensor,
        with_grad: bool,
    ) -> tuple[Tensor, ...]:
        needed = [need and with_grad for need in ctx.needs_input_grad[:3]]
        gradients = ctx.gradients = Gradients.empty(hidden, weight, bias, needed)
        outcome, diverged = Outcome.empty(tokens), torch.empty_like(shares)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part in chunks(hidden, weight):
            logits = finite_logits(hidden[part], weight, bias, form)
            events = _Events(
                torch.log_softmax(logits / options.temperature, dim=-1), teacher, part, options.temperature
            )
            values, slopes, total = divergence(events.teacher, events.student, options.beta)
            chunk = Chunk(logits, tokens[part], form)  # which overwrites the logits
            outcome.take(part, chunk)
            diverged[part] = values
            scales = torch.ones_like(values) if weights is None else weights[part].float()
            loss += (scales * ((1 - shares[part]) * values + shares[part] * chunk.nll)).sum()
            if gradients.wanted:
                d = events.by_logits(slopes, total)
                d *= (scales * (1 - shares[part]) / options.temperature)[:, None]
                d = chunk.through_form(d)
                if options.supervised:
                    d += chunk.gradient(scales * shares[part])
                gradients.add(part, d, hidden, weight)
        ctx.mark_non_differentiable(diverged, outcome.nll, outcome.entropy, outcome.correct)
        return loss, diverged, outcome.nll, outcome.entropy, outcome.correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.of_inputs(grad_loss), *(None,) * 7
