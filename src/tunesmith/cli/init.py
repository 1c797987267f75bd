"""`tunesmith init`: from a file of rows to a recipe that fits them and this machine."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.errors import TunesmithError, nearest
from tunesmith.init.interview import (
    DEMO_NOTE,
    Options,
    ask,
    asked_goal,
    asked_method,
    asked_model,
    asked_output,
    chosen_columns,
    confirm,
)
from tunesmith.terminal.output import finish, mode, note, say

if TYPE_CHECKING:
    from tunesmith.data.read import Rows
    from tunesmith.init.advice import Facts, Goal, Method, ModelFacts
    from tunesmith.init.facts import Looked
    from tunesmith.init.recipe_text import Section
    from tunesmith.plan.memory import Run

ROOM = 0.9
"""The share of the memory that is planned with: the rest is for what else runs."""
SUFFIXES = (".yaml", ".yml")
CHATML = "chatml"


def init(
    recipe: Annotated[Path, typer.Argument(help="The file to write.", metavar="[RECIPE.yaml]")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="A name on the hub, a folder, or demo.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="The rows: a file, or a name on the hub; repeatable.")] = None,
    goal: Annotated[str | None, typer.Option(help="chat | instruct | classify | tools | json | continue.")] = None,
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
    """Look at your rows and at this machine, and write a recipe for them, each line with its reason.

    Asks what the options leave out. Example: tunesmith init recipe.yaml --data rows.jsonl
    """
    _check_recipe(recipe, force)
    _check_choices(goal, method)
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
    found, tokenizer_notes = _facts(options)
    sections, notes = _settings(found), [*tokenizer_notes, *_notes(found)]
    _write(options, found, sections)
    finish(_as_json(options, found, sections, notes), lambda: _show(options, found, notes))


# What is known


def _facts(options: Options) -> tuple["Facts", list[str]]:
    """All that the recipe is decided by, asked for or looked at; and what is worth a note on the way."""
    from tunesmith.init.advice import Facts, Wanted, check_goal, guess_goal, train_on
    from tunesmith.init.facts import look, measure

    names, rows = _data(options)
    model = options.model or asked_model(options)
    tokenizer, run, template = _model(model, options.template)
    columns = chosen_columns(options, rows, tokenizer.chat_template is not None)
    looked = look(rows, columns)
    if looked.facts.kind == "conversation" and tokenizer.chat_template is None:
        template = CHATML
        tokenizer, run, _ = _model(model, template)
    _describe(looked)
    guessed, why = guess_goal(looked.facts)
    goal: Goal = options.goal or asked_goal(options, guessed, why)  # type: ignore[assignment]
    check_goal(goal, looked.facts)
    wanted = Wanted(
        data=names,
        output=options.output or asked_output(options, names[0]),
        goal=goal,
        method=options.method or asked_method(options),  # type: ignore[arg-type]
        columns=columns,
    )
    try:
        lengths = measure(looked, tokenizer, train_on(goal, looked.facts)[0], {})
    except TunesmithError as error:
        raise _with_template_hint(error) from error
    about = _about(model, run, template)
    fit = _fit(run, wanted.goal, wanted.method, about, looked, lengths)
    device = f"{run.device.name} with {run.device.memory / 1e9:,.1f} GB"
    found = Facts(wanted=wanted, rows=looked.facts, lengths=lengths, model=about, device=device, fit=fit)
    joined = looked.facts.kind == "pair" and tokenizer.chat_template is not None
    return found, [_JOINED] if joined else []


_JOINED = (
    "'prompt' and 'completion' are texts, which are joined as they are, without the chat template; to train on turns "
    "write --columns instruction=prompt,output=completion"
)


def _data(options: Options) -> tuple[tuple[str, ...], "Rows"]:
    """The names of the data and their rows, opened. At a terminal, a name that is none is asked for again."""
    from tunesmith.data.read import joined, read_rows

    if options.data:
        return options.data, joined([read_rows(name) for name in options.data])
    if not options.asks:
        raise TunesmithError("no data; write --data rows.jsonl: a file, or a name on the hub")
    while True:
        name = ask("Your rows: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a name on the hub")
        try:
            return (name,), read_rows(name)
        except TunesmithError as error:
            typer.secho(f"error: {error}", fg=typer.colors.RED)


def _model(name: str, template: str | None) -> tuple[Any, "Run", str | None]:
    """The tokenizer as a run would have it, and what is planned for, by LoRA of the usual rank."""
    from tunesmith.cli.plan import NO_NEED, run_of
    from tunesmith.model.load import resolve_model
    from tunesmith.settings.recipe import resolve
    from tunesmith.train.setup import prepare_tokenizer

    resolve_model(name, note)
    more = {} if template is None else {"chat_template_path": template}
    recipe = resolve(None, {"model": name, "data": "unused", "lora": True, **more, **NO_NEED})
    try:
        run = run_of(recipe, None)
        tokenizer, _ = prepare_tokenizer(None, name, recipe.config)
    except TunesmithError as error:
        if Path(name).expanduser().is_dir():
            raise
        raise TunesmithError(f"{error}\n`--model demo` is here without a network") from error
    return tokenizer, run, template


def _about(name: str, run: "Run", template: str | None) -> "ModelFacts":
    from tunesmith.home import DEMO
    from tunesmith.init.advice import ModelFacts
    from tunesmith.plan.memory import count

    parameters = count(run, "full").kept["weights"] // 4
    context = getattr(run.config.get_text_config(), "max_position_embeddings", None)
    note = DEMO_NOTE if name == DEMO else f"{parameters / 1e6:,.0f} million parameters"
    return ModelFacts(name=name, parameters=parameters, context=context, note=note, template=template)


def _fit(run: "Run", goal: "Goal", method: "Method | None", model: "ModelFacts", looked: "Looked", lengths: Any) -> Any:
    """The first way to train that this machine has room for."""
    from tunesmith.init.advice import fit, methods_to_try, pack_length, step_rows, wanted_length

    rows, methods = looked.facts, methods_to_try(method)
    packed, alone = pack_length(goal, rows, lengths, model), wanted_length(goal, rows, lengths, model)
    size = step_rows(rows.rows)

    def found(length: int) -> Any:
        asked = replace(run, rows=size, length=length)
        return fit(lambda by, less: _room(replace(asked, checkpoint_every=int(less)), by), methods, length, size)

    made = found(packed or alone)
    if packed and goal != "continue" and (made.length < packed or not made.fits or made.method != methods[0]):
        made = found(alone)  # packs are not worth that
    return made


def _room(run: "Run", method: "Method") -> Any:
    """Tells whether micro-batches of so many rows of so many tokens fit. The weights are looked at first: what is too
    large by itself needs no step to be counted."""
    from tunesmith.plan.memory import count

    capacity, counted = int(ROOM * run.device.memory), count(run, method)

    def fits(rows: int, length: int) -> bool:
        return sum(counted.kept.values()) < capacity and counted.memory(rows, length).total <= capacity

    return fits


def _with_template_hint(error: TunesmithError) -> TunesmithError:
    if "does not show tool calls" not in str(error):
        return error
    return TunesmithError(
        f"{error}: --chat-template-path FILE.jinja here, or take a model that calls tools, such as "
        "--model Qwen/Qwen3-0.6B"
    )


# The recipe


def _check_recipe(path: Path, force: bool) -> None:
    if path.suffix not in SUFFIXES:
        raise TunesmithError(f"{path} is no name for a recipe, which ends in .yaml; rows are given as --data {path}")
    if path.is_dir():
        raise TunesmithError(f"{path} is a folder; give the file to write")
    if path.exists() and not force:
        raise TunesmithError(f"{path} is there already; --force writes over it, or give another name")
    if not path.parent.is_dir():
        raise TunesmithError(f"{path} can't be written: there is no folder {path.parent}; make it first")


def _check_choices(goal: str | None, method: str | None) -> None:
    from tunesmith.init.advice import GOALS, METHODS

    for name, value, known in (("--goal", goal, list(GOALS)), ("--method", method, list(METHODS))):
        if value is not None and value not in known:
            raise TunesmithError(f"{name} {value}: choose {' | '.join(known)}{nearest(value, known)}")


def _settings(found: "Facts") -> list["Section"]:
    """The recipe's sections, after a look through the eyes of `tunesmith train`."""
    from tunesmith.cli.inspect import SAME_DATA
    from tunesmith.init.recipe_lines import sections
    from tunesmith.init.recipe_text import values
    from tunesmith.settings.recipe import resolve

    made = sections(found)
    resolve(None, {name: value for name, value in values(made).items() if name != "output"} | SAME_DATA)
    return made


