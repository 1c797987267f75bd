"""The view of a run: what it shows at any width, what it costs, and where it is not drawn."""

import io
import logging
import math
import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from tunesmith.terminal.live import BARS, EVENTS_SHOWN, Curve, RunView, Snapshot, can_draw
from tunesmith.terminal.noise import Remarks
from tunesmith.train.progress import TrainingProgress


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def snapshot(**changes: Any) -> Snapshot:
    now = Snapshot(output="runs/first", total=200, epochs=2.0, step=50, epoch=0.5, loss=1.25, **changes)
    for i in range(300):
        now.curve.add(3.0 - i / 100)
    return now


def drawn(now: Snapshot, width: int, **console: Any) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, **console).print(RunView(now))
    return file.getvalue().splitlines()


def test_a_falling_curve_is_drawn_from_the_highest_bar_to_the_lowest() -> None:
    curve = Curve()
    for value in (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0):
        curve.add(value)
    assert curve.sparkline(20) == BARS[::-1]
    assert curve.sparkline(2) == "█▁"


def test_where_there_are_rewards_they_are_shown_in_place_of_the_loss() -> None:
    now = Snapshot(output="runs/first", total=2, epochs=1.0)
    step = {"memory_mb": None, "grad_norm": 1.0, "learning_rate": 0.1, "supervised_tokens": 1, "tokens": 2}
    for number, reward in enumerate((0.25, None, 0.75)):
        drawn_now = {} if reward is None else {"reward": reward}
        now.take({"loss": -float(number), "tokens_per_second": 1.0, **step, **drawn_now})
    assert now.curve.sparkline(2) == "▁█"
    assert any(line.startswith("reward 0.7500") for line in drawn(now, 60))


def test_a_long_curve_keeps_its_form_in_bounded_memory_and_leaves_out_what_is_not_finite() -> None:
    curve = Curve(most=64)
    for i in range(10_000):
        curve.add(math.nan if i % 100 == 0 else float(i))
    assert len(curve._means) < 64
    assert curve.sparkline(8) == BARS
    assert Curve().sparkline(8) == ""


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_view_fits_any_width_and_says_all_numbers(width: int) -> None:
    now = snapshot(speed=1234.0, supervised=0.41, memory=900.0, peak=2048.0, grad_norm=0.5, learning_rate=2e-4, left=75)
    now.eval_losses["eval loss"] = 1.5
    now.events += [f"event {i} " + "long " * 30 for i in range(9)]
    lines = drawn(now, width)
    assert all(len(line) < width for line in lines)
    told = ("50/200", "loss 1.2500", "eval loss 1.5000", "tokens/s 1,234", "supervised 41%", "memory 944 MB")
    more = ("peak 2.1 GB", "grad norm 0.5", "lr 2.00e-04", "left 1:15", "output runs/first", "event 8")
    if width >= 40:
        assert all(text in "\n".join(lines) for text in told + more)
    assert sum("event " in line for line in lines) == EVENTS_SHOWN
    assert len(lines) < 20


def test_all_events_are_there_in_full_when_the_run_is_over() -> None:
    now = snapshot(over=True)
    now.events.append("the loss is " + "very " * 30 + "high")
    assert drawn(now, 40)[-2].endswith("high")


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in "".join(drawn(snapshot(), 80, force_terminal=True))
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[3" in "".join(drawn(snapshot(), 80, force_terminal=True, color_system="standard"))


def test_a_view_is_drawn_on_terminals_that_can_go_back_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert can_draw(Console(file=Tty()))
    assert not can_draw(Console(file=io.StringIO()))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not can_draw(Console(file=io.StringIO()))  # colours in a pipe are no terminal
    monkeypatch.setenv("TERM", "dumb")
    assert not can_draw(Console(file=Tty()))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("CI", "true")
    assert not can_draw(Console(file=Tty()))


def test_warnings_of_libraries_are_heard_once_and_do_not_reach_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    library = logging.getLogger("a_library_of_its_own")
    own = logging.StreamHandler()
    library.addHandler(own)
    library.propagate = False
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with Remarks(heard.append):
            library.warning("disk %s", "full")
            logging.getLogger("tunesmith.train.guard").warning("Step 3: the loss is high.")
            for _ in range(2):
                warnings.warn("mind this\nand more", UserWarning, stacklevel=1)
            warnings.warn("written for developers", FutureWarning, stacklevel=1)
    assert heard == ["disk full", "Step 3: the loss is high.", "mind this"]
    assert capfd.readouterr().err == ""
    assert library.handlers == [own]


def test_the_terminal_is_given_back_when_a_run_ends_with_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Tty()
    state: Any = TrainerState(max_steps=9, num_train_epochs=1)
    state.is_world_process_zero = True
    args: Any = SimpleNamespace(output_dir="runs/first")

    def interrupted() -> None:
        with TrainingProgress(Console(file=file, force_terminal=True)) as view:
            view.on_train_begin(args, state, TrainerControl())
            logging.getLogger("tunesmith.train.guard").warning("Step 3: the loss is high.")
            assert "\x1b[?25l" in file.getvalue()
            assert "\x1b[?25h" not in file.getvalue()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    told = file.getvalue()
    assert told.rindex("\x1b[?25h") > told.rindex("\x1b[?25l")
    assert "Step 3: the loss is high." in told
    assert "stopped" in told
    assert all(type(handler).__name__ != "Remarks" for handler in logging.root.handlers)


def test_the_speed_and_the_time_left_in_a_plain_line_are_without_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([-50.0, -20.0, 0.0, 10.0, 10.0, 510.0, 520.0, 520.0, 530.0, 530.0])
    monkeypatch.setattr("tunesmith.train.progress.time.perf_counter", lambda: next(clock))
    file = io.StringIO()
    state: Any = TrainerState(max_steps=4, num_train_epochs=1)
    args, control = SimpleNamespace(output_dir="runs/first"), TrainerControl()
    view = TrainingProgress(Console(file=file, width=200))
    view.on_prediction_step(args, state, control)  # from -50 s: before training, which does not count
    view.on_evaluate(args, state, control)  # to -20 s
    view.on_train_begin(args, state, control)  # at 0 s
    state.global_step = 1
    view.on_step_end(args, state, control)  # at 10 s
    view.on_prediction_step(args, state, control)  # from 10 s
    view.on_evaluate(args, state, control)  # to 510 s
    state.global_step = 2
    view.on_step_end(args, state, control)
    view.on_log(args, state, control, logs={"loss": 1.0, "num_tokens": 400})
    assert file.getvalue() == "step 2/4  loss 1.0000  20 tokens/s  20 s left\n"
    state.global_step = 3
    view.on_step_end(args, state, control)
    numbers = {"memory_mb": 8.0, "grad_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 20.0}
    view._take({"loss": 0.5, "tokens": 600, "supervised_tokens": 300, **numbers})
    view.on_train_end(args, state, control)  # the last step, which was not logged
    assert file.getvalue().splitlines()[1:] == [
        "step 3/4  loss 0.5000  20 tokens/s  50% supervised  peak 8 MB  10 s left"
    ]


def test_what_is_shown_of_a_step_costs_far_less_than_a_millisecond() -> None:
    now = snapshot()
    line = {"loss": 1.0, "tokens": 9, "supervised_tokens": 3, "tokens_per_second": 5.0, "memory_mb": 7.0}
    started = time.process_time()
    for _ in range(1000):
        now.take(line | {"grad_norm": 1.0, "learning_rate": 0.1})
    assert (time.process_time() - started) / 1000 < 0.001
    assert now.supervised == pytest.approx(1 / 3)
