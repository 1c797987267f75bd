"""The trainer's batches: flat or padded, by rows or by tokens, row by row where logits are asked for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import Trainer

from tunesmith.data.batches import Batch, Collator, FlatCollator, documents_of
from tunesmith.data.dataset import COLUMNS
from tunesmith.data.samplers import (
    LengthGroups,
    PrefixGroups,
    TokenBatches,
    by_document,
    fitting_lengths,
    lengths_of,
    register_sampler,
    token_loader,
    with_blank_rows,
)
from tunesmith.errors import TunesmithError
from tunesmith.settings.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How a run's rows become batches.

    `collator` makes those that are trained and evaluated on; any callable, where it is the user's. `by_row` makes those
    whose logits are wanted: padded documents, in order. `grouped`: rows of like length, or of like beginnings, share a
    batch. `regroups`: rows may change places among the micro-batches of a step, because its loss is a sum over
    documents. `columns` of a data set reach the collator.
    """

    collator: Collator | Callable[[list[dict[str, Any]]], Any]
    by_row: Collator
    grouped: Literal["length", "prefix"] | None = None
    regroups: bool = False
    columns: Sequence[str] = tuple(COLUMNS)

    @property
    def is_custom(self) -> bool:
        """Whether the collator is the user's; how much it pads is not known."""
        return not isinstance(self.collator, Collator)

    @property
    def shares(self) -> bool:
        """Whether what rows of a batch begin with in common is computed once."""
        return isinstance(self.collator, FlatCollator) and self.collator.share_prefix

    @property
    def padded(self) -> bool:
        """Whether batches cost rows x longest row, as those of the user's collator may."""
        return self.collator.pads if isinstance(self.collator, Collator) else True


class Loaders:
    """Makes the loaders of a `trainer`, through `transformers` as far as it can."""

    def __init__(self, trainer: Trainer, batching: Batching) -> None:
        self._trainer, self.batching = trainer, batching
        self._mean_rows: float | None = None

    @property
    def _args(self) -> Config:
        return cast(Config, self._trainer.args)

    @property
    def rows_per_batch(self) -> int:
        """Rows of a micro-batch on all devices of this process."""
        return int(self._trainer._train_batch_size)

    @property
    def _seed(self) -> int:
        return self._args.seed if self._args.data_seed is None else self._args.data_seed

    def loader(self, plain: Callable[..., Any], dataset: Any, description: str, batch_size: int, **kwargs: Any) -> Any:
        """The loader that `plain`, that of `transformers`, makes of the arguments; but metrics and predictions want
        logits by document, in order, so their batches are padded; the rest may be batches by tokens, or of rows grouped
        by length."""
        training, world_size = bool(kwargs.get("is_training")), self._args.world_size
        by_row = description == "test" or (self._trainer.compute_metrics is not None and not training)
        by_tokens = self._args.max_tokens_per_batch is not None and not by_row
        if by_row and isinstance(dataset, Dataset) and self.batching.by_row.read is documents_of:
            dataset = by_document(dataset)
        if world_size > 1 and isinstance(dataset, Dataset) and not training:
            dataset = with_blank_rows(dataset, world_size * (1 if by_tokens else batch_size))
        deals = self._settle_dealing()
        if by_tokens:
            return self._token_loader(dataset, training)
        grouped = self.batching.grouped or ("prefix" if self.batching.shares and not training else None)
        if grouped is not None and isinstance(dataset, Dataset):
            if by_row:
                kwargs["sampler_fn"] = SequentialSampler
            elif grouped == "prefix":  # each process takes a whole batch in turn
                seed = self._seed if training else None
                kwargs["sampler_fn"] = partial(PrefixGroups, batch_size=batch_size, seed=seed)
            else:
                kwargs["sampler_fn"] = partial(self._length_groups, batch_size=batch_size * world_size)
        collator = self.batching.by_row if by_row and not self.batching.is_custom else None
        with self._collating_by(collator, as_dictionary=deals):
            return register_sampler(plain(dataset, description, batch_size, **kwargs))

    def _settle_dealing(self) -> bool:
        """Whether one process reads and deals batches out to the others (`dispatch_batches`), which is only done where
        it is asked for: each reads its own part of a stream.

        Raises:
            TunesmithError: it is asked for, and batches are flat, which can't be cut into parts.
        """
        settings = self._trainer.accelerator.dataloader_config
        if self._args.world_size == 1 or settings.dispatch_batches is None:
            settings.dispatch_batches = False
        if settings.dispatch_batches and not self.batching.padded:
            raise TunesmithError(
                "accelerator_config: dispatch_batches deals the rows of a batch out to processes, and batches without "
                "padding have one row; set it to false, or padding_free: false"
            )
        return bool(settings.dispatch_batches)

    @contextmanager
    def _collating_by(self, collator: Collator | None, *, as_dictionary: bool) -> Iterator[None]:
        before: Any = self._trainer.data_collator
        chosen: Any = collator or before
        if as_dictionary:  # `accelerate` deals out tensors in dictionaries, and no documents
            chosen = partial(_dictionary, chosen)
        self._trainer.data_collator = chosen
        try:
            yield
        finally:
            self._trainer.data_collator = before

    def token_batches(self, dataset: Any, training: bool) -> TokenBatches:
        """The batches by tokens of a data set."""
        args = self._args
        assert args.max_tokens_per_batch is not None
        split, multiple = "train" if training else "eval", int(args.pad_to_multiple_of or 1)
        lengths = fitting_lengths(dataset, split, args.max_tokens_per_batch, multiple, padded=self.batching.padded)
        order = None
        if self.batching.shares and not training and len(lengths):
            rows = max(1, args.max_tokens_per_batch // max(1, int(lengths.mean())))
            groups = PrefixGroups(dataset, rows, seed=None)
            order = np.fromiter(groups, np.int64) if groups.begin_alike else None
        return TokenBatches(
            lengths,
            args.max_tokens_per_batch,
            order=order,
            seed=self._seed if training else None,
            padded=self.batching.padded,
            multiple_of=args.world_size,
        )

    def _token_loader(self, dataset: Any, training: bool) -> Any:
        batches = self.token_batches(dataset, training)
        if training:
            self._mean_rows = len(dataset) / len(batches)
        names = [name for name in dataset.column_names if name in self.batching.columns]
        dataset = dataset.select_columns(names) if self._args.remove_unused_columns else dataset
        loader = token_loader(dataset, batches, self._trainer.data_collator, self._args)
        return register_sampler(self._trainer.accelerator.prepare(loader))

    def regrouped(self, batches: Sequence[Any]) -> list[Any]:
        """The micro-batches of a step, rows that begin alike in the same one where that pays."""
        ours = all(isinstance(batch, Batch) and batch.groups for batch in batches)
        if not (ours and self.batching.regroups and self.batching.shares):
            return [*batches]
        return list(cast(FlatCollator, self.batching.collator).regrouped(batches))

    def rows_of_step(self, rows: int) -> int:
        """The rows of a step, of which `transformers` counts `rows`; of batches by tokens, the mean."""
        return rows if self._mean_rows is None else round(rows / self.rows_per_batch * self._mean_rows)

    def _length_groups(self, dataset: Dataset, batch_size: int) -> LengthGroups:
        return LengthGroups(lengths_of(dataset, padded=self.batching.padded), batch_size, self._seed)


def _dictionary(collate: Callable[[list[dict[str, Any]]], Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collate(rows)
    return batch.tensors() if isinstance(batch, Batch) else batch
