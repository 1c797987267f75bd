"""A reward model: a score for an answer to a prompt, learned from pairs of which one answer is better.

The model is a sequence classifier with one output, read at the end of each document (`model.scores`). A row is a pair,
a tree of what its sides begin with alike. The loss is a sum over pairs by weight, divided by the weight of the whole
step (`objectives.preference.bradley_terry_loss`).
"""

import logging
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from tunesmith.data.batches import Batch, pairs_of
from tunesmith.data.dataset import DataPreparer
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model, base_model
from tunesmith.model.scores import answer_scores, check_classifier, scores_of, train_head_in_fp32, why_padded
from tunesmith.objectives.preference import bradley_terry_loss
from tunesmith.settings.config import Config
from tunesmith.settings.preference import RewardConfig
from tunesmith.train.loaders import Batching
from tunesmith.train.meter import BatchLoss, Extreme
from tunesmith.train.preference import batches_of, document_weight, without_dropout
from tunesmith.train.rows import Given, RowsTrainer, Sources, TrainSource
from tunesmith.train.selftest import check_scores
from tunesmith.train.setup import as_config, faster_layers, given_model

logger = logging.getLogger(__name__)


class RewardTrainer(RowsTrainer):
    """A reward model from pairs of answers, with the arguments of TRL's trainer of the same name.

    `model` is a name, a folder or "demo": a causal language model, which gets a new head drawn by `args.seed`, or a
    sequence classifier with one output; or a loaded one of these, with or without adapters. LoRA trains the head whole.
    Rows have `chosen` and `rejected`, with or without `prompt`; see `docs/preferences.md`. What is scored is the whole
    text of a side: messages as the chat template renders them, texts with the end-of-sequence token. Afterwards
    `trainer.train_dataset` holds a tree of tokens for each pair.

    Raises TunesmithError for what would train wrongly, before any weight is loaded where it shows in the data.
    """

    _tag_names = ("tunesmith", "reward-trainer")
    kind = "reward"
    classifier = True
    means: tuple[str, ...] = ("accuracy", "margin", "mean_reward")
    extremes: Mapping[str, Extreme] = MappingProxyType({"min_reward": "min", "max_reward": "max"})

    def __init__(
        self,
        model: str | Model | None = None,
        args: RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: TrainSource | None = None,
        eval_dataset: Sources | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        for name, value in (
            ("data_collator", data_collator),
            ("compute_metrics", compute_metrics),
            ("preprocess_logits_for_metrics", preprocess_logits_for_metrics),
        ):
            if value is not None:
                raise TunesmithError(
                    f"{name} is given: pairs are batched and measured by the trainer, without padding; leave it out, "
                    "and read accuracy and margin"
                )
        given = given_model(model)
        super().__init__(
            Given(
                model=given,
                args=as_config(args, given, RewardConfig),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                quantization_config=quantization_config,
                peft_config=peft_config,
            ),
            partial(DataPreparer, formatting_func=None, task="ranked"),
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )

    def balancing(self, model: Model, args: Config) -> float:
        return 0.0

    def batching(self, model: Model, args: Any, tokenizer: PreTrainedTokenizerBase, *, sized: bool) -> Batching:
        """Batches of pairs that share their prompts; the model's forward is prepared to score them."""
        check_classifier(model)
        train_head_in_fp32(model)
        if args.disable_dropout:
            without_dropout(model)
        reason = why_padded(base_model(model))
        if args.padding_free and reason:
            logger.warning("Batches are padded: %s.", reason)
        flat = args.padding_free and not reason
        if flat:
            answer_scores(base_model(model))
        faster_layers(model, args)
        return batches_of(pairs_of, args, tokenizer, flat=flat)

    def batch_loss(self, model: nn.Module, batch: Batch, *, with_outputs: bool = False) -> BatchLoss:
        """The losses of the pairs, times their weights."""
        scores, documents = scores_of(model, batch), batch.documents
        weights = [document_weight(chosen) for chosen in documents[::2]]
        real = [i for i, weight in enumerate(weights) if weight > 0]
        if not real:  # rows that only even out processes; what is 0 keeps its graph
            return BatchLoss(loss=scores.sum() * 0, count=0, sums=dict.fromkeys(self.means, scores.new_zeros(())))
        chosen, rejected = scores[0::2][real], scores[1::2][real]
        margin = scores.new_tensor([documents[2 * i].score for i in real])
        center = cast(RewardConfig, self.args).center_rewards_coefficient or 0.0
        losses = bradley_terry_loss(chosen, rejected, margin, center)
        with torch.no_grad():
            rewards = torch.cat([chosen, rejected])
            sums = {
                "accuracy": (chosen > rejected).sum(),
                "margin": (chosen - rejected).sum(),
                "mean_reward": rewards.sum() / 2,  # of two answers, while the others are of a pair
            }
            extremes = {"min_reward": rewards.min(), "max_reward": rewards.max()}
        return BatchLoss(
            loss=(losses * losses.new_tensor([weights[i] for i in real])).sum(),
            count=len(real),
            sums=sums,
            extremes=extremes,
            nll=losses.detach().repeat_interleave(2),
        )

    def batch_weight(self, batch: Batch) -> Tensor:
        """The weight of its pairs: their number, where none has a weight of its own."""
        weights = (document_weight(chosen) for chosen in batch.documents[::2])
        return torch.tensor(sum(weights), device=batch.input_ids.device)

    def test_itself(self) -> None:
        flat, settings = not self.loaders.batching.padded, cast(Config, self.args)
        check_scores(cast(Model, self.model), self.train_dataset, settings, flat=flat)

    def predict(self, *_: Any, **__: Any) -> Any:
        raise TunesmithError(
            "a pair has no prediction to return; evaluate(dataset) measures accuracy and margin, and the saved model "
            "scores texts by AutoModelForSequenceClassification"
        )
