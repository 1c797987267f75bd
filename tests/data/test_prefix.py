"""Documents that share their beginning: the row they make, and that nothing of them is lost in it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models import flat
from tunesmith.data.prefix import SAVES, share_prefixes

TOKEN = st.integers(0, 2)
DOCUMENTS = st.lists(st.lists(TOKEN, min_size=1, max_size=8), min_size=1, max_size=8)


def test_two_documents_share_their_beginning_and_a_third_stands_alone() -> None:
    row = share_prefixes([[1, 2, 3, 4], [7, 8], [1, 2, 3, 5, 6]])
    assert row is not None
    assert row.tokens == [1, 2, 3, 4, 5, 6, 7, 8]
    assert row.positions == [0, 1, 2, 3, 3, 4, 0, 1]
    assert (row.lengths, row.parents) == ([3, 1, 2, 2], [-1, 0, 0, -1])
    assert row.places == [[0, 1, 2, 3], [6, 7], [0, 1, 2, 4, 5]]


def test_the_last_token_of_each_document_stays_its_own() -> None:
    row = share_prefixes([[1, 2, 3], [1, 2, 3], [1, 2]])
    assert row is not None
    assert all(length > 0 for length in row.lengths)
    assert len({places[-1] for places in row.places}) == 3


@pytest.mark.parametrize("documents", [[[1, 2, 3]], [[1, 2], [3, 4]], [[1, *range(9, 30)], [1, *range(50, 70)]]])
def test_too_little_in_common_is_not_shared(documents: list[list[int]]) -> None:
    assert share_prefixes(documents) is None


@given(DOCUMENTS)
def test_each_document_can_be_read_off_the_row(documents: list[list[int]]) -> None:
    row = share_prefixes(documents)
    if row is None:
        return
    assert len(row.tokens) < (1 - SAVES) * sum(map(len, documents))
    assert sum(row.lengths) == len(row.tokens) == len(row.positions)
    begins = [sum(row.lengths[:i]) for i in range(len(row.lengths))]
    for document, places in zip(documents, row.places, strict=True):
        assert [row.tokens[place] for place in places] == document
        assert [row.positions[place] for place in places] == list(range(len(document)))
        segment = max(i for i, begin in enumerate(begins) if begin <= places[-1])
        parent = row.parents[segment]
        assert parent < segment
        if parent >= 0:
            assert row.parents[parent] == -1
        span = [range(begins[i], begins[i] + row.lengths[i]) for i in (parent, segment) if i >= 0]
        assert places == [place for part in span for place in part]  # what its last token attends to, and no more


def test_a_batch_keeps_the_labels_and_weights_of_all_documents() -> None:
    rows: list[dict[str, list[Any]]] = [
        {"input_ids": [1, 2, 3, 4], "weights": [1.0, 2.0, 3.0, 4.0]},
        {"input_ids": [1, 2, 3, 5]},
    ]
    batch, plain = flat(rows, share_prefix=True), flat(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["places"].tolist() == [0, 1, 2, 3, 0, 1, 2, 4]
    for name in ("labels", "weights"):
        assert batch[name].tolist() == plain[name].tolist()
    assert "places" not in plain
    assert "parents" not in plain
