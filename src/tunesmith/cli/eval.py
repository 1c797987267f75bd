"""`tunesmith eval`: answers to rows that were not trained on, scored, those of the base model beside them; of a reward
model, pairs that it was not trained on."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.complete import RUN, TRUST
from tunesmith.cli.data import SAME_DATA, held_out_rows
from tunesmith.errors import TunesmithError
from tunesmith.runs.files import write_whole
from tunesmith.terminal.output import finish, note
from tunesmith.text import counted

if TYPE_CHECKING:
    from tunesmith.data.tokenize import Counts
    from tunesmith.evaluate.evaluation import Evaluation, Settings, Source
    from tunesmith.evaluate.rewards import RewardEvaluation
    from tunesmith.evaluate.scores import Estimate, Result
    from tunesmith.settings.recipe import Recipe

WIDTH = 80
BAR = 40
"""Characters of a bar of 100%."""
CUT_SHOWN = 3
"""Answers that did not end, whose places are told."""


def evaluate(
    run: RUN,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows not trained on. Unset: those that the run held out.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="exact_match, contains, json_valid, json_equal, number, rouge; repeatable. Unset: what fits.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Ask N rows, drawn at random.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.")] = 256,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Answers at a time. Unset: 16, on a CPU up to 64.")
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Don't ask the base model.")] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="In place of the rows' own system message.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the answers (.jsonl).")] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Names, ours=yours; unset: as in training."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="The split of data that has several; unset, test.")
    ] = None,
    as_chat: Annotated[bool | None, typer.Option("--chat/--text", help="How to ask texts. Unset: as trained.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="The seed of what is drawn.")] = 0,
    trust_remote_code: TRUST = False,
) -> None:
    """Score a run's answers beside those of its base model.

    Of pairs of answers: how far it, or a reward model, prefers the better ones.
    Example: tunesmith eval runs/first --data held_out.jsonl --metric json_equal
    """
    from tunesmith.evaluate.evaluation import Settings
    from tunesmith.evaluate.evaluation import evaluate as evaluate_run
    from tunesmith.evaluate.scores import chosen

    settings = Settings(
        run=run,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        with_base=not no_base,
        as_chat=as_chat,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    metrics = chosen(metric or ())
    if output is not None:
        _check_output(output)
    source = (
        _held_out(run, columns, split, system) if data is None else _of_file(settings, data, columns, split, system)
    )
    asked = {"--metric": metric or None, "--system": system, "--chat/--text": as_chat}
    if _on_pairs(settings, source, output, [name for name, value in asked.items() if value is not None]):
        return
    evaluation = evaluate_run(settings, source, metrics)
    if output is not None:
        write_whole(output, "".join(evaluation.lines()))
    about = {"run": run, "data": source.data, "max_new_tokens": max_new_tokens, "seed": seed}
    finish(about | evaluation.as_json(), lambda: _show(evaluation, settings))


def recipe_of(run: str) -> "Recipe | None":
    """The recipe of the run in a folder, or of a checkpoint's run, on any device; None where there is none."""
    from tunesmith.report.run_data import RECIPE
    from tunesmith.runs.checkpoints import NAME as CHECKPOINT
    from tunesmith.settings.recipe import resolve

    folder = Path(run).expanduser()
    file = (folder.parent if CHECKPOINT.fullmatch(folder.name) else folder) / RECIPE
    return resolve(str(file), SAME_DATA) if file.is_file() else None


def _of_file(settings: "Settings", data: str, columns: str | None, split: str | None, system: str | None) -> "Source":
    """The rows of `data`, under the column names of the training unless others are given."""
    from tunesmith.evaluate.evaluation import Source, as_trained
    from tunesmith.settings.coerce import columns_of

    source = Source(data=data, split=split, columns={} if columns is None else columns_of(columns), system=system)
    source = as_trained(settings, source) if columns is None else source
    _say_if_trained_on(settings.run, data)
    return source


