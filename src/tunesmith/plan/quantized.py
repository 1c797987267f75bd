"""Linear layers that take the memory of 8-bit and 4-bit ones, to count it: those of `bitsandbytes` need weights to run.

As there, the weight is a buffer of bytes with its scales, every product makes it anew in the precision of its input,
forward and backward, and an 8-bit layer keeps its input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.model.quantize import Bits

BLOCK, OUTER_BLOCK = 64, 256
"""Numbers that share a scale in NF4, and such scales that share one with double quantization (arXiv:2305.14314)."""


class _FewBits(nn.Linear):
    """Takes the place of a linear layer; `weight` is uint8 of shape (bytes,), not (out_features, in_features)."""

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None, bits: Bits) -> None:
        with torch.device("meta"):
            super().__init__(inputs, outputs, bias=False)
        size = _bytes(inputs, outputs, bits)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        self.bits = bits

    def forward(self, input: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        output: Tensor = _Product.apply(input, self.weight, shape, self.bits == "8bit")
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """x (..., I), the bytes of a weight (O, I) -> (..., O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: tuple[int, int], keeps_input: bool) -> Tensor:
        ctx.save_for_backward(weight, *((x,) if keeps_input else ()))
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy @ dy.new_empty(ctx.shape), None, None, None


def _bytes(inputs: int, outputs: int, bits: Bits) -> int:
    numbers = inputs * outputs
    if bits == "8bit":
        return numbers + 4 * outputs  # a scale a row
    scales = -(-numbers // BLOCK)
    return numbers // 2 + scales + 4 * -(-scales // OUTER_BLOCK)


def as_if_quantized(model: PreTrainedModel, bits: Bits) -> None:
    """Puts layers of `bits` in the place of the linear ones of a model on the meta device, its head excepted, and
    freezes it."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is head or not isinstance(child, nn.Linear | Conv1D):
                continue
            outputs, inputs = child.weight.shape if isinstance(child, nn.Linear) else reversed(child.weight.shape)
            setattr(module, name, _FewBits(inputs, outputs, child.bias, bits))
