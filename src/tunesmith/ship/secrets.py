"""What must not leave the machine: tokens, keys and passwords, wherever a text repeats them."""

import os
import re
from collections.abc import Iterable

HIDDEN = "<secret>"
SECRET_NAME = re.compile(r"(TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
SHORTEST = 8
"""Shorter values of such variables are words like "true", which texts may hold by chance."""
HUB_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}\b")


def known_secrets() -> tuple[str, ...]:
    """The values of environment variables that by their names hold a token, a key or a password; the longest first."""
    values = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return tuple(sorted(values, key=lambda value: (-len(value), value)))


def scrub(text: str, secrets: Iterable[str]) -> str:
    """`text` without `secrets`, and without anything that has the form of a hub token."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return HUB_TOKEN.sub(HIDDEN, text)
