"""`tunesmith doctor`: whether training works here, and how to mend what keeps it from working."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from tunesmith.doctor.finding import Finding
from tunesmith.doctor.hub_access import hub, scrubbed
from tunesmith.doctor.installed import demo_model, libraries, python, torch_build, versions
from tunesmith.doctor.kernels import bitsandbytes, flash_attention
from tunesmith.doctor.machine import accelerators, disks, memory, precision, processor
from tunesmith.terminal.output import finish

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 80
STYLES: dict[str, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}

Check = Callable[[], Iterable[Finding]]
CHECKS: dict[str, Check] = {
    "Python": python,
    "torch": torch_build,
    "libraries": libraries,
    "processor": processor,
    "GPU": accelerators,
    "precision": precision,
    "memory": memory,
    "disk": disks,
    "bitsandbytes": bitsandbytes,
    "FlashAttention": flash_attention,
    "demo model": demo_model,
    "hub": hub,
}


def doctor() -> None:
    """Look at this machine and what is installed, and say whether training works here.

    Exit code 1 when something keeps it from working. Example: tunesmith doctor --json
    """
    findings = list(examined(CHECKS))
    problems = sum(finding.mark == "problem" for finding in findings)
    found = {"problems": problems, "findings": [asdict(finding) for finding in findings], "versions": versions()}
    finish(found, lambda: _show(findings, problems))
    if problems:
        raise typer.Exit(1)


def examined(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """What each check found. One that fails is a finding itself, and the others go on."""
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # of whatever library or system the check asks
            missing = isinstance(error, ImportError)  # most often torch, of which another line tells
            yield Finding(
                name=name,
                mark="note",
                found=scrubbed(f"could not be looked at: {type(error).__name__}: {error}"),
                means="Nothing is known about it.",
                mend="mend what can't be imported, and look again"
                if missing
                else "look again; if it stays, this line is what to ask about",
            )


def _show(findings: Iterable[Finding], problems: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for finding in findings:
        table.add_row(Text(finding.mark, style=STYLES[finding.mark]), Text(finding.name), _text(finding))
    console = Console()
    console.print(table, width=max(WIDTH, console.width) if console.is_terminal else WIDTH)
    plural = "problem keeps" if problems == 1 else "problems keep"
    typer.echo(f"{problems} {plural} training from working." if problems else "Training works here.")


def _text(finding: Finding) -> "Text":
    """What is ok runs on in one paragraph; what is not has a line for each part."""
    from rich.text import Text

    if finding.mark == "ok":
        return Text.assemble(finding.found, ". ", (finding.means, "dim"))
    return Text.assemble(finding.found, "\n", finding.means, "\n", (f"mend: {finding.mend}", "dim"))
