"""What `evaluate` and `predict` measure."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.train.runs import PAIR_ROWS, REASONING, TALKS, token_losses
from tunesmith.data.samplers import by_document
from tunesmith.errors import TunesmithError
from tunesmith.train import limits as logits


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_eval_loss_is_the_mean_over_tokens_whatever_the_batches(
    name: str, batch: int, trainer_of: Callable[..., Any]
) -> None:
    trainer = trainer_of(name, eval_dataset=PAIR_ROWS, per_device_eval_batch_size=batch)
    losses = token_losses(trainer.model, trainer.eval_dataset)
    mean = torch.cat(losses).mean().item()
    assert abs(mean - torch.stack([row.mean() for row in losses]).mean().item()) > 1e-3  # or nothing would be shown
    assert abs(trainer.evaluate()["eval_loss"] - mean) < 1e-5


@pytest.mark.parametrize("settings", [{"packing": True}, {"padding_free": False}, {"eval_packing": True}], ids=str)
def test_packed_padded_and_plain_evaluation_agree(settings: dict[str, Any], trainer_of: Callable[..., Any]) -> None:
    names = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    plain = trainer_of(eval_dataset=PAIR_ROWS, max_length=64).evaluate()
    other = trainer_of(eval_dataset=PAIR_ROWS, max_length=64, **settings).evaluate()
    assert [other[name] for name in names] == pytest.approx([plain[name] for name in names], abs=1e-6)


def test_weights_count_in_evaluation_too(trainer_of: Callable[..., Any]) -> None:
    rows = [row | {"weight": 1.0 + i} for i, row in enumerate(PAIR_ROWS)]
    trainer = trainer_of(eval_dataset=rows, per_device_eval_batch_size=3)
    losses = token_losses(trainer.model, trainer.eval_dataset)
    weights = torch.cat([torch.full_like(row, 1.0 + i) for i, row in enumerate(losses)])
    expected = (torch.cat(losses) * weights).sum() / weights.sum()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_conversations_are_evaluated_document_by_document(
    batch: int, trainer_of: Callable[..., Any], tokenizer: Any
) -> None:
    tokenizer.chat_template = REASONING
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append([[x for x in row if x != -100] for row in prediction.label_ids])
        return {"rows": len(prediction.predictions)}

    common: dict[str, Any] = {"train_dataset": TALKS, "eval_dataset": TALKS, "train_on": "assistant"}
    common |= {"per_device_eval_batch_size": batch}
    plain, metrics = trainer_of(**common), trainer_of(**common, compute_metrics=compute_metrics)
    documents = by_document(plain.eval_dataset)
    expected = torch.cat(token_losses(plain.model, documents)).mean().item()
    assert plain.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    found = metrics.evaluate()
    assert (found["eval_loss"], found["eval_rows"]) == (pytest.approx(expected, abs=1e-5), 12)
    learned = [[x for x in row if x != -100] for row in documents["labels"]]
    assert seen == [learned]
    assert [[x for x in row if x != -100] for row in plain.predict(TALKS).label_ids] == learned


def test_several_eval_sets_are_reported_by_name(trainer_of: Callable[..., Any]) -> None:
    sets = {"short": PAIR_ROWS[:2], "long": Dataset.from_list(PAIR_ROWS[2:])}
    trainer = trainer_of(eval_dataset=sets, eval_strategy="steps", eval_steps=1)
    trainer.train()
    history = list(trainer.state.log_history)
    for name in ("short", "long"):
        expected = torch.cat(token_losses(trainer.model, trainer.eval_dataset[name])).mean().item()
        (logged,) = [entry for entry in history if f"eval_{name}_loss" in entry]
        assert logged[f"eval_{name}_loss"] == pytest.approx(expected, abs=1e-5)
        assert logged[f"eval_{name}_mean_token_accuracy"] >= 0
        assert trainer.evaluate(sets)[f"eval_{name}_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 64}, {"completion_only_loss": True}], ids=str)
def test_new_rows_and_prepared_ones_can_be_evaluated(settings: dict[str, Any], trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(eval_dataset=PAIR_ROWS[:3], **settings)
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(PAIR_ROWS[:3])["eval_loss"] == expected
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == expected
    assert trainer.evaluate(PAIR_ROWS[3:])["eval_loss"] != expected
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(
        trainer.evaluate(PAIR_ROWS)["eval_loss"], abs=1e-6
    )


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 64}], ids=["plain", "packing"])
@pytest.mark.parametrize("reduced", [False, True], ids=["logits", "reduced"])
def test_metrics_get_logits_and_labels_row_by_row(
    reduced: bool, settings: dict[str, Any], trainer_of: Callable[..., Any]
) -> None:
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"rows": float(len(prediction.label_ids))}

    trainer = trainer_of(
        eval_dataset=PAIR_ROWS[:5],
        per_device_eval_batch_size=2,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=(lambda logits, labels: logits.argmax(dim=-1)) if reduced else None,
        **settings,
    )
    result = trainer.evaluate()
    (prediction,) = seen
    rows = trainer_of().train_dataset[:5]
    longest = max(len(ids) for ids in rows["input_ids"])
    assert result["eval_rows"] == 5
    assert prediction.label_ids.shape == (5, longest)
    assert [[x for x in row if x != -100] for row in prediction.label_ids] == [
        [x for x in row if x != -100] for row in rows["labels"]
    ]
    assert prediction.predictions.shape == ((5, longest) if reduced else (5, longest, 259))
    best = prediction.predictions if reduced else prediction.predictions.argmax(axis=-1)
    targets = prediction.label_ids[:, 1:]
    assert np.mean((best[:, :-1] == targets)[targets != -100]) == pytest.approx(result["eval_mean_token_accuracy"])
    plain = trainer_of(eval_dataset=PAIR_ROWS[:5]).evaluate()
    assert result["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)


class Accuracy:
    """Of batches that come one at a time; `seen` refers to their logits."""

    def __init__(self) -> None:
        self.right = self.tokens = 0
        self.seen: list[weakref.ref[Any]] = []

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        assert all(gone() is None for gone in self.seen)
        self.seen.append(weakref.ref(prediction.predictions))
        targets = prediction.label_ids[:, 1:]
        right = prediction.predictions[:, :-1].argmax(dim=-1) == targets
        self.right += int(right[targets != -100].sum())
        self.tokens += int((targets != -100).sum())
        return {"accuracy": self.right / self.tokens} if compute_result else {}


def test_metrics_by_batch_hold_the_logits_of_one_batch(trainer_of: Callable[..., Any]) -> None:
    metric = Accuracy()
    result = trainer_of(
        eval_dataset=PAIR_ROWS[:5], per_device_eval_batch_size=2, batch_eval_metrics=True, compute_metrics=metric
    ).evaluate()
    assert len(metric.seen) == 3
    assert result["eval_accuracy"] == pytest.approx(result["eval_mean_token_accuracy"])


@pytest.mark.parametrize("named", [False, True], ids=["one", "named"])
def test_more_logits_than_fit_are_refused_before_training(
    named: bool, trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer_of()
    longest = max(len(ids) for ids in plain.train_dataset["input_ids"][:5])
    held = 5 * longest * 259 * 4
    settings: dict[str, Any] = {
        "eval_dataset": {"held": PAIR_ROWS[:5]} if named else PAIR_ROWS[:5],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "compute_metrics": lambda prediction, compute_result=True: {},
    }
    monkeypatch.setattr(logits, "available", lambda: 2 * held - 2)
    name = "held" if named else "eval"
    message = f"{name} data: .* {held:,} bytes .*preprocess_logits_for_metrics.*batch_eval_metrics"
    trainer = trainer_of(**settings)
    with pytest.raises(TunesmithError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(TunesmithError, match=f"{held:,} bytes"):
        trainer.evaluate()
    reduced = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(dim=-1)}
    for way in (reduced, {"batch_eval_metrics": True}):
        assert f"eval_{'held_' if named else ''}loss" in trainer_of(**settings, **way).evaluate()
    monkeypatch.setattr(logits, "available", lambda: 2 * held)
    trainer_of(**settings).train()


def test_predict_gives_logits_row_by_row(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(per_device_eval_batch_size=2)
    result = trainer.predict(PAIR_ROWS[:5])
    longest = max(len(ids) for ids in trainer.train_dataset["input_ids"][:5])
    assert result.predictions.shape == (5, longest, 259)
    expected = torch.cat(token_losses(trainer.model, trainer.train_dataset.select(range(5)))).mean()
    assert result.metrics["test_loss"] == pytest.approx(expected.item(), abs=1e-5)
