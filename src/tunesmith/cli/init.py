"""`tunesmith init`: from a file of rows to a recipe that fits them and this machine."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.errors import TunesmithError, nearest
from tunesmith.init.interview import Options, confirm, facts_of
from tunesmith.runs.files import check_writable
from tunesmith.terminal.output import finish, mode, say
from tunesmith.text import counted

if TYPE_CHECKING:
    from tunesmith.init.advice import Facts
    from tunesmith.init.recipe_text import Section

SUFFIXES = (".yaml", ".yml")


def init(
    recipe: Annotated[Path, typer.Argument(help="The file to write.", metavar="[RECIPE.yaml]")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="A name on the hub, a folder, or demo.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="The rows: a file, a folder, or a name on the hub; repeatable.")
    ] = None,
    goal: Annotated[
        str | None, typer.Option(help="chat | instruct | classify | tools | json | continue | dpo | kto.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="lora | full | 8bit | 4bit.")] = None,
    output: Annotated[str | None, typer.Option(help="The folder of the run.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Our column names to yours, e.g. instruction=question,output=answer.")
    ] = None,
    chat_template_path: Annotated[
        str | None, typer.Option(help="A chat template for a model without one: chatml, ..., or a .jinja file.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; take defaults.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Ask nothing; print what was found and set as JSON.")] = False,
) -> None:
    """Write a recipe that fits your rows and this machine.

    Each line has its reason. Asks what the options leave out. Example: tunesmith init recipe.yaml --data rows.jsonl
    """
    from tunesmith.cli.data import SAME_DATA
    from tunesmith.init.recipe_text import sections, values
    from tunesmith.settings.recipe import resolve

    _check(recipe, force, goal, method)
    options = Options(
        recipe=recipe,
        model=model,
        data=tuple(data or ()),
        goal=goal,
        method=method,
        output=output,
        columns=columns,
        template=chat_template_path,
        asks=not yes and not as_json and sys.stdin.isatty() and sys.stdout.isatty(),
    )
    if not options.asks and not yes:
        say("there is no terminal to ask at: what the options leave out has its default")
    facts, notes = facts_of(options)
    written = sections(facts)
    settings = values(written)
    # Whatever `tunesmith train` would refuse is refused now.
    resolve(None, {name: value for name, value in settings.items() if name != "output"} | SAME_DATA)
    _write(options, facts, written)
    finish(_as_json(options, facts, settings, notes), lambda: _show(options, facts, notes))


def _check(path: Path, force: bool, goal: str | None, method: str | None) -> None:
    from tunesmith.init.advice import GOALS, METHODS

    if path.suffix not in SUFFIXES:
        raise TunesmithError(f"{path} is no name for a recipe, which ends in .yaml; rows are given as --data {path}")
    if path.is_dir():
        raise TunesmithError(f"{path} is a folder; give the file to write")
    if path.exists() and not force:
        raise TunesmithError(f"{path} is there already; --force writes over it, or give another name")
    if not path.parent.is_dir():
        raise TunesmithError(f"{path} can't be written: there is no folder {path.parent}; make it first")
    check_writable(path.parent, str(path))
    for name, value, known in (("--goal", goal, list(GOALS)), ("--method", method, list(METHODS))):
        if value is not None and value not in known:
            raise TunesmithError(f"{name} {value}: choose {' | '.join(known)}{nearest(value, known)}")


def _write(options: Options, facts: "Facts", sections: list["Section"]) -> None:
    from tunesmith.init.recipe_text import heading, write

    text = write(heading(facts, shlex.quote(str(options.recipe))), sections)
    if options.asks:
        typer.echo(f"\n{text}")
        if not confirm(f"Write {options.recipe}?"):
            typer.echo("nothing was written")
            raise typer.Exit
    try:
        options.recipe.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise TunesmithError(f"{options.recipe} can't be written: {error.strerror}") from error


def _show(options: Options, facts: "Facts", notes: Sequence[str]) -> None:
    from tunesmith.init.advice import schedule

    lengths, fit, steps = facts.lengths, facts.fit, schedule(facts)
    about = "about " if lengths.sampled else ""
    say(
        f"lengths in tokens: half up to {lengths.share(0.5):,}, 99% up to {lengths.share(0.99):,}, the longest "
        f"{lengths.longest:,}; {lengths.supervised:.0%} of them are trained on"
    )
    size, what = steps.micro * steps.accumulation, "pack" if steps.packing else "row"
    say(
        f"{about}{counted(steps.steps, 'step')} of {counted(size, what)} by {fit.method}, {steps.micro} at "
        f"once, for {facts.device}"
    )
    for text in notes:
        say(f"note: {text}")
    if mode().quiet:
        typer.echo(f"wrote {options.recipe}")
        return
    recipe = shlex.quote(str(options.recipe))
    say(f"\nwrote {options.recipe}. Next:")
    for command, why in (
        ("check", "what training would find in all rows"),
        ("inspect", "which tokens are trained on"),
        ("train", ""),
    ):
        say(f"  tunesmith {command} {recipe}{f'  # {why}' if why else ''}")
    if steps.held_out:
        say(f"  tunesmith eval {shlex.quote(facts.wanted.output)}  # scores on the rows that are held out")


def _as_json(options: Options, facts: "Facts", settings: dict[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    lengths = facts.lengths
    return {
        "recipe": str(options.recipe),
        "settings": settings,
        "goal": facts.wanted.goal,
        "rows": asdict(facts.rows),
        "lengths": {
            "half": lengths.share(0.5),
            "most": lengths.share(0.99),
            "longest": lengths.longest,
            "supervised_share": lengths.supervised,
        },
        "device": facts.device,
        "fit": asdict(facts.fit),
        "notes": list(notes),
    }
