"""From what a user gives to a trainer of it: rows prepared and checked, and a model made ready for their batches."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, set_seed

from tunesmith.data.dataset import DataPreparer, Source
from tunesmith.data.mixture import DataSource
from tunesmith.data.prompts import remember
from tunesmith.data.samplers import check_fit
from tunesmith.model.adapters import Model, StartingPoint, starting_point
from tunesmith.model.load import prepare_tokenizer
from tunesmith.settings.config import Config
from tunesmith.train.evaluations import check_data
from tunesmith.train.loaders import Batching
from tunesmith.train.setup import (
    ModelSetup,
    Vocabulary,
    align_tokens,
    check_data_given,
    prepare_model,
    router_coefficient,
    used_ids,
)
from tunesmith.train.together import in_turn
from tunesmith.train.trainer import BaseTrainer
from tunesmith.types import Row

Sources: TypeAlias = Source | Mapping[str, Source]
TrainSource: TypeAlias = Source | Mapping[str, Source | DataSource]


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What a trainer is given to train, and on what: the arguments of its constructor that all trainers have, with
    `args` checked (`setup.as_config`) and a `model` that is there (`setup.given_model`)."""

    model: str | Model
    args: Config
    train_dataset: TrainSource | None = None
    eval_dataset: Sources | None = None
    processing_class: PreTrainedTokenizerBase | None = None
    quantization_config: Any = None
    peft_config: PeftConfig | None = None


class RowsTrainer(BaseTrainer):
    """What trainers with a `DataPreparer` share. Another one says how a ready model gets its batches (`batching`).

    `preparer` makes the `DataPreparer` of settings and a tokenizer. `by_row`: evaluations want logits row by row.
    `arguments` are those of `BaseTrainer` and of `transformers.Trainer`.

    The data is prepared and checked before any weight is loaded. Raises TunesmithError for what would train wrongly.
    """

    data: DataPreparer
    _tag_names: tuple[str, ...] = ("tunesmith",)
    classifier: ClassVar[bool] = False
    """Whether the model is a sequence classifier, and no language model."""
    router_coefficient = 0.0
    """What the load-balancing loss of a mixture of experts is multiplied by."""

    def __init__(
        self,
        given: Given,
        preparer: Callable[[Config, PreTrainedTokenizerBase], DataPreparer],
        *,
        by_row: bool = False,
        **arguments: Any,
    ) -> None:
        args = given.args
        check_data_given(args, given.train_dataset)
        tokenizer, added = prepare_tokenizer(given.processing_class, given.model, args)
        data = preparer(args, tokenizer)
        with in_turn(args):
            train, evaluated = data.everything(given.train_dataset, given.eval_dataset, by_row=by_row)
        remember(tokenizer, data.form)
        preflight = data.preflight()
        preflight.stop_on_problems()
        check_data(args, evaluated)
        data.save_skipped()
        check_fit(args, train, None if by_row else evaluated)
        for dataset in (train, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])):
            self.check_rows(dataset)

        vocabulary = Vocabulary(
            tokenizer=tokenizer, added=added, used=used_ids(train, evaluated), given=given.processing_class is not None
        )
        self._setup = ModelSetup(
            args=args,
            vocabulary=vocabulary,
            ends=frozenset(data.stops),
            classifier=self.classifier,
            peft_config=given.peft_config,
            quantization_config=given.quantization_config,
        )
        set_seed(args.seed)  # adapters start from random numbers
        model, start, batching = self.ready(given.model, sized=isinstance(train, Dataset))
        if self.router_coefficient:
            self.means = (*self.means, "aux_loss")
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
            **arguments,
        )
        model.add_model_tags(list(self._tag_names))

    # What another one says

    def check_rows(self, dataset: Any) -> None:
        """Raises TunesmithError for prepared rows that can't be used, or have what would be ignored. `dataset` is what
        is trained on or evaluated on, or None."""

    def batching(self, model: Model, args: Config, tokenizer: PreTrainedTokenizerBase, *, sized: bool) -> Batching:
        """How rows become batches of the prepared `model`, whose forward is made ready for them. `sized`: the training
        data is no stream."""
        raise NotImplementedError(f"{type(self).__name__} must define batching")

    def balancing(self, model: Model, args: Config) -> float:
        """What the load-balancing loss of a mixture of experts is multiplied by; 0 where it is not trained."""
        return router_coefficient(model, args)

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the load-balancing loss of a mixture of experts is trained."""
        return bool(self.router_coefficient)

    # A model

    def ready(self, model: str | Model, *, sized: bool) -> tuple[Model, StartingPoint | None, Batching]:
        """`model` with its adapters, ready for its batches, and in agreement with the tokenizer."""
        setup, tokenizer = self._setup, self._setup.vocabulary.tokenizer
        model = prepare_model(model, setup)
        start = starting_point(model)
        self.router_coefficient = self.balancing(model, setup.args)
        batching = self.batching(model, setup.args, tokenizer, sized=sized)
        align_tokens(model, tokenizer, setup.ends)
        return model, start, batching

    # Rows

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

    def first_rows(self) -> Iterator[Row]:
        """Some of the rows that were given, as they were understood; those held out first."""
        return self.data.first_rows()
