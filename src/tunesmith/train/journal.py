"""What a run writes of itself while it trains, a line a step, so that it can be looked at afterwards.

The files and their form are those of `runs.files`; only the main process writes.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer

from tunesmith.data.batches import Batch
from tunesmith.data.preflight import Preflight, histogram, supervised_counts
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model, base_model
from tunesmith.runs.describe import adapter_settings_of, counts_of, method_of, prompts_of, settings_of, versions
from tunesmith.runs.files import EXAMPLES, METRICS, PREFLIGHT, SAMPLES, append, keep_up_to, up_to, write
from tunesmith.runs.record import RunRecord
from tunesmith.settings.config import Config
from tunesmith.train.identity import model_origin
from tunesmith.train.ledger import Ledger
from tunesmith.train.limits import give_back, resident
from tunesmith.train.samples import Asked, answered, before_and_after, chosen, refusal
from tunesmith.train.sharding import is_shared_out
from tunesmith.types import Row

logger = logging.getLogger(__name__)
MIB = 2**20
PROMPTS = 3
"""Prompts in the record of a run, for whoever wants to ask the model."""


class DataSeen(Protocol):
    """What a journal wants to know of the data."""

    @property
    def examples(self) -> Mapping[str, Dataset]:
        """The prepared examples of each split, before packing."""

    def rows(self, trained_on: bool) -> Iterator[Row]:
        """Rows as they were understood: those that are trained on, or the others."""

    def first_rows(self) -> Iterator[Row]:
        """Some rows of each source; those that are not trained on come first."""


class Journal:
    """Each optimizer step, evaluation and event is a line of `metrics.jsonl` when it is over; with `sample_prompts`,
    answers go to `samples.jsonl` before training, with each evaluation and at the end. At last, also after an error,
    `draw_page` may show all of it. A run that goes on from a checkpoint drops the lines behind it; what an earlier run
    wrote stays until the first step is over. Nothing here changes what is trained.

    `data` and `preflight` are None where nothing is known of the rows. `tell` hears what is odd, with the step.
    `draw_page` gets the folder of a run, and returns the file of its page; `write_record` writes what the page needs of
    the run's settings.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: DataSeen | None,
        preflight: Preflight | None,
        *,
        tell: Callable[[int, str], None],
        draw_page: Callable[[Path], Path] | None,
        write_record: Callable[[Path], object],
    ) -> None:
        self._trainer, self._data, self._preflight, self._tell = trainer, data, preflight, tell
        self._draw_page, self._write_record = draw_page, write_record
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        """Told each line of `metrics.jsonl`, on the main process."""
        self.page: Path | None = None
        """The page about the run, when training is over; None where it was not drawn, and on other processes."""
        self.ended = ""
        """How the run ended: "finished", "stopped" or "error"; empty while it goes on."""
        self.answers: list[dict[str, Any]] = []
        """The answers so far, as lines of `samples.jsonl`."""
        self._ledger = Ledger()
        self._active = False
        self._held: list[tuple[str, dict[str, Any]]] | None = []  # lines before the first step is over
        self._start = self._written = 0
        self._asked: list[Asked] = []
        self._trained_on = False
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._began = self._clock = 0.0

    @property
    def _args(self) -> Config:
        return cast(Config, self._trainer.args)

    @property
    def _shared(self) -> bool:
        """Whether several processes train: losses are gathered from all, whatever becomes of the files of the first."""
        return self._args.world_size > 1

    def _gather(self, own: Any) -> list[Any]:
        return list(gather_object([own])) if self._shared else [own]

    @property
    def _folder(self) -> Path:
        return Path(str(self._args.output_dir))

    def samples(self, step: int) -> Any:
        """The answers before training and at `step`, or the last one that was asked."""
        return before_and_after(self.answers, step)

    # Before the first step, and after the last

    def begin(self) -> None:
        self._active = self._trainer.is_world_process_zero()
        self._ledger, self._parts, self.ended = Ledger(self._gather), [], ""
        self._start = self._written = self._trainer.state.global_step
        self._held = self._held or []  # with evaluations before training
        self._asked = []
        if self._active:
            self._begin_files()
        self.answer()
        self.start_clock()

    def _begin_files(self) -> None:
        lines = self._attempt(lambda: up_to(self._folder / METRICS, self._start)) or []
        self.answers = self._attempt(lambda: up_to(self._folder / SAMPLES, self._start)) or []
        before = max((entry.get("seconds") or 0.0 for entry in lines), default=0.0)
        self._began = time.perf_counter() - before
        self._choose_prompts()

    def end(self, ended: str) -> None:
        """`ended` says how: "finished", "stopped" or "error"."""
        if self._active and self._start and ended != "error":
            self._open()  # a run that went on from its last step has no other, and is its own
        begun, self._active = self._active and self._held is None, False
        if not begun:
            self._held = []
            return
        self.ended = ended
        self._ledger.end_pass(alone=True)  # after an error nobody answers, and without one the pass is over already
        decode = getattr(self._trainer.processing_class, "decode", str)
        if (examples := self._ledger.as_json(lambda ids: str(decode(ids)))) is not None:
            self._attempt(lambda: write(self._folder / EXAMPLES, examples))
        self._draw()

    def break_off(self, error: BaseException) -> None:
        """An error ended the run, or Ctrl-C: there is a page of the steps before it."""
        with suppress(Exception):  # what ended the run is told, not what could not be written about it
            if self._active and self._trainer.state.global_step:
                self._note(METRICS, {"event": f"the run ended: {type(error).__name__}: {error}"})
            self.end("error")

    def _draw(self) -> None:
        """The page, with the `run.json` that it needs, as things stand. A run stands without them."""
        try:
            self._write_record(self._folder)
            if self._draw_page is not None:
                self.page = self._draw_page(self._folder)
        except Exception as error:  # whatever it is, weights that were trained and are not saved yet are worth more
            logger.warning("%s has no report (%s): %s", self._folder, type(error).__name__, error)

    # Steps

    def note_batch(self, batch: Mapping[str, Any] | Batch, loss: Tensor) -> None:
        """A micro-batch of the step is over."""
        self._parts.append((loss.detach(), _counts(batch, loss)))

    def note_losses(self, batch: Batch, nll_S: Tensor | None) -> None:
        """The loss of each supervised token of a batch that was trained on."""
        if (self._active or self._shared) and nll_S is not None and batch.groups:
            self._ledger.add(batch, nll_S)

    def forget_step(self) -> None:
        """The step begins again."""
        self._ledger.forget_step()

    def note_step(self, grad_norm: Any, learning_rate: float | None) -> None:
        """Called behind each step, and once more at the end of an epoch."""
        if self._trainer.state.global_step <= self._written:
            return
        parts, self._parts = self._parts, []
        self._written = self._trainer.state.global_step
        if not parts:
            return
        loss = torch.stack([loss.float() for loss, _ in parts]).sum()
        sums = torch.stack([loss, *torch.stack([counts for _, counts in parts]).sum(dim=0)])
        if self._shared:
            sums = self._trainer.accelerator.reduce(sums, reduction="sum")
            sums[0] /= self._args.world_size  # each process's loss is divided by the mean number of tokens
        values = sums.tolist()
        if self._active or self._shared:
            self._ledger.end_step(self._written)
        if not self._active:
            return
        self._open()
        seconds = time.perf_counter() - self._clock
        entry = {
            "loss": values[0],
            "tokens": round(values[1]),
            "supervised_tokens": round(values[2]),
            "tokens_per_second": values[1] / seconds if seconds else None,
            "memory_mb": _memory(self._args.device),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "learning_rate": learning_rate,
        }
        self._note(METRICS, entry)

    def start_clock(self) -> None:
        """A step begins: what evaluation and saving took is not its."""
        self._clock = time.perf_counter()

    def end_pass(self) -> None:
        """The data begin anew."""
        self._ledger.end_pass()

    def note_event(self, step: int, text: str) -> None:
        self._note(METRICS, {"event": text}, step)

    def note_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """During training, before it or after."""
        entry = {name: value for name, value in metrics.items() if name != "epoch"}
        if self._active or not self._trainer.is_world_process_zero():
            self._note(METRICS, entry)
        elif self._held is not None:
            self._held.append((METRICS, {"step": 0, "epoch": None, **entry, "seconds": None}))
        elif self.ended:  # and not broken off by a full disk
            self._active = True
            self._note(METRICS, entry)
            self._draw()
            self._active = False

    # Files

    def _note(self, file: str, entry: Mapping[str, Any], step: int | None = None) -> None:
        """One line; a disk that is full costs the line, not the run."""
        if not self._active:
            return
        state = self._trainer.state
        step = state.global_step if step is None else step
        line = {"step": step, "epoch": state.epoch, **entry, "seconds": time.perf_counter() - self._began}
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
            self._active = False
            logger.warning("In %s the run is not followed any further: %s.", self._folder, error)
            return None

    def _open(self) -> None:
        """The files are this run's from now on."""
        if self._held is None:
            return
        held, self._held = self._held, None
        for file in (METRICS, SAMPLES):
            self._attempt(partial(keep_up_to, self._folder / file, self._start))
        if self._data is not None and self._preflight is not None:
            # With how many tokens of an example are supervised.
            lengths = {name: histogram(supervised_counts(dataset)) for name, dataset in self._data.examples.items()}
            report = self._preflight.as_json() | {"supervised_lengths": lengths}
            self._attempt(lambda: write(self._folder / PREFLIGHT, report))
        if not self._start:
            self._attempt(lambda: (self._folder / EXAMPLES).unlink(missing_ok=True))
        for file, line in held:
            if self._active:
                self._attempt(partial(append, self._folder / file, line))

    # Samples

    def _choose_prompts(self) -> None:
        count, trainer = self._args.sample_prompts, self._trainer
        if not count or not self._active or self._data is None:
            return
        if trainer.is_deepspeed_enabled:
            why = "the weights are spread over processes, of which none can answer alone"
            self._tell(trainer.state.global_step, f"sample_prompts: no prompt is answered, since {why}")
            return
        tokenizer, model = cast(PreTrainedTokenizerBase, trainer.processing_class), cast(Model, trainer.model)
        for trained_on in (False, True):  # rows that are trained on show less, but better than none
            if not self._asked:
                self._asked = chosen(self._data.rows(trained_on), count, model, tokenizer)
                self._trained_on = trained_on

    def answer(self) -> None:
        """Answers to all prompts at this step, if they were not asked at it already."""
        trainer = self._trainer
        step = trainer.state.global_step
        wanted = bool(self._asked) and self._active and not any(entry["step"] == step for entry in self.answers)
        if self._args.sample_prompts and is_shared_out(trainer.model):  # whose parts only all together can answer
            wanted, self._asked = broadcast_object_list([wanted, self._asked])
        if not wanted:
            return
        tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        try:
            answers = answered(cast(Model, trainer.model), tokenizer, self._asked, trainer.accelerator)
        except Exception as error:  # a model that can't answer, or has no memory left to, can be trained all the same
            self._asked = []
            give_back()
            self._tell(step, f"prompts are not answered any more: {refusal(error)}")
            return
        for asked, answer in zip(self._asked, answers, strict=True):
            entry = {"prompt": asked.prompt.prompt, "expected": asked.prompt.expected, "answer": answer.text}
            self.answers.append({"step": step, **entry})
            self._note(SAMPLES, entry | {"ended": answer.ended, "trained_on": self._trained_on})


