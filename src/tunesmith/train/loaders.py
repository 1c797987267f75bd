"""The trainer's batches: flat or padded, by rows or by tokens, row by row where logits are asked for."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from tunesmith.data.dataset import COLUMNS
from tunesmith.data.samplers import (
    LengthGroups,
    TokenBatches,
    fitting_lengths,
    lengths_of,
    register_sampler,
    token_loader,
    with_blank_rows,
)
from tunesmith.settings.config import SFTConfig


class BatchingTrainer(Trainer):
    """`transformers.Trainer` with loaders of our own. Whoever extends it says, before its constructor runs, whether
    batches are flat, whether rows of like length share one, how rows are padded, and whose collator it is."""

    _flat: bool
    _grouped: bool
    _padded: Callable[..., Any]
    _custom_collator: bool
    _rows_per_batch: float | None = None

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = cast(Any, COLUMNS)

    def _get_dataloader(  # type: ignore[override]
        self, dataset: Any, description: str, batch_size: int, **kwargs: Any
    ) -> Any:
        """Metrics and predictions want logits by row, in order, so their batches are padded; the rest take the run's
        collator, and may be batches by tokens or of rows grouped by length."""
        training = bool(kwargs.get("is_training"))
        by_row = description == "test" or (self.compute_metrics is not None and not training)
        by_tokens = cast(SFTConfig, self.args).max_tokens_per_batch is not None and not by_row
        if self.args.world_size > 1 and isinstance(dataset, Dataset) and not training:
            dataset = with_blank_rows(dataset, self.args.world_size * (1 if by_tokens else batch_size))
        if by_tokens:
            return self._token_loader(dataset, training)
        if self._grouped and isinstance(dataset, Dataset):
            size = batch_size * self.args.world_size
            kwargs["sampler_fn"] = SequentialSampler if by_row else partial(self._length_groups, batch_size=size)
        collator = self.data_collator
        if by_row and not self._custom_collator:
            self.data_collator = self._padded
        try:
            return register_sampler(super()._get_dataloader(dataset, description, batch_size, **kwargs))
        finally:
            self.data_collator = collator

    def _token_batches(self, dataset: Any, training: bool) -> TokenBatches:
        args = cast(SFTConfig, self.args)
        assert args.max_tokens_per_batch is not None
        split, multiple = "train" if training else "eval", int(args.pad_to_multiple_of or 1)
        return TokenBatches(
            fitting_lengths(dataset, split, args.max_tokens_per_batch, multiple),
            args.max_tokens_per_batch,
            seed=self._data_seed if training else None,
            # How much a collator of the user's pads is not known: no more than that.
            padded=not self._flat or self._custom_collator,
            multiple_of=args.world_size,
        )

    def _token_loader(self, dataset: Any, training: bool) -> Any:
        args = cast(SFTConfig, self.args)
        batches = self._token_batches(dataset, training)
        if training:
            self._rows_per_batch = len(dataset) / len(batches)
        dataset = self._remove_unused_columns(dataset, description="train" if training else "eval")
        return register_sampler(self.accelerator.prepare(token_loader(dataset, batches, self.data_collator, args)))

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The rows of a step, from which rows per second are reported; of batches by tokens, the mean."""
        rows = super().get_total_train_batch_size(args)
        mean = self._rows_per_batch
        return rows if mean is None else round(rows / self._train_batch_size * mean)

    def _length_groups(self, dataset: Dataset, batch_size: int) -> LengthGroups:
        return LengthGroups(lengths_of(dataset), batch_size, self._data_seed)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed
