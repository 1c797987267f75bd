"""What a person sees while training: one line that moves on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

PLAIN_SECONDS = 10
"""Outside a terminal, at most one line in this many seconds."""


class TrainingProgress(TrainerCallback):
    """Steps done, loss, tokens a second and the time left, in place of `transformers`' bar and printed dictionaries."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("Training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
        )
        self._task: TaskID | None = None
        self._printed = 0.0

    @classmethod
    def attach(cls, trainer: Trainer, console: Console) -> "TrainingProgress":
        """Show the progress of `trainer` on `console`, and nothing else."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        callback = cls(console)
        trainer.add_callback(callback)
        return callback

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self._started, self._tokens = time.perf_counter(), counted[-1] if counted else 0  # those of a resumed run
        self._first_step = state.global_step
        if self.console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, loss="-", speed="-")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self._show(logs, state)
        for name, value in logs.items():
            if name.startswith("eval_") and name.endswith("loss"):
                source = name.removeprefix("eval_").removesuffix("loss").rstrip("_")
                what = f"eval loss of {source}" if source else "eval loss"
                self.console.print(f"step {state.global_step}  {what} {value:.4f}", highlight=False)

    def _show(self, logs: dict[str, Any], state: TrainerState) -> None:
        elapsed = time.perf_counter() - self._started
        loss, speed = f"{logs['loss']:.4f}", f"{(logs['num_tokens'] - self._tokens) / elapsed:.0f}"
        if self._task is not None:
            self._bar.update(self._task, loss=loss, speed=speed)
        elif time.perf_counter() - self._printed > PLAIN_SECONDS or state.global_step == state.max_steps:
            self._printed = time.perf_counter()
            left = elapsed / (state.global_step - self._first_step) * (state.max_steps - state.global_step)
            line = f"step {state.global_step}/{state.max_steps}  loss {loss}  {speed} tokens/s  {left:.0f} s left"
            self.console.print(line, highlight=False)

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *error: object) -> None:
        """Give the terminal back, also when training ends with an exception."""
        self._bar.stop()
