"""Examples to batches: documents side by side without padding, or padded rows for models that can't take those.

A collator makes a `Batch` once; whoever needs its documents, its tokens, its supervised weight or its groups asks it.

Shapes: B padded rows, T tokens of a row, L tokens of all documents (more than T where they share prefixes), D
documents, S supervised positions. Labels stay unshifted in a batch; `Batch.targets` shifts them, the only place that
does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, chain
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.data.prefix import SAVES, flat_row, paths, share_prefixes
from tunesmith.errors import TunesmithError
from tunesmith.types import IGNORE_INDEX, Example

Row: TypeAlias = Mapping[str, Any]
Group: TypeAlias = tuple[Example, ...]
"""Documents that belong together: one example alone, a pair, the answers to one prompt. A group is never divided."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Targets:
    """Where predictions are wanted: indices (S,) into the B*T flattened positions, the tokens that follow there (S,),
    and their weights (S,), None for ones."""

    positions: Tensor
    tokens: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """A micro-batch: what the model reads, and which documents it is made of.

    Flat: `input_ids` and `position_ids` (1, T), `lengths` the tokens of each part of the row. The parts are the
    documents, or with shared prefixes the segments; `parents` says for each which one it continues, -1 for none
    (`data.prefix`). Padded: `input_ids`, `position_ids` and `attention_mask` (B, T), no `lengths`.

    `labels` and `weights` are (1, L) in flat batches, those of all documents one after another, and `places` (L,) says
    where in the row each of their tokens is, where prefixes are shared; in padded ones they are (B, T). The label of a
    document's first token is IGNORE_INDEX: nothing in its document predicts it.

    `groups` are the documents, in the order of the batch; empty where a collator of the user's made it. `more` holds
    what such a collator adds for the model. A `blank` stands in for rows that a process does not get (`data.deal`), and
    counts for nothing.

    As `transformers` and a user's loss read it, a batch is a mapping of its tensors: `batch["labels"]`, `**batch`.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    weights: Tensor | None = None
    places: Tensor | None = None
    lengths: Sequence[int] | None = None
    parents: Sequence[int] | None = None
    groups: tuple[Group, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    blank: bool = False

    @classmethod
    def of(cls, tensors: Mapping[str, Any]) -> "Batch":
        """The batch that a collator of the user's returned as a dictionary with `input_ids` and `labels`.

        Raises:
            TunesmithError: one of them is missing.
        """
        if missing := [name for name in ("input_ids", "labels") if name not in tensors]:
            raise TunesmithError(
                f"data_collator returned {', '.join(tensors) or 'nothing'}, without {' and '.join(missing)}; a batch "
                "needs input_ids and labels, both of shape (rows, tokens)"
            )
        known = {item.name for item in fields(cls)} - {"more", "groups", "blank"}
        return cls(
            **{name: value for name, value in tensors.items() if name in known},
            more={name: value for name, value in tensors.items() if name not in known},
        )

    # What it is made of

    @property
    def documents(self) -> tuple[Example, ...]:
        """Its D documents, in the order of the supervised positions."""
        return tuple(chain.from_iterable(self.groups))

    @property
    def computed_tokens(self) -> int:
        """The tokens that go through the model: padding counts, and what documents share is there once."""
        return self.input_ids.numel()

    @property
    def tokens(self) -> Tensor | int:
        """The tokens of all documents, without padding; a scalar where only the device knows."""
        if self.blank:
            return 0
        return self.labels.numel() if self.attention_mask is None else self.attention_mask.sum()

    @property
    def supervised(self) -> Tensor:
        """How many tokens are supervised (a scalar)."""
        return self._learned.sum()

    @property
    def _learned(self) -> Tensor:
        """Which positions but the first of a row have a label."""
        return self.labels[..., 1:] != IGNORE_INDEX

    @property
    def weight(self) -> Tensor:
        """The weight of all supervised tokens (a scalar): their number, where none has a weight of its own."""
        if self.weights is None:
            return self.supervised
        return (self.weights[..., 1:] * self._learned).sum()

    def targets(self) -> Targets:
        """Where the loss is taken. Position t predicts the label of t + 1; the first label of a row is never a target,
        nor is that of a document."""
        shifted = nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
        positions = (shifted != IGNORE_INDEX).nonzero()[:, 0]
        weights = None
        if self.weights is not None:
            weights = nn.functional.pad(self.weights[:, 1:], (0, 1)).reshape(-1)[positions]
        places = positions if self.places is None else self.places[positions]
        return Targets(positions=places, tokens=shifted[positions], weights=weights)

    def by_document(self, values_S: Tensor) -> list[Tensor]:
        """Values of the supervised positions, such as log-probabilities, as one tensor for each document."""
        sizes = [example.target_count for example in self.documents]
        return list(values_S.split(sizes))

    def ends(self) -> Tensor:
        """(D,) Where each document has its last label, in the B*T flattened positions; of one without labels, its last
        token."""
        ends, start = list[int](), 0
        for row, example in enumerate(self.documents):
            size = len(example.input_ids)
            last = next((i for i in range(size - 1, -1, -1) if example.labels[i] != IGNORE_INDEX), size - 1)
            ends.append(last + (row * self.input_ids.shape[1] if self.lengths is None else start))
            start += size
        places = torch.tensor(ends, device=self.input_ids.device)
        return places if self.places is None else self.places[places]

    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward."""
        own = ("input_ids", "position_ids", "attention_mask", "lengths", "parents")
        present = {name: getattr(self, name) for name in own}
        return {**self.more, **{name: value for name, value in present.items() if value is not None}}

    # On its way through a loader and `transformers`

    def as_blank(self) -> "Batch":
        return replace(self, blank=True)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        moved = {name: change(tensor) for name, tensor in self.tensors().items()}
        more = {name: moved.pop(name, value) for name, value in self.more.items()}
        return replace(self, more=more, **moved)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)} | dict(self.more)
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def keys(self) -> Iterable[str]:
        return self.tensors().keys()

    def get(self, name: str, default: Any = None) -> Any:
        return self.tensors().get(name, default)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors()[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors())

    def items(self) -> Iterable[tuple[str, Tensor]]:
        return self.tensors().items()


