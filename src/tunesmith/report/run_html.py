"""A run as one HTML page: how it went, what it answered on the way, which rows were hard, and what it was made with."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from tunesmith.report.page import (
    amount,
    bars,
    cut,
    document,
    duration,
    facts,
    figure,
    learned,
    legend,
    numbers,
    ranges,
    size,
    table,
    text_box,
)
from tunesmith.report.plots import Curve, svg
from tunesmith.report.run_data import Answer, ExampleLoss, RunData, Split, Step
from tunesmith.runs.record import Method, Origin
from tunesmith.secrets import known_secrets, scrub
from tunesmith.ship.card_page import spoken
from tunesmith.ship.curves import curve_name

SHOWN_ANSWERS = 6
"""Of one prompt side by side; of more, the first, the last, and some between."""
SHOWN_EVENTS = 100
SHOWN_EASIEST = 5
LONGEST = 3000
"""Characters of a prompt or an answer."""
LAST_PART = 0.1
"""The loss at the end is the mean over this part of the steps."""

UNFINISHED = {"error": "An error, the last of the events, ended the run", "stopped": "The run was stopped"}
PANELS: tuple[tuple[str, str, str, bool], ...] = (
    ("learning_rate", "Learning rate", "learning rate", False),
    ("tokens_per_second", "Speed", "tokens/s", True),
    ("grad_norm", "Gradient norm", "gradient norm", True),
    ("memory", "Memory", "MiB", False),
)
"""Field of a step, title, label of the axis, whether it is noisy."""


def page(run: RunData) -> str:
    """The report of one run. Tokens and passwords that the environment knows are blacked out in it."""
    parts = [
        f"<h1>{escape(run.name)}</h1>\n",
        *_summary(run),
        *_curves(run),
        *_events(run),
        *_samples(run),
        *_rows(run),
        *_data(run),
        *_settings(run),
        *_checkpoints(run),
    ]
    return scrub(document(f"{run.name}: report of a run", parts), known_secrets())


# How it went


def final_loss(steps: Sequence[Step]) -> float | None:
    """The mean training loss over the last tenth of the steps."""
    losses = [step.loss for step in steps if step.loss is not None]
    return fmean(losses[-max(1, round(LAST_PART * len(losses))) :]) if losses else None


def speed(steps: Sequence[Step]) -> float | None:
    """The median of the steps' tokens a second."""
    found = [step.tokens_per_second for step in steps if step.tokens_per_second is not None]
    return median(found) if found else None


def seconds(run: RunData) -> float | None:
    """From the beginning to the last step; what the trainer measured, where steps don't say."""
    known = [step.seconds for step in run.steps if step.seconds is not None]
    return known[-1] if known else run.record.seconds if run.record else None


def peak_memory(steps: Sequence[Step]) -> float | None:
    """In bytes."""
    return max((step.memory * 2**20 for step in steps if step.memory is not None), default=None)


def eval_losses(run: RunData) -> list[tuple[str, Sequence[tuple[int, float]]]]:
    """The names of the evaluated data sets with the loss at each evaluation."""
    return [
        ((curve_name(name) or name).removeprefix("evaluation: "), points)
        for name, points in run.evaluations.items()
        if curve_name(name)
    ]


def _summary(run: RunData) -> Iterator[str]:
    tokens = sum(step.tokens or 0 for step in run.steps)
    memory = peak_memory(run.steps)
    ends = [(f"{name} loss, at the end", amount(points[-1][1])) for name, points in eval_losses(run)]
    yield numbers(
        [
            ("steps", _steps(run)),
            ("training loss, at the end", amount(final_loss(run.steps))),
            *ends[:3],
            ("time", duration(seconds(run))),
            ("tokens a second", amount(speed(run.steps), 3)),
            ("most memory", size(memory) if memory else ""),
        ]
    )
    record = run.record
    if record is None:
        yield '<p class="warn">The run was not saved: there is no run.json in its folder.</p>\n'
        return
    trained = f"{record.trainable_parameters:,} of {record.total_parameters:,}"
    if record.ended in UNFINISHED:
        yield f'<p class="warn">{UNFINISHED[record.ended]} at step {_steps(run)}.</p>\n'
    yield facts(
        [
            ("base model", named(record.base_model)),
            ("trained", method(record.method)),
            ("parameters", f"{trained} ({record.trainable_parameters / max(1, record.total_parameters):.2%})"),
            ("device", record.device),
            ("tokens read", amount(tokens) if tokens else ""),
        ]
    )


