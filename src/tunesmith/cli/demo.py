"""`tunesmith demo`: fine-tune a real model on a task whose success can be counted, and show the difference."""

import time
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.errors import TunesmithError
from tunesmith.runs.files import check_writable
from tunesmith.terminal.output import finish, finish_lines, progress_console
from tunesmith.text import duration

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.demo import preferences
    from tunesmith.demo.orders import Row
    from tunesmith.demo.run import Outcome
    from tunesmith.evaluate.scores import Estimate


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    export_data: Annotated[
        Path | None, typer.Option(help="Write the demo's data into this folder and stop.", show_default=False)
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of the e-mails, the first weights of adapters, and the order of training."),
    ] = 1,
    preferences: Annotated[
        bool,
        typer.Option("--preferences", help="Fine-tune shortly, then learn from the model's own mistakes with DPO."),
    ] = False,
) -> None:
    """Fine-tune the demo model, and compare before and after.

    It answers order e-mails. Takes two to four minutes on two CPU cores, with --preferences longer.
    Example: tunesmith demo --output runs/demo
    """
    if export_data is not None and preferences:
        raise TunesmithError("--export-data writes data and stops, and --preferences trains; leave one of them out")
    check_writable(export_data or output)
    if export_data is not None:
        from tunesmith.demo.orders import export

        paths = list(export(export_data, seed))
        finish_lines({"files": paths}, [f"Wrote {path}" for path in paths])
        return
    started, console = time.perf_counter(), progress_console()
    console.print("[bold]Task[/]: an order e-mail in, strict JSON out: customer, items, date.")
    console.print("Loading the demo model, SmolLM2-135M-Instruct, and the libraries ...")
    if preferences:
        _preferences(output, console, seed, started)
        return
    from tunesmith.demo.run import run

    outcome = run(output, console, seed)
    seconds = time.perf_counter() - started
    about = {"output": str(output), "seed": seed, "held_out": len(outcome.held_out), "seconds": seconds}
    scores = {"before": outcome.before.shares(), "after": outcome.after.shares()}
    finish(about | scores, lambda: _show(outcome))
    console.print(f"\nTrained on {outcome.trained} e-mails in {output}; everything took {duration(seconds)}.")
    if outcome.report is not None:
        console.print(f"How it went: {outcome.report}", highlight=False, soft_wrap=True)
    system, mail = (message["content"].replace("\n", " ") for message in outcome.held_out[0]["messages"][:2])
    console.print("\nNext:")
    for command in (
        f"tunesmith chat {output} --system {quote(system)} --prompt {quote(mail)}",
        "tunesmith demo --export-data data/orders",
        "tunesmith train --model demo --data data/orders/train.jsonl --lora r=16 --output runs/mine",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)


def _preferences(output: Path, console: "Console", seed: int, started: float) -> None:
    from tunesmith.demo.preferences import run_preferences

    outcome = run_preferences(output, console, seed)
    seconds = time.perf_counter() - started
    about = {"output": str(output), "seed": seed, "held_out": len(outcome.held_out), "seconds": seconds}
    counts = {"supervised": outcome.supervised, "answered": outcome.answered, "pairs": outcome.pairs}
    scores = {
        result.metric.name: [asdict(share) for share in (result.base, result.tuned) if share is not None]
        for result in outcome.results
    }
    finish(about | counts | {"scores": scores}, lambda: _show_preferences(outcome))
    console.print(f"\nThe runs are in {output}; everything took {duration(seconds)}.")
    if outcome.report is not None:
        console.print(f"How DPO went: {outcome.report}", highlight=False, soft_wrap=True)


def _show_preferences(outcome: "preferences.Outcome") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"\n{len(outcome.held_out)} held-out e-mails: other names, items and phrasings than in training",
        highlight=False,
    )
    table = Table("")
    for name in ("after supervised fine-tuning", "after DPO", "difference"):
        table.add_column(name, justify="right")
    for result in outcome.results:
        table.add_row(result.metric.name, *map(_interval, (result.base, result.tuned, result.difference)))
    console.print(table)
    answered = zip(outcome.held_out, outcome.before.answers, outcome.after.answers, strict=True)
    examples = [(row, old, new) for row, old, new in answered if old != new]
    if examples:
        _show_examples("Answers that have changed", examples[:3])


def _interval(estimate: "Estimate | None") -> str:
    """A share with its 95% interval."""
    assert estimate is not None
    return f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"


def _show(outcome: "Outcome") -> None:
    from rich.console import Console
    from rich.table import Table

    console, before, after = Console(), outcome.before, outcome.after
    # Not the table's title, which would be broken into lines as wide as the table.
    title = f"\n{len(outcome.held_out)} held-out e-mails: other names, items and phrasings than in training"
    console.print(title, highlight=False)
    table = Table("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for name, old, new in (
        ("exactly right", before.exactly_right, after.exactly_right),
        ("valid JSON of an order", before.valid_json, after.valid_json),
    ):
        table.add_row(name, f"{old:.0%}", f"[bold green]{new:.0%}[/]")
    console.print(table)
    examples = list(zip(outcome.held_out, before.answers, after.answers, strict=True))
    _show_examples("Three of them", examples[:3])


def _show_examples(title: str, examples: "list[tuple[Row, str, str]]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_lines=True)
    for name in ("e-mail", "before", "after"):
        table.add_column(name, overflow="fold", ratio=1)
    for row, *answers in examples:
        # Model output is text, not markup: a "[" in it must not style the table.
        table.add_row(*map(Text, (row["messages"][1]["content"], *answers)))
    Console().print(table)
