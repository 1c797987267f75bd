"""Sums over batches, from which a run's numbers are made."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.errors import TunesmithError

Extreme = Literal["min", "max"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLoss:
    """What an objective makes of a batch.

    `loss` is a sum, with its graph, which is divided by the trainer's `batch_weight`. `sums` are further sums over
    `count` tokens or pairs, by the names under which their means are logged; those that are over fewer have their
    number in `counts`. `extremes` are least or largest values. `nll` (S,) is the loss of each supervised token, where
    there is such a thing, and `margins` (P,) the difference of the rewards of each pair, NaN for one that does not
    count. `outputs` are the model's, if they were asked for.
    """

    loss: Tensor
    count: int
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    extremes: Mapping[str, Tensor] = field(default_factory=dict)
    nll: Tensor | None = None
    margins: Tensor | None = None
    outputs: Any = None


class Meter:
    """Sums since the last report, kept on the device: reading them would wait for it. `means` names
    `BatchLoss.sums`, `counted` those that `BatchLoss.counts` are of, `extremes` says which of the values in
    `BatchLoss.extremes` are kept."""

    def __init__(
        self, means: Sequence[str], counted: Sequence[str] = (), extremes: Mapping[str, Extreme] | None = None
    ) -> None:
        self._extremes = dict(extremes or {})
        self._means, self._counted = tuple(means), {name: f"number of {name}" for name in counted}
        self._names = ("tokens", "loss", "weight", *self._means, "count", *self._counted.values())
        self._tokens = 0
        self.reset()

    @property
    def number_of_extremes(self) -> int:
        """So many of the values in `state`, the last, are extremes."""
        return len(self._extremes)

    def begin(self) -> None:
        """A run begins."""
        self._tokens = 0
        self.reset()

    def reset(self) -> None:
        self.examples = 0
        self._sums: dict[str, Any] = defaultdict(float)
        self._most: dict[str, Any] = dict.fromkeys(self._extremes, -inf)

    def state(self) -> list[float]:
        """What `restore` goes on from, of this process: the tokens since the start, and the sums."""
        return [
            float(self._tokens),
            *(float(self._sums[name]) for name in self._names),
            *(float(value) for value in self._most.values()),
        ]

    def restore(self, state: Sequence[float]) -> None:
        """Go on where `state` was taken. Raises TunesmithError for that of a trainer with other means."""
        kept = len(self._names) + len(self._extremes)
        if len(state) != 1 + kept:
            raise TunesmithError(
                f"the checkpoint has {len(state) - 1} sums of a log, and this trainer keeps {kept}: it was written by "
                "a trainer with another objective"
            )
        self._tokens, sums = round(state[0]), state[1 : 1 + len(self._names)]
        self._sums = defaultdict(float, zip(self._names, sums, strict=True))
        self._most = dict(zip(self._extremes, state[1 + len(self._names) :], strict=True))

    def snapshot(self) -> Any:
        """What `rewind` goes back to; nothing waits for the device."""
        return self._tokens, self.examples, deepcopy(self._sums), dict(self._most)

    def rewind(self, snapshot: Any) -> None:
        self._tokens, self.examples, sums, most = snapshot
        self._sums, self._most = deepcopy(sums), dict(most)

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
        for name, value in outcome.extremes.items():
            signed = value if self._extremes[name] == "max" else -value
            self._most[name] = torch.maximum(torch.as_tensor(self._most[name], device=value.device), signed)

    def take_loss(self, since: Any, mean: Tensor, weight: Any) -> None:
        """What was added since the snapshot `since` has the loss `mean` and this `weight`, whatever it had."""
        _, _, sums, _ = since
        self._sums["loss"] = sums["loss"] + mean.detach() * weight
        self._sums["weight"] = sums["weight"] + weight

    def report(self, accelerator: Any) -> tuple[int, dict[str, float]]:
        """How many tokens were read since the start, and the means since the last report: `loss` by weight, the others
        by count (empty when there were none), and extremes; over all processes, which all must call this. Starts the
        sums anew."""
        local = torch.stack(
            [torch.as_tensor(self._sums[name], dtype=torch.float32, device=accelerator.device) for name in self._names]
        )
        total = dict(zip(self._names, accelerator.reduce(local, reduction="sum").tolist(), strict=True))
        extremes = self._extremes_of_all(accelerator)
        self.reset()
        self._tokens += round(total["tokens"])
        if not total["count"] or not total["weight"]:
            return self._tokens, {}
        numbers = {name: total[self._counted.get(name, "count")] for name in self._means}
        means = {name: total[name] / number for name, number in numbers.items() if number}
        return self._tokens, means | extremes | {"loss": total["loss"] / total["weight"]}

    def _extremes_of_all(self, accelerator: Any) -> dict[str, float]:
        """The least and the largest values over all processes; none of what there was none of."""
        if not self._extremes:
            return {}
        own = [torch.as_tensor(value, dtype=torch.float32, device=accelerator.device) for value in self._most.values()]
        most = accelerator.gather(torch.stack(own)[None]).amax(dim=0).tolist()
        return {
            name: value if kind == "max" else -value
            for (name, kind), value in zip(self._extremes.items(), most, strict=True)
            if value > -inf
        }
