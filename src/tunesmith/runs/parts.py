"""Tensors in several files, each written by another process.

`model-00001-of-00004.safetensors` and its like are what models on the hub are made of, so a checkpoint that four
processes have written is read as any other: by a run of one process or eight, and by whoever loads a model.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.errors import TunesmithError
from tunesmith.text import shorten


def writers(sizes: Mapping[str, int], processes: int) -> dict[str, int]:
    """Which process writes which tensor, by their `sizes` in bytes: neighbours together, near the same size each."""
    total, before, chosen = max(1, sum(sizes.values())), 0, {}
    for name, size in sizes.items():
        chosen[name] = min(processes - 1, (2 * before + size) * processes // (2 * total))  # where its middle is
        before += size
    return chosen


def write_part(
    tensors: Mapping[str, Tensor], folder: Path, name: str, *, rank: int, processes: int, whole: Callable[..., Tensor]
) -> dict[str, str]:
    """Write the part of process `rank` of all `tensors`, called NAME together; the file of each tensor. Every process
    must call it: `whole` gathers a tensor, which only its writer keeps, in main memory."""
    chosen = writers({key: value.numel() * value.element_size() for key, value in tensors.items()}, processes)
    own: dict[str, Tensor] = {}
    for key, value in tensors.items():
        gathered = whole(value)
        if chosen[key] == rank:
            own[key] = gathered.detach().cpu().contiguous().clone()
    if own:
        save_file(own, folder / _file(name, rank, processes), metadata={"format": "pt"})
    return {key: _file(name, writer, processes) for key, writer in chosen.items()}


def write_index(files: Mapping[str, str], folder: Path, name: str, size: int) -> None:
    """`NAME.safetensors.index.json`, which says what is in which of the `files`."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(files)}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def named_by(index: Path) -> list[str]:
    """The files with tensors that `model.safetensors.index.json` names, sorted. It came with a model from anywhere.

    Raises TunesmithError for what is no index, and for one that names files outside of its folder.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({PurePath(name) for name in places.values()})
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise TunesmithError(f"{index} is no index of a model's weights; save the model again") from error
    for name in names:
        if name.is_absolute() or ".." in name.parts:
            raise TunesmithError(f"{index} names {shorten(str(name))}, which is not in its folder; save it again")
    return [str(name) for name in names]


def _file(name: str, rank: int, processes: int) -> str:
    return f"{name}-{rank + 1:05d}-of-{processes:05d}.safetensors"


def files_of(folder: Path, name: str) -> list[Path]:
    """The files with the tensors called NAME: one, or the parts."""
    one = folder / f"{name}.safetensors"
    return [one] if one.is_file() else sorted(folder.glob(f"{name}-[0-9]*-of-[0-9]*.safetensors"))


def opened(file: Path) -> Any:
    """A safetensors file whose tensors are read one by one, and by slices."""
    return safe_open(file, framework="pt")
