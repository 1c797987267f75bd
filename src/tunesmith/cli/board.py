"""`tunesmith board`: runs, recipes, rows and chat on a page in the browser."""

import os
import secrets
import subprocess
import sys
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import finish_lines, note


def board(
    folder: Annotated[Path, typer.Argument(help="The folder with the runs.", metavar="[FOLDER]")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: a free one.")] = 0,
    no_open: Annotated[bool, typer.Option("--no-open", help="Don't open the browser.")] = False,
) -> None:
    """Look at runs and rows, start runs and chat in the browser.

    Example: tunesmith board runs

    For you alone: it listens on this machine only, and needs the token in the
    URL that it prints. Ctrl-C ends it; trainings that it started go on.
    """
    missing = [library for library in ("starlette", "uvicorn") if find_spec(library) is None]
    if missing:
        raise TunesmithError(f'board needs {" and ".join(missing)}: pip install "tunesmith[serve]"')
    if folder.exists() and not folder.is_dir():
        raise TunesmithError(f"{folder} is a file; give the folder that has the runs, such as runs")
    import uvicorn

    from tunesmith.board.server import Board, Tools
    from tunesmith.cli.inspect import PreparedRows
    from tunesmith.serve.access import bind, url_of

    tools = Tools(resolve=_resolved, prepare=PreparedRows, command=_said, schema=_schema)
    token = secrets.token_urlsafe(24)
    page = Board(folder, Path(), token, tools)
    with bind("127.0.0.1", port) as bound:
        url = f"{url_of(bound)}/?token={token}"
        finish_lines({"url": url}, [url])
        note("Ctrl-C ends the board; trainings that it started go on.")
        if not no_open and sys.stdout.isatty():
            webbrowser.open(url)
        settings: Any = {"log_level": "warning", "access_log": False, "proxy_headers": False, "server_header": False}
        uvicorn.Server(uvicorn.Config(page.app, timeout_graceful_shutdown=2, **settings)).run([bound])


def _resolved(path: str) -> Any:
    from tunesmith.cli.data import SAME_DATA
    from tunesmith.settings.recipe import resolve

    return resolve(path, dict(SAME_DATA))


def _schema() -> dict[str, Any]:
    from tunesmith.settings.schema import recipe_schema

    return recipe_schema()


def _said(words: list[str], folder: Path) -> str:
    """What a command prints in `folder`. One that finds a recipe wanting (code 2) prints why; a mistake raises
    TunesmithError."""
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "96"},
    )
    if done.returncode and "error: " in done.stdout:
        raise TunesmithError(done.stdout[done.stdout.rindex("error: ") + len("error: ") :].strip())
    return done.stdout
