"""`tunesmith train` goes from rows to a run that chat can load, and stops early where that can't work."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.forked import Command
from tunesmith.cli.main import app
from tunesmith.cli.train import _check_launched
from tunesmith.errors import TunesmithError
from tunesmith.model.generate import generate
from tunesmith.model.load import load_run
from tunesmith.settings.recipe import all_settings, resolve
from tunesmith.trainers import SFTTrainer

RUNNER = CliRunner()
QUESTION = [{"role": "user", "content": "say it"}]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows with keys of their own, which Arrow would fill with nulls."""
    path = tmp_path / "rows.jsonl"
    row: dict[str, Any] = {"messages": [*QUESTION, {"role": "assistant", "content": "yes"}]}
    lines = [row | ({"note": i} if i % 2 else {}) for i in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def needed(tiny_model: Path, rows: Path, tmp_path: Path) -> list[str]:
    return ["train", "--model", str(tiny_model), "--data", str(rows), "--output", str(tmp_path / "run"), "--use-cpu"]


def test_a_model_learns_its_rows_and_says_so_in_chat(needed: list[str], tmp_path: Path) -> None:
    result = RUNNER.invoke(app, [*needed, "--learning-rate", "0.01", "--num-train-epochs=20", "--logging_steps", "20"])
    assert result.exit_code == 0, result.output
    assert f"saved the model to {tmp_path / 'run'}" in result.stdout
    assert f"tunesmith chat {tmp_path / 'run'}" in result.stdout
    model, tokenizer = load_run(str(tmp_path / "run"))
    assert generate(model, tokenizer, [QUESTION], max_new_tokens=9) == ["yes"]
    assert RUNNER.invoke(app, ["chat", str(tmp_path / "run"), "--prompt", "say it"]).stdout == "yes\n"


def test_adapters_are_trained_at_their_own_learning_rate_and_loaded_again(needed: list[str], tmp_path: Path) -> None:
    result = RUNNER.invoke(app, [*needed, "--lora", "r=8", "--max-steps", "1"])
    assert result.exit_code == 0, result.output
    assert "learning_rate: 0.0002 (the default with lora)" in result.stdout
    assert "fp32" in result.stdout  # the precision that was measured to be the fastest
    assert f"saved the adapters to {tmp_path / 'run'}" in result.stdout
    model, _ = load_run(str(tmp_path / "run"))
    trained = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert isinstance(model, PeftModel)
    assert len(trained) == 14  # seven linear layers in each of two blocks
    assert all(weight.shape[1] == 8 and weight.any() for weight in trained)


def test_a_whole_model_is_trained_from_a_recipe_with_evaluation(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    recipe = {"model": str(tiny_model), "data": str(rows), "eval_data": [str(rows)], "max_steps": 2, "use_cpu": True}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = RUNNER.invoke(app, ["train", str(path), "--output", str(tmp_path / "run"), "--learning-rate", "1e-3"])
    assert result.exit_code == 0, result.output
    assert "saved the model" in result.stdout
    assert "eval_strategy: epoch (the default with eval_data)" in result.stdout
    assert re.search(r"step \d+  eval loss \d+\.\d{4}\n", result.stdout)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    expected = {**recipe, "output_dir": str(tmp_path / "run"), "learning_rate": 1e-3, "eval_strategy": "epoch"}
    assert saved == expected


def test_a_row_that_cannot_be_trained_on_is_named_with_its_line(needed: list[str], rows: Path) -> None:
    with rows.open("a", encoding="utf-8") as file:
        file.write('{"messages": "hello"}\n')
    result = RUNNER.invoke(app, needed)
    assert result.exit_code == 2
    assert f"{rows}, line 17: 'messages'" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora", "rank=8"], "lora: there is no 'rank'"),
        (["--data", "nowhere.jsonl"], "no file nowhere.jsonl"),
        (["--split", "test"], "split is 'test', but"),
        (["--resume-from-checkpoint"], "resume_from_checkpoint: there is no checkpoint in"),
        (["--resume-from-checkpoint", "x"], "resume_from_checkpoint: x is no checkpoint"),
        (["--learning-rate", "fast"], "--learning-rate: learning_rate is 'fast'"),
        (["--nope", "1"], "--nope: unknown setting 'nope'"),
        (["--max-length"], "--max-length needs a value"),
    ],
)
def test_a_mistake_stops_before_the_model_is_loaded(
    needed: list[str], options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tunesmith.model.load.load_model", None)
    result = RUNNER.invoke(app, [*needed, *options])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_an_output_that_can_not_be_written_stops_before_the_data_is_read(
    needed: list[str], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.cli.data.training_rows", None)
    for output in (rows, rows / "run", Path("/proc/nope/run")):
        result = RUNNER.invoke(app, [*needed, "--output", str(output)])
        assert result.exit_code == 2
        assert re.fullmatch(
            rf"error: output {output} can't be written: (Not a|No such file or) directory; take another folder\n",
            result.stderr,
        )


def test_a_demo_model_that_must_be_converted_says_so(
    needed: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def demo(progress: Any) -> Path:
        if progress is not None:
            progress("Converting the demo model")
        return tiny_model

    monkeypatch.setattr("tunesmith.model.load.demo_model_path", demo)
    result = RUNNER.invoke(app, [*needed, "--model", "demo", "--max-steps", "1"])
    assert result.exit_code == 0, result.output
    assert "Converting the demo model" in result.stdout


@pytest.mark.reports
def test_a_run_that_an_error_ends_has_a_report(
    needed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SFTTrainer.compute_loss

    def compute_loss(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise ValueError("broken")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    result = RUNNER.invoke(app, [*needed, "--max-steps", "4"])
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "broken"
    run = tmp_path / "run"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 2
    assert "learning rate" in (run / "report.html").read_text(encoding="utf-8")
    assert f"how it went:  {run / 'report.html'}" in result.stdout


def test_fields_lists_every_setting() -> None:
    result = RUNNER.invoke(app, ["train", "--fields"])
    assert result.exit_code == 0
    assert all(f"\n{name}: " in f"\n{result.stdout}" for name in all_settings())
    assert "max_length: a whole number or null (default: 1024)\n    Most tokens" in result.stdout


def test_help_shows_what_is_used_most_and_where_the_rest_is() -> None:
    result = RUNNER.invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("RECIPE.yaml", "--model", "--lora", "--fields"))


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(needed: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = Command(tmp_path / "said", *needed, "--max-steps", "100000")
    command.until((run / "recipe.yaml").exists)
    command.interrupt()
    code, output = command.finish(), command.stdout + command.stderr
    assert code == 130, output
    assert "Traceback" not in output
    [checkpoint] = run.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"stopped at step {step} of 100000" in output
    assert f"tunesmith train {run / 'recipe.yaml'} --resume-from-checkpoint" in output
    resumed = RUNNER.invoke(
        app, ["train", str(run / "recipe.yaml"), "--resume-from-checkpoint", "--max-steps", str(step + 2)]
    )
    assert resumed.exit_code == 0, resumed.output
    assert json.loads((run / f"checkpoint-{step + 2}" / "trainer_state.json").read_text())["global_step"] == step + 2
    assert "resume_from_checkpoint" not in (run / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"processes": 2, "max_restarts": 3}, None),
        ({"processes": 4}, "processes is 4, and 2 were started on this machine; leave the setting out"),
        ({"max_restarts": 1}, "max_restarts is 1, and what started this has 3; leave the setting out"),
    ],
)
def test_what_started_the_processes_is_what_the_recipe_says(
    given: dict[str, int], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_WORLD_SIZE", "2"), ("TORCHELASTIC_MAX_RESTARTS", "3")):
        monkeypatch.setenv(name, value)
    recipe = resolve(None, {"model": "demo", "data": "rows.jsonl", "output": "out", "use_cpu": True, **given})
    with pytest.raises(TunesmithError, match=said) if said else nullcontext():
        _check_launched(recipe)
