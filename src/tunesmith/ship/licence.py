"""The licence of a tuned model, as far as files on this machine tell."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from tunesmith.errors import TunesmithError
from tunesmith.runs.record import Origin
from tunesmith.settings.coerce import FiniteLoader

HEADER = re.compile(r"\A\s*---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
DEMO_LICENCE = "apache-2.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Licence:
    """The hub's identifier of a licence, None where it isn't known; `name` and `link` go with "other"; `source` says in
    words where it was found."""

    identifier: str | None
    source: str
    name: str | None = None
    link: str | None = None


def licence_of(base: Origin, base_folder: str | None, chosen: str | None) -> Licence:
    """The `chosen` one, else what the base model's card says: the one in `base_folder`, or that in the hub's cache.

    Raises TunesmithError when `chosen` is no identifier of the hub's.
    """
    if chosen is not None:
        if not IDENTIFIER.fullmatch(chosen):
            raise TunesmithError(
                f"--license is {chosen!r}; write the hub's identifier, such as apache-2.0, mit or llama3.1 "
                "(https://huggingface.co/docs/hub/repositories-licenses)"
            )
        return Licence(identifier=chosen, source="as given")
    if base.kind == "demo":
        return Licence(identifier=DEMO_LICENCE, source="that of the base model")
    cards: list[Any] = [Path(base_folder) / "README.md"] if base_folder and Path(base_folder).is_dir() else []
    if base.kind == "hub":
        cards.append(try_to_load_from_cache(base.name, "README.md"))
    for card in cards:
        header = card_header(Path(card)) if isinstance(card, str | Path) else {}
        identifier = str(header.get("license")).lower()
        if isinstance(header.get("license"), str) and IDENTIFIER.fullmatch(identifier):
            name, link = (header.get(key) for key in ("license_name", "license_link"))
            other = identifier == "other"
            return Licence(
                identifier=identifier,
                source="that of the base model",
                name=str(name) if other and name else None,
                # a link within the base model's repository leads nowhere in another
                link=str(link) if other and str(link).startswith("https://") else None,
            )
    return Licence(identifier=None, source="not known here; that of the base model applies")


def card_header(card: Path) -> Mapping[str, Any]:
    """The YAML that a card begins with; empty where there is none, or none that can be read."""
    try:
        header = HEADER.match(card.read_text(encoding="utf-8-sig"))
        values = yaml.load(header[1], FiniteLoader) if header else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