def _steps(run: RunData) -> str:
    """`100`, or of a run that has not come to its end `40 of 100`."""
    last = run.steps[-1].step if run.steps else None
    planned = run.record.planned_steps if run.record is not None else None
    if last is None:
        return ""
    return f"{last:,} of {planned:,}" if planned is not None and last < planned else f"{last:,}"


def named(origin: Origin) -> str:
    kinds = {"hub": "", "demo": "", "folder": " (a folder)", "file": " (a file)", "memory": ""}
    return f"{origin.name}{kinds[origin.kind]}"


def method(found: Method) -> str:
    """`lora, rank 16, alpha 32, on q_proj, v_proj; base model in 4 bits`."""
    parts = ["all weights" if found.kind == "full" else found.kind]
    parts += [f"{name} {value:g}" for name, value in (("rank", found.rank), ("alpha", found.alpha)) if value]
    parts += [f"dropout {found.dropout:g}"] if found.dropout else []
    parts += [f"on {' '.join(found.targets)}"] if found.targets else []
    return ", ".join(parts) + (f"; base model in {found.bits} bits" if found.bits else "")


def _curves(run: RunData) -> Iterator[str]:
    marks = [step for step, _ in run.events]
    evaluated = [Curve(points=points, number=number) for number, (_, points) in enumerate(eval_losses(run), start=1)]
    course = Curve(points=[(step.step, step.loss) for step in run.steps], noisy=True)
    picture = svg([course, *evaluated], label="loss", marks=marks, wide=True)
    found = [figure(picture, "Loss", "nats a supervised token")]
    for name, title, label, noisy in PANELS:
        points = [(step.step, getattr(step, name)) for step in run.steps]
        found.append(figure(svg([Curve(points=points, noisy=noisy)], label=label, marks=marks), title, ""))
    if not any(found):
        return
    yield "<h2>Curves</h2>\n"
    names = [(0, "training"), *((i, name) for i, (name, _) in enumerate(eval_losses(run), start=1))]
    yield legend(names)
    if marks:
        yield '<p class="faint">Dashed vertical lines: something odd happened, listed below.</p>\n'
    yield f'<div class="curves">\n{"".join(found)}</div>\n'
    others = [(name, points[-1]) for name, points in run.evaluations.items() if not curve_name(name)]
    if others:
        yield "<h3>Other measures of the last evaluation</h3>\n"
        cells = [(name.removeprefix("eval_"), amount(value), f"{step:,}") for name, (step, value) in others]
        yield table(("measure", "value", "step"), cells)


def _events(run: RunData) -> Iterator[str]:
    if not run.events:
        return
    yield f"<h2>Events <small>{len(run.events):,}</small></h2>\n"
    yield table(("step", "what happened"), [(f"{step:,}", cut(text, 500)) for step, text in run.events[:SHOWN_EVENTS]])
    if len(run.events) > SHOWN_EVENTS:
        yield f'<p class="faint">{len(run.events) - SHOWN_EVENTS:,} more are in metrics.jsonl.</p>\n'


# What it answered


def _samples(run: RunData) -> Iterator[str]:
    by_prompt: dict[str, list[Answer]] = {}
    for answer in run.answers:
        by_prompt.setdefault(repr(answer.asked), []).append(answer)
    if not by_prompt:
        return
    yield "<h2>Samples <small>the likeliest answers, before training and on the way</small></h2>\n"
    if any(answer.trained_on for answer in run.answers):
        yield '<p class="warn">No rows were held out, so these prompts are from rows that were trained on.</p>\n'
    for number, answers in enumerate(by_prompt.values(), start=1):
        first = answers[0]
        yield f"<h3>Prompt {number}</h3>\n"
        yield '<div class="answers two">\n'
        yield text_box("asked", cut(spoken(first.asked), LONGEST))
        if first.expected is not None:
            yield text_box("answer in the data", cut(first.expected, LONGEST))
        yield '</div>\n<div class="answers">\n'
        for answer in _spread(sorted(answers, key=lambda item: item.step)):
            same = first.expected is not None and answer.answer.strip() == first.expected.strip()
            title = "before training" if answer.step == 0 else f"step {answer.step:,}"
            title += ", as in the data" if same else ""
            yield text_box(title, cut(answer.answer, LONGEST) or "(nothing)", same=same)
        yield "</div>\n"


