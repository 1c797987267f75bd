"""Who computes what of a step: its rows, dealt out to several processes so that they come to what one would.

A step has the same rows however many processes take it. `StepSampler` and `StepStream` read a step's rows in the order
of one process, and give each process its part: near the same number of tokens, no row twice. `StepParts` reads only the
files of its process. With 2 processes, 2 rows a micro-batch and 2 micro-batches a step, the last step of an epoch may
have 5 rows of these lengths:

    lengths      9 4 4 3 2
    process 0    [9] [2]          11 tokens
    process 1    [4 3] [4]        11 tokens

Where a process gets nothing, it computes a blank: documents of one token that have no label. Its loss is a zero with a
graph, so that it takes part when gradients are summed. Letters: n rows.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, Sampler

from tunesmith.data.streams import StreamParts
from tunesmith.types import IGNORE_INDEX

Ints = NDArray[np.int64]
EXCHANGES = 100
"""So often two processes exchange rows of a step at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The part of process `rank` in a step of `processes` that take `accumulation` micro-batches each. Of padded
    batches, which cost rows x longest row, a micro-batch has rows of like length (`padded`)."""

    rank: int
    processes: int
    accumulation: int = 1
    padded: bool = False

    def of_rows(self, costs: Ints, rows: int) -> list[Ints]:
        """Micro-batches of at most `rows` rows, of a step of n rows that cost `costs` (n,) tokens; indices."""
        count = -(-len(costs) // (rows * self.processes))
        if not self.padded:
            own = evenly(costs, self.processes, count * rows)[self.rank]
            return [own[batch] for batch in evenly(costs[own], count, rows)]
        batches = np.array_split(np.argsort(-costs, kind="stable"), count * self.processes)
        return [batches[i] for i in self._of_batches(batches, costs)]

    def of_batches(self, batches: Sequence[Ints], costs: Ints) -> list[Ints]:
        """Those of a step's `batches` that are this process's, empty ones behind them where there are too few. The
        largest are halved where that gives each process as many as the others."""
        count = -(-len(batches) // self.processes)
        divided = halved(batches, count * self.processes)
        own = [divided[i] for i in self._of_batches(divided, costs)]
        return own + [np.zeros(0, np.int64)] * (count - len(own))

    def _of_batches(self, batches: Sequence[Ints], costs: Ints) -> Ints:
        totals = [
            (costs[batch].max() * len(batch) if self.padded else costs[batch].sum()) for batch in batches if len(batch)
        ]
        totals += [0] * (len(batches) - len(totals))
        return evenly(np.array(totals), self.processes, -(-len(batches) // self.processes))[self.rank]


def evenly(costs: Ints, bins: int, capacity: int) -> list[Ints]:
    """Items that cost `costs` (n,) in `bins` of near the same sum, at most `capacity` in each; indices, ascending.

    The largest come first, each to where least is (Graham's LPT). Then the fullest and another, or the emptiest and
    another exchange two items, as long as that brings these closer together.
    """
    members: list[list[int]] = [[] for _ in range(bins)]
    waiting = [(0, i) for i in range(bins)]
    for item in np.argsort(-costs, kind="stable").tolist():
        total, least = heapq.heappop(waiting)
        members[least].append(item)
        if len(members[least]) < capacity:
            heapq.heappush(waiting, (total + int(costs[item]), least))
    sums = np.array([costs[items].sum() for items in members])
    for _ in range(EXCHANGES):
        order = np.argsort(sums, kind="stable")
        pairs = [(order[-1], low) for low in order[:-1]] + [(high, order[0]) for high in order[-2:0:-1]]
        if not any(_exchange(costs, members, sums, int(high), int(low)) for high, low in pairs):
            break
    return [np.array(sorted(items), np.int64) for items in members]


def _exchange(costs: Ints, members: list[list[int]], sums: Ints, high: int, low: int) -> bool:
    """Exchange the two items of two bins that bring their sums closest together; false where none does."""
    gap = sums[high] - sums[low]
    moved = costs[members[high]][:, None] - costs[members[low]][None]
    left = np.where((moved > 0) & (moved < gap), np.abs(gap - 2 * moved), gap)
    if not left.size or left.min() >= gap:
        return False
    i, j = np.unravel_index(left.argmin(), left.shape)
    sums[high] -= moved[i, j]
    sums[low] += moved[i, j]
    members[high][i], members[low][j] = members[low][j], members[high][i]
    return True


def halved(batches: Sequence[Ints], count: int) -> list[Ints]:
    """`batches`, those of most rows halved until there are `count`, or each has one row."""
    parts = list(batches)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda batch: len(parts[batch]))
        rows = parts[largest]
        if len(rows) < 2:
            break
        parts[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return parts


class StepSampler(Sampler[list[int]]):
    """A batch sampler of one process: its micro-batches, step by step; empty ones are blanks.

    `sampler` has the order of one process, of rows, `rows` of them a micro-batch; or without `rows`, of batches.
    `costs` (N,) are the tokens of the rows of the data set.
    """

    def __init__(
        self, sampler: Sampler[Any], costs: Ints, share: Share, *, rows: int | None = None, drop_last: bool = False
    ) -> None:
        self.sampler = sampler  # which `accelerate` replaces by one that draws from a seed
        self.batch_size, self.drop_last = rows, drop_last
        self._costs, self._share = costs, share

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    @property
    def _taken_at_once(self) -> int:
        """What all processes take of the sampler for a micro-batch each."""
        return (self.batch_size or 1) * self._share.processes

    def __len__(self) -> int:
        count = len(cast(Sized, self.sampler))
        return count // self._taken_at_once if self.drop_last else -(-count // self._taken_at_once)

    def __iter__(self) -> Iterator[list[int]]:
        source = iter(self.sampler)
        while step := list(islice(source, self._taken_at_once * self._share.accumulation)):
            if self.drop_last:
                step = step[: len(step) // self._taken_at_once * self._taken_at_once]
            if self.batch_size is None:
                batches = [np.array(batch, np.int64) for batch in step]
                yield from (batch.tolist() for batch in self._share.of_batches(batches, self._costs))
            elif step:
                chosen = np.array(step, np.int64)
                own = self._share.of_rows(self._costs[chosen], self.batch_size)
                yield from (chosen[batch].tolist() for batch in own)


class StepStream(IterableDataset[list[Any]]):
    """The micro-batches of one process of a stream, `rows` rows each, step by step. Each process reads all of it.

    The last step is filled with blanks to its number of micro-batches: of a stream nobody knows before that it is the
    last. `in_order`: rows are dealt as they come, so that those of all processes side by side are in order.
    """

    def __init__(
        self, stream: Any, share: Share, rows: int, *, drop_last: bool = False, in_order: bool = False
    ) -> None:
        self._stream, self._share, self._rows = stream, share, rows
        self._drop_last, self._in_order = drop_last, in_order

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._stream, "set_epoch"):
            self._stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        source, count = iter(self._stream), self._share.accumulation
        whole = self._rows * self._share.processes * count
        while step := list(islice(source, whole)):
            if self._drop_last and len(step) < whole:
                return
            if self._in_order:
                places = np.arange(self._share.rank * self._rows, (self._share.rank + 1) * self._rows)
                batches = [places[places < len(step)]]
            else:
                batches = self._share.of_rows(np.array([cost_of(row) for row in step]), self._rows)
            for batch in [*batches, *[np.zeros(0, np.int64)] * (count - len(batches))]:
                yield [step[i] for i in batch] or [Blank(blank_of(step[0]))]


class StepParts(IterableDataset[list[Any]]):
    """The micro-batches of one process of a stream in parts, step by step. Each process reads its own parts only.

    Of each part a step takes as many rows as of the others, so that its rows are the same however many processes share
    the parts. Where a part has come to its end, steps have fewer rows, and a process that has none left gives blanks
    until all are at their end; or with `drop_last`, until one is. `summed` is a number over all processes.
    """

    def __init__(
        self,
        parts: StreamParts,
        share: Share,
        rows: int,
        summed: Callable[[int], int],
        *,
        drop_last: bool = False,
    ) -> None:
        self._parts, self._rows, self._summed, self._drop_last = parts, rows, summed, drop_last
        self._own = replace(share, rank=0, processes=1)  # what this process has read is its own
        self._whole = rows * share.accumulation * share.processes

    def set_epoch(self, epoch: int) -> None:
        self._parts.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        sources, count = [iter(part) for part in self._parts.own], self._own.accumulation
        of_each, blank = self._whole // self._parts.count, None
        while True:
            step = [row for source in sources for row in islice(source, of_each)]
            total = self._summed(len(step))
            if total < (self._whole if self._drop_last else 1):
                return
            if blank is None:
                blank = Blank(blank_of(step[0] if step else next(iter(self._parts.whole))))
            batches = self._own.of_rows(np.array([cost_of(row) for row in step]), self._rows) if step else []
            for batch in [*batches, *[np.zeros(0, np.int64)] * (count - len(batches))]:
                yield [step[i] for i in batch] or [blank]


def cost_of(row: Mapping[str, Any]) -> int:
    """The tokens of a row."""
    return len(row["input_ids"]) if "input_ids" in row else 1


class Blank(dict[str, Any]):
    """A row in place of one that a process does not get."""


def blank_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without labels, of as many documents as `row`, of a token each: a pair stays a pair."""
    lengths = row.get("seq_lengths")
    count = 1 if lengths is None else len(lengths)
    blank = {name: values[:1] * count if isinstance(values, list) else values for name, values in row.items()}
    if "labels" in row:
        blank["labels"] = [IGNORE_INDEX] * count
    if lengths is not None:
        blank |= {"seq_lengths": [1] * count}
    return blank | ({"parents": row["parents"]} if row.get("parents") else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class BlankCollator:
    """Collates rows by `collate`, and where there are none, the blank `row`."""

    collate: Callable[[list[Any]], Any]
    row: Mapping[str, Any] | None = None

    def __call__(self, rows: list[Any]) -> Any:
        if rows and not isinstance(rows[0], Blank):
            return self.collate(rows)
        batch = self.collate(rows or [self.row])
        return batch.as_blank() if hasattr(batch, "as_blank") else batch
