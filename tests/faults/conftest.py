"""The faults of a run, few of them; `TUNESMITH_FAULTS=long` tries many, and counts them in build/faults.json."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.faults.figures import FIGURES, LONG
from tests.train.children import in_a_child


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[str], Path]:
    """The folder of the run of a mode that nothing happens to."""
    found: dict[str, Path] = {}

    def make(mode: str) -> Path:
        if mode not in found:
            found[mode] = tmp_path_factory.mktemp("whole")
            assert in_a_child(mode, found[mode], tiny_model) == 0
        return found[mode]

    return make


@pytest.fixture(autouse=True)
def written_down() -> Iterator[None]:
    yield
    if LONG:  # after each test, so that a run cut short leaves its figures, too
        file = REPO / "build" / "faults.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(dict(FIGURES), indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in FIGURES.items():
        terminalreporter.write_line(f"{name}: {count}")
