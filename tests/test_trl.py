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
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tests.trl_fields import ADDED, ARGUMENTS, CHANGED, CHOICES, VERSION
from tunesmith.errors import TunesmithError
from tunesmith.settings.config import SFTConfig
from tunesmith.settings.distillation import DistillationConfig, GKDConfig
from tunesmith.settings.policy import GRPOConfig, RLOOConfig
from tunesmith.settings.preference import DPOConfig, RewardConfig
from tunesmith.trainers import (
    DistillationTrainer,
    DPOTrainer,
    GKDTrainer,
    GRPOTrainer,
    RewardTrainer,
    RLOOTrainer,
    SFTTrainer,
)


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
    theirs_of_distillation = "model teacher_model args train_dataset eval_dataset processing_class callbacks optimizers"
    assert arguments_of(DistillationTrainer)[:10] == [
        *theirs_of_distillation.split(),
        "quantization_config",
        "peft_config",
    ]
    assert arguments_of(DPOTrainer)[:12] == [*theirs.split(), "optimizers", "quantization_config", "peft_config"]
    theirs = "model args data_collator train_dataset eval_dataset processing_class compute_metrics callbacks optimizers"
    last = "optimizer_cls_and_kwargs preprocess_logits_for_metrics quantization_config peft_config"
    assert arguments_of(RewardTrainer) == [*theirs.split(), *last.split()]


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
        assert arguments_of(trainer)[: len(arguments_of(theirs))] == arguments_of(theirs)


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


_WORDS = ["yes", "no", "maybe so", "it is", "not at all, no", "of course", "why", "so"]
PAIRS = [
    {"prompt": f"Is it {word}? ", "chosen": word, "rejected": _WORDS[i - 1] + "!" * (i % 4)}
    for i, word in enumerate(_WORDS)
]


def ten_steps(runs: Mapping[Any, Any], model: Path, folder: Path, rows: Any, settings: dict[str, Any]) -> Any:
    """What a trainer of TRL's and ours log on the same rows, by their configs."""
    common: dict[str, Any] = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False}
    common |= {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }
    logged = []
    for config, trainer in runs.items():
        run = trainer(model=str(model), args=config(**common | settings), train_dataset=Dataset.from_list(rows))
        run.train()
        logged.append([entry for entry in run.state.log_history if "loss" in entry])
    return zip(*logged, strict=True)


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
    runs = {trl.DPOConfig: trl.DPOTrainer, DPOConfig: DPOTrainer}
    for theirs, ours in ten_steps(runs, tiny_model, tmp_path, PAIRS, settings):
        for name in (
            *("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm"),
            *("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"),
        ):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4)


@pytest.mark.documented
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ten_steps_with_a_teacher_go_as_they_go_in_trl(beta: float, tiny_model: Path, tmp_path: Path) -> None:
    """On the answers of the data; those that a student writes are drawn by other random numbers there. The template
    writes nothing behind the end of a turn, which TRL would train, too."""
    gkd = import_module("trl.experimental.gkd")
    assert arguments_of(GKDTrainer) == arguments_of(gkd.GKDTrainer)
    assert arguments_of(DistillationTrainer)[:10] == arguments_of(import_module("trl").DistillationTrainer)[:10]
    for ours, theirs in ((GKDConfig, gkd.GKDConfig), (DistillationConfig, import_module("trl").DistillationConfig)):
        made = ours(output_dir=str(tmp_path), use_cpu=True)
        for field in fields(theirs):
            if field.name in ("temperature", "lmbda", "beta", "seq_kd", "disable_dropout", "learning_rate"):
                assert getattr(made, field.name) == _default(field)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    words = ["yes", "no", "maybe so", "it is", "not at all, no", "of course", "why", "so"]
    rows = [
        {"messages": [{"role": "user", "content": f"Is it {word}?"}, {"role": "assistant", "content": word * (i + 1)}]}
        for i, word in enumerate(words)
    ]
    common: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    common |= {"max_steps": 10, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lmbda": 0.0}
    common |= {"learning_rate": 5e-3, "logging_steps": 1, "save_strategy": "no", "beta": beta}
    logged, tokenizer = [], AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    for config, trainer in ((gkd.GKDConfig, gkd.GKDTrainer), (GKDConfig, GKDTrainer)):
        run = trainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            teacher_model=teacher,
            args=config(**common, gradient_checkpointing=False),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
        )
        run.train()
        logged.append([entry for entry in run.state.log_history if "loss" in entry])
    for theirs, ours in zip(*logged, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4)


@pytest.mark.documented
@pytest.mark.parametrize("form", ["texts", "messages", "whole conversations", "texts without a prompt"])
def test_ten_steps_of_a_reward_model_go_as_they_go_in_trl(form: str, tiny_model: Path, tmp_path: Path) -> None:
    """From a language model: the new head is the same, too. A step is one batch, so that the least and largest reward
    are those of TRL, which takes the mean over batches."""
    trl = import_module("trl")
    rows: list[dict[str, Any]] = PAIRS
    if form == "texts without a prompt":
        rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in PAIRS]
    elif form != "texts":
        ask = [[{"role": "user", "content": row["prompt"]}] for row in PAIRS]
        said = [
            {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")} for row in PAIRS
        ]
        rows = [
            {"prompt": prompt, **sides}
            if form == "messages"
            else {side: prompt + messages for side, messages in sides.items()}
            for prompt, sides in zip(ask, said, strict=True)
        ]
    if form != "whole conversations":
        rows = [row | {"margin": 0.25 * (i % 3)} for i, row in enumerate(rows)]
    runs = {trl.RewardConfig: trl.RewardTrainer, RewardConfig: RewardTrainer}
    settings = {"center_rewards_coefficient": 0.1}
    names = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "grad_norm", "num_tokens")
    for theirs, ours in ten_steps(runs, tiny_model, tmp_path, rows, settings):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name
