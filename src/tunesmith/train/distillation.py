"""Distillation: a student learns to predict what its teacher predicts.

The answers that both read are those of the data, or are written in training: by the student, which learns from what the
teacher thinks of its own mistakes (generalized knowledge distillation, Agarwal et al. 2023, arXiv:2306.13649), or by
the teacher. All answers of a step are written before it, in one batch that stays full. The loss is
`objectives.distillation`, a sum over tokens that is divided by the weight of the whole step.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from tunesmith.data.batches import Batch, Collator, Targets
from tunesmith.data.dataset import Source
from tunesmith.data.mixture import DataSource
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model
from tunesmith.model.generate import Sampling, answer_ids
from tunesmith.model.head import in_evaluation
from tunesmith.objectives.distillation import (
    DistillationOptions,
    Distilled,
    Teacher,
    TopLogProbs,
    distillation_loss,
    first_tokens,
    top_logprobs,
)
from tunesmith.runs.states import kept_random_states
from tunesmith.settings.config import SFTConfig
from tunesmith.settings.distillation import DistillationConfig, GKDConfig
from tunesmith.train.meter import BatchLoss
from tunesmith.train.overrides import overridden
from tunesmith.train.preference import without_dropout
from tunesmith.train.reference import weights_digest
from tunesmith.train.rows import Sources
from tunesmith.train.setup import checked_model
from tunesmith.train.sft import SFTTrainer
from tunesmith.train.teacher import (
    KeptTeacher,
    check_vocabulary,
    loaded_teacher,
    predictions_of,
    ready_teacher,
    rows_of,
)
from tunesmith.train.together import in_turn
from tunesmith.train.trainer import BaseTrainer
from tunesmith.types import IGNORE_INDEX, Example

LOOKED_AT = 8
"""Rows whose prompts are looked at before training."""
ABOUT_ANSWERS = ("completions/mean_length", "completions/clipped_ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Written(Example):
    """A prompt with an answer that was written in training. `ended`: whoever wrote it ended it."""

    ended: bool


class DistillationTrainer(SFTTrainer):
    """Distillation with the arguments of TRL's trainer of the same name.

    `model` is the student, as for `SFTTrainer`; `teacher_model` a name, a folder, or a loaded model, whose tokens have
    the student's ids. Rows are those of `SFTTrainer`: prompts with answers. Which answers are learned, and by which
    divergence, `args` says; see `docs/distillation.md`. An evaluation takes the answers of the data.

    Raises TunesmithError for what would train wrongly.
    """

    _tag_names = ("tunesmith", "distillation")
    kind = "distill"
    means: tuple[str, ...] = ("divergence", "nll", "entropy", "mean_token_accuracy", *ABOUT_ANSWERS)
    counted = ABOUT_ANSWERS
    config: ClassVar[type[SFTConfig]] = DistillationConfig

    def __init__(
        self,
        model: str | Model | None = None,
        teacher_model: str | Model | None = None,
        args: DistillationConfig | TrainingArguments | None = None,
        train_dataset: Source | Mapping[str, Source | DataSource] | None = None,
        eval_dataset: Sources | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], Any] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        given = _given_teacher(teacher_model, model, args)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        settings = self.settings
        self.options = DistillationOptions(
            beta=settings.beta, temperature=settings.loss_temperature, supervised=settings.supervised_weight
        )
        if settings.writes_answers:
            self._check_prompts()
        student, tokenizer = cast(Model, self.model), cast(PreTrainedTokenizerBase, self.processing_class)
        check_vocabulary(given, student, tokenizer, settings, self._setup.vocabulary.used)
        if settings.disable_dropout:
            without_dropout(student)
        flat = not self.loaders.batching.padded
        self.teacher: Model | None = ready_teacher(loaded_teacher(given, settings), settings, flat=flat)
        self._kept: KeptTeacher | None = None
        if settings.teacher_top_k is not None:
            self._kept = self._asked_before(settings.teacher_top_k)
            self.teacher = None

    @property
    def settings(self) -> DistillationConfig:
        return cast(DistillationConfig, self.args)

    # The teacher

    def _asked_before(self, count: int) -> KeptTeacher:
        """What the teacher says of all rows, computed or in the cache."""
        args, teacher, kept = self.settings, cast(Model, self.teacher), KeptTeacher(count)
        common = min(rows_of(cast(Model, self.model)), rows_of(teacher))
        if count >= common:
            raise TunesmithError(
                f"teacher_top_k is {count}, and the vocabulary has {common} tokens; write fewer, or leave it out"
            )
        key = [weights_digest(teacher), str(args.precision), self.options.temperature, common]

        def score(batch: Batch) -> TopLogProbs:
            batch = batch.to(args.device)
            with torch.no_grad(), self.accelerator.autocast():
                said = first_tokens(predictions_of(teacher, batch, batch.targets()), common)
                return top_logprobs(said, count, self.options.temperature)

        several = isinstance(self.eval_dataset, dict)
        evaluated: dict[str, Any] = cast(Any, self.eval_dataset) if several else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **evaluated}.items():
            if dataset is None:
                continue
            if not isinstance(dataset, Dataset):
                raise TunesmithError(
                    f"{name} data: teacher_top_k reads all rows before training, and a stream has no end; load the "
                    "data, or leave it out"
                )
            with in_turn(args):
                kept.add(dataset, key, self._collator, args.per_device_eval_batch_size, score)
        return kept

    def _says(self, batch: Batch, targets: Targets) -> Teacher:
        """What the teacher says at the targets of a batch."""
        if self._kept is None:
            with torch.no_grad(), self.accelerator.autocast():
                return predictions_of(cast(Model, self.teacher), batch, targets)
        if (said := self._kept.of(batch)) is None:
            raise TunesmithError(
                "teacher_top_k: these rows were not there when the teacher was asked, and it is gone; give them to the "
                "trainer as eval_dataset"
            )
        return said

    # The loss

    def batch_loss(self, model: nn.Module, batch: Batch, *, with_outputs: bool = False) -> BatchLoss:
        """The divergence from the teacher at the supervised tokens, mixed with their cross-entropy, times their
        weights."""
        targets, documents = batch.targets(), batch.documents
        written = [document for document in documents if isinstance(document, Written)]
        imitated = None
        if written and self.options.supervised:
            flags = torch.tensor([isinstance(document, Written) for document in documents])
            imitated = flags.repeat_interleave(torch.tensor([document.target_count for document in documents]))
        objective = partial(
            distillation_loss, teacher=self._says(batch, targets), options=self.options, imitated=imitated
        )
        answer = self.predict_targets(model, batch, targets, objective, with_outputs=with_outputs)
        found: Distilled = answer.outcome
        loss, device = found.loss, found.loss.device
        sums: dict[str, Tensor] = {
            "divergence": found.divergence.sum(),
            "nll": found.nll.sum(),
            "entropy": found.entropy.sum(),
            "mean_token_accuracy": found.correct.sum(),
            "completions/mean_length": torch.tensor(sum(one.target_count for one in written), device=device),
            "completions/clipped_ratio": torch.tensor(sum(not one.ended for one in written), device=device),
        }
        if answer.router_loss is not None:
            sums["aux_loss"] = answer.router_loss.detach() * len(targets.tokens)
            if model.training:
                loss = loss + self.router_coefficient * self.batch_weight(batch) * answer.router_loss
        return BatchLoss(
            loss=loss,
            count=len(targets.tokens),
            sums=sums,
            counts=dict.fromkeys(ABOUT_ANSWERS, len(written)),
            nll=found.divergence,  # how far each example is from its teacher
            outputs=answer.outputs,
        )

    # Answers that are written

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As in `BaseTrainer`; answers that are written take the places of those of the data, and the step is divided
        by the weight of what it has then."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if not self.settings.writes_answers:
            return batches, items
        batches = self._with_answers(batches)
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def _with_answers(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches of a step with answers of the student and the teacher, drawn by numbers that follow from
        `seed`, the step and the process: a run that is resumed draws the same."""
        settings, key = self.settings, f"{self.args.seed} {self.args.process_index} {self.state.global_step}"
        numbers = random.Random(key)
        asked: dict[str, list[Example]] = {"student": [], "teacher": []}
        for document in chain.from_iterable(batch.documents for batch in batches if not batch.blank):
            if document.target_count:
                own = numbers.random() < settings.lmbda
                if own or settings.seq_kd:
                    asked["student" if own else "teacher"].append(document)
        found: dict[int, Written] = {}
        with kept_random_states(self.args.device):
            torch.manual_seed(numbers.getrandbits(63))
            for name, documents in asked.items():
                if documents:
                    writer = cast(Model, self.model if name == "student" else self.teacher)
                    found |= self._written(writer, documents)
        return [self._replaced(batch, found) for batch in batches]

    def _written(self, writer: Model, documents: Sequence[Example]) -> dict[int, Written]:
        """The answers of `writer` to the prompts of some documents, by the `id` of each document."""
        prompts = [document.input_ids[: answer_start(document)] for document in documents]
        sampling = Sampling(max_new_tokens=self.settings.max_new_tokens, temperature=self.settings.temperature)
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        with in_evaluation(writer), torch.no_grad(), self.accelerator.autocast():
            answers = list(answer_ids(writer, tokenizer, prompts, sampling))
        found = {}
        for done in answers:
            prompt, document = prompts[done.index], documents[done.index]
            answer = done.ids if done.stop is None else [*done.ids, done.stop]
            weight = None if document.weights is None else document.weights[len(prompt)]
            found[id(document)] = Written(
                input_ids=[*prompt, *answer],
                labels=[IGNORE_INDEX] * len(prompt) + answer,
                weights=None if weight is None else [weight] * (len(prompt) + len(answer)),
                ended=done.ended,
            )
        return found

    def _replaced(self, batch: Batch, found: Mapping[int, Written]) -> Batch:
        if not any(id(document) in found for document in batch.documents):
            return batch
        groups = [tuple(found.get(id(document), document) for document in group) for group in batch.groups]
        made = self._collator.batch(groups).to(batch.input_ids.device)
        return replace(made, blank=batch.blank)

    @property
    def _collator(self) -> Collator:
        return cast(Collator, self.loaders.batching.collator)

    def _check_prompts(self) -> None:
        """Raises TunesmithError where answers can't be written."""
        if names := overridden(type(self), BaseTrainer):
            raise TunesmithError(
                f"{type(self).__name__} overrides {' and '.join(names)}, which gets plain dictionaries, and lmbda and "
                "seq_kd put other answers in their place; override batch_loss, or write lmbda: 0 and seq_kd: false"
            )
        if isinstance(self.train_dataset, Dataset):
            columns = [name for name in self.train_dataset.column_names if name in self.loaders.batching.columns]
            rows = self.train_dataset.select_columns(columns).with_format(None)
            for document in chain.from_iterable(self._collator([row]).documents for row in islice(rows, LOOKED_AT)):
                if document.target_count:
                    answer_start(document)


