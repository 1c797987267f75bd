"""Which documents share a micro-batch, epoch by epoch, in one process or several, and after a break."""

from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tunesmith.data.batches import FlatCollator, PaddedCollator, groups_of
from tunesmith.data.deal import Share, StepSampler
from tunesmith.data.samplers import (
    LengthGroups,
    PrefixGroups,
    TokenBatches,
    by_document,
    document_lengths,
    fitting_lengths,
    lengths_of,
    register_sampler,
    with_blank_rows,
)
from tunesmith.errors import TunesmithError

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def epoch_of(batches: TokenBatches, epoch: int) -> list[list[int]]:
    batches.set_epoch(epoch)
    return list(batches)


def groups(batches: list[list[int]]) -> set[frozenset[int]]:
    """Who shares a batch, whatever the order."""
    return {frozenset(batch) for batch in batches}


# Batches by tokens


@pytest.mark.parametrize("padded", [False, True], ids=["flat", "padded"])
@given(lengths=LENGTHS, most=st.integers(40, 90), seed=st.one_of(st.none(), st.integers(0, 9)))
def test_every_epoch_has_each_document_once_in_as_many_batches_within_the_budget(
    padded: bool, lengths: list[int], most: int, seed: int | None
) -> None:
    batches = TokenBatches(np.array(lengths), most, seed=seed, padded=padded)
    for epoch in range(3):
        found = epoch_of(batches, epoch)
        assert len(found) == len(batches)
        assert sorted(document for batch in found for document in batch) == list(range(len(lengths)))
        for batch in found:
            tokens = [lengths[document] for document in batch]
            assert len(batch) > 0
            assert (max(tokens) * len(tokens) if padded else sum(tokens)) <= most


@pytest.mark.parametrize("padded", [False, True], ids=["flat", "padded"])
def test_an_epoch_has_batches_of_its_own_and_the_same_ones_every_time(padded: bool) -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(100, 900))  # no two documents of one length
    batches = TokenBatches(lengths, 4096, seed=3, padded=padded)
    first, second = epoch_of(batches, 0), epoch_of(batches, 1)
    assert epoch_of(TokenBatches(lengths, 4096, seed=3, padded=padded), 1) == second
    assert len(first) == len(second)
    assert len(groups(first) & groups(second)) < len(first) / 10
    assert not groups(first) & groups(epoch_of(TokenBatches(lengths, 4096, seed=4, padded=padded), 0))
    longest = [max(lengths[batch]) for batch in first]
    assert longest != sorted(longest, reverse=True), "the batches of an epoch are not shuffled"


def test_long_batches_have_another_place_in_each_epoch() -> None:
    lengths = np.repeat(np.arange(100, 900, 50), 20)
    batches = TokenBatches(lengths, 2048, seed=3)
    first, second = ([max(lengths[batch]) for batch in epoch_of(batches, epoch)] for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_without_a_seed_all_epochs_are_the_same() -> None:
    batches = TokenBatches(np.array([3, 9, 4, 4, 1]), 10, seed=None)
    assert epoch_of(batches, 0) == epoch_of(batches, 1) == [[1, 4], [2, 3], [0]]
    assert not batches.shuffles


def test_padded_batches_hold_neighbours_in_length() -> None:
    batches = TokenBatches(np.array([2, 10, 9, 3, 3, 2]), 20, seed=None, padded=True)
    assert list(batches) == [[1, 2], [3, 4, 0, 5]]


def test_batches_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 3000).clip(1, 2048).astype(np.int64)
    assert lengths.sum() / len(TokenBatches(lengths, 2048, seed=0)) > 0.97 * 2048


# Rows that begin alike


def rows_of_trees(count: int) -> tuple[Dataset, list[tuple[int, int, int]]]:
    """Rows of a prompt of 64 tokens, one of 2, tools of 64, one of 3 for each, and 32 tokens of their own; with the
    prompt, the tools and the number of each."""
    draw = np.random.default_rng(0)
    kinds = [(int(draw.integers(2)), int(draw.integers(3)), number) for number in range(count)]
    rows = [[1000 + p] * 64 + [2000 + 10 * p + t] * 64 + [3000 + number] * 32 for p, t, number in kinds]
    return Dataset.from_dict({"input_ids": rows}), kinds


TREES = rows_of_trees(60)[0]


