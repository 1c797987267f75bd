"""What `merge` writes, what it needs in memory, what it refuses, and that failing leaves nothing behind."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from tests.forked import finished, start
from tests.models import tiny
from tests.ship.merging import VOCABULARY, difference, logits, lora, merged, names, save_run, with_adapters
from tunesmith.errors import TunesmithError
from tunesmith.model.load import load_run
from tunesmith.ship.merge import MergeOptions, merge


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    """A run of LoRA on every linear layer of a Llama."""
    return save_run(tmp_path, tiny("llama", VOCABULARY), lora(), tiny_model)


def test_the_folder_has_the_model_its_settings_and_the_runs_tokenizer(run: Path, tiny_model: Path) -> None:
    GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=7).save_pretrained(run.parent / "base")
    report, model = merged(run, check=True)
    tokenizer = AutoTokenizer.from_pretrained(report.folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert model.generation_config.temperature == 0.5
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 7]  # the run's end of an answer, too
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert not list(report.folder.glob("adapter*"))
    assert (report.layers, report.kind, report.files, report.untied) == (14, "LORA", 1, False)
    assert report.size == sum(tensor.nbytes for tensor in load_file(report.folder / "model.safetensors").values())
    again, _ = load_run(str(report.folder))
    assert difference(logits(again), with_adapters(run)) < 1e-5


def test_the_check_compares_answers(run: Path) -> None:
    report, _ = merged(run, check=True, prompts=["Hello", "Once upon a time"])
    assert report.drift is not None
    assert report.drift.within
    assert report.drift.relative < 1e-5
    assert report.drift.equal == report.drift.tokens
    assert 2 <= report.drift.tokens <= 64


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_the_format_may_be_chosen(dtype: Any, bound: float, run: Path) -> None:
    report, model = merged(run, dtype=dtype)
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {tensor.dtype for tensor in load_file(report.folder / "model.safetensors").values()} == {expected}
    assert model.dtype is expected
    assert 0 < difference(logits(model.float()), with_adapters(run)) < bound


def test_without_a_choice_each_tensor_keeps_its_format_and_sums_are_made_in_fp32(
    tmp_path: Path, tiny_model: Path
) -> None:
    run = save_run(tmp_path, tiny("llama", VOCABULARY).bfloat16(), lora(), tiny_model)
    base = load_file(tmp_path / "base" / "model.safetensors")
    base["model.norm.weight"] = base["model.norm.weight"].float()
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    report, _ = merged(run)
    found = load_file(report.folder / "model.safetensors")
    adapters = load_file(run / "adapter_model.safetensors")
    assert report.dtype is torch.bfloat16
    assert found["model.norm.weight"].dtype is torch.float32
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapters[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    expected = base[f"{name}.weight"].float() + (b @ a) * 8 / 4  # lora_alpha / r
    torch.testing.assert_close(found[f"{name}.weight"], expected.bfloat16(), rtol=0, atol=0)


def test_numbers_too_large_for_fp16_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    model = tiny("llama", VOCABULARY)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = 1e6
    run = save_run(tmp_path, model, lora(target_modules=["q_proj"]), tiny_model)
    with pytest.raises(TunesmithError, match=r"up_proj\.weight has values up to 1e\+06, too large for fp16; take bf16"):
        merge(run, tmp_path / "merged", MergeOptions(dtype="fp16", check=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_files_are_as_large_as_asked_and_may_come_from_several(tmp_path: Path, tiny_model: Path) -> None:
    run = save_run(tmp_path, tiny("llama", VOCABULARY), lora(), tiny_model, max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    report, model = merged(run, max_shard_size="50KB")
    files = sorted(report.folder.glob("*.safetensors"))
    assert report.files == len(files) == 3
    assert files[0].name == "model-00001-of-00003.safetensors"
    assert max(file.stat().st_size for file in files) < 55_000
    index = json.loads((report.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.size
    assert index["weight_map"].keys() == names(report.folder)
    assert difference(logits(model), with_adapters(run)) < 1e-5


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def merged_twice(folder: Path) -> None:
    """Writes what each of two merges wrote, and how far the peak of this process's memory rose."""
    torch.set_num_threads(1)
    merge(folder / "small" / "run", folder / "small" / "merged", MergeOptions(check=False))
    before, rises = peak(), []
    for size in ("10MB", "2GB"):
        report = merge(folder / "run", folder / size, MergeOptions(check=False, max_shard_size=size))
        rises.append((report.files, report.size, peak() - before))
    (folder / "rises.json").write_text(json.dumps(rises))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
def test_memory_is_that_of_a_file_not_of_the_model(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "small").mkdir()
    save_run(tmp_path / "small", tiny("llama", VOCABULARY), lora(), tiny_model)
    big = tiny("llama", VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=12)
    save_run(tmp_path, big, lora(), tiny_model)  # one file of 150 MB
    assert finished(start(merged_twice, tmp_path)) == 0
    (files, size, grown), (_, _, whole) = json.loads((tmp_path / "rises.json").read_text())
    assert files > 12
    assert size > 140e6
    assert grown < 50e6
    assert whole > 140e6  # so the measure tells: in one file, it is the model


