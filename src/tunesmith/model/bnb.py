"""Whether `bitsandbytes` can be used here: told without importing more than torch and it, which takes seconds less."""

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tunesmith.errors import TunesmithError

Bits = Literal["8bit", "4bit"]
TOLERANCE: dict[Bits, float] = {"8bit": 0.05, "4bit": 0.2}
"""Of a product of normally distributed numbers, against the plain one: rounding to 8 bits puts it 1% off, NF4 10%; with
a scale, a row or an order wrong it is 100% off."""
TRIED = (32, 64, 128)
"""Tokens, outputs and inputs of the product that is tried: more than one block of 64 weights that share a scale."""


def refuse_missing(what: str, device: str) -> None:
    """Raises TunesmithError where `bitsandbytes` is not installed, or not made for `device`."""
    if find_spec("bitsandbytes") is None:
        raise TunesmithError(f"{what} need bitsandbytes: pip install 'tunesmith[quant]'")
    import bitsandbytes

    known = sorted(getattr(bitsandbytes, "supported_torch_devices", {"cuda"}))
    if device not in known:
        raise TunesmithError(
            f"{what} are not there on {device}: this bitsandbytes ({bitsandbytes.__version__}) runs on "
            f"{', '.join(known)}. Train in bf16 or fp32 with LoRA there"
        )


def problem(device: str) -> str:
    """What is wrong with a small product and the gradient of its input, in 8 bits and in 4; nothing when they are
    right. A library that was built for another CUDA than the driver's imports, and fails here."""
    for bits in get_args(Bits):
        try:
            errors = _errors(bits, device)
        except Exception as error:  # of whatever kernel or loader
            reason = str(error).strip() or type(error).__name__
            return f"a small {bits} product fails on {device}: {reason.splitlines()[0]}"
        if not all(error <= TOLERANCE[bits] for error in errors):  # no number is not right either
            off = " and ".join(f"{error:.0%}" for error in errors)
            return f"a small {bits} product on {device} and its gradient are {off} off the plain ones"
    return ""


def _errors(bits: Bits, device: str) -> list[float]:
    """How far the product x W^T and the gradient dy W are from the plain ones, relative to these."""
    tokens, outputs, inputs = TRIED
    generator = torch.Generator().manual_seed(0)  # of its own: it must not move the numbers of a run
    x, weight, dy = (
        torch.randn(shape, generator=generator) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    dtype = torch.float32 if device == "cpu" else torch.float16
    input = x.to(device, dtype, copy=True).requires_grad_()
    with torch.random.fork_rng(devices=[]):  # layers begin with random numbers, even where they are replaced
        layer = _layer(bits, weight, dtype)
    output = layer.to(device)(input)
    [gradient] = torch.autograd.grad(output, input, dy.to(device, output.dtype))
    return [_distance(output, x @ weight.T), _distance(gradient, dy @ weight)]


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float().cpu() - expected).norm() / expected.norm())


def _layer(bits: Bits, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """A layer with `weight` (outputs, inputs) as models have it; its weight is rounded when it is moved to a device."""
    from bitsandbytes.nn import modules as few

    outputs, inputs = weight.shape
    if bits == "8bit":
        eight = few.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0)
        eight.weight = few.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        return eight
    four = few.Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    four.weight = few.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return four
