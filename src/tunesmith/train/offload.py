"""Activations in main memory: what the backward needs leaves the accelerator in the forward and comes back in time.

Like `torch.autograd.graph.save_on_cpu`, through the same hooks, but weights stay where they are: autograd keeps them
among the saved tensors of every product, and they occupy the accelerator anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 16 * 1024
"""Bytes. Smaller tensors stay: starting a copy would cost more than it frees."""
_VIEWS = {"TBackward0", "TransposeBackward0", "ToCopyBackward0"}
"""What autograd calls the steps between a weight and the form in which a product keeps it (autocast's copy of it)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moved:
    """A copy in main memory, and where it came from."""

    copy: Tensor
    device: torch.device


@contextmanager
def offloading(model: nn.Module, enabled: bool) -> Iterator[None]:
    """A forward in this context keeps its activations in main memory; the backward belongs outside of it.

    With `enabled` False nothing changes. Copies run beside the computation, from and to pinned memory.
    """
    if not enabled:
        yield
        return
    weights = {_storage(parameter) for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor | _Moved:
        if not _on_accelerator(tensor) or tensor.nbytes < SMALLEST or _storage(tensor) in weights or _is_weight(tensor):
            return tensor
        return _moved(tensor)

    with saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(packed: Tensor | _Moved) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return packed.copy.to(packed.device, non_blocking=True)


def _moved(tensor: Tensor) -> _Moved:
    pinned = torch.accelerator.is_available()  # without an accelerator there is nothing to pin memory for
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    # On the stream that the tensor's memory belongs to, so it is not reused before the copy is done.
    copy.copy_(tensor.detach(), non_blocking=True)
    return _Moved(copy=copy, device=tensor.device)


def _on_accelerator(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_weight(tensor: Tensor) -> bool:
    """Whether `tensor` is a weight that is not among the model's own storages: autocast's 16-bit copy of one, which is
    shared by all that use it in a step, or one that FSDP has gathered."""
    node = tensor.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)
