"""A trainer's checkpoints: whole, without pickle, and enough to go on from as if the run had never stopped.

On a CPU a resumed run reaches the same bits. Where processes share weights out, each writes a part of them, as files
that are read like those of one process. The checkpoints of DeepSpeed are in a format of their own, and `transformers`
writes and reads them.
"""

import dataclasses
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState

from tunesmith.data.streams import StreamParts, has_buffer
from tunesmith.errors import TunesmithError
from tunesmith.model import ways
from tunesmith.model.adapters import Model
from tunesmith.runs.checkpoints import (
    MANIFEST,
    STATE,
    Chosen,
    Identity,
    Manifest,
    all_checkpoints,
    begin,
    belongs_to,
    checked,
    discard,
    finish,
    new_run,
    newest_whole,
    not_on_this_machine,
    others,
    remove_partials,
    rotate,
    take_over,
)
from tunesmith.runs.describe import versions
from tunesmith.runs.folder import check_space, estimated_size, twice
from tunesmith.runs.parts import write_part
from tunesmith.runs.states import (
    Packed,
    copied,
    kept_random_states,
    packed,
    random_states,
    read_state,
    restore_random_states,
)
from tunesmith.settings.config import Config
from tunesmith.train.agreement import check_agreement
from tunesmith.train.identity import DIVISION, FOLLOWS, identity_of, size_of_step
from tunesmith.train.meter import Meter
from tunesmith.train.sharding import is_shared_out, reads_own_rows, whole
from tunesmith.train.together import all_or_none

OPTIMIZER, SCHEDULER, SCALER, RANDOM, PROGRESS = "optimizer", "scheduler", "scaler", "random", "progress"
"""The states of a checkpoint besides the model, by the names of their files."""
PICKLED_OPTIMIZERS = ("adamw_torch_4bit", "adamw_torch_8bit")
EARLIER_NAMES = {
    "recovery": {"most_tokens": "_most_tokens"},
    "guard": {"bad_steps": "bad_steps", "in_a_row": "_bad_in_a_row"},
}
"""What checkpoints of version 0.1 call the states of parts, all in one dictionary."""

logger = logging.getLogger(__name__)


class Part(Protocol):
    """A part of a trainer that a resumed run must find as it was."""

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, state: Any) -> None: ...


