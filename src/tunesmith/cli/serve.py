"""`tunesmith serve`: a run behind the HTTP interface of OpenAI."""

import json
import os
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.complete import RUN, TRUST
from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import finish_lines, note

HELLO = [{"role": "user", "content": "Hello"}]


def serve(
    run: RUN,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's id, else the folder's name.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer, unless a request says.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token. Higher: freer.")] = 0.0,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Let other machines ask, with a key.")] = False,
    trust_remote_code: TRUST = False,
) -> None:
    """Answer programs that speak the OpenAI API.

    Example: tunesmith serve runs/first --port 8000

    Programs of this machine may ask, web pages may not. With TUNESMITH_API_KEY
    set, they need that key. Ctrl-C ends it.
    """
    missing = [library for library in ("starlette", "uvicorn") if find_spec(library) is None]
    if missing:
        raise TunesmithError(f'serve needs {" and ".join(missing)}: pip install "tunesmith[serve]"')
    from tunesmith.data.prompts import form_of
    from tunesmith.model.generate import Sampling
    from tunesmith.model.load import load_run
    from tunesmith.serve.access import KEY, access_for, bind, url_of
    from tunesmith.serve.server import Server, Service, Settings

    access = access_for(host, os.environ.get(KEY), allow_remote=allow_remote)
    defaults = Sampling(max_new_tokens=max_tokens, temperature=temperature)
    with bind(host, port) as bound:  # before the weights load: a port in use shows at once
        model, tokenizer = load_run(run, trust_remote_code=trust_remote_code, progress=note)
        if arguments := form_of(tokenizer).arguments:
            note(f"The chat template is given {json.dumps(dict(arguments))}, as in training.")
        folder = Path(run).expanduser()
        name = name or (folder.resolve().name if folder.is_dir() and run != "demo" else run)
        service = Service(model, tokenizer, Settings(name=name, defaults=defaults, access=access))
        example = _Example(
            model=name,
            url=f"{url_of(bound)}/v1",
            has_roles=tokenizer.chat_template is not None,
            key=None if access.api_key is None else KEY,
        )
        Server(service, lambda: _welcome(example)).run([bound])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Example:
    """A first request. `key` is the variable that holds the API key, where one is needed."""

    model: str
    url: str
    has_roles: bool
    key: str | None

    def curl(self) -> str:
        path = "chat/completions" if self.has_roles else "completions"
        question: dict[str, object] = {"messages": HELLO} if self.has_roles else {"prompt": "Hello"}
        header = f' -H "Authorization: Bearer ${self.key}"' if self.key else ""
        body = shlex.quote(json.dumps({"model": self.model, **question}))
        return f'curl {self.url}/{path} -H "Content-Type: application/json"{header} -d {body}'

    def python(self) -> str:
        call = "chat.completions" if self.has_roles else "completions"
        question = f"messages={json.dumps(HELLO)}" if self.has_roles else 'prompt="Hello"'
        key = f'os.environ["{self.key}"]' if self.key else '"none"'
        lines = [
            *(["import os", ""] if self.key else []),
            "from openai import OpenAI",
            "",
            f'client = OpenAI(base_url="{self.url}", api_key={key})',
            f"answer = client.{call}.create(model={json.dumps(self.model)}, {question})",
            f"print(answer.choices[0].{'message.content' if self.has_roles else 'text'})",
        ]
        return "\n".join(lines)


def _welcome(example: _Example) -> None:
    """The URL is the result, which a script may read; the rest is for people."""
    note(f"{example.model} answers, until Ctrl-C, at")
    finish_lines({"model": example.model, "url": example.url}, [example.url])
    note(f"\n{example.curl()}\n\n{example.python()}")
