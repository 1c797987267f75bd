"""`tunesmith report`: how a run went, or several beside each other, as a page to look at."""

from typing import Annotated

import typer

from tunesmith.cli.complete import runs as runs_here
from tunesmith.runs.files import COMPARISON, REPORT
from tunesmith.terminal.output import finish_lines
from tunesmith.text import size


def report(
    runs: Annotated[
        list[str],
        typer.Argument(help="The folder of a run; several are compared.", metavar="RUN...", autocompletion=runs_here),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            help=f"The file to write. Without it: {REPORT} in the run's folder, {COMPARISON} in the first of several."
        ),
    ] = None,
) -> None:
    """Write a page about a run, or about several.

    One HTML file, which needs nothing from elsewhere.
    Example: tunesmith report runs/first runs/second --output both.html
    """
    from tunesmith.report.run_html import write_report  # with NumPy

    path = write_report(runs, output)
    count = path.stat().st_size
    finish_lines(
        {"runs": runs, "report": str(path), "bytes": count},
        [f"wrote {path} ({size(count)}); open it in a browser"],
    )
