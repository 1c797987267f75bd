"""Where in a stream a run is, so that it can go on there."""

from collections.abc import Callable
from typing import Any

from datasets import IterableDataset

from tunesmith.settings.config import SFTConfig


class StreamPlace:
    """Notes the state of a stream after each micro-batch, as the collator of its loader.

    A loader reads ahead, so the state that belongs to a checkpoint is not the last one: states are kept until the
    micro-batch after them has been trained on.
    """

    def __init__(self, stream: IterableDataset, collate: Callable[..., Any]) -> None:
        self._stream, self._collate = stream, collate
        self._read = 0
        self._states: dict[int, Any] = {}

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self._read += 1
        self._states[self._read] = self._stream.state_dict()
        return self._collate(rows)

    def start(self, batches: int) -> None:
        """An epoch begins, of which `batches` were read before."""
        self._read = batches
        self._states = {}

    def after(self, batches: int) -> Any:
        """The state after so many micro-batches of the epoch; None where none was read. Earlier ones are forgotten."""
        self._states = {number: state for number, state in self._states.items() if number >= batches}
        return self._states.get(batches)


def reason_to_skip(stream: IterableDataset, args: SFTConfig) -> str | None:
    """Why the place in `stream` can't be kept, so that a resumed run reads again what it has read; None where it can.

    A shuffle buffer's rows are in memory only, and what worker processes and other ranks read is not known here.
    """
    if args.world_size > 1:
        return "several processes share it"
    if args.dataloader_num_workers > 0:
        return "dataloader_num_workers is set"
    if getattr(stream, "_formatting", None) is not None:
        return "it has a format"
    if _has_buffer(stream._ex_iterable):
        return "it is shuffled in a buffer"
    return None


def _has_buffer(iterable: Any) -> bool:
    inner = [getattr(iterable, "ex_iterable", None), *(getattr(iterable, "ex_iterables", None) or [])]
    return "BufferShuffled" in type(iterable).__name__ or any(_has_buffer(item) for item in inner if item is not None)
