"""Trainings that were started from the board: processes of their own, which go on when the board ends."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.errors import TunesmithError

TAIL = 6000
"""Characters of a job's output that are shown."""


@dataclass(kw_only=True)
class Job:
    """A training of the recipe `name`; what it prints goes to `log`."""

    number: int
    name: str
    process: "subprocess.Popen[bytes]"
    log: BinaryIO
    began: float = field(default_factory=time.time)

    def as_json(self) -> dict[str, Any]:
        code = self.process.poll()
        return {
            "number": self.number,
            "name": self.name,
            "began": self.began,
            "code": code,
            "running": code is None,
            "output": self.output(),
        }

    def output(self) -> str:
        size = os.fstat(self.log.fileno()).st_size
        content = os.pread(self.log.fileno(), TAIL, max(0, size - TAIL))
        return content.decode("utf-8", errors="replace")


class Jobs:
    """What was started, in order."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []

    def start(self, recipe: Path) -> Job:
        """Train the recipe in a process of its own, in the folder that the board runs in."""
        log = tempfile.TemporaryFile(prefix="tunesmith-")  # noqa: SIM115  (open as long as the job is listed)
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", "train", str(recipe)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the board's terminal is for the board
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "100"},
        )
        job = Job(number=len(self._jobs) + 1, name=recipe.name, process=process, log=log)
        self._jobs.append(job)
        return job

    def stop(self, number: int) -> Job:
        """Interrupt a job: it ends its step, saves a checkpoint, and ends. Raises TunesmithError for an unknown one."""
        job = next((job for job in self._jobs if job.number == number), None)
        if job is None:
            raise TunesmithError(f"there is no job {number}")
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGINT)
        return job

    def all(self) -> list[dict[str, Any]]:
        return [job.as_json() for job in reversed(self._jobs)]