def _held_out(run: str, columns: str | None, split: str | None, system: str | None) -> "Source":
    """The rows that the run held out. Raises TunesmithError where it has none, and for options of a file."""
    from tunesmith.evaluate.evaluation import Source

    if unread := [name for name, value in {"--columns": columns, "--split": split}.items() if value is not None]:
        raise TunesmithError(f"{' and '.join(unread)} is for --data, which is missing; write --data FILE, too")
    recipe = recipe_of(run)
    if recipe is None:
        raise TunesmithError(f"{run} has no recipe.yaml, which says what it held out; write --data FILE")
    rows = held_out_rows(recipe)
    if not rows:
        raise TunesmithError(f"{run} has held no rows out; write --data FILE, with rows that it was not trained on")
    note(f"asking the {counted(len(rows), 'row')} that {run} held out, as its recipe says")
    return Source(data=f"the rows that {run} held out", system=system, rows=rows)


def _say_if_trained_on(run: str, data: str) -> None:
    """A note where the run was trained on the same file."""
    try:
        recipe = recipe_of(run)
    except TunesmithError:  # what it names is not here any more
        recipe = None
    if recipe is None:
        return
    sources = [source["path"] for source in recipe.sources.values()]
    trained = [*recipe.data, *(path for each in sources for path in ([each] if isinstance(each, str) else each))]
    if Path(data).is_file() and os.path.realpath(data) in map(os.path.realpath, trained):
        held_out = recipe.eval_data or any(source.get("held_out") for source in recipe.sources.values())
        way = "leave --data out, to ask those that it held out" if held_out else "give rows that it has not seen"
        note(f"note: {run} was trained on rows of {data}, so that scores say little of others; {way}")


def _on_pairs(settings: "Settings", source: "Source", output: Path | None, unused: list[str]) -> bool:
    """Scores pairs, where these are what `source` has, or what the run is for. `unused` are options that say nothing
    of pairs."""
    from tunesmith.evaluate.preferences import holds_pairs
    from tunesmith.evaluate.rewards import scores_texts

    here = Path(settings.run).is_dir()
    if not here and not holds_pairs(source):  # before a name on the hub is asked for
        return False
    if scores_texts(settings.run, settings.trust_remote_code):
        pairs(settings, source, output, unused if settings.with_base else [*unused, "--no-base"])
        return True
    if here and not holds_pairs(source):
        return False
    if unused:
        raise TunesmithError(f"{source.data} has pairs, whose answers are not generated: leave out {', '.join(unused)}")
    _prefer(settings, source, output)
    return True


def pairs(settings: "Settings", source: "Source", output: Path | None, unused: list[str]) -> None:
    """Scores pairs by a reward model. `unused` are options that say nothing of one."""
    from tunesmith.evaluate.rewards import evaluate_pairs

    if unused:
        raise TunesmithError(f"{settings.run} is a reward model, which is asked nothing: leave out {', '.join(unused)}")
    evaluation = evaluate_pairs(settings, source)
    if output is not None:
        write_whole(output, "".join(evaluation.lines()))
    about = {"run": settings.run, "data": source.data, "seed": settings.seed}
    finish(about | evaluation.as_json(), lambda: _show_pairs(evaluation, settings.run))


def _show_pairs(evaluation: "RewardEvaluation", run: str) -> None:
    scores = evaluation.scores
    for name, (value, low, high), share in (
        ("accuracy", scores.accuracy, True),
        ("margin", scores.margin, False),
    ):
        typer.echo(f"{name:<10}{_interval(value, low, high, share)}")
    typer.echo(f"of {scores.pairs:,} pairs; in brackets: 95% intervals.\n")
    typer.echo(
        "calibration: of pairs that the margin makes so sure, how many are right (█), and how many should be (│)"
    )
    for item in scores.bins:
        bar = ["█" if i < round(BAR * item.observed) else " " for i in range(BAR + 1)]
        bar[round(BAR * item.predicted)] = "│"
        typer.echo(f"{item.low:4.0%} to {item.high:4.0%} {item.pairs:>7,} pairs {item.observed:>5.0%}  {''.join(bar)}")
    typer.echo(f"calibration error: {scores.error:.3f}")
    for line in _left_out(evaluation.counts):
        typer.echo(line)
    if Path(run).is_dir():
        typer.echo(f"on the page of the run:  tunesmith report {shlex.quote(run)}")


