"""Lists of numbers in flat arrays: what takes the least time and memory, and what an Arrow table is made of.

A list column is its offsets (N + 1,), which begin at 0, and its values (T,): list `i` is
`values[offsets[i]:offsets[i + 1]]`. Letters: N examples, T tokens of all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from tunesmith.types import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatExamples:
    """N examples: lengths (N,), ids, labels and weights (T,); weights None when every supervised token weighs 1.
    `scores` (T,) repeat that of an example for each of its tokens, so that packs keep it; None when all are 0.

    `parts` are the segments of all examples, P of them: how many each example has (N,), their lengths (P,) and parents
    (P,). None when every example is one document.
    """

    lengths: Any
    ids: Any
    labels: Any
    weights: Any
    parts: tuple[Any, Any, Any] | None = None
    scores: Any = None

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "FlatExamples":
        def flat(lists: Iterable[list[Any]], dtype: Any) -> Any:
            return np.fromiter(chain.from_iterable(lists), dtype)

        weights = None
        if any(example.weights is not None for example in examples):
            weights = flat((example.weights or [1.0] * len(example.labels) for example in examples), np.float32)
        scores = None
        if any(example.score for example in examples):
            scores = np.repeat(
                np.array([example.score for example in examples], np.float32),
                [len(example.labels) for example in examples],
            )
        parts = None
        if any(example.parts is not None for example in examples):
            trees = [example.parts or ([len(example.labels)], [-1]) for example in examples]
            sizes = np.array([len(lengths) for lengths, _ in trees], np.int64)
            lengths, parents = (flat((tree[i] for tree in trees), np.int32) for i in (0, 1))
            parts = sizes, lengths, parents
        return cls(
            parts=parts,
            lengths=np.array([len(example.labels) for example in examples], np.int64),
            ids=flat((example.input_ids for example in examples), np.int32),
            labels=flat((example.labels for example in examples), np.int32),
            weights=weights,
            scores=scores,
        )

    def table(self) -> Any:
        """An Arrow table of `input_ids`, `labels`, `weights`, `scores`, `seq_lengths` and `parents`; the last four have
        a null for each example where there are none."""
        import pyarrow as pa

        offsets = np.concatenate([[0], self.lengths]).cumsum()
        numbers = {
            name: pa.nulls(len(self.lengths), pa.list_(pa.float32())) if values is None else list_array(offsets, values)
            for name, values in (("weights", self.weights), ("scores", self.scores))
        }
        columns = {"input_ids": list_array(offsets, self.ids), "labels": list_array(offsets, self.labels)}
        if self.parts is None:
            trees = {name: pa.nulls(len(self.lengths), pa.list_(pa.int32())) for name in ("seq_lengths", "parents")}
        else:
            bounds = np.concatenate([[0], self.parts[0]]).cumsum()
            trees = {"seq_lengths": list_array(bounds, self.parts[1]), "parents": list_array(bounds, self.parts[2])}
        return pa.table(columns | numbers | trees)


def list_array(offsets: Any, values: Any) -> Any:
    """An Arrow array of lists."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def list_column(table: Any, name: str) -> tuple[Any, Any]:
    """The list column `name` of examples, in a table or a record batch: offsets (N + 1,) and values (T,).

    An example whose `weights` are null has a weight of 1 for each of its tokens; one without `scores` has 0.
    """
    import pyarrow as pa

    column = table.column(name)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if column.null_count:
        offsets, _ = list_column(table, "input_ids")
        values = np.full(offsets[-1], 0.0 if name == "scores" else 1.0, np.float32)
        values[np.repeat(column.is_valid().to_numpy(zero_copy_only=False), np.diff(offsets))] = column.flatten()
        return offsets, values
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], column.flatten().to_numpy()


def segments(table: Any) -> tuple[Any, Any, Any]:
    """The segments of the examples of a table: offsets (N + 1,), lengths (P,) and parents (P,). An example without any
    is one of its own."""
    sizes, names = list_lengths(table, "input_ids"), table.schema.names
    counts, known = np.ones(len(sizes), np.int64), np.zeros(len(sizes), bool)
    flat = {"seq_lengths": np.zeros(0, np.int64), "parents": np.zeros(0, np.int64)}
    for name in (name for name in flat if name in names):
        column = table.column(name).combine_chunks()
        known = column.is_valid().to_numpy(zero_copy_only=False)
        flat[name] = column.flatten().to_numpy().astype(np.int64)
        counts[known] = column.value_lengths().drop_null().to_numpy()
    offsets = np.concatenate([[0], counts.cumsum()])
    own = np.repeat(~known, counts)  # the segments that are whole examples
    lengths, parents = np.empty(offsets[-1], np.int64), np.full(offsets[-1], -1, np.int64)
    lengths[own], lengths[~own] = sizes[~known], flat["seq_lengths"]
    if len(flat["parents"]):
        parents[~own] = flat["parents"]
    return offsets, lengths, parents


def documents(table: Any) -> tuple[Any, Any]:
    """The documents of the examples of a table, or of its packs: offsets (N + 1,), and their lengths (D,).

    Each segment that no other continues ends one, which is as long as all that it continues and itself.
    """
    offsets, lengths, parents = segments(table)
    before = np.where(parents < 0, -1, parents + np.repeat(offsets[:-1], np.diff(offsets)))  # in the whole table
    ends, totals = np.ones(len(lengths), bool), lengths.copy()
    ends[before[before >= 0]] = False
    ancestor = before.copy()
    while len(inner := np.flatnonzero(ancestor >= 0)):  # as often as the deepest tree is deep
        totals[inner] += lengths[ancestor[inner]]
        ancestor[inner] = before[ancestor[inner]]
    return np.concatenate([[0], ends.cumsum()])[offsets], totals[ends]


def list_lengths(table: Any, name: str) -> Any:
    """The lengths (N,) of the lists in the column `name` of a table. No value is read."""
    import pyarrow.compute as pc

    return pc.list_value_length(table.column(name)).to_numpy().astype(np.int64)
