"""What several processes hold, send and compute, by hand.

The model has 2 layers of 7,744 numbers (projections of 1,024, 512, 512 and 1,024, three of 1,536, two norms of 32) and
a root of 6,240 (embeddings and head of 3,104, a norm): 21,728. Adapters of rank 4 have 1,856 numbers a layer.
"""

from dataclasses import replace
from typing import Any

import pytest

from tests.plan.test_memory import config_of, run_of
from tunesmith.model.devices import GPUS, Device, Speed
from tunesmith.plan.memory import Counted, Memory, Method, count
from tunesmith.plan.processes import Traffic, spread, traffic, work

GPU = Device(
    name="gpu",
    memory=10**9,
    precision="bf16",
    one_kernel=True,
    speed=Speed(flops=1e9, link=1e6, network=1e5, together=8),
)


def counted_of(method: Method, **settings: Any) -> Counted:
    return count(run_of(config_of("llama"), **settings), method)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("full", {"processes": 8}, Traffic(all_reduce=2 * 7 / 8 * 4 * 21_728)),
        ("full", {"processes": 8, "accumulation": 4}, Traffic(all_reduce=152_096)),
        ("lora", {"processes": 8}, Traffic(all_reduce=2 * 7 / 8 * 4 * 3_712)),
        (
            "full",
            {"processes": 8, "shard": "full", "accumulation": 2},
            Traffic(all_gather=7 / 8 * 4 * (6_240 + 4 * 15_488), reduce_scatter=7 / 8 * 4 * 21_728 * 2),
        ),
        (
            "full",
            {"processes": 8, "shard": "grad", "accumulation": 2},
            Traffic(all_gather=7 / 8 * 4 * 21_728, reduce_scatter=7 / 8 * 4 * 21_728 * 2),
        ),
        # Layers are gathered in 2 bytes a number, the root in 4.
        (
            "full",
            {"processes": 2, "shard": "full", "precision": "bf16"},
            Traffic(all_gather=1 / 2 * (4 * 6_240 + 2 * 2 * 15_488), reduce_scatter=1 / 2 * 4 * 21_728),
        ),
        # Frozen weights are in 2 bytes, adapters in 4, whose gradients are summed once.
        (
            "lora",
            {"processes": 8, "shard": "full", "accumulation": 2, "precision": "bf16"},
            Traffic(all_gather=7 / 8 * (2 * 6_240 + 4 * (2 * 15_488 + 4 * 3_712)), reduce_scatter=7 / 8 * 4 * 3_712),
        ),
        ("full", {"processes": 1, "shard": "full"}, Traffic()),
    ],
)
def test_what_a_process_sends_in_a_step(method: Method, settings: dict[str, Any], expected: Traffic) -> None:
    assert traffic(counted_of(method, **settings)) == expected


def memory_of(method: Method, **settings: Any) -> Memory:
    counted = count(run_of(config_of("llama", num_hidden_layers=3), **settings), method)
    return counted.memory(2, 64)


def test_processes_share_out_what_is_kept() -> None:
    one, none, full = (memory_of("full", processes=n, shard=s) for n, s in ((1, "full"), (4, "none"), (4, "full")))
    numbers = 6_240 + 3 * 7_744
    assert one.optimizer == none.optimizer == 8 * numbers
    assert one.exchanged == 0
    assert none.exchanged == 4 * numbers  # the buckets in which gradients are summed
    assert full.optimizer == 8 * numbers / 4
    assert full.gradients == 4 * numbers / 4
    assert full.weights == -(-one.weights // 4)
    # The root, two layers, the root's gradients, and those of the largest unit on their way.
    assert full.exchanged == 4 * (6_240 + 2 * 7_744 + 6_240 + 7_744)
    assert memory_of("full", processes=4, shard="grad").exchanged == 4 * (6_240 + 3 * 7_744 + 6_240 + 7_744)
    half = memory_of("full", processes=4, shard="full", precision="bf16")
    assert half.exchanged == 4 * 6_240 + 2 * 2 * 7_744 + 4 * (6_240 + 7_744)
    assert half.weights == full.weights  # fp32, of which the layers are gathered in bf16


def test_autocasts_copies_of_weights_are_not_counted_where_they_are_gathered_instead() -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    run = run_of(config_of("llama", **sizes), precision="bf16", processes=4, rows=1, length=16, accumulation=2)
    copies = 2 * 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
    none, full = (count(replace(run, shard=shard), "full").memory(1, 16) for shard in ("none", "full"))
    assert none.activations - full.activations == pytest.approx(copies, rel=0.1)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        # 18,464 weights that a token is multiplied with; 64 tokens, 64 numbers of queries in two layers.
        ("full", {}, 3 * (2 * 18_464 + 2 * 64 * 64)),
        ("full", {"checkpoint_every": 1}, 4 * (2 * 18_464 + 2 * 64 * 64)),
        ("full", {"passes": 1, "scores": True}, 4 * (2 * 18_464 + 2 * 64 * 64)),
        ("lora", {}, 2 * 2 * (18_464 + 3_712) + 3 * 2 * 64 * 64),
    ],
)
def test_operations_a_token(method: Method, settings: dict[str, Any], expected: int) -> None:
    assert work(counted_of(method, **settings)) == expected


def test_a_token_is_computed_by_its_experts_alone() -> None:
    experts = count(run_of(config_of("gpt_oss", num_experts_per_tok=1)), "full").units.products
    all_of_them = count(run_of(config_of("gpt_oss", num_experts_per_tok=4)), "full").units.products
    # 2 layers of 4 experts, each with 32 x 96 weights and 96 biases, and 48 x 32 and 32.
    assert all_of_them - experts == 2 * 3 * (32 * 96 + 96 + 48 * 32 + 32)


def test_time_is_that_of_the_stated_speed_and_of_the_slowest_wire() -> None:
    run = run_of(config_of("llama"), device=GPU, precision="bf16", processes=8, rows=2, length=64)
    spreads = {item.processes: item for item in spread(run, "full")}
    assert list(spreads) == [1, 8, 64, 512]
    computing = 128 * 135_360 / (0.4 * 1e9)
    assert spreads[1].seconds == pytest.approx((computing, computing))
    assert spreads[8].seconds == pytest.approx((0.152096, 0.152096 + computing))
    assert spreads[64].sending == pytest.approx(2 * 63 / 64 * 4 * 21_728 / 1e5)
    assert [item.tokens for item in spreads.values()] == [128, 1024, 8192, 65536]
    assert all(item.fits for item in spreads.values())
    assert spread(replace(run, precision="fp32"), "lora")[0].seconds is None


def test_gpus_have_the_speed_that_is_stated() -> None:
    assert GPUS["h100"].speed == Speed(flops=989.4e12, link=450e9, network=50e9, together=8)
    assert GPUS["t4"].speed == Speed(flops=65e12, link=16e9, network=1.5625e9, together=4)
