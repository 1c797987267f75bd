"""The loss of each training example, kept from what training computes anyway: which are hard to learn, which easy.

Shapes: S supervised positions of a batch, T tokens of a flat row, B padded rows, D documents.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.batches import Batch
from tunesmith.types import IGNORE_INDEX, Example

KEPT = 12
"""So many of the easiest and of the hardest examples are kept."""
NEIGHBOURS = 16
"""A loss is compared with those of so many examples trained on last, those of its own step among them."""
LONGEST = 2000
"""Characters of an example that are kept to be shown."""
EDGES = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Bounds of the histogram, in nats."""

Ints = NDArray[np.int64]
Decode = Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One example: the mean loss of its `supervised` tokens in nats at `step`, the `usual` loss then, and itself as
    `ids` and `labels`, both (T,)."""

    loss: float
    usual: float
    step: int
    supervised: int
    ids: Ints
    labels: Ints

    @property
    def key(self) -> bytes:
        return hashlib.blake2b(self.ids.tobytes() + self.labels.tobytes(), digest_size=12).digest()


class Extremes:
    """The `KEPT` entries with the highest `score`; of one example, the latest."""

    def __init__(self, score: Callable[[Entry], float]) -> None:
        self._score = score
        self._found: dict[bytes, Entry] = {}

    def add(self, entry: Entry) -> None:
        lowest = min(self._found, key=lambda key: self._score(self._found[key]), default=b"")
        full = len(self._found) >= KEPT
        if full and self._score(entry) <= self._score(self._found[lowest]) and entry.key not in self._found:
            return
        if full and entry.key not in self._found:
            del self._found[lowest]
        self._found[entry.key] = entry

    def ordered(self) -> list[Entry]:
        return sorted(self._found.values(), key=self._score, reverse=True)


class Pass:
    """What one pass over the data showed."""

    def __init__(self) -> None:
        self.rows = 0
        self.sum = 0.0
        self.first_step = self.last_step = 0
        self.histogram = [0] * (len(EDGES) + 1)
        self.easiest = Extremes(lambda entry: -entry.loss)
        # Not by the loss alone: in a single pass that would only name what came first.
        self.hardest = Extremes(lambda entry: entry.loss - entry.usual)

    def count(self, losses: Sequence[float], step: int) -> None:
        for loss in losses:
            self.rows += 1
            self.sum += loss
            self.first_step, self.last_step = self.first_step or step, step
            self.histogram[int(np.searchsorted(EDGES, loss))] += 1

    def keep(self, entry: Entry) -> None:
        self.easiest.add(entry)
        self.hardest.add(entry)

    def kept(self) -> list[Entry]:
        return [*self.easiest.ordered(), *self.hardest.ordered()]

    def merge(self, shares: Sequence[Sequence[Entry]]) -> None:
        """Keep what other processes have kept, too."""
        for entry in sorted((entry for share in shares for entry in share), key=lambda entry: entry.step):
            self.keep(entry)


class Ledger:
    """Losses of examples by passes over the data. `add` keeps what a forward gave, on its device; `end_step` reads it,
    when the step is over and nothing has to wait for it.

    `gather` gives what each of several processes has: all losses are counted on all of them, and each keeps the easiest
    and the hardest of its own examples until the end of the pass."""

    def __init__(self, gather: Callable[[Any], list[Any]] = lambda own: [own]) -> None:
        self._gather = gather
        self._pending: list[tuple[Batch, Tensor]] = []
        self._recent: deque[float] = deque(maxlen=NEIGHBOURS)
        self._current, self._whole = Pass(), Pass()

    def add(self, batch: Batch, nll_S: Tensor) -> None:
        """A batch, and the loss of each supervised position."""
        self._pending.append((batch, nll_S.detach()))

    def forget_step(self) -> None:
        """The step begins again."""
        self._pending.clear()

    def end_step(self, step: int) -> None:
        pending, self._pending = self._pending, []
        own = [item for batch, nll in pending for item in losses_of(batch, nll)]
        shares = self._gather([loss for loss, _ in own])
        losses = [loss for share in shares for loss in share]
        self._recent = deque([*self._recent, *losses], maxlen=max(NEIGHBOURS, len(losses)))
        usual = median(self._recent) if self._recent else 0.0
        self._current.count(losses, step)
        for loss, example in own:
            self._current.keep(
                Entry(
                    loss=loss,
                    usual=usual,
                    step=step,
                    supervised=example.target_count,
                    ids=np.array(example.input_ids, np.int64),
                    labels=np.array(example.labels, np.int64),
                )
            )

    def end_pass(self, *, alone: bool = False) -> None:
        """The data begin anew. A pass that broke off early does not stand in for a whole one before it. `alone`: no
        other process takes part, and its examples are left out."""
        if not alone:
            self._current.merge(self._gather(self._current.kept()))
        if self._current.rows >= self._whole.rows:
            self._whole = self._current
        self._current = Pass()

    def as_json(self, decode: Decode) -> dict[str, Any] | None:
        """The last whole pass, None where nothing was seen."""
        found = self._whole
        if not found.rows:
            return None
        return {
            "rows": found.rows,
            "mean": found.sum / found.rows,
            "first_step": found.first_step,
            "last_step": found.last_step,
            "edges": list(EDGES),
            "histogram": found.histogram,
            "easiest": [_as_json(entry, decode) for entry in found.easiest.ordered()],
            "hardest": [_as_json(entry, decode) for entry in found.hardest.ordered()],
        }


def losses_of(batch: Batch, nll_S: Tensor) -> Iterator[tuple[float, Example]]:
    """The mean loss of each document of a batch; those without a finite loss, or without supervision, are left out.

    The supervised positions are in the order of the documents, in flat rows with shared prefixes, too.
    """
    nll = nll_S.float().cpu().numpy().astype(np.float64)
    start = 0
    for example in batch.documents:
        stop = start + example.target_count
        if stop > start and np.isfinite(loss := float(nll[start:stop].mean())):
            yield loss, example
        start = stop
    assert start == len(nll)


def _as_json(entry: Entry, decode: Decode) -> dict[str, Any]:
    return {
        "loss": entry.loss,
        "usual": entry.usual,
        "step": entry.step,
        "tokens": len(entry.ids),
        "supervised": entry.supervised,
        "parts": [list(part) for part in _parts(entry, decode)],
    }


def _parts(entry: Entry, decode: Decode) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is supervised; cut at `LONGEST` characters."""
    learned = entry.labels != IGNORE_INDEX
    cuts = np.flatnonzero(np.diff(learned)) + 1
    left = LONGEST
    for ids, marks in zip(np.split(entry.ids, cuts), np.split(learned, cuts), strict=True):
        text = decode(ids.tolist())
        yield text if len(text) <= left else text[:left] + " …", bool(marks[0])
        left -= len(text)
        if left <= 0:
            return
