"""Weights on disk, a tensor at a time: a base model's are read, a merged model's are written shard by shard."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from tunesmith.errors import TunesmithError
from tunesmith.text import size

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
        """These weights by new names; `names` maps each new name to the one here."""
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
        """Under this name only, if the weight has several."""
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        is_parameter = leaf in dict(module.named_parameters(recurse=False))
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


Weights = StoredWeights | LoadedWeights
"""The weights of a base model by their names in its state dict."""


def stored_weights(path: str, revision: str | None = None) -> StoredWeights:
    """The weights in a model's folder, or of a name on the hub, which is downloaded. Raises TunesmithError where there
    are none in safetensors, or they are in formats of less than 16 bits."""
    stored: dict[str, Stored] = {}
    for file in _files(path, revision):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                kind = opened.get_slice(name).get_dtype()
                if kind not in DTYPES:
                    raise TunesmithError(
                        f"the base model {path} is quantized: {name} is stored as {kind}. Adapters are merged into 16- "
                        "or 32-bit weights; name the original model with base (--base)"
                    )
                stored[name] = Stored(file=file, name=name, dtype=DTYPES[kind])
    return StoredWeights(stored)


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


# Names in files: `transformers` renames some weights, and rearranges others, as it loads them


def shared_names(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """The names of each weight that has several, such as the head's of tied embeddings; the embeddings' come first."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class NamesInFiles:
    """`files` has the name in the files for each weight by its name in the model; `written` those of them that the
    merged model's files have. The others are of a bare decoder, without the part that a causal language model puts
    before them. `obstacle` says why the files' tensors are not the model's, if so: then only `transformers` can load
    them."""

    files: dict[str, str]
    written: dict[str, str]
    obstacle: str | None = None


def names_in_files(model: PreTrainedModel, stored: Iterable[str], *, new_head: bool = False) -> NamesInFiles:
    """What the weights of `model` are called in its files, which have the names `stored`. With a `new_head`, they need
    not have what is behind the decoder."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    tensors = model.state_dict()
    files: dict[str, str] = {}
    written: dict[str, str] = {}
    for name in stored:
        bare, converted = rename_source_key(name, renamings, converters)
        own, _ = rename_source_key(name, renamings, converters, model.base_model_prefix or None, tensors)
        if own not in tensors:
            continue  # transformers leaves it out, too
        if converted is not None:
            obstacle = f"its files hold {own} in another arrangement than the model"
            return NamesInFiles(files={}, written={}, obstacle=obstacle)
        files[own] = name
        if own == bare:
            written[own] = name
    aliases = {name: group for group in shared_names(model) for name in group}
    body = f"{model.base_model_prefix}." if new_head else ""
    needed = [name for name in tensors if name.startswith(body)]
    missing = [name for name in needed if not files.keys() & set(aliases.get(name, (name,)))]
    lacking = f"its files have no weight that becomes {missing[0]}" if missing else None
    return NamesInFiles(files=files, written=written, obstacle=lacking)


# Writing


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
    shards: list[list[Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(other.size for other in shards[-1]) + piece.size > limit:
            shards.append([])
        shards[-1].append(piece)
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


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, which is removed in the end, whatever happens. So are folders that were made for
    the target, if they are still empty. Raises TunesmithError if nothing can be written there."""
    parents = [folder for folder in target.parents if not folder.exists()]
    folder = target.parent / f".{target.name}-{uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        if error.errno is None:  # one of transformers, about something else
            raise
        raise TunesmithError(f"{target} can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # something is in it
            for parent in parents:
                parent.rmdir()


def check_room(target: Path, needed: int) -> None:
    """Raises TunesmithError where fewer than `needed` bytes are free for `target`."""
    place = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise TunesmithError(f"{target.name} takes {size(needed)}, but only {size(free)} are free in {place}")
