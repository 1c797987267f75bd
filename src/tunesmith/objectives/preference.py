"""Losses that prefer one answer to another: functions of the log-probabilities that a model and its reference give to
the tokens of both.

With the log-ratios r = log p(answer) - log p_ref(answer), summed over the answer's tokens, r_w of the chosen and r_l of
the rejected answer, and their difference d = r_w - r_l, most losses are functions of beta d. An answer's tokens are
those that the model would generate, its end among them.

Shapes: P pairs, S scored tokens of all answers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from tunesmith.errors import TunesmithError, nearest

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
LARGEST = 80.0
"""Of this and less, fp32 holds the exponential."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceOptions:
    """Which loss, and its parameters.

    `losses` are names of `LOSSES` with the weight of each, which are added. `beta` scales log-ratios to rewards.
    `label_smoothing` is the share of pairs that are taken to be the wrong way around. `divergence` chooses what keeps
    the model near its reference (f-DPO, Wang et al. 2023, arXiv:2309.16240), `divergence_alpha` is that of the
    alpha-divergence. `ld_alpha` weighs the tokens of an answer beyond the length of the shorter one (LD-DPO, Liu et
    al. 2024, arXiv:2409.06411). `weighting` weighs a pair by how likely its answers are to the model (WPO, Zhou et al.
    2024, arXiv:2406.11827). `reference_free`: the reference is one that gives all answers the same probability.
    """

    losses: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)
    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence: Divergence = "reverse_kl"
    divergence_alpha: float = 0.5
    ld_alpha: float | None = None
    weighting: bool = False
    reference_free: bool = False
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0

    @property
    def needs_reference(self) -> bool:
        """Whether any loss compares with the reference."""
        return not self.reference_free and any(name not in WITHOUT_REFERENCE for name, _ in self.losses)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """What the losses are functions of, each (P,): the summed log-probability of the chosen and of the rejected answer
    in nats, by the model and by the reference, and their numbers of tokens.

    `chosen_mean` and `rejected_mean` are the mean log-probabilities of a token, which `ld_alpha` leaves as they are.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_mean: Tensor
    rejected_mean: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected


def pairs_of_tokens(
    logprobs: Sequence[Tensor], reference: Sequence[Tensor] | None, ld_alpha: float | None = None
) -> Pairs:
    """The sums over the tokens of 2 P answers, the chosen and the rejected one of each pair in turn; each is a tensor
    of as many log-probabilities as it has tokens. Without a `reference`, that gives 0 to each."""
    chosen, rejected = logprobs[0::2], logprobs[1::2]
    ref = [torch.zeros_like(values) for values in logprobs] if reference is None else reference

    def sums(values: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        return torch.stack([_sum(one, len(two), ld_alpha) for one, two in zip(values, others, strict=True)])

    def counts(values: Sequence[Tensor]) -> Tensor:
        return torch.tensor([max(1, len(one)) for one in values], device=logprobs[0].device, dtype=torch.float32)

    tokens = counts(chosen), counts(rejected)
    plain = [torch.stack([one.sum() for one in values]) for values in (chosen, rejected)]
    return Pairs(
        chosen=sums(chosen, rejected),
        rejected=sums(rejected, chosen),
        ref_chosen=sums(ref[0::2], ref[1::2]),
        ref_rejected=sums(ref[1::2], ref[0::2]),
        chosen_tokens=tokens[0],
        rejected_tokens=tokens[1],
        chosen_mean=plain[0] / tokens[0],
        rejected_mean=plain[1] / tokens[1],
    )


def _sum(values: Tensor, other: int, ld_alpha: float | None) -> Tensor:
    """The sum over tokens, of which those beyond the length `other` count `ld_alpha` times."""
    if ld_alpha is None or len(values) <= other:
        return values.sum()
    return values[:other].sum() + ld_alpha * values[other:].sum()


def pair_weights(logprobs: Sequence[Tensor], collisions: Sequence[Tensor]) -> Tensor:
    """(P,) The weights of WPO: of both answers, the geometric mean over tokens of p(token) / sum of p^2, multiplied.

    The log of the sum of squared probabilities, in `collisions`, aligns the weights of answers that the model itself
    would write to 1, however uncertain it is (eq. 6 of the paper). They have no graph.
    """
    with torch.no_grad():
        means = torch.stack(
            [(own - all_).sum() / max(1, len(own)) for own, all_ in zip(logprobs, collisions, strict=True)]
        )
        return (means[0::2] + means[1::2]).exp()


def preference_loss(pairs: Pairs, options: PreferenceOptions, margin: Tensor | None = None) -> Tensor:
    """(P,) The loss of each pair, in which the named losses are added with their weights.

    `margin` (P,), in units of the reward, is by how much the chosen answer is to be better (ODPO, Amini et al. 2024,
    arXiv:2402.10571); only losses of `TAKE_MARGIN` know it.
    """
    losses = [weight * LOSSES[name](Scored(pairs, options, margin)) for name, weight in options.losses]
    return torch.stack(losses).sum(dim=0)


class Scored:
    """A batch of pairs under some options, as the losses below see it. `delta` (P,) is the difference of the scores of
    chosen and rejected answers: their log-ratios, or what another divergence makes of these."""

    def __init__(self, pairs: Pairs, options: PreferenceOptions, margin: Tensor | None = None) -> None:
        self.pairs, self.options, self.beta = pairs, options, options.beta
        self.margin = torch.zeros_like(pairs.chosen) if margin is None else margin
        self.chosen = _score(pairs.chosen_ratio, options)
        self.rejected = _score(pairs.rejected_ratio, options)
        self.delta = self.chosen - self.rejected

    def smoothed(self, logits: Tensor) -> Tensor:
        """-log sigmoid, of which a share of `label_smoothing` is taken the other way around."""
        epsilon = self.options.label_smoothing
        return -(1 - epsilon) * logsigmoid(logits) - epsilon * logsigmoid(-logits)


def _score(ratio: Tensor, options: PreferenceOptions) -> Tensor:
    """f'(exp(ratio)) up to a constant, for the divergence with the generator f (arXiv:2309.16240, table 1)."""
    if options.divergence == "forward_kl":
        return 1 - torch.exp(-ratio)
    if options.divergence == "js_divergence":
        return math.log(2) + logsigmoid(ratio)
    power = options.divergence_alpha - 1
    if options.divergence == "reverse_kl" or abs(power) < 1e-6:
        return ratio
    return (torch.exp((power * ratio).clamp(max=LARGEST)) - 1) / power


