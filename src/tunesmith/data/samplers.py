"""Which documents share a micro-batch: so many tokens of them, or rows of like length where batches are padded, or rows
that begin alike where what they share is computed once."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import seed_worker

from tunesmith.data.arrow import documents, list_lengths
from tunesmith.data.batches import groups_of
from tunesmith.data.deal import blank_of
from tunesmith.data.pack import pack, shuffled
from tunesmith.errors import TunesmithError
from tunesmith.settings.config import Config

Ints = NDArray[np.int64]
LEVELS = 32
"""Lengths that differ by less than this part of the mean length count as equal."""
PREFIX_LEVELS = 10
"""Prefixes are compared in steps of this part of the mean length: sharing a step saves about a tenth."""
SHORTEST_PREFIX = 16
"""Tokens of such a step at the least."""


class TokenBatches(Sampler[list[int]]):
    """A batch sampler: micro-batches of at most `max_tokens` tokens, each document once an epoch.

    Flat batches are filled best-fit decreasing, as packs are. Padded ones (`padded`), which cost rows x longest row,
    hold neighbours in the order of length. Which lengths share a batch is settled once, so that every epoch has as many
    batches as the last; which documents of (nearly) that length do, and the order of the batches, is drawn anew for
    every epoch from `seed` and the epoch, so that a resumed run sees the batches it would have seen. To make lengths
    meet, they are rounded up to a 32nd of their mean, which leaves a 64th of a batch empty.

    Without a seed, nothing is drawn: all epochs are the same. Then rows may have an `order` (B,), in which each batch
    takes as many as fit.
    """

    def __init__(
        self, lengths: Ints, max_tokens: int, *, seed: int | None, padded: bool = False, order: Ints | None = None
    ) -> None:
        self._seed = seed
        self.epoch = 0
        self._order = order
        if order is not None:
            assert seed is None
            self._batches = _as_many_as_fit(lengths[order], max_tokens)
            return
        step = max(1, int(lengths.mean()) // LEVELS)
        # A document without tokens counts as one, so that it is in a batch too.
        self._levels = np.minimum(-(-np.maximum(lengths, 1) // step) * step, max_tokens)
        decreasing = np.sort(self._levels)[::-1]
        if padded:
            self._batches = _neighbours(decreasing, max_tokens)
        else:
            packs = pack(decreasing, max_tokens)
            self._batches = np.split(packs.document, packs.offsets[1:-1])

    @property
    def shuffles(self) -> bool:
        """Whether epochs differ."""
        return self._seed is not None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        if self._order is not None:
            yield from (self._order[batch].tolist() for batch in self._batches)
            return
        documents, order = np.arange(len(self._levels)), np.arange(len(self))
        if self._seed is not None:
            documents = shuffled(len(documents), self._seed, self.epoch, 0)
            order = shuffled(len(order), self._seed, self.epoch, 1)
        documents = documents[np.argsort(-self._levels[documents], kind="stable")]
        for batch in order:
            yield documents[self._batches[batch]].tolist()


class LengthGroups(Sampler[int]):
    """A sampler after which batches of `batch_size` hold rows of like length: what `transformers` does when it groups
    by length, but drawn from `seed` and the epoch, so that a resumed run goes on with the same rows."""

    def __init__(self, lengths: Ints, batch_size: int, seed: int) -> None:
        self._lengths = lengths.tolist()
        self._batch_size, self._seed = batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        yield from get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)


class Generations(Sampler[list[int]]):
    """A batch sampler: `prompts` rows to which answers are drawn together, `repeats` times in a row, once for each
    micro-batch that is made of these answers.

    Without a seed, rows keep their order and the last generation may have fewer. With one, they are shuffled anew in
    each epoch, by the seed and the epoch, and what does not fill a generation is left out of the epoch; `shuffled`
    false keeps the order.
    """

    def __init__(self, rows: int, prompts: int, *, repeats: int = 1, seed: int | None, shuffled: bool = True) -> None:
        self._rows, self._prompts, self._repeats = rows, prompts, repeats
        self._seed, self._shuffled = seed, shuffled
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole = self._rows // self._prompts if self._seed is not None else -(-self._rows // self._prompts)
        return whole * self._repeats

    def __iter__(self) -> Iterator[list[int]]:
        order = [*range(self._rows)]
        if self._seed is not None and self._shuffled:
            generator = torch.Generator().manual_seed(self._seed + self.epoch)
            order = torch.randperm(self._rows, generator=generator).tolist()
        for number in range(len(self) // self._repeats):
            rows = order[number * self._prompts : (number + 1) * self._prompts]
            for _ in range(self._repeats):
                yield rows


class PrefixGroups(Sampler[int]):
    """A sampler after which batches of `batch_size` hold rows that begin alike, each row once an epoch.

    Batches are filled from the longest shared beginnings to the shortest. Of the rows of a group, full batches are
    taken; what is left over joins the groups that share less, and at last all others:

        6 rows, batches of 2    a b c1   a b c2   a b c3   a d   a e   f
        batches                 [a b c3, a b c1]  [a e, a b c2]  [f, a d]

    Which rows of a group share a batch, which are left over, and the order of the batches are drawn anew for every
    epoch from `seed` and the epoch, so that a resumed run goes on with the same rows. Without a seed nothing is drawn.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int | None) -> None:
        self._count = len(dataset)
        self._levels = _prefix_levels(dataset, batch_size)
        self._batch_size, self._seed = batch_size, seed
        self.epoch = 0

    @property
    def begin_alike(self) -> bool:
        """Whether so many rows begin alike that a batch can be filled with them."""
        return bool(self._levels)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count

    def _drawn(self, count: int, *key: int) -> Ints:
        return np.arange(count) if self._seed is None else shuffled(count, self._seed, self.epoch, *key)

    def __iter__(self) -> Iterator[int]:
        size, place, left = self._batch_size, np.empty(self._count, np.int64), np.ones(self._count, bool)
        place[self._drawn(self._count, 0)] = np.arange(self._count)
        batches: list[Ints] = []
        for level, (rows, groups) in enumerate(reversed(self._levels), start=1):
            rows, groups = rows[left[rows]], groups[left[rows]]
            if not len(rows):
                continue
            draw = self._drawn(int(groups.max()) + 1, 1, level)[groups]
            order = np.lexsort((place[rows], draw))
            rows, counts = rows[order], np.unique(draw[order], return_counts=True)[1]
            within = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
            full = within < np.repeat(counts // size * size, counts)
            batches.append(rows[full].reshape(-1, size))
            left[rows[full]] = False
            place[rows[~full]] = level * self._count + np.arange((~full).sum())  # neighbours stay neighbours
        rest = np.flatnonzero(left)
        rest = rest[np.argsort(place[rest], kind="stable")]
        whole = len(rest) // size * size
        chosen = np.concatenate([*batches, rest[:whole].reshape(-1, size)])
        yield from chosen[self._drawn(len(chosen), 2)].flatten().tolist()
        yield from rest[whole:].tolist()


def _prefix_levels(dataset: Dataset, batch_size: int) -> list[tuple[Ints, Ints]]:
    """Rows that begin alike with enough others to fill a batch: for each length of beginnings, from the shortest on,
    the rows (R,) and the group of each (R,). Lengths that make the same groups are one.

    Beginnings are told apart by 64-bit hashes. Two that collide share a batch and no token: which tokens are shared is
    found out when the batch is made.
    """
    if "input_ids" not in dataset.column_names or not len(dataset):
        return []
    import pyarrow.compute as pc

    lengths = list_lengths(dataset.data, "input_ids")
    begins, ids = lengths.cumsum() - lengths, pc.list_flatten(dataset.data.table.column("input_ids")).to_numpy()
    if dataset._indices is not None:  # a shuffle or a mixture is a list of places in the table
        chosen = dataset._indices.column(0).to_numpy()
        begins, lengths = begins[chosen], lengths[chosen]
    step = max(SHORTEST_PREFIX, int(lengths.mean()) // PREFIX_LEVELS)
    levels: list[tuple[Ints, Ints]] = []
    rows, groups = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    for start in range(0, int(lengths.max(initial=0)), step):
        long_enough = lengths[rows] >= start + step
        rows, groups = rows[long_enough], groups[long_enough]
        hashes = groups.astype(np.uint64)
        for place in range(start, start + step):
            hashes = (hashes ^ ids[begins[rows] + place].astype(np.uint64)) * np.uint64(1099511628211)  # FNV-1a
        _, groups, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        enough = counts[groups] >= batch_size
        rows, groups = rows[enough], groups[enough]
        if not len(rows):
            break
        if levels and len(levels[-1][0]) == len(rows) and len(np.unique(levels[-1][1])) == len(np.unique(groups)):
            levels.pop()
        levels.append((rows, groups))
    return levels


def lengths_of(dataset: Dataset, *, padded: bool = False) -> Ints:
    """The tokens that each row takes in a batch (B,), from the offsets of the Arrow table: no row is read. A `padded`
    row of several documents takes as many times the longest of them.

    Raises:
        TunesmithError: there are no lists of tokens in `input_ids`.
    """
    if "input_ids" not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise TunesmithError(f"batches by length need a column input_ids; the data set has {columns}")
    lengths: Ints = list_lengths(dataset.data, "input_ids")
    if padded and "seq_lengths" in dataset.column_names:
        offsets, sizes = documents(dataset.data)
        lengths = np.diff(offsets) * np.maximum.reduceat(sizes, offsets[:-1])
    return lengths if dataset._indices is None else lengths[dataset._indices.column(0).to_numpy()]


def document_lengths(dataset: Dataset) -> Ints:
    """The tokens of each document (D,) of all rows, as `by_document` lays them out."""
    sizes: Ints
    offsets, sizes = documents(dataset.data)
    if dataset._indices is None:
        return sizes
    chosen = dataset._indices.column(0).to_numpy()
    return np.concatenate([np.zeros(0, np.int64), *(sizes[offsets[row] : offsets[row + 1]] for row in chosen)])


def fitting_lengths(dataset: Any, split: str, max_tokens: int, multiple: int = 1, *, padded: bool = False) -> Ints:
    """The tokens that each row takes in a batch (B,), padded to a multiple of `multiple`.

    Raises:
        TunesmithError: lengths are unknown, or a row has more than `max_tokens`.
    """
    if isinstance(dataset, IterableDataset):
        raise TunesmithError(
            f"{split} data: max_tokens_per_batch needs all lengths, which a stream does not tell; load the data, "
            "or set per_device_train_batch_size instead"
        )
    lengths = -(-lengths_of(dataset, padded=padded) // multiple) * multiple
    if len(lengths) and lengths.max() > max_tokens:
        row = int(lengths.argmax())
        raise TunesmithError(
            f"{split} data: row {row} takes {lengths[row]:,} tokens, over max_tokens_per_batch: {max_tokens}; "
            f"write max_tokens_per_batch: {lengths[row]} or more, or max_length: {max_tokens} or less"
        )
    return lengths


def check_fit(args: Config, train: Any, evaluated: Any) -> None:
    """All data sets, before weights load. `evaluated`: none, one, or several by name.

    Raises:
        TunesmithError: as `fitting_lengths`.
    """
    if args.max_tokens_per_batch is None:
        return
    splits = {"train": train, **(evaluated if isinstance(evaluated, dict) else {"eval": evaluated})}
    for split, dataset in splits.items():
        if dataset is not None:
            fitting_lengths(dataset, split, args.max_tokens_per_batch, int(args.pad_to_multiple_of or 1))


def batch_loader(
    dataset: Any, batches: Any, collate: Callable[..., Any], args: Config, *, training: bool
) -> DataLoader[Any]:
    """A data loader of the micro-batches that the batch sampler `batches` makes of rows; None: `dataset` is a stream of
    micro-batches. It is set up like those that `transformers` makes of rows."""
    return DataLoader(
        dataset,
        **({"batch_size": None} if batches is None else {"batch_sampler": batches}),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        # Evaluation makes a new loader every time: workers that stay would pile up.
        persistent_workers=args.dataloader_persistent_workers and training,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )


def register_sampler(loader: Any) -> Any:
    """`loader`, prepared by `accelerate`, with our sampler as the one that its `set_epoch` reaches, also where it skips
    the first batches of an epoch."""
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (batches, getattr(batches, "sampler", None)):
        if isinstance(sampler, TokenBatches | LengthGroups | PrefixGroups | Generations):
            loader.set_sampler(sampler)
    return loader


def _neighbours(decreasing: Ints, max_tokens: int) -> list[Ints]:
    """Batches of neighbours in the order of length, each as many as fit when padded to the first."""
    cuts = [0]
    while cuts[-1] < len(decreasing):
        cuts.append(cuts[-1] + max_tokens // int(decreasing[cuts[-1]]))
    return np.split(np.arange(len(decreasing)), cuts[1:-1])


def _as_many_as_fit(lengths: Ints, max_tokens: int) -> list[Ints]:
    """Batches of neighbours, each as many as fit."""
    ends = np.maximum(lengths, 1).cumsum()
    cuts = [0]
    while cuts[-1] < len(ends):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(int(ends.searchsorted(before + max_tokens, side="right")))
    return np.split(np.arange(len(ends)), cuts[1:-1])


def by_document(dataset: Dataset) -> Dataset:
    """`dataset` with a row for each document, where its rows have several: logits and metrics are those of documents.
    What documents share is supervised in the first of them."""
    if "seq_lengths" not in dataset.column_names:
        return dataset
    names = [name for name in ("input_ids", "labels", "weights") if name in dataset.column_names]
    examples = (example for row in dataset for group in groups_of(row) for example in group)
    return Dataset.from_list([{name: getattr(example, name) for name in names} for example in examples])


def with_blank_rows(dataset: Dataset, multiple: int) -> Dataset:
    """`dataset` with blanks at its end, up to a multiple of `multiple` rows (`data.deal`).

    Where logits are gathered row by row, each process must get as many rows as the others. Left to itself,
    `accelerate` gives some rows twice, whose loss would count twice.
    """
    lacking = -len(dataset) % multiple
    if not lacking:
        return dataset
    blank = blank_of(dataset.with_format(None)[0])
    longer = concatenate_datasets([dataset, Dataset.from_list([blank] * lacking, features=dataset.features)])
    longer.total_dataset_length = len(dataset)  # to which accelerate cuts what it gathers
    return longer
