"""Subclasses that compute their own loss, as scripts for `transformers` and TRL do, train by that loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from tests.train.runs import END, PAIR_ROWS, largest_difference, weights_of
from tunesmith import SFTTrainer, TunesmithError

Make = Callable[..., Any]


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[..., :-1, :].reshape(-1, logits.shape[-1]), labels[..., 1:].reshape(-1)


def class_weights(like: Tensor) -> Tensor:
    weights = torch.ones(like.shape[-1])
    weights[END] = 5.0
    return weights


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(*shifted(logits, labels), weight=class_weights(logits), ignore_index=-100)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    losses = cross_entropy(*shifted(logits, labels), reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses)[losses != 0].mean()


class Weighted(SFTTrainer):
    """As written for `transformers` before 4.46: no `num_items_in_batch`, labels popped, no logits returned."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:  # type: ignore[override]
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = weighted(outputs.get("logits"), labels)
        return (loss, outputs) if return_outputs else loss


class Focal(SFTTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = focal(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Distilled(SFTTrainer):
    teacher: Any

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher(**inputs)
        loss = 0.5 * outputs.loss + 0.5 * distance(outputs.logits, teacher.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def distance(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    (student, targets), (teacher, _) = shifted(student, labels), shifted(teacher, labels)
    kept = targets != -100
    return kl_div(log_softmax(student[kept], -1), softmax(teacher[kept], -1), reduction="batchmean")


class Summed(SFTTrainer):
    """As `transformers` documents it today."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        return cross_entropy(*shifted(logits, inputs["labels"]), reduction="sum") / num_items_in_batch


class Unread(SFTTrainer):
    """Takes what newer versions hand out, and computes the mean without it."""

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        return weighted(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])


class Watching(SFTTrainer):
    """Adds to the loss of tunesmith, and looks at what it was made of."""

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        assert outputs.logits.shape[:2] == inputs["labels"].shape
        assert float(outputs.loss) == float(loss)
        return (loss, outputs) if return_outputs else loss


def rows_of(trainer: SFTTrainer) -> list[dict[str, Any]]:
    """The prepared rows."""
    dataset: Any = trainer.train_dataset
    return list(dataset)


def plain_rows(rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels (B, T) of prepared rows, padded on the right."""
    size = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (size - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (size - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (size - len(row["labels"])) for row in rows])
    return ids, mask, labels


def stepped(model: Any, rows: Any, loss_of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> tuple[float, Any]:
    """The loss of all rows, and the weights after a step of SGD by it, without any trainer."""
    ids, mask, labels = plain_rows(rows)
    model.train()
    loss = loss_of(model(input_ids=ids, attention_mask=mask).logits, labels, ids, mask)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad
    return loss.item(), {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", [Weighted, Focal, Distilled, Summed, Watching])
def test_a_subclass_trains_by_its_own_loss(
    kind: type[SFTTrainer], packing: bool, model_of: Make, config: Make, tokenizer: Any
) -> None:
    teacher = model_of("llama", initializer_range=0.1, hidden_size=16)

    def expected_loss(logits: Tensor, labels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        if kind is Distilled:
            by_teacher = teacher(input_ids=ids, attention_mask=mask).logits.detach()
            return 0.5 * cross_entropy(*shifted(logits, labels)) + 0.5 * distance(logits, by_teacher, labels)
        named = {Weighted: weighted, Focal: focal}
        return named.get(kind, lambda *both: cross_entropy(*shifted(*both)))(logits, labels)

    args = config(optim="sgd", packing=packing, max_length=32, self_test="off")
    trainer = kind(model_of(), args, train_dataset=PAIR_ROWS, processing_class=tokenizer)
    trainer.teacher = teacher  # type: ignore[attr-defined]
    unpacked = SFTTrainer(model_of(), config(max_length=32), train_dataset=PAIR_ROWS, processing_class=tokenizer)
    rows = rows_of(unpacked)
    loss, weights = stepped(model_of(), rows, expected_loss)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)
    assert largest_difference(weights_of(trainer), weights) < 1e-6
    assert trainer.state.log_history[0]["num_tokens"] == sum(len(row["input_ids"]) for row in rows)


@pytest.mark.parametrize("kind", [Weighted, Unread, Focal, Summed])
def test_micro_batches_of_a_step_weigh_as_their_loss_says(
    kind: type[SFTTrainer], model_of: Make, config: Make, tokenizer: Any
) -> None:
    """Of means over micro-batches the mean is taken; sums over the step's number of items are added up."""
    rows = [{"input_ids": [3, 4, 5, 6, 7, END]}, {"input_ids": [8, 9, END]}]
    args = config(optim="sgd", per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer = kind(model_of(), args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    model, loss_of = (
        model_of(),
        {Weighted: weighted, Unread: weighted, Focal: focal}.get(kind, lambda *both: cross_entropy(*shifted(*both))),
    )
    ids = [torch.tensor([row["input_ids"]]) for row in rows]
    first, second = (loss_of(model(input_ids=row).logits, row).item() for row in ids)
    mean = (5 * first + 2 * second) / 7 if kind is Summed else (first + second) / 2
    assert trainer.state.log_history[0]["loss"] == pytest.approx(mean, abs=1e-5)


def test_evaluation_takes_the_same_loss_and_gets_logits(model_of: Make, config: Make, tokenizer: Any) -> None:
    def shapes(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape[:2] == prediction.label_ids.shape
        return {"rows": len(prediction.label_ids)}

    common: dict[str, Any] = {"args": config(), "processing_class": tokenizer}
    common |= {"train_dataset": PAIR_ROWS, "eval_dataset": PAIR_ROWS}
    rows = rows_of(SFTTrainer(model_of(), **common))
    expected, _ = stepped(model_of(), rows, lambda logits, labels, *_: weighted(logits, labels))
    for metrics in (None, shapes):
        found = Weighted(model_of(), **common, compute_metrics=metrics).evaluate()
        assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert found["eval_rows"] == 8


def test_the_eval_loss_is_what_a_subclass_makes_of_ours(model_of: Make, config: Make, tokenizer: Any) -> None:
    class Doubled(SFTTrainer):
        def compute_loss(  # type: ignore[override]
            self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
        ) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    class Older(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:  # type: ignore[override]
            return super().compute_loss(model, inputs) + super().compute_loss(model, inputs)

    rows = [{"input_ids": [3, 4, 5, 6, 7, END]}, {"input_ids": [8, 9, END]}]
    common: dict[str, Any] = {"args": config(per_device_eval_batch_size=1), "processing_class": tokenizer}
    common |= {"train_dataset": rows, "eval_dataset": rows}
    ours = SFTTrainer(model_of(), **common).evaluate()
    for kind in (Doubled, Older):
        found = kind(model_of(), **common).evaluate()
        assert found["eval_loss"] == pytest.approx(2 * ours["eval_loss"], abs=1e-5)
        assert found["eval_mean_token_accuracy"] == ours["eval_mean_token_accuracy"]


class OwnStep(SFTTrainer):
    """A step with the signature of `transformers` before 4.46."""

    def training_step(self, model: Any, inputs: Any) -> Tensor:  # type: ignore[override]
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_training_step_of_ones_own_is_logged_and_guarded(model_of: Make, config: Make, tokenizer: Any) -> None:
    def run(kind: type[SFTTrainer]) -> SFTTrainer:
        args = config(optim="sgd", max_steps=2)
        trainer = kind(model_of(), args, train_dataset=PAIR_ROWS, processing_class=tokenizer)
        trainer.train()
        return trainer

    own, ours = run(OwnStep), run(SFTTrainer)
    assert largest_difference(weights_of(own), weights_of(ours)) < 1e-6
    assert [entry.get("loss") for entry in own.state.log_history] == pytest.approx(
        [entry.get("loss") for entry in ours.state.log_history], abs=1e-5
    )


def test_what_only_the_loss_of_tunesmith_heeds_is_not_lost(model_of: Make, config: Make, tokenizer: Any) -> None:
    weights = [row | {"weight": 0.5 + i} for i, row in enumerate(PAIR_ROWS)]
    for rows, settings, lost in (
        (weights, {}, "the rows have weights"),
        (PAIR_ROWS, {"loss_type": "dft"}, "loss_type is dft"),
    ):
        common: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer}
        with pytest.raises(TunesmithError, match=f"{lost}, but compute_loss of Focal does not call super"):
            Focal(model_of(), config(**settings), **common).train()
        watching = Watching(model_of(), config(optim="sgd", **settings), **common)
        watching.train()
        plain = SFTTrainer(model_of(), config(optim="sgd", **settings), **common)
        plain.train()
        assert largest_difference(weights_of(watching), weights_of(plain)) < 1e-6


def test_labels_that_were_popped_are_asked_back(model_of: Make, config: Make, tokenizer: Any) -> None:
    class Popping(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs.pop("labels")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Popping(model_of(), config(), train_dataset=PAIR_ROWS, processing_class=tokenizer)
    with pytest.raises(TunesmithError, match="take a copy before you pop them"):
        trainer.train()


def test_inputs_that_were_changed_are_what_is_trained_on(model_of: Make, config: Make, tokenizer: Any) -> None:
    class Shortened(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs["labels"] = torch.where(inputs["labels"] == END, -100, inputs["labels"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows = [{"input_ids": [3, 4, 5, END, 6, 7, END]}]
    args = config(allow_no_eos=True)
    changed = Shortened(model_of(), args, train_dataset=rows, processing_class=tokenizer)
    labels = [{"input_ids": rows[0]["input_ids"], "labels": [3, 4, 5, -100, 6, 7, -100]}]
    same = SFTTrainer(model_of(), args, train_dataset=labels, processing_class=tokenizer)
    losses = []
    for trainer in (changed, same):
        model: Any = trainer.model
        losses.append(trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_it_is_said_what_a_subclass_is_given(
    model_of: Make, config: Make, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    Focal(model_of(), config(packing=True), train_dataset=PAIR_ROWS, processing_class=tokenizer)
    assert "Focal overrides compute_loss: it gets padded batches in plain dictionaries" in caplog.text
    assert "packs are taken apart" in caplog.text


def test_what_only_trls_trainer_would_call_stops_the_run_unless_it_is_called(
    model_of: Make, config: Make, tokenizer: Any
) -> None:
    class Preparing(SFTTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return self._prepare_dataset(dataset, *args, **kwargs)

    class Helping(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return (lambda: self._compute_loss(*args, **kwargs))()

        def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(TunesmithError, match=r"Preparing overrides _prepare_dataset, .* formatting_func="):
        Preparing(model_of(), config(), train_dataset=PAIR_ROWS, processing_class=tokenizer)
    Helping(model_of(), config(max_steps=1), train_dataset=PAIR_ROWS, processing_class=tokenizer).train()


@pytest.mark.parametrize("make", [Dataset.from_list, list])
def test_other_columns_of_the_rows_reach_a_collator_that_is_to_see_them(
    make: Callable[[Any], Any], model_of: Make, config: Make, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[int, float | None]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        seen.extend((len(row["input_ids"]), row.get("share")) for row in rows)
        return dict(zip(("input_ids", "attention_mask", "labels"), plain_rows(rows), strict=True))

    def seen_of(**settings: Any) -> list[tuple[int, float | None]]:
        seen.clear()
        rows = make([{"input_ids": [3] * size + [END], "share": size / 2} for size in (2, 3, 4, 5)])
        if make is list:
            rows = [row | {"mixed": odd} for row, odd in zip(rows, ["a", ["b"], 1, None], strict=True)]
        args = config(remove_unused_columns=False, shuffle_dataset=True, **settings)
        SFTTrainer(model_of(), args, train_dataset=rows, processing_class=tokenizer, data_collator=collate).train()
        return sorted(seen)

    assert seen_of() == [(3, 1.0), (4, 1.5), (5, 2.0), (6, 2.5)]
    assert "does not get" not in caplog.text
    assert seen_of(max_length=4, overlong="drop") == [(3, None), (4, None)]
    assert "the data_collator does not get share" in caplog.text
    assert ": of 4 rows, 2 became examples" in caplog.text
