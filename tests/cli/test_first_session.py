"""The page of a first session is what its script writes, with commands that exist."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.main import get_command

from tests.conftest import REPO
from tunesmith.cli.main import app
from tunesmith.recipe import all_settings

DOCS = REPO / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("first_session", DOCS / "first_session.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "first-session.md").read_text(encoding="utf-8")


def test_its_commands_and_their_options_exist(script: ModuleType) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    settings = {f"--{name.replace('_', '-')}" for name in all_settings()} | {"--output"}
    called = [shlex.split(part) for step in script.STEPS for part in step.command.split(" && ")]
    called = [words for words in called if words[0] == "tunesmith"]
    assert len(called) >= 7
    for words in called:
        parameters = commands[words[1]].params
        own = {option for parameter in parameters for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= own | settings
    assert set(yaml.safe_load(script.RECIPE)) <= set(all_settings()) | {"lora"}


def test_the_page_is_what_the_script_writes(script: ModuleType, page: str) -> None:
    outputs = re.findall(r"```console\n\$ .*\n((?:.*\n)*?)```\n", page)
    assert page == script.written(list(zip(script.STEPS, outputs, strict=True)))
    assert all(outputs)


def test_the_page_tells_nothing_of_the_machine_that_it_was_written_on(page: str) -> None:
    assert not re.findall(r"(?:^|[\s(=])/(?:home|tmp|root|work|usr|var|opt)\b.*", page, re.MULTILINE)
    assert "Traceback" not in page


def test_folders_of_the_machine_are_made_neutral(script: ModuleType) -> None:
    folder = Path("/scratch/abc")
    text = f"wrote /scratch/abc/runs/first \nin /scratch/abc\n{Path.home()}/.cache/x\n/srv/models/tiny: 3/4 and a/b\n"
    assert script.neutral(text, folder) == "wrote runs/first\nin .\n~/.cache/x\n…/tiny: 3/4 and a/b\n"


def test_the_picture_shows_the_view(page: str) -> None:
    assert "images/live.svg" in page
    picture = (DOCS / "images" / "live.svg").read_text(encoding="utf-8")
    assert all(word in picture for word in ("training", "loss", "tokens/s", "supervised", "█"))
    assert set(re.findall(r"https?://[^\s\"')]*", picture)) == {"http://www.w3.org/2000/svg"}
    assert "@font-face" not in picture
