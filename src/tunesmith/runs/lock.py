"""One run a folder: two would mix their checkpoints and logs."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from tunesmith.errors import TunesmithError

LOCK, OWNER = ".lock", ".owner"


def check_writable(folder: Path) -> None:
    """Raises TunesmithError when `folder` can't be made, or written to. Nothing of it is left behind: a run that ends
    before it begins makes no folder."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        os.rmdir(tempfile.mkdtemp(prefix=".tunesmith-", dir=there))  # permissions alone don't tell, least of all root
    except OSError as error:
        raise _unwritable(folder, error) from error


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
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone by now, which the run has said
            (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _unwritable(folder: Path, error: OSError) -> TunesmithError:
    return TunesmithError(f"output {folder} can't be written: {error.strerror or error}; take another folder")


def _sign(owner: Path) -> None:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n", "utf-8")
