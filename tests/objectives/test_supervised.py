"""The fused loss against PyTorch's own, values and gradients."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.model.head import LogitForm, Predictions
from tunesmith.objectives import logprobs
from tunesmith.objectives.supervised import LossOptions, Supervised, supervised_loss

S, H, V = 11, 6, 13


@dataclass
class Inputs:
    """A head, hidden states, targets and weights, all of them random; the first three with gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    weights: Tensor | None

    @property
    def differentiable(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]


def inputs(size: int = S, bias: bool = True, weights: bool = False, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    return Inputs(
        hidden=random(size, H),
        weight=random(V, H),
        bias=random(V) if bias else None,
        targets=torch.randint(0, V, (size,), generator=generator),
        weights=torch.rand(size, generator=generator) * 2 if weights else None,
    )


def predictions(x: Inputs, scale: float = 1.0, softcap: float | None = None) -> Predictions:
    form = LogitForm(scale=scale, softcap=softcap)
    return Predictions(hidden=x.hidden, tokens=x.targets, weights=x.weights, weight=x.weight, bias=x.bias, form=form)


def fused(x: Inputs, smoothing: float = 0.0, dft: bool = False, **form: Any) -> Supervised:
    return supervised_loss(predictions(x, **form), LossOptions(smoothing=smoothing, dft=dft))


def reference_logits(x: Inputs, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    logits = scale * torch.nn.functional.linear(x.hidden.float(), x.weight.float(), x.bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference(x: Inputs, scale: float = 1.0, softcap: float | None = None, smoothing: float = 0.0) -> Tensor:
    """Each position's loss, by PyTorch."""
    logits = reference_logits(x, scale, softcap)
    losses = torch.nn.functional.cross_entropy(logits, x.targets, reduction="none", label_smoothing=smoothing)
    return losses if x.weights is None else losses * x.weights


def gradients(loss: Tensor, x: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(loss, x.differentiable, retain_graph=True))


def assert_same(found: Tensor, expected: Tensor, x: Inputs) -> None:
    """The losses agree, and so do the gradients of everything, for a loss that is scaled like in a step."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(found * 0.37, x), gradients(expected * 0.37, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "smoothing": {"smoothing": 0.1},
    "all": {"scale": 1.7, "softcap": 2.0, "smoothing": 0.2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "ones"])
def test_value_and_gradients_are_those_of_torch(options: dict[str, Any], bias: bool, weights: bool) -> None:
    x = inputs(bias=bias, weights=weights)
    assert_same(fused(x, **options).loss, reference(x, **options).sum(), x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dft_weighs_each_token_by_its_own_probability_without_gradient(smoothing: float) -> None:
    x = inputs(weights=True)
    probability = torch.softmax(reference_logits(x), dim=-1).gather(1, x.targets[:, None])[:, 0].detach()
    expected = (reference(x, smoothing=smoothing) * probability).sum()
    assert_same(fused(x, dft=True, smoothing=smoothing).loss, expected, x)


@pytest.mark.parametrize("rows", [1, 2, 3, S - 1, S, S + 1])
def test_chunks_of_any_size_give_the_same_loss_and_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(weights=True)
    whole = fused(x, softcap=2.0, smoothing=0.1)
    expected = gradients(whole.loss, x)
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", rows * 4 * V)
    parts = fused(x, softcap=2.0, smoothing=0.1)
    torch.testing.assert_close(parts.loss, whole.loss)
    for name in ("nll", "entropy", "correct"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    for ours, theirs in zip(gradients(parts.loss, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_half_precision_on_a_cpu_chunks_have_one_of_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 100 * 4 * V)
    weight, sizes = torch.zeros(V, H, dtype=torch.bfloat16), set[int]()
    for count in range(1, 300):
        parts = list(logprobs.chunks(torch.zeros(count, H), weight))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
        sizes |= {part.stop - part.start for part in parts}
    assert sizes == {*range(1, 16), *range(16, 100, 16), 100}


def test_a_chunk_holds_one_row_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 1)
    assert_same(fused(x).loss, reference(x).sum(), x)


def test_no_supervised_position_gives_zero_loss_and_zero_gradients_with_the_graph_kept() -> None:
    x = inputs(size=0)
    result = fused(x)
    assert result.loss.item() == 0.0
    assert result.loss.requires_grad
    hidden, weight, bias = gradients(result.loss, x)
    assert hidden.shape == (0, H)
    assert not weight.any()
    assert not bias.any()
    assert result.nll.shape == result.entropy.shape == result.correct.shape == (0,)


def test_gradients_pass_numerical_differentiation() -> None:
    """Central differences of the loss, which is computed in fp32: hence the step and the tolerance."""
    x = inputs(size=4, weights=True)
    options: dict[str, Any] = {"scale": 1.3, "softcap": 2.0, "smoothing": 0.1}
    hidden = gradients(fused(x, **options).loss, x)[0]
    step, numerical = 1e-2, torch.empty_like(hidden)
    with torch.no_grad():
        for i in range(hidden.numel()):
            ends = []
            for sign in (1, -1):
                moved = x.hidden.clone()
                moved.view(-1)[i] += sign * step
                ends.append(fused(replace(x, hidden=moved), **options).loss)
            numerical.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(hidden, numerical, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("bias",)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_its_own(frozen: tuple[str, ...]) -> None:
    x = inputs()
    for name in frozen:
        getattr(x, name).requires_grad_(False)
    fused(x).loss.backward()
    found = {name: getattr(x, name).grad for name in ("hidden", "weight", "bias")}
    trained = found.keys() - set(frozen)
    assert all(found[name] is None for name in frozen)
    for name in trained:
        (expected,) = torch.autograd.grad(reference(x).sum(), [getattr(x, name)])
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_is_computed_for_them() -> None:
    x = inputs()
    with torch.no_grad():
        result = fused(x)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, reference(x).sum())


def test_the_loss_is_differentiable_through_hidden_states_made_by_a_layer() -> None:
    x = inputs()
    layer = torch.nn.Linear(H, H)
    hidden = layer(x.hidden)
    fused(replace(x, hidden=hidden)).loss.backward()
    found = layer.weight.grad
    assert found is not None
    logits = torch.nn.functional.linear(layer(x.hidden), x.weight, x.bias)
    (expected,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, x.targets, reduction="sum"), [layer.weight]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_bf16_heads_sum_in_fp32() -> None:
    """4,096 losses of about 2.6: in bf16 their sum could not be told from its neighbours 64 apart."""
    x = inputs(size=4096, dtype=torch.bfloat16)
    result = fused(x)
    assert result.loss.dtype == result.nll.dtype == result.entropy.dtype == torch.float32
    logits = torch.nn.functional.linear(x.hidden, x.weight, x.bias).float()
    expected = torch.nn.functional.cross_entropy(logits, x.targets, reduction="sum")
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=0.0)
    for ours, theirs in zip(gradients(result.loss, x), gradients(expected, x), strict=True):
        assert ours.dtype == torch.bfloat16
        # bf16 has 8 bits: the two round at different places.
        assert float((ours - theirs).norm() / theirs.norm()) < 2**-7


def test_the_gradient_of_a_bf16_head_is_summed_over_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(size=4096, dtype=torch.bfloat16)
    whole = gradients(fused(x).loss, x)[1]
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 8 * 4 * V)
    parts = gradients(fused(x).loss, x)[1]
    assert float((parts - whole).norm() / whole.norm()) < 2**-7


def test_fp32_hidden_states_meet_a_bf16_head() -> None:
    x = inputs()
    x.weight = x.weight.detach().bfloat16()
    x.bias = None
    result = fused(x)
    expected = torch.nn.functional.linear(x.hidden.bfloat16(), x.weight).float()
    torch.testing.assert_close(
        result.loss, torch.nn.functional.cross_entropy(expected, x.targets, reduction="sum"), rtol=1e-6, atol=1e-6
    )
    assert gradients(result.loss, x)[0].dtype == torch.float32


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_reported_is_the_plain_loss_the_entropy_and_the_accuracy(options: dict[str, Any]) -> None:
    x = inputs(weights=True)
    result = fused(x, **options)
    logits = reference_logits(x, options.get("scale", 1.0), options.get("softcap"))
    torch.testing.assert_close(result.nll, torch.nn.functional.cross_entropy(logits, x.targets, reduction="none"))
    torch.testing.assert_close(result.entropy, torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(result.correct, logits.argmax(dim=-1) == x.targets)
    assert not any(t.requires_grad for t in (result.nll, result.entropy, result.correct))


def test_a_uniform_prediction_has_the_entropy_of_the_vocabulary() -> None:
    result = supervised_loss(
        Predictions(hidden=torch.zeros(2, H), weight=torch.randn(V, H), tokens=torch.tensor([0, 1]))
    )
    torch.testing.assert_close(result.entropy, torch.full((2,), float(V)).log())
    torch.testing.assert_close(result.nll, torch.full((2,), float(V)).log())


def test_a_token_that_the_head_rules_out_leaves_no_nan() -> None:
    bias = torch.zeros(V)
    bias[5] = float("-inf")
    tokens = torch.tensor([0, 1, 2])
    result = supervised_loss(Predictions(hidden=torch.randn(3, H), weight=torch.randn(V, H), bias=bias, tokens=tokens))
    assert bool(result.entropy.isfinite().all())
    assert bool(result.loss.isfinite())


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"dft": True}], ids=[*OPTIONS, "dft"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "ones"])
def test_the_loss_from_finished_logits_is_the_same(options: dict[str, Any], weights: bool) -> None:
    x = inputs(weights=weights)
    expected = fused(x, **options)
    logits = reference_logits(x, options.get("scale", 1.0), options.get("softcap"))
    own = Predictions(hidden=logits, tokens=x.targets, weights=x.weights)
    result = supervised_loss(own, LossOptions(smoothing=options.get("smoothing", 0.0), dft=options.get("dft", False)))
    for name in ("loss", "nll", "entropy", "correct"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(result.loss, x), gradients(expected.loss, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
