"""Every command's help fits a screen and shows an example; shells complete commands, runs and recipes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tunesmith.cli.complete import SETTINGS, settings_text
from tunesmith.cli.main import app
from tunesmith.settings.recipe import every_setting

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
    known |= {f"--{name.replace('_', '-')}" for name in every_setting()} | {"--output"}
    first = text[text.index(f"tunesmith {command} ") :].split(" Options ")[0].split(" Arguments ")[0]
    assert set(re.findall(r"(?<=\s)--[a-z][a-z-]*", first)) <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_quiet_and_json(command: str) -> None:
    text = help_of(command)
    assert "--json" in text
    assert "--quiet" in text


# Completion

SHELLS = ("bash", "zsh", "fish")
HEAVY = {"accelerate", "datasets", "peft", "torch", "transformers", "numpy"}
PROGRAM = f"""
import io, json, os, sys
from tunesmith.cli.main import app
for line in sys.stdin:
    os.environ.update(json.loads(line))
    output, sys.stdout = sys.stdout, io.StringIO()
    try:
        app(prog_name="tunesmith")
    except SystemExit:
        pass
    print(json.dumps(sys.stdout.getvalue()), file=output)
    sys.stdout = output
print(json.dumps(sorted({HEAVY}.intersection(sys.modules))))
"""


def run_by_shells(environments: list[dict[str, str]], folder: Path) -> list[str]:
    """What the command prints in each of `environments`, for none of which anything heavy was loaded."""
    lines = "".join(f"{json.dumps(environment)}\n" for environment in environments)
    command = [sys.executable, "-c", PROGRAM]
    child = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=folder, check=True)
    *printed, heavy = map(json.loads, child.stdout.splitlines())
    assert heavy == []
    return printed


def completed(lines: dict[str, str], folder: Path) -> dict[str, list[str]]:
    """What the shell is told when TAB is pressed behind each line; `lines` has a shell for each."""
    environments = [
        {
            "_TUNESMITH_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
            "_TYPER_COMPLETE_ARGS": line,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        for line, shell in lines.items()
    ]
    printed = run_by_shells(environments, folder)
    return {
        line: [re.split(r"[\t]|\":\"", part)[0].strip('"') for part in text.split("\n") if part]
        for line, text in zip(lines, printed, strict=True)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("runs/first", "runs/second", "elsewhere/third", "runs/no-run"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/first/run.json", "runs/second/config.json", "elsewhere/third/adapter_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "recipe.yaml").write_text("model: demo\n")
    (tmp_path / "rows.jsonl").write_text("")
    return tmp_path


def test_commands_and_settings_are_completed_in_every_shell(folder: Path) -> None:
    for shell in SHELLS:
        commands, settings = completed(
            {"tunesmith tr": shell, "tunesmith train recipe.yaml --learn": shell}, folder
        ).values()
        assert any("train" in word for word in commands), shell
        assert len(settings) == 1
        assert "--learning-rate" in settings[0]


def test_runs_recipes_and_options_are_completed(folder: Path) -> None:
    expected = {
        "tunesmith chat ": ["demo", "runs/first", "runs/second"],
        "tunesmith chat runs/s": ["runs/second"],
        "tunesmith eval elsewhere/": ["elsewhere/third"],
        "tunesmith report runs/first runs/s": ["runs/second"],
        "tunesmith train re": ["recipe.yaml"],
        "tunesmith train recipe.yaml --data ": [],  # which the shell completes by itself
        "tunesmith chat --learn": [],
    }
    assert completed(dict.fromkeys(expected, "bash"), folder) == expected


def test_options_and_settings_are_completed_where_a_command_takes_them(folder: Path) -> None:
    lines = [f"tunesmith {command} --pack" for command in ("train", "check", "inspect", "plan")]
    *packing, check, train = completed(
        dict.fromkeys([*lines, "tunesmith check --j", "tunesmith train --"], "bash"), folder
    ).values()
    assert all("--packing-strategy" in words for words in packing)
    assert "--json" in check
    assert {"--fields", "--json", "--lora", "--output", "--gradient-checkpointing"} <= set(train)
    assert len(train) == len(set(train))


def test_the_list_of_settings_is_current() -> None:
    assert SETTINGS.read_text(encoding="utf-8") == settings_text(), "run: python -m tunesmith.cli.complete"


def test_the_script_for_a_shell_is_shown(tmp_path: Path) -> None:
    scripts = run_by_shells([{"_TUNESMITH_COMPLETE": f"source_{shell}"} for shell in SHELLS], tmp_path)
    for script, mark in zip(scripts, ("complete -o", "#compdef tunesmith", "complete"), strict=True):
        assert mark in script
        assert "_TUNESMITH_COMPLETE" in script
    assert "--install-completion" in help_of()
