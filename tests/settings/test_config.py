"""SFTConfig: TRL's names and defaults, and a word for each setting that can't be meant."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from tests.trl_fields import ADDED, CHANGED
from tunesmith.errors import TunesmithError
from tunesmith.settings.config import SFTConfig
from tunesmith.settings.policy import GRPOConfig
from tunesmith.settings.recipe import TRAINERS, Trainer, config_of

OTHER_DEFAULTS = {"padding_free": True, "pad_to_multiple_of": None, "gradient_checkpointing": None}
"""Those that differ from TRL's: batches have no padding, and computing twice costs time that small models can save."""


def make(**settings: Any) -> SFTConfig:
    common: dict[str, Any] = {"output_dir": "run", "precision": "fp32", "use_cpu": True, "report_to": "none"}
    return SFTConfig(**common | settings)


def refused(message: str, **settings: Any) -> None:
    with pytest.raises(TunesmithError, match=re.escape(message)):
        make(**settings)


def test_trls_names_are_fields_with_trls_defaults() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    theirs = ADDED | CHANGED
    assert {name: defaults[name] for name in theirs} == theirs | OTHER_DEFAULTS


def test_every_field_of_training_arguments_is_a_field() -> None:
    ours, theirs = (
        {field.name: field.default for field in dataclasses.fields(kind)} for kind in (SFTConfig, TrainingArguments)
    )
    changed = {name for name, default in theirs.items() if ours[name] != default}
    assert changed == {"learning_rate", "logging_steps", "bf16"}


