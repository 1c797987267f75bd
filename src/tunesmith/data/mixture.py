"""Several named sources in one training set: how often each row is used, and which rows are held out.

Everything follows from the seed and the source's name, so adding a source changes nothing in the others.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.arrow import list_array, list_column, list_lengths
from tunesmith.errors import TunesmithError
from tunesmith.text import counted, shorten

if TYPE_CHECKING:
    from datasets import Dataset


MOST_USED = 1_000_000_000
"""Examples of a source in an epoch, where it has fewer itself. Their places are in memory, some bytes each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """One source of a mixture.

    `weight` is how often each row is seen in an epoch: 2 uses every row twice, 0.5 a random half. `count` says instead
    how many rows are used. `held_out` is the share of rows (below 1) kept for evaluation, chosen before all else.
    `columns` and `text_field` are those of this source; unset, the run's.
    """

    rows: Any
    weight: float | None = None
    count: int | None = None
    held_out: float = 0.0
    columns: Mapping[str, str] | None = None
    text_field: str | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and self.count is not None:
            raise TunesmithError("a source has a weight or a count of rows, not both")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise TunesmithError(f"weight is {self.weight}; expected a number above 0, such as 2 (every row twice)")
        if self.count is not None and self.count < 1:
            raise TunesmithError(f"count is {self.count}; expected at least 1 row")
        if not 0 <= self.held_out < 1:
            raise TunesmithError(f"held_out is {self.held_out}; expected a share of rows from 0 to below 1")


def split_rows(name: str, rows: Iterable[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """`rows` in two lists, to train on and held out, each in its order; `share` of them, at least one, held out."""
    listed = list(rows)
    if not share:
        return listed, []
    if len(listed) < 2:
        raise TunesmithError(f"source {name!r} has {len(listed)} row and can't hold one out; set held_out: 0")
    count = min(len(listed) - 1, max(1, round(share * len(listed))))
    held = {int(i) for i in _generator(name, seed, "held out").permutation(len(listed))[:count]}
    return (
        [row for i, row in enumerate(listed) if i not in held],
        [row for i, row in enumerate(listed) if i in held],
    )


def epoch_examples(name: str, source: DataSource, examples: int, seed: int) -> Any:
    """Which of a source's `examples` an epoch uses (int64 indices): whole repeats and a random part of one more.

    Raises TunesmithError for more than can be held."""
    wanted = source.count if source.count is not None else examples * (source.weight or 1.0)
    if wanted > max(MOST_USED, examples):
        given = f"weight {source.weight:g}" if source.count is None else f"count {shorten(str(source.count))}"
        raise TunesmithError(
            f"source {name!r} has {counted(examples, 'example')}, of which {given} would make more than "
            f"{MOST_USED:,} in an epoch; write less, and more epochs"
        )
    repeats, rest = divmod(max(1, round(wanted)), examples)
    part = np.sort(_generator(name, seed, "used").permutation(examples)[:rest])
    return np.concatenate([np.tile(np.arange(examples), repeats), part])


def mixture_order(sizes: Mapping[str, int], sources: Mapping[str, DataSource], seed: int) -> Any:
    """The order of a mixture: indices into the sources' examples laid one after another, shuffled together."""
    parts, offset = [], 0
    for name, size in sizes.items():
        parts.append(epoch_examples(name, sources[name], size, seed) + offset)
        offset += size
    order = np.concatenate(parts)
    return order[_generator("", seed, "order").permutation(len(order))]


def concatenated(parts: Iterable["Dataset"]) -> "Dataset":
    """The examples of `parts`, one part after another. Where only some have weights, all others weigh 1."""
    from datasets import concatenate_datasets

    parts = list(parts)
    if any("weights" in part.column_names for part in parts):
        for i, part in enumerate(parts):
            if "weights" not in part.column_names:
                offsets, ids = list_column(part.data, "input_ids")
                parts[i] = part.add_column("weights", list_array(offsets, np.ones(len(ids), np.float32)))
    for name in ("seq_lengths", "parents"):
        if any(name in part.column_names for part in parts):
            parts = [_with_segments(part, name) for part in parts]
    return concatenate_datasets(parts)


def _with_segments(part: "Dataset", name: str) -> "Dataset":
    """A part with the column `seq_lengths` or `parents`, of examples that are one document each."""
    if name in part.column_names:
        return part
    values = np.full(len(part), -1) if name == "parents" else list_lengths(part.data, "input_ids")
    return part.add_column(name, list_array(np.arange(len(part) + 1), values.astype(np.int32)))


def _generator(name: str, seed: int, purpose: str) -> Any:
    return np.random.default_rng([seed, zlib.crc32(f"{purpose} {name}".encode())])
