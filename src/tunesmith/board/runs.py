"""The runs below a folder, as the files that they leave tell of them, while they train and afterwards."""

import json
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.report.run_data import read_run
from tunesmith.runs.checkpoints import all_checkpoints
from tunesmith.runs.files import METRICS, as_json, is_held
from tunesmith.runs.record import RUN, RunRecord, prompt_text

DEPTH = 3
"""How deep below the folder a run may lie."""
MOST_ANSWERS = 400


class Runs:
    """The runs below `root`, each named by its path from there."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def all(self) -> list[dict[str, Any]]:
        """A line for each run, the one that was written to last at the top."""
        folders = sorted(self._folders(self.root, DEPTH), key=_changed, reverse=True)
        return [self._line(folder) for folder in folders]

    def folder(self, name: str) -> Path:
        """The folder of the run `name`. Raises TunesmithError for a name that is no run below the root."""
        folder = (self.root / name).resolve()
        if not folder.is_relative_to(self.root) or not _is_run(folder):
            raise TunesmithError(f"there is no run {name!r} in {self.root.name}/")
        return folder

    def lines(self, name: str, offset: int) -> dict[str, Any]:
        """The lines of `metrics.jsonl` from the byte `offset` on, and the byte to go on from. A shorter file belongs to
        a run that began anew: it is read from its beginning, and `anew` says so."""
        file = self.folder(name) / METRICS
        size = file.stat().st_size if file.is_file() else 0
        anew = offset > size
        start = 0 if anew else offset
        content = b""
        if size > start:
            with file.open("rb") as stream:
                stream.seek(start)
                content = stream.read(size - start)
        whole = content[: content.rfind(b"\n") + 1]  # a line that is still being written is left for the next time
        lines = [json.loads(line) for line in whole.decode("utf-8", errors="replace").splitlines() if line.strip()]
        return {"lines": lines, "offset": start + len(whole), "anew": anew}

    def details(self, name: str) -> dict[str, Any]:
        """What there is to read of a run besides its curves."""
        run = read_run(self.folder(name))
        record = run.record
        return {
            "name": name,
            "facts": [] if record is None else _facts(record),
            "events": [{"step": step, "event": event} for step, event in run.events],
            "answers": [
                {
                    "step": answer.step,
                    "prompt": prompt_text(answer.prompt),
                    "answer": answer.answer,
                    "expected": answer.expected,
                    "trained_on": answer.trained_on,
                }
                for answer in run.answers[-MOST_ANSWERS:]
            ],
            "examples": as_json(run.examples),
            "notes": list(run.notes),
            "checkpoints": as_json(run.checkpoints),
            "recipe": run.recipe,
        }

    def _folders(self, folder: Path, depth: int) -> list[Path]:
        if not folder.is_dir():
            return []
        if _is_run(folder) and folder != self.root:
            return [folder]
        if not depth:
            return []
        children = (child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
        return [run for child in children for run in self._folders(child, depth - 1)]

    def _line(self, folder: Path) -> dict[str, Any]:
        line: dict[str, Any] = {"name": folder.relative_to(self.root).as_posix(), "changed": _changed(folder)}
        try:
            record = RunRecord.read(folder)
        except TunesmithError as error:
            return line | {"state": "unreadable", "why": str(error)}
        last = _last_step(folder / METRICS)
        line |= {"step": last.get("step"), "loss": last.get("loss"), "seconds": last.get("seconds")}
        if is_held(folder):
            line["state"] = "running"
        else:
            line["state"] = (record.ended if record is not None else "") or "not finished"
        if record is not None:
            line |= {
                "trainer": record.trainer,
                "model": record.base_model.name,
                "method": str(record.method),
                "planned": record.planned_steps,
            }
        return line


def _facts(record: RunRecord) -> list[list[str]]:
    data = ", ".join(dict.fromkeys(count.origin.name for count in record.data))
    pairs = [
        ("base model", record.base_model.name),
        ("trained", str(record.method)),
        ("parameters", record.trained_share),
        ("data", data),
        ("device", record.device),
        ("trainer", record.trainer),
    ]
    return [[name, value] for name, value in pairs if value]


def _is_run(folder: Path) -> bool:
    if not ((folder / METRICS).is_file() or (folder / RUN).is_file()):
        return False
    return folder not in all_checkpoints(folder.parent)


def _changed(folder: Path) -> float:
    return max((file.stat().st_mtime for file in (folder / METRICS, folder / RUN) if file.is_file()), default=0.0)


def _last_step(file: Path, tail: int = 65536) -> dict[str, Any]:
    """The last line that a step wrote, of the last `tail` bytes."""
    if not file.is_file():
        return {}
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - tail))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "loss" in entry:
            return entry
    return {}