# The losses, each of them (P,)


def _sigmoid(s: Scored) -> Tensor:
    """DPO: -log sigmoid(beta d) (Rafailov et al. 2023, arXiv:2305.18290); with smoothing, cDPO."""
    return s.smoothed(s.beta * s.delta - s.margin)


def _hinge(s: Scored) -> Tensor:
    """max(0, 1 - beta d): SLiC (Zhao et al. 2023, arXiv:2305.10425) with the reward of DPO (RSO, arXiv:2309.06657)."""
    return relu(1 - (s.beta * s.delta - s.margin))


def _ipo(s: Scored) -> Tensor:
    """(d' - 1 / (2 beta))^2, d' of scores by token (Azar et al. 2023, arXiv:2310.12036, eq. 17)."""
    by_token = s.chosen / s.pairs.chosen_tokens - s.rejected / s.pairs.rejected_tokens
    return (by_token - 1 / (2 * s.beta)).square()


def _sigmoid_norm(s: Scored) -> Tensor:
    """DPO with scores by token, so that no length is preferred."""
    by_token = s.chosen / s.pairs.chosen_tokens - s.rejected / s.pairs.rejected_tokens
    return s.smoothed(s.beta * by_token - s.margin)


def _robust(s: Scored) -> Tensor:
    """Unbiased where a share of the pairs is the wrong way around (Chowdhury et al. 2024, arXiv:2403.00409)."""
    logits, epsilon = s.beta * s.delta - s.margin, s.options.label_smoothing
    return (-(1 - epsilon) * logsigmoid(logits) + epsilon * logsigmoid(-logits)) / (1 - 2 * epsilon)


def _exo_pair(s: Scored) -> Tensor:
    """KL(q || p), q = sigmoid(beta d) that the chosen one is better, p = 1 - smoothing (Ji et al. 2024,
    arXiv:2402.00856, eq. 16)."""
    logits, epsilon = s.beta * s.delta, s.options.label_smoothing
    for_chosen = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-epsilon))
    return for_chosen + torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(epsilon))


def _nca_pair(s: Scored) -> Tensor:
    """-log sigmoid(beta r_w) - 1/2 sum of log sigmoid(-beta r) (Chen et al. 2024, arXiv:2402.05369)."""
    chosen, rejected = s.beta * s.pairs.chosen_ratio, s.beta * s.pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco_pair(s: Scored) -> Tensor:
    """-log sigmoid(beta r_w) - log sigmoid(-beta r_l): each answer classified by itself (Jung et al. 2024,
    arXiv:2404.04656), without the shift of the rewards that unpaired answers need."""
    return -logsigmoid(s.beta * s.pairs.chosen_ratio) - logsigmoid(-s.beta * s.pairs.rejected_ratio)


