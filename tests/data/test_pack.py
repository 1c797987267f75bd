"""Packing keeps every token, fills best-fit-decreasing bins, and repeats itself."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from datasets.table import InMemoryTable
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.arrow import FlatExamples
from tunesmith.data.batches import FlatCollator, groups_of
from tunesmith.data.formats import FormatOptions
from tunesmith.data.pack import STRATEGIES, pack, pack_dataset, shuffled
from tunesmith.data.prepare import Preparation, prepare
from tunesmith.data.read import with_places
from tunesmith.data.tokenize import EncodeOptions, joined
from tunesmith.errors import TunesmithError
from tunesmith.model.load import load_tokenizer
from tunesmith.types import IGNORE_INDEX, Example

LENGTHS = st.lists(st.integers(0, 40), max_size=60)
MAX_LENGTH = st.integers(1, 24)


def packed(lengths: Any, max_length: int, strategy: str = "bfd") -> list[list[tuple[int, int, int]]]:
    """The pieces (document, start, stop) of each pack."""
    packs = pack(lengths, max_length, strategy)
    pieces = list(zip(packs.document.tolist(), packs.start.tolist(), packs.stop.tolist(), strict=True))
    assert packs.offsets[[0, -1]].tolist() == [0, len(pieces)]
    return [pieces[first:last] for first, last in pairwise(packs.offsets.tolist())]


def best_fit_decreasing(lengths: list[int], max_length: int) -> list[list[int]]:
    """The plain reference: each document, longest first, into the bin with the least room that holds it.

    Of several such bins, the one that has had this room for longest: `since` counts the placements.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    since: list[int] = []
    for step, document in enumerate(sorted(range(len(lengths)), key=lambda document: -lengths[document])):
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[document]]
        if fitting:
            best = min(fitting, key=lambda b: (room[b], since[b]))
        else:
            best = len(bins)
            bins.append([])
            room.append(max_length)
            since.append(0)
        bins[best].append(document)
        room[best] -= lengths[document]
        since[best] = step
    return bins


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("bfd", [[(0, 0, 4)], [(2, 0, 3), (3, 0, 1)], [(1, 0, 2)]]),
        ("bfd_split", [[(0, 0, 4)], [(2, 0, 3), (0, 4, 5)], [(1, 0, 2), (3, 0, 1)]]),
        ("wrapped", [[(0, 0, 4)], [(0, 4, 5), (1, 0, 2), (2, 0, 1)], [(2, 1, 3), (3, 0, 1)]]),
    ],
)
def test_the_documented_example(strategy: str, expected: list[list[tuple[int, int, int]]]) -> None:
    assert packed([5, 2, 3, 1, 0], 4, strategy) == expected


@given(lengths=LENGTHS, max_length=MAX_LENGTH)
def test_bfd_places_every_document_where_the_plain_reference_does(lengths: list[int], max_length: int) -> None:
    capped = [min(length, max_length) for length in lengths]
    documents = [document for document, length in enumerate(lengths) if length]
    reference = best_fit_decreasing([capped[document] for document in documents], max_length)
    expected = [[(documents[index], 0, capped[documents[index]]) for index in pack_] for pack_ in reference]
    assert packed(lengths, max_length) == expected


