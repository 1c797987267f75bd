"""What a run was: written beside its model as `run.json`, and read by whatever tells others of it."""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tunesmith.errors import TunesmithError
from tunesmith.home import DEMO, DEMO_FOLDER
from tunesmith.secrets import known_secrets, scrub

RUN = "run.json"
FORMAT = 1
"""Raise it with a change that an older version would read wrongly."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)

Text = str | tuple[dict[str, Any], ...]
"""A text, or the messages of a conversation as dictionaries of `role` and `content`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a model or data come from. Never a path of this machine: of a local file or folder there is the name."""

    kind: Literal["hub", "folder", "file", "memory", "demo"]
    name: str

    @classmethod
    def of_model(cls, name: str) -> "Origin":
        """Of what `model` says in a recipe: a name on the hub, a folder, or demo, whose cache folder counts as it."""
        last = _last_part(name)
        if name == DEMO or DEMO_FOLDER.fullmatch(last):
            return cls(kind="demo", name=DEMO)
        local = Path(name).expanduser().is_dir() or not HUB_ID.fullmatch(name)
        return cls(kind="folder", name=last) if local else cls(kind="hub", name=name)

    @classmethod
    def of_data(cls, name: str | None) -> "Origin":
        """Of what `data` says in a recipe: a file or a name on the hub, which may end in `:configuration`. None: rows
        that a program made."""
        if name is None:
            return cls(kind="memory", name="rows made by a program")
        hub_id, _, configuration = name.partition(":")
        on_hub = HUB_ID.fullmatch(hub_id) and re.fullmatch(r"[\w.-]*", configuration)
        is_file = Path(name).expanduser().exists() or Path(name).suffix.lower() in DATA_FILES
        return cls(kind="file", name=_last_part(name)) if is_file or not on_hub else cls(kind="hub", name=name)


DATA_FILES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"}


ADAPTERS = {"lora": "LoRA", "adalora": "AdaLoRA", "loha": "LoHa", "lokr": "LoKr", "vera": "VeRA"}


def adapters_of(kind: str) -> str:
    """The kind of adapters that `peft` calls `kind`, in either case, as papers spell it."""
    return f"{ADAPTERS.get(kind.lower(), kind.upper())} adapters"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What was trained. `kind` is "full" or the kind of adapter in lower case, such as "lora"; `bits` is the precision
    of a quantized base model, 4 or 8."""

    kind: str = "full"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: tuple[str, ...] = ()
    bits: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCount:
    """One source of one split, in numbers. `split` is "train", "eval", or the name under which a set is evaluated;
    `source` its name in a mixture, or the split's."""

    split: str
    source: str
    origin: Origin
    examples: int
    tokens: int
    supervised_tokens: int
    dropped: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What the model is asked, and the answer in the data."""

    prompt: Text
    expected: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt, answered before training and after."""

    prompt: Prompt
    before: str
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A run as far as it has come: `steps` of `planned_steps`. `ended` says how: "finished", "stopped" or "error";
    empty while the run goes on, and of earlier versions. `seconds` is the time that training took; `history` the
    trainer's `state.log_history`, `metrics` the last evaluation's; `prompts` are for whoever wants to ask the model,
    `samples` were asked.

    Numbers that are not finite are None in what is written, and tokens and passwords are blacked out.
    """

    versions: dict[str, str]
    base_model: Origin
    base_revision: str | None = None
    method: Method = field(default_factory=Method)
    trainable_parameters: int
    total_parameters: int
    data: tuple[SourceCount, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    metrics: dict[str, float | None] = field(default_factory=dict)
    steps: int | None = None
    planned_steps: int | None = None
    ended: str = ""
    seconds: float | None = None
    device: str = ""
    prompts: tuple[Prompt, ...] = ()
    samples: tuple[Sample, ...] = ()

    def to_json(self) -> str:
        """The text of the file."""
        text = json.dumps({"format": FORMAT, **_plain(self)}, indent=1, ensure_ascii=False, allow_nan=False)
        return scrub(text, [json.dumps(secret, ensure_ascii=False)[1:-1] for secret in known_secrets()]) + "\n"

    def write(self, folder: Path | str) -> Path:
        """Writes `run.json` in `folder`, whole or not at all, and returns its path."""
        path = Path(folder) / RUN
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{RUN}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
            os.chmod(name, 0o644)  # a temporary file is its owner's alone
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def read(cls, folder: Path | str) -> "RunRecord | None":
        """The record in `folder`, None without one. Raises TunesmithError for a file that is none."""
        path = Path(folder) / RUN
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"it holds {type(values).__name__}, not an object")
            written = values.pop("format", None)
            if not isinstance(written, int) or written > FORMAT:
                raise ValueError(f"its format is {written!r}, this version of tunesmith reads {FORMAT}")
            record = _typed(values, cls, "")
        except (OSError, ValueError, RecursionError) as error:
            raise TunesmithError(f"{path} can't be read: {error}. Delete it to go on without it") from error
        assert isinstance(record, cls)
        return record


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or "model"


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, os.PathLike):
        return _last_part(os.fspath(value))
    if not isinstance(value, str | int | float | NoneType):
        scalar = getattr(value, "item", None)  # of numpy and torch
        return _plain(scalar()) if callable(scalar) else str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _typed(value: Any, kind: Any, place: str) -> Any:
    """`value`, from JSON, as the type `kind`. Raises ValueError that says where it is something else."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(value, arguments, place)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(item, arguments[0], f"{place}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(item, arguments[1], f"{place}.{key}") for key, item in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return _object(value, kind, place)
    if kind is Any or (kind is float and isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{place or 'it'} is {str(value)[:60]!r}")


def _one_of(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    for kind in kinds:
        try:
            return _typed(value, kind, place)
        except ValueError as error:
            last = error
    raise last


def _object(value: dict[str, Any], kind: Any, place: str) -> Any:
    hints = get_type_hints(kind)
    given = {name: item for name, item in value.items() if name in hints}  # the rest may be of a later version
    try:
        return kind(**{name: _typed(item, hints[name], f"{place}.{name}".lstrip(".")) for name, item in given.items()})
    except TypeError as error:
        raise ValueError(f"{place or 'it'} is incomplete: {error}") from error
