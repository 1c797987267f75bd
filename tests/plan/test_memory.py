"""A step on fake tensors has the bytes of a real one, and a plan is the sum of what training keeps and makes."""

import gc
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.conftest import REPO
from tests.models import ARCHITECTURES, tiny
from tunesmith.data.batches import Targets
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import adapt
from tunesmith.model.attention import document_map, use_documents
from tunesmith.model.devices import GPUS, Device, device
from tunesmith.model.head import Predictions, from_hidden
from tunesmith.model.linear import speed_up
from tunesmith.plan.footprint import GRADIENTS, Count, Shape, scaling, scored, supervised, timeline
from tunesmith.plan.memory import LIBRARIES, NO_NEED, Memory, Method, Run, as_if_quantized, count, largest, plan
from tunesmith.plan.memory import run_of as planned_run
from tunesmith.settings.lora import lora_config
from tunesmith.settings.recipe import resolve

LORA = {"r": 4}
CPU = Device(name="cpu", memory=10**10, precision="fp32", one_kernel=False)


def config_of(name: str, **settings: Any) -> Any:
    common = {
        "vocab_size": 97,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 4096,
    }
    return AutoConfig.for_model(name, **common | ARCHITECTURES[name] | settings)


def run_of(config: Any, **settings: Any) -> Run:
    defaults: dict[str, Any] = {"device": CPU, "precision": "fp32", "rows": 2, "length": 64}
    return Run(config=config, lora=lora_config(LORA), **defaults | settings)


def memory_of(method: Method, config: Any, **settings: Any) -> Memory:
    run = run_of(config, **settings)
    return count(run, method).memory(run.rows, run.length)


