"""Ctrl-C and SIGTERM during training: the step is finished and a checkpoint saved, then the run stops."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnInterrupt(TrainerCallback):
    """Within `with StopOnInterrupt(say) as stop`, the first Ctrl-C or SIGTERM lets the step end, saves a checkpoint and
    ends `train()`; `stop.stopped` is then true, and `stop.exit_code` is 128 and the signal's number: 130 or 143. Where
    several processes train, all stop at the same step, whichever of them was told.

    The second one leaves at once, as without it: KeyboardInterrupt, or SystemExit with 143. The last checkpoint stays
    whole. `say` is told what happens. In a thread that isn't the main one signals can't be handled, and nothing
    changes.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked: int | None = None
        """The number of the signal that asked the run to stop."""
        self.stopped = False
        self._say = say
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        return 128 + (self.asked or signal.SIGINT)

    def __enter__(self) -> "StopOnInterrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.asked = number
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        self._say(f"stopping after this step, with a checkpoint; {name} again leaves at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._hear(args)
        if self.asked is not None:
            self.stopped = control.should_save = control.should_training_stop = True
        return control

    def _hear(self, args: TrainingArguments) -> None:
        """What any process was asked, all are: one that stopped alone would let the others wait for it."""
        if args.world_size > 1 and distributed.is_initialized():
            asked = torch.tensor([self.asked or 0], device=args.device)
            distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
            self.asked = int(asked) or None
