"""`tunesmith doctor` says what is there and what it means, survives whatever fails, and keeps the token to itself."""

import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from tests.doctor.cases import gpu, odd_libraries
from tests.ship.conftest import TOKEN, hub
from tunesmith.cli import doctor
from tunesmith.cli.main import Commands
from tunesmith.doctor import checks
from tunesmith.doctor.checks import Check, Finding
from tunesmith.model.demo_model import INSTALL
from tunesmith.practice.hub_state import Hub
from tunesmith.terminal.output import Application

__all__ = ["hub"]
RUNNER = CliRunner()
app = Application(cls=Commands)
app.command()(doctor.doctor)


@app.callback()
def options() -> None:
    """So that the command keeps its name."""


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def with_checks(monkeypatch: pytest.MonkeyPatch, found: Mapping[str, Check]) -> None:
    monkeypatch.setattr(checks, "CHECKS", found)


def ok() -> Iterator[Finding]:
    yield Finding(name="one", mark="ok", found="it is there", means="All works.")


def broken() -> Iterator[Finding]:
    yield Finding(name="two", mark="problem", found="it is not there", means="Nothing works.", mend="bring it")


def failing() -> Iterator[Finding]:
    raise OSError(f"no such thing, says {TOKEN}")
    yield


def test_everything_is_looked_at_here_and_training_works(hub: Hub) -> None:
    result = RUNNER.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert report["problems"] == 0
    assert found.keys() >= {"Python", "torch", "libraries", "processor", "precision", "memory", "cache folder"}
    assert torch.__version__ in found["torch"]["found"]
    assert "transformers 5" in found["libraries"]["found"]
    assert "GFLOP/s" in found["precision"]["found"]
    assert found["demo model"]["mark"] == "ok"
    assert (found["hub"]["mark"], found["hub"]["found"]) == ("ok", f"{hub.url} answers")
    assert (found["hub token"]["mark"], found["hub token"]["found"]) == ("ok", f"of {hub.owners[0]}")
    assert not any("could not be looked at" in finding["found"] for finding in found.values())
    assert TOKEN not in result.output
    assert report["versions"]["torch"] == torch.__version__
    shown = RUNNER.invoke(app, ["doctor"]).stdout.splitlines()
    assert max(map(len, shown)) <= 80
    assert len(shown) <= 40  # a screen
    assert shown[-1] == "Training works here."


def test_a_problem_is_exit_code_1_with_what_it_means_and_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_checks(monkeypatch, {"one": ok, "two": broken})
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 1
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines == [
        ["ok", "one", "it", "is", "there.", "All", "works."],
        ["problem", "two", "it", "is", "not", "there"],
        ["Nothing", "works."],
        ["to", "fix", "it:", "bring", "it"],
        ["1", "problem", "keeps", "training", "from", "working."],
    ]
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_check_that_fails_is_a_line_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with_checks(monkeypatch, {"odd": failing, "one": ok})
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "could not be looked at: OSError: no such thing" in " ".join(result.stdout.split())
    assert "it is there" in result.stdout
    assert TOKEN not in result.output


def test_libraries_are_named_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    odd_libraries(monkeypatch)
    found = by_name(checks.libraries())
    assert found.keys() == {"torch", "no-such-package", "libraries"}
    assert (found["torch"].mark, found["torch"].mend) == ("problem", "pip install 'torch<1'")
    assert found["no-such-package"].found == "not installed; >=2 is needed"
    assert found["libraries"].found.startswith("numpy ")
    assert checks.versions().keys() == {"numpy", "torch"}


def test_without_the_network_the_hub_is_a_note(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    [found] = checks.hub()
    assert (found.name, found.mark) == ("hub", "note")
    assert "http://127.0.0.1:1 does not answer: " in found.found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    [found] = checks.hub()
    assert "HF_HUB_OFFLINE" in found.found


def test_a_hub_that_never_answers_is_not_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        [found] = checks.hub()
    assert found.mark == "note"


def test_a_token_is_asked_for_its_owner_and_never_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuse["GET /api/whoami-v2"] = (401, "{authorization} is no token")
    found = by_name(checks.hub())
    assert found["hub token"].found == "the hub does not accept it"
    hub.refuse["GET /api/whoami-v2"] = (500, "{authorization} broke it")
    found = by_name(checks.hub())
    assert found["hub token"].found == "whose it is can't be asked: 500"
    monkeypatch.delenv("HF_TOKEN")
    found = by_name(checks.hub())
    assert (found["hub token"].mark, found["hub token"].found) == ("note", "none")
    assert TOKEN not in str(found)


def test_a_full_disk_under_the_cache_is_a_problem(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(home / "not" / "made"))
    monkeypatch.setattr("tunesmith.doctor.checks.shutil.disk_usage", lambda _: SimpleNamespace(free=1e8))
    found = by_name(checks.disks())
    assert found["cache folder"].mark == "problem"
    assert found["cache folder"].found == f"{home / 'not' / 'made'}: 100 MB free"
    assert "TUNESMITH_HOME" in found["cache folder"].mend
    assert found["this folder"].mark == "note"
    assert not (home / "not").exists()


@pytest.mark.parametrize(("free", "mark"), [(5e8, "problem"), (3e9, "note"), (6e9, "ok")])
def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch, free: float, mark: str) -> None:
    monkeypatch.setattr("tunesmith.model.devices.available", lambda: int(free))
    [found] = checks.memory()
    assert found.mark == mark
    assert f"{free / 1e9:.1f} GB available" in found.found or "500 MB available" in found.found


def test_a_demo_model_that_is_missing_is_a_note_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    [found] = checks.demo_model()
    assert (found.mark, found.mend) == ("note", INSTALL)
    (tmp_path / "demo-b179c9523d0e-v1").mkdir()  # converted earlier, by a Python that had the package
    [found] = checks.demo_model()
    assert found.mark == "ok"


@pytest.mark.parametrize(
    ("built", "mark"),
    [
        (["sm_80", "sm_90"], "ok"),
        (["sm_75", "compute_80"], "ok"),
        (["sm_90", "sm_100a", "compute_90"], "problem"),
        (["sm_75"], "problem"),
    ],
)
def test_a_gpu_that_torch_is_not_built_for_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, built: list[str], mark: str
) -> None:
    gpu(monkeypatch, built=built)
    [found] = checks.accelerators()
    assert found.mark == mark
    assert found.found == "NVIDIA A10G, compute capability 8.6, 23.6 GB of memory, 20.0 GB free"
