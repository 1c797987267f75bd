"""The processes of a run on this machine, started and watched by the agent of `torchrun`.

The first process has the terminal; what the others print is kept until it is known whether they fail. Where one fails,
all are ended, and its error is the run's, unless they may be started again: then they go on from the run's newest
checkpoint. Ctrl-C and SIGTERM go to all of them, which save a checkpoint together.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from tunesmith.errors import TunesmithError
from tunesmith.runs.checkpoints import MANIFEST, checkpoints
from tunesmith.train.meeting import Meeting
from tunesmith.train.together import AGENT, LOST

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 20
"""Seconds in which the others must end where one has failed."""
KEPT_LINES = 30
"""Lines that a failed process printed last, which are shown."""
MISTAKE = 2
"""The exit code of what would fail again: a mistake in what was given, or a disk or memory that does not suffice."""
RESUME = "--resume-from-checkpoint"
FAILURE = "failure"
"""Where machines tell each other why a process of theirs failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """`processes` on each of `nodes` machines, of which this is number `node_rank`; they meet at `rendezvous`
    (HOST:PORT), which is the first machine. Where one fails, all are started again, up to `max_restarts` times."""

    processes: int
    max_restarts: int = 0
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
        if self.max_restarts < 0:
            raise TunesmithError(f"max_restarts is {self.max_restarts}; write 0 or more")
        if self.max_restarts and self.nodes > 1:
            raise TunesmithError(
                "max_restarts is for the processes of one machine, and --nodes is "
                f"{self.nodes}; leave it out, and start the command anew on each with {RESUME} where one fails"
            )
        if self.nodes < 1 or not 0 <= self.node_rank < self.nodes:
            raise TunesmithError(f"--node-rank is {self.node_rank} of --nodes {self.nodes}; count machines from 0")
        if self.nodes > 1 and self.rendezvous is None:
            raise TunesmithError("--nodes needs --rendezvous HOST:PORT, the same on all: the first machine and a port")
        if self.rendezvous is not None and not self.rendezvous.rpartition(":")[2].isdecimal():
            raise TunesmithError(f"--rendezvous is {self.rendezvous}; write HOST:PORT, such as 10.0.0.1:29500")


def launch(words: Sequence[str], place: Place, output: Path, say: Callable[[str], None]) -> tuple[int, str]:
    """Run `tunesmith` with `words` in each process of this machine; its exit code, and what there is to say of it. The
    run is in the folder `output`; `say` hears of a start again.

    Where the user stops the run, the code is 128 and the number of the signal, as it is of one process. Where one
    fails, it is the code of that one.
    """
    place.check()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it notes is said below
    with TemporaryDirectory(prefix="tunesmith-") as folder:
        with _environment(place):
            asked: list[int] = []
            agent = _agent(words, place, folder)
            agent.restarts = _Restarts(place=place, output=output, logs=Path(folder), asked=asked, say=say)
            with _signals(agent, asked):
                store = _meet(place, asked, say)
                if asked:
                    return 128 + asked[0], ""
                agent.store = store
                result = agent.run()
        if asked:
            return 128 + asked[0], ""
        if not result.is_failed():
            return 0, ""
        own = any(failure.exitcode != LOST for failure in result.failures.values())
        if store is not None and not own:
            return 1, _of_another(store, place)
        total = agent.get_worker_group().workers[0].world_size  # machines may have other numbers of processes
        code, text = _explained(result.failures, total, Path(folder))
        if store is not None:
            _tell(store, f"{socket.gethostname()} (--node-rank {place.node_rank}): {text or 'a process failed'}")
        return code, text


def _meet(place: Place, asked: Sequence[int], say: Callable[[str], None]) -> TCPStore | None:
    """Waits for the other machines, and returns what they can tell each other by; None of one machine alone, and where
    the user stops it."""
    if place.nodes == 1:
        return None
    meeting = Meeting(
        nodes=place.nodes,
        node_rank=place.node_rank,
        endpoint=str(place.rendezvous),
        say=say,
        stopped=lambda: bool(asked),
    )
    store = meeting.held()
    if store is not None and place.node_rank:
        say(f"all {place.nodes} machines are here; the first, at {place.rendezvous}, shows the run and has its files")
    return store


def _tell(store: TCPStore, text: str) -> None:
    with suppress(DistError):  # of the first machine, which may have left
        store.set(FAILURE, text)


def _of_another(store: TCPStore, place: Place) -> str:
    """What ended the run on this machine, where all went well here until another one failed."""
    try:
        said = store.get(FAILURE).decode() if store.check([FAILURE]) else "another machine is gone"
    except DistError:
        said = f"the first machine, at {place.rendezvous}, is gone; what it printed may say why"
    return f"{said}\nstart the command on all machines again, with {RESUME} where there is a checkpoint"


