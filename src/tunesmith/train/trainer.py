"""A step of training, from top to bottom: `transformers.Trainer` and the parts that it owns here.

The hooks of `transformers` stand in the order in which they are called, a few lines each. The parts do the work:

    loaders    which documents share a batch                              train/loaders.py, data/samplers.py
    recovery   a step again in smaller parts when memory is out           train/recovery.py
    guard      a step without a finite gradient changes nothing           train/guard.py
    meter      sums over batches, for the log                             train/meter.py
    keeper     checkpoints, and the way back into a run                   train/keeper.py
    journal    the files that a run writes of itself                      train/journal.py
    overrides  what a subclass that computes its own loss is given        train/overrides.py

A trainer with another objective extends `BaseTrainer`: it says what becomes of a batch (`batch_loss`), by what that is
divided (`batch_weight`), and how rows become batches (`Batching`). Everything else is the same for all.
"""

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, cast

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, TorchDynamoPlugin, broadcast_object_list
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from tunesmith.data.batches import Batch, Targets
from tunesmith.data.preflight import Preflight
from tunesmith.errors import TunesmithError
from tunesmith.model import ways
from tunesmith.model.adapters import Model, StartingPoint, Trainable, has_experts, has_virtual_tokens, trainable
from tunesmith.model.head import Answer, Objective, from_logits, outputs_behind_virtual_tokens
from tunesmith.runs.files import follow_umask
from tunesmith.runs.folder import only_run_in
from tunesmith.runs.record import Origin, RunRecord
from tunesmith.runs.states import kept_random_states
from tunesmith.secrets import without_secrets
from tunesmith.settings.config import Config
from tunesmith.train import hooks
from tunesmith.train.agreement import check_same_weights
from tunesmith.train.evaluations import check_metric
from tunesmith.train.guard import Guard
from tunesmith.train.journal import DataSeen, Journal, record_of
from tunesmith.train.keeper import Keeper
from tunesmith.train.limits import check_logits, keep_freed_memory
from tunesmith.train.loaders import Batching, Loaders
from tunesmith.train.meter import BatchLoss, Extreme, Meter
from tunesmith.train.offload import offloading
from tunesmith.train.overrides import Overrides, PlainBatch, as_batch
from tunesmith.train.recovery import Recovery
from tunesmith.train.selftest import check_before_training
from tunesmith.train.sharding import (
    check_can_share_out,
    check_gathered_head,
    gradients_stay,
    is_shared_out,
    read_weights,
    save_parts,
    save_whole,
    share_out,
    whole_norm,
)
from tunesmith.train.together import Waiting

hooks.check()
logger = logging.getLogger(__name__)


class Publisher(Protocol):
    """Sends what a trainer has trained to a hub; see `ship.hub`."""

    def begin(self, trainer: Any, token: str | None, private: bool | None) -> str: ...

    def send_checkpoint(self, trainer: Any, folder: str) -> None: ...