def test_a_model_that_drifts_is_not_written(run: Path) -> None:
    with pytest.raises(TunesmithError) as caught:
        merge(run, run.parent / "new" / "merged", MergeOptions(dtype="bf16", tolerance=1e-6))
    message = str(caught.value)
    assert re.search(
        r"largest difference of logits [\d.e-]+ \([\d.e-]+ of the largest logit, tolerance 1e-06\)", message
    )
    assert re.search(r"\d+ of \d+ greedy tokens equal", message)
    assert sorted(path.name for path in run.parent.iterdir()) == ["base", "run"]


def test_a_folder_with_something_in_it_is_left_alone(run: Path) -> None:
    target = run.parent / "merged"
    target.mkdir()
    (target / "notes").write_text("mine")
    with pytest.raises(TunesmithError, match="exists and has files in it"):
        merge(run, target)
    with pytest.raises(TunesmithError, match="is a file"):
        merge(run, target / "notes")
    assert [path.name for path in target.iterdir()] == ["notes"]
    (target / "notes").unlink()
    merged(run)  # into the empty folder
    assert (target / "config.json").is_file()


def test_a_full_disk_is_noticed_before(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(TunesmithError, match=r"merged takes 67 MB, but only 1 kB are free in"):
        merge(run, run.parent / "merged")


def test_an_interrupted_merge_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tunesmith.ship.merge._compare", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(run, run.parent / "merged")
    assert sorted(path.name for path in run.parent.iterdir()) == ["base", "run"]


def test_the_newest_checkpoint_stands_for_a_run_and_a_name_for_its_subfolder(run: Path, tmp_path: Path) -> None:
    shutil.move(run, tmp_path / "all" / "checkpoint-20")
    (tmp_path / "all" / "checkpoint-3").mkdir()
    (tmp_path / "all" / "checkpoint-3" / "adapter_config.json").write_text("{}")
    merge(tmp_path / "all", tmp_path / "one", MergeOptions(check=False))
    shutil.copytree(tmp_path / "all" / "checkpoint-20", tmp_path / "two" / "polite")
    merge(tmp_path / "two", tmp_path / "merged", MergeOptions(check=False, adapter="polite"))
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(TunesmithError, match="there are adapters named polite, choose one"):
        merge(tmp_path / "two", tmp_path / "three")
    with pytest.raises(TunesmithError, match="no adapters named 'rude'; it has polite"):
        merge(tmp_path / "two", tmp_path / "three", MergeOptions(adapter="rude"))


def test_prompts_are_not_weights(tmp_path: Path, tiny_model: Path) -> None:
    run = save_run(tmp_path, tiny("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), tiny_model)
    with pytest.raises(TunesmithError, match="holds PROMPT_TUNING adapters"):
        merge(run, tmp_path / "merged")


@pytest.mark.parametrize("start", ["pissa_niter_4", "loftq", "corda", "lora_ga"])
def test_a_start_that_is_lost_is_refused(start: str, run: Path) -> None:
    settings = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": start}))
    with pytest.raises(TunesmithError, match=f"init_lora_weights='{start}', which changed the base model's weights"):
        merge(run, run.parent / "merged")


def test_a_base_model_that_has_moved_is_named(run: Path) -> None:
    expected = with_adapters(run)
    moved = (run.parent / "base").rename(run.parent / "elsewhere")
    with pytest.raises(TunesmithError, match=r"the base model of .*no folder .*base.*; name it with base \(--base\)"):
        merge(run, run.parent / "merged")
    _, model = merged(run, base=str(moved), check=True)
    assert difference(logits(model), expected) < 1e-5


def test_a_quantized_base_is_refused(run: Path) -> None:
    path = run.parent / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(TunesmithError, match=r"is quantized \(gptq\).*as base_model_name_or_path in"):
        merge(run, run.parent / "merged")


def test_adapters_of_another_model_are_refused(run: Path) -> None:
    tiny("llama", VOCABULARY, hidden_size=64).save_pretrained(run.parent / "base")
    with pytest.raises(TunesmithError, match=r"don't fit their base model: .*size mismatch"):
        merge(run, run.parent / "merged")
    tiny("gpt2", VOCABULARY).save_pretrained(run.parent / "base")
    with pytest.raises(TunesmithError, match="don't fit their base model: Target modules"):
        merge(run, run.parent / "merged")


def test_adapters_that_are_not_numbers_are_refused(run: Path) -> None:
    file = run / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TunesmithError, match="can't be merged: NaNs detected"):
        merge(run, run.parent / "merged")
    assert not (run.parent / "merged").exists()


def test_adapters_of_which_some_are_missing_are_refused(run: Path) -> None:
    file = run / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TunesmithError, match=r"lack .*layers\.1\.mlp\.up_proj\.lora_A"):
        merge(run, run.parent / "merged")


def test_what_is_no_run_with_adapters_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match="there is no folder"):
        merge(tmp_path / "nowhere", tmp_path / "merged")
    with pytest.raises(TunesmithError, match="holds a whole model, without adapters"):
        merge(tmp_path / "base", tmp_path / "merged")
    with pytest.raises(TunesmithError, match=r"has no adapter_config\.json"):
        merge(tmp_path, tmp_path / "merged")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; write fp32, bf16, fp16"),
        ({"max_shard_size": "2 apples"}, "max_shard_size is '2 apples'"),
        ({"max_shard_size": "0GB"}, "max_shard_size is '0GB'"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"prompts": []}, "prompts is empty"),
    ],
)
def test_impossible_options_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TunesmithError, match=message):
        MergeOptions(**settings)
