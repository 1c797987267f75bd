"""Names that earlier versions of TRL and `transformers` had for settings, and what stands in their place."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from tunesmith.errors import TunesmithError, nearest

RENAMED = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # which below 1 is a share of the run
    "no_cuda": "use_cpu",
    "use_liger": "use_liger_kernel",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
}
"""What has another name, and the same values."""

LEAVE_OUT = {
    "overwrite_output_dir": "a fresh run may always use a folder again, and its checkpoints say whose they are",
    "dataset_batch_size": "how many rows are prepared at a time changes nothing",
    "num_of_sequences": "packing knows the lengths of all rows, and estimates nothing",
    "chars_per_token": "packing knows the lengths of all rows, and estimates nothing",
    "infinite": "max_steps says how long a run is",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "half_precision_backend": "precision says what is computed in",
    "fp16_backend": "precision says what is computed in",
    "fp16_opt_level": "precision says what is computed in",
    "use_mps_device": "the device is found",
    "use_ipex": "the faster library of a CPU is found",
    "include_inputs_for_metrics": 'include_for_metrics=["inputs"] says it now',
    # Of preference trainers
    "sync_ref_model": "the reference stays what training began with",
    "ref_model_mixup_alpha": "the reference stays what training began with",
    "ref_model_sync_steps": "the reference stays what training began with",
    "rpo_alpha": 'write loss_type=["sigmoid", "sft"] and loss_weights=[1.0, rpo_alpha]',
    "max_prompt_length": "max_length takes what is too much from the prompt's front",
    "max_completion_length": "max_length takes what is too much from the prompt's front, and drops longer answers",
    "label_pad_token_id": "labels are not padded",
    "padding_value": "batches have no padding",
    "generate_during_eval": "sample_prompts has prompts answered with each evaluation",
    "force_use_ref_model": "a ref_model that is given is used",
    "ref_model_init_kwargs": "give a loaded ref_model",
    "model_adapter_name": "the adapter that is active is trained",
    "ref_adapter_name": "the reference is the adapter as training began with it",
}
"""What is to be left out, and why."""

HARMLESS = {
    "overwrite_output_dir": (True, False),
    "save_safetensors": (True,),
    "group_by_length": (False,),
    "warmup_ratio": (None,),
    "sync_ref_model": (False,),
    "use_transformers_paged": (False, None),
    "ref_model_mixup_alpha": (0.6,),
    "ref_model_sync_steps": (512,),
}
"""Values that say what happens anyway."""

logger = logging.getLogger(__name__)


def by_todays_names(values: Mapping[str, Any], names: Collection[str], owner: str) -> dict[str, Any]:
    """`values` by the `names` that `owner` has; what was renamed is said once.

    Raises:
        TunesmithError: a name that is unknown, or gone; two names for one setting.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        today = name
        if name not in names:
            if value in HARMLESS.get(name, ()):
                continue
            today, value = _todays(name, value, names, owner)
            logger.warning("%s: %s is %s=%r now.", owner, name, today, value)
        if today in found or (today != name and today in values):
            raise TunesmithError(f"{owner}: {name} and {today} are the same setting; keep {today}")
        found[today] = value
    return found


def _todays(name: str, value: Any, names: Collection[str], owner: str) -> tuple[str, Any]:
    if name == "group_by_length":
        return "train_sampling_strategy", "group_by_length"
    if RENAMED.get(name) in names:
        return RENAMED[name], value
    if name == "max_completion_length" and "max_new_tokens" in names:
        return "max_new_tokens", value
    if name == "save_safetensors":
        raise TunesmithError(
            f"{owner}: save_safetensors is {value!r}; weights are written as safetensors only, drop it"
        )
    if name == "max_prompt_length" and "max_completion_length" in names:
        raise TunesmithError(f"{owner}: {name} is no setting here, leave it out: a prompt is never cut")
    if name in LEAVE_OUT:
        raise TunesmithError(f"{owner}: {name} is no setting here, leave it out: {LEAVE_OUT[name]}")
    raise TunesmithError(f"{owner} has no setting {name!r}{nearest(name, names)}")
