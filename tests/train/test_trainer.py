"""What a run computes, and the arguments that scripts written for TRL's trainer give."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from tests.models import PADDED
from tests.train.runs import (
    END,
    PAIR_ROWS,
    REASONING,
    TALKS,
    TEXT_ROWS,
    TEXTS,
    Weights,
    largest_difference,
    token_losses,
    trained,
    weights_of,
)
from tunesmith import SFTConfig, SFTTrainer, TunesmithError

# The data


def test_the_prepared_rows_hold_unshifted_labels(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(train_dataset=[{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bc"}])
    ids = {token: trainer.processing_class.convert_tokens_to_ids(token) for token in "abc"}
    a, b, c = (ids[token] for token in "abc")
    assert trainer.train_dataset[:] == {
        "input_ids": [[a, b, c, END], [a, b, c, END]],
        "labels": [[-100, -100, c, END], [-100, b, c, END]],
    }


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_rows_may_be_a_list_or_a_dataset(kind: Any, trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(train_dataset=kind(TEXT_ROWS), eval_dataset=kind(TEXT_ROWS[:3]))
    assert [len(ids) for ids in trainer.train_dataset["input_ids"]] == [len(text) + 1 for text in TEXTS]
    assert len(trainer.eval_dataset) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_trains_as_its_rows_do(workers: int, trainer_of: Callable[..., Any]) -> None:
    dataset = Dataset.from_list(PAIR_ROWS)
    stream = dataset.to_iterable_dataset(num_shards=max(workers, 1))
    settings = {"optim": "sgd", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    found = trained(trainer_of(train_dataset=stream, dataloader_num_workers=workers, **settings))
    assert largest_difference(found, trained(trainer_of(**settings))) < 1e-6


def test_a_data_set_that_was_prepared_elsewhere_is_trained_on_as_it_is(trainer_of: Callable[..., Any]) -> None:
    plain = trainer_of(optim="sgd")
    settings = {"optim": "sgd", "dataset_kwargs": {"skip_prepare_dataset": True}}
    ready = Dataset.from_list(list(plain.train_dataset))
    assert largest_difference(trained(trainer_of(train_dataset=ready, **settings)), trained(plain)) == 0.0


def test_formatting_func_makes_the_rows(trainer_of: Callable[..., Any]) -> None:
    rows = [{"q": "abc", "a": "d"}]
    made = [lambda row: row["q"] + row["a"], lambda row: (row["q"], row["a"])]
    labels = [trainer_of(train_dataset=rows, formatting_func=f).train_dataset[0]["labels"] for f in made]
    assert [sum(label != -100 for label in row) for row in labels] == [5, 2]


# The loss of a step


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "gpt_oss"])
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
def test_accumulated_steps_are_the_same_step(name: str, weighted: bool, trainer_of: Callable[..., Any]) -> None:
    rows = [row | {"weight": 0.5 + i} for i, row in enumerate(PAIR_ROWS)] if weighted else PAIR_ROWS

    def run(batch: int, steps: int) -> tuple[Weights, float]:
        trainer = trainer_of(
            name,
            train_dataset=rows,
            optim="sgd",
            learning_rate=0.1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        loss = trainer.train().training_loss
        return weights_of(trainer), loss

    whole, loss = run(8, 1)
    for batch, steps in [(1, 8), (4, 2), (3, 3)]:
        parts, parts_loss = run(batch, steps)
        assert largest_difference(parts, whole) < 1e-6
        assert abs(parts_loss - loss) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_the_loss_of_a_step_is_the_mean_over_its_supervised_tokens(name: str, trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(name)
    expected = torch.cat(token_losses(trainer.model, trainer.train_dataset)).mean()
    assert abs(trainer.train().training_loss - expected.item()) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "max_length": 64},
        {"padding_free": False},
        {"padding_free": False, "pad_to_multiple_of": 16},
        {"activation_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "group_by_prefix"},
        {"dataloader_num_workers": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_how_a_batch_is_laid_out_does_not_change_the_step(
    settings: dict[str, Any], trainer_of: Callable[..., Any]
) -> None:
    expected = trained(trainer_of(optim="sgd"))
    assert largest_difference(trained(trainer_of(optim="sgd", **settings)), expected) < 1e-6


def test_packed_rows_are_fewer_and_hold_their_lengths(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(packing=True, max_length=32)
    lengths = trainer.train_dataset["seq_lengths"]
    assert len(lengths) < len(PAIR_ROWS)
    assert sorted(chain.from_iterable(lengths)) == sorted(len(r["prompt"] + r["completion"]) + 1 for r in PAIR_ROWS)


def test_adapters_are_trained_alike_packed_padded_and_checkpointed(trainer_of: Callable[..., Any]) -> None:
    def run(**settings: Any) -> Weights:
        return trained(trainer_of(peft_config=LoraConfig(target_modules="all-linear"), optim="sgd", **settings))

    expected = run()
    for settings in ({"packing": True}, {"padding_free": False}, {"activation_checkpointing": True}):
        assert largest_difference(run(max_length=64, **settings), expected) < 1e-6


def test_adapters_that_the_model_came_with_are_trained_on(
    model_of: Callable[..., PreTrainedModel], trainer_of: Callable[..., Any]
) -> None:
    for checkpointing in (False, True):
        model = get_peft_model(model_of(), LoraConfig(task_type="CAUSAL_LM"))
        trainer = trainer_of(model=model, activation_checkpointing=checkpointing)
        before = weights_of(trainer)
        changed = [name for name, value in trained(trainer).items() if not torch.equal(value, before[name])]
        assert changed
        assert all("lora_B" in name for name in changed)  # A gets no gradient while B is zero


def test_a_row_that_weighs_twice_is_a_row_given_twice(trainer_of: Callable[..., Any]) -> None:
    settings = {"optim": "sgd", "per_device_train_batch_size": 9}
    twice = trained(trainer_of(train_dataset=[*PAIR_ROWS, PAIR_ROWS[3]], **settings))
    rows = [row | {"weight": 2.0 if i == 3 else 1.0} for i, row in enumerate(PAIR_ROWS)]
    trainer = trainer_of(train_dataset=rows, **settings)
    assert trainer.train_dataset.column_names == ["input_ids", "labels", "weights"]
    assert largest_difference(trained(trainer), twice) < 1e-6


def test_label_smoothing_is_that_of_torch(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(label_smoothing_factor=0.2)
    expected = torch.cat(token_losses(trainer.model, trainer.train_dataset, smoothing=0.2)).mean()
    assert abs(trainer.train().training_loss - expected.item()) < 1e-5


def test_dft_is_the_loss_weighed_by_the_probability(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(loss_type="dft")
    nll = torch.cat(token_losses(trainer.model, trainer.train_dataset))
    assert abs(trainer.train().training_loss - (nll * (-nll).exp()).mean().item()) < 1e-5


def test_noise_on_the_embeddings_pads_the_batches(trainer_of: Callable[..., Any]) -> None:
    """Its size follows a row's length, which in a flat row would be that of all rows."""
    trainer = trainer_of(neftune_noise_alpha=5.0)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == len(PAIR_ROWS)
    plain = trainer_of()
    assert next(iter(plain.get_train_dataloader()))["input_ids"].shape[0] == 1
    assert abs(trainer.train().training_loss - plain.train().training_loss) > 1e-4


