"""Checkpoint folders that are whole or not there.

A checkpoint is written to `.checkpoint-N.partial-XXXX/checkpoint-N` beside its place, flushed to the disk, described by
`manifest.json` (the size and SHA-256 of every file, and what the run was), and renamed to `checkpoint-N`. Who looks for
checkpoints sees the whole of it or nothing.

A folder that is used again holds the checkpoints of several runs. Each manifest has the id of its run, and `.run`
beside the checkpoints has that of the last run that took a step there: only its checkpoints are counted, resumed and
removed.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from tunesmith.errors import TunesmithError
from tunesmith.runs.files import follow_umask, write_whole

MANIFEST = "manifest.json"
CURRENT = ".run"
FORMAT = 2
"""Raise it with a change that an older version would read wrongly."""
NAME = re.compile(r"checkpoint-(\d+)")
PARTIALS = ".checkpoint-*.partial-*"
PICKLES = ("*.pt", "*.pth", "pytorch_model*.bin", "adapter_model*.bin")
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "*/adapter_model.safetensors")
STATE = "trainer_state.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What must be as it was for a run to go on, by name; values are those of JSON."""

    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    model: Mapping[str, Any]

    def differences(self, now: "Identity") -> list[str]:
        """`name: was -> is` of whatever differs. What only one of them knows was written by another version."""
        found = []
        for part in ("data", "settings", "model"):
            was, today = getattr(self, part), getattr(now, part)
            prefix = {"data": "data, ", "settings": "", "model": "model, "}[part]
            for name in sorted(was.keys() & today.keys()):
                if was[name] != today[name]:
                    found.append(f"{prefix}{name}: {was[name]} -> {today[name]}")
        return found

    def fingerprints(self) -> dict[str, str]:
        """A digest of each part."""
        return {
            part: hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
            for part, values in asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `manifest.json` says. `files` has the size in bytes and the SHA-256 of each file; `environment` what a run
    may change but what changes its rounding: device, threads, processes. `ways` says which of two ways was the faster
    one, by kind of call (`model.ways`); where `onednn` is no null, it says so of all of them, as in version 0.1. `run`
    is the id of the run, empty in what that version wrote."""

    run: str = ""
    step: int
    identity: Identity
    precision: str
    onednn: bool | None = None
    ways: Mapping[str, bool] = field(default_factory=dict)
    environment: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(size for size, _ in self.files.values())

    def to_json(self) -> str:
        values = asdict(self) | {"format": FORMAT, "fingerprints": self.identity.fingerprints()}
        values["files"] = {name: {"size": size, "sha256": digest} for name, (size, digest) in self.files.items()}
        return json.dumps(values | {"sha256": _digest(json.loads(json.dumps(values)))}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises TunesmithError for a folder without one, or with one that can't be read."""
        try:
            values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            own = values.pop("sha256", None)  # older versions wrote none
            if own is not None and own != _digest(values):
                raise TunesmithError(f"{folder / MANIFEST} has other content than was written: its SHA-256 differs")
            if values.pop("format") > FORMAT:
                raise TunesmithError(f"{folder} was written by a newer version of tunesmith; update this one")
            values.pop("fingerprints")
            values["files"] = {name: (int(one["size"]), str(one["sha256"])) for name, one in values["files"].items()}
            values["identity"] = Identity(**values["identity"])
            return cls(**values)
        except FileNotFoundError:
            raise TunesmithError(f"{folder} has no {MANIFEST}, so nobody can tell whether it is whole") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, TunesmithError):
                raise
            raise TunesmithError(f"{folder / MANIFEST} can't be read: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A checkpoint to go on from; `manifest` is None where another tool wrote it, `skipped` says which newer ones were
    passed over, and why."""

    folder: Path
    manifest: Manifest | None
    skipped: tuple[str, ...] = ()


# Writing


def begin(run: Path, step: int) -> Path:
    """The empty folder to write the checkpoint of `step` to, before `finish`. Raises OSError."""
    run.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".checkpoint-{step}.partial-", dir=run)) / f"checkpoint-{step}"
    try:
        folder.mkdir()
    except OSError:
        discard(folder)
        raise
    return folder


def finish(folder: Path, manifest: Manifest) -> Path:
    """Describe, flush and rename what was written to the `folder` of `begin`; returns where it is now.

    A checkpoint of that step that is there already is replaced. Raises OSError.
    """
    (folder / MANIFEST).unlink(missing_ok=True)  # of a first try, which failed
    follow_umask(folder)
    described = replace(manifest, files={name: _described(folder / name) for name in _files(folder)})
    (folder / MANIFEST).write_text(described.to_json(), encoding="utf-8")
    _flush(folder)
    run = folder.parent.parent
    target = run / folder.name
    if target.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=run))
        target.rename(aside / target.name)
        folder.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        folder.rename(target)
    _flush_folder(run)
    discard(folder)  # which is empty now
    return target


def discard(folder: Path) -> None:
    """Remove the `folder` of `begin`."""
    shutil.rmtree(folder.parent, ignore_errors=True)


def remove_partials(run: Path) -> None:
    """Remove what was cut short. A checkpoint that lacked only its last renaming gets it, or stays where it is."""
    for partial in run.glob(PARTIALS):
        try:
            for folder in partial.glob("checkpoint-*"):
                target = run / folder.name
                if not target.exists() and reason_against(folder) is None:
                    folder.rename(target)
        except OSError as error:
            logger.warning("%s can't be tidied up: %s.", partial, error)
        else:
            shutil.rmtree(partial, ignore_errors=True)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints of the run that wrote `newest` beyond `limit`, but never `newest` itself, nor the
    one at `best`. Those of other runs stay. Nothing is removed before `newest` is read again and found to be as it was
    written."""
    if limit is None or limit < 1:
        return
    run = _run_of(newest)
    found = [folder for folder in all_checkpoints(newest.parent) if _run_of(folder) == run]
    if len(found) <= limit:
        return
    verify(newest)
    kept = {newest} | ({Path(best)} if best is not None else set())
    removable = [folder for folder in found if folder not in kept and folder.resolve() not in kept]
    for folder in removable[: max(0, len(found) - max(limit, len(kept)))]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint: out of sight first, so that one cut short leaves no half of it. One that can't be removed
    stays, whole."""
    aside = folder.parent / f".{folder.name}.partial-removed"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.rename(aside)  # needs no room on the disk, as a folder to put it into would
    except OSError as error:
        logger.warning("%s can't be removed: %s.", folder, error)
        return
    shutil.rmtree(aside, ignore_errors=True)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _described(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    for path in (*(item for item in folder.rglob("*") if item.is_dir()), folder, folder.parent):
        _flush_folder(path)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # where folders can't be opened
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# Whose they are


def new_run() -> str:
    """The id of a run that begins now; later ones sort behind it."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{uuid4().hex[:8]}"


def take_over(folder: Path, run: str) -> None:
    """The folder is that of `run` from now on. Raises OSError."""
    write_whole(folder / CURRENT, f"{run}\n")


def run_in(folder: Path) -> str:
    """The id of the run whose folder this is: the last that took a step in it, or where none has said so, the last of
    those that wrote its checkpoints; empty for one of version 0.1."""
    try:
        return (folder / CURRENT).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return max((_run_of(item) or "" for item in all_checkpoints(folder)), default="")


def belongs_to(folder: Path, run: str) -> bool:
    """Whether the checkpoint in `folder` is there, and was written by `run`."""
    return folder.is_dir() and _run_of(folder) == run


def _run_of(folder: Path) -> str | None:
    """The id of the run that wrote a checkpoint, empty for one of version 0.1 or another tool; None where the manifest
    is lost or can't be read."""
    if not (folder / MANIFEST).is_file():
        return "" if _pickles(folder) else None
    try:
        return Manifest.read(folder).run
    except TunesmithError:
        return None


# Reading


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by step, the newest last, whichever run wrote them."""
    steps = {item: int(found[1]) for item in folder.glob("checkpoint-*") if (found := NAME.fullmatch(item.name))}
    return sorted((item for item in steps if item.is_dir()), key=lambda item: steps[item])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of the run whose folder this is (`run_in`) by step, the newest last; with those whose manifest
    can't be read, which nobody goes on from."""
    current = run_in(folder)
    return [item for item in all_checkpoints(folder) if _run_of(item) in (current, None)]


def others(folder: Path, run: str) -> list[Path]:
    """The checkpoints in a folder that other runs than `run` wrote, by step."""
    return [item for item in all_checkpoints(folder) if _run_of(item) not in (run, None)]


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        TunesmithError: the file that isn't, or that there is no manifest.
    """
    manifest = Manifest.read(folder)
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise TunesmithError(f"{folder} lacks {name}")
        if path.stat().st_size != size:
            raise TunesmithError(f"{path} has {path.stat().st_size:,} bytes, and was written with {size:,}")
        if _described(path)[1] != digest:
            raise TunesmithError(f"{path} has other content than was written: its SHA-256 differs")
    return manifest


def reason_against(folder: Path) -> str | None:
    """Why a checkpoint does not verify; None for one that does."""
    try:
        verify(folder)
    except TunesmithError as error:
        return str(error)
    return None


def newest_whole(run: Path, *, allow_pickle: bool = False) -> Chosen:
    """The newest checkpoint of the run in the folder `run` that verifies, or with `allow_pickle` that another tool
    wrote.

    Raises:
        TunesmithError: there is none; says what was passed over.
    """
    skipped = [f"{partial} is partial: its writing was cut short" for partial in run.glob(PARTIALS)]
    for folder in reversed(checkpoints(run)):
        try:
            return replace(checked(folder, allow_pickle=allow_pickle), skipped=tuple(skipped))
        except TunesmithError as error:
            skipped.append(str(error))
    raise TunesmithError(none_to_go_on_from(run, skipped))


def none_to_go_on_from(run: Path, skipped: Sequence[str] = ()) -> str:
    """What to say where the run in the folder `run` has no checkpoint; `skipped` says what was passed over, and why."""
    text = f"resume_from_checkpoint: there is no checkpoint in {run} to go on from"
    if earlier := others(run, run_in(run)):
        return (
            f"{text}: the last run there saved none, and {earlier[-1].name} is of an earlier run. Name it to go on "
            f"with that one (resume_from_checkpoint: {earlier[-1]}), or leave it out to start anew{_listed(skipped)}"
        )
    return f"{text}{_listed(skipped)}" + ("" if skipped else "; leave it out to start anew")


def not_on_this_machine(folder: Path) -> str:
    """What to say where process 0 goes on from a checkpoint and another process, whose machine has its own files, does
    not find it in `folder`."""
    return (
        f"resume_from_checkpoint: {folder} is not on {socket.gethostname()}, and each machine reads the checkpoint; "
        "put output on a disk that all machines share, or copy the checkpoint to the same path here"
    )


def checked(folder: Path, *, allow_pickle: bool = False) -> Chosen:
    """The checkpoint in `folder`, verified. One that another tool wrote has no manifest, and its states are pickles; it
    is taken only with `allow_pickle`, and then read by `torch.load(weights_only=True)`.

    Raises:
        TunesmithError: it does not verify, or needs pickles to be read.
    """
    if not (folder / STATE).is_file():
        raise TunesmithError(f"{folder} is no checkpoint: it has no {STATE}")
    pickles = _pickles(folder)
    foreign = not (folder / MANIFEST).is_file()
    needs = foreign or not any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    if pickles and needs and not allow_pickle:
        raise TunesmithError(
            f"{folder} was written by another tool, and {', '.join(pickles)} are pickles, which can run code when they "
            "are read; if you trust it, set allow_pickle: true (--allow-pickle), which reads plain data from them only"
        )
    if foreign and pickles:
        return Chosen(folder=folder, manifest=None)
    return Chosen(folder=folder, manifest=verify(folder))


def _pickles(folder: Path) -> list[str]:
    return sorted(item.name for pattern in PICKLES for item in folder.glob(pattern))


def _listed(lines: Sequence[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)
