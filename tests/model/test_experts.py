"""Mixtures of experts: what all-linear adapts and leaves out, and the load-balancing loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from tests.models import flat, gradient_error, gradients, padded, supervised, tiny, token_rows
from tests.train.runs import PAIR_ROWS
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import adapt
from tunesmith.model.head import answer_objectives
from tunesmith.model.linear import speed_up
from tunesmith.train.setup import ready_for_batches

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_EXPERTS: dict[str, Any] = _COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA: dict[str, Any] = _COMMON | {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": _EXPERTS | {"head_dim": 8},
    "mixtral": _COMMON | {"num_local_experts": 4},
    "qwen3_next": _EXPERTS
    | {
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "granitemoehybrid": _MAMBA
    | {
        "num_local_experts": 4,
        "layer_types": ["mamba", "attention"],
        "mamba_d_head": 16,
        "shared_intermediate_size": 16,
    },
    "falcon_h1": _MAMBA | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_d_head": 8},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
}


def make(name: str, **settings: Any) -> Any:
    return tiny(name, **MODELS.get(name, {}) | settings)


def lora(**settings: Any) -> LoraConfig:
    given: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**given | settings)


def kinds(model: PeftModel) -> set[str]:
    """The layers and parameters that have adapters, without the names of what they are in."""
    tuner: Any = model.base_model
    names = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    return {".".join(name.split(".")[3:]) for name in names}


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_all_linear_adapts_fused_experts_as_peft_does(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = adapt(make(name), lora())
    assert kinds(model) == ATTENTION | {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert "leaves out" not in caplog.text


def test_the_earlier_names_of_fused_experts_are_taken_and_others_are_not() -> None:
    model = adapt(make("qwen3_moe"), lora(target_modules=["gate_proj", "up_proj", "down_proj"]))
    assert kinds(model) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    with pytest.raises(TunesmithError, match="gate_proj without also targeting up_proj because they are fused"):
        adapt(make("qwen3_moe"), lora(target_modules=["gate_proj"]))
    with pytest.raises(TunesmithError, match="target_modules has 'gate_projj', which the model does not have"):
        adapt(make("qwen3_moe"), lora(target_modules=["gate_proj", "up_proj", "gate_projj"]))
    with pytest.raises(TunesmithError, match="rank_pattern has 'qq', which matches nothing that is adapted"):
        adapt(make("qwen3_moe"), lora(rank_pattern={"qq": 2}))
    with pytest.raises(TunesmithError, match=r"lora_dropout != 0.*or list layers in target_modules"):
        adapt(make("qwen3_moe"), lora(lora_dropout=0.1))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "gpt_oss",
            "leaves out 86% of the layers' weights, which get no adapters: mlp.experts.gate_up_proj, "
            "mlp.experts.down_proj, mlp.router.weight. To train the experts too, add target_parameters: "
            "[mlp.experts.gate_up_proj, mlp.experts.down_proj].",
        ),
        (
            "granitemoehybrid",
            "leaves out 78% of the layers' weights, which get no adapters: block_sparse_moe.experts.gate_up_proj, "
            "block_sparse_moe.experts.down_proj, mamba.out_proj.weight, mamba.conv1d.weight, "
            "block_sparse_moe.router.weight. To train the experts too, add target_parameters: "
            "[block_sparse_moe.experts.gate_up_proj, block_sparse_moe.experts.down_proj].",
        ),
        (
            "falcon_h1",
            "leaves out 10% of the layers' weights, which get no adapters: mamba.out_proj.weight, mamba.conv",
        ),
        ("mamba", "mixer.out_proj.weight, mixer.x_proj.weight, mixer.A_log, mixer.conv1d.weight, mixer.dt_proj"),
        (
            "qwen3_next",
            "leaves out 14% of the layers' weights, which get no adapters: mlp.shared_expert.gate_proj.weight",
        ),
    ],
    ids=lambda value: value if len(value) < 20 else "",
)
def test_what_all_linear_leaves_out_is_said(name: str, line: str, caplog: pytest.LogCaptureFixture) -> None:
    adapted = adapt(make(name), lora())
    assert line in caplog.text
    assert not any("out_proj" in kind for kind in kinds(adapted) if not kind.startswith("linear_attn"))


def test_what_is_excluded_on_purpose_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    adapt(make("llama"), lora(exclude_modules=["down_proj"]))
    adapt(make("falcon_h1"), lora(exclude_modules=r".*\.(down_proj|out_proj|conv1d)"))
    assert "leaves out" not in caplog.text


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_have_the_values_and_gradients_of_peft(name: str) -> None:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model: Any = adapt(make(name), lora(target_parameters=names if name == "gpt_oss" else None)).train()
    rows, total = token_rows(9, 5, 12), 0.0
    for row in rows:  # each alone, through the model's own forward
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        loss.backward()
        total += float(loss.detach())
    expected = gradients(model)
    assert any("experts" in key for key in expected)
    assert ready_for_batches(model, flat=True)
    speed_up(model)
    result = supervised(model, flat(rows))
    result.loss.backward()
    assert float(result.loss) == pytest.approx(total, rel=1e-5)
    assert gradient_error(gradients(model), expected) < 1e-4


# The load-balancing loss


def plain_balance(model: Any, rows: list[dict[str, Any]]) -> Any:
    """By the model itself, all rows in one batch of equal lengths."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return model(input_ids=ids, output_router_logits=True, use_cache=False).aux_loss


