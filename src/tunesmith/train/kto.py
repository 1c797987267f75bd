"""KTO: answers that are good or bad, one for each prompt, without pairs.

How much better a good answer must become depends on how far the model is from its reference, which is estimated on
answers to other prompts: those of the same micro-batch, each behind the prompt before it. A micro-batch is therefore
not divided.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.data.batches import Batch, documents_of
from tunesmith.objectives.logprobs import TokenLogProbs, token_logprobs
from tunesmith.objectives.preference import apo_zero_unpaired_loss, kl_estimate, kto_loss
from tunesmith.settings.preference import KTOConfig
from tunesmith.train.meter import BatchLoss
from tunesmith.train.preference import PreferenceTrainer, document_weight
from tunesmith.train.reference import AsItIs
from tunesmith.types import IGNORE_INDEX, Example


class KTOTrainer(PreferenceTrainer):
    """KTO on answers that are good or bad, with the arguments of TRL's trainer of the same name.

    `model` is a name, a folder, "demo", or a loaded causal language model, with or without adapters. The reference is
    the model as training begins with it, adapters that are trained further among it, unless `ref_model` is given. Rows
    have `prompt` and `completion`, or `messages`, and `label`; see `docs/preferences.md`.

    Raises TunesmithError for what would train wrongly, before any weight is loaded where it shows in the data.
    """

    _tag_names = ("tunesmith", "kto")
    kind = "kto"
    counted = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    means: tuple[str, ...] = (*counted, "kl")
    config = KTOConfig
    task = "judged"
    read = staticmethod(documents_of)

    @property
    def over_the_batch(self) -> bool:
        return self._settings.loss_type == "kto"

    def take_settings(self, args: KTOConfig) -> None:
        self._settings = args

    def batch_loss(self, model: nn.Module, batch: Batch, *, with_outputs: bool = False) -> BatchLoss:
        """The losses of the answers, times their weights."""
        args, device = self._settings, batch.input_ids.device
        reference = self.by_reference(model, batch)
        documents = batch.documents
        assert documents, "a batch of answers knows its documents"
        real = [i for i, example in enumerate(documents) if document_weight(example) > 0]
        kl = self._kl(model, batch, [documents[i] for i in real]) if self.over_the_batch else torch.zeros(())
        answer = self.predict_targets(model, batch, batch.targets(), token_logprobs, with_outputs=with_outputs)
        scored: TokenLogProbs = answer.outcome
        own = batch.by_document(scored.logprobs)
        if not real:  # rows that only even out processes; what is 0 keeps its graph
            return BatchLoss(loss=scored.logprobs.sum() * 0, count=0, outputs=answer.outputs)
        assert reference is not None
        logps = torch.stack([own[i].sum() for i in real])
        ratios = logps - torch.stack([reference[i].sum() for i in real])
        good = torch.tensor([documents[i].score > 0 for i in real], device=device)
        weights = {
            "beta": args.beta,
            "desirable_weight": args.desirable_weight,
            "undesirable_weight": args.undesirable_weight,
        }
        if self.over_the_batch:
            losses = kto_loss(ratios, good, kl.to(device), **weights)
        else:
            losses = apo_zero_unpaired_loss(ratios, good, **weights)
        loss = (losses * torch.tensor([document_weight(documents[i]) for i in real], device=device)).sum()
        rewards, logps = args.beta * ratios.detach(), logps.detach()
        sums: dict[str, Tensor] = {"kl": kl * len(real)}
        counts: dict[str, int] = {}
        for side, chosen in (("chosen", good), ("rejected", ~good)):
            sums |= {f"rewards/{side}": rewards[chosen].sum(), f"logps/{side}": logps[chosen].sum()}
            counts |= dict.fromkeys((f"rewards/{side}", f"logps/{side}"), int(chosen.sum()))
        if answer.router_loss is not None:
            sums["aux_loss"] = answer.router_loss.detach() * len(real)
            if model.training:
                loss = loss + self.router_coefficient * self.batch_weight(batch) * answer.router_loss
        return BatchLoss(
            loss=loss,
            count=len(real),
            sums=sums,
            counts=counts,
            nll=-scored.logprobs.detach(),
            outputs=answer.outputs,
        )

    def batch_weight(self, batch: Batch) -> Tensor:
        """The weight of its answers: their number, where none has a weight of its own."""
        return torch.tensor(sum(map(document_weight, batch.documents)), device=batch.input_ids.device)

    def _kl(self, model: nn.Module, batch: Batch, documents: Sequence[Example]) -> Tensor:
        """How far the model is from its reference on answers to other prompts than those of the `documents` of a batch,
        over all processes; 0 where there are no two answers."""
        device = batch.input_ids.device
        ratios = torch.zeros(0, device=device)
        if len(documents) > 1 or self.shares_out:  # a process that has no two computes so that the others can
            mismatched = tuple(mismatch(documents, self._settings.max_length))
            collator = cast(Any, self.loaders.batching.collator)
            batch = collator.batch([mismatched]).to(device) if len(documents) > 1 else batch.as_blank()
            assert self.reference is not None
            own = self.reference_logprobs(model, batch, AsItIs())
            ratio = own - self.reference_logprobs(model, batch, self.reference)
            ratios = torch.stack([values.sum() for values in batch.by_document(ratio)])
        if self.args.world_size == 1:
            return kl_estimate(ratios)
        total = torch.stack([ratios.sum(), torch.tensor(float(len(ratios)), device=device)])
        total = self.accelerator.reduce(total, reduction="sum")
        return kl_estimate(total[:1] / total[1].clamp(min=1))


def mismatch(documents: Sequence[Example], limit: int | None) -> list[Example]:
    """Each document's prompt with the answer of the next one, the last with that of the first. What is over `limit`
    tokens goes from the prompt's front."""
    begins = [next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX) for example in documents]
    found = []
    for i, example in enumerate(documents):
        other = documents[(i + 1) % len(documents)]
        answer, labels = other.input_ids[begins[(i + 1) % len(begins)] :], other.labels[begins[(i + 1) % len(begins)] :]
        prompt = example.input_ids[: begins[i]]
        if limit is not None:
            prompt = prompt[max(0, len(prompt) + len(answer) - limit) :]
        found.append(Example(input_ids=[*prompt, *answer], labels=[IGNORE_INDEX] * len(prompt) + list(labels)))
    return found
