"""Models are found by name, runs with their adapters, and what can't be loaded says what to do."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tunesmith.errors import TunesmithError
from tunesmith.model import load
from tunesmith.model.load import load_config, load_model, load_run, load_tokenizer, newest_checkpoint, resolve_model

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def adapters(tiny_model: Path, tmp_path: Path) -> Path:
    """A run's folder with adapters that change what the tiny model says."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4, task_type="CAUSAL_LM")
    folder = tmp_path / "run"
    get_peft_model(load_model(str(tiny_model)), config).save_pretrained(str(folder))
    load_tokenizer(str(tiny_model)).save_pretrained(str(folder))
    return folder


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(next(model.parameters()).device)).logits.cpu()


def test_weights_are_float32_unless_another_precision_is_asked_for(tiny_model: Path) -> None:
    assert load_model(str(tiny_model)).dtype == torch.float32
    assert load_model(str(tiny_model), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(str(tiny_model), torch_dtype="bfloat16").dtype == torch.bfloat16


def test_a_run_with_a_whole_model_is_that_model(tiny_model: Path) -> None:
    model, tokenizer = load_run(str(tiny_model))
    assert torch.equal(logits(model), logits(load_model(str(tiny_model))))
    assert tokenizer.chat_template
    assert not model.training


def test_a_run_with_adapters_has_them_applied(tiny_model: Path, adapters: Path) -> None:
    model, tokenizer = load_run(str(adapters))
    assert isinstance(model, PeftModel)
    assert not torch.allclose(logits(model), logits(load_model(str(tiny_model))), atol=1e-2)
    assert torch.allclose(logits(model), logits(model.merge_and_unload()), atol=1e-5)
    assert tokenizer.chat_template


def test_adapters_without_a_tokenizer_take_that_of_their_base_model(tiny_model: Path, adapters: Path) -> None:
    (adapters / "tokenizer_config.json").unlink()
    assert load_run(str(adapters))[1].get_vocab() == load_tokenizer(str(tiny_model)).get_vocab()


def test_of_checkpoints_alone_the_newest_is_the_run(tiny_model: Path, adapters: Path, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    shutil.copytree(tiny_model, folder / "checkpoint-9")
    shutil.copytree(adapters, folder / "checkpoint-10")
    (folder / "checkpoint-11").mkdir()  # whose saving was cut short
    (folder / "checkpoint-old").mkdir()
    assert newest_checkpoint(folder) == folder / "checkpoint-10"
    assert isinstance(load_run(str(folder))[0], PeftModel)


def test_a_folder_without_a_model_is_no_run(tiny_model: Path, tmp_path: Path) -> None:
    failed = tmp_path / "runs" / "failed"
    failed.mkdir(parents=True)
    (failed / "run.json").touch()
    none = r"failed is no run or model: it has neither config\.json nor adapter_config\.json, nor any checkpoint; a run"
    with pytest.raises(TunesmithError, match=none):
        load_run(str(failed))
    shutil.copytree(tiny_model, tmp_path / "runs" / "first" / "checkpoint-2")
    with pytest.raises(TunesmithError, match=r"adapter_config\.json; .*runs/first in it is one"):
        load_run(str(tmp_path / "runs"))


def test_adapters_of_the_demo_model_find_it_on_another_machine(
    tiny_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "demo_model_path", lambda progress: tiny_model)
    expected = logits(load_run(str(adapters))[0])
    for elsewhere in ("/home/someone/.cache/tunesmith/demo-0123456789ab-v1", "C:\\cache\\demo-0123456789ab-v2"):
        edit(adapters / "adapter_config.json", base_model_name_or_path=elsewhere)
        assert torch.equal(logits(load_run(str(adapters))[0]), expected)


def test_adapters_whose_base_model_is_gone_say_which(adapters: Path) -> None:
    edit(adapters / "adapter_config.json", base_model_name_or_path="/nowhere/base")
    with pytest.raises(TunesmithError, match="no folder /nowhere/base"):
        load_run(str(adapters))
    edit(adapters / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(TunesmithError, match="does not name the base model"):
        load_run(str(adapters))


def test_settings_of_others_that_are_no_adapters_are_named(adapters: Path) -> None:
    (adapters / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(TunesmithError, match=r"adapters of .*run could not be loaded"):
        load_run(str(adapters))


def test_an_index_that_names_a_file_elsewhere_is_refused(copy: Path, tiny_model: Path) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    weights = tiny_model / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), str(weights))}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TunesmithError, match="which is not in its folder"):
        load_model(str(copy))


def test_a_model_may_say_nothing_of_its_class(copy: Path) -> None:
    edit(copy / "config.json", architectures=5)
    assert type(load_model(str(copy))).__name__ == "LlamaForCausalLM"


def test_adapters_in_pickle_files_are_refused(adapters: Path) -> None:
    (adapters / "adapter_model.safetensors").rename(adapters / "adapter_model.bin")
    with pytest.raises(TunesmithError, match="adapters in safetensors are needed"):
        load_run(str(adapters))


def test_adapters_are_no_model_to_train(adapters: Path) -> None:
    with pytest.raises(TunesmithError, match="holds adapters, not a whole model"):
        load_model(str(adapters))


def test_demo_is_the_demo_model_and_reports_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(load, "demo_model_path", lambda progress: progress("converting") or tmp_path)
    assert resolve_model("demo", said.append) == str(tmp_path)
    assert said == ["converting"]


