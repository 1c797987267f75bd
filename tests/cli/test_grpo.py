"""`tunesmith grpo` and `rloo`, and what other commands make of their recipes."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.conftest import HERMES
from tunesmith.cli.main import app
from tunesmith.runs.record import RunRecord
from tunesmith.settings.policy import GRPOConfig
from tunesmith.settings.recipe import resolve

ROWS = [{"prompt": [{"role": "user", "content": f"{i} + 1?"}], "answer": i + 1} for i in range(6)]


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    data, file = tmp_path / "sums.jsonl", tmp_path / "recipe.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file.write_text(
        f"model: {tiny_model}\ntrainer: grpo\ndata: {{sums: {{path: {data}, held_out: 0.3}}}}\n"
        f"output: {tmp_path / 'run'}\nmax_steps: 2\nprecision: fp32\nper_device_train_batch_size: 8\n"
        "per_device_eval_batch_size: 8\nnum_generations: 4\nmax_completion_length: 6\nlogging_steps: 1\nlora: true\n"
        "reward_funcs: {number: {column: answer}, length: {most: 3}}\nreward_weights: [1, 0.5]\n"
    )
    return file


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.reports
def test_it_trains_evaluates_and_says_what_it_did(recipe: Path, tmp_path: Path) -> None:
    result = run("grpo", recipe, "--json", "--eval-strategy", "steps", "--eval-steps", "2")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["steps"] == 2
    assert 0 <= found["eval"]["eval_sums_rewards/length/mean"] <= 1
    assert "train: 4 prompts of" in result.stderr
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert record.trainer == "grpo"
    assert {"reward", "rewards/number/mean", "rewards/length/mean", "entropy"} <= record.history[0].keys()
    assert len((tmp_path / "run" / "answers.jsonl").read_text().splitlines()) == 2
    saved = resolve(str(tmp_path / "run" / "recipe.yaml"), {})
    assert (saved.trainer, saved.config.learning_rate) == ("grpo", 1e-5)
    assert isinstance(saved.config, GRPOConfig)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The best and the worst of a group" in page
    assert "Reward of an answer" in page


def test_rloo_takes_the_same_rows(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("trainer: grpo\n", ""))
    result = run("rloo", recipe, "--json", "--beta", "0", "--eval-strategy", "no")
    assert result.exit_code == 0, result.output
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert record.trainer == "rloo"


def test_check_counts_prompts_and_inspect_has_no_answers_to_show(recipe: Path) -> None:
    result = run("check", recipe)
    assert result.exit_code == 0, result.output
    assert "note: train: 4 prompts of" in result.stdout
    assert run("inspect", recipe).exit_code == 2
    assert run("plan", recipe).exit_code == 2


def test_a_recipe_names_functions_that_the_model_may_call(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text('def now() -> int:\n    """Tells the time."""\n    return 7\n')
    recipe.write_text(recipe.read_text() + f"tools: ['{tmp_path / 'own.py'}:now']\nmax_tool_calling_iterations: 2\n")
    (tmp_path / "tools.jinja").write_text(HERMES)
    result = run("grpo", recipe, "--chat-template-path", tmp_path / "tools.jinja", "--max-completion-length", 3)
    assert result.exit_code == 0, result.output
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert record.history[0]["tools/call_frequency"] == 0.0
    config: Any = resolve(str(tmp_path / "run" / "recipe.yaml"), {}).config
    assert config.tools == [f"{tmp_path / 'own.py'}:now"]
