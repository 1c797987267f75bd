"""The command line starts fast, and its exit codes say whose fault it was."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tunesmith
from tunesmith.cli import main
from tunesmith.errors import TunesmithError

CPU_LIMIT_S = 0.4
RUNNER = CliRunner()


def test_help_starts_under_four_tenths_of_a_second_and_loads_nothing_heavy() -> None:
    """Processor time, the interpreter's own start included; the least of three, as the machine may be busy."""
    program = """
import json, sys, time
from tunesmith.cli.main import app
try:
    app(["--help"])
except SystemExit:
    heavy = {"accelerate", "datasets", "peft", "torch", "transformers"}.intersection(sys.modules)
    print(json.dumps([time.process_time(), sorted(heavy)]), file=sys.stderr)
"""
    seconds = []
    for _ in range(3):
        child = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
        taken, heavy = json.loads(child.stderr)
        assert not heavy
        seconds.append(taken)
    assert min(seconds) < CPU_LIMIT_S


def test_the_module_is_the_command() -> None:
    child = subprocess.run([sys.executable, "-m", "tunesmith", "--version"], capture_output=True, text=True, check=True)
    assert child.stdout == f"tunesmith {tunesmith.__version__}\n"


def test_help_names_every_command() -> None:
    result = RUNNER.invoke(main.app, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("train", "chat", "demo"))


@pytest.mark.parametrize("arguments", [["nope"], ["--nope"], ["chat"], ["chat", "x", "--nope"], []])
def test_a_wrong_command_line_exits_with_2(arguments: list[str]) -> None:
    assert RUNNER.invoke(main.app, arguments).exit_code == 2


def test_a_mistake_is_one_message_on_stderr_and_exits_with_2(tmp_path: Path) -> None:
    result = RUNNER.invoke(main.app, ["chat", str(tmp_path / "nowhere" / "run")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no folder ")
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    result = RUNNER.invoke(main.app, ["--debug", "chat", str(tmp_path / "nowhere" / "run")])
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "error: no folder " in result.stderr


def test_a_fault_of_ours_exits_with_1_and_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tunesmith.model.load.load_run", failing)
    result = RUNNER.invoke(main.app, ["chat", "demo"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tunesmith.model.load.load_run", interrupted)
    assert RUNNER.invoke(main.app, ["chat", "demo"]).exit_code == 130


def test_markup_in_a_message_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: object, **__: object) -> None:
        raise TunesmithError("write [red] or [/x]")

    monkeypatch.setattr("tunesmith.model.load.load_run", mistaken)
    assert RUNNER.invoke(main.app, ["chat", "demo"]).stderr == "error: write [red] or [/x]\n"


def test_a_rule_of_a_tokenizer_that_never_ends_is_a_mistake_in_its_file(tiny_model: Path, tmp_path: Path) -> None:
    """Its library gives up, and panics, which is no Exception."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    rules = json.loads((model / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    (model / "tokenizer.json").write_text(json.dumps(rules))
    result = RUNNER.invoke(main.app, ["chat", str(model), "--prompt", "a" * 40 + "b"])
    assert result.exit_code == 2
    assert "error: a library failed: Onig" in result.stderr
    assert "a rule of the model's tokenizer.json" in result.stderr
