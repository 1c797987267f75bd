"""The place in a stream is found again without reading what was read."""

from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from tunesmith import SFTConfig
from tunesmith.train.keeper import StreamPlace, reason_to_skip


def stream(read: list[int]) -> IterableDataset:
    def note(batch: dict[str, list[int]]) -> dict[str, list[int]]:
        read.extend(batch["number"])
        return batch

    rows = Dataset.from_dict({"number": range(3000)}).to_iterable_dataset(num_shards=3)
    made: IterableDataset = rows.map(note, batched=True, batch_size=50)
    return made


def numbers(rows: list[dict[str, Any]]) -> list[int]:
    return [row["number"] for row in rows]


def test_a_loader_that_reads_ahead_goes_on_after_what_was_used() -> None:
    first = stream([])
    place = StreamPlace(first, numbers)
    batches = iter(DataLoader(first, batch_size=7, collate_fn=place))
    used = [next(batches) for _ in range(300)]
    next(batches)  # ahead
    state = place.after(300)
    read: list[int] = []
    second = stream(read)
    second.load_state_dict(state)
    rest = list(DataLoader(second, batch_size=7, collate_fn=numbers))
    assert [number for batch in (*used, *rest) for number in batch] == list(range(3000))
    assert len(read) <= 3000 - 300 * 7 + 50
    place.forget(301)
    assert place.after(301) is not None
    assert place.after(300) is None


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        (lambda made: made, {}, None),
        (lambda made: made.shuffle(seed=1).map(lambda row: row), {}, "it is shuffled in a buffer"),
        (lambda made: made.with_format("torch"), {}, "it has a format"),
        (lambda made: made, {"dataloader_num_workers": 1}, "dataloader_num_workers is set"),
    ],
)
def test_where_that_can_not_be_there_is_a_reason(change: Any, settings: dict[str, Any], reason: str | None) -> None:
    args = SFTConfig(output_dir="x", use_cpu=True, precision="fp32", **settings)
    assert reason_to_skip(change(stream([])), args) == reason
