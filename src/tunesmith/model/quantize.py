"""8-bit and 4-bit base models, by `bitsandbytes`.

The weights of the linear layers are kept in 8 or 4 bits and turned into the compute precision product by product; the
rest of the model, the head and the embeddings among it, is in the compute precision. Nothing of it is trained: adapters
in fp32 are. `peft.prepare_model_for_kbit_training` would turn embeddings and norms into fp32 as well, which costs a
large vocabulary gigabytes and changes no gradient, since all of these are frozen.

`problem` tries a small product, for `tunesmith doctor`, which waits for torch and `bitsandbytes` only: `peft` and
`transformers` are imported where they are needed.
"""

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from tunesmith.errors import TunesmithError
from tunesmith.model.devices import here

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

Bits = Literal["8bit", "4bit"]
OPTIMIZERS = ("8bit", "paged", "bnb")
"""What is in the name of an optimizer of `bitsandbytes`."""
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


def quantization(bits: Bits, dtype: torch.dtype) -> "BitsAndBytesConfig":
    """LLM.int8() (https://arxiv.org/abs/2208.07339), or NF4 with double quantization, as QLoRA has it
    (https://arxiv.org/abs/2305.14314). `dtype` is what products are computed in."""
    from transformers import BitsAndBytesConfig

    if bits not in get_args(Bits):
        raise TunesmithError(f"quantize is {bits!r}; choose {' | '.join(get_args(Bits))}")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_quantization(config: Any) -> None:
    """Raises TunesmithError where `bitsandbytes` can't do what `config` asks for, before any weight is loaded. Settings
    of other methods are left to them."""
    settings = config if isinstance(config, dict) else config.to_dict()
    if not (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return
    refuse_missing("8-bit and 4-bit models", here().type)


def check_optimizer(name: str, device: str) -> None:
    """Raises TunesmithError for an optimizer of `bitsandbytes` that the device can't run."""
    if not any(part in name for part in OPTIMIZERS) or name.startswith(("galore", "apollo")):
        return
    if "paged" in name and device not in ("cuda", "xpu"):
        raise TunesmithError(
            f"optim: {name} pages its state between GPU and main memory, and this device is a {device}; take "
            f"{name.replace('paged_', '')}"
        )
    refuse_missing(f"optimizers such as {name}", device)


def bits_of(model: nn.Module) -> Bits | None:
    """How the weights of `model` are kept; None where they are ordinary numbers."""
    if getattr(model, "is_loaded_in_8bit", False):
        return "8bit"
    return "4bit" if getattr(model, "is_loaded_in_4bit", False) else None


def refuse_untrainable(model: nn.Module) -> None:
    """Raises TunesmithError for a base model whose weights are packed in a way that passes on no gradient, as GGUF."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.is_trainable or getattr(quantizer, "is_qat_trainable", False):
        return
    method = quantizer.quantization_config.quant_method
    name = str(getattr(method, "value", method))
    unpack = ""
    if name == "gguf":
        unpack = (
            ". Or unpack this one: from_pretrained(folder, gguf_file=..., quantization_config=GgufConfig("
            "dequantize=True)), then save_pretrained, of model and tokenizer"
        )
    raise TunesmithError(
        f"the model's weights are quantized ({name}), which passes on no gradient: not even adapters can be trained; "
        f"take the original model, with quantize: 4bit or 8bit{unpack}"
    )


def keep_quantized(model: nn.Module) -> None:
    """Let none of the base model's weights be trained, nor changed otherwise: on CPUs with bfloat16, the first
    evaluation would repack weights of 4 bits into another layout, whose scales are rounded, for good."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):  # which has frozen them, and not its adapters
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)


def _is_no_cast(record: logging.LogRecord) -> bool:
    """Each 8-bit layer says in each step that it rounds its input, which is the method: thousands of lines a minute."""
    return "inputs will be cast from" not in record.msg


# Whether a product is right


def problem(device: str) -> str:
    """What is wrong with a small product and the gradient of its input, in 8 bits and in 4; empty when both are right.
    A library that was built for another CUDA than the driver's can be imported, but fails here."""
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
    pairs = ((output, x @ weight.T), (gradient, dy @ weight))
    return [float((ours.detach().float().cpu() - plain).norm() / plain.norm()) for ours, plain in pairs]


def _layer(bits: Bits, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """A layer with `weight` (outputs, inputs) as models have it; its weight is rounded when it is moved to a device."""
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    outputs, inputs = weight.shape
    if bits == "8bit":
        layer: nn.Module = Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        return layer
    nf4: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, **nf4)
    layer.weight = Params4bit(weight.clone(), requires_grad=False, **nf4)
    return layer
