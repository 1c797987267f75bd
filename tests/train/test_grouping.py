"""Which rows share a micro-batch where rows are padded, and the order of packs."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from tests.train.runs import PAIR_ROWS, UNEVEN_ROWS, watched


def spread(batches: list[list[tuple[int, ...]]]) -> int:
    """The tokens of padding in all batches."""
    return sum(len(batch) * max(map(len, batch)) - sum(map(len, batch)) for batch in batches)


def test_rows_are_grouped_by_length_where_a_model_needs_padding(
    trainer_of: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def padding(name: str, **settings: Any) -> int:
        trainer = trainer_of(name, train_dataset=UNEVEN_ROWS * 4, num_train_epochs=1, max_steps=-1, **settings)
        batches = watched(trainer)
        trainer.train()
        assert sorted(document for batch in batches for document in batch) == sorted(
            tuple(ids) for ids in trainer.train_dataset["input_ids"]
        )
        return spread(batches)

    grouped = padding("gpt_neo")
    assert "Batches are padded, rows of like length together: GPTNeoForCausalLM does not use" in caplog.text
    caplog.clear()
    in_order = padding("gpt_neo", train_sampling_strategy="sequential")
    assert "Batches are padded: GPTNeoForCausalLM does not use" in caplog.text
    assert grouped < in_order / 2
    assert padding("llama", padding_free=False) > grouped * 2  # asked for, and then as `transformers` has it
    assert padding("llama", padding_free=False, train_sampling_strategy="group_by_length") < in_order / 2


def test_grouping_reads_no_rows(trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(train_sampling_strategy="group_by_length", eval_dataset=PAIR_ROWS)
    monkeypatch.setattr(Dataset, "__iter__", lambda self: pytest.fail("the data set was read"))
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, key: pytest.fail("the data set was read"))
    trainer.get_train_dataloader()
    trainer.get_eval_dataloader()


def test_an_epoch_visits_the_packs_in_an_order_of_its_own(trainer_of: Callable[..., Any]) -> None:
    def epochs(seed: int) -> tuple[list[Any], list[Any]]:
        settings = {"packing": True, "max_length": 64, "per_device_train_batch_size": 1, "seed": seed}
        trainer = trainer_of(train_dataset=UNEVEN_ROWS, num_train_epochs=2, max_steps=-1, **settings)
        batches = watched(trainer)
        trainer.train()
        half = len(trainer.train_dataset)
        assert half > 5
        assert len(batches) == 2 * half
        return batches[:half], batches[half:]

    first, second = epochs(0)
    assert sorted(first) == sorted(second)
    assert first != second
    assert epochs(0) == (first, second)
    assert epochs(1) != (first, second)
