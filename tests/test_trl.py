"""A script of TRL's that changes its import runs here, and what the tests take for TRL's fields are TRL's fields."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest
from transformers import TrainingArguments

from tests.trl_fields import ADDED, ARGUMENTS, CHANGED, CHOICES, VERSION
from tunesmith.errors import TunesmithError
from tunesmith.settings.config import SFTConfig
from tunesmith.trainers import SFTTrainer


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
