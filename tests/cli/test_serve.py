"""`tunesmith serve` listens where it may, says where, and ends with Ctrl-C."""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import APIError, OpenAI
from typer.testing import CliRunner

from tests.forked import Command
from tunesmith.cli.main import app

RUNNER = CliRunner()
PAGE = Path(__file__).parents[2] / "docs" / "serve.md"


@pytest.mark.parametrize(
    ("options", "key", "says"),
    [
        (["--host", "0.0.0.0"], "k", "keep to 127.0.0.1, or give --allow-remote"),
        (["--host", "192.0.2.1"], None, "keep to 127.0.0.1, or give --allow-remote"),
        (["--host", "0.0.0.0", "--allow-remote"], None, "needs a key"),
        ([], "", "TUNESMITH_API_KEY is empty"),
        ([], "a b", "characters that a header can't have"),
        (["--max-tokens", "0"], None, "max_new_tokens is 0"),
        (["--host", "192.0.2.1", "--allow-remote"], "k", "192.0.2.1 can't be used"),
    ],
)
def test_what_must_not_be_is_refused_before_anything_is_loaded(options: list[str], key: str | None, says: str) -> None:
    result = RUNNER.invoke(app, ["serve", "owner/nowhere", *options], env={"TUNESMITH_API_KEY": key})
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_port_in_use_shows_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = RUNNER.invoke(app, ["serve", "owner/nowhere", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert "give another --port, or 0" in result.stderr


def test_without_its_libraries_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.cli.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    result = RUNNER.invoke(app, ["serve", "owner/nowhere"])
    assert result.exit_code == 2
    assert 'serve needs uvicorn: pip install "tunesmith[serve]"' in result.stderr


@contextmanager
def serving(folder: Path, *arguments: object, **env: str) -> Iterator[tuple[Command, str]]:
    """`tunesmith serve` as a process, and the first line of its stdout, which comes when it is ready."""
    environment = {name: value for name, value in os.environ.items() if name != "TUNESMITH_API_KEY"} | env
    command = Command(folder, "serve", *arguments, "--port", "0", env=environment)
    try:
        command.until(lambda: "\n" in command.stdout)
        yield command, command.stdout.splitlines()[0]
    finally:
        command.process.kill()


def test_the_command_serves_the_demo_model_until_ctrl_c(tmp_path: Path) -> None:
    with serving(tmp_path / "said", "demo") as (command, url):
        # The page's own program, asking where the command says.
        [program] = re.findall(r"^    from openai.*?^    print.*?\n", PAGE.read_text(encoding="utf-8"), re.M | re.S)
        program = textwrap.dedent(program).replace("http://127.0.0.1:8000/v1", url)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, {})
        assert printed.getvalue() == "The capital of France is Paris.\n"

        asking = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        events = asking.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Count to 500."}], max_tokens=1000, stream=True
        )
        seen = 0
        with pytest.raises(APIError, match="the server is ending"):  # noqa: PT012
            for _ in events:
                seen += 1
                if seen == 3:
                    command.interrupt()
        assert command.finish() == 130
        said = command.stderr
    assert f"curl {url}/chat/completions" in said
    assert f'client = OpenAI(base_url="{url}", api_key="none")' in said
    assert "Traceback" not in said


def test_a_script_reads_where_it_is_and_the_printed_requests_work(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--json", "--name", "it's")
    with serving(tmp_path / "said", tiny_model, *options, TUNESMITH_API_KEY="k3y") as (command, line):
        place = json.loads(line)
        assert place["model"] == "it's"
        assert httpx.get(f"{place['url']}/models").status_code == 401
        command.interrupt()
        assert command.finish() == 130
        said = command.stderr
    assert 'api_key=os.environ["TUNESMITH_API_KEY"]' in said
    [curl] = re.findall("^curl .*$", said, re.M)
    body = subprocess.run(["sh", "-c", f"printf %s {curl.rpartition(' -d ')[2]}"], capture_output=True, check=True)
    assert json.loads(body.stdout)["model"] == "it's"
    assert json.loads(said.splitlines()[-1])["error"]["exit_code"] == 130
