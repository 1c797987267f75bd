"""`tunesmith serve`: a run behind the HTTP interface of OpenAI."""

import json
import os
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.complete import runs
from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import finish_lines, note

if TYPE_CHECKING:
    from tunesmith.serve.access import Access

KEY = "TUNESMITH_API_KEY"
NEEDED = ("starlette", "uvicorn")
HELLO = [{"role": "user", "content": "Hello"}]


def serve(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run's or model's folder, a name, or demo.", autocompletion=runs),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's id, else the folder's name.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer, unless a request says.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token. Higher: freer.")] = 0.0,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Let other machines ask, with a key.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Answer programs that speak the OpenAI API, until Ctrl-C.

    Example: tunesmith serve runs/first --port 8000

    Programs of this machine may ask, web pages may not. With TUNESMITH_API_KEY
    set, they need that key.
    """
    _check_installed()
    from tunesmith.model.generate import Sampling
    from tunesmith.model.load import load_run
    from tunesmith.serve.app import Service, Settings
    from tunesmith.serve.server import Server, bind, url_of

    access = _access(host, allow_remote, os.environ.get(KEY))
    defaults = Sampling(max_new_tokens=max_tokens, temperature=temperature)
    with bind(host, port) as bound:  # before the weights load: a port in use shows at once
        model, tokenizer = load_run(run, trust_remote_code=trust_remote_code, progress=note)
        settings = Settings(name=name or _name(run), defaults=defaults, access=access)
        place = _Place(
            name=settings.name,
            url=f"{url_of(bound)}/v1",
            has_roles=tokenizer.chat_template is not None,
            has_key=access.api_key is not None,
        )
        Server(Service(model, tokenizer, settings), lambda: _welcome(place)).run([bound])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    name: str
    url: str
    has_roles: bool
    has_key: bool


def _welcome(place: _Place) -> None:
    """The URL is the result, which a script may read; the rest is for people."""
    note(f"{place.name} answers, until Ctrl-C, at")
    finish_lines({"model": place.name, "url": place.url}, [place.url])
    note(f"\n{_curl(place)}\n\n{_python(place)}")


def _check_installed() -> None:
    missing = [library for library in NEEDED if find_spec(library) is None]
    if missing:
        raise TunesmithError(f'serve needs {" and ".join(missing)}: pip install "tunesmith[serve]"')


def _access(host: str, allow_remote: bool, key: str | None) -> "Access":
    from tunesmith.serve.access import Access, is_loopback

    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise TunesmithError(f"{KEY} is empty, or has characters that a header can't have; unset it, or set a key")
    local = is_loopback(host)
    if not local and not allow_remote:
        raise TunesmithError(
            f"host {host} lets other machines ask; keep to 127.0.0.1, or give --allow-remote and set {KEY}"
        )
    if not local and key is None:
        raise TunesmithError(f"--allow-remote needs a key that clients send: set {KEY}")
    return Access(local=local, api_key=key)


def _name(run: str) -> str:
    """The model's id: a folder's name, and any other name as it is."""
    path = Path(run).expanduser()
    return path.resolve().name if path.is_dir() and run != "demo" else run


def _curl(place: _Place) -> str:
    path = "chat/completions" if place.has_roles else "completions"
    asked: dict[str, object] = {"messages": HELLO} if place.has_roles else {"prompt": "Hello"}
    key = f' -H "Authorization: Bearer ${KEY}"' if place.has_key else ""
    body = shlex.quote(json.dumps({"model": place.name, **asked}))
    return f'curl {place.url}/{path} -H "Content-Type: application/json"{key} -d {body}'


def _python(place: _Place) -> str:
    call = "chat.completions" if place.has_roles else "completions"
    asked = f"messages={json.dumps(HELLO)}" if place.has_roles else 'prompt="Hello"'
    key = f'os.environ["{KEY}"]' if place.has_key else '"none"'
    lines = [
        *(["import os", ""] if place.has_key else []),
        "from openai import OpenAI",
        "",
        f'client = OpenAI(base_url="{place.url}", api_key={key})',
        f"answer = client.{call}.create(model={json.dumps(place.name)}, {asked})",
        f"print(answer.choices[0].{'message.content' if place.has_roles else 'text'})",
    ]
    return "\n".join(lines)
