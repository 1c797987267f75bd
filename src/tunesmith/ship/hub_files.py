"""Which files of a run's folder a stranger needs, and in which form: a list of what may go, not of what may not."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tunesmith.errors import TunesmithError
from tunesmith.ship.card import ModelFolder, base_origin, hub_name

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_AND_MORE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
TEMPLATES = "additional_chat_templates"
MODEL_FILE = re.compile(
    rf"{re.escape(CONFIG)}|{re.escape(ADAPTER_CONFIG)}|{re.escape(ADAPTER_WEIGHTS)}|{re.escape(INDEX)}"
    r"|model(-\d+-of-\d+)?\.safetensors"
)
"""What decides which weights are loaded: one of these that an earlier push left behind would be loaded as well."""
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
PATH_KEYS = ("_name_or_path", "name_or_path")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A file of the repository: its path there, and the file here, or its bytes."""

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def run_folder(run: str | Path) -> Path:
    """The folder of `run`, if it holds a finished model. Raises TunesmithError."""
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise TunesmithError(f"there is no folder {run}; give the folder that a run was saved to")
    if (folder / ADAPTER_CONFIG).is_file() or (folder / CONFIG).is_file():
        return folder
    steps = {int(found[1]): item.name for item in folder.iterdir() if (found := CHECKPOINT.fullmatch(item.name))}
    if steps:
        newest = folder / steps[max(steps)]
        raise TunesmithError(f"{run} holds checkpoints, but no finished model; finish the run, or push {newest}")
    raise TunesmithError(f"{run} is no run: it has neither {CONFIG} nor {ADAPTER_CONFIG}")


def model_files(folder: Path, base_model: str | None) -> list[Item]:
    """Weights, settings and tokenizer of the run in `folder`, the settings without paths of this machine.

    `base_model` is the hub's name of the base model, None to take it from the adapters' settings. Raises TunesmithError
    where weights are missing, are no safetensors or are cut off, and where adapters belong to a model that nobody but
    this machine has.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    names = [ADAPTER_CONFIG] if is_adapter else [CONFIG]
    weights = [ADAPTER_WEIGHTS] if is_adapter else _weights(folder)
    for name in weights:
        _check_weights(folder / name)
    if not is_adapter and (folder / INDEX).is_file() and weights != [WEIGHTS]:
        names.append(INDEX)
    names += [name for name in TOKENIZER_AND_MORE if (folder / name).is_file()]
    names += [f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*.jinja"))]
    items = [Item(path=name, source=_published(folder, name, base_model)) for name in names]
    return sorted(items + [Item(path=name, source=folder / name) for name in weights], key=lambda item: item.path)


def left_out(folder: Path, items: list[Item]) -> list[str]:
    """The files and folders (with a slash) at the top of `folder` that are not among `items`."""
    sent = {item.path.split("/")[0] for item in items}
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name not in sent)


def _weights(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():  # which the libraries take before an index
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        shards = (_read(folder / INDEX).get("weight_map") or {}).values()
        names = sorted({str(name) for name in shards})
        if any(not MODEL_FILE.fullmatch(name) for name in names) or not names:
            raise TunesmithError(f"{folder / INDEX} names no weights, or files outside its folder: {names[:3]}")
        return names
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise TunesmithError(
            f"{folder} has its weights in pickle files, which can run code when they are read, and are not pushed; "
            "load the model where you trust it and call save_pretrained, which writes safetensors"
        )
    raise TunesmithError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")


def _check_weights(path: Path) -> None:
    """That the header is one, and the file as long as it says; the weights themselves are not read."""
    if not path.is_file():
        raise TunesmithError(f"{path} is missing; save the run again")
    try:
        with safe_open(path, framework="np"):
            pass
    except (OSError, SafetensorError) as error:
        raise TunesmithError(f"{path} is no safetensors file, or is cut off: {error}. Save the run again") from error


def _published(folder: Path, name: str, base_model: str | None) -> Path | bytes:
    """The file as it is, or its text where it names a place on this machine."""
    path = folder / name
    if not name.endswith(".json") or name in (INDEX, "tokenizer.json", "vocab.json"):
        return path
    values = _read(path)
    public = dict(values)
    if name == ADAPTER_CONFIG:
        public["base_model_name_or_path"] = _public_base(folder, base_model)
        if public["base_model_name_or_path"] != values.get("base_model_name_or_path"):
            public["revision"] = None  # it was one of the other name's
    for key in PATH_KEYS:
        if isinstance(public.get(key), str) and _is_local(public[key]):
            del public[key]
    return path if public == values else (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def _public_base(folder: Path, given: str | None) -> str:
    base = base_origin(ModelFolder.read(folder), None)
    name = given or hub_name(base)
    if name is None:
        raise TunesmithError(
            f"these adapters belong to the model in the local folder {base.name!r}, which nobody else has. Push that "
            "model first and name it: --base-model OWNER/NAME"
        )
    return name


def _is_local(name: str) -> bool:
    return any(mark in name for mark in ("\\", "~")) or name.startswith(("/", ".")) or Path(name).exists()


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TunesmithError(f"{path} can't be read: {error}. Save the run again") from error
    if not isinstance(values, dict):
        raise TunesmithError(f"{path} holds no object. Save the run again")
    return values


def small_texts(items: list[Item]) -> Iterator[tuple[str, bytes]]:
    """The files that could quote something: all but weights."""
    for item in items:
        if not item.path.endswith(".safetensors"):
            yield item.path, item.source if isinstance(item.source, bytes) else item.source.read_bytes()
