"""8-bit and 4-bit base models, by `bitsandbytes`.

The weights of the linear layers are kept in 8 or 4 bits and turned into the compute precision product by product; the
rest of the model, the head and the embeddings among it, is in the compute precision. Nothing of it is trained: adapters
in fp32 are. `peft.prepare_model_for_kbit_training` would turn embeddings and norms into fp32 as well, which costs a
large vocabulary gigabytes and changes no gradient, since all of these are frozen.
"""

import logging
from typing import Any, get_args

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from tunesmith.errors import TunesmithError
from tunesmith.model.bnb import Bits, refuse_missing
from tunesmith.model.devices import here

OPTIMIZERS = ("8bit", "paged", "bnb")
"""What is in the name of an optimizer of `bitsandbytes`."""


def quantization(bits: Bits, dtype: torch.dtype) -> BitsAndBytesConfig:
    """LLM.int8() (https://arxiv.org/abs/2208.07339), or NF4 with double quantization, as QLoRA has it
    (https://arxiv.org/abs/2305.14314). `dtype` is what products are computed in."""
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
    of other methods are theirs to check."""
    settings = config if isinstance(config, dict) else config.to_dict()
    if not (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return
    refuse_missing("8-bit and 4-bit models", here().type)


def check_optimizer(name: str, device: str) -> None:
    """Raises TunesmithError for an optimizer of `bitsandbytes` that the device can't run."""
    if not any(part in name for part in OPTIMIZERS) or name.startswith(("galore", "apollo")):
        return
    refuse_missing(f"optim: {name}", device)
    if "paged" in name and device not in ("cuda", "xpu"):
        raise TunesmithError(
            f"optim: {name} pages its state between GPU and main memory, and this device is a {device}; take "
            f"{name.replace('paged_', '')}"
        )


def bits_of(model: nn.Module) -> Bits | None:
    """How the weights of `model` are kept; None where they are ordinary numbers."""
    if getattr(model, "is_loaded_in_8bit", False):
        return "8bit"
    return "4bit" if getattr(model, "is_loaded_in_4bit", False) else None


def keep_quantized(model: nn.Module) -> None:
    """Let none of the base model's weights be trained, nor changed otherwise: on CPUs with bfloat16, the first
    evaluation would repack weights of 4 bits into another layout, whose scales are rounded, for good."""
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
