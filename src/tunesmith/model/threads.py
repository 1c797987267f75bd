"""Threads that leave the cores to others: no more of them than this process may use, and none that waits in a loop on a
core that another program needs.

The OpenMP of GCC, which torch has on Linux, lets threads that have done their part of a product wait for the others in
a loop of some milliseconds. Alone on a machine that is the fastest way: to sleep instead makes a training step a tenth
longer. On a core that another program needs, the thread that they wait for comes no further meanwhile: beside one other
run, training went at less than a tenth of its speed. So a thread of ours looks four times a second how often the
threads of this process were put off their cores, and shortens the wait while that is often.

What shortens it: "if there are more OpenMP threads than available CPUs", that library waits for a hundred rounds only
(libgomp manual, GOMP_SPINCOUNT). A second team of threads, which sleeps, makes them more.
"""

import ctypes
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAIT_CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
LOOK = 0.25
"""Seconds between two looks."""
OFTEN, RARE = 150.0, 100.0
"""Times a second that threads were put off their cores: from the first on, others need them; below the second for CALM
looks, they don't any more. Alone on a machine it is some 35, beside one busy program 270 and more."""
CALM = 20

logger = logging.getLogger(__name__)


def share_cores() -> None:
    """Compute on no more threads than a container's share of the processor keeps busy, unless the environment says how
    many, and let them wait for each other briefly where others need the cores. A second call changes nothing."""
    granted = granted_cores()
    if granted is not None and not any(name in os.environ for name in CHOSEN_BY_USER):
        threads, fitting = torch.get_num_threads(), max(1, math.ceil(granted))
        if fitting < threads:
            torch.set_num_threads(fitting)
            logger.warning(
                "Computes on %d of %d threads: this container has %.3g processor cores. OMP_NUM_THREADS takes others.",
                fitting,
                threads,
                granted,
            )
    if not any(name in os.environ for name in WAIT_CHOSEN):
        watch_cores()


def granted_cores(process: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many processor cores the Linux control groups of this process let it use at a time, such as 0.5; None
    without a limit. Of nested groups, the least counts."""
    try:
        lines = [line.split(":", 2) for line in process.read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    limits: list[float] = []
    for _, controllers, path in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Inside a container, its own group is often the root that is mounted, under whatever path it is listed.
        root = mount / controllers
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                limits += _limit(folder)
    return min(limits, default=None)


def _limit(folder: Path) -> list[float]:
    """The limit of one group, of version 2 or 1; empty where it has none."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            return [int(quota) / int(period)] if int(quota) > 0 else []
        except (OSError, ValueError):  # no such file, or no limit ("max")
            continue
    return []


@cache
def watch_cores() -> bool:
    """Begin to look whether others need the cores; the threads of a GNU OpenMP that is loaded wait briefly while they
    do. Returns whether there is one."""
    team = _of_loaded_openmp()
    if team is None:
        return False
    threading.Thread(target=_watch, args=(team, _put_off), name="tunesmith-leaves-cores", daemon=True).start()
    return True


def _put_off() -> int:
    """How often threads of this process were put off their cores so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _watch(team: Callable[[], Callable[[], None]], put_off: Callable[[], int]) -> None:
    """`team` begins a second team, and returns what ends it."""
    end: Callable[[], None] | None = None
    calm, seen, looked = 0, put_off(), time.monotonic()
    while True:
        time.sleep(LOOK)
        now, times = time.monotonic(), put_off()
        rate = (times - seen) / (now - looked)
        seen, looked = times, now
        calm = calm + 1 if rate < RARE else 0
        if end is None and rate > OFTEN:
            end = team()
        elif end is not None and calm >= CALM:
            end()
            end = None


def _of_loaded_openmp() -> Callable[[], Callable[[], None]] | None:
    """What begins a second team of threads of a GNU OpenMP that this process has loaded; None without one."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            file = next((words[5] for line in maps if "libgomp" in line and len(words := line.split(None, 5)) == 6), "")
        library = ctypes.CDLL(file.strip(), mode=os.RTLD_NOLOAD | os.RTLD_NOW) if file else None
        run_in_team = library.GOMP_parallel if library else None
    except (OSError, AttributeError):  # not Linux, or another library of that name
        return None
    if run_in_team is None:
        return None
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing
    run_in_team.argtypes, run_in_team.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None

    def begin() -> Callable[[], None]:
        ended = threading.Event()

        def hold_team() -> None:
            run_in_team(nothing, None, (os.cpu_count() or 1) + 1, 0)
            ended.wait()  # the team ends with the thread that began it

        threading.Thread(target=hold_team, name="tunesmith-second-team", daemon=True).start()
        return ended.set

    return begin
