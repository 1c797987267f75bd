"""The board's HTTP interface: the page, and what it asks for. For programs of this machine that have the token."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tunesmith.board.chat import Speakers, name_of
from tunesmith.board.jobs import Jobs
from tunesmith.board.rows import Prepared, Rows, Wanted
from tunesmith.board.runs import Runs
from tunesmith.errors import TunesmithError
from tunesmith.report.inspect import STYLE as INSPECT_STYLE
from tunesmith.report.page import STYLE as PAGE_STYLE
from tunesmith.report.run_data import read_run
from tunesmith.report.run_html import page
from tunesmith.runs.files import write_whole
from tunesmith.serve.access import Access, Guard

if TYPE_CHECKING:
    from tunesmith.settings.recipe import Recipe

SUFFIXES = (".yaml", ".yml")
LARGEST = 2**20
"""Bytes of a request."""
SCRIPT, STYLE = "board.js", "board.css"
OPEN = frozenset({f"/{SCRIPT}", f"/{STYLE}"})
"""What holds nothing of the user's, and needs no token."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """What commands do for the board."""

    resolve: Callable[[str], "Recipe"]
    """A recipe's file to a checked recipe. Raises TunesmithError."""
    prepare: Callable[["Recipe"], Prepared]
    command: Callable[[list[str], Path], str]
    """Runs a command in a folder, and returns what it prints. Raises TunesmithError with its mistake."""
    schema: Callable[[], dict[str, Any]]


