"""Sums over supervised tokens, from which a run's numbers are made."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.head import Targets
from tunesmith.objectives.supervised import Supervised

_SUMS = ("tokens", "loss", "weight", "entropy", "mean_token_accuracy", "count")


class Meter:
    """Sums since the last report, kept on the device: reading them would wait for it."""

    def __init__(self) -> None:
        self._tokens = 0
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)

    def state(self) -> list[float]:
        """What `restore` goes on from, of this process: the tokens since the start, and the sums."""
        return [float(self._tokens), *(float(self._sums[name]) for name in _SUMS)]

    def restore(self, state: list[float]) -> None:
        """Go on where `state` was taken."""
        self._tokens = round(state[0])
        self._sums = defaultdict(float, zip(_SUMS, state[1:], strict=True))

    def read(self, batch: Mapping[str, Any]) -> None:
        """Count the tokens of a batch, padding left out."""
        mask = batch.get("attention_mask")
        # Labels are there for each token of the rows, also where they share their beginning.
        self._sums["tokens"] += batch.get("labels", batch["input_ids"]).numel() if mask is None else mask.sum()

    def add(self, result: Supervised, targets: Targets) -> None:
        """Add the outcome of a batch."""
        weights = targets.weights
        self._sums["loss"] += result.loss.detach()
        self._sums["weight"] += len(targets.tokens) if weights is None else weights.sum()
        self._sums["entropy"] += result.entropy.sum()
        self._sums["mean_token_accuracy"] += result.correct.sum()
        self._sums["count"] += len(targets.tokens)

    def report(self, accelerator: Any) -> tuple[int, dict[str, float]]:
        """How many tokens were read since the start, and `loss` (weighted), `entropy` and `mean_token_accuracy` over
        the supervised tokens since the last report (empty when there were none); over all processes, which all must
        call this. Starts the sums anew."""
        local = torch.stack([_as_float32(self._sums[name], accelerator.device) for name in _SUMS])
        total = dict(zip(_SUMS, accelerator.reduce(local, reduction="sum").tolist(), strict=True))
        self.reset()
        self._tokens += round(total["tokens"])
        if not total["count"] or not total["weight"]:
            return self._tokens, {}
        means = {name: total[name] / total["count"] for name in ("entropy", "mean_token_accuracy")}
        return self._tokens, means | {"loss": total["loss"] / total["weight"]}


def _as_float32(value: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device)
