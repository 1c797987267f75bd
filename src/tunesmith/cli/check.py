"""`tunesmith check`: what training would find in the data, before any weight is loaded."""

from typing import TYPE_CHECKING

import typer

from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import finish, note

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
    """Look at the data as training would, and say what is odd or wrong with it."""
    from tunesmith.cli.inspect import SAME_DATA
    from tunesmith.settings.recipe import parse_options, resolve

    path, overrides = parse_options(ctx.args)
    for alias in ("output", "output_dir"):
        overrides.pop(alias, None)
    preflight = examined(resolve(path, overrides | SAME_DATA))
    finish(preflight.as_json(), lambda: show(preflight))
    if preflight.problems:
        raise typer.Exit(2)


def examined(recipe: "Recipe") -> "Preflight":
    """All of a recipe's data, prepared and looked at as `SFTTrainer` does."""
    from tunesmith.cli.rows import eval_rows, training_rows
    from tunesmith.data.dataset import DataPreparer
    from tunesmith.data.samplers import check_fit
    from tunesmith.model.load import resolve_model
    from tunesmith.train.setup import prepare_tokenizer

    rows, held_out = training_rows(recipe), eval_rows(recipe)
    resolve_model(recipe.model, note)
    tokenizer, _ = prepare_tokenizer(None, recipe.model, recipe.config)
    preparer = DataPreparer(recipe.config, tokenizer, None)
    train, evaluated = preparer.everything(rows, held_out)
    preflight = preparer.preflight()
    try:
        check_fit(recipe.config, train, evaluated)
    except TunesmithError as error:
        preflight.problems.append(str(error))
    return preflight


def show(preflight: "Preflight") -> None:
    """The report as text: what was read, lengths, then problems and notes."""
    for name, report in preflight.splits.items():
        for line in lines(name, report):
            typer.echo(line)
    for problem in preflight.problems:
        typer.secho(f"stop: {problem}", fg=typer.colors.RED)
    for text in preflight.notes:
        typer.echo(f"note: {text}")
    if not preflight.problems:
        typer.echo("ready to train" + ("" if preflight.notes else "; nothing odd found"))


def lines(name: str, report: "SplitReport") -> list[str]:
    from tunesmith.text import counted

    counts = report.counts
    share = report.supervised_share
    found = [
        f"{name}: {counted(counts.rows, 'row')}, {counted(counts.examples, 'example')}, "
        f"{counted(counts.tokens, 'token')}, "
        f"{counts.supervised:,} supervised ({share:.0%}), longest {report.longest:,}"
    ]
    most = max((count for _, _, count in report.lengths), default=1)
    for low, high, count in report.lengths:
        bar = "#" * max(1, round(BAR * count / most))
        found.append(f"  {low:>6,} to {high:>6,} tokens  {bar:<{BAR}} {count:,}")
    return found
