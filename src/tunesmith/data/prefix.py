"""Documents that begin with the same tokens: which of them share their beginning, and how a flat row then looks.

A system prompt, tool schemas or a few examples in front of every row are the same tokens at the same positions, so in a
causal model they have the same hidden states. A group of documents with a common prefix becomes one segment of the
prefix and one segment each of what follows, whose tokens attend to the prefix and to themselves:

    documents  [a b c d]  [a b c e f]  [x y]
    segments   [a b c]  [d]  [e f]  [x y]        parents  -1  0  0  -1

Everything here is pure and needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

SAVES = 0.1
"""The share of a batch's tokens that sharing must save to be worth its smaller pieces of attention."""


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


def share_prefixes(documents: Sequence[Sequence[int]]) -> Segments | None:
    """The row in which documents share their prefixes, or None where that would save too little.

    Of a document, at least the last token stays its own: what comes next is predicted from there.
    """
    groups = _groups(documents)
    saved = sum((len(members) - 1) * prefix for members, prefix in groups)
    if saved <= SAVES * sum(map(len, documents)):
        return None
    segments = Segments(places=[[] for _ in documents])
    for members, prefix in groups:
        parent, front = -1, list[int]()
        if prefix:
            parent = len(segments.lengths)
            front = segments.add(documents[members[0]][:prefix])
        for member in members:
            segments.places[member] = [*front, *segments.add(documents[member][prefix:], parent, prefix)]
    return segments


def _groups(documents: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Documents by groups, each with the length of the prefix that its members share; 0 for one that stands alone.

    In lexical order, neighbours are those with the longest common prefixes; a group goes on as long as that saves more
    tokens.
    """
    order = sorted(range(len(documents)), key=lambda i: list(documents[i]))
    groups = [([i], 0) for i in order[:1]]
    for before, i in pairwise(order):
        members, prefix = groups[-1]
        longest = _common(documents[before], documents[i])
        if len(members) > 1:
            longest = min(longest, prefix)
        if longest * len(members) > prefix * (len(members) - 1):
            groups[-1] = [*members, i], longest
        else:
            groups.append(([i], 0))
    return groups


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with; at least the last of the shorter is not counted."""
    limit = min(len(one), len(two)) - 1
    for i in range(limit):
        if one[i] != two[i]:
            return i
    return max(limit, 0)
