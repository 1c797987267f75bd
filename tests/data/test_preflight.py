"""What the preflight counts, what it stops, and what it only tells."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tunesmith.data.cache import open_shards, write_shards
from tunesmith.data.preflight import (
    Preflight,
    SplitReport,
    examine,
    histogram,
    judge,
    shared_examples,
    supervised_counts,
)
from tunesmith.data.tokenize import Counts
from tunesmith.errors import TunesmithError

BOS = 1


def dataset(
    folder: Path,
    ids: list[list[int]],
    weights: list[list[float] | None] | None = None,
    labels: list[list[int]] | None = None,
) -> Any:
    folder.mkdir()
    columns = {
        "input_ids": pa.array(ids, pa.list_(pa.int32())),
        "labels": pa.array(labels or ids, pa.list_(pa.int32())),
    }
    if weights is not None:
        columns["weights"] = pa.array(weights, pa.list_(pa.float32()))
    table = pa.table(columns)
    # Two record batches, as a real data set has many: counts must not stop at the first.
    return open_shards(write_shards(folder, [table.slice(0, 2), table.slice(2)]))


def counted(examples: int, ends: int | None = None, **others: Any) -> Counts:
    ends = examples if ends is None else ends
    return Counts(
        rows=examples, examples=examples, tokens=100, supervised=50, ends={2: ends}, stops={2: ends}, **others
    )


def report(**changes: Any) -> SplitReport:
    plain = SplitReport(
        counts=counted(3), longest=4, lengths=[(1, 4, 3)], duplicates=0, without_end=0, double_bos=0, weightless=0
    )
    return replace(plain, **changes)


def judged(
    splits: dict[str, SplitReport], shared: dict[str, int] | None = None, allow_no_eos: bool = False
) -> Preflight:
    return judge(splits, shared=shared or {}, allow_no_eos=allow_no_eos, end_tokens="</s>")


def test_examples_are_counted_over_all_batches(tmp_path: Path) -> None:
    ids = [[BOS, 5, 6], [BOS, BOS, 7], [BOS, 5, 6], [BOS, BOS], [9]]
    weights = [None, None, [0.0, 0.0, 0.0], [0.0, 0.5], None]
    found = examine(dataset(tmp_path / "a", ids, weights), counted(5, ends=3), BOS)
    assert (found.longest, found.duplicates, found.double_bos, found.without_end) == (3, 1, 2, 2)
    assert sum(count for _, _, count in found.lengths) == 5


def test_a_part_of_a_data_set_is_counted_as_if_it_stood_alone(tmp_path: Path) -> None:
    ids = [[7, 7, 7], [BOS, BOS, 7], [BOS, 5, 6], [BOS, BOS], [9]]
    weights = [[1.0] * 3, [0.0] * 3, [1.0] * 3, [0.0] * 2, [1.0]]
    part = dataset(tmp_path / "whole", ids, weights).select(range(1, 5))
    assert examine(part, counted(4), BOS) == examine(dataset(tmp_path / "a", ids[1:], weights[1:]), counted(4), BOS)


def test_examples_whose_weights_are_all_zero_are_counted(tmp_path: Path) -> None:
    found = examine(dataset(tmp_path / "a", [[1, 2], [3, 4], [5]], [[0, 0], [0, 1], [0]]), counted(3), None)
    assert (found.weightless, found.double_bos) == (2, 0)
    unsupervised = dataset(tmp_path / "b", [[1, 2], [3, 4]], [[1, 0], [1, 1]], labels=[[-100, 2], [-100, 4]])
    assert examine(unsupervised, counted(2), None).weightless == 1


def test_supervised_tokens_are_counted_by_example(tmp_path: Path) -> None:
    ids = [[1, 2], [-100, 4, 5], [-100], [7]]  # which are the labels, too
    assert supervised_counts(dataset(tmp_path / "a", ids)).tolist() == [2, 2, 0, 1]


def test_examples_of_the_training_data_are_found_in_the_other_splits(tmp_path: Path) -> None:
    splits = {
        "train/a": dataset(tmp_path / "a", [[1, 2], [3], [4]]),
        "train/b": dataset(tmp_path / "b", [[7, 8], [9], [9]]),
        "eval": dataset(tmp_path / "c", [[3], [9], [12]]),
    }
    assert shared_examples(splits) == {"eval": 2}
    assert shared_examples({"train": splits["train/a"]}) == {}


def test_a_report_survives_json() -> None:
    full = report(counts=counted(3, dropped={"too long": (7, ["row 1", "row 2"])}))
    assert SplitReport.from_json(json.loads(json.dumps(full.as_json()))) == full


def test_data_without_any_end_token_stops_the_run_unless_allowed() -> None:
    endless = report(counts=replace(counted(3, ends=0), ends={}, stops={}), without_end=3)
    with pytest.raises(TunesmithError, match=r"no supervised token ends a text \(</s>\).*allow_no_eos"):
        judged({"train": endless}).stop_on_problems()
    assert not judged({"train": endless}, allow_no_eos=True).problems
    assert judged({"train": endless, "eval": report()}).problems
    assert not judged({"train": report(), "eval": endless}).problems
    assert not judged({"train/a": endless, "train/b": report()}).problems


def test_a_doubled_bos_stops_the_run() -> None:
    assert "2 examples begin with two BOS" in judged({"train": report(double_bos=2)}).problems[0]
    assert "1 example begins with two BOS" in judged({"train": report(double_bos=1)}).problems[0]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"without_end": 2}, "train: 2 examples do not end with an end token"),
        ({"duplicates": 4}, "train: 4 examples are exact copies of another"),
        ({"weightless": 2}, "train: 2 examples have weight 0 throughout"),
        ({"without_end": 1}, "train: 1 example does not end with an end token"),
        ({"duplicates": 1}, "train: 1 example is an exact copy of another"),
        ({"weightless": 1}, "train: 1 example has weight 0 throughout"),
        ({"counts": counted(3, dropped={"too long": (1, ["row 1"])})}, "train: 1 row dropped, too long: row 1"),
        ({"counts": counted(3, truncated=1, lost_tokens=1)}, "train: 1 example truncated"),
        (
            {"counts": counted(3, dropped={"too long": (7, ["row 1", "row 2"])})},
            "train: 7 rows dropped, too long: row 1, row 2, ...",
        ),
        (
            {"counts": counted(3, truncated=2, lost_tokens=100)},
            "train: 2 examples truncated, 50.0% of the tokens lost; raise max_length",
        ),
        ({"counts": replace(counted(3), supervised=1)}, "train: only 1.00% of the tokens are supervised"),
    ],
)
def test_what_is_odd_is_told(changes: dict[str, Any], note: str) -> None:
    found = judged({"train": report(**changes)})
    assert found.problems == []
    assert any(note in line for line in found.notes), found.notes


def test_leakage_is_told() -> None:
    assert "eval: 5 examples are in the training data too" in judged({"train": report()}, {"eval": 5}).notes[0]
    assert "eval: 1 example is in the training data too" in judged({"train": report()}, {"eval": 1}).notes[0]


def test_nothing_odd_gives_no_notes() -> None:
    found = judged({"train": report()}, {"eval": 0})
    assert (found.problems, found.notes) == ([], [])
    assert found.as_json()["splits"]["train"]["supervised_share"] == 0.5


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [3, 17, 900, 900, 2048], list(range(1, 300))])
def test_a_histogram_counts_every_example_once(lengths: list[int]) -> None:
    import numpy as np

    buckets = histogram(np.array(lengths))
    assert sum(count for _, _, count in buckets) == len(lengths)
    assert len(buckets) <= 8
    assert buckets[-1][1] == max(lengths)
    for low, high, count in buckets:
        assert count == sum(low <= length <= high for length in lengths)