def _counts(batch: Mapping[str, Any] | Batch, like: Tensor) -> Tensor:
    """Tokens and supervised tokens of a batch (2,), zeros where it does not say; counted where the batch is."""
    if not isinstance(batch, Batch):
        if not {"input_ids", "labels"} <= batch.keys():
            return like.new_zeros(2, dtype=torch.float32)
        batch = Batch.of(batch)
    tokens = batch.tokens
    tokens = tokens if isinstance(tokens, Tensor) else like.new_full((), tokens)  # which waits for no copy
    return torch.stack([tokens.to(like.device), batch.supervised.to(like.device)]).to(torch.float32)


def _memory(device: torch.device) -> float | None:
    """In MiB: what the process holds now, or on a GPU the most that tensors have held."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident()
    return None if held is None else held / MIB


def record_of(trainer: Any) -> RunRecord:
    """The record of `trainer`, a `BaseTrainer`, as things stand, with the answers before and after training, where
    there are any. Data whose origin it doesn't know were made by a program."""
    state = trainer.state
    commit = getattr(base_model(trainer.model).config, "_commit_hash", None)
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    last = [entry for entry in evaluations if entry["step"] == evaluations[-1]["step"]]  # one for each data set
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    amount = trainer.trainable
    # A best model that was loaded at the end is that of an earlier step.
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    return RunRecord(
        versions=versions(),
        trainer=trainer.kind,
        base_model=model_origin(trainer.model),
        base_revision=commit if isinstance(commit, str) else None,
        method=method_of(trainer.model),
        trainable_parameters=amount.trained,
        total_parameters=amount.parameters,
        data=() if trainer.preflight is None else counts_of(trainer.preflight, trainer.origins),
        settings=settings_of(trainer.args) | adapter_settings_of(trainer.model),
        history=tuple(state.log_history),
        steps=state.global_step,
        planned_steps=state.max_steps,
        ended=trainer.journal.ended,
        metrics={name: value for entry in last for name, value in entry.items() if name.startswith("eval_")},
        seconds=sum(seconds) if seconds else None,
        device=trainer.args.device.type,
        prompts=() if trainer.data is None else prompts_of(trainer.data.first_rows(), PROMPTS),
        samples=trainer.journal.samples(best or state.global_step),
    )