def test_bf16_trains_like_fp32_but_for_rounding(trainer_of: Callable[..., Any]) -> None:
    exact, rounded = (trainer_of(bf16=bf16).train().training_loss for bf16 in (False, True))
    assert 0 < abs(exact - rounded) < 2e-2


# What a script can plug in


@pytest.mark.parametrize("steps", [1, 4])
def test_compute_loss_func_gets_logits_and_is_the_loss(steps: int, trainer_of: Callable[..., Any]) -> None:
    shapes = []

    def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        shapes.append((outputs.logits.shape[:2], labels.shape))
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    expected = trained(trainer_of(optim="sgd"))
    settings = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
    trainer = trainer_of(optim="sgd", compute_loss_func=mean_loss, eval_dataset=PAIR_ROWS, **settings)
    assert largest_difference(trained(trainer), expected) < 1e-6
    assert [logits for logits, _ in shapes] == [labels for _, labels in shapes]
    assert [len(labels[1:]) and labels[0] for _, labels in shapes] == [8 // steps] * steps
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("padding_free", [True, False])
def test_outputs_beside_the_loss_are_those_of_its_own_pass(padding_free: bool, trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(padding_free=padding_free)
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    alone = trainer.compute_loss(model, batch)
    passes: list[int] = []
    model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert len(passes) == 1
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    assert outputs.logits.shape[:2] == batch["labels"].shape
    labels = batch["labels"][:, 1:].flatten()
    by_torch = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels)
    assert by_torch.item() == pytest.approx(alone.item(), rel=1e-5)
    assert by_torch.requires_grad


def test_callbacks_are_called_and_see_what_is_logged(trainer_of: Callable[..., Any]) -> None:
    class Watcher(TrainerCallback):
        steps = 0
        logs: dict[str, float] | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps += 1

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logs = self.logs or dict(logs)

    watcher = Watcher()
    trainer = trainer_of(callbacks=[watcher], max_steps=3)
    losses = torch.cat(token_losses(trainer.model, trainer.train_dataset))
    trainer.train()
    assert watcher.steps == 3
    assert watcher.logs is not None
    assert watcher.logs["loss"] == pytest.approx(losses.mean().item(), abs=1e-4)
    assert watcher.logs["num_tokens"] == sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    assert 0 <= watcher.logs["mean_token_accuracy"] <= 1
    assert 0 < watcher.logs["entropy"] < np.log(259)


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_an_optimizer_of_the_users_is_used(
    how: str, model_of: Callable[..., PreTrainedModel], trainer_of: Callable[..., Any]
) -> None:
    expected = trained(trainer_of(optim="sgd", learning_rate=0.1, lr_scheduler_type="constant"))
    model = model_of()
    if how == "optimizers":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        arguments: dict[str, Any] = {"optimizers": (optimizer, scheduler)}
    else:
        arguments = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}), "lr_scheduler_type": "constant"}
    trainer = trainer_of(model=model, **arguments)
    assert largest_difference(trained(trainer), expected) < 1e-7


