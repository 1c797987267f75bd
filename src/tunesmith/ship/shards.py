"""Weights on disk, one tensor at a time: those of a base model read, those of a merged one written shard by shard."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from tunesmith.errors import TunesmithError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The formats that unquantized models are stored in, by their names in safetensors."""


class Weights(Protocol):
    """The weights of a base model by their names in its state dict."""

    def names(self) -> Iterable[str]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor in a file of safetensors."""

    file: str
    name: str
    dtype: torch.dtype


class StoredWeights:
    """Weights in files, each read when asked for.

    A file is open only while a tensor of it is used: what was read of an open one counts as the process's memory.
    """

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def tensor(self, name: str) -> Tensor:
        stored = self._stored[name]
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
        return tensor

    def under(self, names: Mapping[str, str]) -> "StoredWeights":
        """Those in `names`, which has the name here for each new one."""
        return StoredWeights({new: self._stored[name] for new, name in names.items()})


class LoadedWeights:
    """Weights of a model in memory, which may be replaced one by one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def names(self) -> Iterable[str]:
        return self._dtypes.keys()

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = attrgetter(name)(self._model)
        return tensor.detach()

    def replace(self, name: str, tensor: Tensor) -> None:
        """Under this name alone, where the weight has several."""
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        is_parameter = leaf in dict(module.named_parameters(recurse=False))
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def stored_weights(path: str, revision: str | None = None) -> StoredWeights:
    """The weights in a model's folder, or of a name on the hub, which is downloaded. Raises TunesmithError where there
    are none in safetensors, or they are in formats of less than 16 bits."""
    found: dict[str, Stored] = {}
    for file in _files(path, revision):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                kind = opened.get_slice(name).get_dtype()
                if kind not in DTYPES:
                    raise TunesmithError(
                        f"the base model {path} is quantized: {name} is stored as {kind}. Adapters are merged into 16- "
                        "or 32-bit weights; name the original model as base_model_name_or_path in adapter_config.json"
                    )
                found[name] = Stored(file=file, name=name, dtype=DTYPES[kind])
    return StoredWeights(found)


def _files(path: str, revision: str | None) -> list[str]:
    def locate(name: str) -> str | None:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    whole = locate(SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [whole]
    index = locate(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise TunesmithError(
            f"the base model {path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}: weights in "
            "safetensors are needed"
        )
    files, _ = get_checkpoint_shard_files(path, index, revision=revision)
    return list(files)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What is merged at once: the names of its tensors, and their bytes together."""

    names: tuple[str, ...]
    size: int


def write_shards(
    folder: Path, pieces: Sequence[Piece], merge: Callable[[Piece], dict[str, Tensor]], limit: int
) -> list[str]:
    """Writes what `merge` makes of each piece, in files of at most `limit` bytes where pieces allow, and their index.

    No more than one file's tensors are in memory. Returns the names of the files.
    """
    shards = _shards(pieces, limit)
    count = len(shards)
    files = [SAFE_WEIGHTS_NAME] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    places: dict[str, str] = {}
    parameters = 0
    for file, shard in zip(files, shards, strict=True):
        tensors: dict[str, Tensor] = {}
        for piece in shard:
            tensors |= merge(piece)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        parameters += sum(tensor.numel() for tensor in tensors.values())
    if count > 1:
        total = sum(piece.size for piece in pieces)
        index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": places}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _shards(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.size
    return shards
