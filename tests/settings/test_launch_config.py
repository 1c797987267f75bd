"""What a config of `accelerate launch` asks for is done, passed over, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.errors import TunesmithError
from tunesmith.settings.launch_config import LaunchConfig, read_launch_config

# As `accelerate config` writes them.
PLAIN: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "MULTI_GPU", "downcast_bf16": "no",
    "enable_cpu_affinity": False, "gpu_ids": "all", "machine_rank": 0, "main_training_function": "main",
    "mixed_precision": "bf16", "num_machines": 1, "num_processes": 8, "rdzv_backend": "static", "same_network": True,
    "tpu_env": [], "tpu_use_cluster": False, "tpu_use_sudo": False, "use_cpu": False,
}  # fmt: skip
FSDP: dict[str, Any] = {
    "fsdp_activation_checkpointing": True, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": True, "fsdp_offload_params": False, "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_version": 2,
}  # fmt: skip


def read(tmp_path: Path, **changes: Any) -> LaunchConfig:
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(PLAIN | changes))
    return read_launch_config(str(file))


def test_names_of_ready_configs() -> None:
    assert read_launch_config("multi_gpu") == LaunchConfig(settings={})
    assert read_launch_config("single_gpu") == LaunchConfig(settings={"processes": 1})
    assert read_launch_config("fsdp2") == LaunchConfig(settings={"shard": "full"})


def test_a_file_says_how_many_processes_where_and_how_they_share(tmp_path: Path) -> None:
    assert read(tmp_path) == LaunchConfig(settings={"precision": "bf16", "processes": 8})
    machines = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
    assert read(tmp_path, **machines, mixed_precision="no") == LaunchConfig(
        settings={"processes": 4}, nodes=2, node_rank=1, rendezvous="10.0.0.1:29500"
    )
    sharing = read(tmp_path, distributed_type="FSDP", fsdp_config=FSDP)
    assert dict(sharing.settings) == {
        "precision": "bf16", "processes": 8, "shard": "full", "gradient_checkpointing": True,
    }  # fmt: skip
    kept = FSDP | {"fsdp_reshard_after_forward": False, "fsdp_offload_params": True}
    assert {"shard": "grad", "cpu_offload": True}.items() <= dict(
        read(tmp_path, distributed_type="FSDP", fsdp_config=kept).settings
    ).items()
    (tmp_path / "by_hand.yaml").write_text("distributed_type: NO\nmixed_precision: no\n")  # which YAML reads as false
    assert read_launch_config(str(tmp_path / "by_hand.yaml")) == LaunchConfig(settings={"processes": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distributed_type": "FSDP", "fsdp_config": FSDP | {"fsdp_version": 1}}, "write fsdp_version: 2"),
        ({"distributed_type": "FSDP", "fsdp_config": {}}, "fsdp_version is 1"),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP | {"fsdp_ofload_params": True}}, "fsdp_ofload_params"),
        (
            {"distributed_type": "FSDP", "fsdp_config": FSDP | {"fsdp_reshard_after_forward": "HYBRID_SHARD"}},
            r"write fsdp_reshard_after_forward: true \(shard: full\) or false \(grad\)",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 4}},
            "zero_stage is 4; write 0, 1, 2 or 3",
        ),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stge": 2}}, "did you mean 'zero_stage'"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_clipping": 0.5}},
            r"write max_grad_norm: 0\.5 in the recipe",
        ),
        ({"distributed_type": "MEGATRON_LM"}, "write NO, MULTI_GPU, FSDP or DEEPSPEED"),
        ({"use_cpu": True}, "write use_cpu: true in the recipe"),
        ({"gpu_ids": "0,1"}, "set CUDA_VISIBLE_DEVICES before the command"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "write torch_compile: true"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "each process computes rows of its own"),
        ({"tpu_use_sudo": True}, "nothing here runs on a TPU"),
        ({"mixed_precision": "fp8"}, "mixed_precision is fp8; write bf16, fp16 or no"),
        ({"num_processes": 7, "num_machines": 2}, "num_processes is 7, of all 2 machines; write a multiple of 2"),
        ({"num_processes": "eight"}, "num_processes is 'eight'; write a whole number"),
        ({"num_proceses": 8}, "unknown key 'num_proceses'; did you mean 'num_processes'"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "write LOCAL_MACHINE"),
    ],
)
def test_what_would_train_otherwise_is_refused_with_the_way_on(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TunesmithError, match=message):
        read(tmp_path, **changes)


def test_names_and_files_that_are_no_config(tmp_path: Path) -> None:
    for name, message in {
        "fsdp1": "fsdp_version: 2",
        "multi_gpus": "'multi_gpu'",
    }.items():
        with pytest.raises(TunesmithError, match=message):
            read_launch_config(name)
    for text in ("a: [", "rows", "use_cpu: false"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(TunesmithError, match=r"bad\.yaml"):
            read_launch_config(str(tmp_path / "bad.yaml"))


def test_deepspeed_configs_become_those_of_deepspeed(tmp_path: Path) -> None:
    assert read_launch_config("zero3").settings["deepspeed"]["zero_optimization"] == {"stage": 3}
    own = {
        "zero_stage": 2,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "none",
        "gradient_clipping": "auto",
    }
    settings = read(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=own, num_processes=2).settings
    assert settings["processes"] == 2
    assert settings["deepspeed"]["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert settings["deepspeed"]["train_micro_batch_size_per_gpu"] == "auto"
    file = read(tmp_path, distributed_type="DEEPSPEED", deepspeed_config={"deepspeed_config_file": "zero.json"})
    assert file.settings["deepspeed"] == "zero.json"
