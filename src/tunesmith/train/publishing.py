"""What of a run is saved, and what becomes of it: its record, the merged model, the hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from tunesmith.data.dataset import DataPreparer
from tunesmith.data.preflight import Preflight
from tunesmith.model.adapters import StartingPoint, Trainable, trainable
from tunesmith.runs.record import Origin, RunRecord
from tunesmith.secrets import without_secrets
from tunesmith.ship.hub import MAIN, MESSAGE, PushOptions, PushReport, in_full, make_repository, push
from tunesmith.ship.merge import MergeOptions, MergeReport, merge
from tunesmith.train.loaders import BatchingTrainer
from tunesmith.train.recording import record_of
from tunesmith.types import Row


class PublishingTrainer(BatchingTrainer):
    """A trainer whose models can be trusted and told apart. Whoever extends it sets these before its constructor."""

    preflight: Preflight
    origins: dict[str, Origin]
    hub_model_id: str | None = None  # type: ignore[assignment]
    _prepare: DataPreparer
    _base_changed: StartingPoint | None

    @property
    def trainable(self) -> Trainable:
        """How much of the model is trained."""
        return trainable(cast(nn.Module, self.model))

    @property
    def has_adapters(self) -> bool:
        return isinstance(self.model, PeftModel)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The settings go with the model as JSON; `transformers` would pickle them, and a pickle is code."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            if self._base_changed is not None and not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
                self._base_changed.save_for_the_base(cast(PeftModel, self.model), folder)
            (folder / "training_args.bin").unlink(missing_ok=True)
            settings = json.dumps(without_secrets(json.loads(self.args.to_json_string())), indent=2)
            (folder / "training_args.json").write_text(f"{settings}\n", encoding="utf-8")
            if not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
                self.record().write(folder)

    def record(self) -> RunRecord:
        """What this run is, as far as it has come; `run.json` beside a saved model."""
        return record_of(self, self.origins)

    def first_rows(self) -> Iterator[Row]:
        """Some of the rows that were given, as they were understood; those held out first."""
        return self._prepare.first_rows()

    def merge_and_save(self, output: str | Path, options: MergeOptions | None = None) -> MergeReport | None:
        """Save a whole model to `output`: adapters merged into the base model's own files, read a shard at a time, and
        compared with what was trained (see `tunesmith.ship.merge`). Without adapters, the model as it is."""
        if not self.has_adapters:
            self.save_model(str(output))
            return None
        self.save_model(_internal_call=True)
        return merge(str(self.args.output_dir), output, options) if self.is_world_process_zero() else None

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        license: str | None = None,
        dataset_name: str | None = None,
        base_model: str | None = None,
    ) -> PushReport | None:
        """Save the model, and upload it with a card to `hub_model_id`, or a repository of the output folder's name.

        `dataset_name` is the hub's name of the training data, `base_model` that of the base model, where adapters were
        trained on a folder. The token is `hub_token`, or that of the environment or
        the hub's login. Returns what was sent, on the main process. Raises TunesmithError.
        """
        self.save_model(_internal_call=True)
        if dataset_name is not None:
            self.origins["train"] = Origin.of_data(dataset_name)
        if not self.is_world_process_zero():
            return None
        self.record().write(str(self.args.output_dir))
        options = PushOptions(
            private=bool(self.args.hub_private_repo if private is None else private),
            revision=revision or self.args.hub_revision or MAIN,
            message=commit_message or MESSAGE,
            licence=license,
            base_model=base_model,
        )
        token = token or self.args.hub_token
        name = self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).name
        return push(str(self.args.output_dir), in_full(name, token), options, token=token)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """With `push_to_hub`: the repository is made at the start, so that what is wrong with it shows then."""
        if self.is_world_process_zero():
            wanted = self.args.hub_private_repo if private is None else private
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).name
            self.hub_model_id = make_repository(name, PushOptions(private=bool(wanted)), token or self.args.hub_token)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """With `push_to_hub`, each checkpoint's model, without what only this run needs."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self.record().write(str(self.args.output_dir))
            token, step = self.args.hub_token, self.state.global_step
            branch = self.args.hub_revision or MAIN
            options = PushOptions(revision=branch, message=f"Training in progress, step {step}", samples=False)
            push(checkpoint_folder, in_full(self.hub_model_id or "", token), options, token=token)
