"""Packing keeps every token, fills best-fit-decreasing bins, and repeats itself."""

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.formats import FormatOptions
from tunesmith.data.pack import STRATEGIES, Packs, Piece, pack, shuffled
from tunesmith.data.prepare import Preparation, prepare
from tunesmith.data.read import with_places
from tunesmith.data.tokenize import EncodeOptions
from tunesmith.errors import TunesmithError
from tunesmith.model.load import load_tokenizer

LENGTHS = st.lists(st.integers(0, 40), max_size=60)
MAX_LENGTH = st.integers(1, 24)


def spans(packs: Packs) -> list[list[tuple[int, int, int]]]:
    return [[(piece.document, piece.start, piece.stop) for piece in pieces] for pieces in packs]


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


def test_documented_example_of_bfd() -> None:
    packs = pack([5, 2, 3, 1, 0], 4)
    assert spans(packs) == [[(0, 0, 4)], [(2, 0, 3), (3, 0, 1)], [(1, 0, 2)]]
    assert (packs.truncated_tokens, packs.empty_documents) == (1, 1)


def test_documented_example_of_bfd_split() -> None:
    packs = pack([5, 2, 3, 1, 0], 4, "bfd_split")
    assert spans(packs) == [[(0, 0, 4)], [(2, 0, 3), (0, 4, 5)], [(1, 0, 2), (3, 0, 1)]]
    assert (packs.truncated_tokens, packs.empty_documents) == (0, 1)


def test_documented_example_of_wrapped() -> None:
    packs = pack([5, 2, 3, 1, 0], 4, "wrapped")
    assert spans(packs) == [[(0, 0, 4)], [(0, 4, 5), (1, 0, 2), (2, 0, 1)], [(2, 1, 3), (3, 0, 1)]]
    assert (packs.truncated_tokens, packs.empty_documents) == (0, 1)


@given(lengths=LENGTHS, max_length=MAX_LENGTH)
def test_bfd_places_every_document_where_the_plain_reference_does(lengths: list[int], max_length: int) -> None:
    capped = [min(length, max_length) for length in lengths]
    documents = [document for document, length in enumerate(lengths) if length]
    reference = best_fit_decreasing([capped[document] for document in documents], max_length)
    expected = [[(documents[index], 0, capped[documents[index]]) for index in pack_] for pack_ in reference]
    assert spans(pack(lengths, max_length)) == expected


