"""The first Ctrl-C or SIGTERM ends the step and saves; the second leaves at once; afterwards all is as before."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunesmith.runs.checkpoints import PARTIALS, checkpoints, verify
from tunesmith.train.interrupt import SIGNALS, StopOnInterrupt

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
LEAVES: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


def after_a_step(stop: StopOnInterrupt) -> TrainerControl:
    return stop.on_step_end(TrainingArguments(output_dir="x", use_cpu=True), TrainerState(), TrainerControl())


def test_without_an_interrupt_nothing_changes() -> None:
    with StopOnInterrupt(print) as stop:
        control = after_a_step(stop)
    assert (stop.stopped, control.should_save, control.should_training_stop) == (False, False, False)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_interrupt_saves_and_stops_and_the_second_leaves_at_once(number: int) -> None:
    said: list[str] = []
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopOnInterrupt(said.append) as stop:
        signal.raise_signal(number)
        assert not stop.stopped
        control = after_a_step(stop)
        assert (stop.stopped, control.should_save, control.should_training_stop) == (True, True, True)
        assert stop.exit_code == CODES[signal.Signals(number)]
        assert len(said) == 1
        with pytest.raises(LEAVES[number]):
            signal.raise_signal(number)
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_in_another_thread_nothing_is_handled_and_nothing_fails() -> None:
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with StopOnInterrupt(print):
            assert signal.getsignal(signal.SIGINT) is before

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


class Signalling(TrainerCallback):
    """Sends its process a signal within a step."""

    def __init__(self, number: int, step: int) -> None:
        self._number, self._step = number, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            signal.raise_signal(self._number)


def test_a_run_told_to_stop_leaves_a_whole_checkpoint_of_the_step(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    with StopOnInterrupt(print) as stop:
        trainer = trainer_of(max_steps=9, callbacks=[stop, Signalling(signal.SIGTERM, 2)], async_save=True)
        trainer.train()
    assert stop.stopped
    assert trainer.state.global_step == 3
    [checkpoint] = checkpoints(tmp_path / "run")
    assert verify(checkpoint).step == 3


def test_an_interrupt_within_a_save_leaves_the_last_checkpoint_whole(
    trainer_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 9}
    with StopOnInterrupt(print) as stop:
        trainer = trainer_of(callbacks=[stop, Signalling(signal.SIGINT, 2)], **settings)
        flush, flushed = os.fsync, list[int]()

        def flushing(file: int) -> None:
            flushed.append(trainer.state.global_step)
            if flushed.count(3) == 4:
                signal.raise_signal(signal.SIGINT)
            flush(file)

        monkeypatch.setattr(os, "fsync", flushing)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    [checkpoint] = checkpoints(tmp_path / "run")
    assert verify(checkpoint).step == 2
    assert not list((tmp_path / "run").glob(PARTIALS))
