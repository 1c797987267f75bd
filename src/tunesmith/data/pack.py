"""Packing: document lengths to packs of at most `max_length` tokens, without a token of padding inside a pack.

Three strategies, named as in TRL. Five documents of 5, 2, 3, 1 and 0 tokens and `max_length=4`:

    bfd        [0:0-4]          [2:0-3, 3:0-1]          [1:0-2]             token 4 of document 0 is truncated
    bfd_split  [0:0-4]          [2:0-3, 0:4-5]          [1:0-2, 3:0-1]
    wrapped    [0:0-4]          [0:4-5, 1:0-2, 2:0-1]   [2:1-3, 3:0-1]

(`document:start-stop`). Document 4 has no tokens: it is left out. Everything here is deterministic and needs only
numpy, so that it runs before, and without, torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.arrow import list_array, list_column, list_lengths, segments
from tunesmith.errors import TunesmithError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

Ints = NDArray[np.int64]
Lengths = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packs:
    """Packs in four flat arrays: 24 bytes a piece and 8 a pack. A piece is the tokens `[start, stop)` of a document.

    Shapes: P pieces, N packs. The pieces of pack `i` are `offsets[i]:offsets[i + 1]`, never none.
    """

    document: Ints
    """(P,) the document a piece is cut from: its position in the lengths that were packed."""
    start: Ints
    """(P,) the piece's first token in its document."""
    stop: Ints
    """(P,) one past the piece's last token."""
    offsets: Ints
    """(N + 1,) where the packs begin in the arrays above, closed by P."""


def pack(lengths: Lengths, max_length: int, strategy: str = "bfd") -> Packs:
    """Packs of at most `max_length` tokens from documents of `lengths` tokens (B,).

    - `bfd`: best-fit decreasing. A longer document keeps its first `max_length` tokens.
    - `bfd_split`: the same packing. A longer document is cut every `max_length` tokens and each piece becomes a
      document of its own: it may land in any pack, its positions start at 0 again, and it sees nothing of the pieces
      before it.
    - `wrapped`: the documents one after the other in the given order, cut every `max_length` tokens. Only the last pack
      is short. A document that a pack's end cuts goes on in the next pack. The pieces still tell the documents of a
      pack apart; whether positions and attention run across them, as they do in TRL, is up to the reader of the packs.

    A document of no tokens has nothing to train on and no place in a pack: it is left out. Equal lengths are placed in
    their given order.

    Raises:
        TunesmithError: `max_length` below 1, an unknown strategy, or lengths that are not whole numbers of 0 or more.
    """
    if strategy not in _STRATEGIES:
        hint = nearest(strategy, STRATEGIES)
        raise TunesmithError(f"unknown packing strategy {strategy!r}{hint} (there are {', '.join(STRATEGIES)})")
    if max_length < 1:
        raise TunesmithError(f"cannot pack into max_length={max_length} tokens: write a max_length of 1 or more")
    return _STRATEGIES[strategy](_checked(lengths), max_length)


def pack_dataset(dataset: "Dataset", max_length: int, strategy: str = "bfd") -> "Dataset":
    """The examples of `dataset` in rows of at most `max_length` tokens, each a pack.

    `seq_lengths` are the tokens of each document of a row. The rows of `wrapped` have none: they are read as one text.
    Examples of several documents that share what they begin with keep their segments, as `seq_lengths` and `parents`
    (`data.prefix`); only `bfd` takes them, and none of them may have more than `max_length` tokens.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    table = dataset.data.table
    if dataset._indices is not None:  # a shuffle or a mixture is a list of places in the table
        table = table.take(pa.array(dataset._indices.column(0).to_numpy()))
    lengths = list_lengths(table, "input_ids")
    packs = pack(lengths, max_length, strategy)
    sizes = packs.stop - packs.start
    begins = np.cumsum(lengths) - lengths
    tokens = np.repeat(begins[packs.document] + packs.start, sizes) + _within(sizes)  # where each one comes from
    bounds = np.concatenate([[0], np.cumsum(sizes)])[packs.offsets]
    columns = [name for name in dataset.column_names if name not in ("seq_lengths", "parents")]
    lists = {name: list_array(bounds, list_column(table, name)[1][tokens]) for name in columns}
    if "parents" in dataset.column_names:
        if strategy != "bfd":
            raise TunesmithError(f"packing_strategy {strategy} cuts documents, and these share parts; write bfd")
        offsets, segment_lengths, parents = segments(table)
        counts = np.diff(offsets)[packs.document]
        chosen = np.repeat(offsets[packs.document], counts) + _within(counts)
        placed = np.concatenate([[0], counts.cumsum()])  # where the segments of each document begin, over all packs
        begins = placed[:-1] - np.repeat(placed[packs.offsets[:-1]], np.diff(packs.offsets))  # and in its pack
        moved = np.where(parents[chosen] < 0, -1, parents[chosen] + np.repeat(begins, counts))
        bounds = placed[packs.offsets]
        lists["seq_lengths"] = list_array(bounds, segment_lengths[chosen].astype(np.int32))
        lists["parents"] = list_array(bounds, moved.astype(np.int32))
    elif strategy != "wrapped":
        lists["seq_lengths"] = list_array(packs.offsets, sizes.astype(np.int32))
    return Dataset(InMemoryTable.from_pydict(lists))


def shuffled(count: int, *key: int) -> Ints:
    """An order (count,) of `range(count)`: the same for the same key (a seed and an epoch, say), another for others.

    It sorts raw 64-bit draws of PCG64, a fixed algorithm, so that a run resumed under another numpy release goes on in
    the same order; numpy allows itself to change what `Generator.permutation` gives (NEP 19).

    Raises:
        TunesmithError: a negative number in the key.
    """
    if min(key) < 0:
        raise TunesmithError(f"cannot shuffle with {', '.join(map(str, key))}: write seeds and epochs of 0 or more")
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable")


def _checked(lengths: Lengths) -> Ints:
    """`lengths` as int64 (B,)."""
    array = np.asarray(lengths)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        shape = f"an array of {array.dtype}, shape {array.shape}"
        raise TunesmithError(f"document lengths must be one list of whole numbers, found {shape}")
    if array.min() < 0:
        worst = int(array.argmin())
        raise TunesmithError(f"document {worst} has a length of {array[worst]}: lengths are 0 or more tokens")
    return array.astype(np.int64)


def _bfd(lengths: Ints, max_length: int) -> Packs:
    documents = np.flatnonzero(lengths)
    stop = np.minimum(lengths[documents], max_length)
    return _best_fit_decreasing(documents, np.zeros_like(stop), stop, max_length)


def _bfd_split(lengths: Ints, max_length: int) -> Packs:
    pieces = -(-lengths // max_length)
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = _within(pieces) * max_length
    stop = np.minimum(start + max_length, lengths[document])
    return _best_fit_decreasing(document, start, stop, max_length)


def _wrapped(lengths: Ints, max_length: int) -> Packs:
    """A piece begins wherever a document or a pack begins in the stream of all tokens."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(lengths.sum())
    cuts = np.arange(0, total, max_length)
    first = np.sort(np.concatenate((begins[lengths > 0], cuts)), kind="stable")
    first = first[np.diff(first, prepend=-1) > 0]
    last = np.append(first[1:], total)[: len(first)]
    document = ends.searchsorted(first, side="right")
    return Packs(
        document=document,
        start=first - begins[document],
        stop=last - begins[document],
        offsets=np.append(first.searchsorted(cuts), len(first)),
    )


