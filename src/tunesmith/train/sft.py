"""Supervised fine-tuning: data prepared and checked, a model made ready, cross-entropy on supervised tokens."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PredictionOutput

from tunesmith.data.batches import Batch, FlatCollator, PaddedCollator, documents_of
from tunesmith.data.dataset import DataPreparer, Source
from tunesmith.data.mixture import DataSource
from tunesmith.data.samplers import check_fit
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model, base_model, starting_point
from tunesmith.model.compile import compile_layers
from tunesmith.model.devices import here
from tunesmith.model.linear import speed_up
from tunesmith.model.quantize import check_optimizer
from tunesmith.objectives.supervised import LossOptions, Supervised, supervised_loss
from tunesmith.settings.config import SFTConfig
from tunesmith.train.loaders import Batching
from tunesmith.train.meter import BatchLoss
from tunesmith.train.setup import (
    align_tokens,
    as_sft_config,
    check_trackers,
    prepare_model,
    prepare_tokenizer,
    ready_for_batches,
)
from tunesmith.train.trainer import BaseTrainer
from tunesmith.types import Row

Sources: TypeAlias = Source | Mapping[str, Source]


class SFTTrainer(BaseTrainer):
    """Supervised fine-tuning with the arguments of TRL's trainer of the same name.

    `model` is a name, a folder, "demo", or a loaded causal language model (with or without adapters). `train_dataset`
    is a `datasets.Dataset`, an `IterableDataset` (then `args.max_steps` must be set), a list of rows, or a mixture of
    them: named sources, each as it is or in a `DataSource` with its weight and held-out share, whose eval loss is
    reported as `eval_NAME_loss`; `trainer.preflight` says what was found in the data, and `trainer.origins` may say
    where it came from, by split or source, for the card. Afterwards
    `trainer.train_dataset` holds `input_ids` and `labels` (unshifted, -100 where unsupervised).
    `compute_loss_func(outputs, labels, num_items_in_batch)` and `compute_metrics` get logits from padded batches; the
    latter must make them less where those of all rows would fill more than half of the memory that is free.

    The data is prepared and checked before any weight is loaded. Raises TunesmithError for what would train wrongly.
    """

    _tag_names = ("tunesmith", "sft")
    means = ("entropy", "mean_token_accuracy")
    data: DataPreparer

    def __init__(
        self,
        model: str | Model,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Source | Mapping[str, Source | DataSource] | None = None,
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
    ) -> None:
        args = as_sft_config(args, model)
        _check_arguments(args, train_dataset, compute_loss_func)
        if args.loraplus_lr_ratio is not None and (optimizers[0] is not None or optimizer_cls_and_kwargs is not None):
            raise TunesmithError("loraplus_lr_ratio and an optimizer of yours both say how fast what learns; drop one")
        tokenizer, added = prepare_tokenizer(processing_class, model, args)
        data = DataPreparer(args, tokenizer, formatting_func, shares=data_collator is None)
        by_row = compute_metrics is not None
        train, evaluated = data.everything(train_dataset, eval_dataset, by_row=by_row)
        preflight = data.preflight()
        preflight.stop_on_problems()
        data.save_skipped()
        check_fit(args, train, None if by_row else evaluated)
        set_seed(args.seed)  # adapters start from random numbers
        model = prepare_model(model, args, peft_config, quantization_config, tokenizer, added)
        start = starting_point(model)
        batching = _prepared_for_batches(
            model, args, tokenizer, data_collator, own_loss=compute_loss_func is None, sized=isinstance(train, Dataset)
        )
        align_tokens(model, tokenizer, data.stops)
        self.loss_options = LossOptions(smoothing=args.label_smoothing_factor, dft=args.loss_type == "dft")
        super().__init__(
            model,
            args,
            batching,
            data=data,
            preflight=preflight,
            starting_point=start,
            train_dataset=train,
            eval_dataset=evaluated,
            processing_class=tokenizer,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        model.add_model_tags(list(self._tag_names))

    def batch_loss(self, model: nn.Module, batch: Batch, *, with_outputs: bool = False) -> BatchLoss:
        """The cross-entropy of the supervised tokens, times their weights."""
        targets = batch.targets()
        objective = partial(supervised_loss, options=self.loss_options)
        answer = self.predict_targets(model, batch, targets, objective, with_outputs=with_outputs)
        result: Supervised = answer.outcome
        return BatchLoss(
            loss=result.loss,
            count=len(targets.tokens),
            sums={"entropy": result.entropy.sum(), "mean_token_accuracy": result.correct.sum()},
            nll=result.nll,
            outputs=answer.outputs,
        )

    def evaluate(
        self,
        eval_dataset: Sources | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in `transformers`; a data set given here is prepared like the one of the constructor."""
        if isinstance(eval_dataset, Mapping):
            metrics: dict[str, float] = {}
            for name, source in eval_dataset.items():
                metrics |= self.evaluate(source, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.data.evaluated(eval_dataset, by_row=self.compute_metrics is not None)
        return super().evaluate(cast(Any, eval_dataset), ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Source, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Logits (D, T, V) and labels (D, T), padded with -100, of rows like those of the constructor. D is the number
        of documents: one for each row, but for conversations that are trained turn by turn (`turns`)."""
        prepared = self.data(test_dataset, metric_key_prefix, packing=False)
        return super().predict(cast(Any, prepared), ignore_keys, metric_key_prefix)

    def first_rows(self) -> Iterator[Row]:
        """Some of the rows that were given, as they were understood; those held out first."""
        return self.data.first_rows()


def _check_arguments(args: SFTConfig, train_dataset: Any, compute_loss_func: Any) -> None:
    if train_dataset is None:
        raise TunesmithError("train_dataset is missing: give a Dataset, an IterableDataset or a list of rows")
    if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise TunesmithError("train_dataset is a stream of unknown length: set max_steps")
    if args.loss_type == "dft" and compute_loss_func is not None:
        raise TunesmithError("loss_type: dft and compute_loss_func both say what the loss is; drop one")
    check_trackers(args.report_to)
    check_optimizer(str(getattr(args.optim, "value", args.optim)), "cpu" if args.use_cpu else here().type)


def _prepared_for_batches(
    model: Model,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    data_collator: Any,
    *,
    own_loss: bool,
    sized: bool,
) -> Batching:
    """How rows become batches: flat ones where the model takes them, else rows of like length together. The model's
    forward is prepared for them: it answers objectives, and its layers take the faster or the compiled way."""
    # NEFTune scales its noise by the length of a row, which in a flat row is that of all documents together.
    wanted = args.padding_free and own_loss and args.neftune_noise_alpha is None
    grouped = not args.packing and args.train_sampling_strategy == "random" and sized
    flat = ready_for_batches(model, flat=wanted, grouped=grouped)
    # On a GPU, torch.compile makes layers faster by itself.
    if not args.torch_compile or base_model(model).device.type == "cpu":
        speed_up(model)
    if args.torch_compile:
        assert args.torch_compile_backend is not None
        compile_layers(base_model(model), backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    padded = PaddedCollator(
        read=documents_of,
        pad_token_id=cast(int, tokenizer.pad_token_id),
        multiple=int(args.pad_to_multiple_of or 1),
    )
    ours = FlatCollator(share_prefix=args.share_prefix == "auto") if flat else padded
    return Batching(
        collator=data_collator or ours,
        by_row=padded,
        grouped=args.train_sampling_strategy == "group_by_length" or (grouped and wanted and not flat),
    )
