"""The files that a run writes about itself as it goes: their names, and lines of JSON that outlast a crash.

metrics.jsonl   a line for each optimizer step, each evaluation and each event, all with their `step`
samples.jsonl   a line for each answer to one of the run's fixed prompts
examples.json   the losses of single training examples: the easiest, the hardest, how they are spread
preflight.json  what was found in the data before training
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError

METRICS, SAMPLES, EXAMPLES, PREFLIGHT = "metrics.jsonl", "samples.jsonl", "examples.json", "preflight.json"


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds one line, which is in the file when this returns. Numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(_text(entry) + "\n")


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file of JSON, whole or not at all."""
    _replace(path, _text(value) + "\n")


def up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """What `keep_up_to` leaves; nothing is changed yet."""
    return [entry for entry in read_lines(path) if entry.get("step", 0) <= step] if step else []


def keep_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """Takes out of a file of lines what came after `step`, and returns what is left; a run that starts anew, at step 0,
    keeps nothing. A last line that was cut off goes, too."""
    kept = up_to(path, step)
    if kept:
        _replace(path, "".join(_text(entry) + "\n" for entry in kept))
    else:
        path.unlink(missing_ok=True)
    return kept


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines, none where there is no file. The last line may be cut off: the run was killed.

    Raises TunesmithError for any other line that is no object.
    """
    if not path.is_file():
        return []
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    whole = len(lines) - 1  # behind the last line break is what was cut off, or nothing
    for number, line in enumerate(lines[:whole], start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            found.append(entry)
        else:
            raise TunesmithError(
                f"{path}, line {number} is no JSON object: {line[:60]!r}; delete the line, or the file"
            )
    return found


def read(path: Path) -> dict[str, Any] | None:
    """The object in a file of JSON, None without one. Raises TunesmithError for a file that is none."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TunesmithError(f"{path} can't be read: {error}. Delete it to go on without it") from error
    if not isinstance(value, dict):
        raise TunesmithError(f"{path} holds {type(value).__name__}, not an object. Delete it to go on without it")
    return value


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # A lone surrogate, which JSON can name but UTF-8 can't hold, is written as JSON's escape.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.chmod(name, 0o644)  # a temporary file is its owner's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