def _write(options: Options, found: "Facts", sections: list["Section"]) -> None:
    from tunesmith.init.recipe_lines import heading
    from tunesmith.init.recipe_text import write

    text = write(heading(found, shlex.quote(str(options.recipe))), sections)
    if options.asks:
        typer.echo(f"\n{text}")
        if not confirm(f"Write {options.recipe}?"):
            typer.echo("nothing was written")
            raise typer.Exit
    try:
        options.recipe.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise TunesmithError(f"{options.recipe} can't be written: {error.strerror}") from error


# What is said


def _describe(looked: "Looked") -> None:
    from tunesmith.text import counted

    rows = looked.facts
    roles = f" of {', '.join(rows.roles)}" if rows.roles else ""
    separate = "; the prompt is separate" if rows.separate else ""
    say(f"{counted(rows.rows, 'row')}, format {rows.format}{roles}{separate}")


def _notes(found: "Facts") -> list[str]:
    from tunesmith.text import counted, verb

    rows, lengths, notes = found.rows, found.lengths, []
    if rows.duplicates:
        copies = verb(rows.duplicates, "is an exact copy of another", "are exact copies of others")
        notes.append(f"{counted(rows.duplicates, 'row')} {copies}; what is held out may be among them")
    if found.wanted.goal == "classify" and rows.labels:
        most = ", ".join(f"{label or '(empty)'} {count / rows.rows:.0%}" for label, count in rows.labels[:6])
        notes.append(f"{len(rows.labels):,} labels: {most}{', ...' if len(rows.labels) > 6 else ''}")
    if lengths.sampled:
        notes.append(f"lengths are those of {len(lengths.sizes):,} rows drawn at random; `tunesmith check` takes all")
    if not found.fit.fits:
        notes.append(
            f"{found.model.name} is planned not to fit into {found.device}, even by {found.fit.method}; take a smaller "
            "model, or another machine (`tunesmith plan` tells)"
        )
    return notes


