"""`tunesmith merge` writes the merged model, says how far it is from the adapters, and stops where it must."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.models import tiny
from tests.ship.merging import VOCABULARY, difference, logits, lora, save_run, with_adapters
from tunesmith.cli.main import app


def merge(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    return save_run(tmp_path, tiny("llama", VOCABULARY), lora(), tiny_model)


def test_the_model_is_written_and_the_difference_told(run: Path) -> None:
    target = run.parent / "merged"
    done = merge(run, "--output", target, "--max-shard-size", "50KB", "--prompt", "Hello", "--prompt", "Bye")
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    told = rf"{re.escape(str(target))}: 14 layers merged \(LoRA adapters\), [1-9]\d+ kB of weights in float32, 3 files"
    assert re.fullmatch(told, first)
    assert second.startswith("Compared with the adapters on the base model: largest difference of logits ")
    assert second.endswith(" greedy tokens equal")
    assert "Comparing what was written" in done.stderr
    assert difference(logits(AutoModelForCausalLM.from_pretrained(target)), with_adapters(run)) < 1e-5


def test_the_comparison_can_be_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    done = merge("run", "--output", "merged", "--dtype", "bf16", "--no-check")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("merged: ")  # as it was named
    assert "weights in bfloat16, 1 file" in done.stdout
    assert done.stdout.endswith("Not compared with the adapters on the base model.\n")


def test_embeddings_that_are_no_longer_tied_are_named(tmp_path: Path, tiny_model: Path) -> None:
    model = tiny("llama", VOCABULARY, tie_word_embeddings=True)
    run = save_run(tmp_path, model, lora(modules_to_save=["lm_head"]), tiny_model)
    done = merge(run, "--output", tmp_path / "merged", "--no-check")
    assert "The input embeddings and the head are no longer one weight" in done.stdout


def test_a_drift_exits_with_2_and_removes_the_folder(run: Path) -> None:
    done = merge(run, "--output", run.parent / "merged", "--dtype", "bf16", "--tolerance", "1e-7")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith("error: the merged model differs from the adapters on ")
    assert "greedy tokens equal" in done.stderr
    assert sorted(path.name for path in run.parent.iterdir()) == ["base", "run"]


@pytest.mark.parametrize("option", [("--dtype", "int4"), ("--max-shard-size", "much"), ("--tolerance", "-1")])
def test_an_impossible_option_is_refused(option: tuple[str, str], run: Path) -> None:
    done = merge(run, "--output", run.parent / "merged", *option)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {option[0][2:].replace('-', '_')} is ")
