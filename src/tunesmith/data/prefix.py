"""Documents that begin with the same tokens: a tree of what they share, and how a flat row then looks.

A system prompt, tool schemas, or the turns of a conversation before the one that is trained are the same tokens at the
same positions, so in a causal model they have the same hidden states. They become one segment of the row, and what
follows them one segment each, whose tokens attend to all segments that it continues and to themselves:

    documents  [a b c d]  [a b c e f]  [a b c e g h]  [x y]
    segments   [a b c]  [e]  [g h]  [f]  [d]  [x y]     parents  -1  0  1  1  0  -1

Everything here is pure and needs no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import numpy as np

SAVES = 0.1
"""The share of a batch's tokens that sharing must save to be worth its smaller pieces of attention."""
WORTH = 8
"""So many tokens a segment of its own must save: each is a part of the keys of all that continue it. On one thread of a
CPU, segments below a common prompt of 300 tokens took no longer from 4 tokens on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """A flat row of documents that share prefixes.

    `tokens` (T,) and `positions` (T,) of the row; `lengths` (S,) of its segments; `parents` (S,), the segment that a
    segment continues, always one before it, or -1; `places`, for each document the places of its tokens in the row.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)

    def add(self, tokens: Sequence[int], parent: int = -1, begin: int = 0) -> list[int]:
        """A further segment, of tokens whose positions start at `begin`; returns their places."""
        start = len(self.tokens)
        self.tokens.extend(tokens)
        self.positions.extend(range(begin, begin + len(tokens)))
        self.lengths.append(len(tokens))
        self.parents.append(parent)
        return list(range(start, start + len(tokens)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Branch:
    """Documents whose first `begin` tokens are placed, at `front`, of which the last are in segment `parent`."""

    members: list[int]
    begin: int = 0
    parent: int = -1
    front: list[int] = field(default_factory=list)


def flat_row(groups: Iterable[Sequence[Sequence[int]]], *, across: bool) -> Segments | None:
    """The row in which the documents of a group share their prefixes, and with `across` all documents, where that saves
    enough. None where nothing is shared."""
    groups = [*groups]
    documents = [*chain.from_iterable(groups)]
    if across and (row := share_prefixes(documents)) is not None:
        return row
    if all(len(group) == 1 for group in groups):
        return None
    row, first = Segments(places=[[] for _ in documents]), 0
    for group in groups:
        _grow(row, documents, [*range(first, first + len(group))])
        first += len(group)
    return row if len(row.tokens) < sum(map(len, documents)) else None


def share_prefixes(documents: Sequence[Sequence[int]], saves: float = SAVES) -> Segments | None:
    """The row in which documents share their prefixes, or None where that would save too little of their tokens."""
    row = Segments(places=[[] for _ in documents])
    _grow(row, documents, [*range(len(documents))])
    total = sum(map(len, documents))
    return row if total - len(row.tokens) > saves * total else None


def _grow(row: Segments, documents: Sequence[Sequence[int]], members: list[int]) -> None:
    """Add the tree of these documents to the row.

    In lexical order, neighbours are those with the longest common prefixes: what a run of neighbours shares is the
    least that two of them do. A run is divided where they share no more than that.
    """
    members = sorted(members, key=lambda i: list(documents[i]))
    arrays = {i: np.asarray(documents[i], np.int64) for i in members}
    common = {i: _common(arrays[before], arrays[i]) for before, i in pairwise(members)}
    branches = [_Branch(members=members)]
    while branches:
        branch = branches.pop()
        members, begin, parent, front = branch.members, branch.begin, branch.parent, branch.front
        stop = min((common[i] for i in members[1:]), default=len(arrays[members[0]]))
        if stop > begin and (stop - begin) * (len(members) - 1) >= (WORTH if len(members) > 1 else 0):
            front = front + row.add(documents[members[0]][begin:stop], parent, begin)
            parent, begin = len(row.lengths) - 1, stop
        if len(members) == 1:
            row.places[members[0]] = front
            continue
        runs = [[members[0]]]
        for i in members[1:]:
            if common[i] == stop:
                runs.append([])
            runs[-1].append(i)
        # What leads to the longest document comes next, so that all of that one lies in a piece (`model.attention`).
        runs.sort(key=lambda run: -max(len(arrays[i]) for i in run))
        branches += [_Branch(members=run, begin=begin, parent=parent, front=front) for run in reversed(runs)]


def _common(one: Any, two: Any) -> int:
    """How many tokens two arrays begin with alike."""
    size = min(len(one), len(two))
    differ = np.flatnonzero(one[:size] != two[:size])
    return int(differ[0]) if len(differ) else size


def paths(parents: Sequence[int]) -> list[list[int]]:
    """Of each segment that no other continues, the segments from its root to itself: a document each."""
    inner = {*parents}
    found = []
    for leaf in range(len(parents)):
        if leaf not in inner:
            path = [leaf]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            found.append(path[::-1])
    return found
