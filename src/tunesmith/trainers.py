"""The public trainers: training, and what becomes of a run when it is over: a page, a merged model, the hub."""

from pathlib import Path
from typing import Any, ClassVar

from tunesmith.report.run_html import write_report
from tunesmith.runs.files import REPORT
from tunesmith.runs.record import Origin
from tunesmith.ship.hub import MAIN, MESSAGE, HubPublisher, PushOptions, PushReport, in_full, push
from tunesmith.ship.merge import MergeOptions, MergeReport, merge
from tunesmith.train import distillation, dpo, grpo, kto, reward, rloo, sft
from tunesmith.train.trainer import BaseTrainer


def draw_page(folder: Path) -> Path:
    """`report.html` of the run in `folder`."""
    return write_report([str(folder)], str(folder / REPORT))


class Published(BaseTrainer):
    """What each public trainer can do beyond training."""

    publisher: ClassVar[Any] = HubPublisher()
    draw_page: ClassVar[Any] = staticmethod(draw_page)

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
        args = self.args
        self.save_model(_internal_call=True)
        if dataset_name is not None:
            self.origins["train"] = Origin.of_data(dataset_name)
        if not self.is_world_process_zero():
            return None
        self.record().write(str(args.output_dir))
        options = PushOptions(
            private=bool(args.hub_private_repo if private is None else private),
            revision=revision or args.hub_revision or MAIN,
            message=commit_message or MESSAGE,
            licence=license,
            base_model=base_model,
        )
        token = token or args.hub_token
        name = self.hub_model_id or args.hub_model_id or Path(str(args.output_dir)).name
        return push(str(args.output_dir), in_full(name, token), options, token=token)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **settings: Any
    ) -> None:
        """Write the draft of a card that `transformers` makes. `push_to_hub` sends a full one in place of a draft.

        `dataset_name` is the hub's name of the training data, and told in both.
        """
        if dataset_name is not None:
            self.origins["train"] = Origin.of_data(dataset_name)
            settings = {"dataset": dataset_name} | settings
        super().create_model_card(model_name=model_name, tags=tags, **settings)


class SFTTrainer(sft.SFTTrainer, Published):
    __doc__ = sft.SFTTrainer.__doc__


class DPOTrainer(dpo.DPOTrainer, Published):
    __doc__ = dpo.DPOTrainer.__doc__


class KTOTrainer(kto.KTOTrainer, Published):
    __doc__ = kto.KTOTrainer.__doc__


class RewardTrainer(reward.RewardTrainer, Published):
    __doc__ = reward.RewardTrainer.__doc__


class DistillationTrainer(distillation.DistillationTrainer, Published):
    __doc__ = distillation.DistillationTrainer.__doc__


class GKDTrainer(distillation.GKDTrainer, Published):
    __doc__ = distillation.GKDTrainer.__doc__


class GRPOTrainer(grpo.GRPOTrainer, Published):
    __doc__ = grpo.GRPOTrainer.__doc__


class RLOOTrainer(rloo.RLOOTrainer, Published):
    __doc__ = rloo.RLOOTrainer.__doc__


TRAINERS: dict[str, Any] = {
    "sft": SFTTrainer,
    "dpo": DPOTrainer,
    "kto": KTOTrainer,
    "reward": RewardTrainer,
    "distill": DistillationTrainer,
    "grpo": GRPOTrainer,
    "rloo": RLOOTrainer,
}
"""By their names in a recipe."""