@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_batches_hold_rows_that_begin_alike_as_far_as_these_fill_them(size: int, seed: int | None) -> None:
    dataset, kinds = rows_of_trees(100)
    sampler = PrefixGroups(dataset, size, seed)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(100))
        epochs.append(order)
        batches = [order[start : start + size] for start in range(0, 100, size)]
        tools = [sum(1 for row in range(100) if kinds[row][:2] == kind) for kind in {kind[:2] for kind in kinds}]
        prompts = [sum(1 for row in range(100) if kinds[row][0] == prompt) for prompt in (0, 1)]
        full = [batch for batch in batches if len(batch) == size]
        alike = [batch for batch in full if len({kinds[row][:2] for row in batch}) == 1]
        under_one_prompt = [batch for batch in full if len({kinds[row][0] for row in batch}) == 1]
        assert len(alike) >= sum(count // size for count in tools)
        assert len(under_one_prompt) >= sum(count // size for count in prompts)
    assert epochs[0] == list(PrefixGroups(dataset, size, seed))
    if seed is None:
        assert epochs[0] == epochs[1]
    else:
        together = [groups([order[start : start + size] for start in range(0, 100, size)]) for order in epochs]
        assert not together[0] & together[1]
        assert epochs[0] != list(PrefixGroups(dataset, size, seed + 2))


def test_rows_without_much_in_common_are_shuffled_as_ever() -> None:
    draw = np.random.default_rng(1)
    rows = [[1] * 12 + draw.integers(2, 9999, 100).tolist() for _ in range(50)]
    order = list(PrefixGroups(Dataset.from_dict({"input_ids": rows}), 5, 0))
    assert sorted(order) == list(range(50))
    assert order != list(range(50))
    assert list(PrefixGroups(Dataset.from_dict({"input_ids": rows}), 5, None)) == list(range(50))


def test_rows_are_grouped_as_they_were_selected() -> None:
    dataset, kinds = rows_of_trees(40)
    chosen = [*range(39, -1, -3)]
    order = list(PrefixGroups(dataset.select(chosen), 3, None))
    assert sorted(order) == list(range(len(chosen)))
    assert len({kinds[chosen[row]][:2] for row in order[:3]}) == 1


def test_batches_by_tokens_take_rows_in_a_given_order() -> None:
    batches = TokenBatches(np.array([3, 9, 4, 4, 0, 1]), 10, seed=None, order=np.array([5, 4, 3, 2, 1, 0]))
    assert list(batches) == [[5, 4, 3, 2], [1], [0]]
    assert len(batches) == 3


# On the way through a loader


@pytest.mark.parametrize("kind", ["tokens", "groups", "prefixes"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_loader_goes_on_with_the_batches_of_its_epoch(kind: str, processes: int) -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 60)

    def loader(rank: int) -> Any:
        numbers: Any = range(60)
        sampler: Any = {
            "tokens": TokenBatches(lengths, 400, seed=0),
            "groups": LengthGroups(lengths, 4, 0),
            "prefixes": PrefixGroups(TREES, 4, 0),
        }[kind]
        if processes > 1:
            share = Share(rank=rank, processes=processes)
            sampler = StepSampler(sampler, lengths, share, rows=None if kind == "tokens" else 4)
        plain: DataLoader[int]
        if isinstance(sampler, LengthGroups | PrefixGroups):
            plain = DataLoader(numbers, 4, sampler=sampler, collate_fn=list)
        else:
            plain = DataLoader(numbers, batch_sampler=sampler, collate_fn=list)
        return register_sampler(prepare_data_loader(plain, num_processes=1, process_index=0))

    for rank in range(processes):
        whole = loader(rank)
        epochs = [list(whole) for _ in range(3)]
        assert epochs[0] != epochs[1] != epochs[2]
        resumed = skip_first_batches(loader(rank), 2)
        resumed.set_epoch(1)  # as the Trainer does
        assert list(resumed) == epochs[1][2:]


@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(("rows", "multiple", "blanks"), [(8, 4, 0), (7, 4, 1), (3, 8, 5), (5, 2, 1)])
def test_a_data_set_is_evened_with_rows_without_labels(rows: int, multiple: int, blanks: int, packing: bool) -> None:
    columns: dict[str, Any] = {"input_ids": [5, 6], "labels": [-100, 6], "weights": [1.0, 2.0]}
    blank: dict[str, Any] = {"input_ids": [5], "labels": [-100], "weights": [1.0]}
    if packing:
        columns, blank = columns | {"seq_lengths": [2]}, blank | {"seq_lengths": [1]}
    longer: Any = with_blank_rows(Dataset.from_list([columns] * rows), multiple)
    assert list(longer) == [columns] * rows + [blank] * blanks
    assert not blanks or longer.total_dataset_length == rows


# Lengths


def test_lengths_follow_a_selection_of_rows() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1] * n for n in (4, 2, 7, 1)]})
    assert lengths_of(dataset).tolist() == [4, 2, 7, 1]
    assert lengths_of(dataset.select([2, 0])).tolist() == [7, 4]
    assert lengths_of(dataset.select(range(1, 3))).tolist() == [2, 7]
    assert lengths_of(dataset.with_format("torch")).tolist() == [4, 2, 7, 1]


