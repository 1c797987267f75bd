"""`tunesmith doctor`: whether training works here, and how to mend what keeps it from working."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from threading import Thread
from typing import Any

import typer

from tunesmith.cli import checks
from tunesmith.cli.checks import Finding
from tunesmith.cli.output import finish

WIDTH = 80
TIMEOUT = 3.0
"""Seconds for each request to the hub."""
STYLES: dict[str, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}


Check = Callable[[], Iterable[Finding]]


def doctor() -> None:
    """Look at this machine and what is installed, and say whether training works here.

    Exit code 1 when something keeps it from working. Example: tunesmith doctor --json
    """
    findings = list(examined(CHECKS))
    problems = sum(finding.mark == "problem" for finding in findings)
    found = {"problems": problems, "findings": [asdict(finding) for finding in findings]}
    finish(found, lambda: _show(findings, problems))
    if problems:
        raise typer.Exit(1)


def examined(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """What each check found. One that fails is a finding itself, and the others go on."""
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # of whatever library or system the check asks
            text = f"could not be looked at: {type(error).__name__}: {error}"
            yield Finding(name=name, mark="note", found=_scrubbed(text), means="Nothing is known about it.")


def _show(findings: Iterable[Finding], problems: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for finding in findings:
        text = Text(finding.found)
        for label, more in (("", finding.means), ("mend: ", finding.mend)):
            text.append(f"\n{label}{more}" if more else "", style="" if label else "dim")
        table.add_row(Text(finding.mark, style=STYLES[finding.mark]), Text(finding.name), text)
    console = Console()
    console.print(table, width=max(WIDTH, console.width) if console.is_terminal else WIDTH)
    plural = "problem keeps" if problems == 1 else "problems keep"
    typer.echo(f"{problems} {plural} training from working." if problems else "Training works here.")


# The hub


def hub() -> Iterator[Finding]:
    """Whether the hub answers, and as whom."""
    from huggingface_hub import constants, get_token

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        yield Finding(
            name="hub",
            mark="note",
            found="HF_HUB_OFFLINE is set: nothing is asked of it",
            means="Names on the hub work only where their files are in its cache already.",
            mend="unset HF_HUB_OFFLINE to download and to push",
        )
        return
    status, _ = _answer("HEAD", endpoint)
    if not isinstance(status, int) or status >= 500:
        yield Finding(
            name="hub",
            mark="note",
            found=_scrubbed(f"{endpoint} does not answer: {status}"),
            means="Models and data on it can't be downloaded, nor runs pushed; folders and files here work.",
            mend="look at the connection and HTTPS_PROXY; HF_ENDPOINT names a mirror",
        )
        return
    yield Finding(name="hub", mark="ok", found=f"{endpoint} answers")
    yield _account(endpoint, get_token())


def _account(endpoint: str, token: str | None) -> Finding:
    if token is None:
        return Finding(
            name="hub token",
            mark="note",
            found="none",
            means="Public models and data work; gated and private ones don't, nor does `tunesmith push`.",
            mend="hf auth login, or set HF_TOKEN",
        )
    status, body = _answer("GET", f"{endpoint}/api/whoami-v2", token)
    if status == 200:
        return Finding(name="hub token", mark="ok", found=f"of {_scrubbed(str(body.get('name')), token)}")
    refused = status in (401, 403)
    return Finding(
        name="hub token",
        mark="note",
        found="the hub does not accept it" if refused else _scrubbed(f"whose it is can't be asked: {status}", token),
        means="With a token that is refused even public names may fail." if refused else "",
        mend="hf auth login, or set HF_TOKEN to another one" if refused else "",
    )


def _answer(method: str, url: str, token: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The status and the JSON of an answer; in place of the status why there is none. In a thread of its own, for
    looking up a name knows no time limit."""
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    found: list[tuple[Any, dict[str, Any]]] = []

    def ask() -> None:
        try:
            headers = build_hf_headers(token=token or False)
            answer = get_session().request(method, url, headers=headers, timeout=TIMEOUT, follow_redirects=True)
            body = answer.json() if method == "GET" and answer.status_code == 200 else {}
            found.append((answer.status_code, body if isinstance(body, dict) else {}))
        except Exception as error:  # of the client's own kinds, and of its versions
            found.append((f"{type(error).__name__}: {error}", {}))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * TIMEOUT)
    return found[0] if found else (f"nothing came within {2 * TIMEOUT:g} seconds", {})


def _scrubbed(text: str, *secrets: str) -> str:
    from tunesmith.ship.secrets import known_secrets, scrub

    return scrub(text, [*secrets, *known_secrets()])


CHECKS: dict[str, Check] = {
    "Python": checks.python,
    "torch": checks.torch_build,
    "libraries": checks.libraries,
    "processor": checks.processor,
    "GPU": checks.accelerators,
    "precision": checks.precision,
    "memory": checks.memory,
    "disk": checks.disks,
    "bitsandbytes": checks.bitsandbytes,
    "FlashAttention": checks.flash_attention,
    "demo model": checks.demo_model,
    "hub": hub,
}
