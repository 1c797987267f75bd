"""Runs whose micro-batches are made by tokens or by length."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.train.runs import UNEVEN_ROWS, largest_difference, token_losses, trained, watched
from tunesmith import SFTTrainer
from tunesmith.errors import TunesmithError


@pytest.fixture
def by_tokens(trainer_of: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a trainer with micro-batches of 64 tokens on UNEVEN_ROWS."""

    def make(name: str = "llama", **arguments: Any) -> Any:
        common = {"train_dataset": UNEVEN_ROWS, "max_tokens_per_batch": 64, "per_device_train_batch_size": 8}
        return trainer_of(name, **common | {"optim": "sgd"} | arguments)

    return make


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {}), ("gpt_neo", {}), ("llama", {"padding_free": False, "pad_to_multiple_of": 8})],
    ids=["flat", "padded model", "padded"],
)
def test_a_step_of_all_batches_is_the_step_of_one_batch_of_all_rows(
    name: str, settings: dict[str, Any], by_tokens: Callable[..., Any], trainer_of: Callable[..., Any]
) -> None:
    whole = trainer_of(name, train_dataset=UNEVEN_ROWS, optim="sgd", per_device_train_batch_size=24, **settings)
    expected = trained(whole)
    trainer = by_tokens(name, gradient_accumulation_steps=99, **settings)
    batches = watched(trainer)
    found = trained(trainer)
    assert trainer.state.global_step == 1
    assert len(batches) > 5
    assert sorted(document for batch in batches for document in batch) == sorted(
        tuple(ids) for ids in trainer.train_dataset["input_ids"]
    )
    for batch in batches:
        rows = len(batch) * max(map(len, batch)) if name == "gpt_neo" or settings else sum(map(len, batch))
        assert rows <= 64
    assert largest_difference(found, expected) < 1e-6
    assert trainer.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], abs=1e-5)


def test_accumulation_divides_the_steps_of_an_epoch_and_stays_exact(by_tokens: Callable[..., Any]) -> None:
    trainer = by_tokens(gradient_accumulation_steps=3, num_train_epochs=2, max_steps=-1, learning_rate=0.0)
    batches = watched(trainer)
    trainer.train()
    count = len(batches) // 2
    steps = -(-count // 3)
    assert trainer.state.global_step == 2 * steps
    assert {*map(frozenset, batches[:count])} != {*map(frozenset, batches[count:])}
    # The weights stay as they are, so that each step's loss is the mean over its documents' supervised tokens.
    losses = {
        tuple(row["input_ids"]): loss
        for row, loss in zip(trainer.train_dataset, token_losses(trainer.model, trainer.train_dataset), strict=True)
    }
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    firsts = [*range(0, count, 3), *range(count, 2 * count, 3)]
    for loss, first in zip(logged, firsts, strict=True):
        step = batches[first : min(first + 3, count if first < count else 2 * count)]
        expected = torch.cat([losses[document] for batch in step for document in batch]).mean()
        assert loss == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {"max_tokens_per_batch": 64, "per_device_train_batch_size": 8}), ("gpt_neo", {})],
    ids=["by tokens", "grouped by length"],
)
def test_a_run_resumed_within_its_second_epoch_ends_where_an_uninterrupted_one_does(
    name: str, settings: dict[str, Any], tmp_path: Path, trainer_of: Callable[..., Any]
) -> None:
    def run(folder: str) -> SFTTrainer:
        common = {"max_steps": 8, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 6}
        common |= {"per_device_train_batch_size": 3, "train_dataset": UNEVEN_ROWS, "output_dir": str(tmp_path / folder)}
        trainer: SFTTrainer = trainer_of(name, **common | settings)
        return trainer

    whole = run("whole")
    batches = watched(whole)
    expected = trained(whole)
    resumed = run("resumed")
    again = watched(resumed)
    found = trained(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    in_epoch = len(whole.get_train_dataloader())
    assert in_epoch < 12 < 2 * in_epoch, "the break is not within the second epoch"
    assert [batch for batch in again if batch in batches[12:]][: len(batches) - 12] == batches[12:]
    assert largest_difference(found, expected) == 0.0


def test_rows_per_second_count_the_rows_that_were_read(by_tokens: Callable[..., Any]) -> None:
    trainer = by_tokens(gradient_accumulation_steps=3, max_steps=3)
    batches = watched(trainer)
    metrics = trainer.train().metrics
    read = sum(map(len, batches[:9]))
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(read, rel=0.1)


def test_rows_eight_by_one_or_one_by_eight_end_in_the_same_weights(trainer_of: Callable[..., Any]) -> None:
    def run(batch: int, steps: int) -> Any:
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 6}
        return trained(trainer_of(train_dataset=UNEVEN_ROWS, optim="sgd", learning_rate=0.1, **settings))

    expected = run(8, 1)
    for batch, steps in [(1, 8), (4, 2)]:
        assert largest_difference(run(batch, steps), expected) < 1e-6


def test_evaluation_by_tokens_is_evaluation_by_rows(
    by_tokens: Callable[..., Any], trainer_of: Callable[..., Any]
) -> None:
    names = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    trainer = by_tokens(eval_dataset=UNEVEN_ROWS[:11], share_prefix="off")  # which would decide the order
    batches = watched(trainer)
    found, expected = trainer.evaluate(), trainer_of(eval_dataset=UNEVEN_ROWS[:11]).evaluate()
    assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], abs=1e-6)
    assert len(batches) > 1
    assert all(sum(map(len, batch)) <= 64 for batch in batches)
    assert max(map(len, batches)) > 3


def test_metrics_and_predictions_still_come_row_by_row_in_order(by_tokens: Callable[..., Any]) -> None:
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.extend([x for x in row if x != -100] for row in prediction.label_ids)
        return {}

    trainer = by_tokens(eval_dataset=UNEVEN_ROWS[:11], compute_metrics=compute_metrics, per_device_eval_batch_size=2)
    trainer.evaluate()
    expected = [[x for x in row if x != -100] for row in trainer.eval_dataset["labels"]]
    assert seen == expected
    found = trainer.predict(UNEVEN_ROWS[:11]).label_ids
    assert [[x for x in row if x != -100] for row in found] == expected


@pytest.mark.parametrize("split", ["train", "eval"])
def test_an_example_over_the_budget_stops_before_weights_load(
    split: str, by_tokens: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.train.rows.prepare_model", lambda *_: pytest.fail("weights were loaded"))
    long = [*UNEVEN_ROWS[:2], {"prompt": "a" * 60, "completion": "b" * 10}]
    data = {"train_dataset": long} if split == "train" else {"eval_dataset": {"eval": long}}
    with pytest.raises(TunesmithError, match=f"{split} data: row 2 takes 71 tokens, over max_tokens_per_batch: 64"):
        by_tokens(**data)


@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
def test_a_stream_has_no_lengths_to_batch_by(split: str, by_tokens: Callable[..., Any]) -> None:
    with pytest.raises(TunesmithError, match="needs all lengths, which a stream does not tell"):
        by_tokens(**{split: Dataset.from_list(UNEVEN_ROWS).to_iterable_dataset()})