def test_every_field_of_ours_has_a_line_of_help() -> None:
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(SFTConfig):
        if field.name not in theirs:
            text = field.metadata["help"]
            assert len(text) > 10, field.name
            assert "\n" not in text
            assert text.endswith("."), field.name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"train_on": "last_assistant"}, "last_assistant"),
        ({"assistant_only_loss": True}, "assistant"),
        ({"completion_only_loss": True}, "completion"),
        ({"completion_only_loss": False}, "all"),
        ({"completion_only_loss": False, "assistant_only_loss": True}, "assistant"),
        ({"completion_only_loss": False, "train_on": "all"}, "all"),
        ({"completion_only_loss": True, "train_on": "completion"}, "completion"),
        (
            {"completion_only_loss": True, "assistant_only_loss": True},
            "completion",
        ),  # whose other turns are not trained
        ({"assistant_only_loss": True, "train_on": "assistant"}, "assistant"),
    ],
    ids=str,
)
def test_what_is_trained_on_is_said_in_one_of_three_ways(settings: dict[str, Any], expected: str | None) -> None:
    assert make(**settings).resolved_train_on == expected


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (
            {"train_on": "all", "assistant_only_loss": True},
            "train_on (all) and assistant_only_loss (assistant)",
        ),
        (
            {"train_on": "assistant", "completion_only_loss": True},
            "train_on (assistant) and completion_only_loss (completion)",
        ),
        (
            {"train_on": "all", "completion_only_loss": True},
            "train_on (all) and completion_only_loss (completion)",
        ),
    ],
    ids=str,
)
def test_contradictions_about_what_is_trained_on_are_errors(settings: dict[str, Any], found: str) -> None:
    refused(f"{found} contradict each other; set only train_on", **settings)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("loss_type", "nnl", "choose nll | dft | chunked_nll; did you mean 'nll'?"),
        ("packing_strategy", "bfd-split", "choose bfd | bfd_split | wrapped; did you mean 'bfd_split'?"),
        ("overlong", "truncat", "choose truncate | drop | split | error; did you mean 'truncate'?"),
        ("train_on", "assistants", "choose all | completion | assistant | last_assistant; did you mean 'assistant'?"),
        ("self_test", "alway", "choose auto | always | off; did you mean 'always'?"),
        ("share_prefix", "of", "choose auto | off; did you mean 'off'?"),
        ("precision", "bf-16", "choose auto | fp32 | bf16 | fp16; did you mean 'bf16'?"),
        ("loss_type", "rocket", "choose nll | dft | chunked_nll"),
    ],
)
def test_a_wrong_choice_is_an_error_with_the_nearest_right_one(name: str, value: str, hint: str) -> None:
    with pytest.raises(TunesmithError) as caught:
        make(**{name: value})
    assert str(caught.value) == f"{name} is {value!r}; {hint}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef is -0.1; a weight of 0 or more"),
        ({"learning_rate": None}, "learning_rate is None; write a number"),
        ({"seed": "abc"}, "seed is 'abc'; write a whole number"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; write a finite number"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; write a finite number"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs is inf; write a finite number"),
        ({"max_grad_norm": float("-inf")}, "max_grad_norm is -inf; write a finite number"),
        ({"max_steps": 10**400}, "at most 9223372036854775807 can be counted"),
        ({"learning_rate": -1}, "learning_rate is -1; write 0 or more"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0; write a number from 0 to below 1"),
        ({"seed": -1}, "seed is -1; write a whole number from 0 to 4294967295"),
        ({"data_seed": 2**32}, "data_seed is 4294967296; write a whole number from 0 to"),
        ({"num_train_epochs": -3}, "num_train_epochs is -3; write how often to go through the data, or max_steps"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps is 0; write 1 or more"),
        ({"activation_offloading": True}, "activation_offloading is True, but this run is on cpu, where activations"),
        ({"use_liger_kernel": True}, "use_liger_kernel is True: Liger replaces the forward"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config is {'rope': True}: Liger is not used"),
        ({"use_cache": True}, "use_cache is True: training computes without a cache"),
        ({"torch_compile_mode": "reduce-overhead"}, "choose default | max-autotune-no-cudagraphs"),
        ({"torch_compile": True, "gradient_checkpointing": True}, "torch_compile is True, and so is gradient_check"),
        ({"truncation_mode": "keep_end"}, "truncation_mode is 'keep_end'; only 'keep_start' is supported"),
        ({"prompt_mismatch": "accept"}, "prompt_mismatch: accept is for turns: whole, and turns is auto"),
        ({"max_length": 1}, "max_length is 1; at least 2 tokens are needed to predict one"),
        ({"packing": True, "max_length": None}, "packing needs max_length, the size of a pack; it is None"),
        ({"packing": True, "padding_free": False}, "which padding_free: false forbids; drop one"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of is 8, but batches have no padding"),
        ({"dataset_num_proc": 0}, "dataset_num_proc is 0; write 1 or more processes"),
        ({"columns": "question"}, "write an object"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is [1]; write an object, e.g. {key: value}"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "dataset_kwargs: 'add_special_tokens' is unknown"),
        ({"train_sampling_strategy": "group_by_prefixes"}, "did you mean 'group_by_prefix'?"),
        ({"train_sampling_strategy": "group_by_prefix", "share_prefix": "off"}, "share_prefix: off computes nothing"),
        ({"train_sampling_strategy": "group_by_prefix", "packing": True}, "packing: True makes rows of examples"),
        (
            {"train_sampling_strategy": "group_by_prefix", "padding_free": False},
            "padding_free: False computes each row",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_or_can_not_be_meant_is_an_error(settings: dict[str, Any], message: str) -> None:
    refused(message, **settings)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size is 4"),
        ({"packing": True}, "packing is True"),
        ({"eval_packing": True}, "eval_packing is True"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy is 'sequential'"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last is True"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches is True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches is True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_batches_by_tokens_leave_no_word_to_what_counts_rows(settings: dict[str, Any], found: str) -> None:
    make(**settings)
    message = f"{found}, and max_tokens_per_batch: 4096 makes batches by tokens; drop one"
    refused(message, max_tokens_per_batch=4096, **settings)


def test_numbers_may_be_texts_and_none_is_what_it_was_in_earlier_versions() -> None:
    config = make(learning_rate="2e-4", max_steps="5", eval_steps="0.5", max_grad_norm=None, warmup_ratio=None)
    assert (config.learning_rate, config.max_steps, config.eval_steps) == (2e-4, 5, 0.5)
    assert (config.max_grad_norm, config.warmup_steps) == (0.0, 0)


def test_infinity_is_no_limit_where_a_number_is_one() -> None:
    assert make(max_grad_norm=float("inf")).max_grad_norm == float("inf")


def test_epochs_say_nothing_beside_steps() -> None:
    assert make(num_train_epochs=-1, max_steps=5).max_steps == 5


def test_batches_by_tokens_go_with_accumulation_and_padding() -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 4, "padding_free": False, "eval_packing": False}
    assert make(max_tokens_per_batch=4096, **settings).max_tokens_per_batch == 4096
    refused("max_tokens_per_batch is 1; at least 2 tokens are needed to predict one", max_tokens_per_batch=1)


def test_layers_may_be_compiled_in_modes_that_take_changing_lengths() -> None:
    for mode in (None, "default", "max-autotune-no-cudagraphs"):
        assert make(torch_compile=True, torch_compile_mode=mode).torch_compile_backend == "inductor"
    assert make(torch_compile_backend="aot_eager").torch_compile is True


def test_activations_may_leave_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTConfig, "device", torch.device("cuda", 0))
    monkeypatch.setattr(SFTConfig, "world_size", 1)
    assert make(activation_offloading=True).activation_offloading is True


def test_settings_off_are_accepted_as_off() -> None:
    make(activation_offloading=False, use_liger_kernel=False, torch_compile=False)
    make(use_cache=False, liger_kernel_config=None)


def test_trls_other_names_for_our_defaults_are_accepted() -> None:
    found = make(pad_to_multiple_of="auto", loss_type="chunked_nll")
    assert found.pad_to_multiple_of is None
    assert found.loss_type == "nll"
    assert make(pad_to_multiple_of="none").pad_to_multiple_of is None
    assert make(packing=True, packing_strategy="bfd-requeue").packing_strategy == "bfd_split"


def test_padded_batches_may_be_padded_to_a_multiple() -> None:
    assert make(pad_to_multiple_of=8, padding_free=False).pad_to_multiple_of == 8
    assert make(pad_to_multiple_of="64", padding_free=False).pad_to_multiple_of == 64


@pytest.mark.parametrize("value", [0, -8, "0", "wide", 1.5])
def test_a_multiple_to_pad_to_is_a_number_of_tokens(value: Any) -> None:
    refused(f"pad_to_multiple_of is {value!r}; write a number of tokens from 1 on", pad_to_multiple_of=value)


@pytest.mark.parametrize("name", ["model_init_kwargs", "dataset_kwargs", "chat_template_kwargs", "columns"])
def test_objects_may_be_json_text(name: str) -> None:
    value = {"skip_prepare_dataset": True} if name == "dataset_kwargs" else {"prompt": "question"}
    text = '{"skip_prepare_dataset": true}' if name == "dataset_kwargs" else '{"prompt": "question"}'
    assert getattr(make(**{name: text}), name) == value
    assert getattr(make(**{name: value}), name) == value


def test_gradient_checkpointing_under_both_of_its_names(recwarn: pytest.WarningsRecorder) -> None:
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert make(**{name: True}).activation_checkpointing is True
    assert not make().activation_checkpointing


def test_a_config_survives_its_own_dictionary(tmp_path: Path) -> None:
    config = make(output_dir=str(tmp_path), packing=True, max_length=64, columns={"prompt": "q"}, eval_packing=False)
    again = SFTConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_the_users_mistake_is_a_value_error() -> None:
    assert issubclass(TunesmithError, ValueError)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_a_strategy_that_cuts_long_examples_itself_takes_no_other_word_on_them(strategy: Any) -> None:
    with pytest.raises(TunesmithError, match=f"overlong is 'drop', but packing_strategy: {strategy}"):
        SFTConfig(output_dir="unused", packing=True, packing_strategy=strategy, overlong="drop")


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"bf16": True}])
def test_bfloat16_may_be_asked_for_without_a_gpu(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: None)
    config = SFTConfig(output_dir=str(tmp_path), **settings)
    assert (config.precision, config.bf16, config.use_cpu) == ("bf16", True, True)


def test_what_several_processes_would_train_otherwise_than_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    make(average_tokens_across_devices=False)
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    make()
    refused("average_tokens_across_devices is False, which divides", average_tokens_across_devices=False)
    refused("train_sampling_strategy is 'batch_rebalance', and rows", train_sampling_strategy="batch_rebalance")
    refused("accelerator_config.split_batches is True", accelerator_config={"split_batches": True})
    refused("accelerator_config.dispatch_batches is True", accelerator_config={"dispatch_batches": True})


@pytest.mark.parametrize(
    ("fsdp", "shard"),
    [(True, "full"), ("full_shard auto_wrap", "full"), ("shard_grad_op", "grad"), ("false", "none"), (None, "none")],
)
def test_fsdp_is_a_name_of_shard(fsdp: Any, shard: str) -> None:
    config = make(fsdp=fsdp)
    assert (config.shard, config.fsdp) == (shard, None)
    assert make(**config.to_dict() | {"output_dir": "other"}).shard == shard


def test_what_can_not_be_shared_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused("fsdp is 'hybrid_shard', and 'hybrid_shard' is not known here; write shard: full", fsdp="hybrid_shard")
    refused("fsdp is 'shard_grad_op', and shard is full; keep shard", fsdp="shard_grad_op", shard="full")
    refused("fsdp_config is for accelerate", fsdp=True, fsdp_config={"version": 2})
    refused("cpu_offload is True, and shard is none; write shard: full", cpu_offload=True)
    refused("cpu_offload is True, but this run is on cpu", cpu_offload=True, shard="full")
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    refused("cpu_offload is True, but this run is on cpu", fsdp="full_shard offload")
    refused("shard is full, and precision: fp16 is set, whose scale", shard="full", precision="fp16")
    assert make(shard="full").place_model_on_device is False
    assert make(shard="grad").place_model_on_device is None


@dataclasses.dataclass
class ScriptArguments:
    """As TRL's scripts have, beside a config."""

    dataset_name: str = "rows"
    reward_funcs: list[str] | None = None


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_parser_of_trls_scripts_reads_every_config_from_flags(trainer: Trainer) -> None:
    flags = "--reward_funcs a.b --output_dir run --use_cpu true --precision fp32 --learning_rate 3e-4 --logging_steps 7"
    named = {"grpo": " --scale_rewards none", "rloo": " --num_generations 4"}.get(trainer, "")
    kinds: Any = (ScriptArguments, config_of(trainer))
    script, config = HfArgumentParser(kinds).parse_args_into_dataclasses((flags + named).split())
    assert (script.reward_funcs, config.learning_rate, config.logging_steps) == (["a.b"], 3e-4, 7)
    assert (getattr(config, "scale_rewards", "none"), getattr(config, "reward_funcs", None)) == ("none", None)


def test_a_parser_takes_neither_none_nor_the_choices_from_a_config() -> None:
    parsed: Any = SFTConfig
    HfArgumentParser(parsed)
    assert make(max_length=None, neftune_noise_alpha=None).max_length is None
    refused("overlong is 'truncat'; choose truncate", overlong="truncat")


def test_a_setting_that_no_parser_reads_is_one_like_all_others() -> None:
    settings: dict[str, Any] = {"output_dir": "run", "precision": "fp32", "use_cpu": True, "reward_funcs": "a, b"}
    config = GRPOConfig(**settings)
    assert config.reward_funcs == config.to_dict()["reward_funcs"] == ["a", "b"]
    assert GRPOConfig(**config.to_dict()).reward_funcs == ["a", "b"]
    assert GRPOConfig(output_dir="run", precision="fp32", use_cpu=True).reward_funcs is None
