"""Processes that share weights out train as one that has them all: steps, what is saved, and what goes on from it."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.distributed.cases import trainer
from tests.forked import together
from tests.models import tiny
from tests.train.runs import Weights, largest_difference
from tunesmith import SFTTrainer
from tunesmith.errors import TunesmithError
from tunesmith.runs.checkpoints import verify
from tunesmith.runs.files import SAMPLES
from tunesmith.train.sharding import gathered, is_shared_out

pytestmark = pytest.mark.processes
ADAMW: dict[str, Any] = {"optim": "adamw_torch_fused", "learning_rate": 1e-3, "max_steps": 20}

# A case of `cases`, and what is set besides.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "clipped, tied": ("short last step", {"max_grad_norm": 0.1, "tied": True}),
    "accumulation": ("accumulation", {"max_grad_norm": 0.0}),
    "packed, checkpointed": ("packed", {"gradient_checkpointing": True}),
    "padded": ("padded", {"self_test": "off"}),
    "shared prefixes": ("shared prefixes", {}),
    "a step of one row": ("a step of one row", {}),
    "AdamW": ("accumulation", {**ADAMW, "weight_decay": 0.1}),
    "LoRA, AdamW": ("LoRA, AdamW", {}),
    "LoRA, accumulation": ("accumulation", {"lora": True, "gradient_checkpointing": True}),
}


def _train(folder: Path, tokenizer: Path, shard: str) -> None:
    """What a process does: all cases, one after another; the first writes what came of them."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    SFTTrainer.draw_page = None
    for name, (case, settings) in CASES.items():
        made = trainer(case, processes, tokenizer, folder / name, shard=shard, **settings)
        before = made.evaluate()["eval_loss"]
        made.train()
        weights, after = gathered(made.model, kept=rank == 0), made.evaluate()["eval_loss"]
        assert is_shared_out(made.model) == (processes > 1)
        if rank == 0:
            logs = [entry for entry in made.state.log_history if "loss" in entry]
            (folder / f"{name}.json").write_text(json.dumps({"logs": logs, "eval": [before, after]}))
            _save(weights, folder / f"{name}.safetensors")


