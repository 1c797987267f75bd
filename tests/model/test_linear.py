"""Linear layers and LoRA adapters in fewer passes: the same values and gradients as `torch` and `peft`."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from tests.models import gradient_error, tiny
from tunesmith.model import linear
from tunesmith.model.linear import product, speed_up

IDS = torch.arange(1, 22).view(1, -1) % 90


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Either matrix library, whatever a measurement would choose."""
    monkeypatch.setattr(linear, "_chosen", request.param)
    return bool(request.param)


def adapted(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # As zeros, they would hide every mistake; much larger ones would magnify rounding.
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def outcome(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """The logits and all gradients of one forward and backward."""
    model.zero_grad()
    torch.manual_seed(1)
    logits = model(input_ids=IDS, use_cache=False, **inputs).logits
    logits.float().square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradient_error(found, expected) < 1e-5


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_product_takes_transposed_factors_and_empty_ones(library: bool, bias: bool) -> None:
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    b = torch.randn(3) if bias else None
    expected = x @ weight.t() + (b if b is not None else 0.0)
    torch.testing.assert_close(product(x, weight, b), expected)
    torch.testing.assert_close(product(x.t().contiguous().t(), weight.t().contiguous().t(), b), expected)
    assert product(x[:0], weight).shape == (0, 3)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "opt"])
def test_full_training_has_the_gradients_of_the_plain_layers(library: bool, name: str) -> None:
    model = tiny(name).train()
    expected = outcome(model)
    speed_up(model)
    assert_same(outcome(model), expected)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_adapters_have_the_values_and_gradients_of_peft(library: bool, settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    expected = outcome(model)
    speed_up(model)
    assert_same(outcome(model), expected)


def test_base_weights_that_are_trained_beside_adapters_have_their_gradients() -> None:
    model = adapted().requires_grad_(True)
    expected = outcome(model)
    assert any("base_layer" in name for name in expected)
    speed_up(model)
    assert_same(outcome(model), expected)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_biases_that_are_trained_beside_adapters_have_their_gradients(library: bool, name: str, bias: Any) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", bias=bias, init_lora_weights=False)
    model = get_peft_model(tiny(name), config).train()
    expected = outcome(model)
    biases = {key for key in expected if key.endswith("base_layer.bias")}
    assert len(biases) == (6 if name == "qwen2" else 8)
    speed_up(model)
    assert_same(outcome(model), expected)


def test_layers_with_a_bias_and_several_tokens_per_row_are_adapted_alike(library: bool) -> None:
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(6, 5))
    model = get_peft_model(inside, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x, fast = torch.randn(2, 3, 6, requires_grad=True), copy.deepcopy(model)
    speed_up(fast)
    results = []
    for way in (model, fast):
        y = way(x)
        y.square().sum().backward()
        results.append((y, x.grad))
        x.grad = None
    torch.testing.assert_close(results[1], results[0])


def test_dropout_is_pefts_own(library: bool) -> None:
    model = adapted(lora_dropout=0.5)
    expected = outcome(model)
    speed_up(model)
    assert_same(outcome(model), expected)


def test_without_dropout_in_evaluation_the_fast_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(lora_dropout=0.5)
    speed_up(model)
    monkeypatch.setattr(LoraLinear, "forward", lambda *_: pytest.fail("the plain path"))
    model.eval()
    model(input_ids=IDS)
    with pytest.raises(pytest.fail.Exception, match="the plain path"):
        model.train()(input_ids=IDS)


def test_disabled_merged_and_switched_adapters_are_as_peft_has_them() -> None:
    model = adapted().eval()
    reference = copy.deepcopy(model)
    speed_up(model)
    for change in (lambda m: m.base_model.disable_adapter_layers(), lambda m: m.base_model.enable_adapter_layers()):
        for each in (model, reference):
            change(each)
        torch.testing.assert_close(model(input_ids=IDS).logits, reference(input_ids=IDS).logits)
    for each in (model, reference):
        each.merge_adapter()  # type: ignore[operator]
    torch.testing.assert_close(model(input_ids=IDS).logits, reference(input_ids=IDS).logits)
    for each in (model, reference):
        each.unmerge_adapter()  # type: ignore[operator]
        torch.manual_seed(3)
        each.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))  # type: ignore[operator]
        each.set_adapter("other")  # type: ignore[operator]
    torch.testing.assert_close(model(input_ids=IDS).logits, reference(input_ids=IDS).logits)


def test_under_autocast_gradients_are_as_near_to_those_of_fp32_as_with_peft() -> None:
    model = adapted()
    exact = outcome(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = outcome(model)
    speed_up(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outcome(model)

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[name].float() - exact[name]).norm() / exact[name].norm()) for name in exact)

    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in theirs.items()}
    assert 0 < error(ours) < 1.25 * error(theirs)


def test_a_layer_whose_forward_somebody_replaced_keeps_it() -> None:
    model = adapted()
    layer = next(module for module in model.modules() if type(module) is LoraLinear)
    layer.forward = own = lambda x: x  # type: ignore[method-assign]
    speed_up(model)
    assert layer.forward is own


def test_hooks_on_the_layer_inside_still_run() -> None:
    model = adapted()
    speed_up(model)
    layer = next(module for module in model.modules() if type(module) is LoraLinear)
    seen: list[Any] = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    model(input_ids=IDS)
    assert seen == [1]


def test_weights_that_accelerate_keeps_elsewhere_are_brought_by_its_hooks() -> None:
    model = adapted()
    expected = outcome(model)["logits"]
    for module in model.modules():
        if type(module) is LoraLinear:
            cpu_offload(module.base_layer, execution_device=torch.device("cpu"))
    speed_up(model)
    assert any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
