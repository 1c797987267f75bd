"""A newcomer's whole path in the browser: from a table of rows to a chat with what was trained on them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.board.browser import Browser, browser

ROWS = 12
LONG = 300
"""Seconds for what loads a model in a process of its own."""


@contextmanager
def running_board(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "tunesmith", "board", "--no-open", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(timeout=60)
        assert _of_folder(folder) == [], "models that chat end with the board"


def _of_folder(folder: Path) -> list[str]:
    """The processes that work in `folder`, where the system tells."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if link.resolve() == folder.resolve():
                found.append((link.parent / "cmdline").read_text(encoding="utf-8").replace("\0", " "))
    return found


@pytest.mark.documented
@pytest.mark.timeout(1200)
def test_from_a_table_to_a_chat(tmp_path: Path, tiny_model: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "model").symlink_to(tiny_model)
    lines = ["prompt,completion", *(f"Capital of land {number}?,Town {number}" for number in range(ROWS))]
    (home / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with running_board(home) as url, browser(tmp_path) as page:
        page.open(url)
        page.wait("!document.querySelector('#no-runs').hidden")
        page.click("#tab-recipe")
        _write_a_recipe(page)
        _look(page)
        _train(page)
        _chat(page)
        for width, dark in ((1200, False), (400, True)):
            page.open(url, width=width, dark=dark)
            page.wait("document.querySelector('#charts svg')")
            assert page.run("document.documentElement.scrollWidth") <= width
        assert page.console == []
        assert {request.split("/")[2] for request in page.requests if "://" in request} == {url.split("/")[2]}


def _write_a_recipe(page: Browser) -> None:
    page.fill("#new [name=data]", "rows.csv")
    page.fill("#new [name=model]", "model")
    page.click("#new button")
    page.wait("document.querySelector('#problem').innerText.startsWith('No mistake')", LONG)
    text = page.run("document.querySelector('#text').value")
    page.fill("#text", text.replace("learning_rate", "learning_rat"))
    assert "learning_rat" in page.wait("document.querySelector('#problem:not(.fine)')?.innerText", LONG)
    page.fill("#text", text + "\nmax_steps: 3\n")
    page.wait("document.querySelector('#problem.fine')", LONG)


def _look(page: Browser) -> None:
    page.click("#check")
    assert "12" in page.wait("document.querySelector('#looked').innerText", LONG)
    page.click("#show-rows")
    page.wait("document.querySelector('#shown').innerText.includes('Capital of land 0?')", LONG)
    page.fill("#search [name=text]", "LAND 7")
    page.click("#search button:not([type])")
    assert page.wait("document.querySelector('#about').innerText.startsWith('1 of')", LONG)
    assert "Town 7" in page.run("[...document.querySelectorAll('#shown .s')].map(part => part.innerText).join('')")


def _train(page: Browser) -> None:
    page.click("#tab-recipe")
    page.click("#train")
    page.wait("document.querySelector('#jobs h3')?.innerText.includes('done')", LONG)
    page.click("#tab-runs")
    page.wait("document.querySelector('#run-list tbody').innerText.includes('3 of 3')")
    page.wait("document.querySelector('#charts svg')")
    # With the keyboard alone: the value at a step.
    page.run("document.querySelector('#charts svg').focus()")
    page.key("ArrowLeft", 37)
    assert page.text("#charts output").startswith("steps 2 — recipe: ")
    page.click("#run-list .plain")
    page.wait("document.querySelector('#details').innerText.includes('Hardest rows')")


def _chat(page: Browser) -> None:
    page.click("#tab-chat")
    page.fill("#message", "Capital of land 3?")
    page.fill("#ask [name=tokens]", "4")
    page.click("#ask button.main")
    page.wait("!document.querySelector('#ask button.main').disabled", 2 * LONG)
    answers = page.run("[...document.querySelectorAll('#talk .text')].map(box => [box.className, box.innerText])")
    assert [kind for kind, _ in answers] == ["text", "text"]
    assert all("can't be loaded" not in text for _, text in answers)
