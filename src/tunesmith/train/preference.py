"""Direct preference optimization and its kin: two answers to one prompt, of which the better one is to become likelier.

A row is a pair, a tree of its prompt and two answers, so the prompt is computed once, by the model and by its
reference. The loss is a function of the log-probabilities of the answers' tokens (`objectives.preference`). It is a sum
over pairs by weight, divided by the weight of the whole step.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from tunesmith.data.batches import Batch, FlatCollator, PaddedCollator, Row, documents_of, pairs_of
from tunesmith.data.dataset import DataPreparer, Source
from tunesmith.data.mixture import DataSource
from tunesmith.data.prompts import remember
from tunesmith.data.samplers import check_fit
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model, starting_point
from tunesmith.model.head import in_evaluation
from tunesmith.objectives.logprobs import TokenLogProbs, token_logprobs
from tunesmith.objectives.preference import (
    OVER_THE_BATCH,
    TAKE_MARGIN,
    PreferenceOptions,
    check_options,
    pair_weights,
    pairs_of_tokens,
    preference_loss,
)
from tunesmith.settings.preference import DPOConfig
from tunesmith.train.evaluations import check_data
from tunesmith.train.loaders import Batching
from tunesmith.train.meter import BatchLoss
from tunesmith.train.reference import (
    AsItIs,
    GivenModel,
    Reference,
    check_sharded,
    kept_reference,
    reference_of,
    starts_as_base,
    weights_digest,
    with_reference,
)
from tunesmith.train.rows import RowsTrainer, Sources
from tunesmith.train.selftest import EXACT, ROUNDED
from tunesmith.train.setup import (
    Vocabulary,
    align_tokens,
    as_config,
    check_data_given,
    faster_layers,
    given_model,
    prepare_model,
    prepare_tokenizer,
    ready_for_batches,
    router_coefficient,
    used_ids,
)
from tunesmith.types import Example

logger = logging.getLogger(__name__)
CHECKED_PAIRS = 4
"""So many pairs must be to the model before the first step what they are to its reference."""
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


class DPOTrainer(RowsTrainer):
    """Preference optimization on pairs of answers, with the arguments of TRL's trainer of the same name.

    `model` is a name, a folder, "demo", or a loaded causal language model, with or without adapters. The reference is
    the model as training begins with it, adapters that are trained further among it, unless `ref_model` is given. Rows
    have `prompt`, `chosen` and `rejected`, or two whole conversations; see `docs/preferences.md`. Afterwards
    `trainer.train_dataset` holds a tree of tokens for each pair.

    Raises TunesmithError for what would train wrongly, before any weight is loaded where it shows in the data.
    """

    _tag_names = ("tunesmith", "dpo")
    kind = "dpo"
    means: tuple[str, ...] = (
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected"),
    )

    def __init__(
        self,
        model: str | Model | None = None,
        ref_model: str | Model | None = None,
        args: DPOConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Source | Mapping[str, Source | DataSource] | None = None,
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
        args = as_config(args, given, DPOConfig)
        self.options = _options(args)
        check_options(self.options)
        check_data_given(args, train_dataset)
        tokenizer, added = prepare_tokenizer(processing_class, given, args)
        data = DataPreparer(args, tokenizer, None, task="pairs")
        train, evaluated = data.everything(train_dataset, eval_dataset)
        remember(tokenizer, data.form)
        preflight = data.preflight()
        preflight.stop_on_problems()
        check_data(args, evaluated)
        data.save_skipped()
        check_fit(args, train, evaluated)
        for dataset in (train, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])):
            _check_margins(dataset, self.options)

        vocabulary = Vocabulary(
            tokenizer=tokenizer, added=added, used=used_ids(train, evaluated), given=processing_class is not None
        )
        set_seed(args.seed)  # adapters start from random numbers
        model = prepare_model(given, args, peft_config, quantization_config, vocabulary)
        start = starting_point(model)
        self.router_coefficient = router_coefficient(model, args)
        batching = _batching(model, args, tokenizer, self.options, routers=bool(self.router_coefficient))
        align_tokens(model, tokenizer, data.stops)
        if args.disable_dropout:
            without_dropout(model)
        if self.router_coefficient:
            self.means = (*self.means, "aux_loss")
        self._checked = self._begins_as_reference = False
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
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        model.add_model_tags(list(self._tag_names))
        self.reference = self._found_reference(model, ref_model)

    # The reference

    def _found_reference(self, model: Model, given: str | Model | None) -> Reference | None:
        """Where the reference is; None where the losses need none, or rows have what it says."""
        args = cast(DPOConfig, self.args)
        if not self.options.needs_reference:
            if given is not None:
                names = ", ".join(name for name, _ in self.options.losses)
                raise TunesmithError(f"ref_model is given, and loss_type: {names} compares with none; leave it out")
            return None
        reference: Reference
        self._begins_as_reference = given is None
        if given is not None:
            if given is model:
                raise TunesmithError("ref_model is the model that is trained, and would change with it; leave it out")
            reference = GivenModel(self._prepared_reference(given))
        elif args.precompute_ref_log_probs:
            reference = AsItIs()
        else:
            if not starts_as_base(model):
                check_sharded(args)
            reference = reference_of(model)
        if args.precompute_ref_log_probs:
            self._compute_before(model, reference)
            return None
        return reference

    def _prepared_reference(self, given: str | Model) -> Model:
        """A model of the user's, loaded, and ready for the batches of the one that is trained."""
        args = cast(DPOConfig, self.args)
        if isinstance(given, str):
            from tunesmith.model.load import holds_adapters, load_adapted, load_model

            load: Callable[..., Model] = load_adapted if holds_adapters(given) else load_model
            init = {name: value for name, value in dict(args.model_init_kwargs or {}).items() if name == "dtype"}  # type: ignore[arg-type]
            given = load(given, trust_remote_code=args.trust_remote_code, allow_pickle=args.allow_pickle, **init)
        flat = not self.loaders.batching.padded
        if ready_for_batches(given, flat=flat) != flat:
            raise TunesmithError("ref_model can't take batches without padding; write padding_free: false")
        return given.to(args.device)  # type: ignore[arg-type]

    def _compute_before(self, model: Model, reference: Reference) -> None:
        """Give all rows what the reference says of their tokens."""
        args = cast(DPOConfig, self.args)
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        scored = reference.model if isinstance(reference, GivenModel) else model
        key = [weights_digest(scored), str(args.precision)]

        def completed(dataset: Any, split: str) -> Any:
            if not isinstance(dataset, Dataset):
                raise TunesmithError(
                    f"{split} data: precompute_ref_log_probs reads all rows before training, and a stream has no end; "
                    "load the data, or leave it out"
                )
            with args.main_process_first(desc="reference log-probabilities"):
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
        return batch.by_document(self._reference_logprobs(cast(nn.Module, self.model), batch, reference))

    def _reference_logprobs(self, model: nn.Module, batch: Batch, reference: Reference) -> Tensor:
        """(S,) What the reference says of the scored tokens of a batch."""
        with torch.no_grad(), reference.acting(model) as acting, self.accelerator.autocast():
            answer = self.predict_targets(acting, batch, batch.targets(), token_logprobs)
        scored: TokenLogProbs = answer.outcome
        return scored.logprobs

    def _by_reference(self, model: nn.Module, batch: Batch) -> list[Tensor] | None:
        """Of each document, what the reference says of its scored tokens; None where no loss asks."""
        if not self.options.needs_reference:
            return None
        kept = kept_reference(batch)
        if kept is not None:
            return [values.to(batch.input_ids.device) for values in kept]
        if self.reference is None:
            raise TunesmithError(
                "precompute_ref_log_probs: these rows were not there when the reference was computed, and it is gone; "
                "give them to the trainer as eval_dataset"
            )
        return batch.by_document(self._reference_logprobs(model, batch, self.reference))

    # A step

    def batch_loss(self, model: nn.Module, batch: Batch, *, with_outputs: bool = False) -> BatchLoss:
        """The losses of the pairs, times their weights."""
        reference = self._by_reference(model, batch)
        objective = partial(token_logprobs, with_collision=self.options.weighting)
        answer = self.predict_targets(model, batch, batch.targets(), objective, with_outputs=with_outputs)
        scored: TokenLogProbs = answer.outcome
        documents, weights = batch.documents, _weights(batch)
        assert documents, "a batch of pairs knows its documents"
        real = [i for i in range(len(documents)) if weights[i // 2] > 0]
        if not real:  # rows that only even out processes; what is 0 keeps its graph
            zeros = dict.fromkeys(self.means, torch.zeros((), device=scored.logprobs.device))
            return BatchLoss(loss=scored.logprobs.sum() * 0, count=0, sums=zeros, outputs=answer.outputs)

        def chosen(values: Tensor) -> list[Tensor]:
            listed = batch.by_document(values)
            return [listed[i] for i in real]

        own = chosen(scored.logprobs)
        pairs = pairs_of_tokens(own, reference and [reference[i] for i in real], self.options.ld_alpha)
        margin = torch.tensor([documents[i].score for i in real[::2]], device=scored.logprobs.device)
        losses = preference_loss(pairs, self.options, margin)
        if scored.collision is not None:
            losses = losses * pair_weights(own, chosen(scored.collision))
        factors = torch.tensor([weights[i // 2] for i in real[::2]], device=losses.device)
        loss = (losses * factors).sum()
        with torch.no_grad():
            better, worse = (self.options.beta * ratio for ratio in (pairs.chosen_ratio, pairs.rejected_ratio))
            sums = {
                "rewards/chosen": better.sum(),
                "rewards/rejected": worse.sum(),
                "rewards/accuracies": (better > worse).sum(),
                "rewards/margins": (better - worse).sum(),
                "logps/chosen": pairs.chosen.sum(),
                "logps/rejected": pairs.rejected.sum(),
            }
        if answer.router_loss is not None:
            sums["aux_loss"] = answer.router_loss.detach() * len(margin)
            if model.training:
                loss = loss + self.router_coefficient * self.batch_weight(batch) * answer.router_loss
        return BatchLoss(loss=loss, count=len(margin), sums=sums, nll=-scored.logprobs.detach(), outputs=answer.outputs)

    def batch_weight(self, batch: Batch) -> Tensor:
        """The weight of its pairs: their number, where none has a weight of its own."""
        return torch.tensor(sum(_weights(batch)), device=batch.input_ids.device)

    # A run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `BaseTrainer`; before the first step, the model must be what its reference is."""
        if not (resume_from_checkpoint or self._checked):
            self._check_start()
        self._checked = True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_start(self) -> None:
        """Raises TunesmithError where the rewards of the first pairs are not 0 within rounding before any step: the
        reference would be another model than the one that training begins with."""
        dataset = self.train_dataset
        if not self._begins_as_reference or not isinstance(dataset, Dataset):
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # which have no whole weights yet
            return
        columns = [name for name in dataset.column_names if name in self.loaders.batching.columns]
        rows = list(islice(dataset.select_columns(columns).with_format(None), CHECKED_PAIRS))
        groups = [*chain.from_iterable(pairs_of(row) for row in rows)][:CHECKED_PAIRS]
        batch = cast(Any, self.loaders.batching.collator).batch(groups).to(self.args.device)
        model = cast(nn.Module, self.model)
        with in_evaluation(model), torch.no_grad():
            own = self._reference_logprobs(model, batch, AsItIs())
            theirs = self._by_reference(model, batch)
        assert theirs is not None
        difference = (own - torch.cat(theirs)).abs()
        tolerance = EXACT if cast(DPOConfig, self.args).precision == "fp32" else ROUNDED
        if not difference.mean() <= tolerance.mean:
            raise TunesmithError(
                f"before the first step, the model and its reference differ by {float(difference.mean()):.4f} nats a "
                f"token (at most {tolerance.mean:g} is rounding), so that rewards would not begin at 0. Give the model "
                "that the reference is to be as ref_model, or leave precompute_ref_log_probs out"
            )

    def predict(self, *_: Any, **__: Any) -> Any:
        raise TunesmithError("a pair has no prediction to return; evaluate(dataset) measures rewards and accuracies")


# Ready for pairs


def _options(args: DPOConfig) -> PreferenceOptions:
    return PreferenceOptions(
        losses=args.losses,
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        divergence=cast(Any, args.f_divergence_type),
        divergence_alpha=args.f_alpha_divergence_coef,
        ld_alpha=args.ld_alpha,
        weighting=args.use_weighting,
        reference_free=args.reference_free,
        discopop_tau=args.discopop_tau,
        simpo_gamma=args.simpo_gamma,
        cpo_alpha=args.cpo_alpha,
    )


def _check_margins(dataset: Any, options: PreferenceOptions) -> None:
    """Raises TunesmithError for margins that a loss would ignore."""
    ignoring = [name for name, _ in options.losses if name not in TAKE_MARGIN]
    if isinstance(dataset, Dataset) and "scores" in dataset.column_names and ignoring:
        raise TunesmithError(
            f"rows have a 'margin', which loss_type: {ignoring[0]} does not know; take the column out of the data, or "
            f"take one of {', '.join(sorted(TAKE_MARGIN - {'sft'}))}"
        )


def _batching(
    model: Model, args: DPOConfig, tokenizer: PreTrainedTokenizerBase, options: PreferenceOptions, *, routers: bool
) -> Batching:
    """Batches of pairs, which share their prompts; the model's forward is prepared for them."""
    together = any(name in OVER_THE_BATCH for name, _ in options.losses)
    flat = ready_for_batches(model, flat=args.padding_free, routers=routers)
    faster_layers(model, args)
    pad, multiple = cast(int, tokenizer.pad_token_id), int(args.pad_to_multiple_of or 1)
    padded = PaddedCollator(read=pairs_of, together=together, pad_token_id=pad, multiple=multiple)
    shares = args.share_prefix == "auto"
    return Batching(
        collator=FlatCollator(read=pairs_of, together=together, share_prefix=shares) if flat else padded,
        by_row=PaddedCollator(read=documents_of, pad_token_id=pad, multiple=multiple),
        grouped=args.train_sampling_strategy == "group_by_length",
    )


def without_dropout(model: nn.Module) -> None:
    """Switch off all dropout: noise that is not the same for the model and its reference."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _weights(batch: Batch) -> list[float]:
    """The weight of each pair of a batch; 0 where nothing is scored, as in rows that even out processes."""
    return [_weight(example) for example in batch.documents[::2]]


def _weight(example: Example) -> float:
    if not example.target_count:
        return 0.0
    return 1.0 if example.weights is None else example.weights[-1]
