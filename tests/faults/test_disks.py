"""A disk of its own that fills up, turns read-only, or loses the run's folder in the middle of a save."""

import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.faults.children import SAVED_AT, broken, ended, same, started
from tests.faults.figures import FIGURES, LONG
from tests.faults.layer import Layer, do
from tests.train.children import Settings, run, trainer_of
from tunesmith.errors import TunesmithError
from tunesmith.model import ways
from tunesmith.runs import folder as disk
from tunesmith.runs.checkpoints import checkpoints

pytestmark = pytest.mark.slow
NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000  # sched.h
SIZE = "64m"


def mount(*arguments: str) -> None:
    """Raises OSError with what `mount` says."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


def own_disk(folder: Path) -> None:
    """A small disk at `folder`, which only this process sees. Raises OSError where none can be made."""
    user, group, root = os.getuid(), os.getgid(), os.geteuid() == 0
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS | (0 if root else NEW_USERS)):
        raise OSError(f"unshare: {os.strerror(ctypes.get_errno())}")
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", f"size={SIZE}", "disk", str(folder))


def fill(folder: Path) -> None:
    with (folder.parent / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 2**10, 1):
            try:
                while file.write(b"0" * size):
                    pass
            except OSError:
                continue


def turn_read_only(folder: Path) -> None:
    """What is open already stays writable, as a disk with open files can't be turned."""
    mount("--bind", str(folder), str(folder))
    mount("-o", "remount,ro,bind", str(folder))


def vanish(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def mend(folder: Path) -> None:
    (folder.parent / "filler").unlink(missing_ok=True)
    subprocess.run(["umount", str(folder)], capture_output=True)


HARMS: dict[str, Callable[[Path], None]] = {"full": fill, "read-only": turn_read_only, "gone": vanish}
SAID = {"full": "the disk of .*run is full", "read-only": "no checkpoint can be written to .*Read-only file system"}


class _InTheSave(TrainerCallback):
    def __init__(self, trainer: Any, layer: Layer) -> None:
        self._trainer, self._layer = trainer, layer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SAVED_AT:
            self._trainer.keeper.wait()
            self._layer.install()


def _on_a_disk(harm: str, number: int, folder: Path, tokenizer: Path, settings: Settings, begun: Any) -> None:
    """Writes `found.json`, and copies what is on the disk to `kept`."""
    mounted, mode = folder / "disk", "sources"
    mounted.mkdir()
    try:
        own_disk(mounted)
    except OSError as error:
        (folder / "found.json").write_text(json.dumps({"skipped": str(error)}))
        return
    torch.set_num_threads(1)
    os.environ["TUNESMITH_HOME"] = str(folder / "home")
    ways.force(False)
    disk.PAUSE = 0
    trainer = trainer_of(mode, mounted, tokenizer, **settings)
    layer = Layer(mounted / "run", do(number, lambda: HARMS[harm](mounted / "run")))
    trainer.add_callback(_InTheSave(trainer, layer))
    said = None
    try:
        trainer.train()
    except TunesmithError as error:
        said = str(error)
    layer.remove()
    left = [item.name for item in checkpoints(mounted / "run")]
    found = {"error": said, "left": left, "broken": broken(mounted / "run")}
    (folder / "found.json").write_text(json.dumps(found))
    mend(mounted / "run")
    run(mode, mounted, tokenizer, ("never", 0), False, settings)
    shutil.copytree(mounted, folder / "kept")


CASES = [(harm, number) for harm in HARMS for number in (20, 40)] if LONG else [("full", 40), ("read-only", 40)]


@pytest.mark.parametrize("settings", [{}, {"async_save": True}] if LONG else [{}], ids=str)
@pytest.mark.parametrize(("harm", "number"), CASES)
def test_a_disk_that_goes_wrong_stops_the_run_and_lets_it_go_on_later(
    harm: str, number: int, settings: Settings, tmp_path: Path, tiny_model: Path, whole: Callable[[str], Path]
) -> None:
    child, _ = started(_on_a_disk, harm, number, tmp_path, tiny_model, settings)
    assert ended(child) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    if "skipped" in found:
        pytest.skip(f"no disk can be made here: {found['skipped']}")
    assert found["broken"] == []
    if harm != "gone":  # a folder that is gone is made again, with the checkpoints from then on
        assert re.search(SAID[harm], found["error"])
        assert "checkpoint-2" in found["left"]
    same(tmp_path / "kept", whole("sources"))
    FIGURES["disks that went wrong"] += 1
    FIGURES["runs that ended in the same bits"] += 1
