"""`torch.compile` for models on flat batches: layer by layer, with attention over documents left out.

Compiling the whole model, as `accelerate` would, meets document lengths: attention slices by them, so every new number
of documents would be compiled again, for minutes. A layer around its attention knows only how many tokens there are, as
a symbol: it is compiled once, and the layers of a kind share the result.
"""

import functools
import os
import shutil
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.errors import TunesmithError
from tunesmith.model.attention import PREFIX

COMPILER = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")


def compile_layers(model: PreTrainedModel, *, backend: str, mode: str | None = None) -> int:
    """Compile the decoder layers of `model`, in place; returns how many. Their names and weights stay as they are.

    `backend` and `mode` are those of `torch.compile`. Only training runs compiled: evaluation and generation come in
    other shapes, each of which would be compiled again. Call it after the adapters are in and attention is settled.
    Raises TunesmithError for a model whose layers can't be told or are spread over devices, and where the C++ compiler
    is missing that code for a CPU is built with.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise TunesmithError(
            f"torch_compile: {type(model).__name__} has no layers of transformers' usual kind to compile; leave it off"
        )
    if any("forward" in vars(layer) for layer in layers):
        raise TunesmithError("torch_compile: the model's layers are spread over devices (device_map); leave one off")
    cxx = os.environ.get("CXX", COMPILER)
    if backend == "inductor" and model.device.type == "cpu" and shutil.which(cxx) is None:
        raise TunesmithError(
            f"torch_compile: the C++ compiler {cxx} is missing, which code for a CPU is built with; install it, or "
            "name another in the environment variable CXX"
        )
    attention = model.config._attn_implementation or ""
    if attention.startswith(PREFIX):
        AttentionInterface.register(attention, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[attention]))
    kinds = {type(layer) for layer in layers}
    forwards = {kind: _in_training(kind.forward, backend, mode) for kind in kinds}
    for layer in layers:
        # A method, not a function: a deep copy of the model binds it to itself.
        layer.forward = MethodType(forwards[type(layer)], layer)
    return len(layers)


def is_compiled(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and hasattr(vars(module).get("forward"), "compiled")


def _in_training(plain: Callable[..., Any], backend: str, mode: str | None) -> Callable[..., Any]:
    compiled = torch.compile(plain, backend=backend, mode=mode, dynamic=True)

    @functools.wraps(plain)
    def forward(self: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
        return (compiled if self.training and torch.is_grad_enabled() else plain)(self, *args, **kwargs)

    forward.compiled = compiled  # type: ignore[attr-defined]
    return forward
