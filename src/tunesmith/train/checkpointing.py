"""The trainer's checkpoints: whole, without pickle, and enough to go on exactly."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerState

from tunesmith.errors import TunesmithError
from tunesmith.model import linear
from tunesmith.runs.checkpoints import STATE, Manifest, begin, discard, finish, remove_partials, rotate
from tunesmith.runs.describe import versions
from tunesmith.runs.disk import check_space, estimated_size, twice
from tunesmith.runs.states import Packed, copied, packed, random_states
from tunesmith.settings.config import SFTConfig
from tunesmith.train.resuming import OPTIMIZER, PROGRESS, RANDOM, SCALER, SCHEDULER, ResumingTrainer

KEPT = ("_most_tokens", "bad_steps", "_bad_in_a_row")
"""Attributes of the trainer's other parts that a run must find again; those that it has."""
PICKLED_OPTIMIZERS = ("adamw_torch_4bit", "adamw_torch_8bit")


class CheckpointingTrainer(ResumingTrainer):
    """A trainer that goes on from its checkpoints as if it had never stopped: on a CPU, to the same bits.

    FSDP and DeepSpeed write checkpoints in formats of their own, which `transformers` does as ever; nothing of this
    module applies to them.
    """

    _written_size = 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`. True goes on from the newest checkpoint in the output folder that verifies.

        Raises:
            TunesmithError: there is none, or the given one does not verify or belongs to another run; the disk is full.
        """
        self._identity = self._resumed_from = None
        self._written_size = 0
        if self._left_to_others:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        run = Path(str(self.args.output_dir))
        if self.args.should_save:  # before choosing: what lacked only its last renaming is whole
            remove_partials(run)
        if resume_from_checkpoint:
            self._resumed_from = self._chosen(run, resume_from_checkpoint)
            self._check_same(self._resumed_from)
            manifest = self._resumed_from.manifest
            self._written_size = 0 if manifest is None else manifest.size
        if self.args.save_strategy != "no":
            self._check_before_saving(run)
        try:
            chosen = self._resumed_from
            result = super().train(None if chosen is None else str(chosen.folder), *args, **kwargs)
        except Exception:
            self._writer.join()
            raise
        self._writer.wait()
        return result

    # Saving

    def _check_before_saving(self, run: Path) -> None:
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if optimizer in PICKLED_OPTIMIZERS and not self.args.save_only_model:
            raise TunesmithError(
                f"optim is {optimizer}, whose state only pickle can write; take adamw_bnb_8bit, or set "
                "save_only_model: true"
            )
        if self.args.should_save:
            self._identity_now()  # as it is before training: some adapters write into their settings what they do
            check_space(run, self._next_size())

    def _next_size(self) -> int:
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        only_model = bool(self.args.save_only_model)
        estimated = estimated_size(cast(nn.Module, self.model), self.optimizer, optimizer, only_model=only_model)
        return self._written_size or estimated

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._left_to_others:
            return super()._save_checkpoint(model, trial)
        self._writer.wait()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run = Path(self._get_output_dir(trial=trial))
        self._note_best(run)
        states = {} if self.args.save_only_model else self._states()
        if self.args.should_save:
            self._write(run, states)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._writer.wait()
            self._push_from_checkpoint(str(run / f"checkpoint-{self.state.global_step}"))

    def _note_best(self, run: Path) -> None:
        best = self.state.best_global_step
        if best and self.args.save_strategy != "no":
            folder = run / f"checkpoint-{best}"
            if best == self.state.global_step or folder.is_dir():
                self.state.best_model_checkpoint = str(folder)

    def _write(self, run: Path, states: Mapping[str, Packed]) -> None:
        """Now, or with `async_save` in a thread that has a copy of everything that training changes."""
        step, needed, later = self.state.global_step, self._next_size(), cast(SFTConfig, self.args).async_save
        check_space(run, needed)
        remove_partials(run)
        manifest, text = self._manifest(step), self._state_text()
        weights = self._copied_weights() if later and not isinstance(self.model, PeftModel) else None
        states = {name: state.copied() for name, state in states.items()} if later else states
        best = self.state.best_model_checkpoint

        def rest(folder: Path) -> None:
            if weights is not None:
                self._save(str(folder), state_dict=weights())
            for name, state in states.items():
                state.write(folder, name)
            (folder / STATE).write_text(text, encoding="utf-8")
            self._written_size = Manifest.read(finish(folder, manifest)).size
            rotate(run, self.args.save_total_limit, best)

        def start() -> Path:
            folder = begin(run, step)
            with _discarded_on_failure(folder):
                if weights is None:
                    self.save_model(str(folder), _internal_call=True)
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

    def _states(self) -> dict[str, Packed]:
        """What goes on besides the model; every process must call this. Tensors are not copied."""
        found: dict[str, Any] = {
            OPTIMIZER: cast(Any, self.optimizer).state_dict(),
            SCHEDULER: cast(Any, self.lr_scheduler).state_dict(),
            RANDOM: self._states_of_ranks(),
            PROGRESS: self._progress(),
        }
        if self.accelerator.scaler is not None:
            found[SCALER] = self.accelerator.scaler.state_dict()
        return {name: packed(state, name) for name, state in found.items()}

    def _states_of_ranks(self) -> dict[str, Tensor]:
        """The random numbers and the sums for the log, each (processes, ...)."""
        own = random_states(self.args.device, all_devices=self.args.world_size == 1)
        sums = [float(self._tr_loss), float(self._globalstep_last_logged), *self._meters["train"].state()]
        own["sums"] = torch.tensor(sums, dtype=torch.float64)
        if self.args.world_size == 1:
            return {name: state[None] for name, state in own.items()}
        gather: Callable[[Tensor], Tensor] = self.accelerator.gather
        return {name: gather(state[None].to(self.args.device)).cpu() for name, state in own.items()}

    def _progress(self) -> dict[str, Any]:
        done = self._epoch_done
        return {
            "epoch": self._epoch + done,
            "micro_batches": 0 if done else self._taken,
            "stream": None if done or self._place is None else self._place.after(self._taken),
            "kept": {name: getattr(self, name) for name in KEPT if hasattr(self, name)},
        }

    def _manifest(self, step: int) -> Manifest:
        return Manifest(
            step=step,
            identity=self._identity_now(),
            precision=cast(SFTConfig, self.args).precision,
            onednn=linear.onednn_is_faster() if self.args.device.type == "cpu" else False,
            environment=self._environment(),
            versions=versions(),
            files={},
        )

    def _state_text(self) -> str:
        """`trainer_state.json`, with the callbacks' states as they are now."""
        callbacks = [*self.callback_handler.callbacks, self.control]
        exported = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        # It sorts them by name, several of one name in a list, as what is read back expects.
        fresh = TrainerState(stateful_callbacks=cast(Any, exported)).stateful_callbacks
        self.state.stateful_callbacks = fresh
        return json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"

    def _copied_weights(self) -> Callable[[], dict[str, Tensor]]:
        """Makes the state of the model as it is now: copies of what is trained, in main memory."""
        # Tied weights must stay one tensor, which `save_pretrained` finds out by its place.
        model, copies = cast(nn.Module, self.model), dict[int, Tensor]()
        frozen = {weight.data_ptr() for weight in model.parameters() if not weight.requires_grad}
        found: dict[str, Tensor] = {}
        for name, weight in model.state_dict().items():
            key = weight.data_ptr()
            if key not in copies:
                copies[key] = weight if key in frozen else copied(weight)
            found[name] = copies[key]
        return lambda: dict(found)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The best model may be the last that is being written."""
        self._writer.wait()
        return super()._finalize_training(*args, **kwargs)


@contextmanager
def _discarded_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        discard(folder)
        raise