class Keeper:
    """Writes the checkpoints of a `trainer`, and brings a run back to one of them.

    `parts` are what else goes on, by the names under which their states are written; `meter` has the sums of the log.
    """

    def __init__(self, trainer: Trainer, meter: Meter, parts: Mapping[str, Part]) -> None:
        self._trainer, self._meter, self._parts = trainer, meter, dict(parts)
        self._writer = Writer()
        self._run = ""
        self._taken_over = False
        self._identity: Identity | None = None
        self._resumed_from: Chosen | None = None
        self._written_size = 0
        # Where the run is: the epoch, its micro-batches that were taken, and of a stream, its place.
        self._epoch = self._taken = self._taken_before = 0
        self._epoch_done = False
        self._place: StreamPlace | None = None
        self._pending: Path | None = None
        self._folder: Path | None = None

    @property
    def _args(self) -> Config:
        return cast(Config, self._trainer.args)

    def add(self, name: str, part: Part) -> None:
        """One more part, which only some trainers have."""
        self._parts[name] = part

    @property
    def left_to_others(self) -> bool:
        """Whether `transformers` writes the checkpoints."""
        return bool(self._trainer.is_deepspeed_enabled)

    # Before training

    def agree(self, *, resumes: bool) -> None:
        """Raises TunesmithError, in every process, where they would not train the same."""
        self._identity = None
        if self._args.world_size > 1:
            # Nobody reads a stream in each process only to compare it.
            speaks = self._args.local_process_index == 0 or not isinstance(self._trainer.train_dataset, IterableDataset)
            check_agreement(self._identity_now() if speaks else None, self._args, resumes=resumes)

    def begin(self, resume_from_checkpoint: str | bool | None) -> str | bool | None:
        """The checkpoint to go on from, as `transformers` wants to hear of it. True means the newest one in the output
        folder that verifies.

        Raises:
            TunesmithError: there is none, or the given one does not verify or belongs to another run; the disk is full.
        """
        self._resumed_from = None
        self._written_size = 0
        run = Path(str(self._args.output_dir))
        if self.left_to_others:
            if not resume_from_checkpoint:
                self._check_unused(run)
            return resume_from_checkpoint
        if self._args.should_save:  # before choosing: what lacked only its last renaming is whole
            remove_partials(run)
        if resume_from_checkpoint:
            self._resumed_from = self._chosen(run, resume_from_checkpoint)
            self._check_same(self._resumed_from)
            manifest = self._resumed_from.manifest
            self._written_size = 0 if manifest is None else manifest.size
        self._run, self._taken_over = self._run_that_goes_on(run, named=resume_from_checkpoint is not True), False
        self._say_what_stays(run)
        if self._args.save_strategy != "no":
            self._check_before_saving(run)
        return None if self._resumed_from is None else str(self._resumed_from.folder)

    def _chosen(self, run: Path, wanted: str | bool) -> Chosen:
        """Process 0 reads the files, the others hear what it took."""
        allow, trainer = self._args.allow_pickle, self._trainer
        chosen: Chosen | None = None
        failure: TunesmithError | None = None
        step = -1
        if trainer.is_world_process_zero():
            try:
                if wanted is True:
                    chosen = newest_whole(run, allow_pickle=allow)
                    step = int(chosen.folder.name.rpartition("-")[2])
                else:
                    chosen, step = checked(Path(str(wanted)), allow_pickle=allow), 0
            except TunesmithError as error:
                failure = error
        if self._args.world_size > 1:
            steps = trainer.accelerator.gather(torch.tensor([step], device=self._args.device))
            step = int(steps[0])
        if failure is not None:
            raise failure
        if step < 0:
            raise TunesmithError("resume_from_checkpoint: no checkpoint to go on from; process 0 says why")
        if chosen is None:
            folder = run / f"checkpoint-{step}" if wanted is True else Path(str(wanted))
            if not folder.is_dir():
                raise TunesmithError(not_on_this_machine(folder))
            chosen = Chosen(folder=folder, manifest=Manifest.read(folder) if (folder / MANIFEST).exists() else None)
        for line in chosen.skipped:
            logger.warning("Passed over: %s.", line)
        return chosen

    def _run_that_goes_on(self, folder: Path, *, named: bool) -> str:
        """The id of this run. A checkpoint that was `named` may have others of its run behind it, or be elsewhere: then
        another run begins there."""
        chosen = self._resumed_from
        if chosen is None:
            return new_run()
        own = "" if chosen.manifest is None else chosen.manifest.run
        if not named:
            return own
        behind = [item for item in all_checkpoints(folder) if belongs_to(item, own)][-1:]
        return own if behind and behind[0].resolve() == chosen.folder.resolve() else new_run()

    def _say_what_stays(self, folder: Path) -> None:
        if self._trainer.is_world_process_zero() and (earlier := others(folder, self._run)):
            logger.warning(
                "%s holds checkpoints of an earlier run: %s. They stay, save_total_limit does not count them, and "
                "resuming does not take them; where this run saves at the same step, its checkpoint replaces them.",
                folder,
                ", ".join(item.name for item in earlier),
            )

    def _check_unused(self, folder: Path) -> None:
        """Raises TunesmithError where checkpoints that don't say whose they are would be taken for this run's."""
        if self._args.save_strategy != "no" and (earlier := all_checkpoints(folder)):
            raise TunesmithError(
                f"{folder} holds {earlier[-1].name} of an earlier run, and the checkpoints of DeepSpeed do not "
                "say whose they are: this run's would be taken for older ones. Take another output folder, or go "
                "on with resume_from_checkpoint"
            )

    def _check_same(self, chosen: Chosen) -> None:
        """Raises TunesmithError for a checkpoint of another run, and takes over how this one rounds."""
        args, manifest = self._args, chosen.manifest
        if manifest is None:
            logger.warning(
                "%s was written by another tool: nobody can tell whether it is whole, or of this run.", chosen.folder
            )
            return
        identity = self._identity_now()
        differences = manifest.identity.differences(identity)
        if "token_batches" in identity.settings and "token_batches" not in manifest.identity.settings:
            differences.append("token_batches: filled as in version 0.1 -> " + identity.settings["token_batches"])
        was_several = manifest.identity.settings.get("processes", 1) > 1
        if "dealt" not in manifest.identity.settings and (was_several or self._groups_steps):
            differences.append("rows of a step: dealt batch by batch, as in an earlier version -> by steps")
        differences = self._same_steps(differences, manifest.identity, identity)
        if not (chosen.folder / f"{OPTIMIZER}.json").is_file():
            differences.append("optimizer's state: not saved (save_only_model) -> starts anew")
        if differences:
            listed = "".join(f"\n  {line}" for line in differences)
            if not args.force_resume:
                hint = ""
                if any(line.startswith("precision:") for line in differences):
                    hint = " (`precision: auto` follows it where the config is given resume_from_checkpoint)"
                raise TunesmithError(
                    f"{chosen.folder} belongs to another run; was -> is:{listed}\nPut these back{hint}, start anew "
                    "without resume_from_checkpoint, or go on anyway with force_resume: true (--force-resume)"
                )
            logger.warning("Goes on from %s although these differ, was -> is:%s", chosen.folder, listed)
        for name, value in self._environment().items():
            if manifest.environment.get(name) != value:
                was = manifest.environment.get(name)
                logger.warning("%s: %s -> %s; the run goes on, but will round differently.", name, was, value)
        if manifest.onednn is not None:
            ways.force(manifest.onednn)
        else:
            ways.restore(manifest.ways)

    @property
    def _groups_steps(self) -> bool:
        """Whether the rows of a step of several micro-batches are grouped by length."""
        return bool(cast(Any, self._trainer).loaders.batching.grouped and self._args.gradient_accumulation_steps > 1)

    def _same_steps(self, differences: list[str], was: Identity, now: Identity) -> list[str]:
        """`differences` without those that divide a step of the same size otherwise: its rows stay, and their sums."""
        size = size_of_step(was.settings)
        if size is None or size != size_of_step(now.settings):
            return differences
        divided = [line for line in differences if line.startswith(tuple(f"{name}:" for name in (*DIVISION, *FOLLOWS)))]
        if divided and self._trainer.is_world_process_zero():
            logger.warning(
                "Steps have the same rows, and are divided otherwise, was -> is: %s; the run goes on, but rounds "
                "differently, and draws other random numbers where it has dropout.",
                ", ".join(divided),
            )
        return [line for line in differences if line not in divided]

    def _identity_now(self) -> Identity:
        if self._identity is None:
            trainer = self._trainer
            with kept_random_states(self._args.device):
                self._identity = identity_of(
                    self._args, trainer.train_dataset, cast(Model, trainer.model), self._args.world_size
                )
        return self._identity

    def _environment(self) -> dict[str, Any]:
        here: dict[str, Any] = {"device": self._args.device.type, "torch": torch.__version__}
        return here | ({"threads": torch.get_num_threads()} if self._args.device.type == "cpu" else {})

    def _check_before_saving(self, run: Path) -> None:
        if self._optimizer_name in PICKLED_OPTIMIZERS and not self._args.save_only_model:
            raise TunesmithError(
                f"optim is {self._optimizer_name}, whose state only pickle can write; take adamw_bnb_8bit, or set "
                "save_only_model: true"
            )
        if self._args.should_save:
            self._identity_now()  # as it is before training: some adapters write into their settings what they do
            check_space(run, self._next_size())
        if is_shared_out(self._trainer.model):
            self._check_shared(run)

    def _check_shared(self, run: Path) -> None:
        """Raises TunesmithError, in every process, where one that is going to write a part of a checkpoint does not see
        the folder of the first one."""
        main = self._trainer.is_world_process_zero()
        if main:
            run.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".shared-", dir=run) if main else nullcontext("") as own:
            [name] = broadcast_object_list([str(own)])
            seen = gather_object([(socket.gethostname(), Path(name).is_dir())])
        for rank, (host, sees) in enumerate(seen):
            if not sees:
                raise TunesmithError(
                    f"output: {run} of the first process is not there for process {rank} on {host}, which has a part "
                    "of the weights to write; give an output folder on a disk that all machines share, or write "
                    "save_strategy: no"
                )

    @property
    def _optimizer_name(self) -> str:
        return str(getattr(self._args.optim, "value", self._args.optim))

    def _next_size(self) -> int:
        only_model, model = bool(self._args.save_only_model), cast(nn.Module, self._trainer.model)
        estimated = estimated_size(model, self._trainer.optimizer, self._optimizer_name, only_model=only_model)
        return self._written_size or estimated

    # Going on

    def own(self, checkpoint: str | None) -> Path | None:
        """`checkpoint` as a folder, if it is one of ours that this run goes on from."""
        chosen = self._resumed_from
        ours = checkpoint is not None and chosen is not None and chosen.manifest is not None
        return Path(str(checkpoint)) if ours else None

    def load_optimizer(self, folder: Path) -> None:
        optimizer = cast(Any, self._trainer.optimizer)
        own_rows = reads_own_rows(optimizer) if is_shared_out(self._trainer.model) else None
        state = read_state(folder, OPTIMIZER, own_rows)
        if state is not None:
            optimizer.load_state_dict(state)
            cast(Any, self._trainer.lr_scheduler).load_state_dict(read_state(folder, SCHEDULER))

    def load_scaler(self, folder: Path) -> None:
        state, scaler = read_state(folder, SCALER), self._trainer.accelerator.scaler
        if state is not None and scaler is not None:
            scaler.load_state_dict(state)

    def load_random(self, folder: Path) -> None:
        """Called when the loader stands where the run goes on. The first batch of a stream whose place was set is read
        afterwards: then the random numbers wait for it."""
        if self._taken_before:
            self._pending = folder
        else:
            self._restore_random(folder)

    def _restore_random(self, folder: Path) -> None:
        ranks = read_state(folder, RANDOM)
        if ranks is None:
            return
        rank, trainer = self._args.process_index, self._trainer
        ranks["sums"] = _shared_sums(ranks["sums"], self._args.world_size, self._meter.number_of_extremes)
        own = {name: states[min(rank, len(states) - 1)] for name, states in ranks.items()}
        loss, logged, *meter = own.pop("sums").tolist()
        trainer._tr_loss += loss
        # Which is of steps before this start, over which the mean at the end is not taken.
        trainer._total_loss_scalar -= float(ranks["sums"][:, 0].mean())
        trainer._globalstep_last_logged = int(logged)
        self._meter.restore(meter)
        restore_random_states(own, self._args.device)

    def resume_at(self, folder: Path | None, position: tuple[int, int]) -> tuple[int, int]:
        """The epoch and the micro-batches of it to go on after, which `transformers` takes to be `position`; parts go
        back to where they were. Of a stream nobody knows how many steps an epoch has, so the checkpoint says where it
        was."""
        self._taken_before, self._pending = 0, None
        if folder is None:
            return position
        progress = read_state(folder, PROGRESS) or {}
        states = progress.get("parts") or _earlier_states(progress.get("kept", {}))
        for name, state in states.items():
            if name in self._parts:
                self._parts[name].restore(state)
        stream = self._trainer.train_dataset
        if not isinstance(stream, IterableDataset) or self._args.ignore_data_skip:
            return position
        accumulation = self._args.gradient_accumulation_steps
        epoch, state = progress["epoch"], progress["stream"]
        taken = progress["micro_batches"] * accumulation // progress.get("accumulation", accumulation)
        if not taken:
            return epoch, 0
        parts = len(state) if isinstance(state, list) else 1  # which differ only where the run is forced to go on
        if state is not None and self._place is not None and parts == self._args.stream_parts:
            self._place.stream.load_state_dict(state)
            self._taken_before = taken
            return epoch, 0
        reason = reason_to_skip(stream, self._args) or "the checkpoint lacks it"
        logger.warning("Reads %d micro-batches of the stream again to find its place: %s.", taken, reason)
        return epoch, taken

    # Where the run is

    @contextmanager
    def noting_place(self, dataset: Any, *, training: bool) -> Iterator[None]:
        """A loader that is made within notes the place in a stream that is trained on, as its collator."""
        trainer = self._trainer
        if not (training and isinstance(dataset, IterableDataset | StreamParts)):
            yield
            return
        self._place = None
        if reason_to_skip(getattr(dataset, "whole", dataset), self._args) is not None:
            yield
            return
        collate = cast(Callable[..., Any], trainer.data_collator)
        self._place = trainer.data_collator = StreamPlace(dataset, collate)
        try:
            yield
        finally:
            trainer.data_collator = collate

    @contextmanager
    def epoch(self, *, epoch: int, epochs_trained: int, steps_trained_in_current_epoch: int) -> Iterator[None]:
        """An epoch is trained within."""
        resumed = self._resumed_from is not None and epoch == epochs_trained
        self._epoch, self._epoch_done = epoch, False
        before = self._taken_before if resumed else 0
        self._taken = before or (steps_trained_in_current_epoch if resumed else 0)
        if self._place is not None:
            self._place.start(before)
        yield
        trainer = self._trainer
        if before and self._taken == before and trainer.state.global_step < trainer.state.max_steps:
            trainer.control.should_training_stop = False  # the stream was at its end already, which is no empty one
        self._taken_before = 0

    def took(self, batches: int) -> None:
        """So many micro-batches were taken for the step that begins; none: the epoch is over."""
        self._writer.check()
        self._taken += batches
        self._epoch_done = not batches
        if self._place is not None:
            self._place.forget(self._taken)
        if self._pending is not None:
            folder, self._pending = self._pending, None
            self._restore_random(folder)

    def note_step(self) -> None:
        """A step is over: the folder is this run's. `transformers` counts the part of an epoch from where the loader
        began."""
        if not self._taken_over and not self.left_to_others and self._args.should_save:
            self._take_over(Path(str(self._args.output_dir)))
        if self._taken_before:
            steps = self._trainer.state.max_steps * self._args.gradient_accumulation_steps
            self._trainer.state.epoch = self._epoch + self._taken / steps

    def _take_over(self, folder: Path) -> None:
        self._taken_over = True
        try:
            take_over(folder, self._run)
        except OSError as error:  # a disk that is full is told of where something is lost by it
            logger.warning("%s is not marked as this run's: %s.", folder, error)

    # Saving

    def save(self, run: Path) -> Path:
        """Write a checkpoint of the run in the folder `run`, on every process; returns where it will be."""
        self._writer.wait()
        self._note_best(run)
        states = {} if self._args.save_only_model else self._states()
        if is_shared_out(self._trainer.model):
            needed = self._next_size()
            twice(lambda: self._write_together(run, states, needed), run, needed)
        elif self._args.should_save:
            self._write(run, states)
        self._trainer.accelerator.wait_for_everyone()
        return run / f"checkpoint-{self._trainer.state.global_step}"

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """What is saved to `folder` within is a checkpoint, whoever writes it."""
        self._folder = folder
        try:
            yield
        finally:
            self._folder = None

    def writes(self, folder: Path) -> bool:
        """Whether `folder` is the checkpoint that is being written; its name says nothing."""
        return folder == self._folder

    def wait(self) -> None:
        """Until nothing is being written any more. Raises what went wrong."""
        self._writer.wait()

    def give_up(self) -> None:
        """As `wait`, but raises nothing: something else went wrong already."""
        self._writer.join()

    def _note_best(self, run: Path) -> None:
        state = self._trainer.state
        if state.best_global_step and self._args.save_strategy != "no":
            folder = run / f"checkpoint-{state.best_global_step}"
            if state.best_global_step == state.global_step or belongs_to(folder, self._run):
                state.best_model_checkpoint = str(folder)

    def _write(self, run: Path, states: Mapping[str, Packed]) -> None:
        """Now, or with `async_save` in a thread that has a copy of everything that training changes."""
        trainer, needed, later = self._trainer, self._next_size(), self._args.async_save
        step = trainer.state.global_step
        check_space(run, needed)
        remove_partials(run)
        manifest, text = self._manifest(step), self._state_text()
        weights = self._copied_weights() if later and not isinstance(trainer.model, PeftModel) else None
        states = {name: state.copied() for name, state in states.items()} if later else states
        best = trainer.state.best_model_checkpoint

        def rest(folder: Path) -> None:
            if weights is not None:
                with self.writing(folder):
                    trainer._save(str(folder), state_dict=weights())
            for name, state in states.items():
                state.write(folder, name)
            (folder / STATE).write_text(text, encoding="utf-8")
            written = finish(folder, manifest)
            self._written_size = Manifest.read(written).size
            rotate(written, self._args.save_total_limit, best)

        def start() -> Path:
            folder = begin(run, step)
            with _discarded_on_failure(folder):
                if weights is None:
                    with self.writing(folder):
                        trainer.save_model(str(folder), _internal_call=True)
            return folder

        def whole(folder: Path) -> None:
            with _discarded_on_failure(folder):
                rest(folder)

        def behind(folder: Path) -> None:
            with _discarded_on_failure(folder):
                twice(lambda: rest(folder), run, needed)

        if later:
            folder = twice(start, run, needed)
            self._writer.start(lambda: behind(folder))
        else:
            twice(lambda: whole(start()), run, needed)

    def _write_together(self, run: Path, states: Mapping[str, Packed], needed: int) -> None:
        """Every process writes its part to one folder, which the first one describes and renames when all are done."""
        args, trainer = self._args, self._trainer
        step, first = trainer.state.global_step, args.process_index == 0
        made: list[Any] = [None]
        with all_or_none(args.device):
            if first:
                check_space(run, needed)
                remove_partials(run)
                made = [str(begin(run, step))]
        folder = Path(broadcast_object_list(made)[0])
        try:
            with all_or_none(args.device):
                if not folder.is_dir():
                    raise TunesmithError(
                        f"{folder.parent} is not there for process {args.process_index}, which has a part of the "
                        "weights to write; give an output folder on a disk that all machines share"
                    )
            # In each part, what all bring together comes before the disk, which may fail one of them.
            with all_or_none(args.device), self.writing(folder):
                trainer.save_model(str(folder), _internal_call=True)
            with all_or_none(args.device):
                self._write_states(states, folder)
            with all_or_none(args.device):
                if first:
                    (folder / STATE).write_text(self._state_text(), encoding="utf-8")
                    written = finish(folder, self._manifest(step))
                    self._written_size = Manifest.read(written).size
                    rotate(written, args.save_total_limit, trainer.state.best_model_checkpoint)
        except BaseException:
            if first:
                discard(folder)
            raise

    def _write_states(self, states: Mapping[str, Packed], folder: Path) -> None:
        """The optimizer's by all processes, others by the first."""
        args = self._args
        if OPTIMIZER in states:
            place: Any = {"rank": args.process_index, "processes": args.world_size}
            write_part(states[OPTIMIZER].tensors, folder, OPTIMIZER, whole=whole, **place)
        if args.process_index == 0:
            for name, state in states.items():
                if name == OPTIMIZER:
                    state.write_structure(folder, name)
                else:
                    state.write(folder, name)

    def _states(self) -> dict[str, Packed]:
        """What goes on besides the model; every process must call this. Tensors are not copied."""
        trainer, done = self._trainer, self._epoch_done
        states: dict[str, Any] = {
            OPTIMIZER: cast(Any, trainer.optimizer).state_dict(),
            SCHEDULER: cast(Any, trainer.lr_scheduler).state_dict(),
            RANDOM: self._states_of_ranks(),
            PROGRESS: {
                "epoch": self._epoch + done,
                "micro_batches": 0 if done else self._taken,
                "accumulation": self._args.gradient_accumulation_steps,
                "stream": None if done or self._place is None else self._of_all_parts(self._place.after(self._taken)),
                "parts": {name: dict(part.state()) for name, part in self._parts.items()},
            },
        }
        if trainer.accelerator.scaler is not None:
            states[SCALER] = trainer.accelerator.scaler.state_dict()
        return {name: packed(state, name) for name, state in states.items()}

    def _of_all_parts(self, state: Any) -> Any:
        """The state of a stream; of one in parts, of which each process has its own, that of each part."""
        if self._args.stream_parts == 1 or self._args.world_size == 1:
            return state
        of_ranks: list[Any] = gather_object([state])
        return [of_ranks[i % len(of_ranks)][i // len(of_ranks)] for i in range(self._args.stream_parts)]

    def _states_of_ranks(self) -> dict[str, Tensor]:
        """The random numbers and the sums for the log, each (processes, ...)."""
        args, trainer = self._args, self._trainer
        own = random_states(args.device, all_devices=args.world_size == 1)
        sums = [float(trainer._tr_loss), float(trainer._globalstep_last_logged), *self._meter.state()]
        own["sums"] = torch.tensor(sums, dtype=torch.float64)
        if args.world_size == 1:
            return {name: state[None] for name, state in own.items()}
        gather: Callable[[Tensor], Tensor] = trainer.accelerator.gather
        return {name: gather(state[None].to(args.device)).cpu() for name, state in own.items()}

    def _manifest(self, step: int) -> Manifest:
        return Manifest(
            run=self._run,
            step=step,
            identity=self._identity_now(),
            precision=self._args.precision,
            onednn=ways.forced(),
            ways=ways.state(),
            environment=self._environment(),
            versions=versions(),
            files={},
        )

    def _state_text(self) -> str:
        """`trainer_state.json`, with the callbacks' states as they are now."""
        trainer = self._trainer
        callbacks = [*trainer.callback_handler.callbacks, trainer.control]
        exported = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        # It sorts them by name, several of one name in a list, as what is read back expects.
        fresh = TrainerState(stateful_callbacks=cast(Any, exported)).stateful_callbacks
        trainer.state.stateful_callbacks = fresh
        return json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True) + "\n"

    def _copied_weights(self) -> Callable[[], dict[str, Tensor]]:
        """Makes the state of the model as it is now: copies of what is trained, in main memory."""
        # Tied weights must stay one tensor, which `save_pretrained` finds out by its place.
        model, copies = cast(nn.Module, self._trainer.model), dict[int, Tensor]()
        frozen = {weight.data_ptr() for weight in model.parameters() if not weight.requires_grad}
        weights: dict[str, Tensor] = {}
        for name, weight in model.state_dict().items():
            key = weight.data_ptr()
            if key not in copies:
                copies[key] = weight if key in frozen else copied(weight)
            weights[name] = copies[key]
        return lambda: dict(weights)


def _shared_sums(sums: Tensor, processes: int, extremes: int) -> Tensor:
    """The sums for the log of so many processes, of those of others: (processes, ...). The mean of the losses and the
    total of the rest stay: the first process has all of that, and the step of the last log and the tokens since the
    start are the same on all. The last `extremes` columns are the largest of each process, and not added."""
    if len(sums) == processes:
        return sums
    shared = sums.new_zeros(processes, sums.shape[1])
    shared[:, 0] = sums[:, 0].mean()
    shared[:, 1:3] = sums[0, 1:3]
    shared[0, 3:] = sums[:, 3:].sum(dim=0)
    last = sums.shape[1] - extremes
    shared[:, last:] = sums[:, last:].amax(dim=0)
    return shared


def _earlier_states(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The states of parts in a checkpoint of version 0.1, as far as it has them."""
    return {
        part: {name: values[earlier] for name, earlier in names.items()}
        for part, names in EARLIER_NAMES.items()
        if values.keys() >= set(names.values())
    }


@contextmanager
def _discarded_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        discard(folder)
        raise


class StreamPlace:
    """Notes the state of a stream after each micro-batch, as the collator of its loader.

    A loader reads ahead, so the state that belongs to a checkpoint is not the last one: states are kept until the
    micro-batch after them has been trained on.
    """

    def __init__(self, stream: IterableDataset | StreamParts, collate: Callable[..., Any]) -> None:
        self.stream, self._collate = stream, collate
        self._read = 0
        self._states: dict[int, Any] = {}

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self._read += 1
        self._states[self._read] = self.stream.state_dict()
        return self._collate(rows)

    def start(self, batches: int) -> None:
        """An epoch begins, of which `batches` were read before."""
        self._read = batches
        self._states = {}

    def after(self, batches: int) -> Any:
        """The state after so many micro-batches of the epoch; None where none was read."""
        return self._states.get(batches)

    def forget(self, batches: int) -> None:
        """States before that of so many micro-batches are not asked for any more: a long stream would fill memory with
        them."""
        self._states = {number: state for number, state in self._states.items() if number >= batches}


def reason_to_skip(stream: IterableDataset, args: Config) -> str | None:
    """Why the place in `stream` can't be kept, so that a resumed run reads again what it has read; None where it can.

    What worker processes read is not known here, and a shuffle buffer of tables has rows that are in memory only
    (`data.streams` replaces the others). All rows of a step are read before its first micro-batch.
    """
    if args.dataloader_num_workers > 0:
        return "dataloader_num_workers is set"
    if getattr(stream, "_formatting", None) is not None:
        return "it has a format"
    if has_buffer(stream._ex_iterable):
        return "tables of it are shuffled in a buffer"
    return None


class Writer:
    """Runs what it is given in a thread, one thing at a time; `wait` returns when it is done, and raises what failed.

    The thread does not keep the process alive: who leaves at once leaves a partial file, never half of a whole one.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin `work` after what was begun before is done."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # it is raised by `check` or `wait`
                self._failure = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong since the last time, without waiting."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Until nothing is being written any more."""
        self.join()
        self.check()

    def join(self) -> None:
        """As `wait`, but raises nothing: something else went wrong already."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
