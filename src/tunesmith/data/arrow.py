"""Examples in flat arrays: what takes the least time and memory, and what an Arrow table is made of.

Letters: D examples of a batch, T tokens of all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from tunesmith.types import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """D examples: sizes (D,), ids, labels and weights (T,); weights None when every supervised token weighs 1."""

    sizes: Any
    ids: Any
    labels: Any
    weights: Any

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Columns":
        weights = None
        if any(example.weights is not None for example in examples):
            weights = _flat((example.weights or [1.0] * len(example.labels) for example in examples), np.float32)
        return cls(
            sizes=np.array([len(example.labels) for example in examples], np.int64),
            ids=_flat((example.input_ids for example in examples), np.int32),
            labels=_flat((example.labels for example in examples), np.int32),
            weights=weights,
        )


def _flat(values: Iterable[list[Any]], dtype: Any) -> Any:
    return np.fromiter(chain.from_iterable(values), dtype)


def table(columns: Columns) -> Any:
    """An Arrow table with `input_ids`, `labels` and `weights`, a null for each example when there are no weights."""
    import pyarrow as pa

    offsets = pa.array(np.concatenate([[0], columns.sizes]).cumsum(dtype=np.int32))

    def lists(flat: Any) -> Any:
        return pa.ListArray.from_arrays(offsets, pa.array(flat))

    weights = pa.nulls(len(columns.sizes), pa.list_(pa.float32()))
    return pa.table(
        {
            "input_ids": lists(columns.ids),
            "labels": lists(columns.labels),
            "weights": weights if columns.weights is None else lists(columns.weights),
        }
    )


def flat_weights(lists: Any, sizes: Any) -> Any:
    """The `weights` column of examples of `sizes` (D,) as flat values (T,): 1 wherever an example has null."""
    values = np.ones(int(sizes.sum()), np.float32)
    values[np.repeat(lists.is_valid().to_numpy(zero_copy_only=False), sizes)] = lists.flatten()
    return values
