"""`tunesmith serve` listens where it may, says where, and ends with Ctrl-C."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import APIError, OpenAI
from typer.testing import CliRunner

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
def command(*arguments: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`tunesmith serve` as a process, and the first line of its stdout, which comes when it is ready."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TUNESMITH_API_KEY"} | env,
    )
    try:
        assert child.stdout is not None
        yield child, child.stdout.readline().strip()
    finally:
        child.kill()
        child.communicate()


@pytest.mark.slow
def test_the_command_serves_the_demo_model_until_ctrl_c() -> None:
    with command("demo") as (child, url):
        # The page's own program, asking where the command says.
        [program] = re.findall(r"^    from openai.*?^    print.*?\n", PAGE.read_text(encoding="utf-8"), re.M | re.S)
        program = textwrap.dedent(program).replace("http://127.0.0.1:8000/v1", url)
        printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        assert printed == "The capital of France is Paris.\n"

        asking = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        events = asking.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Count to 500."}], max_tokens=1000, stream=True
        )
        seen = 0
        with pytest.raises(APIError, match="the server is ending"):  # noqa: PT012
            for _ in events:
                seen += 1
                if seen == 3:
                    child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
        assert child.stderr is not None
        said = child.stderr.read()
    assert f"curl {url}/chat/completions" in said
    assert f'client = OpenAI(base_url="{url}", api_key="none")' in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_script_reads_where_it_is_and_the_printed_requests_work(tiny_model: Path) -> None:
    with command(str(tiny_model), "--json", "--name", "it's", TUNESMITH_API_KEY="k3y") as (child, line):
        place = json.loads(line)
        assert place["model"] == "it's"
        assert httpx.get(f"{place['url']}/models").status_code == 401
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
        assert child.stderr is not None
        said = child.stderr.read()
    assert 'api_key=os.environ["TUNESMITH_API_KEY"]' in said
    [curl] = re.findall("^curl .*$", said, re.M)
    body = subprocess.run(["sh", "-c", f"printf %s {curl.rpartition(' -d ')[2]}"], capture_output=True, check=True)
    assert json.loads(body.stdout)["model"] == "it's"
    assert json.loads(said.splitlines()[-1])["error"]["exit_code"] == 130
