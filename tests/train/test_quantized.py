"""8-bit and 4-bit base models: `bitsandbytes` really runs, here on the CPU."""

import copy
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig
from transformers.quantizers.auto import AutoHfQuantizer
from typer.testing import CliRunner

from tests.models import tiny
from tests.train.runs import PAIR_ROWS, weights_of
from tunesmith.cli.main import app
from tunesmith.errors import TunesmithError
from tunesmith.model.load import load_run
from tunesmith.model.quantize import bits_of, check_optimizer, keep_quantized, quantization

BITS = ("8bit", "4bit")
LORA = LoraConfig(r=8, target_modules="all-linear")
SETTINGS: dict[str, Any] = {"max_steps": 6, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> str:
    """The folder of a small model whose layers are wide enough for blocks of 64 weights."""
    folder = str(tmp_path / "base")
    tiny("llama", len(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("way", ["by the trainer", "loaded before", "prepared before"])
@pytest.mark.parametrize("bits", BITS)
def test_adapters_learn_on_a_quantized_model(
    bits: Any, way: str, base: str, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    config = quantization(bits, torch.float32)
    arguments: dict[str, Any] = {"peft_config": LORA}
    if way == "by the trainer":
        trainer = trainer_of(model=base, quantization_config=config, **arguments, **SETTINGS)
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, device_map="auto", dtype=torch.float32
        )
        if way == "prepared before":
            model, arguments = get_peft_model(model, copy.deepcopy(LORA)), {}
        trainer = trainer_of(model=model, **arguments, **SETTINGS)
    kept = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert bits_of(trainer.model.get_base_model()) == bits
    assert all(torch.equal(value, kept[name]) for name, value in trainer.model.named_parameters() if name in kept)
    assert {value.dtype for value in trainer.model.parameters() if value.requires_grad} == {torch.float32}
    trainer.save_model()
    loaded, _ = load_run(trainer.args.output_dir)  # on the whole base model
    assert bits_of(loaded.get_base_model()) is None  # type: ignore[operator]


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_dequantized_model(bits: Any, base: str, trainer_of: Callable[..., Any]) -> None:
    """4 bits: the same numbers, so the same gradients; 8 bits: the inputs are rounded as well."""
    fixed = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    steps = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
    quantized = trainer_of(
        model=base, quantization_config=quantization(bits, torch.float32), peft_config=fixed, **steps
    )
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization(bits, torch.float32))
    plain = plain.dequantize(dtype=torch.float32)
    reference = trainer_of(model=plain, peft_config=fixed, **steps)
    start = {name: value for name, value in weights_of(reference).items() if "lora_" in name}
    quantized.model.load_state_dict(start, strict=False)
    for trainer in (quantized, reference):
        trainer.train()
    for name, value in weights_of(reference).items():
        if "lora_" in name:
            moved, expected = weights_of(quantized)[name] - start[name], value - start[name]
            assert float((moved - expected).norm()) <= (1e-4 if bits == "4bit" else 0.1) * float(expected.norm())


@pytest.mark.parametrize("bits", BITS)
def test_checkpointing_recomputes_to_the_same_weights(bits: Any, base: str, trainer_of: Callable[..., Any]) -> None:
    def end(**settings: Any) -> dict[str, torch.Tensor]:
        config = quantization(bits, torch.float32)
        trainer = trainer_of(model=base, quantization_config=config, peft_config=LORA, max_steps=2, **settings)
        trainer.train()
        return {name: value for name, value in weights_of(trainer).items() if "lora_" in name}

    expected = end()
    for name, value in end(gradient_checkpointing=True).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_dropout_takes_part(base: str, trainer_of: Callable[..., Any]) -> None:
    config = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.3)
    quantized = {"quantization_config": quantization("4bit", torch.float32)}
    trainer = trainer_of(model=base, peft_config=config, **quantized, **SETTINGS)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bnb_8bit", "lion_8bit"])
def test_8_bit_optimizers_step(optim: str, base: str, trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(model=base, optim=optim, max_steps=4, learning_rate=3e-3, lr_scheduler_type="constant")
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    kept = trainer.optimizer.optimizer.state
    states = [kept[value]["state1"] for name, value in trainer.model.named_parameters() if "mlp" in name]
    assert {state.dtype for state in states} == {torch.uint8}


@pytest.mark.parametrize("bits", BITS)
def test_the_command_line_quantizes(bits: str, base: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(str(row).replace("'", '"') for row in PAIR_ROWS))
    run = ["train", "--model", base, "--data", str(data), "--output", str(tmp_path / "run"), "--use-cpu"]
    run += ["--sample-prompts", "0"]
    result = CliRunner().invoke(app, [*run, "--quantize", bits, "--lora", "r=4", "--max-steps", "2"])
    assert result.exit_code == 0, result.output
    assert "trains 8,192 of" in result.stdout, result.stdout
    run[2], run[6] = str(tmp_path / "run"), str(tmp_path / "more")
    again = CliRunner().invoke(app, [*run, "--quantize", bits, "--max-steps", "1"])
    assert again.exit_code == 0, again.output
    assert "saved the adapters" in again.stdout


def test_without_adapters_nothing_is_loaded(base: str, trainer_of: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("tunesmith.train.setup.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(TunesmithError, match="8-bit and 4-bit weights can't be trained; give a peft_config"):
        trainer_of(model=base, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_where_it_can_not_be_nothing_is_loaded(base: str, trainer_of: Callable[..., Any], monkeypatch: Any) -> None:
    import bitsandbytes

    monkeypatch.setattr("tunesmith.train.setup.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    arguments: dict[str, Any] = {
        "model": base,
        "peft_config": LORA,
        "quantization_config": quantization("4bit", torch.float32),
    }
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda", "xpu"})
    with pytest.raises(TunesmithError, match=r"are not there on cpu: this bitsandbytes \(.*\) runs on cuda, xpu"):
        trainer_of(**arguments)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "tunesmith.model.quantize.find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    with pytest.raises(TunesmithError, match=r"need bitsandbytes: pip install 'tunesmith\[quant\]'"):
        trainer_of(**arguments)
    with pytest.raises(TunesmithError, match="optimizers such as adamw_8bit need bitsandbytes: pip install"):
        trainer_of(optim="adamw_8bit")
    # Nothing is to be installed for what would not run then.
    with pytest.raises(TunesmithError, match="this device is a cpu; take adamw_8bit"):
        trainer_of(optim="paged_adamw_8bit")


def test_optimizers_that_page_need_a_gpu(trainer_of: Callable[..., Any]) -> None:
    with pytest.raises(TunesmithError, match=r"paged_adamw_8bit pages .* this device is a cpu; take adamw_8bit"):
        trainer_of(optim="paged_adamw_8bit")
    check_optimizer("paged_adamw_8bit", "cuda")
    check_optimizer("adamw_torch", "mps")


def test_no_layer_says_in_each_step_that_it_rounds_its_input(caplog: pytest.LogCaptureFixture) -> None:
    from bitsandbytes.nn.modules import Linear8bitLt

    layer = Linear8bitLt(64, 64, has_fp16_weights=False)
    keep_quantized(layer)
    with caplog.at_level(logging.WARNING, "bitsandbytes"):  # the command line has it quieter
        layer(torch.ones(1, 64, dtype=torch.bfloat16))
        logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert caplog.messages == ["something else"]


def test_other_words_are_refused() -> None:
    with pytest.raises(TunesmithError, match=r"quantize is '2bit'; choose 8bit | 4bit"):
        quantization("2bit", torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bits", "settings", "message"),
    [
        ("8bit", {"use_dora": True}, "use_dora needs the weights' norms.*quantize: 4bit"),
        ("4bit", {"init_lora_weights": "pissa"}, "'pissa' can't start on 4bit weights"),
        ("4bit", {"init_lora_weights": "olora"}, "'olora' can't start on 4bit weights"),
        ("8bit", {"init_lora_weights": "orthogonal"}, "'orthogonal' can't start on 8bit weights"),
    ],
    ids=["dora", "pissa", "olora", "orthogonal"],
)
def test_adapters_that_quantized_weights_have_no_start_for_are_refused(
    bits: Any, settings: dict[str, Any], message: str, base: str, trainer_of: Callable[..., Any]
) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", **settings)
    with pytest.raises(TunesmithError, match=message):
        trainer_of(model=base, peft_config=config, quantization_config=quantization(bits, torch.float32))


def test_a_gguf_is_no_model_to_train(base: str, trainer_of: Callable[..., Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.hf_quantizer = AutoHfQuantizer.from_config(GgufConfig())  # as where it was read from such a file
    with pytest.raises(TunesmithError, match=r"quantized \(gguf\).*not even adapters.*dequantize=True"):
        trainer_of(model=model, peft_config=LORA)