class BaseTrainer(transformers.Trainer):
    """What all trainers share.

    `model` is ready to train (`train.setup`), `batching` says how rows of the data sets become batches. `data` and
    `preflight` tell the journal of the rows, where something is known of them. The rest are arguments of
    `transformers.Trainer`.

    `events` has what was odd, with the step; `listeners` are told each line of `metrics.jsonl` on the main process.
    `origins` may say where data came from, by split or source, for the card.
    """

    means: tuple[str, ...] = ()
    """The names in `BatchLoss.sums` whose means are logged."""
    counted: tuple[str, ...] = ()
    """Those of them that have a number of their own, in `BatchLoss.counts`."""
    extremes: Mapping[str, Extreme] = MappingProxyType({})
    """The names in `BatchLoss.extremes` that are logged, and which of their values: "min" or "max"."""
    kind: ClassVar[str] = "sft"
    """What is trained, in the record of a run."""
    publisher: ClassVar[Any] = None
    """A `Publisher`, where the trainer can send what it has trained."""
    draw_page: ClassVar[Any] = None
    """A function that draws the page about the run in a folder, and returns its file."""

    loss_tells: ClassVar[bool] = True
    """Whether a loss of 0, or one far above those before it, is odd."""

    # The loss is divided by the weight of the whole step, so accumulation needs no further division.
    loss_is_scaled_for_ga = True
    hub_model_id: str | None = None  # type: ignore[assignment]

    def __init__(
        self,
        model: Model,
        args: Config,
        batching: Batching,
        *,
        data: DataSeen | None = None,
        preflight: Preflight | None = None,
        starting_point: StartingPoint | None = None,
        **arguments: Any,
    ) -> None:
        self.events: list[tuple[int, str]] = []
        self.origins: dict[str, Origin] = {}
        self.preflight = preflight
        self.data = data
        self._starting_point = starting_point
        self.meters = {mode: Meter(self.means, self.counted, self.extremes) for mode in ("train", "eval")}
        self.loaders, self.waiting = Loaders(self, batching), Waiting()
        super().__init__(model=model, args=args, data_collator=cast(Any, batching.collator), **arguments)
        self._shared_states = [(kind, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState)]
        if self.args.n_gpu > 1:
            raise TunesmithError(
                "several GPUs are visible to one process (nn.DataParallel); start with `accelerate launch` or "
                "`torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        if args.cpu_offload and args.world_size == 1:
            raise TunesmithError(
                "cpu_offload is True, but one process trains, which has nothing to move away; leave it out"
            )
        if self.is_fsdp_enabled:
            raise TunesmithError(
                "accelerate is configured for FSDP, which would share out weights that its own code saves; start with "
                "`torchrun` or a plain `accelerate launch`, and write shard: full"
            )
        if (sharing := max(self.get_tp_size(), self.get_cp_size(), self.get_sp_size())) > 1:
            raise TunesmithError(
                f"parallelism_config lets {sharing} processes share the computation of a row, and here each process "
                "computes rows of its own; leave out tp_size, cp_size and sp_size"
            )
        if self.shares_out:
            check_can_share_out(model, args, arguments.get("optimizers") or (None, None))
            # The model places itself, and sums its gradients itself: nothing is to wrap it for that.
            self.is_distributed_loading_by_transformers = True
        if self.optimizer is not None:
            _check_holds(self.optimizer, cast(nn.Module, self.model))
        self.journal = Journal(
            self,
            data,
            preflight,
            self.waiting,
            tell=self.tell,
            draw_page=type(self).draw_page,
            write_record=lambda folder: self.record().write(folder),
        )
        self.guard = Guard(self, self.tell)
        self.recovery = Recovery(
            self, self.loaders, self.meters["train"], self.waiting, forget=self._forget_step, tell=self.tell
        )
        self.keeper = Keeper(self, self.meters["train"], {"recovery": self.recovery, "guard": self.guard})
        self.overrides = Overrides(self, BaseTrainer, self.meters, self._note_batch)
        self.add_callback(_Moments(self.journal, self.guard))

    def take_up_states(self) -> None:
        """Puts back what `accelerate` keeps once for all trainers of a process, such as the precision. Each config that
        is made empties it, and each trainer that is made fills it anew."""
        for kind, values in self._shared_states:
            if kind._shared_state != values:
                kind._shared_state.clear()
                kind._shared_state.update(values)

    # Called by the constructor of `transformers`

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """`accelerate` does not compile the whole model: its layers are compiled already. Processes look for weights
        that a step has not used where an expert may have got no token, and elsewhere only if they are told to."""
        built = super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}
        if self.args.ddp_find_unused_parameters is None:
            for handler in built["kwargs_handlers"]:
                if isinstance(handler, DistributedDataParallelKwargs):
                    handler.find_unused_parameters = has_experts(cast(Model, self.model))
        return built

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """With `push_to_hub`: the repository is made at the start, so that what is wrong with it shows then."""
        if self.publisher is None:
            super().init_hf_repo(token)
        elif self.is_world_process_zero():
            self.hub_model_id = self.publisher.begin(self, token, private)

    # Weights that are shared out over processes

    @property
    def shares_out(self) -> bool:
        """Whether several processes share the weights out."""
        return cast(Config, self.args).shard != "none" and self.args.world_size > 1

    def _share_out(self) -> None:
        """As late as can be: until then each process has the whole model."""
        if not self.shares_out or is_shared_out(self.model):
            return
        if self.model_init is not None:
            raise TunesmithError("shard: model_init makes other models later; give the model itself")
        check_same_weights(cast(nn.Module, self.model))
        share_out(cast(Model, self.model), cast(Config, self.args))

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Around a micro-batch that is not the last of its step."""
        return gradients_stay(cast(nn.Module, self.model), weights_stay=cast(Config, self.args).shard == "grad")

    # What another trainer says

    def batch_loss(self, model: nn.Module, batch: Batch, *, with_outputs: bool = False) -> BatchLoss:
        """The objective's sum over `batch`, through `predict_targets`."""
        raise NotImplementedError(f"{type(self).__name__} must define batch_loss")

    def batch_weight(self, batch: Batch) -> Tensor:
        """What a batch adds to the number by which the step's loss is divided: the weight of its supervised tokens."""
        return batch.weight

    def predict_targets(
        self, model: nn.Module, batch: Batch, targets: Targets, objective: Objective, *, with_outputs: bool = False
    ) -> Answer:
        """What `objective` makes of the model's predictions at the targets of a batch, with the model's outputs if they
        are wanted."""
        if has_virtual_tokens(cast(nn.Module, self.model)):
            outputs = outputs_behind_virtual_tokens(model, batch.inputs())
            return Answer(outcome=objective(from_logits(outputs.logits, targets)), outputs=outputs)
        answer: Answer = model(**batch.inputs(), targets=targets, objective=objective, with_outputs=with_outputs)
        return answer

    # A run begins

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`. True goes on from the newest checkpoint in the output folder that verifies. A run that
        an error ends, or Ctrl-C, has a report of the steps before it.

        Raises:
            TunesmithError: there is no checkpoint to go on from, or the given one does not verify or belongs to another
                run; the disk is full; another process would not train the same.
        """
        self.take_up_states()
        self.journal.page = None
        check_metric(self, [*self.means, *self.extremes])
        if self.model is None:  # which a search lets go of between trials, and the checks below are of
            self.model = self.call_model_init(*args[:1], **{name: kwargs[name] for name in kwargs if name == "trial"})
        settings = cast(Config, self.args)
        if settings.eval_strategy != "no":
            check_logits(self, self.eval_dataset)
        self.keeper.agree(resumes=bool(resume_from_checkpoint))
        self._share_out()
        self._prepare_anew()
        if self.is_deepspeed_enabled:
            check_gathered_head(cast(Model, self.model), settings)
        self.test_itself()
        if settings.device.type == "cpu":
            keep_freed_memory()
        main = self.is_world_process_zero()
        with only_run_in(Path(str(settings.output_dir))) if main else nullcontext():
            ways.begin_anew()
            if settings.process_index > 0:  # the first process chooses for all, behind its first step
                ways.settle()
            checkpoint = self.keeper.begin(resume_from_checkpoint)
            self.meters["train"].begin()
            self.guard.begin()
            self.recovery.begin()
            try:
                output = super().train(checkpoint, *args, **kwargs)
            except BaseException as error:
                self.journal.break_off(error)
                if isinstance(error, Exception):
                    self.keeper.give_up()
                raise
            finally:
                self.guard.end()
            self.keeper.wait()
        return output

    def _prepare_anew(self) -> None:
        """`accelerate` takes a model that an evaluation has prepared for one that is ready to train, and would not wrap
        it: nothing would sum the gradients of several processes."""
        if self.args.world_size > 1 and not self.shares_out and self.model_wrapped is self.model:
            vars(self.model).pop("_is_accelerate_prepared", None)

    def test_itself(self) -> None:
        """Raises TunesmithError where the model says something else in this run's batches than in its own forward."""
        flat, settings = not self.loaders.batching.padded, cast(Config, self.args)
        check_before_training(cast(Model, self.model), self.train_dataset, settings, flat=flat)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = cast(Any, list(self.loaders.batching.columns))

    def _get_dataloader(  # type: ignore[override]
        self, dataset: Any, description: str, batch_size: int, **kwargs: Any
    ) -> Any:
        self.take_up_states()
        training = bool(kwargs.get("is_training"))
        dataset = self.loaders.in_parts(dataset) if training else dataset
        with self.keeper.noting_place(dataset, training=training):
            return self.loaders.loader(super()._get_dataloader, dataset, description, batch_size, **kwargs)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.loaders.rows_of_step(super().get_total_train_batch_size(args))

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        self._stopped_early = resume is not None and self._restored_patience()
        return self.keeper.resume_at(self.keeper.own(resume), position)

    def _restored_patience(self) -> bool:
        """Lets a resumed run stop early where an unbroken one would: evaluations without a better one are counted on.
        Whether they have stopped it before."""
        states: dict[str, list[Any]] = {}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                name = type(callback).__name__
                stored: Any = self.state.stateful_callbacks.get(name, [])  # type: ignore[union-attr]
                left = states.setdefault(name, [*stored] if isinstance(stored, list) else [stored])
                if left:
                    waited = left.pop(0).get("attributes", {}).get("early_stopping_patience_counter", 0)
                    callback.early_stopping_patience_counter = waited
                    if waited >= callback.early_stopping_patience:
                        logger.warning(
                            "This run has stopped early, after %d evaluations without a better one. To go on, give %s "
                            "more patience, or leave it out.", waited, name,
                        )  # fmt: skip
                        return True
        return False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not is_shared_out(self.model):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        read_weights(cast(Model, self.model), Path(resume_from_checkpoint))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """With `loraplus_lr_ratio`, LoRA's B matrices learn faster than its A matrices."""
        ratio = cast(Config, self.args).loraplus_lr_ratio
        if ratio is not None and self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, self.model))
            settings |= {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": self.args.weight_decay}
            self.optimizer = create_loraplus_optimizer(cast(PeftModel, self.model), kind, **settings)
        return super().create_optimizer(model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if (folder := self.keeper.own(checkpoint)) is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        self.keeper.load_optimizer(folder)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if (folder := self.keeper.own(checkpoint)) is None:
            return super()._load_scaler(checkpoint)
        self.keeper.load_scaler(folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if (folder := self.keeper.own(checkpoint)) is None:
            return super()._load_rng_state(checkpoint)
        self.keeper.load_random(folder)

    # An epoch, and a step of it

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps or self._stopped_early:  # or one more step would be taken
            self.control.should_training_stop = True
            return
        position = {name: kwargs[name] for name in ("epoch", "epochs_trained", "steps_trained_in_current_epoch")}
        with self.keeper.epoch(**position):
            super()._run_epoch(*args, **kwargs)
        # What a stream's last micro-batches would have made a step with is not mixed into the next epoch's first.
        kwargs["model"].zero_grad()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """All micro-batches of a step, and the number that its loss is divided by."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.keeper.took(len(batches))
        return self.loaders.regrouped(batches), items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """The weight of a whole step: every micro-batch, and every process."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        batches = [as_batch(batch) for batch in batch_samples]
        weights = (self.batch_weight(batch) for batch in batches if not batch.blank)
        weight = sum(weights, start=torch.tensor(0)).to(device)
        if self.args.world_size > 1:
            training = cast(nn.Module, self.model).training
            with self.waiting.counted(device) if training else nullcontext():
                weight = self.accelerator.reduce(weight.to(torch.float32), reduction="sum")
        return weight

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a micro-batch, when its gradients are there."""
        self.overrides.reach("training_step")
        loss = self.recovery.step(super().training_step, model, inputs, num_items_in_batch)
        self._note_batch(inputs, loss)
        return loss

    def _forget_step(self) -> None:
        """A step begins again."""
        self.journal.forget_step()
        self.guard.forget_step()

    def _note_batch(self, inputs: Any, loss: Tensor) -> None:
        self.guard.note(inputs, loss)
        self.journal.note_batch(inputs, loss)

    def _prepare_inputs(self, inputs: Any) -> Any:
        ours = isinstance(inputs, Batch | PlainBatch)
        return inputs.to(self.args.device) if ours else super()._prepare_inputs(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's sum over a batch / the weight of the whole step. With `return_outputs`, those of the model,
        too, with the logits of all positions."""
        self.overrides.reach("compute_loss")
        batch = as_batch(inputs)
        weight = self.batch_weight(batch) if num_items_in_batch is None else num_items_in_batch
        meter = self.meters["train" if cast(nn.Module, self.model).training else "eval"]
        meter.read(batch)
        if self.compute_loss_func is not None:
            if has_virtual_tokens(cast(nn.Module, self.model)):
                outputs = outputs_behind_virtual_tokens(model, batch.inputs())
            else:
                outputs = model(**batch.inputs(), use_cache=False)
            if batch.blank:
                loss = outputs.logits.sum() * 0.0
            else:
                loss = self.compute_loss_func(outputs, batch.labels, num_items_in_batch=weight)
        else:
            with offloading(model, enabled=model.training and cast(Config, self.args).activation_offloading):
                outcome = self.batch_loss(model, batch, with_outputs=return_outputs)
            outputs = outcome.outputs
            if batch.blank:
                outcome = replace(outcome, loss=outcome.loss * 0.0)
            else:
                meter.add(outcome, self.batch_weight(batch))
            if model.training:
                self.journal.note_losses(batch, outcome.nll, outcome.margins)
            # An all-masked step has weight 0 and loss 0: dividing by 1 keeps the zero and its graph.
            total = torch.as_tensor(weight, device=outcome.loss.device)
            loss = outcome.loss / torch.where(total > 0, total, torch.ones_like(total))
        if outputs is not None:
            outputs.loss = loss
        if num_items_in_batch is not None:
            # By which the mean over processes divides, that of gradients and that of an evaluation.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once a step, when its gradients are whole and not yet used."""
        norm = whole_norm(super()._get_grad_norm(model, grad_norm))
        self.guard.check(model, norm)
        return norm

    # Behind a step: the log, evaluation, a checkpoint

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Called behind each step, and once more at the end of an epoch."""
        self.keeper.note_step()
        self.journal.note_step(grad_norm, kwargs.get("learning_rate"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        self.journal.start_clock()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the objective's means, and `num_tokens` (tokens read since the start); to the last entry, `train_loss`,
        those of the steps that were not logged before."""
        if "loss" in logs or "train_loss" in logs:
            tokens, measured = self.meters["train"].report(self.accelerator)
            logs |= {name: measured[name] for name in (*self.means, *self.extremes) if name in measured}
            if "loss" in logs or measured:
                logs["num_tokens"] = tokens
        if "loss" in logs and self.loss_tells:
            self.guard.judge(logs["loss"])
        super().log(logs, start_time)

    def evaluation_loop(  # type: ignore[override]
        self, dataloader: Any, description: str, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The eval loss is the mean over all that counts, not over batches of unequal size. An evaluation does not
        change the random numbers of the training: a resumed run may not repeat it."""
        if description != "Prediction":
            check_logits(self, dataloader.dataset)
        if self.args.device.type == "cpu":
            keep_freed_memory()
        self._share_out()
        meter = self.meters["eval"]
        meter.reset()
        with kept_random_states(self.args.device):
            output = super().evaluation_loop(dataloader, description, metric_key_prefix=metric_key_prefix, **kwargs)
        examples = torch.tensor(meter.examples, device=self.args.device)
        _, measured = meter.report(self.accelerator)
        metrics = cast(dict[str, float], output.metrics)
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        if not output.num_samples:  # of a stream, whose batches `transformers` can't count
            output = output._replace(num_samples=int(self.accelerator.reduce(examples, reduction="sum")))
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        labels, weight = inputs.get("labels"), self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs, num_items_in_batch=weight).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=weight)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        return loss.detach(), logits, labels

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.keeper.left_to_others:
            step = self.state.global_step
            with self.keeper.writing(Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"):
                return super()._save_checkpoint(model, trial)
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        folder = self.keeper.save(Path(self._get_output_dir(trial=trial)))
        if self.args.push_to_hub:
            self.keeper.wait()
            self._push_from_checkpoint(str(folder))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The settings go with the model as JSON; `transformers` would pickle them, and a pickle is code."""
        folder = Path(str(output_dir or self.args.output_dir))
        is_checkpoint = self.keeper.writes(folder)
        start = self._starting_point
        with start.as_they_are() if start is not None and is_checkpoint else nullcontext():
            if not is_shared_out(self.model):
                super()._save(output_dir, state_dict)
            elif is_checkpoint and not self.has_adapters:
                save_parts(self, folder)
            else:
                save_whole(self, folder, super()._save)
        if not self.args.should_save:
            return
        follow_umask(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)
        settings = json.dumps(without_secrets(json.loads(self.args.to_json_string())), indent=2)
        (folder / "training_args.json").write_text(f"{settings}\n", encoding="utf-8")
        if not is_checkpoint:
            self.record().write(folder)

    def _load_best_model(self) -> None:
        if not is_shared_out(self.model):
            return super()._load_best_model()
        read_weights(cast(Model, self.model), Path(str(self.state.best_model_checkpoint)))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.keeper.wait()  # the best model may be the last that is being written
        return super()._finalize_training(*args, **kwargs)

    # What a run tells

    def tell(self, step: int, text: str) -> None:
        """Something odd: an event of the run."""
        self.events.append((step, text))
        if self.is_world_process_zero():
            logger.warning("Step %d: %s.", step, text)
        self.journal.note_event(step, text)

    def record(self) -> RunRecord:
        """What this run is, as far as it has come; `run.json` beside a saved model."""
        return record_of(self)

    @property
    def listeners(self) -> list[Callable[[Mapping[str, Any]], None]]:
        return self.journal.listeners

    @property
    def report(self) -> Path | None:
        """The page about the run, when `train` is over; None where it was not drawn, and on other processes."""
        return self.journal.page

    @property
    def bad_steps(self) -> int:
        """How many steps were left out because their gradient was not finite."""
        return self.guard.bad_steps

    @property
    def trainable(self) -> Trainable:
        """How much of the model is trained."""
        return trainable(cast(nn.Module, self.model))

    @property
    def has_adapters(self) -> bool:
        return isinstance(self.model, PeftModel)

    # The hub, as far as the public trainer brings a publisher

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.publisher is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self.publisher.send_checkpoint(self, checkpoint_folder)


def _check_holds(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises TunesmithError for an optimizer that was made for other weights than those of `model` that are trained,
    before adapters were added, say; names those that it lacks."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: id(value) for name, value in model.named_parameters() if value.requires_grad}
    lacking = [name for name, key in trained.items() if key not in held]
    if len(lacking) == len(trained):
        raise TunesmithError(
            "optimizers: the optimizer has none of the weights that are trained, so nothing would change. It was made "
            "for another model, or before the adapters: make it from the parameters of a model that has them (without "
            "peft_config), or give optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': 1e-4}) instead"
        )
    if lacking:
        logger.warning(
            "The optimizer that was given lacks %d of %d weights with requires_grad, which stay as they are: %s%s.",
            len(lacking),
            len(trained),
            ", ".join(lacking[:3]),
            ", ..." if len(lacking) > 3 else "",
        )


class _Moments(TrainerCallback):
    """Tells a journal where the run is; ways to compute compete in the first step only, and the result of a run that
    has come to its end is looked at."""

    def __init__(self, journal: Journal, guard: Guard) -> None:
        self._journal, self._guard = journal, guard

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._chosen = False
        self._journal.begin()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._journal.start_clock()

    def on_step_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        ways.settle()
        if args.world_size > 1 and not self._chosen:
            ways.restore(broadcast_object_list([ways.state()])[0])
        self._chosen = True

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._journal.end_pass()

    def on_evaluate(self, *_: Any, metrics: Mapping[str, Any] | None = None, **__: Any) -> None:
        if metrics:
            self._journal.note_evaluation(metrics)
        self._journal.answer()

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        whole = state.global_step >= state.max_steps
        if whole:
            self._guard.check_result()
        self._journal.answer()
        self._journal.end("finished" if whole else "stopped")
