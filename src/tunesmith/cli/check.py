"""`tunesmith check`: what training would find in the data, before any weight is loaded."""

from typing import TYPE_CHECKING

import typer

from tunesmith.cli.data import data_recipe, eval_rows, preparer_of, training_rows
from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import finish
from tunesmith.text import counted, printable

if TYPE_CHECKING:
    from tunesmith.data.preflight import Preflight, SplitReport
    from tunesmith.settings.recipe import Recipe

USAGE = "[RECIPE.yaml] [--json] [--SETTING VALUE]..."
HELP = """Look at the data as training would, and say what is odd or wrong with it.

Only the tokenizer is loaded. Exit code 2 when training would stop here.

[bold]tunesmith check recipe.yaml --json[/bold]
"""
BAR = 30


def check(ctx: typer.Context) -> None:
    """Look at the data as training would."""
    preflight = _examined(data_recipe(ctx.args))
    finish(preflight.as_json(), lambda: _show(preflight))
    if preflight.problems:
        raise typer.Exit(2)


def _examined(recipe: "Recipe") -> "Preflight":
    """All of a recipe's data, prepared and looked at as `SFTTrainer` does."""
    from tunesmith.data.samplers import check_fit

    rows, held_out = training_rows(recipe), eval_rows(recipe)
    preparer = preparer_of(recipe)
    train, evaluated = preparer.everything(rows, held_out)
    preflight = preparer.preflight()
    try:
        check_fit(recipe.config, train, evaluated)
    except TunesmithError as error:
        preflight.problems.append(str(error))
    return preflight


def _show(preflight: "Preflight") -> None:
    """The report as text: what was read, lengths, then problems and notes."""
    for name, report in preflight.splits.items():
        for line in split_lines(name, report):
            typer.echo(printable(line))
    for problem in preflight.problems:
        typer.secho(printable(f"stop: {problem}"), fg=typer.colors.RED)
    for text in preflight.notes:
        typer.echo(printable(f"note: {text}"))
    if not preflight.problems:
        typer.echo("ready to train" + ("" if preflight.notes else "; nothing odd found"))


def split_lines(name: str, report: "SplitReport") -> list[str]:
    """The counts of a split, and its lengths as bars."""
    counts = report.counts
    lines = [
        f"{name}: {counted(counts.rows, 'row')}, {counted(counts.examples, 'example')}, "
        f"{counted(counts.tokens, 'token')}, "
        f"{counts.supervised:,} supervised ({report.supervised_share:.0%}), longest {report.longest:,}"
    ]
    most = max((count for _, _, count in report.lengths), default=1)
    for low, high, count in report.lengths:
        bar = "#" * max(1, round(BAR * count / most))
        lines.append(f"  {low:>6,} to {high:>6,} tokens  {bar:<{BAR}} {count:,}")
    return lines
