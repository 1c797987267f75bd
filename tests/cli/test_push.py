"""`tunesmith push` lists what it would send, sends it, and tells mistakes without a traceback."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.ship.conftest import TOKEN, hub
from tests.ship.runs import LEFTOVERS, full_run, record
from tunesmith.cli.main import Commands
from tunesmith.cli.push import push
from tunesmith.practice.hub_state import Hub
from tunesmith.runs.record import Method

__all__ = ["hub"]
RUNNER = CliRunner()
app = typer.Typer(cls=Commands)
app.command()(push)


@app.callback()
def options() -> None:
    """So that the command keeps its name."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> str:
    folder = tmp_path_factory.mktemp("runs") / "full"
    return str(full_run(folder, tiny_model, run_record=record(method=Method())))


def test_a_dry_run_lists_each_file_and_the_total_and_sends_nothing(run: str, hub: Hub) -> None:
    result = RUNNER.invoke(app, ["push", run, "--repo", "org/mine", "--dry-run"])
    assert result.exit_code == 0
    *files, total, left_out, last = result.stdout.splitlines()
    sizes = {line.split()[2]: int(line.split()[0].replace(",", "")) for line in files}
    assert sizes["model.safetensors"] == Path(run, "model.safetensors").stat().st_size
    assert sizes.keys() >= {"README.md", "config.json", "curves.png", "run.json", "tokenizer.json"}
    assert total.split()[0] == f"{sum(sizes.values()):,}"
    assert left_out == f"not sent: {', '.join(LEFTOVERS)}"
    assert last == "a dry run: nothing was sent"
    assert not hub.requests


def test_a_run_is_pushed_as_the_options_say(run: str, hub: Hub) -> None:
    arguments = ["--private", "--revision", "try", "--message", "First", "--license", "mit", "--no-samples"]
    result = RUNNER.invoke(app, ["push", run, "--repo", "org/mine", *arguments])
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"pushed to {hub.url}/org/mine/tree/try\n")
    assert hub.repos["org/mine"].private
    assert hub.repos["org/mine"].branches["try"][-1][1] == "First"
    card = hub.files("org/mine", "try")["README.md"].decode()
    assert "license: mit" in card
    assert "Before and after" not in card
    assert TOKEN not in result.output


def test_there_is_no_option_for_a_token(run: str) -> None:
    result = RUNNER.invoke(app, ["push", run, "--repo", "org/mine", "--token", TOKEN])
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_a_mistake_is_one_message(run: str, hub: Hub) -> None:
    hub.refuse["POST .*/commit/main"] = (403, "you, {authorization}, may not")
    result = RUNNER.invoke(app, ["push", run, "--repo", "org/mine"])
    assert result.exit_code == 2
    assert "error: the token may not write to org/mine" in result.stderr
    assert "you, Bearer <secret>, may not" in result.stderr
    assert TOKEN not in result.output
