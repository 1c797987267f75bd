"""A step's rows, dealt out to processes."""

from typing import Any

import numpy as np
import pytest
from torch.utils.data import SequentialSampler

from tunesmith.data.batches import FlatCollator
from tunesmith.data.deal import BlankCollator, Share, StepSampler, StepStream, blank_of, evenly, halved
from tunesmith.data.samplers import TokenBatches


def shares(processes: int, **options: Any) -> list[Share]:
    return [Share(rank=rank, processes=processes, **options) for rank in range(processes)]


def test_the_example_of_the_module() -> None:
    costs = np.array([9, 4, 4, 3, 2])
    dealt = [[costs[batch].tolist() for batch in share.of_rows(costs, 2)] for share in shares(2, accumulation=2)]
    assert dealt == [[[9], [2]], [[4, 3], [4]]]


def test_processes_get_near_the_same_tokens() -> None:
    draw = np.random.default_rng(0)
    for _ in range(100):
        costs = draw.integers(20, 1024, 32)
        parts = evenly(costs, 4, 8)
        assert sorted(np.concatenate(parts).tolist()) == list(range(32))
        assert [len(part) for part in parts] == [8] * 4
        sums = [costs[part].sum() for part in parts]
        assert max(sums) - min(sums) <= 0.02 * np.mean(sums)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 7, 12, 13, 25])
def test_a_row_is_dealt_once_and_all_take_part_in_each_micro_batch(rows: int, processes: int, padded: bool) -> None:
    costs, numbers = np.arange(1, rows + 1) * 3 % 17 + 1, range(rows)
    dealt = [
        list(StepSampler(SequentialSampler(numbers), costs, share, rows=2))
        for share in shares(processes, accumulation=2, padded=padded)
    ]
    sampler = StepSampler(SequentialSampler(numbers), costs, shares(processes)[0], rows=2)
    assert {len(batches) for batches in dealt} == {-(-rows // (2 * processes))} == {len(sampler)}
    assert max(len(batch) for batches in dealt for batch in batches) <= 2
    assert sorted(row for batches in dealt for batch in batches for row in batch) == list(numbers)
    step = 4 * processes
    first = sorted(row for batches in dealt for batch in batches[:2] for row in batch)
    assert first == list(range(min(rows, step)))


def test_padded_rows_of_like_length_share_a_batch() -> None:
    costs = np.array([9, 1, 8, 2, 7, 3, 6, 4])
    dealt = [[sorted(costs[batch].tolist()) for batch in share.of_rows(costs, 2)] for share in shares(2, padded=True)]
    assert dealt == [[[8, 9], [1, 2]], [[6, 7], [3, 4]]]


@pytest.mark.parametrize("processes", [2, 3])
def test_batches_by_tokens_are_the_same_for_any_number_of_processes(processes: int) -> None:
    lengths = np.random.default_rng(1).integers(10, 200, 40)
    batches = list(TokenBatches(lengths, 400, seed=0))
    assert len(batches) % processes
    dealt = [
        list(StepSampler(TokenBatches(lengths, 400, seed=0), lengths, share))
        for share in shares(processes, accumulation=2)
    ]
    assert {len(part) for part in dealt} == {-(-len(batches) // processes)}
    for first in range(0, len(dealt[0]), 2):
        step = sorted(row for part in dealt for batch in part[first : first + 2] for row in batch)
        expected = batches[first * processes : (first + 2) * processes]
        assert step == sorted(row for batch in expected for row in batch)


def test_only_the_last_batches_are_halved() -> None:
    parts = [np.arange(3), np.arange(3, 8)]
    assert [part.tolist() for part in halved(parts, 3)] == [[0, 1, 2], [3, 4], [5, 6, 7]]
    assert len(halved([np.arange(1)], 3)) == 1


def test_the_last_step_of_a_stream_has_all_its_micro_batches() -> None:
    rows = [{"input_ids": [i] * (i + 1), "labels": [i] * (i + 1)} for i in range(9)]
    dealt = [list(StepStream(rows, share, 2)) for share in shares(2, accumulation=2)]
    assert [len(part) for part in dealt] == [4, 4]
    blank = {"input_ids": [8], "labels": [-100]}
    assert [batch for part in dealt for batch in part].count([blank]) == 3
    assert sorted(row["input_ids"][0] for part in dealt for batch in part for row in batch if row != blank) == [
        *range(9)
    ]
    assert len(list(StepStream(rows, Share(rank=0, processes=2, accumulation=2), 2, drop_last=True))) == 2
    in_order = [list(StepStream(rows[:5], share, 2, in_order=True)) for share in shares(2)]
    assert in_order == [[rows[0:2], rows[4:5]], [rows[2:4], [{"input_ids": [4], "labels": [-100]}]]]


def test_a_blank_counts_for_nothing() -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weights": [1.0, 2.0, 2.0]}
    collate = BlankCollator(collate=FlatCollator(), row=blank_of(row))
    assert not collate([row]).blank
    blank = collate([])
    assert blank.blank
    assert blank.to("cpu").blank
    assert (blank.tokens, float(blank.weight), len(blank.targets().tokens)) == (0, 0.0, 0)
    pair = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "seq_lengths": [2, 2]}
    assert blank_of(pair) == {"input_ids": [1, 1], "labels": [-100, -100], "seq_lengths": [1, 1]}