def _interval(value: float, low: float | None, high: float | None, share: bool) -> str:
    from tunesmith.evaluate.scores import Estimate

    return _cell(Estimate(value=value, low=low, high=high), share)


def _prefer(settings: "Settings", source: "Source", output: Path | None) -> None:
    """What the run makes of pairs of answers."""
    from tunesmith.evaluate.evaluation import result_as_json
    from tunesmith.evaluate.preferences import compare

    found = compare(settings, source)
    if output is not None:
        write_whole(output, "".join(found.lines()))
    about = {"run": settings.run, "data": source.data, "seed": settings.seed, "beta": found.beta}
    about |= {"rows": len(found.tuned), "metrics": [result_as_json(result) for result in found.results]}
    about |= {"left_out": {why: {"rows": count, "places": at} for why, (count, at) in found.counts.dropped.items()}}

    def show() -> None:
        title = f"{len(found.tuned):,} pairs, as {settings.run} sees them, beta {found.beta:g}"
        _table(title, found.results, has_base=found.base is not None)
        for line in _left_out(found.counts):
            typer.echo(line)

    finish(about | {"notes": found.notes}, show)


def _show(evaluation: "Evaluation", settings: "Settings") -> None:
    answered = evaluation.answered
    title = f"{len(answered.questions):,} rows that {settings.run} was asked"
    _table(title, evaluation.results, has_base=answered.base is not None)
    for line in _lines(evaluation, settings):
        typer.echo(line)


def _table(title: str, results: "Sequence[Result]", *, has_base: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("", "rows", *(("base", "tuned", "difference") if has_base else ("answers",))):
        table.add_column(heading, justify="right" if heading else "left")
    for result in results:
        share = result.metric.is_share
        estimates = (result.base, result.tuned) if has_base else (result.tuned,)
        cells = ["" if item is None else _cell(item, share) for item in estimates]
        cells += [] if result.difference is None else [_cell(result.difference, share, "+")]
        table.add_row(result.metric.name, f"{result.count:,}", *cells)
    Console(width=WIDTH, highlight=False).print(table)
    typer.echo("In brackets: 95% intervals." + (" Differences of shares: percentage points." if has_base else ""))


def _cell(estimate: "Estimate", is_share: bool, sign: str = "") -> str:
    """`92% (83, 97)`, or `0.41 (0.38, 0.44)`; a difference has a sign."""
    value, low, high = (
        "" if item is None else format(100 * item, f"{sign}.0f") if is_share else format(item, f"{sign}.2f")
        for item in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value}{'%' if is_share and not sign else ''}" + (f" ({low}, {high})" if low else "")


def _lines(evaluation: "Evaluation", settings: "Settings") -> list[str]:
    """What was left out and cut off."""
    lines = _left_out(evaluation.counts)
    cut = {name: rows for name, rows in evaluation.cut_off().items() if rows}
    if cut:
        rows = sorted(set().union(*cut.values()))
        places = [evaluation.answered.questions[i].place for i in rows[:CUT_SHOWN]]
        counts_of = " and ".join(f"{len(rows):,} {name}" for name, rows in cut.items())
        lines.append(
            f"cut off: {counts_of} answers did not end within {settings.max_new_tokens} tokens, which lowers scores "
            f"({'; '.join(places)}{'; ...' if len(rows) > CUT_SHOWN else ''}); raise --max-new-tokens, or train on "
            "rows that end with an end token"
        )
    return lines


def _left_out(counts: "Counts") -> list[str]:
    lines = []
    for reason, (count, places) in counts.dropped.items():
        more = ", ..." if count > len(places) else ""
        lines.append(f"left out: {count:,} with {reason} ({', '.join(places)}{more})")
    return lines


def _check_output(path: Path) -> None:
    """Raises TunesmithError for a file that can't be written, before anything takes time."""
    if path.exists():
        raise TunesmithError(f"output {path} is there already; delete it, or choose another name")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise TunesmithError(f"output {path}: {folder} is no folder that can be written to; make it first")
