"""What a trainer does with the hub: its repository at the start, checkpoints on the way, the model with its card."""

from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from tunesmith.runs.record import Origin
from tunesmith.ship.hub import MAIN, MESSAGE, PushOptions, PushReport, in_full, make_repository, push


class HubPublisher:
    """Sends what a trainer (`train.trainer.BaseTrainer`) has trained, as its settings `hub_...` say."""

    def begin(self, trainer: Any, token: str | None, private: bool | None) -> str:
        """Makes the repository, so that what is wrong with it shows at the start; returns its full name."""
        args = trainer.args
        wanted = args.hub_private_repo if private is None else private
        name = args.hub_model_id or Path(str(args.output_dir)).name
        return make_repository(name, PushOptions(private=bool(wanted)), token or args.hub_token)

    def send_checkpoint(self, trainer: Any, folder: str) -> None:
        """A checkpoint's model, without what only this run needs."""
        args, step = trainer.args, trainer.state.global_step
        if trainer.is_world_process_zero() and args.hub_strategy != HubStrategy.END:
            trainer.record().write(str(args.output_dir))
            message = f"Training in progress, step {step}"
            options = PushOptions(revision=args.hub_revision or MAIN, message=message, samples=False)
            push(folder, in_full(trainer.hub_model_id or "", args.hub_token), options, token=args.hub_token)

    def push(
        self,
        trainer: Any,
        *,
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        license: str | None = None,
        dataset_name: str | None = None,
        base_model: str | None = None,
    ) -> PushReport | None:
        """Save the model, and upload it with a card; see `Published.push_to_hub`."""
        args = trainer.args
        trainer.save_model(_internal_call=True)
        if dataset_name is not None:
            trainer.origins["train"] = Origin.of_data(dataset_name)
        if not trainer.is_world_process_zero():
            return None
        trainer.record().write(str(args.output_dir))
        options = PushOptions(
            private=bool(args.hub_private_repo if private is None else private),
            revision=revision or args.hub_revision or MAIN,
            message=message or MESSAGE,
            licence=license,
            base_model=base_model,
        )
        token = token or args.hub_token
        name = trainer.hub_model_id or args.hub_model_id or Path(str(args.output_dir)).name
        return push(str(args.output_dir), in_full(name, token), options, token=token)
