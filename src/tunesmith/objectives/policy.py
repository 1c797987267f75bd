"""Policy objectives: functions of the log-probabilities of drawn answers and of how good each answer was.

First rewards become advantages, within a group of answers to one prompt; then each token of an answer gets a loss. The
trainer adds the losses up, each times the `scale` of its answer, and divides the sum once by the `share` of all answers
of a step (`divisors`).

    GRPO      arXiv:2402.03300    a clipped ratio; the mean over an answer's tokens, then over answers
    Dr. GRPO  arXiv:2503.20783    tokens over a constant length; rewards are not scaled
    DAPO      arXiv:2503.14476    the mean over all tokens; a higher upper bound; overlong answers
    BNPO      the mean over the tokens of each micro-batch
    GSPO      arXiv:2507.18071    one ratio for an answer: the geometric mean of those of its tokens
    CISPO     arXiv:2506.13585    the ratio is a bounded constant weight of the log-probability
    SAPO      arXiv:2511.20347    a smooth gate in place of the clip
    LUSPO     arXiv:2602.05261    GSPO, each answer times its length
    VESPO     arXiv:2602.10693    a smooth weight of the ratio of a whole answer
    RLOO      arXiv:2402.14740    the others of a group are the baseline; one ratio for an answer: that of its product

Shapes: P prompts, G answers to each, R rewards of each answer, D answers of a batch, S tokens of these answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tunesmith.model.head import Predictions
from tunesmith.objectives.logprobs import TokenLogProbs, token_logprobs

PolicyLossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
Level = Literal["token", "sequence", "product"]
Scaling = Literal["group", "batch", "none"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
OVER_TOKENS = ("dapo", "cispo", "vespo")
"""Losses that are divided by the number of tokens of all answers."""
SMALL = 1e-4
"""Is added to a standard deviation before it divides."""
LOWEST, HIGHEST = -18.420680743952367, 20.0
"""Bounds of the logarithm of VESPO's ratio: that of 1e-8, and 20."""


# Rewards to advantages


def total_rewards(rewards_PGR: Tensor, weights_R: Tensor) -> Tensor:
    """(P, G) The weighted sum of the rewards of each answer, NaN where none has one. A reward that does not apply is
    NaN and counts as 0."""
    total = (rewards_PGR * weights_R).nansum(dim=-1)
    return total.masked_fill(rewards_PGR.isnan().all(dim=-1), torch.nan)


def group_advantages(rewards_PG: Tensor, scaling: Scaling) -> Tensor:
    """(P, G) By how much each answer is better than the mean of its group, in standard deviations of the group or of
    all answers, or as it is. An answer without a reward (NaN) has advantage 0.

    In a group whose rewards are all equal, advantages are exactly 0: what rounding leaves of them would be divided by
    next to nothing.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), "none").tolist()
    [[0.5, -0.5, -0.5, 0.5]]
    """
    advantages = rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True)
    if scaling == "group":
        advantages = advantages / (deviation(rewards_PG)[:, None] + SMALL)
    elif scaling == "batch":
        advantages = advantages / (deviation(rewards_PG.reshape(1, -1)) + SMALL)
    return advantages.nan_to_num(nan=0.0).masked_fill(is_level(rewards_PG)[:, None], 0.0)


def decoupled_advantages(rewards_PGR: Tensor, weights_R: Tensor) -> Tensor:
    """(P, G) Each reward scaled within its group before they are added, and the sums over all answers (GDPO). A group
    in which no reward tells the answers apart has advantage 0."""
    scaled = torch.stack([group_advantages(rewards, "group") for rewards in rewards_PGR.unbind(dim=-1)], dim=-1)
    scaled = scaled.masked_fill(rewards_PGR.isnan(), torch.nan)
    total = total_rewards(scaled, weights_R)
    advantages = (total - total.nanmean()) / (deviation(total.reshape(1, -1)) + SMALL)
    level = torch.stack([is_level(rewards) for rewards in rewards_PGR.unbind(dim=-1)]).all(dim=0)
    return advantages.nan_to_num(nan=0.0).masked_fill(level[:, None], 0.0)


def leave_one_out(rewards_PG: Tensor, *, normalized: bool = False) -> Tensor:
    """(P, G) By how much each answer is better than the mean of the others of its group; with `normalized`, over all
    answers to mean 0 and deviation 1. An answer without a reward, or without others that have one, has advantage 0.

    >>> leave_one_out(torch.tensor([[1.0, 0.0, 0.0, 2.0]])).tolist()
    [[0.3333333134651184, -1.0, -1.0, 1.6666666269302368]]
    """
    count = (~rewards_PG.isnan()).sum(dim=1, keepdim=True)
    others = (rewards_PG.nansum(dim=1, keepdim=True) - rewards_PG) / (count - 1)
    advantages = (rewards_PG - others).masked_fill(count == 1, torch.nan)
    advantages = advantages.masked_fill(is_level(rewards_PG)[:, None] & ~advantages.isnan(), 0.0)
    if normalized:
        spread = deviation(advantages.reshape(1, -1))
        advantages = (advantages - advantages.nanmean()) / (spread + SMALL)
    return advantages.nan_to_num(nan=0.0)


