"""`tunesmith dpo`, and what other commands make of a recipe with `trainer: dpo`."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tunesmith.cli.main import app
from tunesmith.errors import TunesmithError
from tunesmith.runs.record import RunRecord
from tunesmith.settings.preference import DPOConfig
from tunesmith.settings.recipe import resolve

PAIRS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"Is {word} it?"}],
        "chosen": [{"role": "assistant", "content": word}],
        "rejected": [{"role": "assistant", "content": "no " + word}],
    }
    for word in ("a", "bc", "def", "gh")
]


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    data, file = tmp_path / "pairs.jsonl", tmp_path / "recipe.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    file.write_text(
        f"model: {tiny_model}\ntrainer: dpo\ndata: {data}\noutput: {tmp_path / 'run'}\nmax_steps: 2\nprecision: fp32\n"
        "per_device_train_batch_size: 2\nself_test: 'off'\nsample_prompts: 1\nlogging_steps: 1\nlora: true\n"
    )
    return file


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_it_trains_and_says_what_it_did(recipe: Path, tmp_path: Path) -> None:
    result = run("dpo", recipe, "--json", "--loss-type", "sigmoid,sft", "--loss-weights", "1,0.5")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 2
    assert "of 4 pairs, chosen answers have 3 tokens on average and rejected ones 6" in result.stderr
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert record.trainer == "dpo"
    assert record.settings["loss_type"] == ["sigmoid", "sft"]
    assert {"rewards/margins", "rewards/accuracies", "logps/rejected"} <= record.history[0].keys()
    assert record.samples[0].prompt.expected == "a"
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    saved = resolve(str(tmp_path / "run" / "recipe.yaml"), {})
    assert (saved.trainer, saved.config.learning_rate) == ("dpo", 1e-5)
    assert isinstance(saved.config, DPOConfig)


def test_inspect_shows_a_pair_as_a_tree(recipe: Path) -> None:
    result = run("inspect", recipe, "--row", "2")
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert "trained on  both answers, chosen against rejected" in shown
    assert "example 2 of 4: 37 tokens, 9 supervised (24%), 1 pair, 2 of 2 answers with an end token" in shown
    assert "── prompt: 28 tokens, which both answers continue" in shown
    assert "── chosen: 3 tokens, 3 supervised (100%), ends with <|im_end|>\n⟦bc<|im_end|>⟧\n" in shown
    assert "── rejected: 6 tokens, 6 supervised (100%), ends with <|im_end|>\n⟦no bc<|im_end|>⟧\n" in shown
    assert shown.count("Is bc it?") == 1


def test_check_and_plan_count_pairs(recipe: Path) -> None:
    result = run("check", recipe)
    assert result.exit_code == 0, result.output
    assert "chosen is longer in 0%, rejected in 100%" in result.stdout
    planned = run("plan", recipe)
    assert planned.exit_code == 0, planned.output
    assert "reference" in planned.stdout


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("train_on: all", "train_on is a setting of sft, and this run is dpo"),
        ("loss_type: sigmoid\ntrainer: sft", "choose|expected"),
        ("beta: high", "beta"),
    ],
)
def test_settings_belong_to_a_trainer(line: str, problem: str, recipe: Path) -> None:
    text = recipe.read_text()
    if "trainer: sft" in line:
        text = text.replace("trainer: dpo\n", "")
    recipe.write_text(text + line + "\n")
    with pytest.raises(TunesmithError, match=problem):
        resolve(str(recipe), {})


def test_a_setting_of_pairs_in_a_supervised_recipe_names_the_way_on(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("trainer: dpo\n", "") + "beta: 0.2\n")
    with pytest.raises(TunesmithError, match=r"line 11: beta is a setting of dpo.*`trainer: dpo`"):
        resolve(str(recipe), {})


def test_its_settings_are_listed() -> None:
    result = run("dpo", "--fields")
    assert result.exit_code == 0
    assert "\nld_alpha: " in result.stdout
    assert "\ntrain_on: " not in result.stdout


def test_kto_trains_on_judged_answers(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "judged.jsonl"
    rows = [{"messages": row["prompt"] + row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PAIRS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", tiny_model, "--data", data, "--output", tmp_path / "run", "--max-steps", 1, "--lora"]
    result = run("kto", *options, "--json", "--precision", "fp32", "--self-test", "off", "--sample-prompts", 0)
    assert result.exit_code == 0, result.output
    assert "2 good answers and 2 bad ones" in result.stderr
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert record.trainer == "kto"
    shown = run("inspect", *options, "--trainer", "kto", "--row", 2).stdout
    assert "trained on  the answer, good or bad" in shown
    assert "example 2 of 4, a bad answer: 31 tokens, 3 supervised" in shown


@pytest.mark.reports
def test_the_page_of_a_run_shows_rewards(recipe: Path, tmp_path: Path) -> None:
    result = run("dpo", recipe, "--max-steps", 3)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Rewards of chosen (first) and rejected answers" in page
    assert "Pairs whose chosen answer has the higher reward" in page
    assert "of a pair" in page
    assert "nats a supervised token" not in page
