"""Numbers that go wrong: steps without a finite loss and gradient are left out, and said to be."""

import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.data.batches import rows_of
from tunesmith.errors import TunesmithError
from tunesmith.model.load import newest_checkpoint
from tunesmith.settings.config import SFTConfig
from tunesmith.train.recovery import RecoveringTrainer

logger = logging.getLogger(__name__)
BAD_BATCHES = "bad_batches.jsonl"
REMEMBERED = 20
"""Logged losses that a new one is compared with."""
SPIKE = 2.0
"""A loss is a spike from so many times the median of those before it on, if that is also one nat more."""


class Losses:
    """The last logged losses of a run; `judge` says what is odd about a new one."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=REMEMBERED)

    def judge(self, loss: float) -> str | None:
        """What is odd about `loss`, which is remembered; None for nothing."""
        usual = median(self._last) if len(self._last) == REMEMBERED else None
        if math.isfinite(loss):
            self._last.append(loss)
        if loss == 0.0:
            return "the loss is exactly 0: no token of the step is supervised, or none is left to learn"
        if usual is not None and loss > max(SPIKE * usual, usual + 1.0):
            return f"the loss is {loss:.3f}, after a median of {usual:.3f} in the {REMEMBERED} entries before"
        return None


class GuardedTrainer(RecoveringTrainer):
    """A step whose gradient is not finite changes nothing: not the weights, not the optimizer. Its rows are written to
    `bad_batches.jsonl`; `max_bad_steps` of them in a row stop the run. `events` has what was odd, with the step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.events: list[tuple[int, str]] = []
        self.bad_steps = 0
        self._bad_in_a_row = 0
        self._losses = Losses()
        self._step_batches: list[tuple[Mapping[str, Any], Tensor]] = []
        super().__init__(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_batches.append((inputs, loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once a step, when its gradients are whole and not yet used."""
        norm = super()._get_grad_norm(model, grad_norm)
        batches, self._step_batches = self._step_batches, []
        # Every process has the same gradients, so all decide alike; a loss is its own process's.
        scaled = self.accelerator.scaler is not None  # fp16's scaler leaves out steps of its own, to find its scale
        losses = torch.stack([loss.float() for _, loss in batches])
        bad = not bool(losses.isfinite().all()) if scaled else not math.isfinite(float(norm))
        if not bad:
            self._bad_in_a_row = 0
            return norm
        if not scaled:
            for parameter in model.parameters():
                parameter.grad = None
        self._note_bad(batches, float(norm))
        return norm

    def _note_bad(self, batches: list[tuple[Mapping[str, Any], Tensor]], norm: float) -> None:
        self.bad_steps += 1
        self._bad_in_a_row += 1
        step, folder = self.state.global_step + 1, Path(str(self.args.output_dir))
        losses = [float(loss) for _, loss in batches]
        suspects = [i for i, loss in enumerate(losses) if not math.isfinite(loss)] or list(range(len(batches)))
        kept = f"its rows are in {folder / BAD_BATCHES}"
        if self.args.process_index == 0:
            lines = [json.dumps(self._described(step, batches[i][0], losses[i], norm)) for i in suspects]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / BAD_BATCHES).open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
            except OSError as error:  # a disk that is full costs the lines, not the run
                kept = f"its rows can't be written down: {error}"
        what = f"loss {losses[suspects[0]]}" if not all(map(math.isfinite, losses)) else f"gradient norm {norm}"
        self._event(step, f"{what}: the step was left out, {kept}")
        most = cast(SFTConfig, self.args).max_bad_steps
        if self._bad_in_a_row >= most:
            good = newest_checkpoint(folder)
            where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise TunesmithError(
                f"{most} steps in a row had no finite gradient, up to step {step}; {where}. Look at the rows in "
                f"{folder / BAD_BATCHES}, lower learning_rate, or set precision: fp32"
            )

    def _described(self, step: int, batch: Mapping[str, Any], loss: float, norm: float) -> dict[str, Any]:
        decode = getattr(self.processing_class, "decode", None)
        rows = [
            {"input_ids": row["input_ids"]} | ({"text": decode(row["input_ids"])} if decode else {})
            for row in (rows_of(batch) if {"input_ids", "labels"} <= batch.keys() else ())
        ]
        return {"step": step, "loss": str(loss), "grad_norm": str(norm), "rows": rows}

    def _event(self, step: int, text: str) -> None:
        self.events.append((step, text))
        if self.is_world_process_zero():
            logger.warning("Step %d: %s.", step, text)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and not self._bad_in_a_row:  # of a step that was left out, the log has a 0
            odd = self._losses.judge(logs["loss"])
            if odd is not None:
                self._event(self.state.global_step, odd)
        super().log(logs, start_time)
