"""The page of a first session shows what its commands print, and is what its script writes."""

import importlib.util
import re
import sys
import tempfile
from difflib import unified_diff
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPO
from tests.transcript import stable

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


@pytest.fixture(scope="module")
def outputs(page: str) -> list[str]:
    return re.findall(r"```console\n\$ .*\n((?:.*\n)*?)```\n", page)


@pytest.mark.documented
@pytest.mark.timeout(1200)
def test_every_command_prints_what_the_page_shows(script: ModuleType, outputs: list[str], tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # a short name, as the script's: long ones are broken into lines
        folder = Path(name).resolve()
        shown = script.session(folder)
        script.draw_live(folder / script.RUN, tmp_path / "live.svg")
    wrong = {}
    for (step, output), written in zip(shown, outputs, strict=True):
        changed = list(unified_diff(stable(written), stable(output), "the page", "the command", n=0, lineterm=""))
        if changed:
            wrong[step.command] = "\n".join(changed)
    assert not wrong, "\n".join(f"$ {command}\n{changed}" for command, changed in wrong.items())
    assert "training" in (tmp_path / "live.svg").read_text(encoding="utf-8")


def test_the_page_is_what_the_script_writes(script: ModuleType, outputs: list[str], page: str) -> None:
    assert page == script.written(list(zip(script.STEPS, outputs, strict=True)))
    assert all(outputs)


def test_the_page_in_chinese_gets_the_commands_and_outputs(script: ModuleType, page: str) -> None:
    chinese = script.CHINESE.read_text(encoding="utf-8")
    older = chinese.replace("$ tunesmith", "$ older")
    assert older != chinese
    assert script.with_code_of(page, older) == chinese


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
