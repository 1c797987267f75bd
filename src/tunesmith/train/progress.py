"""What a person sees while training: a view that is drawn in place on a terminal; elsewhere plain lines, one in so many
steps as `logging_steps` says."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from tunesmith.model.load import no_bars
from tunesmith.terminal.live import ResizableLive, RunView, Snapshot, can_draw
from tunesmith.terminal.noise import Remarks
from tunesmith.text import printable, size


class TrainingProgress(TrainerCallback):
    """How a run goes, in place of `transformers`' bars and printed dictionaries, until the end of the `with` block.
    While a view is drawn, what libraries say on a terminal is an event of it. Only the main process shows anything."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._draws = can_draw(console) and not console.quiet
        self._live: ResizableLive | None = None
        self._open = ExitStack()
        self._silenced = ExitStack()
        self._evaluated, self._read, self._shown = 0.0, 0, 0
        self._slowest = ""
        self._now = Snapshot(output="", total=0, epochs=0)

    @classmethod
    def attach(cls, trainer: Trainer, console: Console) -> "TrainingProgress":
        """Show the progress of `trainer` on `console`, and nothing else."""
        callback = cls(console)
        callback.follow(trainer)
        return callback

    def follow(self, trainer: Trainer) -> None:
        """Show `trainer`, which has the numbers of each step where it keeps a journal."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(self)
        self._silenced.enter_context(no_bars())
        listeners = getattr(trainer, "listeners", None)
        if listeners is not None:
            listeners.append(self._take)

    def _take(self, line: Mapping[str, Any]) -> None:
        self._now.take(line)
        self._read += line.get("tokens") or 0
        self._slowest = slowest(line.get("processes") or ())

    def say(self, text: str) -> None:
        """An event of the view while it is drawn, else a line."""
        if self._live is not None:
            self._now.events.append(text)
        else:
            self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    # The run

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self._started, self._tokens = time.perf_counter(), counted[-1] if counted else 0  # those of a resumed run
        self._first_step = self._shown = state.global_step
        self._evaluated, self._read = 0.0, 0
        total, epochs = state.max_steps, float(state.num_train_epochs)
        self._now = Snapshot(output=str(args.output_dir), total=total, epochs=epochs, step=state.global_step)
        for entry in state.log_history:
            if "loss" in entry:
                self._now.curve.add(entry["loss"])
        if self._draws and state.is_world_process_zero:
            self._live = ResizableLive(RunView(self._now), self.console)
            self._open.enter_context(self._live)
            self._open.enter_context(Remarks(self.say))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now, done = self._now, state.global_step - self._first_step
        now.step, now.epoch, now.phase = state.global_step, state.epoch or 0.0, "training"
        now.left = self._trained() / max(done, 1) * (now.total - now.step)

    def _trained(self) -> float:
        """Seconds, without those of evaluations."""
        return time.perf_counter() - self._started - self._evaluated

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._now.phase != "evaluating":
            self._now.phase, self._evaluating = "evaluating", time.perf_counter()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._now.phase == "evaluating":
            self._evaluated += time.perf_counter() - self._evaluating
            self._now.phase = "training"

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._live is not None:
            self.say(f"saved checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        logs = kwargs["logs"]
        if "loss" in logs:
            if self._now.loss is None:  # nobody tells of each step
                self._now.curve.add(logs["loss"])
            self._show(logs["loss"], logs["num_tokens"] - self._tokens, state)
        for name, value in logs.items():
            if name.startswith("eval_") and name.endswith("loss"):
                self._show_eval(name, value, state)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._shown < state.global_step and self._now.loss is not None:
            self._show(self._now.loss, self._read, state)  # the last step, however rarely steps are logged
        self._now.phase = "stopped" if state.global_step < state.max_steps else "trained"
        self._close()

    # What is shown

    def _show(self, loss: float, tokens: float, state: TrainerState) -> None:
        """A plain line; `tokens` were read since training began."""
        now, self._shown = self._now, state.global_step
        if self._live is not None:
            return
        speed = tokens / self._trained()
        parts = [f"step {state.global_step}/{state.max_steps}", f"loss {loss:.4f}", f"{speed:.0f} tokens/s"]
        parts += [] if now.supervised is None else [f"{now.supervised:.0%} supervised"]
        parts += [] if now.peak is None else [f"peak {size(now.peak * 2**20)}"]
        parts += [self._slowest] if self._slowest else []
        self.console.print("  ".join([*parts, f"{now.left or 0:.0f} s left"]), highlight=False, soft_wrap=True)

    def _show_eval(self, name: str, value: float, state: TrainerState) -> None:
        source = name.removeprefix("eval_").removesuffix("loss").rstrip("_")
        self._now.eval_losses[f"eval loss {source}".rstrip()] = value
        if not source:
            self._now.best = value if self._now.best is None else min(value, self._now.best)
        if self._live is None:
            what = f"eval loss of {source}" if source else "eval loss"
            self.console.print(f"step {state.global_step}  {what} {value:.4f}", highlight=False)

    def _close(self) -> None:
        """The last picture stays, with all events; the terminal is given back."""
        self._now.over, self._now.left = True, None
        self._open.close()
        self._live = None

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *error: object) -> None:
        """Give the terminal back, also when training ends with an exception."""
        self._silenced.close()
        if self._live is not None:
            self._now.phase = "stopped"
            self._close()


def slowest(processes: Sequence[Mapping[str, Any]]) -> str:
    """Which of the `processes` of a line of `metrics.jsonl` the others wait for, if they do for more than a hundredth
    of their time."""
    if len(processes) < 2:
        return ""
    waited = [float(process["waited"]) for process in processes]
    rank = min(range(len(waited)), key=lambda rank: waited[rank])
    share = (sum(waited) - waited[rank]) / (len(waited) - 1)
    return f"process {rank} slowest, others wait {share:.0%}" if share >= 0.01 else ""
