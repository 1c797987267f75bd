"""`tunesmith reward`, and what other commands make of a recipe with `trainer: reward` and of its run."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tunesmith.cli.main import app
from tunesmith.runs.record import RunRecord
from tunesmith.settings.preference import RewardConfig
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
        f"model: {tiny_model}\ntrainer: reward\ndata: {data}\noutput: {tmp_path / 'run'}\nmax_steps: 2\n"
        "precision: fp32\nper_device_train_batch_size: 2\nlogging_steps: 1\nlora: true\n"
    )
    return file


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_it_trains_and_says_what_it_did(recipe: Path, tmp_path: Path) -> None:
    result = run("reward", recipe, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 2
    assert "of 4 pairs, chosen answers have 4 tokens on average and rejected ones 7" in result.stderr
    assert "LOAD REPORT" not in result.output
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert record.trainer == "reward"
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"} <= record.history[0].keys()
    saved = resolve(str(tmp_path / "run" / "recipe.yaml"), {})
    assert (saved.trainer, saved.config.learning_rate) == ("reward", 1e-4)
    assert isinstance(saved.config, RewardConfig)
    # What writes texts says that this writes none.
    chat = run("chat", tmp_path / "run", "--prompt", "Hi")
    assert chat.exit_code == 2
    assert "a sequence classifier, which scores texts and writes none" in chat.stderr


def test_inspect_shows_where_each_side_is_scored(recipe: Path) -> None:
    result = run("inspect", recipe, "--row", "2")
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert "trained on  a score of each side at its end, chosen against rejected" in shown
    assert "example 2 of 4: 39 tokens, 2 supervised (5%), 1 pair, each side scored at its end" in shown
    assert "── prompt: 28 tokens, which both answers continue" in shown
    assert "── chosen, scored at its end: 4 tokens, 1 supervised (25%)\nbc<|im_end|>⟦⏎⟧\n" in shown
    assert "── rejected, scored at its end: 7 tokens, 1 supervised (14%)\nno bc<|im_end|>⟦⏎⟧\n" in shown
    assert shown.count("Is bc it?") == 1


def test_check_counts_pairs_and_plan_says_that_it_does_not(recipe: Path) -> None:
    result = run("check", recipe)
    assert result.exit_code == 0, result.output
    assert "chosen is longer in 0%, rejected in 100%" in result.stdout
    assert "end token" not in result.stdout
    refused = run("plan", recipe)
    assert refused.exit_code == 2
    assert "plan counts runs of sft, dpo, kto, distill, and this one is reward" in refused.stderr


@pytest.mark.reports
def test_the_page_of_a_run_shows_rewards(recipe: Path, tmp_path: Path) -> None:
    result = run("reward", recipe, "--max-steps", 3)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Least, mean and largest reward" in page
    assert "Pairs whose chosen answer has the higher reward" in page
    assert "of a pair" in page
    assert "nats a supervised token" not in page
    assert "Calibration" not in page
    measured = run("eval", tmp_path / "run", "--data", tmp_path / "pairs.jsonl")
    assert measured.exit_code == 0, measured.output
    assert "of 4 pairs" in measured.stdout
    assert run("report", tmp_path / "run").exit_code == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Pairs <small>4 of pairs.jsonl</small></h2>" in page
    assert "Calibration <small>the probability that a margin stands for, and how often it was right</small>" in page
