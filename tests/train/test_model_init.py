"""Models that a function makes, anew for each run and each trial of a search; and TRL's older constructor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import HPSearchBackend

from tests.train.runs import PAIR_ROWS, TEXT_ROWS, largest_difference, trained, weights_of
from tunesmith import SFTConfig, SFTTrainer
from tunesmith.errors import TunesmithError

Make = Callable[..., Any]
LORA = LoraConfig(target_modules="all-linear")


class Trial(dict[str, Any]):
    """As a backend hands it out."""

    number, params = 3, dict[str, Any]()


@pytest.fixture
def of_a_function(model_of: Make, config: Make, tokenizer: Any) -> Make:
    """Makes a trainer whose model a function makes, by the trial."""
    trials: list[Any] = []

    def make(peft_config: Any = None, **settings: Any) -> Any:
        def model_init(trial: Any) -> Any:
            trials.append(trial)
            return model_of()

        args = config(**settings)
        common: dict[str, Any] = {"train_dataset": PAIR_ROWS, "processing_class": tokenizer, "peft_config": peft_config}
        trainer: Any = SFTTrainer(args=args, model_init=model_init, **common)
        trainer.trials = trials
        return trainer

    return make


@pytest.mark.parametrize("adapters", [None, LORA], ids=["full", "lora"])
def test_each_run_begins_with_a_fresh_model(adapters: Any, of_a_function: Make, trainer_of: Make) -> None:
    expected = trained(trainer_of(max_steps=2, peft_config=adapters))
    trainer = of_a_function(max_steps=2, peft_config=adapters)
    for _ in range(2):
        assert largest_difference(trained(trainer), expected) == 0.0
    assert trainer.model.model_tags[-2:] == ["tunesmith", "sft"]


def test_a_trial_sets_what_training_reads_and_saves_in_a_folder_of_its_own(
    of_a_function: Make, trainer_of: Make, tmp_path: Path
) -> None:
    expected = trained(trainer_of(max_steps=2, learning_rate=0.05))
    trainer = of_a_function(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_name, trainer.hp_space = None, lambda trial: {"learning_rate": 0.05}
    trial = Trial()
    trainer.model = None  # as a search leaves it
    trainer.train(trial=trial)
    assert trainer.trials[-1] is trial
    assert largest_difference(weights_of(trainer), expected) == 0.0
    assert (tmp_path / "run" / "run-3" / "checkpoint-2" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"max_length": 64}, "hp_space: max_length is what the rows or the model are prepared by"),
        ({"learning_rat": 1.0}, "hp_space: SFTConfig has no setting 'learning_rat'"),
    ],
)
def test_a_search_over_what_is_settled_already_is_an_error(
    space: dict[str, Any], message: str, of_a_function: Make
) -> None:
    trainer = of_a_function()
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: space
    with pytest.raises(TunesmithError, match=message):
        trainer.train(trial=Trial())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there are none: give an eval_dataset, and set eval_strategy: steps or epoch"),
        ({"eval_strategy": "steps"}, "compares a metric: set metric_for_best_model, such as eval_loss"),
        (
            {"eval_strategy": "steps", "metric_for_best_model": "f1"},
            "is 'f1', which no evaluation measures: .* or take one of loss, entropy, mean_token_accuracy, runtime",
        ),
    ],
)
def test_early_stopping_has_something_to_compare(settings: dict[str, Any], message: str, trainer_of: Make) -> None:
    trainer = trainer_of(eval_dataset=PAIR_ROWS, callbacks=[EarlyStoppingCallback()], **settings)
    with pytest.raises(TunesmithError, match=message):
        trainer.train()


def test_settings_may_be_given_to_the_trainer_as_they_once_were(
    model_of: Make, config: Make, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    older: dict[str, Any] = {
        "max_seq_length": 24,
        "dataset_text_field": "body",
        "packing": True,
        "tokenizer": tokenizer,
    }
    rows = [{"body": row["text"]} for row in TEXT_ROWS]
    trainer = SFTTrainer(model_of(), args=config(), train_dataset=rows, **older)
    args: Any = trainer.args
    assert isinstance(args, SFTConfig)
    assert (args.max_length, args.dataset_text_field, args.packing, args.learning_rate) == (24, "body", True, 1e-2)
    assert trainer.processing_class is tokenizer
    assert "SFTTrainer(max_seq_length=...), SFTTrainer(dataset_text_field=...)" in caplog.text
    for wrong, message in (
        ({"model": None}, "model is missing: a name, a folder, 'demo', or a loaded causal language model"),
        ({"tokenizer": tokenizer}, "tokenizer and processing_class are the same argument; keep processing_class"),
        ({"packings": True}, "SFTTrainer has no setting 'packings'; did you mean 'packing'"),
        ({"max_seq_length": 24, "args": config(max_length=32)}, "max_length is 24 in SFTTrainer and 32 in its args"),
        ({"max_seq_length": 24, "args": None}, "max_seq_length is a setting: write args=SFTConfig"),
    ):
        common: dict[str, Any] = {"args": config(), "train_dataset": rows, "processing_class": tokenizer}
        with pytest.raises(TunesmithError, match=message):
            SFTTrainer(**{"model": model_of()} | common | wrong)