class RealCount(Count):
    """Counts real tensors, as they are computed with."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.counted(func(*args, **(kwargs or {})))


def real_peak(
    model: PreTrainedModel,
    wrapped: Any,
    rows: int,
    length: int,
    autocast: torch.dtype | None = None,
    objective: Callable[[Predictions], Tensor] = supervised,
) -> int:
    """Bytes beside the weights, of a step with real tensors that are counted as they come and go."""
    use_documents(model)
    speed_up(wrapped)
    wrapped.train()
    documents = document_map([length] * rows)
    ids = torch.ones(1, rows * length, dtype=torch.int64)
    positions = torch.arange(rows * length - 1)
    gc.collect()
    count = RealCount([*wrapped.parameters(), *wrapped.buffers(), ids, positions, documents])
    with count:
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            given = {"input_ids": ids, "position_ids": ids, "attention_mask": documents, "use_cache": False}
            predictions = from_hidden(model, given, Targets(positions=positions, tokens=positions % 97))
            loss = objective(predictions)
        loss.backward()
        count.end("all")
    return count.segments["all"].peak.total()


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "phi3"])
def test_a_fake_step_has_the_peak_of_a_real_one(name: str, adapted: bool) -> None:
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    more: dict[str, Any] = {layers: 6} | (
        {"layer_types": ["sliding_attention", "full_attention"] * 3} if name == "gemma2" else {}
    )
    model = tiny(name, **more)
    wrapped: Any = adapt(model, lora_config(LORA)) if adapted else model
    expected = real_peak(model, wrapped, 3, 40)
    counted = count(run_of(model.config), "lora" if adapted else "full")
    assert len(counted.subject.layers) <= 3
    found = timeline(counted.subject, Shape(rows=3, length=40)).peak.total()
    assert found == pytest.approx(expected, rel=0.05)
    assert not counted.is_estimate


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_a_step_on_preferences_keeps_what_its_log_probabilities_need(adapted: bool) -> None:
    sizes = {"vocab_size": 4096, "num_hidden_layers": 4}
    model = tiny("llama", **sizes)
    wrapped: Any = adapt(model, lora_config(LORA)) if adapted else model
    expected = real_peak(model, wrapped, 6, 40, objective=scored)
    run = run_of(config_of("llama", **sizes), rows=3, length=40, documents=2, scores=True)
    counted = count(run, "lora" if adapted else "full")
    assert counted.memory(3, 40).total - LIBRARIES > expected
    assert timeline(counted.subject, Shape(rows=6, length=40)).peak.total() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"trainer": "dpo", "lora": True}, 0),  # the model without its adapters
        ({"trainer": "dpo"}, 1),
        ({"trainer": "kto"}, 1),
        ({"trainer": "dpo", "precompute_ref_log_probs": True}, 0),
        ({"trainer": "dpo", "loss_type": "simpo"}, 0),
        ({"trainer": "sft"}, 0),
    ],
)
def test_a_reference_is_a_second_copy_of_the_trained_weights_or_nothing(
    settings: dict[str, Any], copies: int, tiny_model: Path
) -> None:
    recipe = resolve(None, {"model": str(tiny_model), "data": "unused", "max_length": 64, **settings, **NO_NEED})
    run = planned_run(recipe, "cpu")
    counted = count(run, "lora" if settings.get("lora") else "full")
    assert counted.static["reference"] == copies * counted.static["gradients"]
    assert run.documents == (2 if settings["trainer"] == "dpo" else 1)
    shared = replace(counted, run=replace(counted.run, processes=4, shard="full"))
    assert shared.memory(1, 64).reference == -(-counted.static["reference"] // 4)


def test_adapters_that_are_trained_further_are_copied_for_the_reference() -> None:
    counted = count(run_of(config_of("llama"), has_reference=True, adapted=True), "lora")
    assert counted.static["reference"] == counted.static["adapters"] > 0


def test_copies_of_weights_under_autocast_are_gone_before_the_backward() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8}
    model = tiny("llama", **sizes)
    model.activation_checkpointing_enable({"use_reentrant": False})
    expected = real_peak(model, model, 2, 16, torch.bfloat16)
    counted = count(run_of(config_of("llama", **sizes), precision="bf16", checkpoint_every=1), "full")
    assert timeline(counted.subject, Shape(rows=2, length=16)).peak.total() == pytest.approx(expected, rel=0.05)


def test_gradient_checkpointing_keeps_a_layers_input_alone() -> None:
    config = config_of("llama", num_hidden_layers=8)
    kept = {
        every: count(run_of(config, checkpoint_every=every, rows=4, length=256), "lora").memory(4, 256)
        for every in (0, 1, 2)
    }
    tokens, hidden = 4 * 256, 32
    assert kept[1].activations < kept[2].activations < kept[0].activations
    assert 8 * tokens * hidden * 4 <= kept[1].activations < 0.3 * kept[0].activations


def test_what_is_kept_is_what_the_method_keeps() -> None:
    config = config_of("llama", vocab_size=512)
    weights = tiny("llama", vocab_size=512).num_parameters()
    memory: dict[str, Memory] = {"full": memory_of("full", config), "lora": memory_of("lora", config)}
    assert memory["full"].weights >= 4 * weights
    assert memory["full"].optimizer == 8 * weights
    assert memory["full"].adapters == 0
    adapters = sum(p.numel() for p in adapt(tiny("llama", vocab_size=512), lora_config(LORA)).parameters()) - weights
    assert memory["lora"].adapters == 4 * adapters
    assert memory["lora"].optimizer == 8 * adapters
    eight = memory_of("lora", config, optimizer="adamw_8bit")
    assert eight.optimizer == pytest.approx(2.1 * adapters, abs=200)
    factored = memory_of("full", config, optimizer="adafactor")
    assert factored.optimizer < memory["full"].optimizer / 8
    assert all(item.overhead >= LIBRARIES for item in memory.values())


def test_accumulated_gradients_are_there_in_the_forward_too() -> None:
    config = config_of("llama", vocab_size=4096, hidden_size=64)
    alone, more = (memory_of("full", config, accumulation=n, rows=8, length=256) for n in (1, 2))
    assert more.gradients >= 2 * 4 * 4096 * 64  # of the embeddings and the head
    assert more.total > alone.total


def test_half_precision_halves_what_is_frozen() -> None:
    config = config_of("llama", vocab_size=512)
    whole, half = (memory_of("lora", config, precision=name) for name in ("fp32", "bf16"))
    assert half.weights == pytest.approx(whole.weights / 2, rel=0.02)
    assert half.adapters == whole.adapters
    full = memory_of("full", config, precision="bf16")
    assert full.weights >= whole.weights  # the master weights stay in fp32


def test_quantized_layers_have_the_bytes_of_their_weights() -> None:
    config = config_of("llama", hidden_size=128, intermediate_size=256, vocab_size=64, head_dim=32)
    methods: tuple[Method, ...] = ("lora", "8bit", "4bit")
    kept = {name: memory_of(name, config, precision="bf16").weights for name in methods}
    linear = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256)
    assert kept["lora"] - kept["8bit"] == pytest.approx(linear, rel=0.05)  # 2 bytes to 1, and scales
    assert kept["lora"] - kept["4bit"] == pytest.approx(1.484 * linear, rel=0.02)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("gpt2"))
    as_if_quantized(model, "4bit")
    assert type(model.lm_head) is torch.nn.Linear
    assert model.transformer.h[0].mlp.c_fc.in_features == 32


def test_three_steps_tell_of_other_batches() -> None:
    counted = count(run_of(config_of("llama", num_hidden_layers=5), rows=2, length=1024), "lora")
    told = scaling(counted._counted, 2, 1024)
    for rows, length in ((2, 700), (6, 512), (1, 3000)):
        expected = counted._counted(rows, length).peak.total()
        assert told.at(rows, length).peak.total() == pytest.approx(expected, rel=0.1)


def test_scores_grow_with_the_square_of_the_length() -> None:
    """Gemma 2 caps its scores, so that each layer makes all of them."""
    config = config_of("gemma2", sliding_window=4096)
    counted = count(run_of(config, rows=2, length=1024), "lora")
    told = scaling(counted._counted, 2, 1024)
    expected = counted._counted(2, 1536).peak.total()
    assert told.at(2, 1536).peak.total() == pytest.approx(expected, rel=0.1)
    assert expected > 1.9 * counted._counted(2, 1024).peak.total()


@pytest.mark.parametrize(
    ("slope", "capacity", "most", "expected"),
    [(10, 1005, 10**6, 90), (10, 9, 50, 0), (1, 10**9, 500, 500), (3, 103, 9, 1)],
)
def test_the_largest_that_fits_is_found(slope: int, capacity: int, most: int, expected: int) -> None:
    assert largest(lambda x: 100 + slope * x, capacity, 8, most) == expected


def test_the_largest_batch_fits_and_a_larger_one_does_not() -> None:
    config = config_of("llama", max_position_embeddings=10**6)
    small = Device(name="cpu", memory=LIBRARIES + 40_000_000, precision="fp32", one_kernel=False)
    run = run_of(config, device=small, rows=2, length=256)
    told = plan(run, "lora")
    counted = count(run, "lora")
    assert told.fits
    assert counted.memory(2, told.longest).total <= small.memory < counted.memory(2, int(1.05 * told.longest) + 2).total
    assert counted.memory(told.most_rows, 256).total <= small.memory
    assert counted.memory(int(1.05 * told.most_rows) + 2, 256).total > small.memory


def test_positions_bound_the_length() -> None:
    told = plan(run_of(config_of("llama", max_position_embeddings=300)), "lora")
    assert told.longest == 300


def test_a_model_that_is_padded_is_counted_padded_and_said_so() -> None:
    told = plan(run_of(config_of("gpt_neo")), "full")
    assert any("batches are padded" in note for note in told.notes)


def test_a_step_that_can_not_be_counted_is_an_estimate_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = count(run_of(config_of("llama")), "lora")

    def asks_for_values(*_: Any, **__: Any) -> Any:
        return torch.ones(3).nonzero()

    monkeypatch.setattr(counted.subject.base.model, "forward", asks_for_values)
    assert counted.memory(2, 64).activations > 0
    assert counted.is_estimate
    assert "estimate" in counted.notes[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_counted(name: str) -> None:
    run = run_of(config_of(name), length=32)
    memory = count(run, "4bit").memory(run.rows, run.length)
    assert memory.activations > 0
    assert memory.loss > 0


def test_a_gpu_by_its_name() -> None:
    assert device("RTX 4090", "fp32") is GPUS["4090"]
    assert device("cpu", "bf16").precision == "bf16"
    assert device("cpu", "fp32").memory > 10**8
    with pytest.raises(TunesmithError, match=r"--gpu t44: choose t4 .* did you mean 't4'"):
        device("t44", "fp32")


def test_a_config_of_no_language_model_is_named() -> None:
    with pytest.raises(TunesmithError, match="can't be planned for"):
        plan(run_of(AutoConfig.for_model("vit")), "full")


@pytest.mark.parametrize(
    "settings", [{"hidden_act": "__import__"}, {"rope_parameters": {"rope_type": "evil"}}, {"vocab_size": -5}]
)
def test_settings_that_make_no_model_are_a_mistake_of_the_model(settings: dict[str, Any]) -> None:
    with pytest.raises(TunesmithError, match="model llama can't be planned for: "):
        plan(run_of(config_of("llama", **settings)), "full")


def test_gradients_are_told_from_what_a_backward_makes() -> None:
    counted = count(run_of(config_of("llama")), "full")
    moments = timeline(counted.subject, Shape(rows=1, length=16)).moments
    assert moments[0][GRADIENTS] == 0
    assert 0.5 * counted.static["gradients"] < moments[-1][GRADIENTS] <= counted.static["gradients"]


@pytest.mark.slow
def test_the_plan_of_the_demo_model_is_within_15_percent_of_the_measured_peak() -> None:
    script, method, rows, length = REPO / "benchmarks" / "plan.py", "full", 1, 128
    command = [sys.executable, str(script), "--steps", "2", "--measure", method, f"{rows}x{length}", "off"]
    real = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    planned = runpy.run_path(str(script))["planned"]
    assert planned(method, rows, length, False)["peak"] == pytest.approx(real["peak"], rel=0.15)