def deviation(rewards_PG: Tensor) -> Tensor:
    """(P,) The standard deviation of each row, of a sample (n - 1), over what is not NaN; 0 of fewer than two."""
    count = (~rewards_PG.isnan()).sum(dim=1)
    squares = (rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True)).square().nansum(dim=1)
    spread = torch.where(count > 1, squares / (count - 1).clamp(min=1), 0.0).sqrt()
    return spread.masked_fill(is_level(rewards_PG), 0.0)  # whatever the mean rounds to


def is_level(rewards_PG: Tensor) -> Tensor:
    """(P,) Whether all rewards of a group are the same."""
    lowest = rewards_PG.nan_to_num(nan=torch.inf).amin(dim=1)
    highest = rewards_PG.nan_to_num(nan=-torch.inf).amax(dim=1)
    return highest <= lowest


# Answers to losses


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyOptions:
    """Which loss, and its numbers, by TRL's names. `level`: one ratio for each token, one for each answer (their
    geometric mean), or one for each answer (their product)."""

    loss: PolicyLossType = "dapo"
    level: Level = "token"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    off_policy_mask_threshold: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """The tokens of D answers, one answer after another.

    `logprobs` (S,) with their graph, by the model that is trained; `before` (S,) by the model that drew them;
    `reference` (S,) by the reference. `sampled` (S,) is what a generator of its own gave them; `correction` (S,) makes
    up for its being another one. `owner` (S,) is the number of each token's answer, `advantages` (D,) are theirs.
    """

    logprobs: Tensor
    before: Tensor
    owner: Tensor
    advantages: Tensor
    reference: Tensor | None = None
    sampled: Tensor | None = None
    correction: Tensor | None = None

    def summed(self, values_S: Tensor) -> Tensor:
        """(D,) The sum over each answer."""
        return values_S.new_zeros(len(self.advantages)).index_add(0, self.owner, values_S)

    @property
    def lengths(self) -> Tensor:
        """(D,) The number of tokens of each answer, at least 1."""
        return self.summed(torch.ones_like(self.before)).clamp(min=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """`losses` (S,) with their graph; without one `kl` (S,), None where no reference is compared with, and whether the
    ratio of each token is `low` or `high` (S,), where the clip takes its gradient."""

    losses: Tensor
    low: Tensor
    high: Tensor
    kl: Tensor | None = None


def policy_logprobs(predictions: Predictions, *, temperature: float = 1.0) -> TokenLogProbs:
    """The log-probabilities of tokens that were drawn at a `temperature`: of logits / temperature.

    A soft cap stays outside: cap * tanh(x / cap) / t is (cap / t) * tanh((x / t) / (cap / t)).
    """
    if temperature == 1.0:
        return token_logprobs(predictions)
    if predictions.weight is None:
        return token_logprobs(replace(predictions, hidden=predictions.hidden / temperature))
    form = predictions.form
    softcap = None if form.softcap is None else form.softcap / temperature
    return token_logprobs(replace(predictions, form=replace(form, scale=form.scale / temperature, softcap=softcap)))


def policy_losses(drawn: Drawn, options: PolicyOptions) -> TokenLosses:
    """The loss of each token, as it is before it is scaled and added up."""
    advantages = drawn.advantages[drawn.owner]
    log_ratio = drawn.logprobs - drawn.before
    if options.level == "token":
        ratio = log_ratio.exp()
    else:
        whole = drawn.summed(log_ratio)
        ratio = (whole / drawn.lengths if options.level == "sequence" else whole).exp()[drawn.owner]
    clipped = ratio.detach()
    low = (clipped < 1 - options.epsilon) & (advantages < 0)
    high = (clipped > 1 + options.epsilon_high) & (advantages > 0)
    if options.loss == "cispo":
        low, high = torch.zeros_like(low), (clipped > options.epsilon_high) & (advantages > 0)
        losses = -clipped.clamp(max=options.epsilon_high) * advantages * drawn.logprobs
    elif options.loss == "sapo":
        heat = torch.where(advantages > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
        losses = -torch.sigmoid(heat * (ratio - 1)) * 4 / heat * advantages
    elif options.loss == "vespo":
        losses = -_vespo_weights(drawn, options)[drawn.owner] * advantages * drawn.logprobs
    else:
        bounded = ratio.clamp(1 - options.epsilon, 1 + options.epsilon_high)
        free = ratio if options.delta is None else ratio.clamp(max=options.delta)
        losses = -torch.minimum(free * advantages, bounded * advantages)
    if options.off_policy_mask_threshold is not None:
        losses = losses * _kept(drawn, options.off_policy_mask_threshold)[drawn.owner]
    if drawn.correction is not None and options.loss != "vespo":
        losses = losses * drawn.correction
    kl = None
    if options.beta and drawn.reference is not None:
        apart = drawn.reference - drawn.logprobs
        kl = apart.exp() - apart - 1
        if options.use_bias_correction_kl:
            kl = kl * ratio
        losses = losses + options.beta * kl
        kl = kl.detach()
    return TokenLosses(losses=losses, low=low, high=high, kl=kl)


@torch.no_grad()
def _vespo_weights(drawn: Drawn, options: PolicyOptions) -> Tensor:
    """(D,) w^k exp(l (1 - w)) of the ratio w of each answer, which is 1 at w = 1."""
    whole = drawn.summed((drawn.logprobs - drawn.before).clamp(-HIGHEST, HIGHEST))
    if drawn.correction is not None:
        whole = whole + drawn.summed(drawn.correction.log().clamp(LOWEST, HIGHEST))
    log_w, gains = whole.clamp(LOWEST, HIGHEST), drawn.advantages >= 0
    k = torch.where(gains, options.vespo_k_pos, options.vespo_k_neg)
    rate = torch.where(gains, options.vespo_lambda_pos, options.vespo_lambda_neg).clamp(min=1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0)


@torch.no_grad()
def _kept(drawn: Drawn, threshold: float) -> Tensor:
    """(D,) 0 for bad answers that the model has moved away from by more than `threshold` nats a token (DeepSeek-V3.2,
    arXiv:2512.02556), else 1."""
    origin = drawn.before if drawn.sampled is None else drawn.sampled
    moved = drawn.summed((origin - drawn.logprobs).nan_to_num(nan=0.0)) / drawn.lengths
    return ((drawn.advantages >= 0) | (moved <= threshold)).to(drawn.logprobs.dtype)


def sampler_correction(
    drawn: Drawn, mode: Correction, *, lowest: float | None = None, highest: float | None = None
) -> Tensor:
    """(S,) The ratio of the trained model, as it drew, to the generator that has drawn: of each token, or of each whole
    answer. What is out of bounds is cut to them (`truncate`), or 0 (`mask`). A token whose probability the generator
    did not tell (NaN) counts as equal."""
    assert drawn.sampled is not None
    apart = (drawn.before - drawn.sampled).nan_to_num(nan=0.0)
    ratio = apart.exp() if mode.startswith("token") else drawn.summed(apart).exp()[drawn.owner]
    if mode.endswith("truncate"):
        return ratio.clamp(min=lowest, max=highest)
    out = torch.zeros_like(ratio, dtype=torch.bool)
    if lowest is not None:
        out |= ratio < lowest
    if highest is not None:
        out |= ratio > highest
    return ratio.masked_fill(out, 0.0)


# What is added up, by what it is divided


@dataclass(frozen=True, kw_only=True, slots=True)
class Divisor:
    """Of an answer: what the losses of its tokens are multiplied by, and what it adds to the number by which the sum of
    a step is divided."""

    scale: float
    share: float


def divisors(
    loss: PolicyLossType, lengths: Sequence[int], *, micro_batch: int, longest: int, level: Level = "token"
) -> list[Divisor]:
    """For the answers of one generation, of `lengths` trained tokens, in micro-batches of `micro_batch` answers.

    The mean over an answer's tokens is a scale; the mean over all tokens of a generation a share that is the same for
    all its answers, so that steps that divide a generation have one divisor. `longest` is Dr. GRPO's constant.
    """
    if loss in ("grpo", "sapo") or level == "product":
        return [Divisor(scale=1 / max(1, length), share=1.0) for length in lengths]
    if loss == "dr_grpo":
        return [Divisor(scale=1.0, share=float(longest)) for _ in lengths]
    if loss == "luspo":
        return [Divisor(scale=1.0, share=1.0) for _ in lengths]
    if loss in OVER_TOKENS:
        share = max(1, sum(lengths)) / max(1, len(lengths))
        return [Divisor(scale=1.0, share=share) for _ in lengths]
    parts = [lengths[start : start + micro_batch] for start in range(0, len(lengths), micro_batch)]
    return [Divisor(scale=1 / max(1, sum(part)), share=1 / len(part)) for part in parts for _ in part]
