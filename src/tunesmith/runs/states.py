"""Nested states as JSON and safetensors: what others pickle of optimizers, schedulers and random numbers.

A state is made of dictionaries, lists, tuples, numbers, texts, None and tensors. Its shape goes to `NAME.json`, its
tensors, if there are any, to `NAME.safetensors`; a tensor that stands in several places is written once.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.errors import TunesmithError
from tunesmith.runs.parts import files_of, opened

Random = dict[str, Tensor]
_TENSOR, _TUPLE, _DICT = "$tensor", "$tuple", "$dict"


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A state in two parts: JSON values, and the tensors that these name."""

    structure: Any
    tensors: Mapping[str, Tensor]

    def copied(self) -> "Packed":
        """With copies of the tensors in main memory, which training does not change."""
        return replace(self, tensors={name: copied(tensor) for name, tensor in self.tensors.items()})

    def write(self, folder: Path, name: str) -> None:
        self.write_structure(folder, name)
        if self.tensors:
            save_file({name: _own(tensor) for name, tensor in self.tensors.items()}, folder / f"{name}.safetensors")

    def write_structure(self, folder: Path, name: str) -> None:
        (folder / f"{name}.json").write_text(json.dumps(self.structure), encoding="utf-8")


def packed(state: Any, name: str) -> Packed:
    """`state`, which errors call `name`. Tensors are not copied.

    Raises:
        TunesmithError: there is something else in it, which only pickle could write.
    """
    tensors: dict[str, Tensor] = {}
    structure = _packed(state, name, tensors, {})
    return Packed(structure=structure, tensors=tensors)


def read_state(folder: Path, name: str, read: Callable[[str, Any], Tensor] | None = None) -> Any:
    """The state that was written as `name`, its tensors in main memory of their own; None where there is none. `read`
    may make less of a tensor, by its name and its slices.

    The files may go away afterwards: nothing is mapped into memory.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    tensors: dict[str, Tensor] = {}
    for file in files_of(folder, name):
        with opened(file) as found:
            for key in found.keys():  # noqa: SIM118 (no mapping)
                tensors[key] = found.get_tensor(key).clone() if read is None else read(key, found.get_slice(key))
    return _unpacked(json.loads(path.read_text(encoding="utf-8")), tensors)


def copied(tensor: Tensor) -> Tensor:
    """A copy in main memory, wherever `tensor` is."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _own(tensor: Tensor) -> Tensor:
    """`tensor` in main memory, without neighbours: a part of a larger one would be written with all of it."""
    tensor = tensor.detach().cpu().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def _packed(value: Any, place: str, tensors: dict[str, Tensor], known: dict[Any, str]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor) and (type(value) in (Tensor, torch.nn.Parameter) or hasattr(value, "full_tensor")):
        # What is shared out over processes has no place of its own.
        place_in_memory = id(value) if hasattr(value, "full_tensor") else value.data_ptr()
        key = (place_in_memory, value.shape, value.stride(), value.dtype, value.device)
        if value.numel() == 0 or key not in known:
            known[key] = place
            tensors[place] = value
        return {_TENSOR: known[key]}
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(item, f"{place}.{i}", tensors, known) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_packed(item, f"{place}.{i}", tensors, known) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        items = [[key, _packed(item, f"{place}.{key}", tensors, known)] for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        if all(isinstance(key, str | int) for key, _ in items):
            return {_DICT: items}
    raise TunesmithError(
        f"a checkpoint can't hold {place}, a {type(value).__name__}: it is no plain value or tensor, and tunesmith "
        "does not pickle. Take another optimizer or scheduler, or save_only_model: true"
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpacked(item, tensors) for item in value[_TUPLE])
    items = value[_DICT] if _DICT in value else value.items()
    return {key: _unpacked(item, tensors) for key, item in items}


# Random numbers


def random_states(device: torch.device, *, all_devices: bool) -> Random:
    """The states of the generators of Python, NumPy, PyTorch on the CPU, and on `device` or all devices of its kind.

    Each is a tensor of a size that only depends on the generator, so that processes can gather them.
    """
    version, words, normal = random.getstate()
    kind, keys, position, has_normal, cached = cast(Any, np.random.get_state(legacy=True))
    assert kind == "MT19937"
    states = {
        "python": torch.tensor([version, normal is not None, _bits(normal or 0.0), *words]),
        "numpy": torch.tensor([position, has_normal, _bits(float(cached)), *keys.tolist()]),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        several = all_devices and hasattr(module, "get_rng_state_all")
        found = module.get_rng_state_all() if several else [module.get_rng_state()]
        states[device.type] = torch.stack([state.cpu() for state in found])
    return states


def restore_random_states(states: Random, device: torch.device) -> None:
    """Go on with the numbers that would have followed `states`. Those of a device are left out on another kind."""
    version, has_normal, bits, *words = states["python"].tolist()
    random.setstate((version, tuple(words), _number(bits) if has_normal else None))
    position, has_normal, bits, *keys = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_normal, _number(bits)))
    torch.set_rng_state(states["torch"].clone())  # which crashes for a part of a larger tensor
    if device.type != "cpu" and device.type in states:
        module: Any = torch.get_device_module(device)
        kept = [state.clone() for state in states[device.type]]
        if len(kept) == 1:
            module.set_rng_state(kept[0])
        else:
            module.set_rng_state_all(kept[: module.device_count()])


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """What happens within does not change the random numbers that follow."""
    states = random_states(device, all_devices=False)
    try:
        yield
    finally:
        restore_random_states(states, device)


def _bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float64).view(torch.int64))


def _number(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))
