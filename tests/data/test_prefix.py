"""Documents that share their beginning: the tree they make, and that nothing of them is lost in it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models import flat
from tunesmith.data.prefix import WORTH, flat_row, paths, share_prefixes

TOKEN = st.integers(0, 1)
BEGINNINGS = st.lists(TOKEN, min_size=1, max_size=4).map(lambda bits: [token for bit in bits for token in [bit] * 5])
DOCUMENTS = st.lists(st.builds(list.__add__, BEGINNINGS, st.lists(TOKEN, max_size=8)), min_size=1, max_size=8)
"""Documents that begin alike for long enough to share it, some of them the beginning of another."""
PROMPT, ANSWER = list(range(10, 20)), list(range(20, 30))


def test_what_documents_share_is_one_segment_and_the_rest_of_each_continues_it() -> None:
    first, second, third = [*PROMPT, *ANSWER, 1], [*PROMPT, *ANSWER, 2, 3], [*PROMPT, 4]
    row = share_prefixes([second, [7, 8], third, first])
    assert row is not None
    assert row.tokens == [*PROMPT, *ANSWER, 2, 3, 1, 4, 7, 8]  # the longest document in one piece
    assert row.lengths == [10, 10, 2, 1, 1, 2]
    assert row.parents == [-1, 0, 1, 1, 0, -1]
    assert row.positions == [*range(10), *range(10, 20), 20, 21, 20, 10, 0, 1]
    assert row.places[0] == [*range(22)]
    assert row.places[3] == [*range(20), 22]
    assert row.places[2] == [*range(10), 23]
    assert paths(row.parents) == [[0, 1, 2], [0, 1, 3], [0, 4], [5]]


def test_a_document_that_begins_another_has_no_segment_of_its_own() -> None:
    row = share_prefixes([[*PROMPT, 1], PROMPT, [*PROMPT, 1]])
    assert row is not None
    assert (row.tokens, row.lengths, row.parents) == ([*PROMPT, 1, 1], [10, 1, 1], [-1, 0, 0])
    assert [places[-1] for places in row.places] == [10, 9, 11]


def test_a_segment_must_save_enough_to_be_worth_its_attention() -> None:
    front = [1] * (WORTH - 1)
    assert share_prefixes([[*front, 2], [*front, 3]]) is None
    three = share_prefixes([[*front, 2], [*front, 3], [*front, 4]])
    assert three is not None
    assert three.lengths == [WORTH - 1, 1, 1, 1]


@pytest.mark.parametrize("documents", [[[1, 2, 3]], [[1, 2], [3, 4]], [[*PROMPT, *[i] * 100] for i in (1, 2)]])
def test_too_little_in_common_is_not_shared(documents: list[list[int]]) -> None:
    assert share_prefixes(documents) is None


def test_only_documents_of_a_group_share_unless_all_may() -> None:
    documents = [[*PROMPT, i] for i in range(4)]
    assert flat_row([[document] for document in documents], across=False) is None
    pairs = flat_row([documents[:2], documents[2:]], across=False)
    assert pairs is not None
    assert pairs.parents == [-1, 0, 0, -1, 3, 3]
    everything = flat_row([documents[:2], documents[2:]], across=True)
    assert everything is not None
    assert everything.parents == [-1, 0, 0, 0, 0]


@given(DOCUMENTS)
def test_each_document_can_be_read_off_the_row(documents: list[list[int]]) -> None:
    row = share_prefixes(documents, saves=0)
    if row is None:
        return
    assert len(row.tokens) < sum(map(len, documents))
    assert sum(row.lengths) == len(row.tokens) == len(row.positions)
    assert all(row.lengths)
    assert all(parent < segment for segment, parent in enumerate(row.parents))
    segments = [segment for segment, length in enumerate(row.lengths) for _ in range(length)]
    for document, places in zip(documents, row.places, strict=True):
        assert [row.tokens[place] for place in places] == document
        assert [row.positions[place] for place in places] == list(range(len(document)))
        path = list(dict.fromkeys(segments[place] for place in places))
        # What its tokens attend to is the document up to themselves: each segment continues the one before, whole.
        assert [row.parents[segment] for segment in path] == [-1, *path[:-1]]
        assert len(places) == sum(row.lengths[segment] for segment in path)
        # Paths are the documents, but for those that another begins with.
        inner = any(other[: len(document)] == document for other in documents if other != document)
        assert inner or path in paths(row.parents)


def test_a_batch_keeps_the_labels_and_weights_of_all_documents() -> None:
    weights = [1.0 + i for i in range(11)]
    rows: list[dict[str, Any]] = [{"input_ids": [*PROMPT, 4], "weights": weights}, {"input_ids": [*PROMPT, 5]}]
    batch, plain = flat(rows, share_prefix=True), flat(rows)
    assert batch["input_ids"].tolist() == [[*PROMPT, 4, 5]]
    assert batch["places"].tolist() == [*range(11), *range(10), 11]
    for name in ("labels", "weights"):
        assert batch[name].tolist() == plain[name].tolist()
    assert "places" not in plain
    assert "parents" not in plain