def padded_by_hand(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    size = max(len(row["input_ids"]) for row in rows)
    pads = [size - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * n for row, n in zip(rows, pads, strict=True)]),
        "labels": torch.tensor([row["labels"] + [-100] * n for row, n in zip(rows, pads, strict=True)]),
        "attention_mask": torch.tensor([[1] * (size - n) + [0] * n for n in pads]),
    }


def test_a_collator_of_the_users_is_used(trainer_of: Callable[..., Any]) -> None:
    calls = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        calls.append(len(rows))
        return padded_by_hand(rows)

    found = trained(trainer_of(optim="sgd", data_collator=collate))
    assert calls == [8]
    assert largest_difference(found, trained(trainer_of(optim="sgd"))) < 1e-6


def test_the_collator_that_takes_all_tokens_for_labels_is_not_used_and_one_that_masks_is_refused(
    trainer_of: Callable[..., Any], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"input_ids": [3, 4, 5, END], "labels": [-100, -100, 5, END]}] * 8
    plain = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert plain([dict(row) for row in rows])["labels"][0].tolist() != [-100, -100, 5, END]
    given = trainer_of(optim="sgd", train_dataset=rows, data_collator=plain)
    assert "labels are those that the rows have" in caplog.text
    assert largest_difference(trained(given), trained(trainer_of(optim="sgd", train_dataset=rows))) == 0.0
    plain.mlm = True
    with pytest.raises(TunesmithError, match="leave data_collator out"):
        trainer_of(train_dataset=rows, data_collator=plain)


def test_a_collator_of_the_users_gets_each_document_of_a_conversation_as_a_row(
    trainer_of: Callable[..., Any], tokenizer: Any
) -> None:
    tokenizer.chat_template = REASONING
    common = {"optim": "sgd", "train_dataset": TALKS, "train_on": "assistant", "per_device_train_batch_size": 12}
    own = trainer_of(data_collator=padded_by_hand, **common)
    assert sorted(own.train_dataset.column_names) == ["input_ids", "labels"]
    assert len(own.train_dataset) == 12
    assert largest_difference(trained(own), trained(trainer_of(**common))) < 1e-6