def answer_start(document: Example) -> int:
    """Where the last answer of a document begins: behind the last token that is not supervised.

    Raises:
        TunesmithError: there is none, so nothing asks for an answer.
    """
    labels = document.labels
    stop = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    start = next(i for i in range(stop, -1, -1) if labels[i] == IGNORE_INDEX) + 1
    if start == 1:
        raise TunesmithError(
            "answers are written to prompts in training (lmbda, seq_kd), and a row has no prompt: all of its tokens "
            "are supervised. Write train_on: assistant for conversations, give rows with prompt and completion, or "
            "write lmbda: 0 and seq_kd: false"
        )
    return start


def _given_teacher(given: Any, student: Any, args: Any) -> str | Model:
    """The teacher, as an argument or in the settings. Raises TunesmithError for none, two, and the student itself."""
    name = getattr(args, "teacher_model_name_or_path", None)
    if given is None and name is None:
        raise TunesmithError(
            "no teacher: write teacher_model_name_or_path, a larger model of the student's family, or give the trainer "
            "a teacher_model"
        )
    if given is not None and name is not None and given != name:
        raise TunesmithError("teacher_model and teacher_model_name_or_path both say who teaches; keep one")
    if given is not None and not isinstance(given, str) and given is student:
        raise TunesmithError("teacher_model is the student itself, which would change with it; give another model")
    return checked_model("teacher_model", name if given is None else given)


class GKDTrainer(DistillationTrainer):
    """`DistillationTrainer` with the arguments and defaults of TRL's experimental `GKDTrainer`."""

    _tag_names = ("tunesmith", "gkd")
    config: ClassVar[type[SFTConfig]] = GKDConfig

    def __init__(
        self,
        model: str | Model | None = None,
        teacher_model: str | Model | None = None,
        args: GKDConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Source | Mapping[str, Source | DataSource] | None = None,
        eval_dataset: Sources | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        if data_collator is not None:
            raise TunesmithError(
                "data_collator is given, and answers are put into batches by the trainer; leave it out"
            )
        super().__init__(
            model,
            teacher_model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks,
            optimizers,
            peft_config=peft_config,
            formatting_func=formatting_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