def _sppo_hard(s: Scored) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2: self-play where the winner always wins (Wu et al. 2024,
    arXiv:2405.00675, eq. 4.7)."""
    half = 0.5 / s.beta
    return (s.pairs.chosen_ratio - half).square() + (s.pairs.rejected_ratio + half).square()


def _aot(s: Scored) -> Tensor:
    """The i-th smallest log p_w - log p_l of the batch against the i-th smallest of the reference: one distribution is
    to dominate the other (Melnyk et al. 2024, arXiv:2406.05882)."""
    pairs = s.pairs
    own, reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return s.smoothed(s.beta * (own.sort().values - reference.sort().values))


def _aot_unpaired(s: Scored) -> Tensor:
    """As `_aot`, the i-th smallest r_w of the batch against the i-th smallest r_l."""
    return s.smoothed(s.beta * (s.pairs.chosen_ratio.sort().values - s.pairs.rejected_ratio.sort().values))


def _apo_zero(s: Scored) -> Tensor:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l): chosen answers are better than the model's (D'Oosterlinck et al. 2024,
    arXiv:2408.06266, eq. 7)."""
    return 1 - torch.sigmoid(s.beta * s.pairs.chosen_ratio) + torch.sigmoid(s.beta * s.pairs.rejected_ratio)


def _apo_down(s: Scored) -> Tensor:
    """sigmoid(beta r_w) + 1 - sigmoid(beta d): chosen answers are worse than the model's (eq. 8 there)."""
    ratio = s.pairs.chosen_ratio
    return torch.sigmoid(s.beta * ratio) + 1 - torch.sigmoid(s.beta * (ratio - s.pairs.rejected_ratio))


def _discopop(s: Scored) -> Tensor:
    """Logistic and exponential loss, mixed by sigmoid(beta d / tau) (Lu et al. 2024, arXiv:2406.08414, eq. 5)."""
    logits = s.beta * s.delta
    mix = torch.sigmoid(logits / s.options.discopop_tau)
    return -(1 - mix) * logsigmoid(logits) + mix * torch.exp((-logits).clamp(max=LARGEST))


def _sft(s: Scored) -> Tensor:
    """The mean negative log-likelihood of a token of the chosen answer, as added in iterative RPO (Pang et al. 2024,
    arXiv:2404.19733) and MPO (Wang et al. 2024, arXiv:2411.10442)."""
    return -s.pairs.chosen_mean


def _simpo(s: Scored) -> Tensor:
    """-log sigmoid(beta (mean log p_w - mean log p_l) - gamma) (Meng et al. 2024, arXiv:2405.14734)."""
    by_token = s.pairs.chosen_mean - s.pairs.rejected_mean
    return s.smoothed(s.beta * by_token - s.options.simpo_gamma - s.margin)


def _cpo(s: Scored) -> Tensor:
    """-log sigmoid(beta (log p_w - log p_l)), and the chosen answer learned (Xu et al. 2024, arXiv:2401.08417)."""
    preferred = s.smoothed(s.beta * (s.pairs.chosen - s.pairs.rejected) - s.margin)
    return preferred - s.options.cpo_alpha * s.pairs.chosen_mean


def _orpo(s: Scored) -> Tensor:
    """The chosen answer learned, and beta times -log sigmoid of the log odds ratio of the answers, whose probability is
    the geometric mean of their tokens' (Hong et al. 2024, arXiv:2403.07691)."""
    odds = [
        mean - torch.log(-torch.expm1(mean.clamp(max=-1e-7))) for mean in (s.pairs.chosen_mean, s.pairs.rejected_mean)
    ]
    return -s.pairs.chosen_mean - s.beta * logsigmoid(odds[0] - odds[1])


