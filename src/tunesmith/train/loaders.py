"""The trainer's batches: flat or padded, by rows or by tokens, row by row where logits are asked for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from torch.utils.data import SequentialSampler
from transformers import Trainer

from tunesmith.data.batches import Batch, Collator, FlatCollator, documents_of
from tunesmith.data.dataset import COLUMNS
from tunesmith.data.deal import BlankCollator, Share, StepParts, StepSampler, StepStream, blank_of
from tunesmith.data.samplers import (
    LengthGroups,
    PrefixGroups,
    TokenBatches,
    batch_loader,
    by_document,
    fitting_lengths,
    lengths_of,
    register_sampler,
    with_blank_rows,
)
from tunesmith.data.streams import StreamParts
from tunesmith.settings.config import Config
from tunesmith.train.together import sum_over_processes


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
        by length. Of several processes, each gets its part of a step (`data.deal`)."""
        training, world_size = bool(kwargs.get("is_training")), self._args.world_size
        by_row = description == "test" or (self._trainer.compute_metrics is not None and not training)
        if by_row and isinstance(dataset, Dataset) and self.batching.by_row.read is documents_of:
            dataset = by_document(dataset)
        # By default, one process would read a stream, and cut its batches into parts for the others.
        self._trainer.accelerator.dataloader_config.dispatch_batches = False
        if self._args.max_tokens_per_batch is not None and not by_row:
            return self._token_loader(dataset, training)
        grouped = self.batching.grouped or ("prefix" if self.batching.shares and not training else None)
        if grouped is not None and isinstance(dataset, Dataset):
            step = batch_size * world_size * (self._args.gradient_accumulation_steps if training else 1)
            if by_row:
                kwargs["sampler_fn"] = SequentialSampler
            elif grouped == "prefix":
                seed = self._seed if training else None
                kwargs["sampler_fn"] = partial(PrefixGroups, batch_size=batch_size, seed=seed)
            else:
                kwargs["sampler_fn"] = partial(self._length_groups, batch_size=step)
        with self._collating_by(self.batching.by_row if by_row and not self.batching.is_custom else None):
            if isinstance(dataset, StreamParts):
                summed, drop_last = sum_over_processes(self._args), self._args.dataloader_drop_last
                of_parts = StepParts(dataset, self._share(training), batch_size, summed, drop_last=drop_last)
                return self._dealt(of_parts, None, description, training=training)
            if world_size > 1 and isinstance(dataset, IterableDataset):
                drop_last = self._args.dataloader_drop_last
                share = self._share(training)
                stream = StepStream(dataset, share, batch_size, drop_last=drop_last, in_order=not training)
                return self._dealt(stream, None, description, training=training)
            if world_size > 1 and isinstance(dataset, Dataset) and training:
                return self._dealt(
                    dataset, self._row_sampler(dataset, batch_size, **kwargs), description, training=True
                )
            if world_size > 1 and isinstance(dataset, Dataset):
                dataset = with_blank_rows(dataset, world_size * batch_size)
            return register_sampler(plain(dataset, description, batch_size, **kwargs))

    def in_parts(self, dataset: Any) -> Any:
        """A data set to train on; of a stream that is read in parts, those of this process."""
        args = self._args
        if args.stream_parts == 1 or not isinstance(dataset, IterableDataset):
            return dataset
        return StreamParts(dataset, args.stream_parts, rank=args.process_index, processes=args.world_size)

    @contextmanager
    def _collating_by(self, collator: Collator | None) -> Iterator[None]:
        before: Any = self._trainer.data_collator
        self._trainer.data_collator = cast(Any, collator or before)
        try:
            yield
        finally:
            self._trainer.data_collator = before

    # Several processes

    def _share(self, training: bool) -> Share:
        args = self._args
        return Share(
            rank=args.process_index,
            processes=args.world_size,
            accumulation=args.gradient_accumulation_steps if training else 1,
            padded=self.batching.padded,
        )

    def _row_sampler(self, dataset: Dataset, batch_size: int, **kwargs: Any) -> StepSampler:
        named = "input_ids" in dataset.column_names
        lengths = lengths_of(dataset, padded=self.batching.padded) if named else np.ones(len(dataset), np.int64)
        sampler, drop_last = kwargs["sampler_fn"](dataset), self._args.dataloader_drop_last
        return StepSampler(sampler, lengths, self._share(training=True), rows=batch_size, drop_last=drop_last)

    def _dealt(self, dataset: Any, batches: StepSampler | None, description: str, *, training: bool) -> Any:
        """The loader of what is dealt to this process: `accelerate` divides nothing more."""
        trainer, args = self._trainer, self._args
        collate: Any = trainer.data_collator
        if isinstance(dataset, Dataset):
            dataset = trainer._remove_unused_columns(dataset, description=description)
            collate = BlankCollator(collate=collate, row=blank_of(dataset.with_format(None)[0]))
        else:
            collate = BlankCollator(collate=trainer._get_collator_with_removed_columns(collate, description))
        return self.of_this_process(batch_loader(dataset, batches, collate, args, training=training))

    def of_this_process(self, loader: Any) -> Any:
        """`loader`, of which `accelerate` divides nothing more."""
        accelerator = self._trainer.accelerator
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=accelerator.device_placement,
            dispatch_batches=False,
            use_seedable_sampler=True,  # without it, processes would draw orders of their own
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
        )

    # Batches by tokens

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
        )

    def _token_loader(self, dataset: Any, training: bool) -> Any:
        batches = self.token_batches(dataset, training)
        if training:
            self._mean_rows = len(dataset) / len(batches)
        if self._args.world_size > 1:
            lengths = lengths_of(dataset, padded=self.batching.padded)
            sampler = StepSampler(batches, lengths, self._share(training))
            return self._dealt(dataset, sampler, "training" if training else "evaluation", training=training)
        names = [name for name in dataset.column_names if name in self.batching.columns]
        dataset = dataset.select_columns(names) if self._args.remove_unused_columns else dataset
        loader = batch_loader(dataset, batches, self._trainer.data_collator, self._args, training=training)
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
