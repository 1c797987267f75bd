"""The text and the object of a LoRA setting say the same, and a mistake in either is named."""

from typing import Any

import pytest

from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import lora_config


def test_true_means_the_defaults() -> None:
    config = lora_config(True)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.0)
    assert (config.target_modules, config.task_type) == ("all-linear", "CAUSAL_LM")


@pytest.mark.parametrize(
    "spec",
    [
        "r=8, alpha=4,dropout=0.05,target=q_proj,v_proj",
        {"r": 8, "alpha": 4, "dropout": 0.05, "target": ["q_proj", "v_proj"]},
        {"r": "8", "alpha": "4", "dropout": "5e-2", "target": "[q_proj, v_proj]"},
    ],
)
def test_text_and_object_say_the_same(spec: Any) -> None:
    config = lora_config(spec)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 4, 0.05)
    assert sorted(config.target_modules or ()) == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rank=8", r"lora: there is no 'rank'; the keys are r, alpha, dropout, target"),
        ({"lora_alpha": 8}, r"there is no 'lora_alpha'; did you mean 'alpha'\?"),
        ("r=eight", r"lora: r is 'eight' \(text\), expected a whole number"),
        ("r=0", "r is 0; the rank of an adapter is at least 1"),
        ("alpha=0", "alpha is 0; it must be above 0"),
        ("dropout=1", "dropout is 1, a share"),
        ("r=8,r=9", "'r' is given twice"),
        ("q_proj", "'q_proj' is no key=value; write for example r=16"),
        ("", "no key=value"),
        ({"target": []}, r"target is \[\]; name layers"),
        (8, "lora is 8; write true, or r=16"),
    ],
)
def test_a_mistake_is_named(spec: Any, message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        lora_config(spec)