def _spread(answers: Sequence[Answer]) -> list[Answer]:
    if len(answers) <= SHOWN_ANSWERS:
        return list(answers)
    last = len(answers) - 1
    return [answers[round(i * last / (SHOWN_ANSWERS - 1))] for i in range(SHOWN_ANSWERS)]


# Rows and data


def _rows(run: RunData) -> Iterator[str]:
    found = run.examples
    if found is None:
        return
    where = f"steps {found.first_step:,} to {found.last_step:,}"
    yield f"<h2>Rows <small>losses of {found.rows:,} examples as they were trained on, {where}</small></h2>\n"
    edges = [f"{edge:g}" for edge in found.edges]
    names = [f"up to {edges[0]}", *(f"{a} to {b}" for a, b in pairwise(edges)), f"over {edges[-1]}"]
    used = [i for i, count in enumerate(found.histogram) if count]
    shown = list(zip(names, found.histogram, strict=True))[min(used) : max(used) + 1] if used else []
    yield bars("Mean loss of an example", shown, "nats a token")
    yield from _ranked("Hardest rows", "furthest above what was usual at their step: odd, wrong, or new", found.hardest)
    yield from _ranked(
        "Easiest rows", "the lowest loss: known before, or learned; nothing more to gain", found.easiest[:SHOWN_EASIEST]
    )


def _ranked(title: str, about: str, rows: Sequence[ExampleLoss]) -> Iterator[str]:
    if not rows:
        return
    yield f"<h3>{title} <small>{about}. Marked: supervised</small></h3>\n"
    for row in rows:
        say = (
            f"loss {amount(row.loss)}, usual then {amount(row.usual)}; step {row.step:,}; "
            f"{row.supervised:,} of {row.tokens:,} tokens supervised"
        )
        yield f'<div class="text row"><small>{say}</small><pre>{"".join(learned(row.parts))}</pre></div>\n'


def _data(run: RunData) -> Iterator[str]:
    if not run.splits and not run.notes:
        return
    yield "<h2>Data</h2>\n"
    if run.splits:
        yield table(
            ("split", "examples", "tokens", "supervised", "share", "longest"),
            [_split_cells(split) for split in run.splits],
        )
    for note in run.notes:
        yield f'<p class="warn">{escape(cut(note, 2000))}</p>\n'
    if run.record is not None and run.record.data:
        sources = [(f"{item.split}: {item.source}", named(item.origin)) for item in run.record.data]
        yield facts(sources)
    for split in run.splits:
        histograms = [
            bars(f"{split.name}: length", ranges(split.lengths), "tokens"),
            bars(f"{split.name}: supervised", ranges(split.supervised_lengths), "supervised tokens"),
        ]
        yield f'<div class="halves">\n{"".join(histograms)}</div>\n'


def _split_cells(split: Split) -> tuple[str, ...]:
    share = split.supervised / max(1, split.tokens)
    counts = (split.examples, split.tokens, split.supervised)
    return (split.name, *(f"{count:,}" for count in counts), f"{share:.1%}", f"{split.longest:,}")


# What it was made with


def _settings(run: RunData) -> Iterator[str]:
    record = run.record
    if record is not None:
        yield '<h2>Settings and versions</h2>\n<div class="halves">\n<div>'
        yield table(("setting", "value"), [(name, setting(value)) for name, value in record.settings.items()])
        yield "</div>\n<div>"
        yield table(("library", "version"), list(record.versions.items()))
        yield "</div>\n</div>\n"
    if run.recipe:
        yield "<h3>Recipe</h3>\n"
        yield text_box("recipe.yaml", cut(run.recipe, 20_000))


def setting(value: Any) -> str:
    """A value of the run's settings in short."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else cut(str(value), 500)


def _checkpoints(run: RunData) -> Iterator[str]:
    if not run.checkpoints:
        return
    yield "<h2>Checkpoints</h2>\n"
    cells = [(item.name, f"{item.step:,}", size(item.size)) for item in run.checkpoints]
    yield table(("folder", "step", "size"), cells)
