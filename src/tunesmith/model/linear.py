"""Linear layers and their LoRA adapters in fewer passes, with the faster of two matrix libraries.

Shapes: T tokens (all leading dimensions together), I inputs, O outputs, R rank.

`peft` computes `base(x) + lora_B(lora_A(x)) * scaling` with three more passes over (T, O) values, each into new memory,
and as many over (T, I) ones in the backward. Here the low-rank product is added into the outputs in place, both ways.
`speed_up` therefore sets a `forward` of ours on modules of a model; classes, weights and names stay as they are. On
every LoRA layer of `peft`: where anything but plain LoRA is asked of it, its own forward runs. On a CPU where oneDNN is
faster, on every other `nn.Linear`, too. Two more modules replace forwards: `compile`, those of the decoder layers with
`torch_compile`, and `head`, that of the model itself, so that it takes `targets` and an `objective`.

On a CPU, fp32 products go through oneDNN where it is faster than the BLAS that PyTorch calls; torch has both inside.
Which one is faster depends on the processor, on the shape, and on which factor is transposed: each kind of product of a
run is timed in both (`ways`).
"""

from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tunesmith.model import ways
from tunesmith.model.norm import speed_up_norms

SIZE = 1024
"""Tokens, inputs and outputs of the product that decides for compiled layers."""
HALVES = (torch.bfloat16, torch.float16)
FEW = 8
"""Tokens below which a product reads weights and little else: there is nothing to choose, and asking takes its time."""

