"""`tunesmith distill`, and what other commands make of a recipe with `trainer: distill`."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tunesmith.cli.main import app
from tunesmith.errors import TunesmithError
from tunesmith.runs.record import RunRecord
from tunesmith.settings.distillation import DistillationConfig
from tunesmith.settings.recipe import resolve

ROWS: list[dict[str, Any]] = [{"prompt": f"Is {word} it? ", "completion": word} for word in ("a", "bc", "def", "gh")]


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    data, file = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file.write_text(
        f"model: {tiny_model}\ntrainer: distill\nteacher_model_name_or_path: {tiny_model}\ndata: {data}\n"
        f"output: {tmp_path / 'run'}\nmax_steps: 2\nprecision: fp32\nper_device_train_batch_size: 2\n"
        "self_test: 'off'\nlogging_steps: 1\nlora: true\nlmbda: 0\nsupervised_weight: 0.5\n"
    )
    return file


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_it_trains_and_says_what_it_did(recipe: Path, tmp_path: Path) -> None:
    result = run("distill", recipe, "--json", "--teacher-top-k", "8", "--beta", "0")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 2
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert record.trainer == "distill"
    assert record.settings["teacher_top_k"] == 8
    assert {"divergence", "nll"} <= record.history[0].keys()
    assert "completions/mean_length" not in record.history[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    saved = resolve(str(tmp_path / "run" / "recipe.yaml"), {})
    assert (saved.trainer, saved.config.learning_rate) == ("distill", 2e-4)
    assert isinstance(saved.config, DistillationConfig)


def test_the_student_writes_answers_by_default(recipe: Path, tmp_path: Path) -> None:
    result = run("distill", recipe, "--lmbda", "1", "--supervised-weight", "0", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert 1 <= record.history[0]["completions/mean_length"] <= 3


def test_inspect_check_and_plan_take_the_recipe(recipe: Path) -> None:
    shown = run("inspect", recipe, "--row", "2")
    assert shown.exit_code == 0, shown.output
    assert "trained on  the completion of prompt-completion rows" in shown.stdout
    assert run("check", recipe).exit_code == 0
    alone = run("plan", recipe, "--json", "--teacher-top-k", "8")
    with_teacher = run("plan", recipe, "--json")
    assert with_teacher.exit_code == 0, with_teacher.output
    teachers, none = (json.loads(made.stdout)["methods"]["lora"]["memory"]["teacher"] for made in (with_teacher, alone))
    assert none == 0
    # As many numbers of 4 bytes as the tiny model has, which is its own teacher here.
    assert teachers == json.loads(alone.stdout)["methods"]["full"]["memory"]["weights"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("teacher: other", "did you mean 'teacher_model_name_or_path'"),
        ("loss_type: dft", "beta says what is learned here"),
    ],
)
def test_other_names_are_led_on(line: str, problem: str, recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + line + "\n")
    with pytest.raises(TunesmithError, match=problem):
        resolve(str(recipe), {})
