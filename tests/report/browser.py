"""A page in headless Chromium: what it looks like, what it says on the console, what became of it."""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
MISSING = f"no {CHROMIUM} (the Debian package chromium)"
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


@dataclass(frozen=True, kw_only=True)
class Measured:
    """In pixels: `needed` is the width that the page takes, more than it was given where something sticks out;
    `smallest` is the height of the smallest text in its curves."""

    needed: int
    smallest: int
    background: str


FRAMES = """<!doctype html>
<style>body {{ margin: 0 }} iframe {{ height: 900px; border: 0; display: block }}</style>
{frames}
<script>
addEventListener("load", () => {{
  document.title = Array.from(document.querySelectorAll("iframe"), frame => {{
    const page = frame.contentDocument;
    const texts = Array.from(page.querySelectorAll("svg:not(.still) text"));
    const heights = texts.map(text => text.getBoundingClientRect().height);
    const found = [page.documentElement.scrollWidth, Math.floor(Math.min(...heights))];
    return found.join(" ") + " " + getComputedStyle(page.body).backgroundColor;
  }}).join("; ");
}});
</script>
"""
FRAME = '<iframe src="{page}" style="width: {width}px"></iframe>'


def look(page: Path, folder: Path, *, size: str = "1200,2400", dark: bool = False) -> Seen:
    """Loads the file `page`; `folder` takes the browser's files. Skips the test where there is no browser."""
    needs_browser()
    picture = folder / f"{page.stem}{'-dark' if dark else ''}.png"
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={size}", *_scheme(dark)]
    seen = _run([*flags, "--dump-dom", f"--screenshot={picture}", page.as_uri()])
    console = [line for line in seen.stderr.splitlines() if re.search(r":CONSOLE[:(]", line)]
    return Seen(dom=seen.stdout, console=console, picture=picture)


def measured(page: Path, folder: Path, *, widths: Sequence[int], dark: bool = False) -> list[Measured]:
    """Lays the file `page` out in frames of `widths`, in pixels: no window of the browser gets as narrow as a phone."""
    needs_browser()
    file = folder / "frames.html"
    frames = "\n".join(FRAME.format(width=width, page=page.as_uri()) for width in widths)
    file.write_text(FRAMES.format(frames=frames), encoding="utf-8")
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", *_scheme(dark)]
    dumped = _run([*flags, "--allow-file-access-from-files", "--dump-dom", file.as_uri()])
    title = re.search("<title>([^<]+)</title>", dumped.stdout)
    assert title, dumped.stdout + dumped.stderr
    parts = [part.split(" ", 2) for part in title[1].split("; ")]
    return [Measured(needed=int(needed), smallest=int(smallest), background=rest) for needed, smallest, rest in parts]


ASKED = """<!doctype html>
<iframe src="{page}" style="width: 1000px; height: 900px"></iframe>
<script>
addEventListener("load", () => {{
  const frame = document.querySelector("iframe").contentWindow, page = frame.document;
  document.title = (() => {{ {script} }})();
}});
</script>
"""


def asked(page: Path, folder: Path, script: str) -> str:
    """What `script`, the body of a function, returns of the file `page`, its `page` in a `frame`."""
    needs_browser()
    file = folder / "asked.html"
    file.write_text(ASKED.format(page=page.as_uri(), script=script), encoding="utf-8")
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
    dumped = _run([*flags, "--allow-file-access-from-files", "--dump-dom", file.as_uri()])
    title = re.search("<title>([^<]+)</title>", dumped.stdout)
    assert title, dumped.stdout + dumped.stderr
    return title[1]


def needs_browser() -> None:
    """Where a build server forgets the browser, the tests say so; elsewhere they can do without."""
    if CHROMIUM.exists():
        return
    if os.environ.get("CI"):
        pytest.fail(MISSING)
    pytest.skip(MISSING)


def _scheme(dark: bool) -> list[str]:
    return ["--blink-settings=preferredColorScheme=0"] if dark else []


def _run(flags: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(CHROMIUM), *flags], capture_output=True, text=True, timeout=120, check=True)