@pytest.mark.parametrize("seed", range(3))
def test_bfd_places_a_thousand_documents_where_the_plain_reference_does(seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(4, 1, 1000).clip(1, 512).astype(int).tolist()
    reference = best_fit_decreasing(lengths, 512)
    assert [[document for document, _, _ in pieces] for pieces in packed(lengths, 512)] == reference


@given(lengths=LENGTHS, max_length=MAX_LENGTH)
def test_bfd_split_is_bfd_of_the_pieces(lengths: list[int], max_length: int) -> None:
    pieces = [
        (document, start, min(start + max_length, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, max_length)
    ]
    whole = packed([stop - start for _, start, stop in pieces], max_length)
    expected = [[pieces[index] for index, _, _ in documents] for documents in whole]
    assert packed(lengths, max_length, "bfd_split") == expected


@given(lengths=LENGTHS, max_length=MAX_LENGTH)
def test_wrapped_is_the_token_stream_cut_every_max_length(lengths: list[int], max_length: int) -> None:
    stream = [(document, token) for document, length in enumerate(lengths) for token in range(length)]
    packs = packed(lengths, max_length, "wrapped")
    tokens = [[(document, token) for document, *span in pieces for token in range(*span)] for pieces in packs]
    assert tokens == [stream[cut : cut + max_length] for cut in range(0, len(stream), max_length)]
    assert all(len({document for document, _, _ in pieces}) == len(pieces) for pieces in packs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(lengths=LENGTHS, max_length=MAX_LENGTH)
def test_every_token_is_in_one_pack_or_behind_the_limit_of_bfd(
    strategy: str, lengths: list[int], max_length: int
) -> None:
    packs = packed(lengths, max_length, strategy)
    seen = [(document, token) for pieces in packs for document, *span in pieces for token in range(*span)]
    limit = max_length if strategy == "bfd" else max(lengths, default=0)
    assert sorted(seen) == [(document, t) for document, n in enumerate(lengths) for t in range(min(n, limit))]
    assert all(1 <= sum(stop - start for _, start, stop in pieces) <= max_length for pieces in packs)


def test_equal_lengths_are_placed_in_their_given_order() -> None:
    assert packed([2] * 5, 4) == [[(0, 0, 2), (1, 0, 2)], [(2, 0, 2), (3, 0, 2)], [(4, 0, 2)]]


def test_best_fit_prefers_the_tightest_bin_over_the_first() -> None:
    # 12, and 9 + 9, leave room for 8 and 2: the 2 would fit into either.
    assert [[document for document, _, _ in pieces] for pieces in packed([12, 9, 9, 2], 20)] == [[0], [1, 2, 3]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_documents_make_no_packs(strategy: str) -> None:
    assert packed([], 8, strategy) == packed([0, 0], 8, strategy) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_integer_type_of_the_lengths_does_not_matter(strategy: str) -> None:
    lengths = [200, 7, 0, 90, 201]
    for dtype in (np.uint8, np.int16, np.int32, np.uint64):
        assert packed(np.array(lengths, dtype=dtype), 96, strategy) == packed(lengths, 96, strategy)


@pytest.mark.parametrize(
    ("lengths", "max_length", "strategy", "message"),
    [
        ([1], 0, "bfd", "max_length=0 tokens: write a max_length of 1 or more"),
        ([1], 8, "bfd_spilt", "'bfd_spilt'; did you mean 'bfd_split'\\? \\(there are bfd, bfd_split, wrapped\\)"),
        ([1], 8, "xyz", "'xyz' \\(there are bfd, bfd_split, wrapped\\)"),
        ([3, -2], 8, "bfd", "document 1 has a length of -2"),
        ([1.5], 8, "bfd", "whole numbers, found an array of float64"),
        ([[1, 2]], 8, "bfd", "one list of whole numbers, found an array of int64, shape \\(1, 2\\)"),
    ],
)
def test_a_mistake_is_refused_with_what_to_write(
    lengths: list[int], max_length: int, strategy: str, message: str
) -> None:
    with pytest.raises(TunesmithError, match=message):
        pack(lengths, max_length, strategy)


def test_shuffled_is_a_pinned_order() -> None:
    assert shuffled(8, 42, 0).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]


def test_shuffled_differs_between_keys_and_loses_nothing() -> None:
    orders = [shuffled(50, seed, epoch, part).tolist() for seed in range(4) for epoch in range(4) for part in (1, 2)]
    assert len({tuple(order) for order in orders}) == 32
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_shuffled_refuses_a_negative_seed() -> None:
    with pytest.raises(TunesmithError, match="cannot shuffle with -1, 0: write seeds and epochs of 0 or more"):
        shuffled(1, -1, 0)


def test_a_million_documents_are_packed_in_under_three_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 1_000_000).clip(1, 2048).astype(np.int64)
    begin = time.process_time()
    packs = pack(lengths, 2048)
    assert time.process_time() - begin < 3.0
    filled = np.add.reduceat(packs.stop - packs.start, packs.offsets[:-1])
    assert filled.max() <= 2048
    assert filled.mean() > 0.999 * 2048
    assert np.array_equal(np.sort(packs.document), np.arange(len(lengths)))


def test_instruction_rows_fill_packs_of_2048_to_98_9_percent(shared_data: Path) -> None:
    """As the demo model's tokenizer makes them; no packing could do with fewer than 98 packs."""
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    encode = EncodeOptions(max_length=2048)
    preparation = Preparation(tokenizer=load_tokenizer("demo"), encode=encode, formats=FormatOptions(), processes=1)
    dataset, _ = prepare(with_places(rows), preparation, source=rows)
    lengths = [len(ids) for ids in dataset["input_ids"]]
    assert sum(lengths) == 200_471
    assert len(packed(lengths, 2048)) == 99


# Documents that share what they begin with

TOKEN = st.integers(3, 4)
PART = st.lists(TOKEN, min_size=1, max_size=3).map(lambda tokens: [token for token in tokens for _ in range(6)])


@st.composite
def conversation(draw: st.DrawFn) -> list[Example]:
    """Documents of one row, each of which continues a beginning of the one before it and supervises what it adds."""
    history, documents = draw(PART), []
    for number in range(draw(st.integers(1, 4))):
        answer = [10 * number + 10, *draw(st.lists(TOKEN, max_size=9))]
        ids, learned = [*history, *answer], [IGNORE_INDEX] * len(history) + answer
        weights = draw(st.sampled_from([None, [float(number + 1)] * len(ids)]))
        documents.append(Example(input_ids=ids, labels=learned, weights=weights))
        history = [*history, *draw(PART)]
    return documents


def learned(documents: Any) -> list[tuple[tuple[int, ...], float]]:
    """Each supervised token with all that is before it, and its weight."""
    return sorted(
        (tuple(document.input_ids[: i + 1]), 1.0 if document.weights is None else document.weights[i])
        for document in documents
        for i, label in enumerate(document.labels)
        if i and label != IGNORE_INDEX
    )


@given(st.lists(conversation(), min_size=1, max_size=6))
def test_trees_and_packs_of_them_teach_what_the_documents_do(rows: list[list[Example]]) -> None:
    limit = max(60, *(len(document.input_ids) for documents in rows for document in documents))
    examples = [example for documents in rows for example in joined(documents, limit)]
    expected = learned(document for documents in rows for document in documents)
    dataset = Dataset(InMemoryTable(FlatExamples.of(examples).table()))
    packed = pack_dataset(dataset, limit)
    for rows_of in (dataset, packed):
        batch = FlatCollator()(list(rows_of))
        assert learned(batch.documents) == expected
        assert all(len(row["input_ids"]) <= limit for row in rows_of)
        groups = [group for row in rows_of for group in groups_of(row)]
        assert len(groups) == len(examples)
        places = range(batch.labels.shape[1]) if batch.places is None else batch.places.tolist()
        ids, positions = batch.input_ids[0].tolist(), batch["position_ids"][0].tolist()
        assert [ids[place] for place in places] == [t for document in batch.documents for t in document.input_ids]
        assert [positions[place] for place in places] == [i for d in batch.documents for i in range(len(d.input_ids))]
        targets = batch.targets()
        assert len(targets.tokens) == len(expected)
    assert FlatCollator()(list(packed)).computed_tokens <= sum(len(example.input_ids) for example in examples)


def test_packs_keep_the_segments_of_trees_and_move_them() -> None:
    tree = Example(input_ids=[*range(10, 20)], labels=[*range(10, 20)], parts=([8, 1, 1], [-1, 0, 0]))
    alone = Example(input_ids=[5, 6, 7], labels=[5, 6, 7])
    dataset = Dataset(InMemoryTable(FlatExamples.of([alone, tree, alone]).table()))
    packed = pack_dataset(dataset.remove_columns("weights"), 16)
    assert packed["seq_lengths"][:] == [[8, 1, 1, 3, 3]]
    assert packed["parents"][:] == [[-1, 0, 0, -1, -1]]
    assert pack_dataset(dataset.select([0, 1]).remove_columns("weights"), 12)["parents"][:] == [[-1, 0, 0], [-1]]
    with pytest.raises(TunesmithError, match="packing_strategy wrapped cuts documents, and these share parts"):
        pack_dataset(dataset, 16, "wrapped")
