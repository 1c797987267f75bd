"""Freed memory is kept for the next step."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.train import memory

FAULTS = """
import resource, sys
import torch
from tunesmith.train.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    torch.ones(64 * 2**20, dtype=torch.uint8)
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what is told")
def test_the_pages_of_a_step_are_those_of_the_step_before() -> None:
    def faults(way: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < faults("given back") / 10


def test_an_unknown_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.train.memory.platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("tunesmith.train.memory.ctypes.CDLL", lambda *_: pytest.fail("called"))
    assert not memory.keep_freed_memory.__wrapped__()


HUGE = """
import re
import torch
from tunesmith.train.memory import keep_freed_memory, resident
before = resident()
assert keep_freed_memory()
assert resident() - before < 64 * 2**20
x = torch.ones(512 * 2**20, dtype=torch.uint8)
y = torch.ones(3 * 2**30, dtype=torch.uint8)
del x, y
assert resident() - before > 3 * 2**30  # more than the 2 GB that an int could name as a threshold
print(re.search(r"AnonHugePages: *([0-9]+) kB", open("/proc/self/smaps_rollup").read())[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what is told")
def test_the_heap_is_kept_whatever_its_size_in_huge_pages_where_the_system_has_them_on_request() -> None:
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True)
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting.exists() and "[never]" not in setting.read_text():
        assert int(done.stdout) > 3 * 2**20 * 0.9
