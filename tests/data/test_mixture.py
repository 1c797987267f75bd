"""Mixtures of named sources follow from the seed, use rows as often as said, and never train on what is held out."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from datasets.table import InMemoryTable

from tunesmith.data.arrow import FlatExamples
from tunesmith.data.mixture import DataSource, concatenated, epoch_examples, mixture_order, split_rows
from tunesmith.errors import TunesmithError
from tunesmith.types import Example

ROWS = list(range(100))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 10),
        ({"weight": 2}, 20),
        ({"weight": 0.5}, 5),
        ({"weight": 2.5}, 25),
        ({"count": 3}, 3),
        ({"count": 13}, 13),
    ],
)
def test_rows_are_used_as_often_as_said(given: dict[str, Any], expected: int) -> None:
    indices = epoch_examples("a", DataSource(rows=[], **given), 10, seed=0)
    assert len(indices) == expected
    times = np.bincount(indices, minlength=10)
    assert times.max() - times.min() <= 1, "no row is used twice more than another"


def test_what_is_held_out_is_not_trained_on_and_all_rows_are_kept() -> None:
    train, held = split_rows("a", ROWS, 0.1, seed=0)
    assert len(held) == 10
    assert sorted(train + held) == ROWS
    assert split_rows("a", ROWS, 0.1, seed=0) == (train, held)
    assert split_rows("a", ROWS, 0.1, seed=1)[1] != held
    assert split_rows("b", ROWS, 0.1, seed=0)[1] != held
    assert split_rows("a", ROWS, 0.0, seed=0) == (ROWS, [])
    assert [len(part) for part in split_rows("a", [1, 2], 0.9, seed=0)] == [1, 1]


def test_a_source_with_one_row_can_not_hold_one_out() -> None:
    with pytest.raises(TunesmithError, match="source 'a' has 1 row"):
        split_rows("a", [1], 0.5, seed=0)


def test_a_mixture_is_shuffled_together_and_another_source_changes_nothing_in_the_first() -> None:
    sources = {"a": DataSource(rows=[], weight=0.5), "b": DataSource(rows=[], count=7)}
    order = mixture_order({"a": 20, "b": 5}, sources, seed=3)
    assert len(order) == 17
    assert (order >= 20).sum() == 7
    assert not np.array_equal(order, np.sort(order))
    assert np.array_equal(order, mixture_order({"a": 20, "b": 5}, sources, seed=3))
    alone = mixture_order({"a": 20}, sources, seed=3)
    assert sorted(alone) == sorted(order[order < 20])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 1, "count": 2}, "not both"),
        ({"weight": 0}, "above 0"),
        ({"weight": float("inf")}, "above 0"),
        ({"count": 0}, "at least 1 row"),
        ({"held_out": 1.0}, "below 1"),
        ({"held_out": -0.1}, "below 1"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        DataSource(rows=[], **given)


@pytest.mark.parametrize("given", [{"weight": 1e308}, {"count": 10**11}])
def test_more_examples_than_can_be_held_name_their_source(given: dict[str, Any]) -> None:
    with pytest.raises(TunesmithError, match=r"source 'a' has 20 examples, of which .* more than 1,000,000,000 in an"):
        mixture_order({"a": 20}, {"a": DataSource(rows=[], **given)}, seed=3)


def test_examples_of_one_document_stay_one_beside_those_of_several() -> None:
    def made(*rows: Example) -> Dataset:
        part = Dataset(InMemoryTable(FlatExamples.of(rows).table()))
        return part.select_columns([name for name in part.column_names if part[0][name] is not None])

    plain = made(Example(input_ids=[5, 6], labels=[5, 6]), Example(input_ids=[7], labels=[7]))
    trees = made(Example(input_ids=[1, 2, 3], labels=[1, 2, 3], parts=([1, 1, 1], [-1, 0, 0])))
    weighted = made(Example(input_ids=[8], labels=[8], weights=[0.5]))
    both = concatenated([plain, trees, weighted])
    assert both["seq_lengths"][:] == [[2], [1], [1, 1, 1], [1]]
    assert both["parents"][:] == [[-1], [-1], [-1, 0, 0], [-1]]
    assert both["weights"][:] == [[1.0, 1.0], [1.0], [1.0, 1.0, 1.0], [0.5]]
    assert "seq_lengths" not in concatenated([plain, weighted]).column_names
