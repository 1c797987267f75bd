"""What must not leave the machine: tokens, keys and passwords, wherever a text repeats them."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "<secret>"
SECRET_NAME = re.compile(r"(TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
SHORTEST = 8
"""Shorter values of such variables are words like "true", which texts may hold by chance."""
ARGUMENT = re.compile(
    r"((use_|auth_|access_|hub_|hf_|api_)*token|.*(api_?key|access_?key|secret|password|credentials?))", re.I
)
"""Names of arguments that hold one; a `bos_token` is none."""
LOGIN = re.compile(r"(?<=://)[^/@\s:]*:[^/@\s]+(?=@)")
"""Of an address."""
HUB_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}\b")


def known_secrets() -> tuple[str, ...]:
    """The values of environment variables that by their names hold a token, a key or a password; the longest first."""
    values = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return tuple(sorted(values, key=lambda value: (-len(value), value)))


def scrub(text: str, secrets: Iterable[str]) -> str:
    """`text` without `secrets`, and without anything that has the form of a hub token or of a login in an address."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return LOGIN.sub(HIDDEN, HUB_TOKEN.sub(HIDDEN, text))


def without_secrets(value: Any) -> Any:
    """Settings without the arguments, at any depth, whose names say that they hold one."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items() if not ARGUMENT.fullmatch(str(key))}
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value
