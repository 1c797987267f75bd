"""RMS norms on a CPU in fewer passes.

`transformers` writes RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) as six operations, whose backward makes a
dozen passes over memory. Here it is three forward and five backward, and one more each way for bfloat16, which is
computed in fp32 and rounded once. Which modules are such norms is found out by computing with them, and the plain way
stays where it is as fast (`ways`).

Shapes: H hidden; leading dimensions are left as they are.
"""

import copy
import inspect
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from tunesmith.model import ways

EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""What norms call the number that is added to the mean of the squares."""
KINDS = {torch.float32: "norm", torch.bfloat16: "norm in bfloat16"}


class _Norm(torch.autograd.Function):
    """x (..., H), weight (H,) -> x / sqrt(mean(x^2) + eps) * weight (..., H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        values = x.float()
        squares = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed = values * scale if values is x else values.mul_(scale)
        return normed.mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        values = x.float()
        d_weight = None
        if need_weight:
            d_weight = (values * scale).mul_(dy).flatten(0, -2).sum(dim=0).to(weight.dtype)
        if not need_x:
            return None, d_weight, None
        # With n = x * scale: dx = scale * (dn - n * mean(dn * n)), where dn = dy * weight.
        dn = dy * weight.float()
        mean = torch.linalg.vecdot(dn, values).unsqueeze(-1).mul_(scale.square()).div_(-x.shape[-1])
        return dn.addcmul_(values, mean).mul_(scale).to(x.dtype), d_weight, None


def speed_up_norms(model: nn.Module) -> None:
    """Replace `forward` of the RMS norms in `model`, unless something else has replaced it already. Values agree to
    rounding."""
    for module in list(model.modules()):
        if "forward" not in vars(module) and (gains := _gains(module)) is not None:
            module._gains = gains  # type: ignore[assignment]
            module.forward = MethodType(_norm_forward, module)


def _gains(module: nn.Module) -> float | None:
    """What such a norm adds to its weight before it multiplies by it: 0, or as in Gemma 1; None for what is no RMS norm
    on a CPU."""
    parameters = dict(module.named_parameters())
    weight = parameters.pop("weight", None)
    if weight is None or parameters or weight.dim() != 1 or next(module.children(), None) is not None:
        return None
    if weight.device.type != "cpu" or weight.dtype not in KINDS or _epsilon(module) is None:
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:  # itself and x: no gate or scale besides
        return None
    # Rows of different sizes; no random numbers, which would change those of the run. fp32 tells more than bfloat16.
    x = torch.linspace(-2, 3, 3 * len(weight)).sin().view(3, -1) * torch.tensor([[0.01], [1.0], [30.0]])
    fp32 = weight.detach().float()
    with torch.no_grad():
        try:
            y = _plain(x, fp32, module)
        except (TypeError, RuntimeError, ValueError, AttributeError):  # takes other inputs: no norm
            return None
        for added in (0.0, 1.0):
            wanted = _Norm.apply(x, fp32 + added, _epsilon(module))
            if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, wanted, rtol=1e-5, atol=1e-6):
                return added
    return None


def _epsilon(module: nn.Module) -> float | None:
    return next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)


def _norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    plain = type(self).forward
    weight: Tensor = self.weight  # type: ignore[assignment]
    ours = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in KINDS and x.numel() > 0 and x.dim() > 1
    if not ours or torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return plain(self, x)
    if ways.forced() is not None:  # a run that began before norms competed
        return plain(self, x)
    kind = (KINDS[x.dtype], (x.numel() // len(weight)).bit_length(), len(weight), x.requires_grad, weight.requires_grad)
    if ways.is_faster(kind, ways.attempt(_plain, x, weight, self), ways.attempt(_fast, x, weight, self)):
        return _fast(x, weight, self)
    return plain(self, x)


def _fast(x: Tensor, weight: Tensor, norm: nn.Module) -> Tensor:
    gains = cast(float, norm._gains)
    y: Tensor = _Norm.apply(x, weight.float() + gains if gains else weight, _epsilon(norm))
    return y


def _plain(x: Tensor, weight: Tensor, norm: nn.Module) -> Tensor:
    """The norm's own forward with this weight in place of its own, whose gradient a trial must not touch."""
    other = copy.copy(norm)
    other.__dict__["_parameters"] = {"weight": weight}
    return type(norm).forward(other, x)