LOSSES: dict[str, Callable[[Scored], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
    "simpo": _simpo,
    "cpo": _cpo,
    "orpo": _orpo,
}
"""By the names that TRL has for them."""
OLDER_NAMES = {"aot_pair": "aot"}
WITHOUT_REFERENCE = {"sft", "simpo", "cpo", "orpo"}
OVER_THE_BATCH = {"aot", "aot_unpaired"}
"""Those that compare the pairs of a micro-batch with each other, so that it can't be divided."""
TAKE_MARGIN = {"sigmoid", "hinge", "robust", "sigmoid_norm", "simpo", "cpo", "sft"}
TAKE_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
TAKE_SMOOTHING = {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo", "sft"}


def check_options(options: PreferenceOptions) -> None:
    """Raises TunesmithError for an unknown name, a parameter out of its range, and one that a loss would ignore."""
    names = [name for name, _ in options.losses]
    for name in names:
        if name not in LOSSES:
            raise TunesmithError(
                f"loss_type: {name!r} is unknown{nearest(name, LOSSES)}; there are {', '.join(LOSSES)}"
            )
    if options.divergence not in get_args(Divergence):
        raise TunesmithError(
            f"f_divergence_type is {options.divergence!r}; choose {' | '.join(get_args(Divergence))}"
            f"{nearest(options.divergence, get_args(Divergence))}"
        )
    if not options.beta > 0:
        raise TunesmithError(f"beta is {options.beta}; write a number above 0, such as 0.1")
    smoothing = options.label_smoothing
    if not 0 <= smoothing < 0.5:
        raise TunesmithError(
            f"label_smoothing is {smoothing}: as the share of pairs that are the wrong way around, it is 0 to below 0.5"
        )
    if "exo_pair" in names and smoothing == 0:
        raise TunesmithError(
            "loss_type: exo_pair compares with probabilities of 1 - label_smoothing and label_smoothing, and the log "
            "of 0 is infinite; write label_smoothing: 0.001, as its paper does"
        )
    if options.ld_alpha is not None and not 0 <= options.ld_alpha <= 1:
        raise TunesmithError(
            f"ld_alpha is {options.ld_alpha}; write a number from 0 (ignore the longer one's rest) to 1"
        )
    if not options.discopop_tau > 0:
        raise TunesmithError(f"discopop_tau is {options.discopop_tau}; write a number above 0, such as 0.05")
    _check_known(names, "label_smoothing", smoothing != 0, TAKE_SMOOTHING)
    _check_known(names, "f_divergence_type", options.divergence != "reverse_kl", TAKE_DIVERGENCE)
    if options.reference_free and not any(name not in WITHOUT_REFERENCE for name in names):
        raise TunesmithError(f"reference_free: loss_type {', '.join(names)} has no reference anyway; leave it out")


def _check_known(names: Sequence[str], setting: str, given: bool, known: set[str]) -> None:
    """Raises for a setting that one of the losses does not know."""
    ignoring = [name for name in names if name not in known]
    if given and ignoring:
        raise TunesmithError(
            f"{setting} is set, and loss_type: {ignoring[0]} does not know it; leave it out, or take one of "
            f"{', '.join(sorted(known - {'sft'}))}"
        )


def kto_loss(
    ratios: Tensor,
    good: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """(N,) The loss of answers that were judged, from their log-ratios (N,) and whether each is `good` (N,).

    1 - sigmoid(beta (r - z)) of a good answer, 1 - sigmoid(beta (z - r)) of a bad one, z the scalar `kl`, an estimate
    of the divergence from the reference, which has no gradient (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).
    """
    distance = torch.where(good, ratios - kl.detach(), kl.detach() - ratios)
    weights = torch.where(good, desirable_weight, undesirable_weight)
    return weights * (1 - torch.sigmoid(beta * distance))


def apo_zero_unpaired_loss(
    ratios: Tensor,
    good: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """(N,) 1 - sigmoid(beta r) of a good answer, sigmoid(beta r) of a bad one: `apo_zero` for answers that are judged
    one by one (arXiv:2408.06266)."""
    weights = torch.where(good, desirable_weight, undesirable_weight)
    return weights * torch.where(good, 1 - torch.sigmoid(beta * ratios), torch.sigmoid(beta * ratios))


def kl_estimate(ratios: Tensor) -> Tensor:
    """The scalar z of `kto_loss`: the mean log-ratio (N,) of answers to other prompts, and 0 at the least."""
    return ratios.mean().clamp(min=0).detach() if len(ratios) else ratios.new_zeros(())


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coefficient: float = 0.0
) -> Tensor:
    """(P,) -log sigmoid(r_w - r_l - margin) of rewards (P,) (Bradley and Terry 1952; the margin as in Llama 2,
    arXiv:2307.09288), and `center_coefficient` times (r_w + r_l)^2, which keeps them around 0 (Eisenstein et al. 2023,
    arXiv:2312.09244)."""
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -logsigmoid(difference) + center_coefficient * (chosen + rejected).square()