@pytest.mark.parametrize("way", [flat, padded])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("asked", [True, False])
def test_the_load_balancing_loss_of_a_batch_is_the_models_own(name: str, way: Callable[..., Any], asked: bool) -> None:
    model = make(name, output_router_logits=asked)
    rows = token_rows(7, 7, 7)
    expected = plain_balance(model, rows)
    expected.backward()
    theirs = gradients(model)
    if way is flat:
        ready_for_batches(model, flat=True, routers=True)
    else:
        answer_objectives(model, routers=True)
    batch = way(rows)
    answer = model(**batch.inputs(), targets=batch.targets(), objective=lambda predictions: predictions.hidden.sum())
    answer.router_loss.backward()
    assert float(answer.router_loss) == pytest.approx(float(expected), rel=1e-5)
    assert gradient_error(gradients(model), theirs) < 1e-4
    assert not model.model._forward_hooks


def test_padding_is_left_out_of_the_load_balancing_loss() -> None:
    model = make("mixtral")
    answer_objectives(model, routers=True)
    losses = []
    for multiple in (1, 32):
        batch = padded(token_rows(9, 5), multiple=multiple)
        losses.append(float(model(**batch.inputs(), targets=batch.targets(), objective=lambda _: None).router_loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_trains_the_mean_of_its_micro_batches_load_balancing_losses(
    trainer_of: Callable[..., Any], tokenizer: Any, checkpointing: bool
) -> None:
    """Each counts by its supervised tokens, as the loss of a token does: once over the whole step."""
    weight = 0.5
    model_settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "per_device_train_batch_size": 4}
    steps = {"gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing, "lr_scheduler_type": "constant"}

    def mixtral() -> Any:
        return tiny("mixtral", len(tokenizer), **MODELS["mixtral"])

    def moved(coefficient: float) -> dict[str, torch.Tensor]:
        trainer = trainer_of(model=mixtral(), router_aux_loss_coef=coefficient, **model_settings, **steps)
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        logged = trainer.state.log_history[0]
        assert ("aux_loss" in logged) == bool(coefficient)
        return {name: before[name] - value.detach() for name, value in trainer.model.named_parameters()}

    with_it, without = moved(weight), moved(0.0)
    trainer = trainer_of(model=mixtral(), router_aux_loss_coef=weight, **model_settings, **steps)
    batches = list(trainer.get_train_dataloader())
    total = sum(float(batch.weight) for batch in batches)
    trainer.model.zero_grad()
    for batch in batches:
        answer = trainer.model(**batch.inputs(), targets=batch.targets(), objective=lambda _: None)
        (weight * answer.router_loss * float(batch.weight) / total).backward()
    expected = gradients(trainer.model)
    found = {name: with_it[name] - without[name] for name in expected}
    assert gradient_error(found, expected) < 1e-2  # differences of weights after a step are rounded
    assert float(expected["model.layers.0.mlp.gate.weight"].abs().max()) > 1e-3


def test_the_models_own_setting_is_trained_and_a_model_without_experts_refuses(
    trainer_of: Callable[..., Any], tokenizer: Any
) -> None:
    model = tiny("mixtral", len(tokenizer), **MODELS["mixtral"] | {"output_router_logits": True})
    trainer = trainer_of(model=model, eval_dataset=PAIR_ROWS)
    assert trainer.router_coefficient == 0.001
    trainer.train()
    assert 1.9 < trainer.state.log_history[0]["aux_loss"] < 8  # two of four experts each: 2 where all are used alike
    plain = trainer_of(model=tiny("mixtral", len(tokenizer), **MODELS["mixtral"]), eval_dataset=PAIR_ROWS)
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    with pytest.raises(TunesmithError, match="router_aux_loss_coef: LlamaForCausalLM has no load-balancing loss"):
        trainer_of("llama", router_aux_loss_coef=0.1)
