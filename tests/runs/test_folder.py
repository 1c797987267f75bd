"""Two runs never write to one folder, and a run that died leaves none locked."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forked import event, start
from tunesmith.errors import TunesmithError
from tunesmith.runs.folder import only_run_in


def hold(folder: Path, held: Any) -> None:
    with only_run_in(folder):
        held.set()
        time.sleep(60)


def test_a_second_run_is_refused_with_the_owner_until_the_first_is_gone(
    tmp_path: Path, trainer_of: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    held = event()
    holder = start(hold, run, held)
    try:
        assert held.wait(60)
        trainer = trainer_of(output_dir=str(run))
        with pytest.raises(TunesmithError, match=rf"writing to .*run already: process {holder.pid} on .*, since 2"):
            trainer.train()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    trainer.train()
    assert trainer.state.global_step == 1
    trainer.train()  # and the folder is free again afterwards


def test_a_run_that_fails_lets_go(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out"), only_run_in(tmp_path):
        raise RuntimeError("out")
    with only_run_in(tmp_path):
        assert (tmp_path / ".owner").read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / ".owner").exists()


def test_an_output_that_can_not_be_signed_is_said_and_let_go(tmp_path: Path) -> None:
    (tmp_path / ".owner").mkdir()
    with pytest.raises(TunesmithError, match="can't be written: Is a directory"), only_run_in(tmp_path):
        raise AssertionError("held")
    (tmp_path / ".owner").rmdir()
    with only_run_in(tmp_path):
        pass
