"""Sums over batches, from which a run's numbers are made."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.errors import TunesmithError


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLoss:
    """What an objective makes of a batch.

    `loss` is a sum, with its graph, which is divided by the trainer's `batch_weight`. `sums` are further sums over
    `count` tokens or pairs, by the names under which their means are logged; those that are over fewer have their
    number in `counts`. `nll` (S,) is the loss of each supervised token, where there is such a thing, and `margins` (P,)
    the difference of the rewards of each pair, NaN for one that does not count. `outputs` are the model's, if they were
    asked for.
    """

    loss: Tensor
    count: int
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    nll: Tensor | None = None
    margins: Tensor | None = None
    outputs: Any = None


class Meter:
    """Sums since the last report, kept on the device: reading them would wait for it. `means` names
    `BatchLoss.sums`, `counted` those that `BatchLoss.counts` are of."""

    def __init__(self, means: Sequence[str], counted: Sequence[str] = ()) -> None:
        self._means, self._counted = tuple(means), {name: f"number of {name}" for name in counted}
        self._names = ("tokens", "loss", "weight", *self._means, "count", *self._counted.values())
        self._tokens = 0
        self.reset()

    def begin(self) -> None:
        """A run begins."""
        self._tokens = 0
        self.reset()

    def reset(self) -> None:
        self.examples = 0
        self._sums: dict[str, Any] = defaultdict(float)

    def state(self) -> list[float]:
        """What `restore` goes on from, of this process: the tokens since the start, and the sums."""
        return [float(self._tokens), *(float(self._sums[name]) for name in self._names)]

    def restore(self, state: Sequence[float]) -> None:
        """Go on where `state` was taken. Raises TunesmithError for that of a trainer with other means."""
        if len(state) != 1 + len(self._names):
            raise TunesmithError(
                f"the checkpoint has {len(state) - 1} sums of a log, and this trainer keeps {len(self._names)}: it was "
                "written by a trainer with another objective"
            )
        self._tokens = round(state[0])
        self._sums = defaultdict(float, zip(self._names, state[1:], strict=True))

    def snapshot(self) -> Any:
        """What `rewind` goes back to; nothing waits for the device."""
        return self._tokens, self.examples, deepcopy(self._sums)

    def rewind(self, snapshot: Any) -> None:
        self._tokens, self.examples, sums = snapshot
        self._sums = deepcopy(sums)

    def read(self, batch: Batch) -> None:
        """Count the tokens of a batch, padding left out, and its examples: documents that belong together are one."""
        self._sums["tokens"] += batch.tokens
        self.examples += 0 if batch.blank else len(batch.groups)

    def add(self, outcome: BatchLoss, weight: Tensor) -> None:
        """Add the outcome of a batch, whose loss is a sum over `weight`."""
        self._sums["loss"] += outcome.loss.detach()
        self._sums["weight"] += weight
        self._sums["count"] += outcome.count
        for name, value in outcome.sums.items():
            self._sums[name] += value
        for name, number in outcome.counts.items():
            self._sums[self._counted[name]] += number

    def report(self, accelerator: Any) -> tuple[int, dict[str, float]]:
        """How many tokens were read since the start, and the means since the last report: `loss` by weight, the others
        by count (empty when there were none); over all processes, which all must call this. Starts the sums anew."""
        local = torch.stack(
            [torch.as_tensor(self._sums[name], dtype=torch.float32, device=accelerator.device) for name in self._names]
        )
        total = dict(zip(self._names, accelerator.reduce(local, reduction="sum").tolist(), strict=True))
        self.reset()
        self._tokens += round(total["tokens"])
        if not total["count"] or not total["weight"]:
            return self._tokens, {}
        numbers = {name: total[self._counted.get(name, "count")] for name in self._means}
        means = {name: total[name] / number for name, number in numbers.items() if number}
        return self._tokens, means | {"loss": total["loss"] / total["weight"]}
