"""`--launch-config`: what a config of `accelerate launch` says, as settings of a run.

`accelerate` starts nothing here: the agent of `torchrun` does, and each trainer shares weights out itself. So a config
is read for what it asks for. What would train otherwise is refused by name, and what changes nothing is passed over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import TunesmithError, nearest
from tunesmith.settings.coerce import FiniteLoader

READY: dict[str, dict[str, Any]] = {
    "single_gpu": {"distributed_type": "NO"},
    "multi_gpu": {"distributed_type": "MULTI_GPU"},
    "fsdp2": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
    "fsdp1": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}},
    "zero1": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "zero3": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}},
}
"""Configs that need no file, by the names that TRL gives them."""
PRECISIONS = {"bf16", "fp16"}
NOTHING = (None, False, "no", "false", "all", "NO", "None")
"""Values of a key that is not used."""
REFUSED = {
    "use_cpu": "write use_cpu: true in the recipe",
    "gpu_ids": "set CUDA_VISIBLE_DEVICES before the command",
    "dynamo_config": "write torch_compile: true in the recipe",
    "dynamo_backend": "write torch_compile: true in the recipe",
    "megatron_lm_config": "Megatron-LM trains no model of transformers; write --launch-config fsdp2",
    "fp8_config": "write mixed_precision: bf16",
    "parallelism_config": "each process computes rows of its own here; leave it out",
    "use_parallelism_config": "each process computes rows of its own here; leave it out",
    "mpirun_config": "processes are started without MPI; leave it out",
    **dict.fromkeys(
        ("downcast_bf16", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_env", "tpu_vm", "commands",
         "command_file"),
        "nothing here runs on a TPU; leave it out",
    ),
}  # fmt: skip
"""Keys that ask for what is not done, and the way on."""
PASSED_OVER = {
    *("rdzv_backend", "same_network", "main_training_function", "debug", "enable_cpu_affinity", "compute_environment"),
    *("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "mixed_precision"),
    *("distributed_type", "fsdp_config", "deepspeed_config"),
}
"""Keys that change nothing, and those that are read."""
OF_FSDP = {
    *("version", "reshard_after_forward", "offload_params", "activation_checkpointing", "sharding_strategy"),
    *("auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params", "cpu_ram_efficient_loading"),
    *("state_dict_type", "use_orig_params", "sync_module_states", "forward_prefetch", "backward_prefetch"),
    *("backward_prefetch_policy",),
}
"""Keys of `fsdp_config`, without the `fsdp_` before them. The first five are read: layers are wrapped as they are
called, and checkpoints are whole files."""

OF_DEEPSPEED = {
    *("zero_stage", "offload_optimizer_device", "offload_param_device", "zero3_save_16bit_model", "zero3_init_flag"),
    *("offload_optimizer_nvme_path", "offload_param_nvme_path", "gradient_accumulation_steps", "gradient_clipping"),
    *("deepspeed_multinode_launcher", "deepspeed_config_file"),
}
"""Keys of `deepspeed_config`. Weights are made in each process, and gathered where they are saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Settings of a run, and where it is among others. Without `processes`, each GPU of a machine gets one."""

    settings: Mapping[str, Any]
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None


def read_launch_config(name: str) -> LaunchConfig:
    """What the config `name` says, one that is ready or a YAML file that `accelerate config` has written.

    Raises TunesmithError for no such file, and for what would train otherwise.
    """
    values = READY[name] if name in READY else _values(Path(name))
    place = f"--launch-config {name}"
    for key, value in values.items():
        if not (value in NOTHING or value in ([], {})) and key in REFUSED:
            raise TunesmithError(f"{place}: {key} is {value!r}: {REFUSED[key]}")
        if key not in REFUSED and key not in PASSED_OVER:
            raise TunesmithError(f"{place}: unknown key {key!r}{nearest(key, [*PASSED_OVER, *REFUSED])}")
    if (environment := values.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        raise TunesmithError(f"{place}: compute_environment is {environment}; write LOCAL_MACHINE, and start it there")
    kind, settings = str(values.get("distributed_type")).upper(), _precision(values, place)
    if kind == "DEEPSPEED" or values.get("deepspeed_config"):
        settings["deepspeed"] = _deepspeed(values.get("deepspeed_config") or {}, place)
    elif kind == "FSDP":
        settings |= _sharing(values.get("fsdp_config") or {}, place)
    elif kind not in ("MULTI_GPU", "NO", "FALSE"):  # which YAML makes of a plain NO
        raise TunesmithError(f"{place}: distributed_type is {kind}; write NO, MULTI_GPU, FSDP or DEEPSPEED")
    nodes, processes = _number(values, "num_machines", 1, place), _number(values, "num_processes", -1, place)
    if kind in ("NO", "FALSE"):
        processes = max(1, processes)
    if processes > 0:
        if processes % nodes:
            raise TunesmithError(
                f"{place}: num_processes is {processes}, of all {nodes} machines; write a multiple of {nodes}"
            )
        settings["processes"] = processes // nodes
    address = values.get("main_process_ip"), values.get("main_process_port")
    return LaunchConfig(
        settings=settings,
        nodes=nodes,
        node_rank=_number(values, "machine_rank", 0, place),
        rendezvous=f"{address[0]}:{address[1]}" if all(address) else None,
    )


def _values(file: Path) -> dict[str, Any]:
    place = f"--launch-config {file}"
    if not file.is_file():
        listed = ", ".join(READY)
        raise TunesmithError(f"{place} is no file, and not ready either; ready are {listed}{nearest(str(file), READY)}")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), FiniteLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise TunesmithError(f"{place} can't be read as YAML: {error}") from error
    if not isinstance(values, dict) or "distributed_type" not in values:
        raise TunesmithError(f"{place} has no distributed_type; write one by `accelerate config --config_file {file}`")
    return values


def _number(values: Mapping[str, Any], key: str, default: int, place: str) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TunesmithError(f"{place}: {key} is {value!r}; write a whole number")
    return value


def _precision(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """ "no" leaves it to the recipe, as `accelerate` leaves it to the trainer."""
    precision = str(values.get("mixed_precision", "no")).lower()
    if precision in PRECISIONS:
        return {"precision": precision}
    if precision not in ("no", "none", "false"):  # which YAML makes of a plain no
        raise TunesmithError(f"{place}: mixed_precision is {precision}; write bf16, fp16 or no")
    return {}


def _sharing(fsdp: Mapping[str, Any], place: str) -> dict[str, Any]:
    own = {key.removeprefix("fsdp_"): value for key, value in fsdp.items()}
    if unknown := sorted(own.keys() - OF_FSDP):
        raise TunesmithError(f"{place}: unknown key fsdp_{unknown[0]}{nearest(unknown[0], OF_FSDP)}")
    if (version := str(own.get("version", 1))) != "2":
        raise TunesmithError(
            f"{place}: fsdp_version is {version}, and weights are shared out by the second version only; write "
            "fsdp_version: 2 (accelerate to-fsdp2 rewrites a file), or --launch-config fsdp2"
        )
    asked = [own.get("reshard_after_forward", True), own.get("sharding_strategy", True)]
    words = {
        True: "full",
        "FULL_SHARD": "full",
        "TRUE": "full",
        False: "grad",
        "SHARD_GRAD_OP": "grad",
        "FALSE": "grad",
    }
    shards = {words.get(value.upper() if isinstance(value, str) else value) for value in asked}
    if None in shards:
        raise TunesmithError(
            f"{place}: fsdp_reshard_after_forward is {own.get('reshard_after_forward')!r} and fsdp_sharding_strategy "
            f"{own.get('sharding_strategy')!r}; write fsdp_reshard_after_forward: true (shard: full) or false (grad)"
        )
    settings: dict[str, Any] = {"shard": "grad" if "grad" in shards else "full"}
    if own.get("offload_params") not in NOTHING:
        settings["cpu_offload"] = True
    if own.get("activation_checkpointing") not in NOTHING:
        settings["gradient_checkpointing"] = True
    return settings


def _deepspeed(own: Mapping[str, Any], place: str) -> str | dict[str, Any]:
    """DeepSpeed's own config: a file, or what the few keys of accelerate say in its words."""
    if file := own.get("deepspeed_config_file"):
        return str(file)
    for key, value in own.items():
        if key not in OF_DEEPSPEED:
            raise TunesmithError(f"{place}: unknown key {key!r} in deepspeed_config{nearest(key, OF_DEEPSPEED)}")
        if key in ("gradient_accumulation_steps", "gradient_clipping") and value not in (*NOTHING, "auto", 1, 1.0):
            recipe = "max_grad_norm" if key == "gradient_clipping" else key
            raise TunesmithError(f"{place}: {key} is {value!r}; write {recipe}: {value} in the recipe")
    stage = own.get("zero_stage", 2)
    if stage not in (0, 1, 2, 3):
        raise TunesmithError(f"{place}: zero_stage is {stage!r}; write 0, 1, 2 or 3")
    zero: dict[str, Any] = {"stage": stage}
    for what in ("optimizer", "param"):
        device = own.get(f"offload_{what}_device")
        if device not in (*NOTHING, "none"):
            nvme = {"nvme_path": own.get(f"offload_{what}_nvme_path")} if device == "nvme" else {}
            zero[f"offload_{what}"] = {"device": device, **nvme}
    automatic = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    formats = {name: {"enabled": "auto"} for name in PRECISIONS}
    return {**automatic, **formats, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
