"""The loss of each training example, kept from what training computes anyway: which are hard to learn, which easy. Of
pairs of answers, also the difference of the rewards: which of them the model has the wrong way around, and whether it
goes by their length.

Shapes: S supervised positions of a batch, T tokens of a flat row, B padded rows, D documents, P pairs.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Generic, TypeVar

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

LENGTHS = ("the chosen answer is longer", "the rejected answer is longer", "both are equally long")
"""Pairs by the tokens of their answers."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class PairEntry:
    """One pair: by how much the reward of `chosen` was above that of `rejected` at `step`, and the `usual` margin."""

    margin: float
    usual: float
    step: int
    chosen: Example
    rejected: Example

    @property
    def key(self) -> bytes:
        ids = [np.array(example.input_ids, np.int64).tobytes() for example in (self.chosen, self.rejected)]
        return hashlib.blake2b(b"|".join(ids), digest_size=12).digest()


Kept = TypeVar("Kept", bound=Entry | PairEntry)


class Extremes(Generic[Kept]):
    """The `KEPT` entries with the highest `score`; of one example, the latest."""

    def __init__(self, score: Callable[[Kept], float]) -> None:
        self._score = score
        self._found: dict[bytes, Kept] = {}

    def add(self, entry: Kept) -> None:
        lowest = min(self._found, key=lambda key: self._score(self._found[key]), default=b"")
        full = len(self._found) >= KEPT
        if full and self._score(entry) <= self._score(self._found[lowest]) and entry.key not in self._found:
            return
        if full and entry.key not in self._found:
            del self._found[lowest]
        self._found[entry.key] = entry

    def ordered(self) -> list[Kept]:
        return sorted(self._found.values(), key=self._score, reverse=True)


class Pass:
    """What one pass over the data showed."""

    def __init__(self) -> None:
        self.rows = 0
        self.sum = 0.0
        self.first_step = self.last_step = 0
        self.histogram = [0] * (len(EDGES) + 1)
        self.easiest = Extremes[Entry](lambda entry: -entry.loss)
        # Not by the loss alone: in a single pass that would only name what came first.
        self.hardest = Extremes[Entry](lambda entry: entry.loss - entry.usual)
        self.by_length = {name: [0, 0] for name in LENGTHS}
        """How many pairs, and in how many of them the chosen answer has the higher reward."""
        self.worst = Extremes[PairEntry](lambda entry: entry.usual - entry.margin)

    def count(self, losses: Sequence[float], step: int) -> None:
        for loss in losses:
            self.rows += 1
            self.sum += loss
            self.first_step, self.last_step = self.first_step or step, step
            self.histogram[int(np.searchsorted(EDGES, loss))] += 1

    def count_pairs(self, pairs: Sequence[tuple[float, int]]) -> None:
        """Of each pair the difference of the rewards, and by how many tokens the chosen answer is longer."""
        for margin, longer in pairs:
            of_length = self.by_length[LENGTHS[0 if longer > 0 else 1 if longer < 0 else 2]]
            of_length[0] += 1
            of_length[1] += margin > 0

    def keep(self, entry: Entry | PairEntry) -> None:
        if isinstance(entry, PairEntry):
            self.worst.add(entry)
            return
        self.easiest.add(entry)
        self.hardest.add(entry)

    def kept(self) -> list[Entry | PairEntry]:
        return [*self.easiest.ordered(), *self.hardest.ordered(), *self.worst.ordered()]

    def merge(self, shares: Sequence[Sequence[Entry | PairEntry]]) -> None:
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
        self._pending: list[tuple[Batch, Tensor, Tensor | None]] = []
        self._recent: deque[float] = deque(maxlen=NEIGHBOURS)
        self._recent_margins: deque[float] = deque(maxlen=NEIGHBOURS)
        self._current, self._whole = Pass(), Pass()

    def add(self, batch: Batch, nll_S: Tensor, margins_P: Tensor | None = None) -> None:
        """A batch, and the loss of each supervised position; of a batch of pairs, whose documents are the chosen and
        the rejected answer of each in turn, also the difference of their rewards, NaN for pairs that don't count."""
        self._pending.append((batch, nll_S.detach(), margins_P))

    def forget_step(self) -> None:
        """The step begins again."""
        self._pending.clear()

    def end_step(self, step: int) -> None:
        pending, self._pending = self._pending, []
        own = [item for batch, nll, _ in pending for item in losses_of(batch, nll)]
        pairs = [pair for batch, _, margins in pending for pair in _pairs_of(batch, margins)]
        longer = [(margin, chosen.target_count - rejected.target_count) for margin, chosen, rejected in pairs]
        shares = self._gather(([loss for loss, _ in own], longer))
        losses = [loss for share, _ in shares for loss in share]
        lengths = [pair for _, share in shares for pair in share]
        self._recent = deque([*self._recent, *losses], maxlen=max(NEIGHBOURS, len(losses)))
        margins = [*self._recent_margins, *(margin for margin, _ in lengths)]
        self._recent_margins = deque(margins, maxlen=max(NEIGHBOURS, len(lengths)))
        self._current.count_pairs(lengths)
        for margin, chosen, rejected in pairs:
            usual = median(self._recent_margins)
            self._current.keep(PairEntry(margin=margin, usual=usual, step=step, chosen=chosen, rejected=rejected))
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
            "lengths_of_pairs": [[name, *numbers] for name, numbers in found.by_length.items() if numbers[0]],
            "worst_pairs": [_pair_as_json(entry, decode) for entry in found.worst.ordered()],
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


def _pairs_of(batch: Batch, margins_P: Tensor | None) -> Iterator[tuple[float, Example, Example]]:
    """The pairs of a batch that count: the difference of the rewards, the chosen and the rejected answer."""
    if margins_P is None:
        return
    answers = batch.documents
    for chosen, rejected, margin in zip(answers[::2], answers[1::2], margins_P.tolist(), strict=True):
        if np.isfinite(margin):
            yield margin, chosen, rejected


def _pair_as_json(entry: PairEntry, decode: Decode) -> dict[str, Any]:
    begins = [
        next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
        for example in (entry.chosen, entry.rejected)
    ]

    def text(ids: Sequence[int]) -> str:
        whole = decode(list(ids))
        return whole if len(whole) <= LONGEST else whole[:LONGEST] + " …"

    return {
        "margin": entry.margin,
        "usual": entry.usual,
        "step": entry.step,
        "prompt": text(entry.chosen.input_ids[: begins[0]]),
        "chosen": text(entry.chosen.input_ids[begins[0] :]),
        "rejected": text(entry.rejected.input_ids[begins[1] :]),
    }


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