def test_a_trainer_keeps_its_own_precision_when_another_config_or_trainer_is_made(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    expected = trained(trainer_of(optim="sgd", eval_dataset=PAIR_ROWS))
    trainer = trainer_of(optim="sgd", eval_dataset=PAIR_ROWS)
    SFTConfig(output_dir=str(tmp_path / "next"), use_cpu=True, report_to="none")
    assert trainer.evaluate()["eval_loss"] > 0
    other = trainer_of(bf16=True)
    assert largest_difference(trained(trainer), expected) == 0.0
    assert trainer.accelerator.mixed_precision == "no"
    trained(other)
    assert other.accelerator.mixed_precision == "bf16"


def test_plain_training_arguments_will_do(
    tmp_path: Path, trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        use_cpu=True,
        report_to="none",
        learning_rate=3e-3,
        warmup_steps=1,
        hub_token="a secret",
        save_strategy="no",
    )
    trainer = trainer_of(args=given)
    assert isinstance(trainer.args, SFTConfig)
    different = {
        key: (value, trainer.args.to_dict().get(key))
        for key, value in given.to_dict().items()
        if trainer.args.to_dict().get(key) != value
    }
    assert different == {}
    assert trainer.args.hub_token == "a secret"
    assert trainer.args.max_length == 1024
    trainer.train()


def test_without_arguments_the_output_folder_is_named_after_the_model(
    model_of: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model_of().save_pretrained("small-llama")
    tokenizer.save_pretrained("small-llama")
    trainer = SFTTrainer("small-llama", train_dataset=TEXT_ROWS)
    assert trainer.args.output_dir == "small-llama-SFT"


# Checkpoints


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    adapters: bool, tmp_path: Path, trainer_of: Callable[..., Any]
) -> None:
    def run(folder: str, **settings: Any) -> SFTTrainer:
        peft_config = LoraConfig(target_modules="all-linear", lora_dropout=0.1) if adapters else None
        common = {"max_steps": 6, "per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 3}
        return trainer_of(peft_config=peft_config, output_dir=str(tmp_path / folder), **common | settings)

    whole = run("whole")
    expected = trained(whole)
    resumed = run("resumed")
    found = trained(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert largest_difference(found, expected) == 0.0
    assert resumed.state.global_step == 6

    def losses(trainer: SFTTrainer) -> dict[int, float]:
        return {int(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}

    assert losses(resumed) == losses(whole)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    kept = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert kept == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("name", ["llama", *sorted(PADDED)])
def test_a_checkpoint_is_a_model_with_its_tokenizer(name: str, tmp_path: Path, trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(name, save_strategy="steps", save_steps=1)
    expected = trained(trainer)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    again = SFTTrainer(checkpoint, args=trainer.args, train_dataset=PAIR_ROWS)
    assert largest_difference(weights_of(again), expected) == 0.0


def test_a_stream_is_an_iterable_dataset_after_preparation(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(train_dataset=Dataset.from_list(TEXT_ROWS).to_iterable_dataset())
    assert isinstance(trainer.train_dataset, IterableDataset)
    first = next(iter(trainer.train_dataset))
    assert {name for name, value in first.items() if value is not None} == {"input_ids", "labels"}


def test_an_optimizer_that_has_none_of_the_trained_weights_is_refused_and_some_are_named(
    trainer_of: Callable[..., Any], model_of: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TunesmithError, match="the optimizer has none of the weights that are trained"):
        trainer_of(model=model, optimizers=(optimizer, None), peft_config=LoraConfig(target_modules=["q_proj"]))
    model = model_of()
    trainer_of(model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    assert "The optimizer that was given lacks" not in caplog.text
    model = model_of()
    norm = torch.optim.SGD(model.model.norm.parameters(), lr=0.1)
    trainer_of(model=model, optimizers=(norm, None))
    assert "lacks 20 of 21 weights with requires_grad, which stay as they are: model.embed_tokens.weight" in caplog.text
