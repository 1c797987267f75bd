"""What stands in for a GPU in a rehearsal: kernels on the CPU, the memory of a small device, and faked speeds.

The kernels are those of the tests, so a rehearsal needs what the tests need.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.model.kernels import Kernels
from tunesmith.model import attention_cuda, precision
from tunesmith.train import offload, sft


@contextmanager
def gpu_stand_ins() -> Iterator[Kernels]:
    """The CPU passes for a GPU of compute capability 9.0 that has both kernels, and whose activations go to main
    memory."""
    assert sft  # with all libraries that look for flash-attn when they are imported, and would take the stand-in for it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cuda, "DEVICE", "cpu")
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(precision, "measure", lambda device: {"fp32": 100.0, "bf16": 10.0, "fp16": 0.0})
        patch.setattr(offload, "_on_accelerator", lambda tensor: True)
        attention_cuda._kernel_for.cache_clear()
        kernels = Kernels(patch)
        kernels.torch()
        kernels.flash2()
        yield kernels
    attention_cuda._kernel_for.cache_clear()


def room_for(model: Any, tokens: int) -> None:
    """Let `model` run out of memory in a micro-batch of more than `tokens`, unless it checkpoints."""
    forward = model.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        size = kwargs["input_ids"].numel()
        if size > tokens and model.training and not model.is_activation_checkpointing:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {size} tokens")
        return forward(*args, **kwargs)

    model.forward = limited