def _show(options: Options, found: "Facts", notes: Sequence[str]) -> None:
    from tunesmith.init.advice import schedule
    from tunesmith.text import counted

    lengths, fit, steps = found.lengths, found.fit, schedule(found)
    about = "about " if lengths.sampled else ""
    say(
        f"lengths in tokens: half up to {lengths.share(0.5):,}, 99% up to {lengths.share(0.99):,}, the longest "
        f"{lengths.longest:,}; {lengths.supervised:.0%} of them are trained on"
    )
    size, what = steps.micro * steps.accumulation, "pack" if steps.packing else "row"
    say(
        f"{about}{counted(steps.steps, 'step')} of {counted(size, what)} by {fit.method}, {steps.micro} at "
        f"once, for {found.device}"
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


def _as_json(options: Options, found: "Facts", sections: list["Section"], notes: Sequence[str]) -> dict[str, Any]:
    from tunesmith.init.recipe_text import values

    lengths = found.lengths
    return {
        "recipe": str(options.recipe),
        "settings": values(sections),
        "goal": found.wanted.goal,
        "rows": asdict(found.rows),
        "lengths": {
            "half": lengths.share(0.5),
            "most": lengths.share(0.99),
            "longest": lengths.longest,
            "supervised_share": lengths.supervised,
        },
        "device": found.device,
        "fit": asdict(found.fit),
        "notes": list(notes),
    }