_compiled_by_onednn = False
"""Whether layers that are compiled take their products from oneDNN."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` (..., I) times the transpose of `weight` (O, I), plus `bias` (O,): (..., O). Both factors may be transposed
    views. Not for autograd."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or (x.shape[0] < FEW and x.is_contiguous()):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return onednn(x, weight, bias) if _compiled_by_onednn else F.linear(x, weight, bias)
    if isinstance(x, FakeTensor) or not x.numel() or not has_onednn():
        return F.linear(x, weight, bias)
    kind = _kind(x, weight)
    if ways.is_faster(kind, lambda: F.linear(x, weight, bias), lambda: onednn(x, weight, bias)):
        return onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _kind(x: Tensor, weight: Tensor) -> ways.Kind:
    """Of a product: the tokens as a power of two, the other two sizes, and which factors are transposed."""
    outputs, inner = weight.shape
    rows = x.numel() // inner
    straight = x.is_contiguous()  # else x is a gradient, transposed, and its rows are outputs of the layer
    sizes = (rows.bit_length(), inner, outputs) if straight else (inner.bit_length(), rows, outputs)
    return ("product", *sizes, straight, weight.is_contiguous())


def shapes_cost(weight: Tensor) -> bool:
    """Whether products with `weight` take time and memory for each shape that is new: in half precision on a CPU, they
    are oneDNN's, which generates code for each and keeps it. 300 steps of a batch of any length held twice the memory.
    """
    return weight.device.type == "cpu" and (weight.dtype in HALVES or torch.is_autocast_enabled("cpu"))


@cache
def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_is_faster() -> bool:
    """Whether oneDNN is the faster library for one large square product: what compiled layers take, which can't try."""
    if not has_onednn():
        return False
    x = torch.ones(SIZE, SIZE)  # random numbers would change those of the run
    kind: ways.Kind = ("square", SIZE.bit_length())
    return ways.is_faster(kind, lambda: F.linear(x, x), lambda: onednn(x, x))


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` through oneDNN, whatever is faster: none of the factors may be empty."""
    if torch.compiler.is_compiling():
        return _opaque(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@torch.library.custom_op("tunesmith::product", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`onednn` for `torch.compile`, which takes the weights in such products for constants."""
    return onednn(x, weight, bias)


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def onednn_times(x: Tensor, weight: Tensor, bias: Tensor, factors: Tensor) -> Tensor:
    """`onednn(x, weight, bias) * factors`, multiplied before it is written. `factors` are (T, O)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factors, weight, bias, "mul")
    return y


class _Linear(torch.autograd.Function):
    """x (T, I), weight (O, I), bias (O,) or None -> (T, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(dy, weight.t()) if need_x else None,
            product(dy.t(), x.t()) if need_weight else None,
            dy.sum(dim=0) if need_bias else None,
        )


class _Adapted(torch.autograd.Function):
    """x (T, I), frozen weight (O, I), bias (O,) or None, A (R, I), B (O, R) ->
    x @ (weight + scaling * B @ A).T + bias (T, O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Any:
        u = product(x, a)
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.scaling = scaling
        return product(x, weight, bias).addmm_(u, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, a, b, u = ctx.saved_tensors
        v = product(dy, b.t())
        # The layers below the lowest adapter need no gradient.
        dx = product(dy, weight.t()).addmm_(v, a, alpha=ctx.scaling) if ctx.needs_input_grad[0] else None
        # The long side of a skinny product is its rows: the other way round it takes two to four times as long.
        da, db = product(v.t(), x.t()), product(u.t(), dy.t()).t()
        dbias = dy.sum(dim=0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, da.mul_(ctx.scaling), db.mul_(ctx.scaling), None


def speed_up(model: nn.Module, *, compiled: bool = False) -> None:
    """Replace `forward` of the linear layers in `model` that can be computed faster, unless something else has replaced
    it already. Values agree to rounding. Layers that are to be `compiled` can't try two libraries on the way."""
    global _compiled_by_onednn
    competes = next(model.parameters()).device.type == "cpu" and has_onednn()
    if not compiled:
        speed_up_norms(model)
    if compiled:
        competes = _compiled_by_onednn = competes and onednn_is_faster()
    for module in list(model.modules()):
        if "forward" in vars(module):  # somebody else's: hooks of accelerate, for example
            continue
        if type(module) is LoraLinear:
            module.forward = MethodType(_lora_forward, module)  # type: ignore[method-assign]
        elif type(module) is nn.Linear and competes:
            module.forward = MethodType(_linear_forward, module)  # type: ignore[method-assign]


def _linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    ours = input.device.type == "cpu" and input.dtype == self.weight.dtype == torch.float32
    if not ours or torch.is_autocast_enabled("cpu"):
        return F.linear(input, self.weight, self.bias)
    flat: Tensor = _Linear.apply(input.reshape(-1, input.shape[-1]), self.weight, self.bias)
    return flat.view(*input.shape[:-1], -1)


def _lora_forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = _plain_adapter(self)
    if name is None or args or kwargs:
        return LoraLinear.forward(self, x, *args, **kwargs)
    base: nn.Linear = self.get_base_layer()  # type: ignore[assignment]
    adapter = self.lora_A[name].weight, self.lora_B[name].weight
    tensors: tuple[Any, ...] = (x, base.weight, base.bias, *adapter)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)
    elif len({tensor.dtype for tensor in tensors if tensor is not None}) > 1:
        return LoraLinear.forward(self, x)
    rows, weight, bias, a, b = tensors[0].reshape(-1, x.shape[-1]), *tensors[1:]
    if torch.is_grad_enabled():
        flat = _Adapted.apply(rows, weight, bias, a, b, self.scaling[name])
    else:
        flat = product(rows, weight, bias).addmm_(product(rows, a), b.t(), alpha=self.scaling[name])
    return flat.view(*x.shape[:-1], -1)


def _plain_adapter(layer: LoraLinear) -> str | None:
    """The name of the one adapter that is at work, when it is LoRA without any extra on a linear layer whose weight is
    frozen. What can be trained then is A, B and the layer's own bias, and `_Adapted` has the gradients of these."""
    base = layer.get_base_layer()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or type(base) is not nn.Linear:
        return None
    name = names[0]
    dropout = layer.lora_dropout[name]
    extra = (
        name in layer.lora_variant
        or layer.lora_bias.get(name)
        or (layer.training and getattr(dropout, "p", 0.0) > 0)
        or type(layer.lora_A[name]) is not nn.Linear
    )
    # Hooks bring weights that are elsewhere: DeepSpeed's, and accelerate's for a model spread over devices.
    hooked = base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook")
    return None if extra or hooked or base.weight.requires_grad else name
