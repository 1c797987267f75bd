"""The divergence from a teacher: by hand, and against all logits at once, in values and gradients."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from tunesmith.model.head import LogitForm, Predictions
from tunesmith.objectives import logprobs
from tunesmith.objectives.distillation import (
    DistillationOptions,
    Teacher,
    TopLogProbs,
    distillation_loss,
    divergence,
    top_logprobs,
)

POSITIONS, VOCABULARY, TEMPERATURE = 23, 11, 1.7


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * VOCABULARY * 5)


def predictions(size: int, seed: int, vocabulary: int = VOCABULARY, **given: Any) -> Predictions:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    made: dict[str, Any] = {"weight": random(vocabulary, size), "bias": random(vocabulary), "tokens": tokens}
    return Predictions(hidden=random(POSITIONS, size), **made | given)


def plain_logits(given: Predictions) -> Tensor:
    if given.weight is None:
        return given.hidden
    logits = given.form.scale * torch.nn.functional.linear(given.hidden, given.weight, given.bias)
    cap = given.form.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain_divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    def kl(one: Tensor, other: Tensor) -> Tensor:
        return kl_div(other, one, log_target=True, reduction="none").sum(dim=-1)

    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def events(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The chosen tokens, and all others as one."""
    chosen = log_probs.exp().gather(1, tokens)
    return torch.cat([chosen, 1 - chosen.sum(dim=-1, keepdim=True)], dim=-1).log()


def expected(student: Predictions, teacher: Predictions, top: int | None, options: DistillationOptions) -> Tensor:
    logits = plain_logits(student)
    log_q = (logits / options.temperature).log_softmax(dim=-1)
    log_p = (plain_logits(teacher) / options.temperature).log_softmax(dim=-1)
    if top is not None:
        tokens = log_p.topk(top).indices
        log_q, log_p = events(log_q, tokens), events(log_p, tokens)
    nll = cross_entropy(logits, student.tokens, reduction="none")
    losses = (1 - options.supervised) * plain_divergence(log_p, log_q, options.beta) + options.supervised * nll
    return losses if student.weights is None else losses * student.weights


def leaves(given: Predictions) -> tuple[Predictions, list[Tensor]]:
    named = {name: getattr(given, name) for name in ("hidden", "weight", "bias")}
    copies = {name: value.clone().requires_grad_() for name, value in named.items() if value is not None}
    return replace(given, **copies), list(copies.values())


def check(student: Predictions, teacher: Predictions, options: DistillationOptions, top: int | None = None) -> None:
    said: Teacher = teacher if top is None else top_logprobs(teacher, top, options.temperature)
    ours, own = leaves(student)
    found = distillation_loss(ours, said, options)
    (found.loss * 3).backward()
    plain, theirs = leaves(student)
    losses = expected(plain, teacher, top, options)
    (losses.sum() * 3).backward()
    assert float(found.loss) == pytest.approx(float(losses.sum()), rel=1e-5)
    for mine, other in zip(own, theirs, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_values_and_gradients_are_those_of_all_logits_at_once(beta: float, top: int | None) -> None:
    weights = torch.rand(POSITIONS, generator=torch.Generator().manual_seed(3))
    student = predictions(6, 1, weights=weights, form=LogitForm(scale=0.7, softcap=2.5))
    options = DistillationOptions(beta=beta, temperature=TEMPERATURE, supervised=0.25)
    check(student, predictions(8, 2), options, top)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_logits_of_the_model_itself_are_taken_too(beta: float) -> None:
    student = predictions(VOCABULARY, 1, weight=None, bias=None)
    check(student, predictions(VOCABULARY, 2, weight=None, bias=None), DistillationOptions(beta=beta))


def test_a_case_by_hand() -> None:
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2)
    log_p, log_q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    forward, _, _ = divergence(log_p, log_q, 0.0)
    backward, _, _ = divergence(log_p, log_q, 1.0)
    between, _, _ = divergence(log_p, log_q, 0.5)
    assert float(forward) == pytest.approx(0.25 * math.log(2))
    assert float(backward) == pytest.approx(0.25 * math.log(2))
    assert float(between) == pytest.approx(0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3))