def _save(weights: Weights, file: Path) -> None:
    save_file({name: value.detach().contiguous().clone() for name, value in weights.items()}, file)


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with those of each number of processes."""
    folder = tmp_path_factory.mktemp("runs")
    for processes, shard in ((1, "full"), (2, "full"), (4, "grad")):
        (folder / str(processes)).mkdir()
        together(processes, _train, folder / str(processes), tiny_model, shard)
    return folder


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_weights_that_are_shared_out_train_as_those_of_one_process(name: str, processes: int, runs: Path) -> None:
    weights = [load_file(runs / str(number) / f"{name}.safetensors") for number in (1, processes)]
    assert largest_difference(*weights) < (1e-5 if "AdamW" in name else 1e-6)
    one, several = (json.loads((runs / str(number) / f"{name}.json").read_text()) for number in (1, processes))
    assert several["eval"] == pytest.approx(one["eval"], abs=1e-5)
    assert len(one["logs"]) == len(several["logs"]) >= 2
    for expected, found in zip(one["logs"], several["logs"], strict=True):
        names = ("loss", "grad_norm", "entropy", "num_tokens")
        assert [found[key] for key in names] == pytest.approx([expected[key] for key in names], abs=1e-5)


# Checkpoints

END = 8
TURNS: list[tuple[int, str, int]] = [(2, "full", 2), (1, "none", 4), (2, "grad", 6), (4, "full", END)]
"""Processes, what they share out, and the step up to which they go."""
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD, tied": ("short last step", {"tied": True}),
    "AdamW": ("tokens", {**ADAMW}),
    "LoRA, AdamW": ("LoRA, AdamW", {}),
}


def _go_on(folder: Path, tokenizer: Path, shard: str, end: int) -> None:
    """Train each of RESUMED up to a step, from the checkpoint in its folder, if there is one. The first process writes
    the weights at step `END`."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    SFTTrainer.draw_page = None
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": end}
    for name, (case, settings) in RESUMED.items():
        made = trainer(case, processes, tokenizer, folder / name, **settings | saving, shard=shard)
        made.train(resume_from_checkpoint=any((folder / name).glob("checkpoint-*")))
        weights = gathered(made.model, kept=rank == 0)
        made.save_model(str(folder / f"{name}, saved"))
        if rank == 0 and end == END:
            _save(weights, folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def resumed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one process, and those that others took turns in."""
    folder = tmp_path_factory.mktemp("runs")
    for name, turns in {"unbroken": [(1, "none", END)], "resumed": TURNS}.items():
        (folder / name).mkdir()
        for processes, shard, end in turns:
            together(processes, _go_on, folder / name, tiny_model, shard, end)
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_others_go_on_from_a_checkpoint_however_they_share_weights_out(name: str, resumed: Path) -> None:
    weights = [load_file(resumed / kind / f"{name}.safetensors") for kind in ("unbroken", "resumed")]
    assert largest_difference(*weights) < (1e-5 if "AdamW" in name else 1e-6)


def test_a_checkpoint_has_a_part_of_each_process_that_anybody_can_load(resumed: Path) -> None:
    folder = resumed / "resumed" / "AdamW"
    newest = folder / f"checkpoint-{END}"
    manifest = verify(newest)
    names = {f"{kind}-0000{i}-of-00004.safetensors" for kind in ("model", "optimizer") for i in (1, 2, 3, 4)}
    assert names <= manifest.files.keys()
    assert not [file for file in manifest.files if file.endswith((".bin", ".pt", ".pth", ".distcp"))]
    assert [item.name for item in sorted(folder.glob("checkpoint-*"))] == [f"checkpoint-{END - 1}", newest.name]
    assert not list(folder.glob(".checkpoint-*"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(newest)
    expected = load_file(resumed / "resumed" / "AdamW.safetensors")
    assert largest_difference(dict(loaded.state_dict()), expected) == 0.0


def test_a_model_is_saved_whole(resumed: Path) -> None:
    for name in ("SGD, tied", "AdamW"):
        saved = load_file(resumed / "resumed" / f"{name}, saved" / "model.safetensors")
        assert largest_difference(saved, load_file(resumed / "resumed" / f"{name}.safetensors")) == 0.0


def test_adapters_are_saved_whole_and_all_of_them_have_moved(resumed: Path) -> None:
    folder = resumed / "resumed" / "LoRA, AdamW, saved"
    base = tiny("llama", AutoModelForCausalLM.from_pretrained(resumed / "resumed" / "AdamW, saved").config.vocab_size)
    loaded = PeftModel.from_pretrained(base, folder)
    adapters = {name: value for name, value in loaded.state_dict().items() if ".lora_" in name}
    assert len(adapters) == len(load_file(folder / "adapter_model.safetensors")) == 2 * 7 * 2
    assert sum(bool(value.any()) for name, value in adapters.items() if ".lora_B" in name) == 2 * 7
    assert largest_difference(adapters, load_file(resumed / "resumed" / "LoRA, AdamW.safetensors")) == 0.0


# Besides the steps


def _besides(folder: Path, tokenizer: Path, shard: str) -> None:
    """Answers before and after, and the best model loaded at the end."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    SFTTrainer.draw_page = None
    for lora in (False, True):
        settings: dict[str, Any] = {"sample_prompts": 1, "load_best_model_at_end": True, "lora": lora, "max_steps": 3}
        settings |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
        settings["greater_is_better"] = True  # so that the model of the first step is the best
        made = trainer("short last step", processes, tokenizer, folder / str(lora), shard=shard, **settings)
        made.train()
        weights = gathered(made.model, kept=rank == 0)
        if rank == 0:
            _save(weights, folder / f"{lora}.safetensors")
            (folder / f"{lora}.json").write_text(json.dumps(made.state.best_global_step))


def test_prompts_are_answered_and_the_best_model_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        together(processes, _besides, tmp_path / str(processes), tiny_model, "full")
    for lora in (False, True):
        files = [tmp_path / str(number) / f"{lora}.safetensors" for number in (1, 2)]
        assert largest_difference(*map(load_file, files)) < 1e-6
        assert [json.loads(file.with_suffix(".json").read_text()) for file in files] == [1, 1]
        answers = [
            [json.loads(line)["answer"] for line in (file.with_suffix("") / SAMPLES).read_text().splitlines()]
            for file in files
        ]
        assert answers[0] == answers[1]
        assert len(answers[0]) == 4


def _one_disk_is_full(folder: Path, tokenizer: Path) -> None:
    """The second process can't write its part of the second checkpoint."""
    SFTTrainer.draw_page = None
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    made = trainer("short last step", 2, tokenizer, folder / "run", shard="full", **saving)
    write = save_file

    def fail(*args: Any, **settings: Any) -> None:
        if os.environ["RANK"] == "1" and made.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args, **settings)

    pytest.MonkeyPatch().setattr("tunesmith.runs.parts.save_file", fail)
    with pytest.raises(TunesmithError, match=r"the disk of .* is full"):
        made.train()


def test_where_one_process_can_not_write_there_is_no_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    together(2, _one_disk_is_full, tmp_path, tiny_model)
    assert [item.name for item in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-1"]
    verify(tmp_path / "run" / "checkpoint-1")


def test_one_process_shares_nothing_out(tiny_model: Path, tmp_path: Path) -> None:
    made = trainer("short last step", 1, tiny_model, tmp_path / "run", shard="full", max_steps=1)
    made.train()
    assert not is_shared_out(made.model)
    assert all(type(value) is torch.Tensor for value in made.model.state_dict().values())