# Rows to documents


def groups_of(row: Row) -> list[Group]:
    """The documents of a prepared row by groups. A packed row holds several, `seq_lengths` tokens each; where it has
    `parents`, these are segments, and the documents of a tree of them are a group (`data.prefix`), in the order in
    which they begin to be supervised: that of the turns. Without `labels`, all tokens are supervised."""
    return [tuple(sorted(group, key=_first_label) if len(group) > 1 else group) for group in _trees(row)]


def _trees(row: Row) -> list[list[Example]]:
    """The documents of each tree of segments of a prepared row, in the order of their last segments."""
    ids = _list(row["input_ids"])
    columns = {name: row.get(name) for name in ("labels", "weights", "scores", "reference", "seq_lengths", "parents")}
    labels = ids if columns["labels"] is None else _list(columns["labels"])
    weights, scores, reference = (
        None if columns[name] is None else _list(columns[name]) for name in ("weights", "scores", "reference")
    )
    lengths = [len(ids)] if columns["seq_lengths"] is None else _list(columns["seq_lengths"])
    parents = [-1] * len(lengths) if columns["parents"] is None else _list(columns["parents"])
    stops = list(accumulate(lengths))
    starts, learned = [0, *stops[:-1]], set[int]()
    groups: dict[int, list[Example]] = {}
    for path in paths(parents):
        parts = [slice(starts[segment], stops[segment]) for segment in path]
        own: list[int] = []
        for segment, part in zip(path, parts, strict=True):  # what documents share is learned once, in the first
            own += [IGNORE_INDEX] * lengths[segment] if segment in learned else labels[part]
            learned.add(segment)
        example = Example(
            input_ids=[*chain.from_iterable(ids[part] for part in parts)],
            # Nothing in its document predicts the first token; in a flat row its neighbour's last token would.
            labels=[IGNORE_INDEX, *own[1:]][: len(own)],
            weights=None if weights is None else [*chain.from_iterable(weights[part] for part in parts)],
            score=0.0 if scores is None or not parts[-1].stop else scores[parts[-1].stop - 1],
            reference=None if reference is None else [*chain.from_iterable(reference[part] for part in parts)],
        )
        groups.setdefault(path[0], []).append(example)
    return [*groups.values()]