def test_the_divergence_scaled_tends_to_each_kl() -> None:
    log_p, log_q = (torch.randn(4, 7, dtype=torch.float64).log_softmax(dim=-1) for _ in range(2))
    for small, limit in ((1e-6, 0.0), (1 - 1e-6, 1.0)):
        scaled = divergence(log_p, log_q, small)[0] / min(small, 1 - small)
        assert torch.allclose(scaled, divergence(log_p, log_q, limit)[0], rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_equal_distributions_have_no_loss_and_no_gradient_at_all(beta: float) -> None:
    student, inputs = leaves(predictions(6, 1))
    found = distillation_loss(student, predictions(6, 1), DistillationOptions(beta=beta, temperature=0.9))
    found.loss.backward()
    assert float(found.loss) == 0.0
    assert all(value.grad is not None and not value.grad.any() for value in inputs)


def test_certain_distributions_that_differ_have_finite_gradients() -> None:
    certain = torch.full((POSITIONS, VOCABULARY), -200.0)
    one, other = certain.clone(), certain.clone()
    one[:, 0], other[:, 1] = 200.0, 200.0
    for beta in (0.0, 0.5, 1.0):
        given = Predictions(hidden=one.clone().requires_grad_(), tokens=torch.zeros(POSITIONS, dtype=torch.long))
        found = distillation_loss(given, replace(given, hidden=other), DistillationOptions(beta=beta))
        found.loss.backward()
        assert given.hidden.grad is not None
        assert given.hidden.grad.isfinite().all()
        assert float(found.divergence[0]) == pytest.approx({0.0: 400.0, 0.5: math.log(2), 1.0: 400.0}[beta], rel=1e-5)


def test_the_likeliest_tokens_bound_the_divergence_from_below() -> None:
    student, teacher = predictions(6, 1), predictions(6, 2)
    options = DistillationOptions(beta=0.0)
    whole = distillation_loss(student, teacher, options).divergence
    few, more = (distillation_loss(student, top_logprobs(teacher, top, 1.0), options).divergence for top in (2, 10))
    assert (few <= more + 1e-6).all()
    assert torch.allclose(more, whole, atol=1e-5)  # of 11 tokens, one is left over
    said = top_logprobs(teacher, 2, 1.0)
    assert torch.allclose(said.logprobs.exp().sum(dim=-1), torch.ones(POSITIONS), atol=1e-6)


def test_a_teacher_with_more_rows_is_compared_over_the_tokens_of_both() -> None:
    teacher = predictions(6, 2)
    padded = replace(
        teacher,
        weight=torch.cat([teacher.weight, torch.ones(5, 6)]),  # type: ignore[list-item]
        bias=torch.cat([teacher.bias, torch.full((5,), 9.0)]),  # type: ignore[list-item]
    )
    student, options = predictions(6, 1), DistillationOptions(beta=0.5)
    expected_loss = distillation_loss(student, teacher, options).loss
    assert float(distillation_loss(student, padded, options).loss) == pytest.approx(float(expected_loss))
    wide, inputs = leaves(padded)
    distillation_loss(wide, student, options).loss.backward()
    assert inputs[1].grad is not None
    assert inputs[1].grad[VOCABULARY:].eq(0).all()


def test_answers_of_the_student_are_not_supervised() -> None:
    student, teacher = predictions(6, 1), predictions(6, 2)
    imitated = torch.arange(POSITIONS) < 10
    found = distillation_loss(student, teacher, DistillationOptions(supervised=1.0), imitated)
    assert float(found.loss) == pytest.approx(float(found.divergence[:10].sum() + found.nll[10:].sum()))


def test_no_positions_keep_their_graph() -> None:
    student = predictions(6, 1, tokens=torch.zeros(0, dtype=torch.long))
    student = replace(student, hidden=torch.zeros(0, 6, requires_grad=True))
    said = TopLogProbs(tokens=torch.zeros(0, 2, dtype=torch.long), logprobs=torch.zeros(0, 3))
    loss = distillation_loss(student, said, DistillationOptions()).loss
    loss.backward()
    assert float(loss) == 0.0
    assert student.hidden.grad is not None
