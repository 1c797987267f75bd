"""The text and the object of a LoRA setting say the same, and a mistake in either is named."""

from typing import Any

import pytest

from tunesmith.errors import TunesmithError
from tunesmith.settings.lora import lora_config


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
        ({"apha": 8}, r"there is no 'apha'; did you mean 'alpha'\?"),
        ("init=pizza", r"init is 'pizza'; choose .*did you mean 'pissa'"),
        ("layers_to_transform=0,1", "lora: `layers_to_transform` cannot be used when `target_modules` is a str"),
        ("bias=some", "bias is 'some'; choose none | all | lora_only"),
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


def test_everything_else_lora_has_is_said_by_its_name() -> None:
    config = lora_config(
        "r=8,target=q_proj,o_proj,dora=true,rslora=true,init=pissa,modules_to_save=lm_head,embed_tokens,layers_to_transform=0,1,bias=all"
    )
    assert (config.use_dora, config.use_rslora, config.init_lora_weights) == (True, True, "pissa")
    assert (config.modules_to_save, config.layers_to_transform) == (["lm_head", "embed_tokens"], [0, 1])
    assert config.bias == "all"
    config = lora_config({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}, "target_parameters": ["w"]})
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 4}, {"q_proj": 8})
    assert config.target_parameters == ["w"]


def test_the_names_of_peft_are_taken_too() -> None:
    config = lora_config({"lora_alpha": 4, "lora_dropout": 0.1, "target_modules": "q_proj", "use_dora": True})
    assert (config.lora_alpha, config.lora_dropout, config.target_modules, config.use_dora) == (4, 0.1, "q_proj", True)
