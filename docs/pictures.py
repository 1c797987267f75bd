"""Draws the pictures of the pages.

    python docs/pictures.py RUN docs/images/live.svg
    python docs/pictures.py RUN docs/images/report.png
    python docs/pictures.py ROWS docs/images/inspect.svg

The first is the view of `tunesmith train` in the middle of the run in the folder RUN, from the numbers that it wrote of
each step. The second is the top of its report in Chromium, the Debian package. The third is what `tunesmith inspect`
shows of the first row of the file ROWS. `tunesmith demo` leaves a good run, `tunesmith demo --export-data` good rows.
"""

import io
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from tunesmith.cli.data import data_recipe
from tunesmith.cli.inspect import prepared
from tunesmith.report.inspect import legend, terminal
from tunesmith.report.run_html import write_report
from tunesmith.terminal.live import RunView, Snapshot

COLUMNS = 84
INSPECTED = 100
"""Columns of the picture of `tunesmith inspect`."""
SHARE = 0.7
"""How far the run is in the picture."""
FRAME = re.sub(r"@font-face \{\{.*?\}\}|<!--.*?-->", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""rich's, without the fonts that it has from elsewhere: the reader's own do."""
CHROMIUM = "/usr/bin/chromium"
PAGE = (1080, 1420)
"""Pixels of the report that are shown, (width, height)."""


def draw_live(run: Path, picture: Path) -> None:
    """Writes `picture`, an SVG, of the run in the folder `run`."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line.get("loss") is not None]
    shown = steps[: max(1, round(SHARE * len(steps)))]
    last = shown[-1]
    now = Snapshot(output=f"runs/{run.name}", total=steps[-1]["step"], epochs=round(steps[-1]["epoch"]))
    now.step, now.epoch, now.began = last["step"], last["epoch"], time.perf_counter() - last["seconds"]
    now.left = last["seconds"] / last["step"] * (now.total - now.step)
    for line in shown:
        now.take(line)
    now.events += [line["event"] for line in lines if "event" in line and line["step"] <= last["step"]]
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(RunView(now))
    write_terminal(console, "tunesmith train recipe.yaml", picture)


def draw_inspect(rows: Path, picture: Path) -> None:
    """Writes `picture`, an SVG: the tokens of the first of `rows`, and which of them are trained on."""
    recipe = data_recipe(["--model", "demo", "--data", str(rows), "--train-on", "assistant"])
    _, shown = prepared(recipe, 1, None)
    console = Console(record=True, width=INSPECTED, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for text in (legend(plain=False), *(terminal(row, plain=False, ids=False) for row in shown)):
        console.print(text)
    write_terminal(console, "tunesmith inspect recipe.yaml --row 1", picture)


def write_terminal(console: Console, title: str, picture: Path) -> None:
    """Writes `picture`, an SVG of what was printed to `console`."""
    drawn = console.export_svg(title=title, code_format=FRAME)
    picture.write_text("".join(f"{line.rstrip()}\n" for line in drawn.splitlines() if line.strip()), encoding="utf-8")


def draw_report(run: Path, picture: Path) -> None:
    """Writes `picture`, a PNG, of the report of the run in the folder `run`."""
    with tempfile.TemporaryDirectory() as folder:
        page = write_report([str(run)], str(Path(folder) / "report.html"))
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        size = f"--window-size={PAGE[0]},{PAGE[1]}"
        command = [CHROMIUM, *flags, size, f"--screenshot={picture.absolute()}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    source, wanted = Path(sys.argv[1]), Path(sys.argv[2])
    wanted.parent.mkdir(parents=True, exist_ok=True)
    draw = draw_report if wanted.suffix == ".png" else draw_inspect if source.is_file() else draw_live
    draw(source, wanted)
