"""Several runs as one HTML page: what differs in their settings, where they ended, their curves over each other."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.report.page import MISSING, amount, document, duration, figure, legend, size, table
from tunesmith.report.plots import Curve, svg
from tunesmith.report.run_data import RunData
from tunesmith.report.run_html import (
    PANELS,
    eval_losses,
    final_loss,
    method,
    named,
    peak_memory,
    seconds,
    setting,
    speed,
)
from tunesmith.secrets import known_secrets, scrub


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One row of the table of results: a value of each run, how it is written, and which is best."""

    name: str
    values: tuple[float | None, ...]
    shown: Callable[[float | None], str]
    better: Callable[[Sequence[float]], float] | None = None

    @property
    def best(self) -> int | None:
        known = [value for value in self.values if value is not None]
        if self.better is None or len({self.shown(value) for value in known}) < 2:  # as far as a reader sees
            return None
        return self.values.index(self.better(known))


def comparison(runs: Sequence[RunData]) -> str:
    """The page of two runs or more, in their order; tokens and passwords that the environment knows are blacked out."""
    names = distinct(runs)
    parts = [f"<h1>{len(runs)} runs beside each other</h1>\n", legend(enumerate(names))]
    parts += [*_results(runs, names), *_curves(runs), *_differences(runs, names)]
    return scrub(document(f"{len(runs)} runs beside each other", parts), known_secrets())


def distinct(runs: Sequence[RunData]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    for depth in range(1, max(len(run.folder.parts) for run in runs) + 1):
        names = ["/".join(run.folder.parts[-depth:]) for run in runs]
        if len(set(names)) == len(runs):
            return names
    counts: Counter[str] = Counter()
    found = []
    for run in runs:  # one folder, given twice
        counts[run.name] += 1
        found.append(run.name if counts[run.name] == 1 else f"{run.name} ({counts[run.name]})")
    return found


def outcomes(runs: Sequence[RunData]) -> list[Outcome]:
    """Where each run ended, and what it took."""
    sets = dict.fromkeys(name for run in runs for name, _ in eval_losses(run))
    by_run = [dict(eval_losses(run)) for run in runs]
    found = [
        Outcome(name="steps", values=tuple(run.steps[-1].step if run.steps else None for run in runs), shown=amount),
        Outcome(
            name="training loss, at the end",
            values=tuple(final_loss(run.steps) for run in runs),
            shown=amount,
            better=min,
        ),
    ]
    for name in sets:
        points = [run.get(name) for run in by_run]
        last = tuple(None if not item else item[-1][1] for item in points)
        lowest = tuple(None if not item else min(value for _, value in item) for item in points)
        found.append(Outcome(name=f"{name} loss, at the end", values=last, shown=amount, better=min))
        found.append(Outcome(name=f"{name} loss, lowest", values=lowest, shown=amount, better=min))
    found += [
        Outcome(name="time", values=tuple(seconds(run) for run in runs), shown=duration),
        Outcome(name="tokens a second", values=tuple(speed(run.steps) for run in runs), shown=amount, better=max),
        Outcome(
            name="most memory",
            values=tuple(peak_memory(run.steps) for run in runs),
            shown=lambda value: "" if value is None else size(value),
            better=min,
        ),
    ]
    return [outcome for outcome in found if any(value is not None for value in outcome.values)]


def _results(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    found = outcomes(runs)
    if found:
        yield "<h2>Results</h2>\n"
        rows = [[item.name, *(item.shown(value) or MISSING for value in item.values)] for item in found]
        best = [None if item.best is None else item.best + 1 for item in found]
        yield table(("", *names), rows, best)


def _curves(runs: Sequence[RunData]) -> Iterator[str]:
    courses = [
        Curve(points=[(step.step, step.loss) for step in run.steps], number=i, noisy=True) for i, run in enumerate(runs)
    ]
    found = [figure(svg(courses, label="training loss", wide=True), "Training loss", "nats a supervised token")]
    for name in dict.fromkeys(name for run in runs for name, _ in eval_losses(run)):
        evaluated = [Curve(points=dict(eval_losses(run)).get(name, ()), number=i) for i, run in enumerate(runs)]
        found.append(figure(svg(evaluated, label=f"{name} loss"), f"Loss: {name}", "nats a supervised token"))
    for field, title, label, noisy in PANELS:
        curves = [
            Curve(points=[(step.step, getattr(step, field)) for step in run.steps], number=i, noisy=noisy)
            for i, run in enumerate(runs)
        ]
        found.append(figure(svg(curves, label=label), title, ""))
    if any(found):
        yield f'<h2>Curves</h2>\n<div class="curves">\n{"".join(found)}</div>\n'


def _differences(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    described = [_described(run) for run in runs]
    rows = differences(described)
    yield "<h2>What differs</h2>\n"
    if rows:
        yield table(("", *names), rows)
    else:
        yield "<p>Nothing that the runs have written down.</p>\n"
    same = len({key for item in described for key in item}) - len(rows)
    if rows and same:
        yield f'<p class="faint">{same:,} other settings, counts and versions are the same in all.</p>\n'


def differences(described: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """The names whose values are not the same in all, with the value of each."""
    keys = dict.fromkeys(key for item in described for key in item)
    rows = [[key, *(item.get(key, MISSING) for item in described)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _described(run: RunData) -> dict[str, str]:
    """What a run was made with, by names that are comparable."""
    record = run.record
    if record is None:
        return {}
    found = {
        "base model": named(record.base_model),
        "trained": method(record.method),
        "trained parameters": f"{record.trainable_parameters:,}",
        "device": record.device,
    }
    for item in record.data:
        where = f"{item.split} data" + ("" if item.source == item.split else f", {item.source}")
        found[where] = f"{named(item.origin)}: {item.examples:,} examples, {item.supervised_tokens:,} tokens supervised"
    found |= {name: setting(value) for name, value in record.settings.items()}
    return found | {f"version of {name}": value for name, value in record.versions.items()}
