"""List columns as offsets and values, whatever way the table came."""

import pyarrow as pa

from tunesmith.data.arrow import FlatExamples, documents, list_column, list_lengths, segments
from tunesmith.types import Example

EXAMPLES = [
    Example(input_ids=[5, 6], labels=[-100, 6]),
    Example(input_ids=[7, 8, 9], labels=[7, 8, 9], weights=[0.5, 0.0, 2.0]),
    Example(input_ids=[4], labels=[-100]),
]
TREE = Example(
    input_ids=[*range(10, 19)], labels=[-100, 11, *[-100] * 6, 18], parts=([3, 1, 2, 2, 1], [-1, 0, 0, 2, 2])
)
"""Three documents, of 4, 7, and 6 tokens."""


def columns(table: pa.Table) -> dict[str, tuple[list[int], list[float]]]:
    return {
        name: (offsets.tolist(), values.tolist())
        for name in ("input_ids", "labels", "weights")
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


def test_segments_of_examples_are_read_back_and_an_example_without_any_is_one() -> None:
    table = FlatExamples.of([EXAMPLES[0], TREE, EXAMPLES[2]]).table()
    assert table["seq_lengths"].to_pylist() == [[2], [3, 1, 2, 2, 1], [1]]
    assert table["parents"].to_pylist() == [[-1], [-1, 0, 0, 2, 2], [-1]]
    plain = FlatExamples.of(EXAMPLES[1:2]).table()
    assert (plain["seq_lengths"].to_pylist(), plain["parents"].to_pylist()) == ([None], [None])
    for part in (pa.concat_tables([table, plain]), pa.concat_tables([plain, table, plain]).slice(1)):
        offsets, lengths, parents = segments(part)
        assert offsets.tolist() == [0, 1, 6, 7, 8]
        assert lengths.tolist() == [2, 3, 1, 2, 2, 1, 1, 3]
        assert parents.tolist() == [-1, -1, 0, 0, 2, 2, -1, -1]


def test_documents_are_the_paths_from_a_root_to_each_end() -> None:
    table = FlatExamples.of([EXAMPLES[0], TREE, EXAMPLES[2]]).table()
    offsets, lengths = documents(table)
    assert offsets.tolist() == [0, 1, 4, 5]
    assert lengths.tolist() == [2, 4, 7, 6, 1]
    packed = table.append_column("other", pa.array([1, 2, 3])).drop_columns(["parents"])
    assert documents(packed)[1].tolist() == [2, 3, 1, 2, 2, 1, 1]
    assert documents(table.select(["input_ids"]))[1].tolist() == [2, 9, 1]