def _first_label(example: Example) -> int:
    return next((i for i, label in enumerate(example.labels) if label != IGNORE_INDEX), len(example.labels))


def documents_of(row: Row) -> list[Group]:
    """The documents of a row, each a group of its own: padded rows share nothing, and can be divided."""
    return [(example,) for group in groups_of(row) for example in group]


def one_group_of(row: Row) -> list[Group]:
    """The documents of a row as one group: a row is a pair, or all answers to a prompt."""
    return [tuple(example for group in groups_of(row) for example in group)]


def pairs_of(row: Row) -> list[Group]:
    """The documents of a prepared row, or of a pack, two by two: the better answer to a prompt, and the worse one."""
    documents = [example for group in _trees(row) for example in group]
    return [*zip(documents[::2], documents[1::2], strict=True)]


def token_places(row: Row) -> list[list[int]]:
    """Where in a prepared row the tokens of each of its documents are, in the order of `pairs_of`."""
    size = len(_list(row["input_ids"]))
    lengths = [size] if row.get("seq_lengths") is None else _list(row["seq_lengths"])
    parents = [-1] * len(lengths) if row.get("parents") is None else _list(row["parents"])
    starts = [0, *accumulate(lengths)]
    return [
        [place for segment in path for place in range(starts[segment], starts[segment + 1])] for path in paths(parents)
    ]


