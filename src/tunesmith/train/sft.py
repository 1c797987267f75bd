"""Supervised fine-tuning: data prepared and checked, a model made ready, cross-entropy on supervised tokens."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import HPSearchBackend, PredictionOutput

from tunesmith.data.batches import Batch, FlatCollator, PaddedCollator, documents_of
from tunesmith.data.dataset import DataPreparer, Source
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model
from tunesmith.objectives.supervised import LossOptions, Supervised, supervised_loss
from tunesmith.settings.config import Config, SFTConfig, own_settings, settings_of
from tunesmith.settings.older import by_todays_names
from tunesmith.train.loaders import Batching
from tunesmith.train.meter import BatchLoss
from tunesmith.train.overrides import PlainCollator, overridden
from tunesmith.train.rows import Given, RowsTrainer, Sources, TrainSource
from tunesmith.train.setup import as_config, faster_layers, given_model, ready_for_batches
from tunesmith.train.trainer import BaseTrainer

PREPARED_BY = {
    *(own_settings(SFTConfig) - {"learning_rate", "logging_steps", "max_bad_steps"}),
    *("label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy"),
}
"""Settings that a search can't change on a trainer that is made."""
OF_BACKENDS = {"assignments", "metric", "wandb"}
"""What backends of a search put beside the settings."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Users:
    """What the user computes in the trainer's place: batches, by a `collator`; the `loss`, from logits; a `step`, in a
    subclass that overrides its hooks."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None
    loss: bool
    step: bool


