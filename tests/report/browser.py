"""A page in headless Chromium: what it looks like, what it says on the console, what became of it."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--disable-extensions", "--hide-scrollbars"),
    *("--enable-logging=stderr", "--virtual-time-budget=3000"),
)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """`dom` is the page after its scripts, had it any, have run."""

    dom: str
    console: list[str]
    picture: Path


def look(page: Path, folder: Path, *, size: str = "1200,2400", dark: bool = False) -> Seen:
    """Loads the file `page`; `folder` takes the browser's files. Skips the test where there is no browser."""
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM} (the Debian package chromium)")
    picture = folder / f"{page.stem}{'-dark' if dark else ''}.png"
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={size}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    dumped = _run([*flags, "--dump-dom", page.as_uri()])
    shot = _run([*flags, f"--screenshot={picture}", page.as_uri()])
    console = [line for line in (dumped.stderr + shot.stderr).splitlines() if re.search(r":CONSOLE[:(]", line)]
    return Seen(dom=dumped.stdout, console=console, picture=picture)


def _run(flags: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(CHROMIUM), *flags], capture_output=True, text=True, timeout=120, check=True)
