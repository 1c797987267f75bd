"""A trainer that compares a model with its reference, the model that training begins with.

Rows become trees of tokens, so what answers share is computed once, by the model and by its reference. What is learned
of their log-probabilities is in `train.dpo` and `train.kto`.
"""

import logging
from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from tunesmith.data.batches import Batch, FlatCollator, PaddedCollator, Row, documents_of
from tunesmith.data.dataset import DataPreparer
from tunesmith.data.formats import Task
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model
from tunesmith.model.head import in_evaluation
from tunesmith.objectives.logprobs import TokenLogProbs, token_logprobs
from tunesmith.settings.config import Config
from tunesmith.settings.preference import PreferenceConfig
from tunesmith.train.loaders import Batching
from tunesmith.train.reference import (
    AsItIs,
    GivenModel,
    Reference,
    check_sharded,
    given_reference,
    kept_reference,
    reference_of,
    starts_as_base,
    weights_digest,
    with_reference,
)
from tunesmith.train.rows import Given, RowsTrainer, Sources, TrainSource
from tunesmith.train.selftest import EXACT, ROUNDED
from tunesmith.train.setup import as_config, checked_model, faster_layers, given_model, ready_for_batches
from tunesmith.train.together import in_turn
from tunesmith.types import Example

logger = logging.getLogger(__name__)
BY_TOKEN = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
"""Logged as means over tokens of answers."""
CHECKED_PAIRS = 4
"""So many pairs must be to the model before the first step what they are to its reference."""
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


