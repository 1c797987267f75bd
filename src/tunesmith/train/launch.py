"""The processes of a run on this machine, started and watched by the agent of `torchrun`.

The first process has the terminal; what the others print is kept until it is known whether they fail. Where one fails,
all are ended, and its error is the run's. Ctrl-C and SIGTERM go to all of them, which save a checkpoint together.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from tunesmith.errors import TunesmithError
from tunesmith.train.together import LOST

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 20
"""Seconds in which the others must end where one has failed."""
PATIENCE = 900
"""Seconds in which all machines must have come."""
KEPT_LINES = 30
"""Lines that a failed process printed last, which are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """`processes` on each of `nodes` machines, of which this is number `node_rank`; they meet at `rendezvous`
    (HOST:PORT), which is the first machine."""

    processes: int
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None

    def check(self) -> None:
        """Raises TunesmithError for what can't be started."""
        if self.processes < 1:
            raise TunesmithError(f"processes is {self.processes}; write 1 or more")
        devices = torch.cuda.device_count()
        if devices and self.processes > devices:
            raise TunesmithError(
                f"processes is {self.processes}, and this machine shows {devices} GPUs, each for one process; "
                f"write {devices} or less"
            )
        if self.nodes < 1 or not 0 <= self.node_rank < self.nodes:
            raise TunesmithError(f"--node-rank is {self.node_rank} of --nodes {self.nodes}; count machines from 0")
        if self.nodes > 1 and self.rendezvous is None:
            raise TunesmithError("--nodes needs --rendezvous HOST:PORT, the same on all: the first machine and a port")
        if self.rendezvous is not None and not self.rendezvous.rpartition(":")[2].isdecimal():
            raise TunesmithError(f"--rendezvous is {self.rendezvous}; write HOST:PORT, such as 10.0.0.1:29500")


def launch(words: Sequence[str], place: Place) -> tuple[int, str]:
    """Run `tunesmith` with `words` in each process of this machine; its exit code, and what there is to say of it.

    Where the user stops the run, the code is 128 and the number of the signal, as it is of one process. Where one
    fails, it is the code of that one.
    """
    place.check()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it notes is said below
    with TemporaryDirectory(prefix="tunesmith-") as folder:
        with _environment(place):
            agent = _agent(words, place, folder)
            with _signals(agent) as asked:
                result = agent.run()
        if asked:
            return 128 + asked[0], ""
        if not result.is_failed():
            return 0, ""
        return _explained(result.failures, place, Path(folder))


def _agent(words: Sequence[str], place: Place, folder: str) -> LocalElasticAgent:
    if place.nodes == 1:
        meeting = RendezvousParameters("c10d", "localhost:0", "tunesmith", 1, 1)
    else:
        settings: dict[str, Any] = {"rank": place.node_rank, "timeout": PATIENCE}
        endpoint = str(place.rendezvous)
        meeting = RendezvousParameters("static", endpoint, "tunesmith", place.nodes, place.nodes, **settings)
    host, _, port = (place.rendezvous or "").rpartition(":")
    spec = WorkerSpec(
        role="tunesmith",
        local_world_size=place.processes,
        entrypoint=sys.executable,
        args=("-m", "tunesmith", *words),
        rdzv_handler=get_rendezvous_handler(meeting),
        max_restarts=0,
        monitor_interval=0.1,
        master_addr=host if place.nodes > 1 else None,
        master_port=int(port) if place.nodes > 1 else None,
        local_addr="localhost" if place.nodes == 1 else None,
    )
    quiet = {rank: Std.ALL for rank in range(place.processes) if rank or place.node_rank}
    return LocalElasticAgent(
        spec=spec,
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=quiet),
        start_method="spawn",
        shutdown_timeout=GRACE,
    )


@contextmanager
def _environment(place: Place) -> Iterator[None]:
    """What the processes inherit: the cores are divided, and PyTorch's warnings of each are left out."""
    before = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // place.processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # the others are for all processes to hear
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _signals(agent: LocalElasticAgent) -> Iterator[list[int]]:
    """Hand Ctrl-C and SIGTERM on to all processes; the numbers that came."""
    asked: list[int] = []

    def hand_on(number: int, _: Any) -> None:
        asked.append(number)
        for worker in agent.get_worker_group().workers:
            with suppress(ProcessLookupError, TypeError):  # which is not there any more, or not yet
                os.kill(worker.id, number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explained(failures: Mapping[int, Any], place: Place, logs: Path) -> tuple[int, str]:
    """The exit code of the process that failed first, and what it said, unless the terminal has that already."""
    causes = {rank: failure for rank, failure in failures.items() if failure.exitcode != LOST} or failures
    rank = min(causes, key=lambda rank: (causes[rank].exitcode == -signal.SIGTERM, causes[rank].timestamp, rank))
    failure, what = causes[rank], f"process {rank} of {place.processes * place.nodes}"
    if failure.exitcode < 0:
        return 1, f"{what} was killed: {signal.Signals(-failure.exitcode).name}"
    lines = [
        line
        for log in logs.glob(f"*/*/{failure.local_rank}/stderr.log")
        for line in log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-KEPT_LINES:]
    ]
    return int(failure.exitcode), "\n".join([f"{what} failed:", *lines]) if lines else ""
