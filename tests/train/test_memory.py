"""Freed memory is kept for the next step."""

import platform
import subprocess
import sys

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
    assert not memory.keep_freed_memory()
