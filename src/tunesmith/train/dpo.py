"""Direct preference optimization and its kin: two answers to one prompt, of which the better one is to become likelier.

A row is a pair, a tree of its prompt and two answers. The loss is a function of the log-probabilities of the answers'
tokens (`objectives.preference`). It is a sum over pairs by weight, divided by the weight of the whole step.
"""

from functools import partial
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn

from tunesmith.data.batches import Batch, pairs_of
from tunesmith.errors import TunesmithError
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
from tunesmith.train.meter import BatchLoss
from tunesmith.train.preference import BY_TOKEN, PreferenceTrainer, document_weight, token_sums


class DPOTrainer(PreferenceTrainer):
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
        *BY_TOKEN,
    )
    counted = BY_TOKEN
    config = DPOConfig
    task = "pairs"
    read = staticmethod(pairs_of)
    options: PreferenceOptions

    def take_settings(self, args: DPOConfig) -> None:
        self.options = _options(args)
        check_options(self.options)

    def check_rows(self, dataset: Any) -> None:
        """Raises TunesmithError for margins that a loss would ignore."""
        names = [name for name, _ in self.options.losses]
        ignoring = names if {*names} == {"sft"} else [name for name in names if name not in TAKE_MARGIN]
        if isinstance(dataset, Dataset) and "scores" in dataset.column_names and ignoring:
            raise TunesmithError(
                f"rows have a 'margin', which loss_type: {ignoring[0]} does not know; take the column out of the data, "
                f"or take one of {', '.join(sorted(TAKE_MARGIN - {'sft'}))}"
            )

    @property
    def needs_reference(self) -> bool:
        return self.options.needs_reference

    @property
    def over_the_batch(self) -> bool:
        return any(name in OVER_THE_BATCH for name, _ in self.options.losses)

    def batch_loss(self, model: nn.Module, batch: Batch, *, with_outputs: bool = False) -> BatchLoss:
        """The losses of the pairs, times their weights."""
        reference = self.by_reference(model, batch)
        objective = partial(token_logprobs, with_collision=self.options.weighting, with_mean_logit=True)
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
            margins = better.new_full((len(documents) // 2,), torch.nan)
            margins[[i // 2 for i in real[::2]]] = better - worse
            by_token, counts = token_sums(scored, batch, real[::2], real[1::2])
        if answer.router_loss is not None:
            sums["aux_loss"] = answer.router_loss.detach() * len(margin)
            if model.training:
                loss = loss + self.router_coefficient * self.batch_weight(batch) * answer.router_loss
        return BatchLoss(
            loss=loss,
            count=len(margin),
            sums=sums | by_token,
            counts=counts,
            nll=-scored.logprobs.detach(),
            margins=margins,
            outputs=answer.outputs,
        )

    def batch_weight(self, batch: Batch) -> Tensor:
        """The weight of its pairs: their number, where none has a weight of its own."""
        return torch.tensor(sum(_weights(batch)), device=batch.input_ids.device)


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


def _weights(batch: Batch) -> list[float]:
    """The weight of each pair of a batch."""
    return [document_weight(chosen) for chosen in batch.documents[::2]]
