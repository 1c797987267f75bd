"""Freed memory is kept for the next step."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from tests.forked import finished, start
from tunesmith.train import limits as memory


def page_faults(kept: bool, report: Path) -> None:
    """Writes how many page faults ten steps have that take and free the same memory."""
    if kept:
        assert memory.keep_freed_memory()
    for step in range(30):
        if step == 20:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64 * 2**20, dtype=torch.uint8)
    report.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what is told")
def test_the_pages_of_a_step_are_those_of_the_step_before(tmp_path: Path) -> None:
    def faults(kept: bool) -> int:
        assert finished(start(page_faults, kept, tmp_path / "report")) == 0
        return int((tmp_path / "report").read_text())

    assert faults(True) < faults(False) / 10


def test_an_unknown_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.train.limits.platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("tunesmith.train.limits.ctypes.CDLL", lambda *_: pytest.fail("called"))
    assert not memory.keep_freed_memory()
