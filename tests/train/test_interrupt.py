"""The first Ctrl-C ends the step and saves; the second leaves at once; afterwards all is as before."""

import signal
import threading

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from tunesmith.train.interrupt import StopOnInterrupt


def after_a_step(stop: StopOnInterrupt) -> TrainerControl:
    return stop.on_step_end(TrainingArguments(output_dir="x", use_cpu=True), TrainerState(), TrainerControl())


def test_without_an_interrupt_nothing_changes() -> None:
    with StopOnInterrupt(print) as stop:
        control = after_a_step(stop)
    assert (stop.asked, control.should_save, control.should_training_stop) == (False, False, False)


def test_the_first_interrupt_saves_and_stops_and_the_second_leaves_at_once() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with StopOnInterrupt(said.append) as stop:
        signal.raise_signal(signal.SIGINT)
        control = after_a_step(stop)
        assert (stop.asked, control.should_save, control.should_training_stop) == (True, True, True)
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_nothing_is_handled_and_nothing_fails() -> None:
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with StopOnInterrupt(print):
            assert signal.getsignal(signal.SIGINT) is before

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