def _list(values: Any) -> list[Any]:
    """A list of numbers as it is, or that of a tensor or an array: the data set's format is the user's choice."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


# Documents to batches


@dataclass(frozen=True, kw_only=True, slots=True)
class Collator:
    """Makes batches, as a data loader's `collate_fn`. `read` makes groups of documents of a prepared row. With
    `together`, all documents of a batch are one group, because an objective compares them with each other."""

    read: Callable[[Row], Iterable[Group]] = groups_of
    together: bool = False
    pads: ClassVar[bool] = False
    """Whether a batch costs rows x longest row."""

    def __call__(self, rows: Sequence[Row]) -> Batch:
        groups = [group for row in rows for group in self.read(row)]
        return self.batch([tuple(chain.from_iterable(groups))] if self.together else groups)

    def batch(self, groups: Sequence[Group]) -> Batch:
        """The batch of these documents."""
        raise NotImplementedError

    def cost(self, groups: Sequence[Group]) -> int:
        """The tokens that a batch of these documents computes at the most."""
        raise NotImplementedError

    def split(self, batch: Batch, most_tokens: int) -> list[Batch]:
        """`batch` in parts that compute at most `most_tokens` tokens each, or hold one group; in order."""
        if batch.computed_tokens <= most_tokens:
            return [batch]
        parts: list[list[Group]] = [[]]
        for group in batch.groups:
            if parts[-1] and self.cost([*parts[-1], group]) > most_tokens:
                parts.append([])
            parts[-1].append(group)
        return [self.batch(part) for part in parts]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatCollator(Collator):
    """All documents side by side in one row, each with positions from 0 on.

    Documents of a group share what they begin with (`data.prefix`); with `share_prefix`, and where that saves enough,
    so do all that begin alike.

    >>> batch = FlatCollator()([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    >>> batch.labels.tolist(), batch.position_ids.tolist(), batch.lengths
    ([[-100, 6, 7, -100, 9]], [[0, 1, 2, 0, 1]], [3, 2])
    """

    share_prefix: bool = False

    def batch(self, groups: Sequence[Group]) -> Batch:
        documents = [example for group in groups for example in group]
        ids = ([example.input_ids for example in group] for group in groups)
        segments = flat_row(ids, across=self.share_prefix)
        if segments is None:
            rows: dict[str, Any] = {
                "input_ids": _row(example.input_ids for example in documents),
                "position_ids": _row(range(len(example.input_ids)) for example in documents),
                "lengths": [len(example.input_ids) for example in documents],
            }
        else:
            rows = {
                "input_ids": _row([segments.tokens]),
                "position_ids": _row([segments.positions]),
                "lengths": segments.lengths,
                "parents": segments.parents,
                "places": _row(segments.places)[0],
            }
        if any(example.weights is not None for example in documents):
            rows["weights"] = _row((_weights(example) for example in documents), np.float32)
        return Batch(labels=_row(example.labels for example in documents), groups=tuple(groups), **rows)

    def regrouped(self, batches: Sequence[Batch]) -> list[Batch]:
        """As many batches of the same documents, those that begin alike together, where that saves enough, and none
        computes more than the largest did; else `batches`.

        Of a loss that is a sum over documents, gradients of all batches together stay the same.
        """
        if len(batches) < 2 or not self.share_prefix:
            return [*batches]
        before = [batch.computed_tokens for batch in batches]
        groups = [group for batch in batches for group in batch.groups]
        at_best, enough = share_prefixes([x.input_ids for group in groups for x in group]), (1 - SAVES) * sum(before)
        if at_best is None or len(at_best.tokens) > enough:
            return [*batches]
        groups.sort(key=lambda group: group[0].input_ids)
        stops = [*accumulate(len(batch.groups) for batch in batches)]
        parts = [self.batch(groups[start:stop]) for start, stop in zip([0, *stops], stops, strict=False)]
        after = [part.computed_tokens for part in parts]
        return parts if sum(after) <= enough and max(after) <= max(before) else [*batches]

    def cost(self, groups: Sequence[Group]) -> int:
        shared = flat_row(([example.input_ids for example in group] for group in groups), across=False)
        if shared is not None:
            return len(shared.tokens)
        return sum(len(example.input_ids) for group in groups for example in group)


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedCollator(Collator):
    """One row for each document, padded on the right to the longest, and on to a multiple of `multiple`.

    Padding is masked by its place, never by its id: a supervised end-of-sequence token stays supervised even where the
    same token pads.
    """

    pad_token_id: int = 0
    multiple: int = 1
    pads = True

    def batch(self, groups: Sequence[Group]) -> Batch:
        documents = [example for group in groups for example in group]
        size = self._size(documents)

        def padded(rows: Iterable[Sequence[float]], filler: float, kind: type = np.int64) -> Tensor:
            filled = [[*row, *[filler] * (size - len(row))] for row in rows]
            return _row(filled, kind).view(len(documents), size)

        return Batch(
            input_ids=padded((example.input_ids for example in documents), self.pad_token_id),
            labels=padded((example.labels for example in documents), IGNORE_INDEX),
            attention_mask=padded(([1] * len(example.input_ids) for example in documents), 0),
            position_ids=padded((range(len(example.input_ids)) for example in documents), 0),
            weights=padded((_weights(example) for example in documents), 0.0, np.float32)
            if any(example.weights is not None for example in documents)
            else None,
            groups=tuple(groups),
        )

    def cost(self, groups: Sequence[Group]) -> int:
        documents = [example for group in groups for example in group]
        return len(documents) * self._size(documents)

    def _size(self, documents: Sequence[Example]) -> int:
        """The tokens of each row."""
        return -(-max(len(example.input_ids) for example in documents) // self.multiple) * self.multiple


def _row(documents: Iterable[Iterable[float]], kind: type = np.int64) -> Tensor:
    """(1, L): values of documents one after another. `torch.tensor` would take eight times as long for a list."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(documents), kind))[None]


def _weights(example: Example) -> Sequence[float]:
    return [1.0] * len(example.input_ids) if example.weights is None else example.weights