def _agent(words: Sequence[str], place: Place, folder: str) -> "_Agent":
    if place.nodes == 1:
        meeting = RendezvousParameters("c10d", "localhost:0", "tunesmith", 1, 1)
    else:
        endpoint, rank = str(place.rendezvous), place.node_rank
        meeting = RendezvousParameters("static", endpoint, "tunesmith", place.nodes, place.nodes, rank=rank)
    host, _, port = (place.rendezvous or "").rpartition(":")
    spec = WorkerSpec(
        role="tunesmith",
        local_world_size=place.processes,
        entrypoint=sys.executable,
        args=("-m", "tunesmith", *words),
        rdzv_handler=get_rendezvous_handler(meeting),
        max_restarts=place.max_restarts,
        monitor_interval=0.1,
        master_addr=host if place.nodes > 1 else None,
        master_port=int(port) if place.nodes > 1 else None,
        local_addr="localhost" if place.nodes == 1 else None,
    )
    quiet = {rank: Std.ALL for rank in range(place.processes) if rank or place.node_rank}
    return _Agent(
        spec=spec,
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=quiet),
        start_method="spawn",
        shutdown_timeout=GRACE,
    )


class _Restarts:
    """Whether, and from where, the processes of a run are started again.

    A checkpoint in the folder `output` that was not there before is of this run. Until there is one, what is started
    again begins as the run did.
    """

    def __init__(
        self, *, place: Place, output: Path, logs: Path, asked: Sequence[int], say: Callable[[str], None]
    ) -> None:
        self._place, self._output, self._logs, self._asked, self._say = place, output, logs, asked, say
        self._before = self._saved()
        self._count = 0

    def _saved(self) -> dict[Path, int]:
        """The checkpoints of the run in the folder by step, and when each was written."""
        manifests = {folder: folder / MANIFEST for folder in checkpoints(self._output)}
        return {folder: file.stat().st_mtime_ns for folder, file in manifests.items() if file.is_file()}

    def worth_it(self, failures: Mapping[int, Any]) -> bool:
        """Whether what failed may go well the next time. The user's own stop is no failure."""
        return not self._asked and all(failure.exitcode != MISTAKE for failure in failures.values())

    def more_words(self, failures: Mapping[int, Any]) -> tuple[str, ...]:
        """Tells of the start that follows; what the command gets besides, so that it goes on."""
        self._count += 1
        own = [folder for folder, written in self._saved().items() if self._before.get(folder) != written]
        _, text = _explained(failures, self._place.processes, self._logs)
        start = f"goes on from {own[-1].name}" if own else "begins again, since it has saved no checkpoint"
        count = f"restart {self._count} of {self._place.max_restarts}"
        self._say(f"{text or 'a process failed'}\nthe run {start} ({count})")
        return (RESUME,) if own else ()


class _Agent(LocalElasticAgent):
    """The agent of `torchrun`, which starts a run again where that can help, and lets it go on."""

    restarts: _Restarts
    store: TCPStore | None = None
    """What machines tell each other by, where there are several."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if self.store is not None and result.state == WorkerState.HEALTHY and self._another_failed(self.store):
            # Processes that have not met yet would wait for those of that machine.
            return RunResult(state=WorkerState.FAILED)
        if result.is_failed() and self._remaining_restarts > 0:
            if self.restarts.worth_it(result.failures):
                spec = worker_group.spec
                spec.args = (*spec.args, *self.restarts.more_words(result.failures))
            else:
                self._remaining_restarts = 0
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(timeout=GRACE)  # torch's own takes 30 seconds here, whatever it was given

    @staticmethod
    def _another_failed(store: TCPStore) -> bool:
        try:
            return bool(store.check([FAILURE]))
        except DistError:  # the first machine has left
            return True


@contextmanager
def _environment(place: Place) -> Iterator[None]:
    """What the processes inherit: the cores are divided, and PyTorch's warnings of each are left out."""
    before = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // place.processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ[AGENT] = str(os.getpid())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # the others are for all processes to hear
    if place.max_restarts:
        # Else processes that are started again find the addresses of those before them, and wait for these.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _signals(agent: LocalElasticAgent, asked: list[int]) -> Iterator[None]:
    """Hand Ctrl-C and SIGTERM on to all processes; the numbers that came are put into `asked`."""

    def hand_on(number: int, _: Any) -> None:
        asked.append(number)
        for worker in agent.get_worker_group().workers:
            with suppress(ProcessLookupError, TypeError):  # which is not there any more, or not yet
                os.kill(worker.id, number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explained(failures: Mapping[int, Any], total: int, logs: Path) -> tuple[int, str]:
    """The exit code of the process that failed first, and what it said, unless the terminal has that already. There are
    `total` processes on all machines."""
    causes = {rank: failure for rank, failure in failures.items() if failure.exitcode != LOST} or failures
    rank = min(causes, key=lambda rank: (causes[rank].exitcode == -signal.SIGTERM, causes[rank].timestamp, rank))
    failure, what = causes[rank], f"process {rank} of {total}"
    if failure.exitcode < 0:
        return 1, f"{what} was killed: {signal.Signals(-failure.exitcode).name}"
    started = max((int(folder.name.rpartition("_")[2]) for folder in logs.glob("*/attempt_*")), default=0)
    lines = [
        line
        for log in logs.glob(f"*/attempt_{started}/{failure.local_rank}/stderr.log")
        for line in log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-KEPT_LINES:]
    ]
    return int(failure.exitcode), "\n".join([f"{what} failed:", *lines]) if lines else ""
