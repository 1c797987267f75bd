"""Compiled layers: the same values and gradients, compiled once whatever the lengths, in training alone."""

import copy
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from tests.models import flat, gradient_error, gradients, supervised, tiny, token_rows
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import base_model
from tunesmith.model.compile import compile_layers
from tunesmith.model.linear import speed_up
from tunesmith.train import offload
from tunesmith.train.selftest import self_test
from tunesmith.train.setup import ready_for_batches

LENGTHS = [(5, 7, 3), (9, 2), (30,), (3,) * 9]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def taught(name: str = "llama", *, lora: bool = False, **settings: Any) -> Any:
    model: Any = tiny(name, **settings).train()
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    ready_for_batches(model, flat=True)
    return model


def step(model: Any, lengths: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    batch = flat(token_rows(*lengths))
    result = supervised(model, batch)
    result.loss.backward()
    return result.nll, gradients(model)


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_adapted_layers_of_every_kind_compile_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2: layers with a window and without one, capped scores. Their products are oneDNN's."""
    model, plain = taught("gemma2", lora=True), taught("gemma2", lora=True)
    monkeypatch.setattr("tunesmith.model.linear._chosen", True)
    speed_up(model)
    compile_layers(base_model(model), backend="aot_eager")
    step(model, LENGTHS[0])
    once = compiled_graphs()
    assert 0 < once <= 8
    model.zero_grad()
    for lengths in LENGTHS[1:]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = step(model, lengths)
        expected = step(plain, lengths)
        # Each of a layer's seven, forward and backward.
        assert sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events()) > 2 * 7 * 2 - 3
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        assert gradient_error(found[1], expected[1]) < 1e-5
    assert compiled_graphs() == once


@pytest.mark.slow
def test_inductor_gives_the_same_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = taught(), taught()
    monkeypatch.setattr("tunesmith.model.linear._chosen", True)
    speed_up(model)
    compile_layers(base_model(model), backend="inductor")
    for lengths in LENGTHS[:2]:
        found, expected = step(model, lengths), step(plain, lengths)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        assert gradient_error(found[1], expected[1]) < 1e-5


def test_other_lengths_more_layers_and_a_copy_are_right_and_compile_nothing_again() -> None:
    model, plain = taught(num_hidden_layers=9), taught(num_hidden_layers=9)
    names = list(model.state_dict())
    # More than the 8 times that PyTorch compiles a function again.
    assert compile_layers(model, backend="aot_eager") == 9
    assert list(model.state_dict()) == names
    step(model, LENGTHS[0])
    once = compiled_graphs()
    assert 0 < once <= 6  # what is before the attention and what is behind it, and few variants of them
    model.zero_grad()
    for lengths in LENGTHS[1:]:
        found, expected = step(model, lengths), step(plain, lengths)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        assert gradient_error(found[1], expected[1]) < 1e-5
    assert compiled_graphs() == once
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.model.layers.parameters():
            parameter.zero_()
    before = step(model, (6, 4))[0]
    assert (step(twin, (6, 4))[0] - before).abs().max() > 1e-2
    assert torch.equal(step(model, (6, 4))[0], before)


def test_evaluation_and_generation_are_not_compiled() -> None:
    model = taught()
    compile_layers(model, backend="aot_eager")
    model.eval()
    batch = flat(token_rows(5, 4))
    supervised(model, batch)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        supervised(model.train(), batch)
    assert compiled_graphs() == 0


def test_activations_of_compiled_layers_may_be_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []
    copy_out = offload._moved

    def record(tensor: Tensor) -> Any:
        moved.append(tensor.detach())
        return copy_out(tensor)

    monkeypatch.setattr(offload, "_on_accelerator", lambda tensor: True)
    monkeypatch.setattr(offload, "_moved", record)
    monkeypatch.setattr(offload, "SMALLEST", 0)
    model, plain = taught(), taught()
    compile_layers(model, backend="aot_eager")
    with offload.offloading(model, True):
        batch = flat(token_rows(5, 7))
        loss = supervised(model, batch).loss
    loss.backward()
    assert gradient_error(gradients(model), step(plain, (5, 7))[1]) < 1e-5
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert any(tensor.shape[-1] == 48 for tensor in moved)  # of the MLP, which is in a compiled part
    assert not weights & {tensor.untyped_storage().data_ptr() for tensor in moved}


def test_a_model_without_the_usual_layers_is_refused() -> None:
    class Odd(PreTrainedModel):
        _supports_sdpa = True

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.layer = nn.Linear(2, 2)

    with pytest.raises(TunesmithError, match="torch_compile: Odd has no layers of transformers' usual kind"):
        compile_layers(Odd(tiny("llama").config), backend="aot_eager")


def test_layers_that_are_spread_over_devices_are_refused() -> None:
    model: Any = taught()
    model.model.layers[0].forward = model.model.layers[0].forward  # as accelerate's hooks do
    with pytest.raises(TunesmithError, match=re.escape("spread over devices (device_map)")):
        compile_layers(model, backend="aot_eager")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", os.path.join("no", "such", "compiler"))
    with pytest.raises(TunesmithError, match=r"the C\+\+ compiler no.such.compiler is missing"):
        compile_layers(taught(), backend="inductor")


def test_the_self_test_runs_compiled_layers() -> None:
    ran: list[str] = []

    def broken(module: Any, _example: Any) -> Any:
        ran.append("compiled")
        return lambda *args: [x * 1.5 if isinstance(x, Tensor) else x for x in module.forward(*args)]

    model = taught()
    compile_layers(model, backend=broken)  # type: ignore[arg-type]
    rows = [row["input_ids"] for row in token_rows(9, 5)]
    with pytest.raises(TunesmithError, match="gives other losses in this run's batches"):
        self_test(model, rows, flat=True, precision="fp32")
    assert ran
    assert all(module.training for module in model.modules())
