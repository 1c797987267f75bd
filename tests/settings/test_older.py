"""Settings by the names that earlier versions of TRL and transformers had."""

from typing import Any

import pytest

from tunesmith.errors import TunesmithError
from tunesmith.settings.config import SFTConfig
from tunesmith.settings.policy import GRPOConfig


def make(**settings: Any) -> SFTConfig:
    return SFTConfig(output_dir="run", precision="fp32", use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("older", "name", "value"),
    [
        ({"max_seq_length": 77}, "max_length", 77),
        ({"evaluation_strategy": "epoch"}, "eval_strategy", "epoch"),
        ({"warmup_ratio": 0.25}, "warmup_steps", 0.25),
        ({"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
        ({"group_by_length": False}, "train_sampling_strategy", "random"),
        ({"per_gpu_train_batch_size": 3}, "per_device_train_batch_size", 3),
        ({"overwrite_output_dir": True, "save_safetensors": True, "use_liger": False}, "output_dir", "run"),
    ],
    ids=str,
)
def test_a_renamed_setting_means_what_it_meant(older: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(make(**older), name) == value


def test_what_the_model_is_loaded_with_may_hold_what_has_a_setting() -> None:
    assert make(model_init_kwargs={"trust_remote_code": True}).trust_remote_code


def test_a_share_of_the_run_warms_up_as_before() -> None:
    assert make(warmup_ratio=0.25).get_warmup_steps(80) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_of_sequences": 1024}, "SFTConfig: num_of_sequences is no setting here, leave it out: packing knows"),
        ({"logging_dir": "logs"}, "leave it out: set the environment variable TENSORBOARD_LOGGING_DIR"),
        ({"vllm_importance_sampling_cap": 3.0}, "SFTConfig has no setting 'vllm_importance_sampling_cap'"),
        ({"save_safetensors": False}, "weights are written as safetensors only, drop it"),
        ({"max_seq_length": 7, "max_length": 9}, "max_seq_length and max_length are the same setting; keep max_length"),
        ({"use_liger": True}, "use_liger_kernel is True: Liger replaces the forward"),
        ({"learning_rat": 1e-4}, "SFTConfig has no setting 'learning_rat'; did you mean 'learning_rate'?"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "'add_special_tokens' is unknown; .* leave other keys out"),
        ({"logging_steps": 0}, "logging_steps is 0; write 1 to log each step, or set logging_strategy: no"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; write 1 or more"),
    ],
    ids=str,
)
def test_what_is_gone_or_never_was_says_what_to_write(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        make(**settings)


def test_names_of_grpo_mean_what_they_mean_in_trl_and_a_hint_leads_on() -> None:
    def grpo(**settings: Any) -> GRPOConfig:
        return GRPOConfig(output_dir="run", precision="fp32", use_cpu=True, **settings)

    capped = grpo(vllm_importance_sampling_cap=2.0, scale_rewards=False, ref_model_mixup_alpha=0.6)
    assert (capped.vllm_importance_sampling_clip_max, capped.scale_rewards) == (2.0, "none")
    with pytest.raises(TunesmithError, match="max_prompt_length is no setting here, leave it out: a prompt is never"):
        grpo(max_prompt_length=64)