def test_a_hub_name_stays_as_it_is() -> None:
    assert resolve_model("owner/name-1.5B") == "owner/name-1.5B"


def test_a_missing_folder_comes_with_the_nearest_name(copy: Path) -> None:
    with pytest.raises(TunesmithError, match=r"no folder .*modle; did you mean 'model'\?"):
        resolve_model(str(copy.parent / "modle"))
    with pytest.raises(TunesmithError, match=r"no folder \./nowhere/model"):
        resolve_model("./nowhere/model")


def test_a_name_that_is_neither_here_nor_on_the_hub_says_both(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    for loader in (load_model, load_tokenizer):
        with pytest.raises(TunesmithError, match=r"modle could not be loaded(.|\n)*no folder modle here.*'model'"):
            loader("modle")


def test_a_file_is_refused(copy: Path) -> None:
    with pytest.raises(TunesmithError, match="is a file; give the folder"):
        resolve_model(str(copy / "model.safetensors"))


def test_a_folder_without_a_model_says_what_is_missing(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(TunesmithError, match=r"pickle files \(\.bin\)"):
        load_model(str(copy))
    state = {name: value.clone() for name, value in load_file(copy / "pytorch_model.bin").items()}
    torch.save(state, copy / "pytorch_model.bin")
    trusted = load_model(str(copy), allow_pickle=True)
    assert torch.equal(trusted.get_parameter("model.norm.weight"), state["model.norm.weight"])
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(TunesmithError, match=r"has no weights: there is no \.safetensors file"):
        load_model(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(TunesmithError, match=r"is no model: it has no config\.json"):
        load_model(str(copy))


def test_a_damaged_file_is_named(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TunesmithError, match=f"model {re.escape(str(copy))} could not be loaded"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", "x"), ("hidden_size", -1), ("hidden_size", 2**31), ("num_attention_heads", 0), ("vocab_size", 7)],
)
def test_a_config_that_fits_nothing_is_named(copy: Path, name: str, value: Any) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(TunesmithError, match=f"model {re.escape(str(copy))} could not be loaded"):
        load_model(str(copy))


def test_a_model_of_fewer_layers_than_none_is_refused(copy: Path) -> None:
    edit(copy / "config.json", num_hidden_layers=-2)
    with pytest.raises(TunesmithError, match=r"num_hidden_layers in config\.json is -2; write how many it has"):
        load_model(str(copy))


def test_a_normalizer_that_makes_too_much_of_a_text_is_refused(copy: Path) -> None:
    rules = json.loads((copy / "tokenizer.json").read_text())
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    for times, most in ((19, None), (20, "may make 1,048,576 characters of one")):
        rules["normalizer"] = {"type": "Sequence", "normalizers": [doubling] * times}
        (copy / "tokenizer.json").write_text(json.dumps(rules))
        with nullcontext() if most is None else pytest.raises(TunesmithError, match=most):
            load_tokenizer(str(copy))


def test_what_a_normalizer_puts_before_a_text_counts(copy: Path) -> None:
    edit(copy / "tokenizer.json", normalizer={"type": "Prepend", "prepend": "x" * 2_000_000})
    with pytest.raises(TunesmithError, match="may make 2,000,001 characters of one"):
        load_tokenizer(str(copy))


def test_a_token_of_a_number_without_measure_is_refused(copy: Path) -> None:
    rules = json.loads((copy / "tokenizer.json").read_text())
    rules["model"]["vocab"]["zz"] = 4294967290
    edit(copy / "tokenizer.json", model=rules["model"])
    with pytest.raises(TunesmithError, match="gives 'zz' the number 4,294,967,290, and at most 10,000,000"):
        load_tokenizer(str(copy))


def test_a_config_of_more_layers_than_can_be_made_is_refused(copy: Path) -> None:
    edit(copy / "config.json", num_hidden_layers=10**9)
    for read in (load_config, load_model, load_tokenizer):
        with pytest.raises(TunesmithError, match="is 1,000,000,000, and at most 10,000 layers"):
            read(str(copy))


def test_missing_weights_are_not_made_up(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TunesmithError, match=r"lacks 1 weights of LlamaForCausalLM.*layers\.1\.mlp\.up_proj"):
        load_model(str(copy))


def test_code_of_a_model_runs_only_when_asked_for(copy: Path) -> None:
    code = "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own'\nraise SystemExit\n"
    (copy / "own.py").write_text(code)
    edit(copy / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    for loader in (load_model, load_tokenizer):
        with pytest.raises(TunesmithError, match=r"needs custom code.*trust_remote_code: true"):
            loader(str(copy))
    with pytest.raises(SystemExit):
        load_model(str(copy), trust_remote_code=True)


def test_a_wrong_argument_is_the_users_mistake(tiny_model: Path) -> None:
    with pytest.raises(TunesmithError, match="could not be loaded"):
        load_model(str(tiny_model), attn_implementation="nonsense")


def test_loading_prints_nothing(tiny_model: Path, adapters: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_run(str(tiny_model))
    load_run(str(adapters))
    assert capfd.readouterr() == ("", "")


def test_a_torch_built_for_a_gpu_that_is_not_there_computes_on_the_cpu(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accelerator(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    model, _ = load_run(str(tiny_model))
    assert model.device.type == "cpu"
