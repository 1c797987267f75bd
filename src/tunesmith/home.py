"""The folder where tunesmith keeps what it can make again: the converted demo model and other caches."""

import os
import re
from pathlib import Path

from tunesmith.errors import TunesmithError

DEMO = "demo"
"""The name that users write for the demo model."""
DEMO_FOLDER = re.compile(rf"(^|[\\/]){DEMO}-[0-9a-f]{{12}}-v\d+$")
"""The demo model's folder in this cache, on whatever machine."""


def home() -> Path:
    """`$TUNESMITH_HOME`, else `$XDG_CACHE_HOME/tunesmith`, else `~/.cache/tunesmith`; absolute, not created.

    An empty variable counts as unset, and a relative `XDG_CACHE_HOME` is ignored, both as the
    XDG Base Directory Specification says. Raises `TunesmithError` where the user has no home folder.
    """
    try:
        if own := os.environ.get("TUNESMITH_HOME"):
            return Path(own).expanduser().absolute()
        if (shared := os.environ.get("XDG_CACHE_HOME")) and Path(shared).is_absolute():
            return Path(shared) / "tunesmith"
        return Path.home() / ".cache" / "tunesmith"
    except RuntimeError as error:
        raise TunesmithError(
            f"There is no home folder to keep the cache in ({error}). "
            "Set the environment variable TUNESMITH_HOME to a folder that you can write."
        ) from error
