"""What `tunesmith doctor` asks the Hugging Face hub: whether it answers, and as whom."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

from tunesmith.doctor.finding import Finding

TIMEOUT = 3.0
"""Seconds for each request."""
LOGIN = "hf auth login, or set HF_TOKEN"


def hub() -> Iterator[Finding]:
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
            found=scrubbed(f"{endpoint} does not answer: {status}"),
            means="Models and data on it can't be downloaded, nor runs pushed; folders and files here work.",
            mend="look at the connection and HTTPS_PROXY; HF_ENDPOINT names a mirror",
        )
        return
    yield Finding(name="hub", mark="ok", found=f"{endpoint} answers", means="Models and data can come from it.")
    yield _account(endpoint, get_token())


def _account(endpoint: str, token: str | None) -> Finding:
    name = "hub token"
    if token is None:
        return Finding(
            name=name,
            mark="note",
            found="none",
            means="Public models and data work; gated and private ones don't, nor does `tunesmith push`.",
            mend=LOGIN,
        )
    status, body = _answer("GET", f"{endpoint}/api/whoami-v2", token)
    if status == 200:
        owner = scrubbed(str(body.get("name")), token)
        means = "Gated and private names of this account work, and `tunesmith push` if the token may write."
        return Finding(name=name, mark="ok", found=f"of {owner}", means=means)
    if status in (401, 403):
        return Finding(
            name=name,
            mark="note",
            found="the hub does not accept it",
            means="With a token that is refused even public names may fail.",
            mend=f"{LOGIN} to another one",
        )
    return Finding(
        name=name,
        mark="note",
        found=scrubbed(f"whose it is can't be asked: {status}", token),
        means="Whether gated and private names and `tunesmith push` work is not known.",
        mend="ask again later: the hub answers, but not to this",
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


def scrubbed(text: str, *secrets: str) -> str:
    """Without tokens."""
    from tunesmith.secrets import known_secrets, scrub

    return scrub(text, [*secrets, *known_secrets()])
