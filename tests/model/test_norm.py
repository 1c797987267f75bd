"""RMS norms in fewer passes give the values and gradients of `transformers`, wherever its models have them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import gradient_error, gradients, tiny
from tunesmith.model import ways
from tunesmith.model.norm import speed_up_norms


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[ways.Kind]:
    """The kinds of calls that go our way: all that ask."""
    kinds: list[ways.Kind] = []
    monkeypatch.setattr(ways, "_forced", None)

    def always(kind: ways.Kind, *_: Any) -> bool:
        kinds.append(kind)
        return True

    monkeypatch.setattr(ways, "is_faster", always)
    return kinds


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=torch.arange(1, 22).view(1, -1)).logits
    logits.square().mean().backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_values_and_gradients_are_those_of_the_model(name: str, chosen: list[ways.Kind]) -> None:
    """Gemma multiplies by 1 + weight, Qwen3 and Gemma 3 have norms of single heads as well."""
    model: Any = tiny(name).train()
    logits, expected = step(model)
    norms = [n for n, module in model.named_modules() if "norm" in n.rpartition(".")[2]]
    speed_up_norms(model)
    assert not chosen
    fast_logits, found = step(model)
    assert len(chosen) == len(norms)
    torch.testing.assert_close(fast_logits, logits, rtol=1e-5, atol=1e-5)
    assert gradient_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_norm_of_bfloat16_is_computed_in_fp32_and_rounded_once(name: str, chosen: list[ways.Kind]) -> None:
    torch.manual_seed(0)
    model: Any = tiny(name)
    norm = model.model.norm
    norm.weight.data = torch.randn_like(norm.weight)
    speed_up_norms(norm.bfloat16())
    x, dy = torch.randn(2, 5, len(norm.weight)).bfloat16().requires_grad_(), torch.randn(2, 5, len(norm.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in a run
        y = norm(x)
    y.backward(dy.bfloat16())
    assert len(chosen) == 1
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    gains = weight + (1 if name == "gemma3_text" else 0)
    expected = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gains
    expected.backward(dy.bfloat16().double())
    pairs: list[Any] = [(y, expected), (x.grad, exact.grad), (norm.weight.grad, weight.grad)]
    for found, wanted in pairs:
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-6)


def test_only_what_computes_an_rms_norm_is_taken_for_one(chosen: list[ways.Kind]) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    class Gated(nn.RMSNorm):
        """As in Nemotron-H: without a gate, it computes an RMS norm."""

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(x if gate is None else x * nn.functional.silu(gate))

    norms = [kind(8, eps=1e-6) for kind in (nn.RMSNorm, nn.RMSNorm, Gated)]
    model = nn.ModuleList([nn.LayerNorm(8), nn.Linear(8, 8), Scale(), norms[0], norms[1].half(), norms[2]])
    speed_up_norms(model)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["3"]
    norm, x = model[3], torch.randn(2, 5, 8)
    torch.testing.assert_close(norm(x), nn.RMSNorm(8, eps=1e-6)(x))
    assert len(chosen) == 1
    norm(x.double()), norm(x[0, 0])  # what it doesn't take goes the plain way
    assert len(chosen) == 1


def test_a_trial_leaves_the_gradient_of_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_forced", None)
    kept = ways.state()
    ways.restore({})
    ways.begin_anew()
    norm, x = nn.ModuleList([nn.RMSNorm(8, eps=1e-6)]), torch.randn(5, 8, requires_grad=True)
    speed_up_norms(norm)
    y = norm[0](x)
    assert [kind[0] for kind in ways._chosen] == ["norm"]
    assert norm[0].weight.grad is None
    assert x.grad is None
    y.sum().backward()
    torch.testing.assert_close(norm[0].weight.grad, nn.functional.normalize(x.detach(), dim=-1).sum(0) * 8**0.5)
    ways.restore(kept)
