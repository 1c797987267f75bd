"""Advantages and policy losses against numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.model.head import LogitForm, Predictions
from tunesmith.objectives.policy import (
    Divisor,
    Drawn,
    PolicyOptions,
    decoupled_advantages,
    divisors,
    group_advantages,
    leave_one_out,
    policy_logprobs,
    policy_losses,
    sampler_correction,
    total_rewards,
)

NAN = math.nan


def test_group_advantages_are_deviations_from_the_mean_of_the_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    assert group_advantages(rewards, "none").tolist() == [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]]
    spreads = [math.sqrt(1 / 3), 1.0]
    by_group = group_advantages(rewards, "group")
    torch.testing.assert_close(by_group[:, 0], torch.tensor([0.5 / (spreads[0] + 1e-4), 1.5 / (spreads[1] + 1e-4)]))
    # All eight: mean 0.5, squares 2 * 0.25 + 5 * 0.25 + 2.25 = 4.
    by_batch = group_advantages(rewards, "batch")
    torch.testing.assert_close(by_batch[1, 0], torch.tensor(1.5 / (math.sqrt(4 / 7) + 1e-4)))


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage_whatever_rounds(scaling: Any) -> None:
    """The mean of 0.1 seven times is not 0.1 in fp32."""
    rewards = torch.tensor([[0.1] * 7, [0.1] * 6 + [0.9]])
    assert group_advantages(rewards, scaling)[0].tolist() == [0.0] * 7
    assert leave_one_out(rewards)[0].tolist() == [0.0] * 7


def test_an_answer_without_a_reward_takes_no_part() -> None:
    rewards = total_rewards(torch.tensor([[[1.0, NAN], [NAN, NAN], [0.0, 2.0]]]), torch.tensor([1.0, 0.5]))
    assert rewards[0, 0] == 1.0
    assert rewards[0, 1].isnan()
    assert group_advantages(torch.tensor([[2.0, NAN, 0.0]]), "none").tolist() == [[1.0, 0.0, -1.0]]
    assert leave_one_out(torch.tensor([[2.0, NAN, 0.0], [1.0, NAN, NAN]])).tolist() == [[2.0, 0.0, -2.0], [0.0] * 3]


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    torch.testing.assert_close(
        leave_one_out(torch.tensor([[1.0, 0.0, 0.0, 2.0]])), torch.tensor([[1 / 3, -1.0, -1.0, 5 / 3]])
    )
    normalized = leave_one_out(torch.tensor([[1.0, 0.0]]), normalized=True)
    torch.testing.assert_close(normalized, torch.tensor([[1.0, -1.0]]) / (math.sqrt(2) + 1e-4))


def test_decoupled_rewards_count_alike_whatever_their_size() -> None:
    rewards = torch.tensor([[[1.0, 100.0], [0.0, 0.0]]])
    scaled = (0.5) / (math.sqrt(0.5) + 1e-4)
    sums = torch.tensor([[2 * scaled, -2 * scaled]])
    expected = sums / (sums.std() + 1e-4)
    torch.testing.assert_close(decoupled_advantages(rewards, torch.ones(2)), expected)
    assert decoupled_advantages(torch.ones(1, 3, 2), torch.ones(2)).tolist() == [[0.0, 0.0, 0.0]]


# Two answers, of two tokens and of one. Their ratios are 1.5, 1.1 and 0.6.
RATIOS = torch.tensor([1.5, 1.1, 0.6])
BEFORE = torch.tensor([-1.0, -2.0, -0.5])
OWNER = torch.tensor([0, 0, 1])


def drawn(advantages: tuple[float, float] = (2.0, -1.0), **more: Any) -> Drawn:
    logprobs = (BEFORE + RATIOS.log()).requires_grad_()
    return Drawn(logprobs=logprobs, before=BEFORE, owner=OWNER, advantages=torch.tensor(advantages), **more)


def losses(given: Drawn, **options: Any) -> tuple[Tensor, Tensor]:
    """The losses (S,), and the gradient of their sum by the log-probabilities."""
    result = policy_losses(given, PolicyOptions(**options))
    (gradient,) = torch.autograd.grad(result.losses.sum(), given.logprobs)
    return result.losses.detach(), gradient


def close(found: Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_clip_takes_the_gradient_where_a_ratio_went_too_far() -> None:
    values, gradient = losses(drawn(), loss="grpo")
    close(values, -1.2 * 2, -1.1 * 2, 0.8)
    close(gradient, 0.0, -1.1 * 2, 0.0)
    higher, gradient = losses(drawn(), loss="dapo", epsilon_high=0.6)
    close(higher, -1.5 * 2, -1.1 * 2, 0.8)
    close(gradient, -1.5 * 2, -1.1 * 2, 0.0)
    result = policy_losses(drawn(), PolicyOptions(loss="bnpo"))
    assert (result.low.tolist(), result.high.tolist()) == ([False, False, True], [True, False, False])


def test_delta_bounds_the_ratio_of_bad_answers() -> None:
    values, gradient = losses(drawn((-2.0, -1.0)), loss="dr_grpo", delta=1.3)
    close(values, 1.3 * 2, 1.1 * 2, 0.8)
    close(gradient, 0.0, 1.1 * 2, 0.0)


def test_gspo_has_one_ratio_for_an_answer() -> None:
    mean = math.sqrt(1.5 * 1.1)
    values, gradient = losses(drawn(), loss="grpo", level="sequence", epsilon_high=0.5)
    close(values, -mean * 2, -mean * 2, 0.8)
    close(gradient, -mean * 2, -mean * 2, 0.0)  # two losses, of which each token has a half


def test_rloo_has_the_ratio_of_the_whole_answer() -> None:
    values, gradient = losses(drawn(), loss="grpo", level="product", epsilon_high=1.0)
    close(values, -1.65 * 2, -1.65 * 2, 0.8)
    close(gradient, -1.65 * 2 * 2, -1.65 * 2 * 2, 0.0)  # times 1 / 2, the scale of an answer of two tokens


def test_cispo_weighs_log_probabilities_by_a_bounded_ratio() -> None:
    given = drawn()
    values, gradient = losses(given, loss="cispo", epsilon_high=1.2)
    bounded = torch.tensor([1.2, 1.1, 0.6]) * torch.tensor([2.0, 2.0, -1.0])
    torch.testing.assert_close(values, -bounded * given.logprobs.detach())
    torch.testing.assert_close(gradient, -bounded)


def test_sapo_has_a_smooth_gate() -> None:
    values, gradient = losses(drawn(), loss="sapo")

    def gate(ratio: float, heat: float) -> float:
        return 4 / heat / (1 + math.exp(-heat * (ratio - 1)))

    close(values, -gate(1.5, 1.0) * 2, -gate(1.1, 1.0) * 2, gate(0.6, 1.05))
    # The slope at ratio 1 is that of the ratio.
    _, level = losses(
        Drawn(
            logprobs=BEFORE.clone().requires_grad_(),
            before=BEFORE,
            owner=OWNER,
            advantages=torch.tensor([2.0, -1.0]),
        ),
        loss="sapo",
    )
    close(level, -2.0, -2.0, 1.0)
    assert gradient[0] > -2.0 * 1.5


def test_vespo_weighs_by_the_ratio_of_the_whole_answer() -> None:
    given = drawn()
    values, gradient = losses(given, loss="vespo")
    good, bad = 1.65**2 * math.exp(3 * (1 - 1.65)), 0.6**3 * math.exp(2 * (1 - 0.6))
    expected = torch.tensor([-good * 2, -good * 2, bad])
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(values, expected * given.logprobs.detach())


def test_the_divergence_is_that_of_schulman_and_is_zero_on_the_reference() -> None:
    given = drawn((0.0, 0.0), reference=BEFORE)
    apart = -RATIOS.log()
    expected = apart.exp() - apart - 1
    values, gradient = losses(given, loss="grpo", beta=0.5, use_bias_correction_kl=False)
    torch.testing.assert_close(values, 0.5 * expected)
    torch.testing.assert_close(gradient, 0.5 * (1 - apart.exp()))
    corrected, _ = losses(drawn((0.0, 0.0), reference=BEFORE), loss="grpo", beta=0.5)
    torch.testing.assert_close(corrected, 0.5 * expected * RATIOS)
    level = policy_losses(
        Drawn(logprobs=BEFORE, before=BEFORE, reference=BEFORE, owner=OWNER, advantages=torch.zeros(2)),
        PolicyOptions(beta=0.5),
    )
    assert level.kl is not None
    assert level.kl.tolist() == [0.0, 0.0, 0.0]


def test_bad_answers_that_the_model_has_left_teach_nothing() -> None:
    values, _ = losses(drawn((2.0, -1.0)), loss="grpo", off_policy_mask_threshold=0.5)
    assert values[2] == 0.0  # -ln 0.6 is 0.51
    values, _ = losses(drawn((2.0, -1.0)), loss="grpo", off_policy_mask_threshold=0.52)
    assert values[2] == pytest.approx(0.8)


def test_what_makes_up_for_another_generator() -> None:
    sampled = BEFORE - torch.tensor([2.0, 1.5, NAN]).log()
    given = drawn(sampled=sampled)
    close(sampler_correction(given, "token_truncate", highest=1.8), 1.8, 1.5, 1.0)
    close(sampler_correction(given, "token_mask", highest=1.8), 0.0, 1.5, 1.0)
    close(sampler_correction(given, "sequence_truncate", highest=5.0), 3.0, 3.0, 1.0)
    close(sampler_correction(given, "sequence_mask", highest=2.9, lowest=0.5), 0.0, 0.0, 1.0)
    values, _ = losses(drawn(correction=torch.tensor([0.0, 1.0, 2.0])), loss="grpo")
    close(values, 0.0, -2.2, 1.6)


@pytest.mark.parametrize(
    ("loss", "level", "expected"),
    [
        ("grpo", "token", [(1 / 2, 1), (1 / 6, 1), (1, 1), (1 / 3, 1)]),
        ("sapo", "token", [(1 / 2, 1), (1 / 6, 1), (1, 1), (1 / 3, 1)]),
        ("bnpo", "token", [(1 / 8, 1 / 2), (1 / 8, 1 / 2), (1 / 4, 1 / 2), (1 / 4, 1 / 2)]),
        ("dr_grpo", "token", [(1, 10), (1, 10), (1, 10), (1, 10)]),
        ("dapo", "token", [(1, 3), (1, 3), (1, 3), (1, 3)]),
        ("luspo", "sequence", [(1, 1), (1, 1), (1, 1), (1, 1)]),
        ("grpo", "product", [(1 / 2, 1), (1 / 6, 1), (1, 1), (1 / 3, 1)]),
    ],
)
def test_by_what_a_step_is_divided(loss: Any, level: Any, expected: list[tuple[float, float]]) -> None:
    found = divisors(loss, [2, 6, 1, 3], micro_batch=2, longest=10, level=level)
    assert found == [Divisor(scale=scale, share=share) for scale, share in expected]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_log_probabilities_at_a_temperature_are_those_of_divided_logits(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 4, generator=generator), torch.randn(9, 4, generator=generator)
    tokens = torch.tensor([0, 3, 8, 2, 2])
    logits = 1.5 * hidden @ weight.t()
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    expected = (logits / 0.7).log_softmax(dim=-1)[torch.arange(5), tokens]
    form = LogitForm(scale=1.5, softcap=softcap)
    fused = Predictions(hidden=hidden.requires_grad_(), tokens=tokens, weight=weight, form=form)
    ours = policy_logprobs(fused, temperature=0.7).logprobs
    torch.testing.assert_close(ours, expected)
    (gradient,) = torch.autograd.grad(ours.sum(), hidden)
    again = hidden.detach().requires_grad_()
    plain = 1.5 * again @ weight.t()
    plain = plain if softcap is None else softcap * (plain / softcap).tanh()
    (wanted,) = torch.autograd.grad((plain / 0.7).log_softmax(dim=-1)[torch.arange(5), tokens].sum(), again)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    own = Predictions(hidden=logits, tokens=tokens)
    torch.testing.assert_close(policy_logprobs(own, temperature=0.7).logprobs, expected)
