"""Merged models say what the adapters on their base model say, for every architecture and way of adapting."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from tests.models import ARCHITECTURES, tiny
from tests.ship.merging import VOCABULARY, difference, logits, lora, merged, names, save_run, shake, with_adapters
from tunesmith.ship.merge import merge


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_lora_on_all_linear_layers_of_every_architecture(name: str, tmp_path: Path, tiny_model: Path) -> None:
    run = save_run(tmp_path, tiny(name, VOCABULARY), lora(), tiny_model)
    report, model = merged(run)
    assert difference(logits(model), with_adapters(run)) < 1e-5
    assert report.in_memory is None
    assert difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), logits(model)) > 1e-3


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "rslora": lambda: lora(use_rslora=True, lora_alpha=3),
    "dora": lambda: lora(use_dora=True),
    "dora on embeddings": lambda: lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "patterns": lambda: lora(rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 7}, alpha_pattern={"k_proj": 31}),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "bias of the base": lambda: lora(bias="all"),
    "bias of adapted layers": lambda: lora(bias="lora_only", target_modules=["q_proj", "v_proj"]),
    "bias of the adapters": lambda: lora(lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "head": lambda: lora(modules_to_save=["lm_head"]),
    "embeddings": lambda: lora(modules_to_save=["embed_tokens"]),
    "embeddings and head": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "embeddings by lora": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "head by lora": lambda: lora(target_modules=["lm_head", "q_proj"]),
    "tokens": lambda: lora(trainable_token_indices=[5, 9]),
    "tokens of both": lambda: lora(trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [7]}),
    "a norm": lambda: lora(modules_to_save=["norm"]),
    "a parameter": lambda: lora(target_modules=["q_proj"], target_parameters=["v_proj.weight"]),
}
UNTIED = (
    "head",
    "embeddings",
    "embeddings and head",
    "embeddings by lora",
    "head by lora",
    "tokens of both",
    "dora on embeddings",
)


@pytest.mark.parametrize(("kind", "tied"), [*((kind, True) for kind in CONFIGS), *((kind, False) for kind in UNTIED)])
def test_every_way_of_adapting(kind: str, tied: bool, tmp_path: Path, tiny_model: Path) -> None:
    model = tiny("qwen2", VOCABULARY, tie_word_embeddings=tied)
    run = save_run(tmp_path, model, CONFIGS[kind](), tiny_model)
    report, found = merged(run)
    assert difference(logits(found), with_adapters(run)) < 1e-5
    assert report.untied is (tied and kind in UNTIED)
    assert found.config.tie_word_embeddings is (tied and not report.untied)


MIXTRAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


QWEN3_MOE = MIXTRAL | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


@pytest.mark.parametrize("target", ["all-linear", ["gate_proj", "up_proj", "down_proj"]], ids=["all", "by name"])
def test_experts_that_are_adapted_by_their_earlier_names_are_merged(
    target: Any, tmp_path: Path, tiny_model: Path
) -> None:
    run = save_run(tmp_path, tiny("qwen3_moe", VOCABULARY, **QWEN3_MOE), lora(target_modules=target), tiny_model)
    _, model = merged(run)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert difference(logits(model), with_adapters(run)) < 1e-5
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert not torch.equal(model.get_parameter(name), base.get_parameter(name))


def test_experts_are_merged(tmp_path: Path, tiny_model: Path) -> None:
    config = lora(target_modules=["q_proj"], target_parameters=EXPERTS)
    run = save_run(tmp_path, tiny("gpt_oss", VOCABULARY), config, tiny_model)
    report, model = merged(run)
    assert report.in_memory is None
    assert difference(logits(model), with_adapters(run)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_files_in_another_arrangement_are_loaded_whole_and_written_as_they_were(
    tied: bool, tmp_path: Path, tiny_model: Path
) -> None:
    settings = MIXTRAL | {"num_key_value_heads": 2, "num_local_experts": 4, "tie_word_embeddings": tied}
    config = lora(target_modules=["q_proj", "embed_tokens"], target_parameters=EXPERTS)
    run = save_run(tmp_path, tiny("mixtral", VOCABULARY, **settings), config, tiny_model)
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.5}')  # which transformers won't write
    report, model = merged(run)
    assert model.generation_config.temperature == 0.5
    assert report.in_memory is not None
    assert "gate_up_proj in another arrangement" in report.in_memory
    assert report.untied is tied
    assert difference(logits(model), with_adapters(run)) < 1e-5
    head = {"lm_head.weight"}
    assert names(report.folder) - head == names(tmp_path / "base") - head


@pytest.mark.parametrize("tied", ["modules_to_save", "target_modules"])
def test_embeddings_and_head_that_are_trained_as_one_stay_one(tied: str, tmp_path: Path, tiny_model: Path) -> None:
    targets = {"target_modules": ["q_proj"]}
    targets[tied] = [*targets.get(tied, []), "embed_tokens"]
    config = lora(ensure_weight_tying=True, **targets)
    run = save_run(tmp_path, tiny("llama", VOCABULARY, tie_word_embeddings=True), config, tiny_model)
    report, model = merged(run)
    assert not report.untied
    assert "lm_head.weight" not in names(report.folder)
    assert difference(logits(model), with_adapters(run)) < 1e-5


@pytest.mark.parametrize(("name", "config"), [("gpt2", lora(target_modules=["wte", "c_attn"])), ("gpt_neox", lora())])
def test_the_names_in_the_files_may_be_others_than_the_models(
    name: str, config: LoraConfig, tmp_path: Path, tiny_model: Path
) -> None:
    run = save_run(tmp_path, tiny(name, VOCABULARY), config, tiny_model)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    save_file(bare, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    report, model = merged(run)
    assert report.in_memory is None
    assert difference(logits(model), with_adapters(run)) < 1e-5


@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 61])
@pytest.mark.parametrize("way", [{"trainable_token_indices": [257, 258]}, {"modules_to_save": ["embed_tokens"]}])
def test_embeddings_grow_with_the_tokens(rows: int, way: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    small = tiny("llama", VOCABULARY - 2, tie_word_embeddings=True)
    small.save_pretrained(tmp_path / "base")
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(rows, mean_resizing=False)
    adapted: Any = get_peft_model(grown, lora(**way))
    shake(adapted)
    adapted.save_pretrained(str(tmp_path / "run"))  # with the embeddings, which have grown
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "run")
    ids = torch.tensor([[5, 257, 258, 7]])
    report, model = merged(tmp_path / "run")
    assert model.config.vocab_size == rows
    with torch.no_grad():
        assert difference(model(ids).logits, adapted.eval()(input_ids=ids).logits) < 1e-5
    assert report.untied is ("modules_to_save" in way)


def test_new_rows_that_nobody_trained_are_the_mean_of_the_others(tmp_path: Path, tiny_model: Path) -> None:
    run = save_run(tmp_path, tiny("llama", VOCABULARY - 2), lora(), tiny_model)
    _, model = merged(run)
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == VOCABULARY
    torch.testing.assert_close(rows[-1], rows[:-2].mean(0))


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_of_a_quantized_base_go_into_its_original_weights(bits: int, tmp_path: Path, tiny_model: Path) -> None:
    tiny("llama", VOCABULARY).save_pretrained(tmp_path / "base")
    how: Any = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how)
    adapted: Any = get_peft_model(quantized, lora())
    shake(adapted)
    adapted.save_pretrained(str(tmp_path / "run"))
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "run")
    report, model = merged(tmp_path / "run")
    assert report.dtype is torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert difference(logits(model), with_adapters(tmp_path / "run")) < 1e-5
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(model.get_parameter(name), tiny("llama", VOCABULARY).get_parameter(name))


@pytest.mark.parametrize("whole", [False, True], ids=["language model", "classifier"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_reward_model_merges_to_a_plain_classifier_with_its_head(
    name: str, whole: bool, tmp_path: Path, tiny_model: Path
) -> None:
    """The base is a language model, whose files have no head for scores, or a classifier."""
    auto: Any = AutoModelForSequenceClassification
    settings = {"auto": auto, "num_labels": 1} if whole else {}
    tiny(name, VOCABULARY, **settings).save_pretrained(tmp_path / "base")
    adapted: Any = get_peft_model(
        auto.from_pretrained(tmp_path / "base", num_labels=1), lora(task_type="SEQ_CLS", modules_to_save=["score"])
    )
    shake(adapted)
    adapted.save_pretrained(str(tmp_path / "run"))
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "run")
    report = merge(tmp_path / "run", tmp_path / "merged")
    assert report.in_memory is None
    assert report.drift is not None
    assert report.drift.within
    assert "scores" in str(report.drift)
    model, info = auto.from_pretrained(report.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_labels == 1
    torch.testing.assert_close(logits(model), logits(adapted), rtol=1e-5, atol=1e-5)
