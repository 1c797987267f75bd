"""Every command's help fits a screen and shows an example; shells complete commands, runs and recipes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tunesmith.cli.complete import SETTINGS, settings_text
from tunesmith.cli.main import app
from tunesmith.settings.recipe import all_settings

ROWS, COLUMNS = 40, 80
GROUP = get_command(app)
COMMANDS: dict[str, object] = GROUP.commands  # type: ignore[attr-defined]
RUNNER = CliRunner()


def help_of(*command: str) -> str:
    result = RUNNER.invoke(app, [*command, "--help"], env={"COLUMNS": str(COLUMNS), "TERMINAL_WIDTH": str(COLUMNS)})
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("command", [*COMMANDS, None])
def test_help_fits_a_screen(command: str | None) -> None:
    lines = help_of(*([command] if command else [])).rstrip().splitlines()
    assert len(lines) <= ROWS
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_whose_options_exist(command: str) -> None:
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", help_of(command)).split())
    examples = re.findall(rf"tunesmith {command}((?: [^\s]+)+)", text)
    assert examples, f"no `tunesmith {command} ...` in its help"
    parameters = COMMANDS[command].params  # type: ignore[attr-defined]
    known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    known |= {f"--{name.replace('_', '-')}" for name in all_settings()} | {"--output"}
    first = text[text.index(f"tunesmith {command} ") :].split(" Options ")[0].split(" Arguments ")[0]
    assert set(re.findall(r"(?<=\s)--[a-z][a-z-]*", first)) <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_quiet_and_json(command: str) -> None:
    text = help_of(command)
    assert "--json" in text
    assert "--quiet" in text


# Completion


def completed(line: str, folder: Path, shell: str = "bash") -> list[str]:
    """What `shell` is told when TAB is pressed behind `line`, and that nothing heavy was loaded for it."""
    program = """
import json, sys
from tunesmith.cli.main import app
try:
    app(prog_name="tunesmith")
finally:
    heavy = {"accelerate", "datasets", "peft", "torch", "transformers", "numpy"}.intersection(sys.modules)
    print(json.dumps(sorted(heavy)), file=sys.stderr)
"""
    words = line.split(" ")
    env = os.environ | {"_TUNESMITH_COMPLETE": f"complete_{shell}", "COMP_WORDS": line}
    env |= {"COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
    env |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=folder, check=False
    )
    assert json.loads(child.stderr.splitlines()[-1]) == []
    return [re.split(r"[\t]|\":\"", part)[0].strip('"') for part in child.stdout.split("\n") if part]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("runs/first", "runs/second", "elsewhere/third", "runs/no-run"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/first/run.json", "runs/second/config.json", "elsewhere/third/adapter_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "recipe.yaml").write_text("model: demo\n")
    (tmp_path / "rows.jsonl").write_text("")
    return tmp_path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_command_is_completed(shell: str, folder: Path) -> None:
    assert any("train" in word for word in completed("tunesmith tr", folder, shell))


def test_runs_recipes_and_options_are_completed(folder: Path) -> None:
    assert completed("tunesmith chat ", folder) == ["demo", "runs/first", "runs/second"]
    assert completed("tunesmith chat runs/s", folder) == ["runs/second"]
    assert completed("tunesmith eval elsewhere/", folder) == ["elsewhere/third"]
    assert completed("tunesmith report runs/first runs/s", folder) == ["runs/second"]
    assert completed("tunesmith train re", folder) == ["recipe.yaml"]
    assert completed("tunesmith train recipe.yaml --data ", folder) == []  # which the shell completes by itself
    assert "--json" in completed("tunesmith check --j", folder)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_setting_is_completed(shell: str, folder: Path) -> None:
    words = completed("tunesmith train recipe.yaml --learn", folder, shell)
    assert len(words) == 1
    assert "--learning-rate" in words[0]


def test_settings_are_completed_where_a_command_takes_them(folder: Path) -> None:
    for command in ("train", "check", "inspect", "plan"):
        assert "--packing-strategy" in completed(f"tunesmith {command} --pack", folder)
    found = completed("tunesmith train --", folder)
    assert {"--fields", "--json", "--lora", "--output", "--gradient-checkpointing"} <= set(found)
    assert len(found) == len(set(found))
    assert completed("tunesmith chat --learn", folder) == []


def test_the_list_of_settings_is_current() -> None:
    assert SETTINGS.read_text(encoding="utf-8") == settings_text(), "run: python -m tunesmith.cli.complete"


@pytest.mark.parametrize(
    ("shell", "mark"), [("bash", "complete -o"), ("zsh", "#compdef tunesmith"), ("fish", "complete")]
)
def test_the_script_for_a_shell_is_shown(shell: str, mark: str) -> None:
    env = os.environ | {"_TUNESMITH_COMPLETE": f"source_{shell}"}
    program = "from tunesmith.cli.main import app; app(prog_name='tunesmith')"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert mark in child.stdout
    assert "_TUNESMITH_COMPLETE" in child.stdout
    assert "--show-completion" in help_of()
