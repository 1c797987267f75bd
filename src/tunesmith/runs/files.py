"""The files that a run writes about itself as it goes: their names, and JSON that outlasts a crash.

metrics.jsonl   a line for each optimizer step, each evaluation and each event, all with their `step`
samples.jsonl   a line for each answer to one of the run's fixed prompts
examples.json   the losses of single training examples: the easiest, the hardest, how they are spread
preflight.json  what was found in the data before training
report.html     the page about the run; comparison.html is about several
"""

import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from uuid import uuid4

from tunesmith.errors import TunesmithError

METRICS, SAMPLES, EXAMPLES, PREFLIGHT = "metrics.jsonl", "samples.jsonl", "examples.json", "preflight.json"
ANSWERS = "answers.jsonl"
REPORT, COMPARISON = "report.html", "comparison.html"
OWNER = ".owner"
"""Says which process writes to the folder, as long as it does."""


def loss_name(metric: str) -> str | None:
    """What a loss in the metrics was taken of: `loss` -> "training", `eval_loss` -> "evaluation", `eval_math_loss` ->
    "evaluation: math". Other metrics: None."""
    if metric == "loss":
        return "training"
    if not (metric.startswith("eval_") and metric.endswith("_loss")):
        return None
    data_set = metric.removeprefix("eval_").removesuffix("loss").removesuffix("_")
    return f"evaluation: {data_set}" if data_set else "evaluation"


def check_writable(folder: Path, name: str = "") -> None:
    """Raises TunesmithError when `folder` can't be made, or written to; `name` is what the error calls it, by default
    the output. Nothing of it is left behind: a run that ends before it begins makes no folder."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        os.rmdir(tempfile.mkdtemp(prefix=".tunesmith-", dir=there))  # permissions alone don't tell, least of all root
    except OSError as error:
        raise unwritable(name or f"output {folder}", error) from error


def unwritable(name: str, error: OSError) -> TunesmithError:
    return TunesmithError(f"{name} can't be written: {error.strerror or error}; take another folder")


def is_held(folder: Path) -> bool:
    """Whether a process writes to the run in `folder`. One that can't be asked, on another machine say, is taken to
    live."""
    try:
        words = (folder / OWNER).read_text(encoding="utf-8").split()
        number, machine = int(words[1]), words[3].rstrip(",")
    except (OSError, ValueError, IndexError):
        return False
    if machine != socket.gethostname() or sys.platform == "win32":  # where asking would end the process
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically; the umask decides who may read it. A link, a pipe or a device, such as
    `/dev/stdout`, is written to and not replaced. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate, which JSON can name but UTF-8 can't hold, is written as JSON's escape.
    content = text.encode(errors="backslashreplace")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def follow_umask(folder: Path) -> None:
    """Lets the umask decide who may read the weights in `folder` and below it, as it does for other files: safetensors
    shuts out everybody else. Raises OSError."""
    probe = folder / f".{uuid4().hex[:8]}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds one line, which is in the file when this returns. Numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(_line(entry))


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file of JSON atomically."""
    write_whole(path, _line(value))


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(as_json(value), ensure_ascii=False, allow_nan=False) + "\n"


def up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines that `keep_up_to` would keep; the file is not changed."""
    return [entry for entry in read_lines(path) if entry.get("step", 0) <= step] if step else []


def keep_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines after `step`, and a last line that was cut off; returns those that are kept. At step 0, where a
    run starts anew, none are."""
    entries = up_to(path, step)
    if entries:
        write_whole(path, "".join(map(_line, entries)))
    else:
        path.unlink(missing_ok=True)
    return entries


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of lines; none if there is no file. A last line that was cut off, when the run was killed,
    is ignored.

    Raises TunesmithError for any other line that is no object.
    """
    if not path.is_file():
        return []
    entries = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # After the last line break comes a line that was cut off, or nothing.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise TunesmithError(
                f"{path}, line {number} is no JSON object: {line[:60]!r}; delete the line, or the file"
            )
        entries.append(entry)
    return entries


def read(path: Path) -> dict[str, Any] | None:
    """The object in a file of JSON, None if there is no file. Raises TunesmithError if it holds something else."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    if not isinstance(value, dict):
        raise unreadable(path, f"it holds {type(value).__name__}, not an object")
    return value


def unreadable(path: Path, why: object) -> TunesmithError:
    return TunesmithError(f"{path} can't be read: {why}. Delete it to go on without it")


# Values as JSON, and back


def as_json(value: Any) -> Any:
    """Any value as JSON: numbers that are not finite become null, paths their last part."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(item) for item in value]
    if isinstance(value, Enum):
        return as_json(value.value)
    if isinstance(value, os.PathLike):
        return last_part(os.fspath(value))
    if not isinstance(value, str | int | float | NoneType):
        scalar = getattr(value, "item", None)  # of numpy and torch
        return as_json(scalar()) if callable(scalar) else str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def last_part(path: str) -> str:
    """The name of a file or folder, from a path of any operating system."""
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or "model"


def from_json(value: Any, kind: Any, place: str = "") -> Any:
    """`value`, read from JSON, as the type `kind`. Raises ValueError that names the `place` of another type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for member in arguments:
            try:
                return from_json(value, member, place)
            except ValueError as error:
                last = error
        raise last
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        pairs = enumerate(zip(value, kinds, strict=True))
        return tuple(from_json(item, member, f"{place}[{i}]") for i, (item, member) in pairs)
    if origin is dict and isinstance(value, dict):
        return {key: from_json(item, arguments[1], f"{place}.{key}") for key, item in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        known = [name for name in value if name in hints]  # the others may be of a later version
        make: Any = kind
        try:
            return make(**{name: from_json(value[name], hints[name], f"{place}.{name}".lstrip(".")) for name in known})
        except TypeError as error:
            raise ValueError(f"{place or 'it'} is incomplete: {error}") from error
    if kind is Any or (kind is float and isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{place or 'it'} is {str(value)[:60]!r}")