def _best_fit_decreasing(document: Ints, start: Ints, stop: Ints, max_length: int) -> Packs:
    """Packs of the pieces (P,), none of them empty: the longest first, equal ones in their order.

    Best-fit decreasing (Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms",
    1974; for training data: Ding et al., "Fewer truncations improve language modeling", 2024): a piece goes into the
    bin with the least room that still holds it, of several the one that has waited longest.

    Pieces of one length are placed in one go: a bin chosen for the first of them stays the best fit until it holds no
    more. So a placement is three numbers, `count` bins from `first` on taking `each` pieces, and there are few of them.
    """
    decreasing = np.argsort(start - stop, kind="stable")
    sizes, counts = np.unique(stop - start, return_counts=True)
    placements = _place(sizes[::-1].tolist(), counts[::-1].tolist(), max_length)
    first, count, each = np.array(placements, dtype=np.int64).reshape(-1, 3).T
    pieces = count * each
    bins = np.repeat(first, pieces) + _within(pieces) // np.repeat(each, pieces)  # of each piece, the longest first
    chosen = decreasing[np.argsort(bins, kind="stable")]
    return Packs(
        document=document[chosen],
        start=start[chosen],
        stop=stop[chosen],
        offsets=np.concatenate(([0], np.cumsum(np.bincount(bins)))).astype(np.int64),
    )


def _place(sizes: list[int], counts: list[int], max_length: int) -> list[tuple[int, int, int]]:
    """Placements (first bin, bins, pieces for each), in the order of the pieces; `sizes` strictly decreasing.

    Bins live in runs (room, first, count) of neighbours with equal room. As sizes only fall, a bin with too little room
    now waits until the size has come down to its room, and a run that becomes usable has less room than all that
    already are: the usable runs are a stack with the least room on top. Filling a bin leaves `room % size`, less than
    half its room, so that a run is touched O(log(max_length)) times, and a size adds two runs at most:
    O(max_length + sizes * log(max_length)) steps in all, whatever the number of pieces.
    """
    placements: list[tuple[int, int, int]] = []
    usable: list[tuple[int, int, int]] = []
    waiting: dict[int, list[tuple[int, int, int]]] = {}
    opened = 0
    previous = sizes[0] if sizes else 0
    for size, left in zip(sizes, counts, strict=True):
        for room in range(previous - 1, size - 1, -1):
            usable.extend(reversed(waiting.pop(room, ())))  # the run that has waited longest on top
        previous = size
        while left:
            if usable:
                room, first, count = usable.pop()
            else:
                room, first, count = max_length, opened, -(-left // (max_length // size))
                opened += count
            each = room // size
            full = min(count, left // each)
            if full:
                placements.append((first, full, each))
                left -= full * each
                waiting.setdefault(room % size, []).append((room % size, first, full))
                first, count = first + full, count - full
            if count:
                last = min(left, 1)  # fewer than `each` pieces are left: one more bin takes them all
                if count > last:
                    usable.append((room, first + last, count - last))
                if last:
                    placements.append((first, 1, left))
                    usable.append((room - left * size, first, 1))
                    left = 0
    return placements


def _within(counts: Ints) -> Ints:
    """`0 .. counts[0] - 1`, then `0 .. counts[1] - 1`, and so on, in one array."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


_STRATEGIES: dict[str, Callable[[Ints, int], Packs]] = {"bfd": _bfd, "bfd_split": _bfd_split, "wrapped": _wrapped}
STRATEGIES = tuple(_STRATEGIES)
