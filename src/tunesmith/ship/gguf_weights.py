"""A model's weights and settings as the tensors and the metadata of a GGUF file.

The names, and which rows change places, are llama.cpp's (`convert_hf_to_gguf.py`). Its `llama` rotates neighbouring
pairs of a head's rows, where `transformers` rotates its first half with its second, so the rows of q and k are put side
by side: head row i of the first half to 2i, of the second to 2i + 1. Its `qwen2` and `qwen3` rotate halves, too.

Shapes: O rows (outputs), I columns (inputs).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tunesmith.errors import TunesmithError
from tunesmith.model.load import architectures_of, load_config
from tunesmith.runs.parts import named_by
from tunesmith.ship.adapted import empty_model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ROPE_FACTORS = "rope_freqs.weight"
F16_LIMIT = 65504.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How llama.cpp runs the models of one class of `transformers`."""

    architecture: gguf.MODEL_ARCH
    interleaved: bool = False
    """It rotates neighbouring rows, so those of q and k change places."""
    scaled_rope: bool = False
    """It takes factors for the frequencies of the positions."""

    @property
    def name(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.architecture]


FAMILIES = {
    "LlamaForCausalLM": Family(architecture=gguf.MODEL_ARCH.LLAMA, interleaved=True, scaled_rope=True),
    "Qwen2ForCausalLM": Family(architecture=gguf.MODEL_ARCH.QWEN2),
    "Qwen3ForCausalLM": Family(architecture=gguf.MODEL_ARCH.QWEN3),
}
QUANTS = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""What matrices are stored as, and what the file calls itself. Vectors are always float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One tensor of the file. `source` names it in `file`; `heads` is how many heads' rows are interleaved, or None."""

    name: str
    source: str
    file: Path
    shape: tuple[int, ...]
    kind: Kind
    heads: int | None = None

    @property
    def size(self) -> int:
        """In bytes, as stored."""
        elements, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // elements * size


def read_config(folder: Path) -> tuple[PreTrainedConfig, Family]:
    """The settings of the model in `folder`. Raises TunesmithError for one that can't be written as GGUF, by name."""
    config = load_config(str(folder))
    [architecture, *_] = architectures_of(config) or [f"a model of the type {config.model_type}"]
    family = FAMILIES.get(architecture)
    if family is None:
        raise TunesmithError(
            f"{architecture} can't be exported to GGUF; these can: {', '.join(FAMILIES)}. llama.cpp's "
            "convert_hf_to_gguf.py may know it"
        )
    if faults := _unsupported(config, family):
        raise TunesmithError(f"{folder} can't be exported to GGUF as {family.name}: {'; '.join(faults)}")
    return config, family


def _unsupported(config: Any, family: Family) -> list[str]:
    """What the model does and llama.cpp's implementation of its family doesn't."""
    rope = config.rope_parameters or {}
    scaling = rope.get("rope_type", "default")
    faults = []
    if scaling not in ("default", "llama3") or (scaling == "llama3" and not family.scaled_rope):
        also = ", and by 'llama3'" if family.scaled_rope else ""
        faults.append(
            f"its positions are scaled by {scaling!r} (of {family.name}, those not scaled can be exported{also})"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        faults.append(f"only {rope['partial_rotary_factor']} of each head is rotated")
    if config.hidden_act != "silu":
        faults.append(f"its activation is {config.hidden_act!r}, not 'silu'")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        faults.append("some of its layers attend within a sliding window")
    if family.name == "qwen3" and config.attention_bias:
        faults.append("its attention has biases")
    if getattr(config, "quantization_config", None):
        faults.append("its weights are quantized; export the model that they were quantized from")
    return faults


def plan_weights(folder: Path, config: PreTrainedConfig, family: Family, quant: str) -> list[Weight]:
    """The tensors of the file, in the order of the model. Reads the headers of the safetensors files only.

    Raises TunesmithError for tensors that are missing or have another shape than the settings say.
    """
    model = empty_model(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    there = dict(_tensors(folder))
    if missing := [name for name in expected if name not in there]:
        raise TunesmithError(f"{folder} lacks {len(missing)} of {len(expected)} tensors: {', '.join(missing[:3])}, ...")
    names = gguf.get_tensor_name_map(family.architecture, config.num_hidden_layers)
    weights = []
    for source, shape in expected.items():
        file, stored_shape = there[source]
        if stored_shape != shape:
            raise TunesmithError(f"{source} in {file} has the shape {stored_shape}; config.json makes it {shape}")
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"gguf has no name for {source}"
        heads = None
        if family.interleaved and ".q_proj." in source:
            heads = int(config.num_attention_heads)
        elif family.interleaved and ".k_proj." in source:
            heads = int(config.num_key_value_heads)
        kind = _kind(shape, quant)
        weights.append(Weight(name=name, source=source, file=file, shape=shape, kind=kind, heads=heads))
    return weights


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[Path, tuple[int, ...]]]]:
    """The tensors in a folder's safetensors files: name, file and shape."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # which the libraries take before an index
        files = [folder / SINGLE]
    else:
        files = [folder / name for name in named_by(index)] if index.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise TunesmithError(f"{folder} has no weights: there is no .safetensors file in it")
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, the handle is no dictionary
                yield name, (file, tuple(tensors.get_slice(name).get_shape()))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise TunesmithError(f"{file} can't be read: {error}") from error
        yield handle


def _kind(shape: Sequence[int], quant: str) -> Kind:
    """Vectors stay exact: they cost nothing, and llama.cpp wants them so. Rows that blocks don't fill stay in f16."""
    if len(shape) == 1:
        return Kind.F32
    kind = QUANTS[quant][0]
    elements, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % elements == 0 else Kind.F16


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each of `heads` heads from halves to pairs, for a matrix (O, I) or a bias (O)."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def stored_values(weight: Weight, values: Tensor) -> np.ndarray:
    """The tensor (O, I) or (O) as the file holds it. Raises TunesmithError for what its type can't hold."""
    exact = values.to(torch.float32).numpy()
    largest = float(np.abs(exact).max(initial=0.0))
    if not np.isfinite(largest):
        raise TunesmithError(f"{weight.source} in {weight.file} has values that are not finite")
    if weight.kind == Kind.F16 and largest > F16_LIMIT:
        raise TunesmithError(f"{weight.source} has values up to {largest:.3g}, more than f16 holds; write --quant f32")
    if weight.heads is not None:
        exact = interleave(exact, weight.heads)
    return np.ascontiguousarray(gguf.quants.quantize(exact, weight.kind))


def read_weights(weights: Sequence[Weight]) -> Iterator[tuple[Weight, Tensor]]:
    """The tensors of `weights`, one at a time in memory."""
    current: Path | None = None
    with ExitStack() as stack:
        for weight in weights:
            if weight.file != current:
                stack.pop_all().close()
                handle, current = stack.enter_context(_opened(weight.file)), weight.file
            yield weight, handle.get_tensor(weight.source)


def rope_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """What each frequency of the positions is divided by, float32 (head size / 2); None where they are not scaled."""
    rope: Mapping[str, Any] = config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    size = head_size(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (plain / scaled).numpy().astype(np.float32)


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_settings(writer: gguf.GGUFWriter, config: Any, family: Family, rows: int) -> None:
    """The metadata that llama.cpp builds the model from."""
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    if family.interleaved:
        writer.add_rope_dimension_count(head_size(config))
