"""The place in a stream is found again without reading what was read."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, interleave_datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from tunesmith import SFTConfig
from tunesmith.data.streams import resumable
from tunesmith.errors import TunesmithError
from tunesmith.train.keeper import StreamPlace, reason_to_skip
from tunesmith.train.setup import check_data_given


def stream(read: list[int]) -> IterableDataset:
    def note(batch: dict[str, list[int]]) -> dict[str, list[int]]:
        read.extend(batch["number"])
        return batch

    rows = Dataset.from_dict({"number": range(3000)}).to_iterable_dataset(num_shards=3)
    made: IterableDataset = rows.map(note, batched=True, batch_size=50)
    return made


def numbered() -> Iterator[dict[str, int]]:
    return ({"number": number} for number in range(1000))


def tables(made: IterableDataset) -> IterableDataset:
    """Shuffles whose rows go on as tables, in a stream that does not tell."""
    shuffled = made.with_format("arrow").shuffle(seed=1).map(lambda table: table)
    return interleave_datasets([shuffled, shuffled])


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
        (lambda made: made.shuffle(seed=1).map(lambda row: row), {}, None),
        (tables, {}, "tables of it are shuffled in a buffer"),
        (lambda made: made.with_format("torch"), {}, "it has a format"),
        (lambda made: made, {"dataloader_num_workers": 1}, "dataloader_num_workers is set"),
    ],
)
def test_where_that_can_not_be_there_is_a_reason(change: Any, settings: dict[str, Any], reason: str | None) -> None:
    args = SFTConfig(output_dir="x", use_cpu=True, precision="fp32", **settings)
    assert reason_to_skip(resumable(change(stream([]))), args) == reason


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_shuffle_goes_on_exactly_and_reads_no_more_than_its_buffer_again(epoch: int, batched: bool) -> None:
    def shuffled(read: list[int]) -> IterableDataset:
        rows = Dataset.from_dict({"number": range(700)}).to_iterable_dataset(num_shards=7)

        def note(row: dict[str, int]) -> dict[str, int]:
            read.append(row["number"])
            return row

        made = rows.map(note).shuffle(seed=3, buffer_size=40)
        made = resumable(made.map(lambda batch: batch, batched=True, batch_size=16) if batched else made)
        made.set_epoch(epoch)
        return made

    whole = numbers(list(shuffled([])))
    assert sorted(whole) == [*range(700)]
    assert whole != sorted(whole)
    for place in (1, 9, 10, 11, 57, 640, 699, 700):
        first = shuffled([])
        before = numbers([*islice(first, place)])
        read: list[int] = []
        second = shuffled(read)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert before + numbers(list(second)) == whole
        assert (
            len(read) <= 700 - place + 40 + (16 if batched else 0) + 2 * 7
        )  # and the neighbours that files read ahead


def test_epochs_differ_and_rows_stay_near() -> None:
    def order(epoch: int) -> list[int]:
        made = resumable(IterableDataset.from_generator(numbered).shuffle(seed=3, buffer_size=40))
        made.set_epoch(epoch)
        return numbers(list(made))

    assert order(0) == order(0) != order(1)
    assert max(abs(place - number) for place, number in enumerate(order(0))) in range(20, 41)


def test_a_stream_that_processes_would_read_in_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    settings: dict[str, Any] = {"output_dir": "x", "use_cpu": True, "precision": "fp32", "max_steps": 1}
    with pytest.raises(TunesmithError, match="split by `split_dataset_by_node`"):
        check_data_given(SFTConfig(**settings), split_dataset_by_node(stream([]), rank=0, world_size=2))
    with pytest.raises(TunesmithError, match="which 2 processes can't share evenly; write a multiple of 2"):
        check_data_given(SFTConfig(**settings, stream_parts=3), stream([]))