TREE: dict[str, Any] = {
    "input_ids": [*range(10, 32)],
    "labels": [-100] * 9 + [19, *[-100] * 8, 28, 29, -100, 31],
    "seq_lengths": [8, 2, 8, 2, 2],
    "parents": [-1, 0, 0, 2, 2],
}
"""Three documents of 10, 18, and 18 tokens."""
PLAIN: dict[str, Any] = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "seq_lengths": [3], "parents": [-1]}


def test_documents_that_share_count_once_in_a_flat_batch_and_are_rows_of_a_padded_one() -> None:
    dataset = Dataset.from_list([PLAIN, TREE, PLAIN | {"seq_lengths": None, "parents": None}])
    rows = list(dataset)
    for padded, expected in ((False, [3, 22, 3]), (True, [3, 54, 3])):
        assert lengths_of(dataset, padded=padded).tolist() == expected
        assert lengths_of(dataset.select([1]), padded=padded).tolist() == expected[1:2]
        collator = PaddedCollator() if padded else FlatCollator()
        assert [collator([row]).computed_tokens for row in rows] == expected


def test_rows_of_several_documents_are_divided_for_logits() -> None:
    found = list(by_document(Dataset.from_list([TREE, PLAIN])))
    shared, between = [*range(10, 18)], [*range(20, 28)]
    assert document_lengths(Dataset.from_list([TREE, PLAIN])).tolist() == [10, 18, 18, 3]
    assert document_lengths(Dataset.from_list([TREE, PLAIN]).select([1, 1])).tolist() == [3, 3]
    assert found == [
        {"input_ids": [*shared, 18, 19], "labels": [-100] * 9 + [19]},
        {"input_ids": [*shared, *between, 28, 29], "labels": [-100] * 16 + [28, 29]},
        {"input_ids": [*shared, *between, 30, 31], "labels": [-100] * 17 + [31]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    ]
    alone = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}])
    assert by_document(alone) is alone


def test_blank_rows_beside_trees_have_documents_without_labels() -> None:
    longer = with_blank_rows(Dataset.from_list([TREE]), 2)
    assert all(example.target_count == 0 for group in groups_of(longer[1]) for example in group)
    assert FlatCollator()(list(longer)).supervised == FlatCollator()([TREE]).supervised


def test_a_row_over_the_budget_is_named_with_what_to_write() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1] * n for n in (4, 2, 7, 1)]})
    expected = (
        "eval data: row 2 takes 7 tokens, over max_tokens_per_batch: 6; "
        "write max_tokens_per_batch: 7 or more, or max_length: 6 or less"
    )
    with pytest.raises(TunesmithError) as caught:
        fitting_lengths(dataset, "eval", 6)
    assert str(caught.value) == expected
    assert fitting_lengths(dataset, "eval", 7).tolist() == [4, 2, 7, 1]
    assert fitting_lengths(dataset, "eval", 8, multiple=8).tolist() == [8, 8, 8, 8]
    with pytest.raises(TunesmithError, match="row 0 takes 8 tokens"):
        fitting_lengths(dataset, "eval", 7, multiple=8)


def test_data_without_token_lists_is_refused_with_its_columns() -> None:
    with pytest.raises(TunesmithError, match="need a column input_ids; the data set has text, n"):
        lengths_of(Dataset.from_dict({"text": ["a"], "n": [1]}))
