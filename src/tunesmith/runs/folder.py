"""The folder of a run: held by one process, on a disk that has room, and what to say where writing fails."""

import errno
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from peft import PeftModel
from torch import Tensor, nn

from tunesmith.errors import TunesmithError
from tunesmith.runs.files import OWNER, unwritable
from tunesmith.text import size

LOCK = ".lock"


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. The system lets go of the lock when the process ends, however it does, so none is
    left behind. Raises TunesmithError that names the owner when another process has it."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        _sign(folder / OWNER)
    except Timeout:
        owner = folder / OWNER
        named = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "another process"
        raise TunesmithError(f"a run is writing to {folder} already: {named}. Wait, or take another output") from None
    except OSError as error:
        lock.release()
        raise unwritable(f"output {folder}", error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone by now, which the run has said
            (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _sign(owner: Path) -> None:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n", "utf-8")


# Room for the next checkpoint

FULL = (errno.ENOSPC, errno.EDQUOT)
PAUSE = 1.0
"""Seconds before writing is tried again."""
MORE = 16 * 2**20
"""Bytes for the tokenizer, settings and the disk's own book-keeping."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


def estimated_size(model: nn.Module, optimizer: Any, optimizer_name: str, *, only_model: bool) -> int:
    """Bytes of a checkpoint: what is trained (without adapters, the whole model), and the optimizer's state.

    Before the first step there is none: it is taken to be two values for each that is trained, as Adam has them; a byte
    each in 8-bit ones; one for plain SGD.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    saved = trained if isinstance(model, PeftModel) else list(model.parameters())
    weights = sum(map(_bytes, saved)) + MORE
    if only_model:
        return weights
    states = _tensors(getattr(optimizer, "state", {}))
    if states:
        return weights + sum(map(_bytes, states))
    if any(word in optimizer_name for word in ("8bit", "4bit")):
        return weights + 2 * sum(weight.numel() for weight in trained)
    return weights + (1 if optimizer_name == "sgd" else 2) * sum(map(_bytes, trained))


def check_space(folder: Path, needed: int) -> None:
    """Raises TunesmithError where fewer than `needed` bytes are free for `folder`."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise TunesmithError(
            f"{folder}: the next checkpoint takes about {size(needed)}, and {size(free)} are free there. Free "
            f"{size(needed - free)} or more, write to another disk (output), or keep fewer checkpoints "
            "(save_total_limit) or only the model (save_only_model: true)"
        )


def twice(write: Callable[[], T], folder: Path, needed: int) -> T:
    """`write()`, tried once more where it fails for another reason than a full disk: a share may be away for a moment.

    Raises:
        TunesmithError: the disk is full, or writing failed twice; the checkpoints in `folder` are as before.
    """
    try:
        return write()
    except Exception as error:
        number = error_number(error)
        if number is None:
            raise
        if number in FULL:
            raise _explained(error, folder, needed) from error
        logger.warning("A checkpoint could not be written to %s: %s. Trying once more.", folder, error)
    time.sleep(PAUSE)
    try:
        return write()
    except Exception as error:
        if error_number(error) is None:
            raise
        raise _explained(error, folder, needed) from error


def _explained(error: Exception, folder: Path, needed: int) -> TunesmithError:
    kept = "The checkpoints from before are whole"
    if error_number(error) in FULL:
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(there).free
        return TunesmithError(
            f"the disk of {folder} is full: the checkpoint takes about {size(needed)}, and {size(free)} are free. "
            f"{kept}; free {size(max(needed - free, MORE))} or more there, and go on with --resume-from-checkpoint"
        )
    return TunesmithError(
        f"no checkpoint can be written to {folder}: {error}. {kept}, if the folder is there; make it one that you can "
        "write to, and go on with --resume-from-checkpoint"
    )


def error_number(error: BaseException) -> int | None:
    """The system's number of an error, which the libraries in Rust have in their text only; None for other errors."""
    while True:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"os error (\d+)", str(error)):
            return int(found[1])
        if "PytorchStreamWriter failed" in str(error):
            return errno.ENOSPC
        if error.__cause__ is None:
            return None
        error = error.__cause__


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value.values() for tensor in _tensors(item)] if isinstance(value, Mapping) else []


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