class Board:
    """The page over the runs in `runs`, and the recipes in the folder `home`. `app` is its ASGI application."""

    def __init__(self, runs: Path, home: Path, token: str, tools: Tools) -> None:
        self._runs, self._home, self._tools = Runs(runs), home.resolve(), tools
        self._jobs, self._speakers, self._rows = Jobs(), Speakers(), Rows(tools.prepare)
        # A tokenizer, and the caches of prepared data, are for one thread at a time.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="board")
        routes = [
            Route("/", self._page),
            Route(f"/{SCRIPT}", lambda _: _asset(SCRIPT, "text/javascript")),
            Route(f"/{STYLE}", self._style),
            Route("/api/runs", self._all_runs),
            Route("/api/lines/{name:path}", self._lines),
            Route("/api/run/{name:path}", self._details),
            Route("/report/{name:path}", self._report),
            Route("/api/recipes", self._recipes),
            Route("/api/recipe/{name}", self._recipe, methods=["GET"]),
            Route("/api/recipe/{name}", self._save, methods=["PUT"]),
            Route("/api/schema", self._schema),
            Route("/api/init", self._init, methods=["POST"]),
            Route("/api/check", self._check, methods=["POST"]),
            Route("/api/look", self._look, methods=["POST"]),
            Route("/api/rows", self._show_rows, methods=["POST"]),
            Route("/api/jobs", self._list_jobs),
            Route("/api/train/{name}", self._train, methods=["POST"]),
            Route("/api/stop/{number:int}", self._stop, methods=["POST"]),
            Route("/api/chat", self._chat, methods=["POST"]),
        ]
        access = Access(api_key=token, in_url=True, open=OPEN)
        self.app = Starlette(
            lifespan=self._lifespan,
            routes=routes,
            middleware=[Middleware(Guard, access=access)],
            exception_handlers={TunesmithError: _mistake, HTTPException: _http_error},
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """At the end, the models that chat are ended. Trainings go on."""
        yield
        self._worker.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._speakers.close)

    async def _in_worker(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    # The page

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(_file("board.html"), headers=HEADERS)

    async def _style(self, request: Request) -> Response:
        return Response(PAGE_STYLE + INSPECT_STYLE + _file(STYLE), media_type="text/css", headers=HEADERS)

    # Runs

    async def _all_runs(self, request: Request) -> Response:
        return JSONResponse({"root": self._runs.root.name, "runs": await asyncio.to_thread(self._runs.all)})

    async def _lines(self, request: Request) -> Response:
        name, offset = request.path_params["name"], request.query_params.get("offset", "0")
        if not offset.isdecimal():
            raise TunesmithError(f"offset is {offset}; write a number of bytes")
        return JSONResponse(await asyncio.to_thread(self._runs.lines, name, int(offset)))

    async def _details(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self._runs.details, request.path_params["name"]))

    async def _report(self, request: Request) -> Response:
        folder = self._runs.folder(request.path_params["name"])
        return HTMLResponse(await self._in_worker(lambda: page(read_run(folder))))

    # Recipes

    async def _recipes(self, request: Request) -> Response:
        names = sorted(file.name for file in self._home.iterdir() if file.suffix in SUFFIXES and file.is_file())
        return JSONResponse({"folder": self._home.name, "recipes": names})

    def _file_of(self, name: str) -> Path:
        """The recipe `name` in the folder of the board, and nowhere else."""
        if Path(name).name != name or Path(name).suffix not in SUFFIXES or name.startswith("."):
            raise TunesmithError(f"{name!r} is no name of a recipe; write a name that ends in .yaml, without a folder")
        return self._home / name

    async def _recipe(self, request: Request) -> Response:
        file = self._file_of(request.path_params["name"])
        if not file.is_file():
            raise TunesmithError(f"there is no recipe {file.name} here")
        return JSONResponse({"name": file.name, "text": file.read_text(encoding="utf-8")})

    async def _save(self, request: Request) -> Response:
        file, text = self._file_of(request.path_params["name"]), str((await _body(request)).get("text", ""))
        await asyncio.to_thread(write_whole, file, text)
        return JSONResponse({"name": file.name})

    async def _schema(self, request: Request) -> Response:
        return JSONResponse(await self._in_worker(self._tools.schema))

    async def _init(self, request: Request) -> Response:
        """Writes a recipe for a file of rows, as `tunesmith init` does."""
        body = await _body(request)
        file = self._file_of(str(body.get("name", "")))
        if file.exists():
            raise TunesmithError(f"{file.name} is there already; take another name")
        words = ["init", file.name, "--yes"]
        for option in ("data", "model", "output"):
            if value := str(body.get(option) or ""):
                words += [f"--{option}", value]
        said = await asyncio.to_thread(self._tools.command, words, self._home)
        return JSONResponse({"name": file.name, "text": said})

    async def _check(self, request: Request) -> Response:
        """What is wrong with a recipe's text, without reading its data."""
        text = str((await _body(request)).get("text", ""))

        def checked() -> dict[str, Any]:
            with _as_file(text) as file:
                try:
                    self._tools.resolve(str(file))
                except TunesmithError as error:
                    return {"error": str(error).replace(str(file), "recipe").replace(file.name, "recipe")}
            return {"error": None}

        return JSONResponse(await self._in_worker(checked))

    async def _look(self, request: Request) -> Response:
        """What `check` or `plan` prints of a recipe's text."""
        body = await _body(request)
        command, text = str(body.get("command")), str(body.get("text", ""))
        if command not in ("check", "plan"):
            raise TunesmithError(f"command is {command}; write check or plan")

        def looked() -> str:
            with _as_file(text) as file:
                return self._tools.command([command, str(file)], self._home).replace(str(file), "recipe.yaml")

        return JSONResponse({"text": await asyncio.to_thread(looked)})

    async def _show_rows(self, request: Request) -> Response:
        body = await _body(request)
        text = str(body.get("text", ""))
        wanted = Wanted(first=int(_number(body, "first", 1)), text=str(body.get("search") or ""))

        def shown() -> dict[str, Any]:
            with _as_file(text) as file:
                return self._rows.page(text, self._tools.resolve(str(file)), wanted)

        return JSONResponse(await self._in_worker(shown))

    # Trainings

    async def _list_jobs(self, request: Request) -> Response:
        return JSONResponse({"jobs": self._jobs.all()})

    async def _train(self, request: Request) -> Response:
        file = self._file_of(request.path_params["name"])
        if not file.is_file():
            raise TunesmithError(f"there is no recipe {file.name} here; save it first")
        return JSONResponse(self._jobs.start(file).as_json())

    async def _stop(self, request: Request) -> Response:
        return JSONResponse(self._jobs.stop(request.path_params["number"]).as_json())

    # Chat

    async def _chat(self, request: Request) -> Response:
        body = await _body(request)
        folder = self._runs.folder(str(body.get("run", "")))
        question = _question(body)
        name = await asyncio.to_thread(name_of, folder, base=bool(body.get("base")))
        speaker = await asyncio.to_thread(self._speakers.of, name)
        pieces = speaker.answer(**question)
        first = await asyncio.to_thread(next, pieces, "")  # a refusal comes before the answer begins

        async def answer() -> AsyncIterator[str]:
            yield first
            async for piece in iterate_in_threadpool(pieces):
                yield piece

        return StreamingResponse(answer(), media_type="text/plain; charset=utf-8")


def _question(body: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Speaker.answer`. Raises TunesmithError."""
    temperature, most = _number(body, "temperature", 0.0), int(_number(body, "max_tokens", 256))
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise TunesmithError("messages is no list of objects; write [{role: user, content: ...}]")
    return {"messages": messages, "temperature": temperature, "max_tokens": most}


def _number(body: dict[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TunesmithError(f"{name} is {value!r}; write a number")
    return value


@contextmanager
def _as_file(text: str) -> Iterator[Path]:
    """A recipe's text as a file, as long as it is looked at."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        yield file


async def _body(request: Request) -> dict[str, Any]:
    """The object of a request. What a page of another site may send without asking is refused."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send the body as Content-Type: application/json")
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > LARGEST:
            raise HTTPException(413, f"the body is larger than {LARGEST} bytes")
    try:
        value = json.loads(bytes(raw))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is no JSON") from error
    if not isinstance(value, dict):
        raise HTTPException(400, "the body is no object")
    return value


def _file(name: str) -> str:
    return (files("tunesmith.board") / name).read_text(encoding="utf-8")


def _asset(name: str, media_type: str) -> Response:
    return Response(_file(name), media_type=media_type, headers=HEADERS)


async def _mistake(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, status_code=error.status_code)
