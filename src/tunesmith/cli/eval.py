"""`tunesmith eval`: answers to rows that were not trained on, scored, those of the base model beside them."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.complete import runs
from tunesmith.errors import TunesmithError
from tunesmith.evaluate.asking import Answered, Settings, ask
from tunesmith.terminal.output import finish
from tunesmith.terminal.output import note as say

if TYPE_CHECKING:
    from tunesmith.data.tokenize import Counts
    from tunesmith.evaluate.questions import Source
    from tunesmith.evaluate.scores import Estimate, Metric, Result

WIDTH = 80
CUT_SHOWN = 3
"""Answers that did not end, whose places are told."""


# The options, in the order of the help
RUN = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's or model's folder, a name, or demo.", autocompletion=runs)
]
DATA = Annotated[str, typer.Option(metavar="FILE", help="Rows not trained on.")]
METRIC = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="exact_match, contains, json_valid, json_equal, number, rouge; repeatable. Unset: what fits.",
    ),
]
LIMIT = Annotated[int | None, typer.Option(metavar="N", help="Ask N rows, drawn at random.")]
MAX_NEW_TOKENS = Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.")]
BATCH_SIZE = Annotated[int, typer.Option(metavar="N", help="Answers at a time.")]
NO_BASE = Annotated[bool, typer.Option("--no-base", help="Don't ask the base model.")]
SYSTEM = Annotated[str | None, typer.Option(metavar="TEXT", help="In place of the rows' own system message.")]
OUTPUT = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the answers (.jsonl).")]
COLUMNS = Annotated[str | None, typer.Option(metavar="NAMES", help="Our names to the data's: '{prompt: question}'.")]
SPLIT = Annotated[str | None, typer.Option(metavar="NAME", help="The split of data on the hub; unset, test.")]
AS_CHAT = Annotated[bool | None, typer.Option("--chat/--text", help="How to ask texts. Unset: as trained.")]
SEED = Annotated[int, typer.Option(metavar="N", help="The seed of what is drawn.")]
TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]


def evaluate(
    run: RUN,
    data: DATA,
    metric: METRIC = None,
    limit: LIMIT = None,
    max_new_tokens: MAX_NEW_TOKENS = 256,
    batch_size: BATCH_SIZE = 16,
    no_base: NO_BASE = False,
    system: SYSTEM = None,
    output: OUTPUT = None,
    columns: COLUMNS = None,
    split: SPLIT = None,
    as_chat: AS_CHAT = None,
    seed: SEED = 0,
    trust_remote_code: TRUST = False,
) -> None:
    """Ask a run rows that it was not trained on, and score its answers beside those of its base model.

    Example: tunesmith eval runs/first --data held_out.jsonl --metric json_equal
    """
    from tunesmith.evaluate.questions import Source
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
    _score(settings, Source(data=data, split=split, columns=_columns(columns), system=system), metrics, output)


def _score(settings: Settings, source: "Source", metrics: Sequence["Metric"], output: Path | None) -> None:
    """Asks the rows of `source`, and says and writes what `metrics` make of the answers; none given, those that fit."""
    from tunesmith.data.tokenize import Counts
    from tunesmith.evaluate.questions import questions
    from tunesmith.evaluate.scores import fitting, refuse_unfit, scored

    counts = Counts()
    found = questions(source, counts)
    expected = [item.expected for item in found]
    metrics, why = (metrics, "") if metrics else fitting(expected)
    if why:
        say(f"metrics: {', '.join(item.name for item in metrics)}, because {why}")
    refuse_unfit(metrics, expected)
    answered = ask(found, settings, counts)
    for note in answered.notes:
        say(f"note: {note}")
    expected = [item.expected for item in answered.questions]
    tuned = [answer.text for answer in answered.tuned]
    base = None if answered.base is None else [answer.text for answer in answered.base]
    results = [scored(item, expected, tuned, base, settings.seed) for item in metrics]
    if output is not None:
        _write(output, answered, metrics)
    about = {"run": settings.run, "data": source.data, "max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
    about |= {"metrics_chosen_for": why}
    finish(about | _as_json(answered, results, counts), lambda: _show(answered, results, counts, settings))


# What is said


def _columns(text: str | None) -> Mapping[str, str]:
    from tunesmith.settings.coerce import coerce

    try:
        return {} if text is None else coerce(text, dict[str, str])
    except ValueError as error:
        raise TunesmithError(f"columns {error}; write '{{prompt: question, completion: answer}}'") from error


def _show(answered: Answered, results: Sequence["Result"], counts: "Counts", settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(answered.questions):,} rows that {settings.run} was asked", title_justify="left")
    has_base = answered.base is not None
    for heading in ("", "rows", *(("base", "tuned", "difference") if has_base else ("answers",))):
        table.add_column(heading, justify="right" if heading else "left")
    for result in results:
        share = result.metric.is_share
        cells = [_cell(item, share) for item in (result.base, result.tuned) if item is not None]
        cells += [] if result.difference is None else [_cell(result.difference, share, "+")]
        table.add_row(result.metric.name, f"{result.count:,}", *cells)
    Console(width=WIDTH, highlight=False).print(table)
    typer.echo("In brackets: 95% intervals." + (" Differences of shares: percentage points." if has_base else ""))
    for line in _lines(answered, counts, settings):
        typer.echo(line)


def _cell(estimate: "Estimate", is_share: bool, sign: str = "") -> str:
    """`92% (83, 97)`, or `0.41 (0.38, 0.44)`; a difference has a sign."""
    value, low, high = (
        "" if item is None else format(100 * item, f"{sign}.0f") if is_share else format(item, f"{sign}.2f")
        for item in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value}{'%' if is_share and not sign else ''}" + (f" ({low}, {high})" if low else "")


def _lines(answered: Answered, counts: "Counts", settings: Settings) -> list[str]:
    """What was left out and cut off."""
    found = []
    for reason, (count, places) in counts.dropped.items():
        more = ", ..." if count > len(places) else ""
        found.append(f"left out: {count:,} with {reason} ({', '.join(places)}{more})")
    cut = {name: rows for name, rows in _cut_off(answered).items() if rows}
    if cut:
        rows = sorted(set().union(*cut.values()))
        places = [answered.questions[i].place for i in rows[:CUT_SHOWN]]
        counts_of = " and ".join(f"{len(rows):,} {name}" for name, rows in cut.items())
        found.append(
            f"cut off: {counts_of} answers did not end within {settings.max_new_tokens} tokens, which lowers scores "
            f"({'; '.join(places)}{'; ...' if len(rows) > CUT_SHOWN else ''}); raise --max-new-tokens, or train on "
            "rows that end with an end token"
        )
    return found


def _cut_off(answered: Answered) -> dict[str, list[int]]:
    """Which answers did not end, by the model that gave them."""
    return {
        name: [i for i, answer in enumerate(answers) if not answer.ended]
        for name, answers in (("tuned", answered.tuned), ("base", answered.base))
        if answers is not None
    }


def _as_json(answered: Answered, results: Sequence["Result"], counts: "Counts") -> dict[str, Any]:
    return {
        "rows": len(answered.questions),
        "metrics": [
            {"name": result.metric.name, "kind": "share" if result.metric.is_share else "mean", "rows": result.count}
            | {
                name: None if (estimate := getattr(result, name)) is None else asdict(estimate)
                for name in ("tuned", "base", "difference")
            }
            for result in results
        ],
        "cut_off": {name: len(cut) for name, cut in _cut_off(answered).items()},
        "left_out": {reason: {"rows": count, "places": at} for reason, (count, at) in counts.dropped.items()},
        "notes": answered.notes,
    }


# What is written


def _check_output(path: Path) -> None:
    """Raises TunesmithError for a file that can't be written, before anything takes time."""
    if path.exists():
        raise TunesmithError(f"output {path} is there already; delete it, or choose another name")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise TunesmithError(f"output {path}: {folder} is no folder that can be written to; make it first")


def _write(path: Path, answered: Answered, metrics: Sequence["Metric"]) -> None:
    """One line for each row, the whole file or none."""
    by_model = {"tuned": answered.tuned} | ({} if answered.base is None else {"base": answered.base})
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for i, question in enumerate(answered.questions):
                line: dict[str, Any] = {
                    "place": question.place,
                    "prompt": question.prompt,
                    "expected": question.expected,
                }
                for model, answers in by_model.items():
                    scores = {item.name: item.score(answers[i].text, question.expected) for item in metrics}
                    line[model] = {"answer": answers[i].text, "cut_off": not answers[i].ended, "scores": scores}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.chmod(name, 0o644)  # a temporary file is its owner's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
