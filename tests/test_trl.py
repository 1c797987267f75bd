"""A script of TRL's that changes its import runs here, pairs train as they do there, and what the tests take for TRL's
fields are TRL's fields."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainingArguments

from tests.trl_fields import ADDED, ARGUMENTS, CHANGED, CHOICES, VERSION
from tunesmith.errors import TunesmithError
from tunesmith.settings.config import SFTConfig
from tunesmith.settings.policy import GRPOConfig, RLOOConfig
from tunesmith.settings.preference import DPOConfig
from tunesmith.trainers import DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer


def arguments_of(trainer: type) -> list[str]:
    return list(inspect.signature(trainer).parameters)


def make(settings: Mapping[str, Any]) -> SFTConfig:
    return SFTConfig(output_dir="run", precision="fp32", use_cpu=True, **settings)


def test_what_trl_has_by_default_may_be_written_out() -> None:
    made = make(ADDED | CHANGED)
    assert made.max_length == 1024
    assert made.pad_to_multiple_of is None
    assert not made.padding_free
    assert made.activation_checkpointing


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name in CHOICES for choice in CHOICES[name]])
def test_each_of_trls_choices_is_taken_or_refused_by_name(name: str, choice: str) -> None:
    if (name, choice) == ("truncation_mode", "keep_end"):
        with pytest.raises(TunesmithError, match="only 'keep_start' is supported"):
            make({name: choice})
    else:
        make({name: choice})


def test_the_trainer_takes_trls_arguments_in_trls_order() -> None:
    assert arguments_of(SFTTrainer) == [*ARGUMENTS, "model_init", "older"]
    theirs = "model ref_model args data_collator train_dataset eval_dataset processing_class compute_metrics callbacks"
    assert arguments_of(DPOTrainer)[:12] == [*theirs.split(), "optimizers", "quantization_config", "peft_config"]


@pytest.mark.documented
def test_policies_have_trls_fields_and_defaults() -> None:
    trl = import_module("trl")
    older = {"use_transformers_paged", "vllm_importance_sampling_cap"}  # which TRL itself gives up
    ours_own = {"gradient_checkpointing", "pad_to_multiple_of", "bf16"}
    for config, theirs in ((GRPOConfig, trl.GRPOConfig), (RLOOConfig, trl.RLOOConfig)):
        ours = {field.name: _default(field) for field in fields(config)}
        expected = {field.name: _default(field) for field in fields(theirs) if field.name not in older | ours_own}
        assert {name: ours[name] for name in expected} == expected
    for trainer, theirs in ((GRPOTrainer, trl.GRPOTrainer), (RLOOTrainer, trl.RLOOTrainer)):
        names = [name for name in arguments_of(theirs) if name not in ("tools", "rollout_func", "environment_factory")]
        assert arguments_of(trainer)[: len(names)] == names


@pytest.mark.documented
def test_trl_itself_has_the_fields_that_the_other_tests_take_for_its_own() -> None:
    """Where TRL is installed, which `make docs` does: another one, or none, fails."""
    assert version("trl") == VERSION
    trl = import_module("trl")
    theirs: dict[str, Field[Any]] = {field.name: field for field in fields(trl.SFTConfig)}
    inherited = {field.name: _default(field) for field in fields(TrainingArguments)}
    assert {name: _default(field) for name, field in theirs.items() if name not in inherited} == ADDED
    changed = {name: _default(theirs[name]) for name in inherited if _default(theirs[name]) != inherited[name]}
    assert changed == CHANGED
    assert {
        name: theirs[name].metadata.get("choices") for name in ADDED if "choices" in theirs[name].metadata
    } == CHOICES
    assert arguments_of(trl.SFTTrainer) == ARGUMENTS


def _default(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@pytest.mark.documented
@pytest.mark.parametrize(
    "settings",
    [
        *(
            {"loss_type": [name]}
            for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero")
        ),
        *({"loss_type": [name]} for name in ("apo_down", "aot", "aot_unpaired", "discopop", "sigmoid_norm")),
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
    ],
    ids=str,
)
def test_ten_steps_on_pairs_go_as_they_go_in_trl(settings: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """Pairs of texts: of messages, TRL scores what the template writes behind the end of a turn, too."""
    trl = import_module("trl")
    words = ["yes", "no", "maybe so", "it is", "not at all, no", "of course", "why", "so"]
    rows = [
        {"prompt": f"Is it {word}? ", "chosen": word, "rejected": words[i - 1] + "!" * (i % 4)}
        for i, word in enumerate(words)
    ]
    common: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    common |= {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    logged = []
    for config, trainer in ((trl.DPOConfig, trl.DPOTrainer), (DPOConfig, DPOTrainer)):
        args = config(**common | settings, gradient_checkpointing=False)
        run = trainer(model=str(tiny_model), args=args, train_dataset=Dataset.from_list(rows))
        run.train()
        logged.append([entry for entry in run.state.log_history if "loss" in entry])
    for theirs, ours in zip(*logged, strict=True):
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4)
