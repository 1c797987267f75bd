"""Activations in main memory: the same gradients, and what is moved and what is not.

The CPU passes for an accelerator here: tensors are copied as they would be, from main memory to main memory.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models import flat, gradient_error, gradients, supervised, tiny, token_rows
from tunesmith.train import offload
from tunesmith.train.offload import offloading
from tunesmith.train.setup import ready_for_batches


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was copied to main memory, whatever its size."""
    found: list[Tensor] = []
    copy = offload._moved

    def record(tensor: Tensor) -> Any:
        found.append(tensor.detach())
        return copy(tensor)

    monkeypatch.setattr(offload, "_on_accelerator", lambda tensor: True)
    monkeypatch.setattr(offload, "_moved", record)
    monkeypatch.setattr(offload, "SMALLEST", 0)
    return found


def taught(**settings: Any) -> PreTrainedModel:
    model = tiny("llama", **settings).train()
    ready_for_batches(model, flat=True)
    return model


def backward(model: PreTrainedModel, *, enabled: bool) -> dict[str, Tensor]:
    batch = flat(token_rows(7, 3, 9))
    with offloading(model, enabled):
        loss = supervised(model, batch).loss
    loss.backward()
    return gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same(moved: list[Tensor], checkpointing: bool) -> None:
    model = taught()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    expected = backward(model, enabled=False)
    assert not moved
    assert gradient_error(backward(model, enabled=True), expected) == 0
    assert moved


def test_checkpointing_leaves_only_the_inputs_of_layers_to_move(moved: list[Tensor]) -> None:
    model = taught()
    backward(model, enabled=True)
    all_bytes = sum(tensor.nbytes for tensor in moved)
    moved.clear()
    model.activation_checkpointing_enable({"use_reentrant": False})
    backward(model, enabled=True)
    inputs = [tensor for tensor in moved if tensor.shape == (1, 19, 32)]
    assert len(inputs) >= 2
    assert sum(tensor.nbytes for tensor in moved) < all_bytes / 4


def test_weights_stay_where_they_are(moved: list[Tensor]) -> None:
    model = taught()
    frozen = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    backward(model, enabled=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert moved
    assert not weights & {tensor.untyped_storage().data_ptr() for tensor in moved}


def test_autocasts_copies_of_weights_stay_too(moved: list[Tensor]) -> None:
    layer, x = nn.Linear(48, 32), torch.randn(7, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), offloading(layer, True):
        y = layer(x * 2)
    assert [tuple(tensor.shape) for tensor in moved] == [(7, 48)]
    y.float().sum().backward()
    assert layer.weight.grad is not None


def test_small_tensors_and_those_in_main_memory_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_moved", _refuse)
    large = torch.randn(64, 1024, requires_grad=True)
    with offloading(nn.Identity(), True):
        large.square()
    monkeypatch.setattr(offload, "_on_accelerator", lambda tensor: True)
    with offloading(nn.Identity(), True):
        large[:3].square()
    with pytest.raises(AssertionError, match="moved"), offloading(nn.Identity(), True):
        large.square()


def _refuse(tensor: Tensor) -> None:
    raise AssertionError(f"moved {tuple(tensor.shape)}")


def test_a_copy_shares_no_memory_with_what_it_frees(moved: list[Tensor]) -> None:
    x = torch.randn(5)
    packed = offload._moved(x)
    assert packed.copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(packed.copy, x)
    assert torch.equal(offload._unpack(packed), x)
