"""Threads that leave the cores to others: no more of them than this process may use, and none that waits in a loop.

The OpenMP of GCC, which torch has on Linux, lets threads that have done their part of a product wait for the others in
a loop of some milliseconds. On a core that another program needs, the one that they wait for comes no further
meanwhile: beside one other run, training went at less than a tenth of its speed. `GOMP_SPINCOUNT` shortens the wait,
where it is set before torch is loaded; `import tunesmith` does that. A script that imports torch or peft first is
helped here: "if there are more OpenMP threads than available CPUs", that library waits for a hundred rounds only
(libgomp manual, GOMP_SPINCOUNT), and a second team of threads, which sleeps, makes them more.
"""

import ctypes
import logging
import math
import os
import threading
from functools import cache
from pathlib import Path

import torch

CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAIT_CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

logger = logging.getLogger(__name__)


def share_cores() -> None:
    """Compute on no more threads than a container's share of the processor keeps busy, unless the environment says how
    many, and let none of them wait in a loop. A second call changes nothing."""
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
        wait_briefly()


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
def wait_briefly() -> bool:
    """Make the threads of a GNU OpenMP that is loaded already wait for each other for a hundred rounds only. Returns
    whether there was one."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            file = next((words[5] for line in maps if "libgomp" in line and len(words := line.split(None, 5)) == 6), "")
        library = ctypes.CDLL(file.strip(), mode=os.RTLD_NOLOAD | os.RTLD_NOW) if file else None
        run_in_team = library.GOMP_parallel if library else None
    except (OSError, AttributeError):  # not Linux, or another library of that name
        return False
    if run_in_team is None:
        return False
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing
    run_in_team.argtypes, run_in_team.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    team_waits = threading.Event()

    def hold_team() -> None:
        run_in_team(nothing, None, (os.cpu_count() or 1) + 1, 0)
        team_waits.set()
        threading.Event().wait()  # the team ends with the thread that began it

    threading.Thread(target=hold_team, name="tunesmith-waits-briefly", daemon=True).start()
    team_waits.wait()
    return True
