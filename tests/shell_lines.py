"""Shell commands on the pages that no test runs, as they install, wait or need a network: checked as far as can be."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from packaging.requirements import Requirement
from typer.main import get_command

from tests.conftest import REPO
from tunesmith.cli.complete import RecipeCommand
from tunesmith.cli.main import app
from tunesmith.model.demo_model import INSTALL
from tunesmith.settings.recipe import parse_options

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PLACES = (Path(), Path(".venv/bin"))
"""Where a command may be: on the path, or in the environment that `make` installs."""


def check(line: str) -> None:
    """Raises for a line with a command that no check here knows, that does not exist or that refuses its arguments."""
    for part in line.split(" && "):
        settings = re.match(r"(?:\w+=(?:\$\([^)]*\)|\S*) +)*", part)
        command, *arguments = shlex.split(part[settings.end() if settings else 0 :], comments=True)
        assert Path(command).parent in PLACES, line
        CHECKS[Path(command).name](arguments)


def _make(arguments: list[str]) -> None:
    """The targets are in the Makefile, and so are the variables that are set."""
    text = (REPO / "Makefile").read_text(encoding="utf-8")
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    targets = {name for line in phony for name in line.split()} & set(re.findall(r"^(\w+):", text, re.MULTILINE))
    variables = {word.partition("=")[0] for word in arguments if "=" in word}
    assert {word for word in arguments if "=" not in word} <= targets, arguments
    assert all(f"$({name})" in text for name in variables), arguments


def _tunesmith(arguments: list[str]) -> None:
    """The command's own parser takes them."""
    group = get_command(app)
    if all(word.startswith("-") for word in arguments):  # parsing these would do at once what they say
        assert set(arguments) <= {name for item in group.params for name in item.opts}, arguments
        return
    context = group.make_context("tunesmith", list(arguments))
    name, command, rest = group.resolve_command(context, list(arguments))  # type: ignore[attr-defined]
    rest = command.make_context(name, rest, parent=context).args
    if isinstance(command, RecipeCommand):
        parse_options(rest)  # which raises for what is no setting
    else:
        assert rest == [], arguments


def _git(arguments: list[str]) -> None:
    verb, url = arguments
    assert verb == "clone"
    assert re.fullmatch(rf"https://github\.com/[\w-]+/{PROJECT['name']}", url), url


def _cd(arguments: list[str]) -> None:
    """Only into what was cloned."""
    assert arguments == [PROJECT["name"]], arguments


def _pip(arguments: list[str]) -> None:
    """This package, with extras that it has, the folder that was cloned, or the demo model as errors say it."""
    if ["pip", *arguments] == shlex.split(INSTALL):
        return
    verb, text = arguments
    if text == ".":
        assert verb == "install"
        return
    wanted = Requirement(text)
    assert (verb, wanted.name) == ("install", PROJECT["name"]), text
    assert wanted.extras <= PROJECT["optional-dependencies"].keys(), text


def _pytest(arguments: list[str]) -> None:
    """There are such tests."""
    _python("pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider", *arguments)


def _pre_commit(arguments: list[str]) -> None:
    _python("pre_commit", *arguments, "--help")
    _python("pre_commit", "validate-config", ".pre-commit-config.yaml")


def _python(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": _make,
    "tunesmith": _tunesmith,
    "git": _git,
    "cd": _cd,
    "pip": _pip,
    "pytest": _pytest,
    "pre-commit": _pre_commit,
}
