"""SFTTrainer: `transformers.Trainer` on flat batches, with the loss on supervised positions."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from accelerate.utils import TorchDynamoPlugin
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from tunesmith.data.batches import flat, padded
from tunesmith.data.dataset import DataPreparer, Source
from tunesmith.data.mixture import DataSource
from tunesmith.data.samplers import check_fit
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import has_virtual_tokens, starting_point
from tunesmith.model.compile import compile_layers
from tunesmith.model.devices import here
from tunesmith.model.head import behind_virtual_tokens, next_token_targets
from tunesmith.model.linear import speed_up
from tunesmith.model.quantize import check_optimizer
from tunesmith.objectives.supervised import LossOptions, Supervised
from tunesmith.runs.lock import only_run_in
from tunesmith.runs.record import Origin
from tunesmith.settings.config import SFTConfig
from tunesmith.train.checkpointing import CheckpointingTrainer
from tunesmith.train.journal import JournalingTrainer
from tunesmith.train.memory import keep_freed_memory
from tunesmith.train.meter import Meter
from tunesmith.train.metric_logits import check_logits
from tunesmith.train.offload import offloading
from tunesmith.train.selftest import check_before_training
from tunesmith.train.setup import (
    Model,
    align_tokens,
    as_sft_config,
    base_model,
    prepare_model,
    prepare_tokenizer,
    teach_model,
)
from tunesmith.train.trackers import check_trackers
from tunesmith.types import IGNORE_INDEX

Sources: TypeAlias = Source | Mapping[str, Source]


class SFTTrainer(CheckpointingTrainer, JournalingTrainer):
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
    # The loss is divided by the tokens of the whole step, so accumulation needs no further division.
    loss_is_scaled_for_ga = True

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
        self._prepare = DataPreparer(args, tokenizer, formatting_func)
        train_dataset, eval_dataset = self._prepare_all(train_dataset, eval_dataset, args, compute_metrics is not None)
        set_seed(args.seed)  # adapters start from random numbers
        model = prepare_model(model, args, peft_config, quantization_config, tokenizer, added)
        self._base_changed = starting_point(model)
        self._choose_batches(model, args, compute_loss_func is None, isinstance(train_dataset, Dataset))
        align_tokens(model, tokenizer, self._prepare.stops)
        self._padded = partial(padded, pad_token_id=tokenizer.pad_token_id, multiple=int(args.pad_to_multiple_of or 1))
        self._sharing = partial(flat, share_prefix=args.share_prefix == "auto")
        self._loss_options = LossOptions(smoothing=args.label_smoothing_factor, dft=args.loss_type == "dft")
        self._custom_collator = data_collator is not None
        self.origins: dict[str, Origin] = {}
        self._meters = {mode: Meter() for mode in ("train", "eval")}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or (self._sharing if self._flat else self._padded),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if self.args.device.type == "cpu":
            keep_freed_memory()
        if self.args.n_gpu > 1:
            raise TunesmithError(
                "several GPUs are visible to one process (nn.DataParallel); start with `accelerate launch` or "
                "`torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        model.add_model_tags(list(self._tag_names))

    def _choose_batches(self, model: Model, args: SFTConfig, own_loss: bool, has_length: bool) -> None:
        """Settle whether batches are flat, and whether rows of like length share one; and make the model's layers
        faster for them."""
        wanted = args.padding_free and own_loss and _unhooked(args)
        grouped = not args.packing and args.train_sampling_strategy == "random" and has_length
        self._flat = teach_model(model, flat=wanted, grouped=grouped)
        by_length = args.train_sampling_strategy == "group_by_length"
        self._grouped = by_length or (grouped and wanted and not self._flat)
        # On a GPU, torch.compile makes layers faster by itself.
        if not args.torch_compile or base_model(model).device.type == "cpu":
            speed_up(model)
        if args.torch_compile:
            assert args.torch_compile_backend is not None
            compile_layers(base_model(model), backend=args.torch_compile_backend, mode=args.torch_compile_mode)

    # Data

    def _prepare_all(
        self, train_dataset: Any, eval_dataset: Sources | None, args: SFTConfig, by_row: bool
    ) -> tuple[Any, Any]:
        """Both data sets, and a look at them before any weight is loaded."""
        prepared, prepared_eval = self._prepare.everything(train_dataset, eval_dataset, by_row=by_row)
        self.preflight = self._prepare.preflight()
        self.preflight.stop_on_problems()
        self._prepare.save_skipped()
        check_fit(args, prepared, None if by_row else prepared_eval)
        return prepared, prepared_eval

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
            eval_dataset = self._prepare.evaluated(eval_dataset, by_row=self.compute_metrics is not None)
        return super().evaluate(cast(Any, eval_dataset), ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Source, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Logits (rows, T, V) and labels (rows, T), padded with -100, of rows like those of the constructor."""
        prepared = self._prepare(test_dataset, metric_key_prefix, packing=False)
        return super().predict(cast(Any, prepared), ignore_keys, metric_key_prefix)

    # Training

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """As in `transformers`, but `accelerate` does not compile the whole model: its layers are compiled already."""
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`, after the self-test that `args.self_test` asks for."""
        self.report = None
        if self.args.eval_strategy != "no":
            check_logits(self, self.eval_dataset)
        check_before_training(cast(Model, self.model), self.train_dataset, cast(SFTConfig, self.args), flat=self._flat)
        held = only_run_in(Path(str(self.args.output_dir))) if self.is_world_process_zero() else nullcontext()
        with held:
            return super().train(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `transformers`; with `loraplus_lr_ratio`, LoRA's B matrices learn faster than its A matrices."""
        ratio = cast(SFTConfig, self.args).loraplus_lr_ratio
        if ratio is not None and self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, self.model))
            settings |= {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": self.args.weight_decay}
            self.optimizer = create_loraplus_optimizer(cast(PeftModel, self.model), kind, **settings)
        return super().create_optimizer(model)

    # Loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """The weight of all supervised tokens of a step: every micro-batch, and every process."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        weight = sum(_weight(batch) for batch in batch_samples)
        assert isinstance(weight, Tensor)
        weight = weight.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            weight = self.accelerator.gather(weight).sum()
        return weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum over supervised tokens / their weight in the whole step. With `return_outputs`, those of the model, too,
        with the logits of all positions."""
        if num_items_in_batch is None:
            num_items_in_batch = _weight(inputs)
        labels, weights = inputs["labels"], inputs.get("weights")
        virtual = has_virtual_tokens(cast(nn.Module, self.model))
        # `peft` counts the positions of virtual tokens itself.
        ours = {"labels", "weights", "places", *(("position_ids",) if virtual else ())}
        forward = {name: value for name, value in inputs.items() if name not in ours}
        self._meter.read(inputs)
        if self.compute_loss_func is not None:
            outputs = model(**forward, use_cache=False)
            outputs.logits = outputs.logits[:, -labels.shape[1] :]  # without those of virtual tokens
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            targets = next_token_targets(labels, weights, inputs.get("places"))
            with offloading(model, enabled=model.training and cast(SFTConfig, self.args).activation_offloading):
                result: Supervised
                if virtual:
                    result = behind_virtual_tokens(
                        model, forward, targets, self._loss_options, return_outputs=return_outputs
                    )
                else:
                    result = model(
                        **forward, supervise=targets, loss_options=self._loss_options, return_outputs=return_outputs
                    )
            outputs = result.outputs
            self._meter.add(result, targets)
            if model.training:
                self._note_losses(inputs, result)
            # An all-masked step has weight 0 and loss 0: dividing by 1 keeps the zero and its graph.
            total = torch.as_tensor(num_items_in_batch, device=result.loss.device)
            loss = result.loss / torch.where(total > 0, total, torch.ones_like(total))
        if model.training and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which DDP's mean over processes divides by
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs.logits, inputs["labels"]

    # What is reported

    @property
    def _meter(self) -> Meter:
        return self._meters["train" if cast(nn.Module, self.model).training else "eval"]

    def evaluation_loop(  # type: ignore[override]
        self, dataloader: Any, description: str, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The eval loss is the mean over supervised tokens, not over batches of unequal size."""
        if description != "Prediction":
            check_logits(self, dataloader.dataset)
        self._meters["eval"].reset()
        output = super().evaluation_loop(dataloader, description, metric_key_prefix=metric_key_prefix, **kwargs)
        _, measured = self._meters["eval"].report(self.accelerator)
        metrics = cast(dict[str, float], output.metrics)
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds TRL's `entropy`, `mean_token_accuracy` and `num_tokens` (tokens read since the start)."""
        if "loss" in logs:
            tokens, measured = self._meters["train"].report(self.accelerator)
            logs |= {name: measured[name] for name in ("entropy", "mean_token_accuracy") if measured}
            logs["num_tokens"] = tokens
        super().log(logs, start_time)


def _check_arguments(args: SFTConfig, train_dataset: Any, compute_loss_func: Any) -> None:
    if train_dataset is None:
        raise TunesmithError("train_dataset is missing: give a Dataset, an IterableDataset or a list of rows")
    if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise TunesmithError("train_dataset is a stream of unknown length: set max_steps")
    if args.loss_type == "dft" and compute_loss_func is not None:
        raise TunesmithError("loss_type: dft and compute_loss_func both say what the loss is; drop one")
    check_trackers(args.report_to)
    check_optimizer(str(getattr(args.optim, "value", args.optim)), "cpu" if args.use_cpu else here().type)


def _unhooked(args: SFTConfig) -> bool:
    # NEFTune scales its noise by the length of a row, which in a flat row is that of all documents together.
    return args.neftune_noise_alpha is None


def _weight(batch: Mapping[str, Any]) -> Tensor:
    supervised = batch["labels"][..., 1:] != IGNORE_INDEX
    weights = batch.get("weights")
    return supervised.sum() if weights is None else (weights[..., 1:] * supervised).sum()
