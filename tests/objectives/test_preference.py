"""Each preference loss by hand, on one pair whose log-ratios are 1 and -1, and what is refused."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.test_supervised import inputs, predictions, reference_logits
from tunesmith.errors import TunesmithError
from tunesmith.objectives.logprobs import token_logprobs
from tunesmith.objectives.preference import (
    LOSSES,
    PreferenceOptions,
    Scored,
    apo_zero_unpaired_loss,
    bradley_terry_loss,
    check_options,
    kl_estimate,
    kto_loss,
    pair_weights,
    pairs_of_tokens,
    preference_loss,
)

CHOSEN, REJECTED = [-1.0, -2.0], [-2.0, -2.0, -1.0]  # sums -3 and -5, means -1.5 and -5/3
REF_CHOSEN, REF_REJECTED = [-2.0, -2.0], [-1.5, -1.5, -1.0]  # sums -4 and -4: log-ratios 1 and -1, difference 2
OTHER = ([-1.0], [-1.0, -2.0], [-2.5], [-2.0, -0.5])  # log-ratios 1.5 and -0.5


def tensors(*lists: list[float]) -> list[Tensor]:
    return [torch.tensor(values) for values in lists]


def loss(name: str, *, margin: float | None = None, **options: Any) -> float:
    """Of the one pair, with beta 1/2, so that beta times the difference is 1."""
    given = PreferenceOptions(losses=((name, 1.0),), **{"beta": 0.5} | options)
    pairs = pairs_of_tokens(tensors(CHOSEN, REJECTED), tensors(REF_CHOSEN, REF_REJECTED), given.ld_alpha)
    return float(preference_loss(pairs, given, None if margin is None else torch.tensor([margin]))[0])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


LOG = math.log
NLL_1, NLL_MINUS_1 = 0.3132617, 1.3132617  # -log sigmoid of 1 and of -1
NLL_HALF, NLL_MINUS_HALF = 0.4740770, 0.9740770


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", {}, NLL_1),
        ("sigmoid", {"label_smoothing": 0.1}, 0.9 * NLL_1 + 0.1 * NLL_MINUS_1),
        ("sigmoid", {"margin": 2.0}, NLL_MINUS_1),
        ("sigmoid", {"ld_alpha": 0.5}, -LOG(sigmoid(0.5 * (1 - (-1.0 + 0.0))))),  # the third token's ratio is 0
        ("hinge", {}, 0.0),
        ("hinge", {"beta": 0.25}, 0.5),
        ("hinge", {"margin": 0.5}, 0.5),
        ("ipo", {}, (0.5 + 1 / 3 - 1) ** 2),
        ("sigmoid_norm", {}, -LOG(sigmoid(0.5 * (0.5 + 1 / 3)))),
        ("robust", {"label_smoothing": 0.1}, (0.9 * NLL_1 - 0.1 * NLL_MINUS_1) / 0.8),
        (
            "exo_pair",
            {"label_smoothing": 0.1},
            sigmoid(1) * (-NLL_1 - LOG(0.9)) + sigmoid(-1) * (-NLL_MINUS_1 - LOG(0.1)),
        ),
        ("nca_pair", {}, NLL_HALF + 0.5 * NLL_MINUS_HALF + 0.5 * NLL_HALF),
        ("bco_pair", {}, 2 * NLL_HALF),
        ("sppo_hard", {}, 0.0),
        ("sppo_hard", {"beta": 0.25}, 2.0),
        ("apo_zero", {}, 2 * sigmoid(-0.5)),
        ("apo_down", {}, sigmoid(0.5) + 1 - sigmoid(1)),
        ("discopop", {"discopop_tau": 1.0}, (1 - sigmoid(1)) * NLL_1 + sigmoid(1) * math.exp(-1)),
        ("sft", {}, 1.5),
        ("simpo", {"beta": 2.0, "simpo_gamma": 0.5}, -LOG(sigmoid(2 * (5 / 3 - 1.5) - 0.5))),
        ("cpo", {}, NLL_1 + 1.5),  # -3 and -5: the difference is 2 without the reference, too
        ("cpo", {"cpo_alpha": 0.0}, NLL_1),
        (
            "orpo",
            {},
            1.5 - 0.5 * LOG(sigmoid((-1.5 - LOG(1 - math.exp(-1.5))) - (-5 / 3 - LOG(1 - math.exp(-5 / 3))))),
        ),
        ("sigmoid", {"divergence": "forward_kl"}, -LOG(sigmoid(0.5 * (math.e - 1 / math.e)))),
        ("sigmoid", {"divergence": "js_divergence"}, -LOG(sigmoid(0.5 * (NLL_MINUS_1 - NLL_1)))),
        (
            "sigmoid",
            {"divergence": "alpha_divergence", "divergence_alpha": 0.5},
            -LOG(sigmoid(0.5 * -2 * (math.exp(-0.5) - math.exp(0.5)))),
        ),
        ("sigmoid", {"divergence": "alpha_divergence", "divergence_alpha": 1.0}, NLL_1),
    ],
)
def test_by_hand(name: str, options: dict[str, Any], expected: float) -> None:
    assert loss(name, **options) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_aot_compares_sorted_batches() -> None:
    """Differences of the model are 2 and 2 (sums -3 and -5, -1 and -3), of the reference 0 and 0."""
    logprobs, reference = tensors(CHOSEN, REJECTED, *OTHER[:2]), tensors(REF_CHOSEN, REF_REJECTED, *OTHER[2:])
    pairs = pairs_of_tokens(logprobs, reference)
    paired = preference_loss(pairs, PreferenceOptions(losses=(("aot", 1.0),), beta=0.5))
    assert paired.tolist() == pytest.approx([NLL_1, NLL_1], rel=1e-5)
    unpaired = preference_loss(pairs, PreferenceOptions(losses=(("aot_unpaired", 1.0),), beta=0.5))
    # r_w sorted: 1, 1.5; r_l sorted: -1, -0.5
    assert unpaired.tolist() == pytest.approx([NLL_1, NLL_1], rel=1e-5)


def test_losses_add_with_their_weights() -> None:
    options = PreferenceOptions(losses=(("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)), beta=0.5)
    pairs = pairs_of_tokens(tensors(CHOSEN, REJECTED), tensors(REF_CHOSEN, REF_REJECTED))
    assert float(preference_loss(pairs, options)) == pytest.approx(0.8 * NLL_1 + 0.4 * NLL_HALF + 1.5, rel=1e-5)


def test_without_a_reference_only_the_model_counts() -> None:
    pairs = pairs_of_tokens(tensors(CHOSEN, REJECTED), None)
    assert (float(pairs.chosen_ratio), float(pairs.rejected_ratio)) == (-3.0, -5.0)
    assert not PreferenceOptions(losses=(("simpo", 1.0), ("sft", 1.0))).needs_reference
    assert PreferenceOptions(losses=(("simpo", 1.0), ("hinge", 1.0))).needs_reference
    assert not PreferenceOptions(reference_free=True).needs_reference


def test_ld_alpha_weighs_what_the_longer_answer_has_more() -> None:
    pairs = pairs_of_tokens(tensors([-1.0, -2.0, -4.0], [-1.0]), tensors([-1.0] * 3, [-3.0]), 0.25)
    assert (float(pairs.chosen), float(pairs.rejected)) == (-1.0 + 0.25 * -6.0, -1.0)
    assert (float(pairs.ref_chosen), float(pairs.ref_rejected)) == (-1.0 + 0.25 * -2.0, -3.0)
    assert float(pairs.chosen_mean) == pytest.approx(-7 / 3)
    assert float(pairs.chosen_tokens) == 3.0


def test_weights_of_wpo() -> None:
    """exp of the mean of log p - log of the sum of squares: -1.5 - -0.5 and -5/3 - -1."""
    weights = pair_weights(tensors(CHOSEN, REJECTED), tensors([-0.5, -0.5], [-1.0, -1.0, -1.0]))
    assert float(weights) == pytest.approx(math.exp(-1.0 + -5 / 3 + 1.0), rel=1e-6)


def test_the_collision_of_a_prediction_is_the_log_of_its_summed_squares() -> None:
    x = inputs()
    scored = token_logprobs(predictions(x), with_collision=True)
    assert scored.collision is not None
    expected = reference_logits(x).softmax(dim=-1).square().sum(dim=-1).log()
    torch.testing.assert_close(scored.collision, expected.detach())
    assert token_logprobs(predictions(x)).collision is None


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_has_a_gradient_that_prefers_the_chosen_answer(name: str) -> None:
    """Or learns it. The numeric gradient agrees."""
    check = torch.autograd.gradcheck

    def of(chosen: Tensor, rejected: Tensor) -> Tensor:
        options = PreferenceOptions(losses=((name, 1.0),), beta=0.3, label_smoothing=0.1)
        pairs = pairs_of_tokens([chosen, rejected], [item.double() for item in tensors([-0.7, -0.9], [-1.1, -1.0, -1])])
        return LOSSES[name](Scored(pairs, options))

    answers = [
        torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in ([-1.0, -0.5], [-2.0, -1, -1])
    ]
    assert check(of, answers)
    gradient = torch.autograd.grad(of(*answers).sum(), answers[0])[0]
    if name != "apo_down":
        assert (gradient < 0).all()


def test_kto() -> None:
    ratios, good = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    losses = kto_loss(ratios, good, torch.tensor(0.5), beta=2.0, desirable_weight=3.0, undesirable_weight=0.5)
    assert losses.tolist() == pytest.approx([3 * (1 - sigmoid(1)), 0.5 * (1 - sigmoid(-1))], rel=1e-5)
    assert float(kl_estimate(torch.tensor([1.0, 2.0]))) == 1.5
    assert float(kl_estimate(torch.tensor([-1.0, -2.0]))) == 0.0


def test_apo_zero_of_answers_judged_one_by_one() -> None:
    good = torch.tensor([True, False])
    losses = apo_zero_unpaired_loss(torch.tensor([1.0, 1.0]), good, beta=2.0, undesirable_weight=0.5)
    assert losses.tolist() == pytest.approx([sigmoid(-2), 0.5 * sigmoid(2)], rel=1e-5)


def test_bradley_terry() -> None:
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    assert float(bradley_terry_loss(chosen, rejected)) == pytest.approx(NLL_1, rel=1e-5)
    margin = torch.tensor([0.5])
    assert float(bradley_terry_loss(chosen, rejected, margin, 0.01)) == pytest.approx(NLL_HALF + 0.09, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"losses": (("sigmod", 1.0),)}, "'sigmod' is unknown.*sigmoid"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"losses": (("exo_pair", 1.0),)}, "write label_smoothing: 0.001"),
        ({"losses": (("hinge", 1.0),), "label_smoothing": 0.1}, "label_smoothing is set, and loss_type: hinge"),
        ({"losses": (("apo_zero", 1.0),), "divergence": "forward_kl"}, "f_divergence_type is set"),
        ({"divergence": "kl"}, "f_divergence_type is 'kl'; choose reverse_kl"),
        ({"ld_alpha": 2.0}, "ld_alpha is 2.0"),
        ({"losses": (("simpo", 1.0),), "reference_free": True}, "has no reference anyway"),
        ({"losses": (("discopop", 1.0),), "discopop_tau": 0.0}, "discopop_tau is 0.0"),
    ],
)
def test_what_is_refused(change: dict[str, Any], problem: str) -> None:
    check_options(PreferenceOptions())
    with pytest.raises(TunesmithError, match=problem):
        check_options(replace(PreferenceOptions(), **change))
