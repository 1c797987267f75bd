"""The trainer's way back into a run: the same data, the same numbers, the same place."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from datasets import IterableDataset
from torch import nn

from tunesmith.errors import TunesmithError
from tunesmith.model import linear
from tunesmith.runs.checkpoints import MANIFEST, Chosen, Identity, Manifest, checked, newest_whole
from tunesmith.runs.states import kept_random_states, read_state, restore_random_states
from tunesmith.settings.config import SFTConfig
from tunesmith.train.identity import identity_of
from tunesmith.train.meter import Meter
from tunesmith.train.publishing import PublishingTrainer
from tunesmith.train.setup import Model
from tunesmith.train.streams import StreamPlace, reason_to_skip
from tunesmith.train.writer import Writer

OPTIMIZER, SCHEDULER, SCALER, RANDOM, PROGRESS = "optimizer", "scheduler", "scaler", "random", "progress"
"""The states of a checkpoint besides the model, by the names of their files."""

logger = logging.getLogger(__name__)


class ResumingTrainer(PublishingTrainer):
    """A trainer that goes on from a checkpoint where it was written, and knows where it is at any step.

    Whoever extends it sets `_meters` before its constructor.
    """

    _meters: dict[str, Meter]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writer = Writer()
        self._place: StreamPlace | None = None
        self._epoch = self._taken = self._taken_before = 0
        self._epoch_done = False
        self._identity: Identity | None = None
        self._resumed_from: Chosen | None = None
        self._late: str | None = None
        super().__init__(*args, **kwargs)

    @property
    def _left_to_others(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    # Going on

    def _chosen(self, run: Path, wanted: str | bool) -> Chosen:
        """Process 0 reads the files, the others hear what it took."""
        allow = cast(SFTConfig, self.args).allow_pickle
        found: Chosen | None = None
        failure: TunesmithError | None = None
        step = -1
        if self.is_world_process_zero():
            try:
                found = (
                    newest_whole(run, allow_pickle=allow)
                    if wanted is True
                    else checked(Path(str(wanted)), allow_pickle=allow)
                )
                step = int(found.folder.name.rpartition("-")[2]) if wanted is True else 0
            except TunesmithError as error:
                failure = error
        if self.args.world_size > 1:
            step = self._from_main(step)
        if failure is not None:
            raise failure
        if step < 0:
            raise TunesmithError("resume_from_checkpoint: no checkpoint to go on from; process 0 says why")
        if found is None:
            folder = run / f"checkpoint-{step}" if wanted is True else Path(str(wanted))
            found = Chosen(folder=folder, manifest=Manifest.read(folder) if (folder / MANIFEST).exists() else None)
        for line in found.skipped:
            logger.warning("Passed over: %s.", line)
        return found

    def _from_main(self, number: int) -> int:
        numbers = self.accelerator.gather(torch.tensor([number], device=self.args.device))
        return int(numbers[0])

    def _check_same(self, chosen: Chosen) -> None:
        """Raises TunesmithError for a checkpoint of another run, and takes over how this one rounds."""
        args, manifest = cast(SFTConfig, self.args), chosen.manifest
        if manifest is None:
            logger.warning(
                "%s was written by another tool: nobody can tell whether it is whole, or of this run.", chosen.folder
            )
            return
        only_model = not (chosen.folder / f"{OPTIMIZER}.json").is_file()
        differences = manifest.identity.differences(self._identity_now())
        if only_model:
            differences.append("optimizer's state: not saved (save_only_model) -> starts anew")
        if differences:
            listed = "".join(f"\n  {line}" for line in differences)
            if not args.force_resume:
                hint = ""
                if any(line.startswith("precision:") for line in differences):
                    hint = " (`precision: auto` follows it where SFTConfig is given resume_from_checkpoint)"
                raise TunesmithError(
                    f"{chosen.folder} belongs to another run; was -> is:{listed}\nPut these back{hint}, start anew "
                    "without resume_from_checkpoint, or go on anyway with force_resume: true (--force-resume)"
                )
            logger.warning("Goes on from %s although these differ, was -> is:%s", chosen.folder, listed)
        for name, value in self._environment().items():
            if manifest.environment.get(name) != value:
                was = manifest.environment.get(name)
                logger.warning("%s: %s -> %s; the run goes on, but will round differently.", name, was, value)
        if self.args.device.type == "cpu" and manifest.onednn != linear.onednn_is_faster():
            linear.use_onednn(manifest.onednn)
            linear.speed_up(cast(nn.Module, self.model))

    def _identity_now(self) -> Identity:
        if self._identity is None:
            args, model = cast(SFTConfig, self.args), cast(Model, self.model)
            with kept_random_states(self.args.device):
                self._identity = identity_of(args, self.train_dataset, model, self.args.world_size)
        return self._identity

    def _environment(self) -> dict[str, Any]:
        here: dict[str, Any] = {"device": self.args.device.type, "torch": torch.__version__}
        return here | ({"threads": torch.get_num_threads()} if self.args.device.type == "cpu" else {})

    def _own(self, checkpoint: str | None) -> Path | None:
        """`checkpoint` as a folder, if it is one of ours."""
        ours = checkpoint is not None and self._resumed_from is not None and self._resumed_from.manifest is not None
        return Path(str(checkpoint)) if ours else None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = self._own(checkpoint)
        if folder is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = read_state(folder, OPTIMIZER)
        if state is not None:
            cast(Any, self.optimizer).load_state_dict(state)
            cast(Any, self.lr_scheduler).load_state_dict(read_state(folder, SCHEDULER))

    def _load_scaler(self, checkpoint: str | None) -> None:
        folder = self._own(checkpoint)
        if folder is None:
            return super()._load_scaler(checkpoint)
        state = read_state(folder, SCALER)
        if state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called when the loader stands where the run goes on, but for a stream whose place was set: its first batch is
        read afterwards."""
        folder = self._own(checkpoint)
        if folder is None:
            return super()._load_rng_state(checkpoint)
        if self._taken_before and self._late is None:
            self._late = checkpoint
            return
        self._late = None
        ranks = read_state(folder, RANDOM)
        if ranks is None:
            return
        rank = self.args.process_index
        own = {name: states[min(rank, len(states) - 1)] for name, states in ranks.items()}
        loss, logged, *meter = own.pop("sums").tolist()
        self._tr_loss += loss
        self._globalstep_last_logged = int(logged)
        self._meters["train"].restore(meter)
        restore_random_states(own, self.args.device)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        """Of a stream nobody knows how many steps an epoch has, so the checkpoint says where in which it was."""
        found = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        folder = self._own(resume)
        self._taken_before, self._late = 0, None
        if folder is None:
            return found
        progress = read_state(folder, PROGRESS) or {}
        for name, value in progress.get("kept", {}).items():
            if hasattr(self, name):
                setattr(self, name, value)
        if not isinstance(self.train_dataset, IterableDataset) or self.args.ignore_data_skip:
            return found
        epoch, taken, state = progress["epoch"], progress["micro_batches"], progress["stream"]
        if not taken:
            return epoch, 0
        if state is not None and self._place is not None:
            self.train_dataset.load_state_dict(state)
            self._taken_before = taken
            return epoch, 0
        reason = reason_to_skip(self.train_dataset, cast(SFTConfig, self.args)) or "the checkpoint lacks it"
        logger.warning("Reads %d micro-batches of the stream again to find its place: %s.", taken, reason)
        return epoch, taken

    # Where the run is

    def _get_dataloader(  # type: ignore[override]
        self, dataset: Any, description: str, batch_size: int, **kwargs: Any
    ) -> Any:
        training = bool(kwargs.get("is_training")) and isinstance(dataset, IterableDataset)
        if not training:
            return super()._get_dataloader(dataset, description, batch_size, **kwargs)
        self._place = None
        dealing = self.accelerator.dataloader_config
        if self.args.world_size == 1 and dealing.dispatch_batches is None:
            dealing.dispatch_batches = False  # `accelerate` would cut flat batches up, to deal them out to nobody
        if reason_to_skip(dataset, cast(SFTConfig, self.args)) is not None:
            return super()._get_dataloader(dataset, description, batch_size, **kwargs)
        collate = self.data_collator
        self._place = StreamPlace(dataset, collate)
        self.data_collator = self._place
        try:
            return super()._get_dataloader(dataset, description, batch_size, **kwargs)
        finally:
            self.data_collator = collate

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # `transformers` would take one more step
            self.control.should_training_stop = True
            return
        resumed = self._resumed_from is not None and kwargs["epoch"] == kwargs["epochs_trained"]
        skipped = kwargs["steps_trained_in_current_epoch"] if resumed else 0
        self._epoch, self._epoch_done = kwargs["epoch"], False
        before = self._taken_before if resumed else 0
        self._taken = before or skipped
        if self._place is not None:
            self._place.start(before)
        super()._run_epoch(*args, **kwargs)
        if before and self._taken == before and self.state.global_step < self.state.max_steps:
            self.control.should_training_stop = False  # the stream was at its end already, which is no empty one
        self._taken_before = 0
        # What a stream's last micro-batches would have made a step with is not mixed into the next epoch's first.
        kwargs["model"].zero_grad()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        self._writer.check()
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._taken += len(batches)
        self._epoch_done = not batches
        if self._late is not None:
            self._load_rng_state(self._late)
        return batches, items

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._taken_before:  # `transformers` counts from where the loader began
            steps = self.state.max_steps * self.args.gradient_accumulation_steps
            self.state.epoch = self._epoch + self._taken / steps
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """An evaluation does not change the random numbers of the training: a resumed run may not repeat it."""
        with kept_random_states(self.args.device):
            return super().evaluation_loop(*args, **kwargs)
