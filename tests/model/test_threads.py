"""How many threads compute follows what a container is given, faked here; they wait briefly where others need the
cores."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.model import threads
from tunesmith.model.threads import CHOSEN_BY_USER, LOOK, WAIT_CHOSEN, _watch, granted_cores, share_cores

GROUPS = {
    "version 2": ("0::/pod/app\n", {"pod/cpu.max": "50000 100000", "pod/app/cpu.max": "max 100000"}, 0.5),
    "the least counts": ("0::/pod/app\n", {"pod/cpu.max": "400000 100000", "pod/app/cpu.max": "150000 100000"}, 1.5),
    "seen from inside": ("0::/pod/app\n", {"cpu.max": "200000 100000"}, 2.0),
    "version 1": (
        "4:memory:/app\n3:cpu,cpuacct:/app\n0::/\n",
        {"cpu,cpuacct/app/cpu.cfs_quota_us": "25000\n", "cpu,cpuacct/app/cpu.cfs_period_us": "100000\n"},
        0.25,
    ),
    "version 1 without a limit": (
        "3:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "none": ("0::/\n", {}, None),
}


@pytest.mark.parametrize(("listed", "files", "cores"), GROUPS.values(), ids=GROUPS)
def test_the_cores_of_a_control_group(listed: str, files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    (tmp_path / "listed").write_text(listed)
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text)
    assert granted_cores(tmp_path / "listed", tmp_path / "mount") == cores


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert granted_cores(tmp_path / "missing", tmp_path) is None


@pytest.mark.parametrize(
    ("granted", "variables", "expected"),
    [(0.5, {}, 1), (2.4, {}, 3), (8.0, {}, 4), (None, {}, 4), (0.5, {"OMP_NUM_THREADS": "4"}, 4)],
)
def test_threads_are_no_more_than_the_cores_unless_the_user_says_how_many(
    granted: float | None,
    variables: dict[str, str],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(threads, "granted_cores", lambda: granted)
    for name in CHOSEN_BY_USER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.WARNING, "tunesmith")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        share_cores()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    told = f"Computes on {expected} of 4 threads: this container has {granted} processor cores"
    assert (told in caplog.text) == (expected < 4)


@pytest.mark.skipif(sys.platform != "linux", reason="the OpenMP of GCC is what torch has on Linux")
def test_a_second_team_of_threads_begins_and_ends_in_a_process_that_has_loaded_torch() -> None:
    program = (
        "import torch, tunesmith, json, threading\n"
        "from tunesmith.model.threads import share_cores, watch_cores, _of_loaded_openmp\n"
        "names = lambda: sorted(thread.name for thread in threading.enumerate())\n"
        "share_cores(); share_cores()\n"
        "first, end = names(), _of_loaded_openmp()()\n"
        "held = names()\n"
        "a = torch.ones(300, 300)\n"
        "sum = (a @ a).sum().item()\n"
        "end(); [thread.join() for thread in threading.enumerate() if 'team' in thread.name]\n"
        "print(json.dumps([watch_cores(), first, held, names() == first, sum, (a @ a).sum().item()]))"
    )
    known = {name: value for name, value in os.environ.items() if name not in WAIT_CHOSEN}
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=known)
    watched = ["MainThread", "tunesmith-leaves-cores"]
    assert json.loads(child.stdout) == [True, watched, [*watched, "tunesmith-second-team"], True, 27e6, 27e6]


def test_threads_wait_briefly_while_others_need_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """By how often they are put off: rarely, then often for three looks, then hardly any more."""
    rates = iter([35, 140, 200, 190, 120, *[80] * 10, 110, *[80] * 19, 80, 80])
    looks, total, events = 0, 0.0, list[tuple[str, int]]()

    def sleep(seconds: float) -> None:
        nonlocal looks, total
        rate = next(rates)  # ends the test with StopIteration
        looks, total = looks + 1, total + rate * seconds

    def begin() -> Any:
        events.append(("begins", looks))
        return lambda: events.append(("ends", looks))

    monkeypatch.setattr("tunesmith.model.threads.time.sleep", sleep)
    monkeypatch.setattr("tunesmith.model.threads.time.monotonic", lambda: looks * LOOK)
    with pytest.raises(StopIteration):
        _watch(begin, lambda: total)  # type: ignore[arg-type, return-value]
    assert events == [("begins", 3), ("ends", 36)]


def test_threads_wait_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "watch_cores", lambda: pytest.fail("changed"))
    for name in WAIT_CHOSEN:
        monkeypatch.setenv(name, "7")
        share_cores()
        monkeypatch.delenv(name)
