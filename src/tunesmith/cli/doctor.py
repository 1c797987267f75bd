"""`tunesmith doctor`: whether training works here, and how to fix what keeps it from working."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from tunesmith.terminal.output import finish
from tunesmith.text import counted, verb

if TYPE_CHECKING:
    from tunesmith.doctor.checks import Finding

WIDTH = 80
STYLES: dict[str, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor() -> None:
    """Say whether training works here.

    Looks at this machine and at what is installed. Exit code 1 when something keeps it from working.
    Example: tunesmith doctor --json
    """
    from tunesmith.doctor.checks import CHECKS, examined, versions

    findings = list(examined(CHECKS))
    problems = sum(finding.mark == "problem" for finding in findings)
    report = {"problems": problems, "findings": [asdict(finding) for finding in findings], "versions": versions()}
    finish(report, lambda: _show(findings, problems))
    if problems:
        raise typer.Exit(1)


def _show(findings: "Iterable[Finding]", problems: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for finding in findings:
        text = Text.assemble(finding.found, ". ", (finding.means, "dim"))
        if finding.mark != "ok":  # which has a line for each part
            text = Text.assemble(finding.found, "\n", finding.means, "\n", (f"to fix it: {finding.mend}", "dim"))
        table.add_row(Text(finding.mark, style=STYLES[finding.mark]), Text(finding.name), text)
    console = Console()
    console.print(table, width=max(WIDTH, console.width) if console.is_terminal else WIDTH)
    keep = f"{counted(problems, 'problem')} {verb(problems, 'keeps', 'keep')}"
    typer.echo(f"{keep} training from working." if problems else "Training works here.")
