"""Draws the pictures of the pages.

    python docs/pictures.py RUN docs/images/live.svg

The view of `tunesmith train` in the middle of the run in the folder RUN, from the numbers that it wrote of each step.
"""

import io
import json
import re
import sys
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from tunesmith.train.live import RunView, Snapshot

COLUMNS = 84
SHARE = 0.7
"""How far the run is in the picture."""
FRAME = re.sub(r"@font-face \{\{.*?\}\}|<!--.*?-->", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""rich's, without the fonts that it has from elsewhere: the reader's own do."""


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
    picture.parent.mkdir(parents=True, exist_ok=True)
    drawn = console.export_svg(title="tunesmith train recipe.yaml", code_format=FRAME)
    picture.write_text("".join(f"{line.rstrip()}\n" for line in drawn.splitlines() if line.strip()), encoding="utf-8")


if __name__ == "__main__":
    draw_live(Path(sys.argv[1]), Path(sys.argv[2]))
