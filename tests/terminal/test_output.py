"""`--quiet` and `--json` mean the same in every command."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import fail, finish_lines, mode, note, say

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "yes"}]}
    path.write_text(f"{json.dumps(row)}\n" * 8, encoding="utf-8")
    return path


def train(model: Path, rows: Path, output: Path, *more: str) -> Any:
    needed = ["train", "--model", str(model), "--data", str(rows), "--output", str(output), "--use-cpu"]
    return RUNNER.invoke(app, [*needed, "--precision=fp32", "--max-steps=2", "--sample-prompts=0", "--lora", *more])


@pytest.fixture(scope="module")
def run(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that was trained with `--json`, and what that said."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, train(
        tiny_model, rows, folder, "--json", "--eval-data", str(rows), "--eval-strategy=epoch", "--logging-steps=1"
    )


def alone(result: Any) -> dict[str, Any]:
    """The one object on stdout, and nothing else there."""
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_train_tells_its_numbers_as_json_and_the_rest_on_stderr(run: tuple[Path, Any]) -> None:
    folder, result = run
    found = alone(result)
    assert found["output"] == str(folder)
    assert (found["saved"], found["stopped"], found["steps"], found["max_steps"]) == ("adapters", False, 2, 2)
    assert found["loss"] > 0
    assert found["mean_loss"] > 0
    assert found["eval"]["eval_loss"] > 0
    assert found["tokens"] > 0
    assert 0 < found["trained_parameters"] < found["parameters"]
    assert Path(found["report"]).is_file()
    assert "trains " in result.stderr
    assert "step 2/2" in result.stderr


def test_train_quiet_prints_the_result_alone(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    result = train(tiny_model, rows, tmp_path / "run", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"saved the adapters to {tmp_path / 'run'}\ntry it:  tunesmith chat {tmp_path / 'run'}\n"
    assert result.stderr == ""


def test_every_other_command_gives_one_json_object(run: tuple[Path, Any], rows: Path, tmp_path: Path) -> None:
    folder, recipe = str(run[0]), str(run[0] / "recipe.yaml")
    assert alone(RUNNER.invoke(app, ["check", recipe, "--json"]))["problems"] == []
    inspected = alone(RUNNER.invoke(app, ["inspect", recipe, "--row", "1", "--json"]))
    pieces = inspected["rows"][0]["documents"][0]["pieces"]
    assert "yes" in "".join(piece["text"] for piece in pieces if piece["weight"])
    assert alone(RUNNER.invoke(app, ["plan", recipe, "--json", "--method", "lora"]))["methods"]
    evaluated = RUNNER.invoke(app, ["eval", folder, "--data", str(rows), "--json", "--max-new-tokens", "2"])
    assert alone(evaluated)["rows"] == 8
    answered = RUNNER.invoke(app, ["chat", folder, "--prompt", "say it", "--max-new-tokens", "3", "--json"])
    assert alone(answered)["prompt"] == "say it"
    page = alone(RUNNER.invoke(app, ["report", folder, "--output", str(tmp_path / "page.html"), "--json"]))
    assert page["bytes"] == (tmp_path / "page.html").stat().st_size
    merged = alone(RUNNER.invoke(app, ["merge", folder, "--output", str(tmp_path / "merged"), "--json"]))
    assert merged["dtype"] == "float32"
    assert merged["drift"]["tolerance"] > 0
    base = ["--base-model", "me/base"]
    pushed = alone(RUNNER.invoke(app, ["push", folder, "--repo", "me/first", "--dry-run", "--json", *base]))
    assert not pushed["sent"]
    assert pushed["bytes"] == sum(file["bytes"] for file in pushed["files"]) > 0
    data = alone(RUNNER.invoke(app, ["demo", "--export-data", str(tmp_path / "orders"), "--json"]))
    assert all(Path(path).is_file() for path in data["files"])


def test_quiet_prints_what_was_asked_for_without_remarks(run: tuple[Path, Any], rows: Path) -> None:
    loud = RUNNER.invoke(app, ["eval", str(run[0]), "--data", str(rows), "--max-new-tokens", "2"])
    quiet = RUNNER.invoke(app, ["eval", str(run[0]), "--data", str(rows), "--max-new-tokens", "2", "-q"])
    assert quiet.stdout == loud.stdout
    assert loud.stderr
    assert quiet.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["chat", "./nowhere", "--json", "--prompt", "x"], "TunesmithError", "no folder"),
        (["train", "--json", "--model", "demo", "--lerning-rate", "1"], "TunesmithError", "learning"),
        (["chat", "demo", "--json"], "TunesmithError", "--prompt"),
        (["report", "--json"], "MissingParameter", ""),
        (["chat", "demo", "--json", "--nope"], "NoSuchOption", "nope"),
    ],
)
def test_a_mistake_is_a_json_object_on_stderr_with_the_same_exit_code(
    arguments: list[str], kind: str, said: str
) -> None:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    error = json.loads(result.stderr)["error"]
    assert error["type"] == kind
    assert said in error["message"]
    assert error["exit_code"] == 2
    assert (
        RUNNER.invoke(app, [word for word in arguments if word != "--json" or kind == "TunesmithError"]).exit_code == 2
    )


def test_the_mode_ends_with_its_command() -> None:
    RUNNER.invoke(app, ["chat", "./nowhere", "--json", "--quiet", "--prompt", "x"])
    assert not mode().as_json
    assert not mode().quiet


def test_a_long_error_loses_its_middle() -> None:
    text = str(TunesmithError(f"the key {'x' * 30_000_000} is unknown; leave it out"))
    assert len(text) <= 4000
    assert re.fullmatch(r"the key x+ \[\.\.\. 29,996,0\d\d characters \.\.\.\] x+ is unknown; leave it out", text)
    assert str(TunesmithError(text)) == text


def test_what_a_terminal_would_obey_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    say("title \x1b]0;x\x07 \ttab\r\nline \x9b2J")
    note("\x1b[31mred")
    finish_lines({}, ["one \x08", "two"])
    fail(TunesmithError("no file a\x1b[2J.jsonl"), 2, as_json=False)
    out, err = capsys.readouterr()
    assert out == "title \\x1b]0;x\\x07 \ttab\\x0d\nline \\x9b2J\none \\x08\ntwo\n"
    assert err == "\\x1b[31mred\nerror: no file a\\x1b[2J.jsonl\n"
