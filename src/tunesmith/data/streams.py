"""Streams whose place is small enough for a checkpoint: shuffled in a buffer, and read in parts, by file.

`datasets` lets go of the rows in a shuffle buffer when it goes on from a state, and its buffer may hold a row for any
time. In the buffer here no row waits for longer than two blocks, so that the place is the state of the source where the
older block begins, and two numbers. With a buffer of 8 rows, a block has 4:

    blocks       a b c d | e f g h | i j
    that stay    b d     | e h     | j         half of each block, drawn
    that wait    a c     | f g     | i
    given        d b     | h a e c | g j f | i         what has waited and what stays, shuffled
"""

from collections.abc import Iterator
from copy import copy, deepcopy
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset
from datasets.iterable_dataset import BufferShuffledExamplesIterable, _BaseExamplesIterable


class ShuffledExamples(_BaseExamplesIterable):
    """The examples of `ex_iterable`, each at most `buffer_size` places from where it was, in an order that follows from
    `generator` as it is given. At most so many are in memory; where it goes on from a state, at most so many are read
    again."""

    _state_dict: dict[str, Any] | None

    def __init__(self, ex_iterable: Any, buffer_size: int, generator: np.random.Generator) -> None:
        super().__init__()
        self.ex_iterable, self.buffer_size, self.generator = ex_iterable, buffer_size, generator

    def _init_state_dict(self) -> dict[str, Any]:
        self.ex_iterable._init_state_dict()
        # `source`: the state of the source where the block before the present one begins.
        state = {"source": None, "block": 0, "given": 0, "type": type(self).__name__}
        self._state_dict = state
        return state

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        state = self._state_dict
        block, given, before = (state["block"], state["given"], state["source"]) if state else (0, 0, None)
        if before is not None:
            self.ex_iterable.load_state_dict(before)
        source, size = iter(self.ex_iterable), max(1, self.buffer_size // 2)
        seed = int(deepcopy(self.generator).integers(1 << 63))

        def read(number: int) -> tuple[list[Any], list[Any]]:
            """The examples of a block that stay, and those that wait for the next one."""
            rows = list(islice(source, size))
            drawn = np.random.default_rng([seed, number, 0]).permutation(len(rows))
            cut = -(-len(rows) // 2)
            return [rows[i] for i in drawn[:cut]], [rows[i] for i in drawn[cut:]]

        waiting = read(block - 1)[1] if block else []
        while True:
            here = self.ex_iterable.state_dict() if state else None
            staying, waiting_next = read(block)
            rows = waiting + staying
            if not rows:
                return
            order = np.random.default_rng([seed, block, 1]).permutation(len(rows))
            for i in order[given:]:
                given += 1
                if state:
                    state["given"] = given
                yield rows[i]
            block, given, before, waiting = block + 1, 0, here, waiting_next
            if state:
                state |= {"source": before, "block": block, "given": given}

    # What every iterable of `datasets` can do

    def _of(self, ex_iterable: Any, generator: np.random.Generator | None = None) -> "ShuffledExamples":
        return ShuffledExamples(ex_iterable, self.buffer_size, generator or self.generator)

    def shift_rngs(self, value: int) -> "ShuffledExamples":
        drawn = int(deepcopy(self.generator).integers(1 << 63))
        return self._of(self.ex_iterable, np.random.default_rng([drawn, value]))

    def shuffle_data_sources(self, generator: np.random.Generator) -> "ShuffledExamples":
        return self._of(self.ex_iterable.shuffle_data_sources(generator))

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> "ShuffledExamples":
        return self._of(self.ex_iterable.shard_data_sources(num_shards, index, contiguous=contiguous))

    def reshard_data_sources(self) -> "ShuffledExamples":
        return self._of(self.ex_iterable.reshard_data_sources())

    @property
    def num_shards(self) -> int:
        return int(self.ex_iterable.num_shards)

    @property
    def is_typed(self) -> bool:
        return bool(self.ex_iterable.is_typed)

    @property
    def features(self) -> Any:
        return self.ex_iterable.features


def resumable(stream: IterableDataset) -> IterableDataset:
    """`stream`, where `datasets` would shuffle it in a buffer, shuffled in one of that size whose place can be kept."""
    if not has_buffer(stream._ex_iterable):
        return stream
    return IterableDataset(
        _with_own_buffers(stream._ex_iterable),
        info=stream.info.copy(),
        split=stream.split,
        formatting=stream._formatting,
        distributed=stream._distributed,
        token_per_repo_id=stream._token_per_repo_id,
    )


def has_buffer(node: Any) -> bool:
    """Whether a step of a stream, or one before it, is a shuffle buffer of `datasets`."""
    return isinstance(node, BufferShuffledExamplesIterable) or any(map(has_buffer, _before(node)))


def _before(node: Any) -> list[Any]:
    """The steps of a stream whose examples `node` takes."""
    inner = getattr(node, "ex_iterable", None)
    return [*(getattr(node, "ex_iterables", None) or ()), *(() if inner is None else (inner,))]


def _with_own_buffers(node: Any) -> Any:
    if getattr(getattr(node, "formatting", None), "is_table", False):
        return node  # takes tables, which only the buffer of `datasets` gives
    node = copy(node)
    if hasattr(node, "ex_iterables"):
        node.ex_iterables = [_with_own_buffers(inner) for inner in node.ex_iterables]
    if hasattr(node, "ex_iterable"):
        node.ex_iterable = _with_own_buffers(node.ex_iterable)
    if isinstance(node, BufferShuffledExamplesIterable):
        return ShuffledExamples(node.ex_iterable, node.buffer_size, node.generator)
    return node


class StreamParts:
    """A stream in `count` parts of whole files, of which this process reads every `processes`th from `rank` on."""

    def __init__(self, stream: IterableDataset, count: int, *, rank: int, processes: int) -> None:
        self.whole, self._rank, self._processes = stream, rank, processes
        self.count = count
        self.own: list[IterableDataset] = [stream.shard(count, i) for i in range(rank, count, processes)]

    def set_epoch(self, epoch: int) -> None:
        for part in self.own:
            part.set_epoch(epoch)

    def state_dict(self) -> list[Any]:
        """The state of each part that this process reads."""
        return [part.state_dict() for part in self.own]

    def load_state_dict(self, states: list[Any]) -> None:
        """Of all parts, in order."""
        for part, state in zip(self.own, states[self._rank :: self._processes], strict=True):
            part.load_state_dict(state)
