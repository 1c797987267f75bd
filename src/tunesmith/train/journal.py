"""What a run writes of itself while it trains, a line a step, so that it can be looked at afterwards.

The files and their form are those of `runs.files`; only the main process writes.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from tunesmith.data.dataset import LOOKED_AT, numbered
from tunesmith.data.preflight import histogram, is_train
from tunesmith.data.typed import parsed
from tunesmith.errors import TunesmithError
from tunesmith.objectives.supervised import Supervised
from tunesmith.report.run_html import write_report
from tunesmith.runs.files import EXAMPLES, METRICS, PREFLIGHT, REPORT, SAMPLES, append, keep_up_to, up_to, write
from tunesmith.runs.record import RunRecord
from tunesmith.settings.config import SFTConfig
from tunesmith.train.guard import GuardedTrainer
from tunesmith.train.ledger import Ledger
from tunesmith.train.memory import give_back, resident
from tunesmith.train.samples import Asked, answered, before_and_after, chosen, refusal
from tunesmith.train.setup import Model
from tunesmith.types import IGNORE_INDEX, Row

logger = logging.getLogger(__name__)
MIB = 2**20


class JournalingTrainer(GuardedTrainer):
    """Each optimizer step, evaluation and event is a line of `metrics.jsonl` when it is over; with `sample_prompts`,
    answers go to `samples.jsonl` before training, with each evaluation and at the end. At last, also after an error,
    `report.html` shows all of it. A run that goes on from a checkpoint drops the lines behind it; what an earlier run
    wrote stays until the first step is over. Nothing here changes what is trained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._ledger = Ledger()
        self._journaling = False
        self._held: list[tuple[str, dict[str, Any]]] | None = []  # lines before the first step is over
        self._start = 0
        self._ended = ""
        self._asked: list[Asked] = []
        self._trained_on = False
        self._answers: list[dict[str, Any]] = []
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._written = 0
        self._began = self._clock = 0.0
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        """Told each line of `metrics.jsonl`, on the main process."""
        self.report: Path | None = None
        """The page about the run, when `train` is over; None where it could not be written, and on other processes."""
        super().__init__(*args, **kwargs)
        self.add_callback(_Moments(self))

    def record(self) -> RunRecord:
        """As it was, with the answers before and after training, where there are any."""
        # A best model that was loaded at the end is that of an earlier step.
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        samples = before_and_after(self._answers, best or self.state.global_step)
        return replace(super().record(), samples=samples, ended=self._ended)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`. A run that an error ends, or Ctrl-C, has a report of the steps before it."""
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            with suppress(Exception):  # what ended the run is told, not what could not be written about it
                if self._journaling and self.state.global_step:
                    self._note(METRICS, {"event": f"the run ended: {type(error).__name__}: {error}"})
                self._end_journal("error")
            raise

    # Steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._parts.append((loss.detach(), _counts(inputs, loss)))
        return loss

    def _restore(self, begin: Any) -> None:
        super()._restore(begin)
        self._ledger.forget_step()

    def _note_losses(self, inputs: Mapping[str, Any], result: Supervised) -> None:
        """The loss of each example of a batch that was trained on."""
        if self._journaling and not self._custom_collator:
            self._ledger.add(inputs, result.nll)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Called behind each step, and once more at the end of an epoch."""
        if self.state.global_step > self._written:
            self._note_step(grad_norm, kwargs.get("learning_rate"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        self._clock = time.perf_counter()  # what evaluation and saving took is not the next step's

    def _note_step(self, grad_norm: Any, learning_rate: float | None) -> None:
        parts, self._parts = self._parts, []
        self._written = self.state.global_step
        if not parts:
            return
        loss = torch.stack([loss.float() for loss, _ in parts]).sum()
        sums = torch.stack([loss, *torch.stack([counts for _, counts in parts]).sum(dim=0)])
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
            sums[0] /= self.args.world_size  # each process's loss is divided by the mean number of tokens
        values = sums.tolist()
        if not self._journaling:
            return
        self._open()
        self._ledger.end_step(self._written)
        taken = time.perf_counter() - self._clock
        entry = {
            "loss": values[0],
            "tokens": round(values[1]),
            "supervised_tokens": round(values[2]),
            "tokens_per_second": values[1] / taken if taken else None,
            "memory_mb": _memory(self.args.device),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "learning_rate": learning_rate,
        }
        self._note(METRICS, entry)

    def _event(self, step: int, text: str) -> None:
        super()._event(step, text)
        self._note(METRICS, {"event": text}, step)

    # Files

    def _note(self, file: str, entry: Mapping[str, Any], step: int | None = None) -> None:
        """One line; a disk that is full costs the line, not the run."""
        if not self._journaling:
            return
        step = self.state.global_step if step is None else step
        line = {"step": step, "epoch": self.state.epoch, **entry, "seconds": time.perf_counter() - self._began}
        if file == METRICS:
            for listener in self.listeners:
                listener(line)
        if self._held is not None:
            self._held.append((file, line))
        else:
            self._attempt(lambda: append(self._folder / file, line))

    def _attempt(self, act: Any) -> Any:
        try:
            return act()
        except (OSError, TunesmithError) as error:  # of a damaged file, too
            self._journaling = False
            logger.warning("In %s the run is not followed any further: %s.", self._folder, error)
            return None

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _begin_journal(self) -> None:
        self._journaling = self.is_world_process_zero()
        self._ledger, self._parts, self._ended = Ledger(), [], ""
        self._start = self._written = self.state.global_step
        self._held = self._held or []  # with evaluations before training
        if not self._journaling:
            return
        kept = self._attempt(lambda: up_to(self._folder / METRICS, self._start)) or []
        self._answers = self._attempt(lambda: up_to(self._folder / SAMPLES, self._start)) or []
        before = max((entry.get("seconds") or 0.0 for entry in kept), default=0.0)
        self._began = time.perf_counter() - before
        self._choose_prompts()
        self._answer()
        self._clock = time.perf_counter()

    def _open(self) -> None:
        """The files are this run's from now on."""
        if self._held is None:
            return
        held, self._held = self._held, None
        for file in (METRICS, SAMPLES):
            self._attempt(partial(keep_up_to, self._folder / file, self._start))
        self._attempt(lambda: write(self._folder / PREFLIGHT, self._preflight_report()))
        if not self._start:
            self._attempt(lambda: (self._folder / EXAMPLES).unlink(missing_ok=True))
        for file, line in held:
            if self._journaling:
                self._attempt(partial(append, self._folder / file, line))

    def _note_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """During training, before it or after."""
        entry = {name: value for name, value in metrics.items() if name != "epoch"}
        if self._journaling or not self.is_world_process_zero():
            self._note(METRICS, entry)
        elif self._held is not None:
            self._held.append((METRICS, {"step": 0, "epoch": None, **entry, "seconds": None}))
        elif self._ended:  # and not broken off by a full disk
            self._journaling = True
            self._note(METRICS, entry)
            self._write_report()
            self._journaling = False

    def _end_journal(self, ended: str) -> None:
        """`ended` says how: "finished", "stopped" or "error"."""
        if self._journaling and self._start and ended != "error":
            self._open()  # a run that went on from its last step has no other, and is its own
        begun, self._journaling = self._journaling and self._held is None, False
        if not begun:
            self._held = []
            return
        self._ended = ended
        self._ledger.end_pass()
        if (found := self._ledger.as_json(self._decode)) is not None:
            self._attempt(lambda: write(self._folder / EXAMPLES, found))
        self._write_report()

    def _write_report(self) -> None:
        """`report.html`, with the `run.json` that it needs, as things stand. A run stands without them."""
        try:
            self.record().write(self._folder)
            self.report = write_report([str(self._folder)], str(self._folder / REPORT))
        except Exception as error:  # whatever it is, weights that were trained and are not saved yet are worth more
            logger.warning("%s has no report (%s): %s", self._folder, type(error).__name__, error)

    def _decode(self, ids: list[int]) -> str:
        return str(cast(PreTrainedTokenizerBase, self.processing_class).decode(ids))

    def _preflight_report(self) -> dict[str, Any]:
        """What was found before training, with how many tokens of an example are supervised."""
        prepared = self._prepare._examples
        return self.preflight.as_json() | {
            "supervised_lengths": {name: histogram(_supervised(dataset)) for name, dataset in prepared.items()}
        }

    # Samples

    def _choose_prompts(self) -> None:
        count = cast(SFTConfig, self.args).sample_prompts or 0
        self._asked = []
        if not count or not self._journaling:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            why = "the weights are spread over processes, of which none can answer alone"
            self._event(self.state.global_step, f"sample_prompts: no prompt is answered, since {why}")
            return
        arguments: Any = cast(SFTConfig, self.args).chat_template_kwargs or {}
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        model = cast(Model, self.model)
        for trained_on in (False, True):  # rows that are trained on show less, but better than none
            if not self._asked:
                self._asked = chosen(self._rows(trained_on), count, model, tokenizer, arguments)
                self._trained_on = trained_on

    def _rows(self, trained_on: bool) -> Iterator[Row]:
        for split, (source, formats) in self._prepare._sources.items():
            if is_train(split) == trained_on:
                for _, row in islice(parsed(numbered(source), formats), LOOKED_AT):
                    yield row

    def _answer(self) -> None:
        """Answers to all prompts at this step, if they were not asked at it already."""
        step = self.state.global_step
        if not self._asked or not self._journaling or any(entry["step"] == step for entry in self._answers):
            return
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        try:
            answers = answered(cast(Model, self.model), tokenizer, self._asked, self.accelerator)
        except Exception as error:  # a model that can't answer, or has no memory left to, can be trained all the same
            self._asked = []
            give_back()
            self._event(step, f"prompts are not answered any more: {refusal(error)}")
            return
        for asked, answer in zip(self._asked, answers, strict=True):
            entry = {"prompt": asked.prompt.prompt, "expected": asked.prompt.expected, "answer": answer.text}
            self._answers.append({"step": step, **entry})
            self._note(SAMPLES, entry | {"ended": answer.ended, "trained_on": self._trained_on})


class _Moments(TrainerCallback):
    """Tells a trainer when what it writes begins and ends."""

    def __init__(self, trainer: JournalingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begin_journal()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._clock = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._trainer._ledger.end_pass()

    def on_evaluate(self, *_: Any, metrics: Mapping[str, Any] | None = None, **__: Any) -> None:
        if metrics:
            self._trainer._note_evaluation(metrics)
        self._trainer._answer()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._trainer._answer()
        state = self._trainer.state
        self._trainer._end_journal("finished" if state.global_step >= state.max_steps else "stopped")


def _counts(inputs: Mapping[str, Any], like: Tensor) -> Tensor:
    """Tokens and supervised tokens of a batch (2,), zeros where it does not say; counted where the batch is."""
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        return like.new_zeros(2, dtype=torch.float32)
    mask = inputs.get("attention_mask")
    # Labels are there for each token, also where documents share their beginning.
    tokens = mask.sum() if isinstance(mask, Tensor) else labels.new_tensor(labels.numel())
    supervised = (labels[..., 1:] != IGNORE_INDEX).sum()
    return torch.stack([tokens, supervised]).to(like.device, torch.float32)


def _memory(device: torch.device) -> float | None:
    """In MiB: what the process holds now, or on a GPU the most that tensors have held."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident()
    return None if held is None else held / MIB


def _supervised(dataset: Dataset) -> Any:
    """How many tokens of each example are supervised (N,)."""
    found = [np.zeros(0, np.int64)]
    for chunk in dataset.data.table.to_batches():
        column = chunk.column("labels")
        offsets = column.offsets.to_numpy().astype(np.int64)
        offsets -= offsets[0]
        marks = np.concatenate([[0], np.cumsum(column.flatten().to_numpy() != IGNORE_INDEX)])
        found.append(marks[offsets[1:]] - marks[offsets[:-1]])
    return np.concatenate(found)