class PreferenceTrainer(RowsTrainer):
    """What trainers share that compare a model with its reference. The arguments are those of TRL's trainers.

    The reference is the model as training begins with it, adapters that are trained further among it, unless
    `ref_model` is given.
    """

    config: ClassVar[type[PreferenceConfig]]
    task: ClassVar[Task]
    """What rows are read as."""
    read: ClassVar[Any]
    """A function: groups of documents of a prepared row."""
    _until_training: Reference | None = None
    """The reference whose answers the rows have: it is there until the first step changes the model."""

    def __init__(
        self,
        model: str | Model | None = None,
        ref_model: str | Model | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: TrainSource | None = None,
        eval_dataset: Sources | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        for name, value in (("data_collator", data_collator), ("compute_metrics", compute_metrics)):
            if value is not None:
                raise TunesmithError(
                    f"{name} is given: pairs are batched and measured by the trainer, without padding and without "
                    "logits; leave it out, and read rewards/accuracies and rewards/margins"
                )
        given = given_model(model)
        if ref_model is not None:
            ref_model = checked_model("ref_model", ref_model)
        args = as_config(args, given, self.config)
        self.take_settings(args)
        self._checked = self._begins_as_reference = False
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
            partial(DataPreparer, formatting_func=None, task=self.task),
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.reference = self._found_reference(cast(Model, self.model), ref_model)

    # What another one says

    def take_settings(self, args: Any) -> None:
        """Take what is needed of a checked config. Raises TunesmithError for what contradicts."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the reference."""
        return True

    @property
    def over_the_batch(self) -> bool:
        """Whether the loss compares the documents of a micro-batch, which is not divided then."""
        return False

    @property
    def ref_model(self) -> Model | None:
        """The reference where it is a model of its own; None where it is the one that is trained, as it began."""
        return self.reference.model if isinstance(self.reference, GivenModel) else None

    # Batches

    def batching(self, model: Model, args: Any, tokenizer: PreTrainedTokenizerBase, *, sized: bool) -> Batching:
        """Batches of documents that share their prompts; the model's forward is prepared for them."""
        if args.disable_dropout:
            without_dropout(model)
        flat = ready_for_batches(model, flat=args.padding_free, routers=bool(self.router_coefficient))
        faster_layers(model, args)
        return batches_of(type(self).read, args, tokenizer, flat=flat, together=self.over_the_batch)

    # The reference

    def _found_reference(self, model: Model, given: str | Model | None) -> Reference | None:
        """Where the reference is; None where the losses need none, or rows have what it says."""
        args = cast(PreferenceConfig, self.args)
        if not self.needs_reference:
            if given is not None:
                raise TunesmithError("ref_model is given, and the loss_type compares with none; leave it out")
            return None
        reference: Reference
        self._begins_as_reference = given is None
        if given is not None:
            reference = given_reference(given, model, args, flat=not self.loaders.batching.padded)
        elif args.precompute_ref_log_probs:
            reference = AsItIs()
        else:
            if not starts_as_base(model):
                check_sharded(args)
            reference = reference_of(model)
        if args.precompute_ref_log_probs:
            self._compute_before(model, reference)
            self._until_training = reference
            return None
        return reference

    def _compute_before(self, model: Model, reference: Reference) -> None:
        """Give all rows what the reference says of their tokens."""
        args = cast(PreferenceConfig, self.args)
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        scored = reference.model if isinstance(reference, GivenModel) else model
        key = [weights_digest(scored), str(args.precision)]

        def completed(dataset: Any, split: str) -> Any:
            if not isinstance(dataset, Dataset):
                raise TunesmithError(
                    f"{split} data: precompute_ref_log_probs reads all rows before training, and a stream has no end; "
                    "load the data, or leave it out"
                )
            with in_turn(args):
                dataset = with_reference(dataset, key, size, partial(self._scores_of, reference))
            self.data.adopt(dataset)
            return dataset

        self.train_dataset = completed(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: completed(rows, name) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = completed(self.eval_dataset, "eval")

    def _scores_of(self, reference: Reference, rows: list[Row]) -> list[Tensor]:
        """The log-probabilities of the scored tokens of each document of some rows."""
        batch = cast(Any, self.loaders.batching.collator)(rows).to(self.args.device)
        return batch.by_document(self.reference_logprobs(cast(nn.Module, self.model), batch, reference))

    def reference_logprobs(self, model: nn.Module, batch: Batch, reference: Reference) -> Tensor:
        """(S,) What the reference says of the scored tokens of a batch."""
        with torch.no_grad(), reference.acting(model) as acting, self.accelerator.autocast():
            answer = self.predict_targets(acting, batch, batch.targets(), token_logprobs)
        scored: TokenLogProbs = answer.outcome
        return scored.logprobs

    def by_reference(self, model: nn.Module, batch: Batch) -> list[Tensor] | None:
        """Of each document, what the reference says of its scored tokens; None where no loss asks."""
        if not self.needs_reference:
            return None
        kept = kept_reference(batch)
        if kept is not None:
            return [values.to(batch.input_ids.device) for values in kept]
        reference = self.reference or self._until_training
        if reference is None:
            raise TunesmithError(
                "precompute_ref_log_probs: these rows were not there when the reference was computed, and it is gone; "
                "give them to the trainer as eval_dataset"
            )
        return batch.by_document(self.reference_logprobs(model, batch, reference))

    # A run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `BaseTrainer`; before the first step, the model must be what its reference is."""
        self._share_out()
        if not (resume_from_checkpoint or self._checked):
            self._check_start()
        self._checked, self._until_training = True, None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_start(self) -> None:
        """Raises TunesmithError where the rewards of the first pairs are not 0 within rounding before any step: the
        reference would be another model than the one that training begins with."""
        dataset = self.train_dataset
        if not self._begins_as_reference or not isinstance(dataset, Dataset):
            return
        if self.is_deepspeed_enabled:  # which has no whole weights yet
            return
        columns = [name for name in dataset.column_names if name in self.loaders.batching.columns]
        rows = list(islice(dataset.select_columns(columns).with_format(None), CHECKED_PAIRS))
        groups = [*chain.from_iterable(type(self).read(row) for row in rows)][:CHECKED_PAIRS]
        batch = cast(Any, self.loaders.batching.collator).batch(groups).to(self.args.device)
        model = cast(nn.Module, self.model)
        with in_evaluation(model), torch.no_grad():
            own = self.reference_logprobs(model, batch, AsItIs())
            theirs = self.by_reference(model, batch)
        assert theirs is not None
        difference = (own - torch.cat(theirs)).abs()
        tolerance = EXACT if cast(PreferenceConfig, self.args).precision == "fp32" else ROUNDED
        if not difference.mean() <= tolerance.mean:
            raise TunesmithError(
                f"before the first step, the model and its reference differ by {float(difference.mean()):.4f} nats a "
                f"token (at most {tolerance.mean:g} is rounding), so that rewards would not begin at 0. Give the model "
                "that the reference is to be as ref_model, or leave precompute_ref_log_probs out"
            )

    def predict(self, *_: Any, **__: Any) -> Any:
        raise TunesmithError("a pair has no prediction to return; evaluate(dataset) measures rewards and accuracies")


# Ready for pairs


def batches_of(
    read: Any, args: Config, tokenizer: PreTrainedTokenizerBase, *, flat: bool, together: bool = False
) -> Batching:
    """Batches of the groups that `read` makes of a row, flat or padded. `together`: a micro-batch is one group."""
    pad, multiple = cast(int, tokenizer.pad_token_id), int(args.pad_to_multiple_of or 1)
    padded = PaddedCollator(read=read, together=together, pad_token_id=pad, multiple=multiple)
    shares, strategy = args.share_prefix == "auto", args.train_sampling_strategy
    if strategy == "group_by_prefix" and not flat:
        raise TunesmithError(
            "train_sampling_strategy: group_by_prefix puts rows that begin alike into one batch, which computes "
            "once what they share, but batches are padded here; write random"
        )
    return Batching(
        collator=FlatCollator(read=read, together=together, share_prefix=shares) if flat else padded,
        by_row=PaddedCollator(read=documents_of, pad_token_id=pad, multiple=multiple),
        grouped="length" if strategy == "group_by_length" else "prefix" if strategy == "group_by_prefix" else None,
    )


def document_weight(example: Example) -> float:
    """The weight of a document's row; 0 where nothing is scored, as in rows that even out processes."""
    if not example.target_count:
        return 0.0
    return 1.0 if example.weights is None else example.weights[-1]


def token_sums(
    scored: TokenLogProbs, batch: Batch, better: Sequence[int], worse: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What is logged by token, in sums with the numbers of tokens that they are over: the mean logit of the answers
    `better` and `worse`, documents of the batch, the entropy of all, and the accuracy of the better ones."""
    assert scored.mean_logit is not None
    logits, entropies, correct = (
        batch.by_document(values) for values in (scored.mean_logit, scored.entropy, scored.correct)
    )
    zero = scored.entropy.new_zeros(())
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, values, documents in (
        ("logits/chosen", logits, better),
        ("logits/rejected", logits, worse),
        ("entropy", entropies, [*better, *worse]),
        ("mean_token_accuracy", correct, better),
    ):
        sums[name] = sum((values[i].sum() for i in documents), zero)
        counts[name] = sum(len(values[i]) for i in documents)
    return sums, counts


def without_dropout(model: nn.Module) -> None:
    """Switch off all dropout: noise that is not the same for the model and its reference."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