class SFTTrainer(RowsTrainer):
    """Supervised fine-tuning with the arguments of TRL's trainer of the same name.

    `model` is a name, a folder, "demo", or a loaded causal language model (with or without adapters). `train_dataset`
    is a `datasets.Dataset`, an `IterableDataset` (then `args.max_steps` must be set), a list of rows, or a mixture of
    them: named sources, each as it is or in a `DataSource` with its weight and held-out share, whose eval loss is
    reported as `eval_NAME_loss`; `trainer.preflight` says what was found in the data, and `trainer.origins` may say
    where it came from, by split or source, for the card. Afterwards
    `trainer.train_dataset` holds `input_ids` and `labels` (unshifted, -100 where unsupervised).
    `compute_loss_func(outputs, labels, num_items_in_batch)` and `compute_metrics` get logits from padded batches; the
    latter must make them less where those of all rows would fill more than half of the memory that is free.

    A subclass may override `compute_loss`, `training_step` or `prediction_step`, as one of TRL's trainer does: it gets
    dictionaries of padded `input_ids`, `attention_mask` and unshifted `labels` (`train.overrides`). `batch_loss` is the
    way to another loss that keeps batches without padding.

    `model_init` makes the model in place of `model`, anew for each `train`, as `hyperparameter_search` needs it; it may
    take the trial. Settings that TRL's trainer once took itself (`max_seq_length`, `packing`) go to `args`.

    The data is prepared and checked before any weight is loaded. Raises TunesmithError for what would train wrongly.
    """

    _tag_names = ("tunesmith", "sft")
    means: tuple[str, ...] = ("entropy", "mean_token_accuracy")
    config: ClassVar[type[SFTConfig]] = SFTConfig

    def __init__(
        self,
        model: str | Model | None = None,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: TrainSource | None = None,
        eval_dataset: Sources | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], Any] | None = None,
        model_init: Callable[..., str | Model] | None = None,
        **older: Any,
    ) -> None:
        if (tokenizer := older.pop("tokenizer", None)) is not None:  # its name in `transformers`, once
            if processing_class is not None:
                raise TunesmithError("tokenizer and processing_class are the same argument; keep processing_class")
            processing_class = tokenizer
        data_collator = _makes_batches(data_collator)
        given = given_model(model, model_init)
        args = as_config(with_arguments(args, older), given, self.config)
        if args.loss_type == "dft" and compute_loss_func is not None:
            raise TunesmithError("loss_type: dft and compute_loss_func both say what the loss is; drop one")
        if args.loraplus_lr_ratio is not None and (optimizers[0] is not None or optimizer_cls_and_kwargs is not None):
            raise TunesmithError("loraplus_lr_ratio and an optimizer of yours both say how fast what learns; drop one")
        self.loss_options = LossOptions(smoothing=args.label_smoothing_factor, dft=args.loss_type == "dft")
        self._users = _Users(collator=data_collator, loss=compute_loss_func is not None, step=self._overridden(args))
        super().__init__(
            Given(
                model=given,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                quantization_config=quantization_config,
                peft_config=peft_config,
            ),
            partial(DataPreparer, formatting_func=formatting_func, shares=data_collator is None),
            by_row=compute_metrics is not None,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model_init = cast(Any, model_init)

    def balancing(self, model: Model, args: Config) -> float:
        return 0.0 if self._users.loss else super().balancing(model, args)

    def batching(self, model: Model, args: Any, tokenizer: PreTrainedTokenizerBase, *, sized: bool) -> Batching:
        """Flat batches where the model takes them, else rows of like length together; for a loss of the user's padded
        ones, in plain dictionaries for a subclass. The model's forward is prepared for them: it answers objectives,
        and its layers take the faster or the compiled way."""
        users, routers = self._users, bool(self.router_coefficient)
        # NEFTune scales its noise by the length of a row, which in a flat row is that of all documents together.
        wanted = args.padding_free and not (users.loss or users.step) and args.neftune_noise_alpha is None
        grouped = not args.packing and args.train_sampling_strategy == "random" and sized
        flat = ready_for_batches(model, flat=wanted, grouped=grouped, routers=routers)
        faster_layers(model, args)
        by_length = args.train_sampling_strategy == "group_by_length" or (grouped and wanted and not flat)
        by_prefix = args.train_sampling_strategy == "group_by_prefix"
        if by_prefix and not (flat and sized and users.collator is None):
            reason = (
                "a stream does not tell its rows before they are read"
                if not sized
                else "a data_collator makes the batches"
                if users.collator is not None
                else "batches are padded here"
            )
            raise TunesmithError(
                "train_sampling_strategy: group_by_prefix puts rows that begin alike into one batch, which computes "
                f"once what they share, but {reason}; write random"
            )
        padded = PaddedCollator(
            read=documents_of,
            pad_token_id=cast(int, tokenizer.pad_token_id),
            multiple=int(args.pad_to_multiple_of or 1),
        )
        ours = FlatCollator(share_prefix=args.share_prefix == "auto") if flat else padded
        return Batching(
            collator=users.collator or (PlainCollator(padded=padded) if users.step else ours),
            by_row=padded,
            grouped="prefix" if by_prefix else "length" if by_length else None,
            regroups=not routers,  # whose loss is one of a whole micro-batch
        )

    def call_model_init(self, trial: Any = None) -> Model:
        """A fresh model by `model_init`, prepared as the first one was; `train` calls it each time."""
        model: Any = super().call_model_init(trial)
        set_seed(self.args.seed)  # adapters and the order of rows are as without it
        model, self._starting_point, _ = self.ready(model, sized=isinstance(self.train_dataset, Dataset))
        model.add_model_tags(list(self._tag_names))
        self.recovery.watch(model)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """What a search may change: settings that training reads, not those that rows and models were prepared by."""
        if self.hp_search_backend is not None and trial is not None:
            space = set(self.hp_space(trial) if self.hp_search_backend == HPSearchBackend.OPTUNA else trial)
            if unknown := sorted(space - {item.name for item in fields(self.args)} - OF_BACKENDS):
                raise TunesmithError(f"hp_space: SFTConfig has no setting {unknown[0]!r}")
            if fixed := sorted(space & PREPARED_BY):
                raise TunesmithError(
                    f"hp_space: {fixed[0]} is what the rows or the model are prepared by, once, before the search; "
                    "make a trainer for each value"
                )
        super()._hp_search_setup(trial)

    def _overridden(self, args: SFTConfig) -> bool:
        """Whether this is a subclass that overrides a step's hooks, which is said."""
        names = overridden(type(self), BaseTrainer)
        if names:
            packs = "; packs are taken apart, so a batch has more rows than it has packs" if args.packing else ""
            logger.warning(
                "%s overrides %s: it gets padded batches in plain dictionaries, whose rows are in the order of the "
                "loader, and what does not fit into memory is not split%s. Override batch_loss to keep batches without "
                "padding.",
                type(self).__name__,
                " and ".join(names),
                packs,
            )
        return bool(names)

    def batch_loss(self, model: nn.Module, batch: Batch, *, with_outputs: bool = False) -> BatchLoss:
        """The cross-entropy of the supervised tokens, times their weights. In training, the load-balancing loss of a
        batch counts by the batch's weight: over all micro-batches and processes of a step, its mean is trained."""
        targets = batch.targets()
        objective = partial(supervised_loss, options=self.loss_options)
        answer = self.predict_targets(model, batch, targets, objective, with_outputs=with_outputs)
        result: Supervised = answer.outcome
        loss, sums = result.loss, {"entropy": result.entropy.sum(), "mean_token_accuracy": result.correct.sum()}
        if answer.router_loss is not None:
            sums["aux_loss"] = answer.router_loss.detach() * len(targets.tokens)
            if model.training:
                loss = loss + self.router_coefficient * self.batch_weight(batch) * answer.router_loss
        return BatchLoss(
            loss=loss,
            count=len(targets.tokens),
            sums=sums,
            nll=result.nll,
            outputs=answer.outputs,
        )

    def predict(
        self, test_dataset: Source, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Logits (D, T, V) and labels (D, T), padded with -100, of rows like those of the constructor. D is the number
        of documents: one for each row, but for conversations that are trained turn by turn (`turns`)."""
        prepared = self.data(test_dataset, metric_key_prefix, packing=False)
        return super().predict(cast(Any, prepared), ignore_keys, metric_key_prefix)


def _makes_batches(collator: Any) -> Any:
    """A user's collator; None for that of `transformers` which only pads rows and takes all tokens for labels. It would
    lose what rows mask, and ends of rows where the padding token is the end token; ours pad, too.

    Raises:
        TunesmithError: it masks tokens for a model that is no causal one.
    """
    if type(collator) is not DataCollatorForLanguageModeling:
        return collator
    if collator.mlm:
        raise TunesmithError(
            "data_collator masks tokens for models that fill gaps (mlm=True), and this trainer is for those that "
            "predict the next token; leave data_collator out"
        )
    logger.warning(
        "DataCollatorForLanguageModeling only pads, and its labels are all tokens. Batches are made without it, and "
        "labels are those that the rows have, or that train_on says; leave data_collator out."
    )
    return None


def with_arguments(args: SFTConfig | TrainingArguments | None, older: Mapping[str, Any]) -> Any:
    """`args` with what TRL's trainer was once given itself, such as `max_seq_length` or `packing`.

    Raises:
        TunesmithError: a name that neither the trainer nor SFTConfig has, or another value in `args`.
    """
    if not older:
        return args
    if args is None:
        raise TunesmithError(f"{min(older)} is a setting: write args=SFTConfig({min(older)}=...)")
    defaults = {item.name: item.default for item in fields(SFTConfig)}
    settings = by_todays_names(older, defaults, "SFTTrainer")
    for name, value in settings.items():
        there = getattr(args, name, defaults[name])
        if there not in (value, defaults[name]):
            raise TunesmithError(f"{name} is {value!r} in SFTTrainer and {there!r} in its args; keep that of args")
    logger.warning("%s: settings are in SFTConfig now.", ", ".join(f"SFTTrainer({name}=...)" for name in older))
    return SFTConfig(**(settings_of(args) | settings))
