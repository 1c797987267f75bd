"""List columns as offsets and values, whatever way the table came."""

import pyarrow as pa

from tunesmith.data.arrow import FlatExamples, list_column, list_lengths
from tunesmith.types import Example

EXAMPLES = [
    Example(input_ids=[5, 6], labels=[-100, 6]),
    Example(input_ids=[7, 8, 9], labels=[7, 8, 9], weights=[0.5, 0.0, 2.0]),
    Example(input_ids=[4], labels=[-100]),
]


def columns(table: pa.Table) -> dict[str, tuple[list[int], list[float]]]:
    return {
        name: (offsets.tolist(), values.tolist())
        for name in table.column_names
        for offsets, values in [list_column(table, name)]
    }


def test_examples_become_a_table_whose_columns_are_read_back() -> None:
    assert columns(FlatExamples.of(EXAMPLES).table()) == {
        "input_ids": ([0, 2, 5, 6], [5, 6, 7, 8, 9, 4]),
        "labels": ([0, 2, 5, 6], [-100, 6, 7, 8, 9, -100]),
        "weights": ([0, 2, 5, 6], [1.0, 1.0, 0.5, 0.0, 2.0, 1.0]),
    }


def test_examples_without_weights_weigh_1_beside_others() -> None:
    plain, weighted = (FlatExamples.of(part).table() for part in (EXAMPLES[:1], EXAMPLES[1:]))
    assert plain["weights"].to_pylist() == [None]
    both = pa.concat_tables([plain, weighted, plain])
    assert columns(both)["weights"] == ([0, 2, 5, 6, 8], [1.0, 1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 1.0])


def test_the_offsets_of_a_part_begin_at_0() -> None:
    part = FlatExamples.of(EXAMPLES).table().slice(1)
    assert columns(part)["input_ids"] == ([0, 3, 4], [7, 8, 9, 4])
    assert list_lengths(part, "input_ids").tolist() == [3, 1]