@pytest.mark.parametrize("seed", range(3))
def test_bfd_places_a_thousand_documents_where_the_plain_reference_does(seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(4, 1, 1000).clip(1, 512).astype(int).tolist()
    reference = best_fit_decreasing(lengths, 512)
    assert [[piece.document for piece in pieces] for pieces in pack(lengths, 512)] == reference


@given(lengths=LENGTHS, max_length=MAX_LENGTH)
def test_bfd_split_is_bfd_of_the_pieces(lengths: list[int], max_length: int) -> None:
    pieces = [
        (document, start, min(start + max_length, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, max_length)
    ]
    whole = spans(pack([stop - start for _, start, stop in pieces], max_length))
    expected = [[pieces[index] for index, _, _ in documents] for documents in whole]
    assert spans(pack(lengths, max_length, "bfd_split")) == expected


def test_packing_depends_on_the_lengths_and_not_on_their_order() -> None:
    lengths = np.random.default_rng(0).integers(5, 120, 80)

    def sizes(lengths: np.ndarray) -> list[list[int]]:
        return [[piece.stop for piece in pieces] for pieces in pack(lengths, 256)]

    assert sizes(lengths) == sizes(lengths[::-1]) == sizes(np.sort(lengths))


@given(lengths=LENGTHS, max_length=MAX_LENGTH)
def test_wrapped_is_the_token_stream_cut_every_max_length(lengths: list[int], max_length: int) -> None:
    stream = [(document, token) for document, length in enumerate(lengths) for token in range(length)]
    packs = pack(lengths, max_length, "wrapped")
    unpacked = [[(p.document, token) for p in pieces for token in range(p.start, p.stop)] for pieces in packs]
    assert unpacked == [stream[cut : cut + max_length] for cut in range(0, len(stream), max_length)]
    assert all(len({piece.document for piece in pieces}) == len(pieces) for pieces in packs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(lengths=LENGTHS, max_length=MAX_LENGTH)
def test_every_token_is_in_one_pack_or_counted_as_truncated(strategy: str, lengths: list[int], max_length: int) -> None:
    packs = pack(lengths, max_length, strategy)
    seen = [(p.document, token) for pieces in packs for p in pieces for token in range(p.start, p.stop)]
    limit = max_length if strategy == "bfd" else max(lengths, default=0)
    assert sorted(seen) == [(document, t) for document, n in enumerate(lengths) for t in range(min(n, limit))]
    assert packs.truncated_tokens == sum(lengths) - len(seen)
    assert packs.empty_documents == lengths.count(0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(lengths=LENGTHS, max_length=MAX_LENGTH)
def test_packs_hold_one_to_max_length_tokens_and_report_them(
    strategy: str, lengths: list[int], max_length: int
) -> None:
    packs = pack(lengths, max_length, strategy)
    tokens = [sum(piece.stop - piece.start for piece in pieces) for pieces in packs]
    assert packs.lengths().tolist() == tokens
    assert all(1 <= count <= max_length for count in tokens)
    assert packs.fill(max_length) == (sum(tokens) / (len(tokens) * max_length) if tokens else 0.0)


def test_equal_lengths_are_placed_in_their_given_order() -> None:
    assert spans(pack([2] * 5, 4)) == [[(0, 0, 2), (1, 0, 2)], [(2, 0, 2), (3, 0, 2)], [(4, 0, 2)]]


def test_best_fit_prefers_the_tightest_bin_over_the_first() -> None:
    # 12, and 9 + 9, leave room for 8 and 2: the 2 would fit into either.
    assert [[piece.document for piece in pieces] for pieces in pack([12, 9, 9, 2], 20)] == [[0], [1, 2, 3]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_documents_make_no_packs(strategy: str) -> None:
    for lengths in ([], [0, 0]):
        packs = pack(lengths, 8, strategy)
        assert (len(packs), list(packs), packs.lengths().tolist(), packs.fill(8)) == (0, [], [], 0.0)
        assert packs.empty_documents == len(lengths)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_integer_type_of_the_lengths_does_not_matter(strategy: str) -> None:
    lengths = [200, 7, 0, 90, 201]
    expected = spans(pack(lengths, 96, strategy))
    for dtype in (np.uint8, np.int16, np.int32, np.uint64):
        assert spans(pack(np.array(lengths, dtype=dtype), 96, strategy)) == expected


def test_packs_are_read_by_index_from_both_ends() -> None:
    packs = pack([3, 2, 2], 4)
    assert packs[0] == packs[-2] == [Piece(document=0, start=0, stop=3)]
    assert packs[-1] == packs[1] == [Piece(document=1, start=0, stop=2), Piece(document=2, start=0, stop=2)]
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"pack {index} of 2"):
            packs[index]


def test_packs_survive_the_way_to_a_loader_process() -> None:
    packs = pack([5, 2, 3, 1, 0], 4)
    copy = pickle.loads(pickle.dumps(packs))
    assert spans(copy) == spans(packs)
    assert copy.truncated_tokens == 1


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
    assert packs.fill(2048) > 0.999
    assert packs.lengths().max() <= 2048
    assert np.array_equal(np.sort(packs.document), np.arange(len(lengths)))


def test_packing_needs_no_torch() -> None:
    code = "import sys, tunesmith.data.pack; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_instruction_rows_fill_packs_of_2048_to_98_9_percent(shared_data: Path) -> None:
    """As the demo model's tokenizer makes them; no packing could do with fewer than 98 packs."""
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    encode = EncodeOptions(max_length=2048)
    preparation = Preparation(tokenizer=load_tokenizer("demo"), encode=encode, formats=FormatOptions(), processes=1)
    dataset, _ = prepare(with_places(rows), preparation, source=rows)
    lengths = [len(ids) for ids in dataset["input_ids"]]
    packs = pack(lengths, 2048)
    assert int(packs.lengths().sum()) == sum(lengths) == 200_471
    assert len(packs) == 99
