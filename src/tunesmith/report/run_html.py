"""Runs as HTML pages. One run: how it went, what it answered on the way, which rows were hard, and what it was made
with. Several runs: what differs in their settings, where they ended, their curves over each other."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate, chain, pairwise
from pathlib import Path
from statistics import fmean, median

from tunesmith.errors import TunesmithError
from tunesmith.report.page import (
    MISSING,
    MOST_POINTS,
    Curve,
    amount,
    bars,
    cut,
    facts,
    figure,
    folded,
    legend,
    numbers,
    svg,
    table,
    text_box,
    whole_page,
)
from tunesmith.report.run_data import Answer, ExampleLoss, RunData, Step, read_run
from tunesmith.runs.files import COMPARISON, REPORT, loss_name, write_whole
from tunesmith.runs.record import Origin, prompt_text, setting_text
from tunesmith.secrets import known_secrets, scrub
from tunesmith.text import duration, size

SHOWN_ANSWERS = 6
"""Of one prompt side by side; of more, the first, the last, and some between."""
SHOWN_EVENTS = 100
SHOWN_EASIEST = 5
LONGEST = 3000
"""Characters of a prompt or an answer."""
LAST_PART = 0.1
"""The loss at the end is the mean over this part of the steps."""

POLICIES = ("grpo", "rloo")
"""Trainers that learn from rewards."""
UNFINISHED = {"error": "An error, the last of the events, ended the run", "stopped": "The run was stopped"}
PANELS: tuple[tuple[str, str, str, bool], ...] = (
    ("learning_rate", "Learning rate", "learning rate", False),
    ("tokens_per_second", "Speed", "tokens/s", True),
    ("grad_norm", "Gradient norm", "gradient norm", True),
    ("memory_mb", "Memory", "MiB", False),
)
"""Field of a step, title, label of the axis, whether it is noisy."""


def write_report(runs: list[str], output: str | None = None) -> Path:
    """Writes the page about one run, or about several, and returns its path. Raises TunesmithError."""
    read = [read_run(run) for run in runs]
    path = Path(output).expanduser() if output else _own_folder(runs[0], read[0]) / (COMPARISON if read[1:] else REPORT)
    if path.is_dir():
        raise TunesmithError(f"--output {output} is a folder; give the file to write, such as {path / REPORT}")
    if not path.parent.is_dir():
        raise TunesmithError(f"--output {output}: there is no folder {path.parent}; make it first")
    text = comparison(read) if read[1:] else page(read[0])
    try:
        write_whole(path, text)
    except OSError as error:
        raise TunesmithError(f"{path} can't be written: {error.strerror}; name another file with --output") from error
    return path


def _own_folder(name: str, run: RunData) -> Path:
    """The folder of `run`, spelt as the user did who named it or a checkpoint in it."""
    named = Path(name).expanduser()
    return next((path for path in (named, named.parent) if path.resolve() == run.folder), run.folder)


def page(run: RunData) -> str:
    """The report of one run. Tokens and passwords that the environment knows are blacked out in it."""
    parts = [
        f"<h1>{escape(run.name)}</h1>\n",
        *_summary(run),
        *_curves(run),
        *_processes(run),
        *_scored_pairs(run),
        *_events(run),
        *_drawn(run),
        *_samples(run),
        *_pairs(run),
        *_rows(run),
        *_data(run),
        *_settings(run),
        *_checkpoints(run),
    ]
    return scrub(whole_page(f"{run.name}: report of a run", parts), known_secrets())


# How it went


def final_loss(steps: Sequence[Step]) -> float | None:
    """The mean training loss over the last tenth of the steps."""
    losses = [step.loss for step in steps if step.loss is not None]
    return fmean(losses[-max(1, round(LAST_PART * len(losses))) :]) if losses else None


def speed(steps: Sequence[Step]) -> float | None:
    """The median of the steps' tokens a second."""
    speeds = [step.tokens_per_second for step in steps if step.tokens_per_second is not None]
    return median(speeds) if speeds else None


def seconds(run: RunData) -> float | None:
    """From the beginning to the last step; what the trainer measured, where steps don't say."""
    known = [step.seconds for step in run.steps if step.seconds is not None]
    return known[-1] if known else run.record.seconds if run.record else None


def peak_memory(steps: Sequence[Step]) -> float | None:
    """In bytes."""
    return max((step.memory_mb * 2**20 for step in steps if step.memory_mb is not None), default=None)


def eval_losses(run: RunData) -> list[tuple[str, Sequence[tuple[int, float]]]]:
    """The names of the evaluated data sets with the loss at each evaluation."""
    return [
        (name.removeprefix("evaluation: "), points)
        for metric, points in run.evaluations.items()
        if (name := loss_name(metric))
    ]


def _summary(run: RunData) -> Iterator[str]:
    tokens = sum(step.tokens or 0 for step in run.steps)
    memory, taken = peak_memory(run.steps), seconds(run)
    ends = [(f"{name} loss, at the end", amount(points[-1][1])) for name, points in eval_losses(run)]
    yield numbers(
        [
            ("steps", _steps(run)),
            ("training loss, at the end", amount(final_loss(run.steps))),
            *ends[:3],
            ("time", "" if taken is None else duration(taken)),
            ("tokens a second", amount(speed(run.steps), 3)),
            ("most memory", size(memory) if memory else ""),
        ]
    )
    record = run.record
    if record is None:
        yield '<p class="warn">The run was not saved: there is no run.json in its folder.</p>\n'
        return
    if record.ended in UNFINISHED:
        yield f'<p class="warn">{UNFINISHED[record.ended]} at step {_steps(run)}.</p>\n'
    yield facts(
        [
            ("base model", named(record.base_model)),
            ("trained", str(record.method)),
            ("parameters", record.trained_share),
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
    return f"{origin.name} (a {origin.kind})" if origin.kind in ("folder", "file") else origin.name


def _loss_unit(runs: Sequence[RunData]) -> str:
    trainers = {run.record.trainer for run in runs if run.record is not None}
    [trainer] = trainers if len(trainers) == 1 else ["sft"]
    units = {"dpo": "of a pair", "reward": "of a pair", "kto": "of an answer"}
    return (units | dict.fromkeys(POLICIES, "0 where the policy has just drawn")).get(
        trainer, "nats a supervised token"
    )


def _logged(run: RunData) -> Iterator[str]:
    """What trainers log beside the loss. Of a run on preferences: rewards, accuracies and log-probabilities of better
    and worse answers; of one with a teacher: how far the student is from it, and how long its answers are."""
    history = run.record.history if run.record is not None else ()
    for title, unit, names in (
        ("Rewards of chosen (first) and rejected answers", "beta x nats", ("rewards/chosen", "rewards/rejected")),
        ("Margins: rewards of chosen answers less those of rejected ones", "beta x nats", ("rewards/margins",)),
        ("Pairs whose chosen answer has the higher reward", "share", ("rewards/accuracies",)),
        ("Log-probabilities of chosen (first) and rejected answers", "nats", ("logps/chosen", "logps/rejected")),
        ("Least, mean and largest reward", "reward", ("min_reward", "mean_reward", "max_reward")),
        ("Pairs whose chosen answer has the higher reward", "share", ("accuracy",)),
        ("Reward of the chosen answer less that of the rejected one", "reward", ("margin",)),
        ("Divergence from the teacher", "nats a token", ("divergence",)),
        ("Length of answers that were written", "tokens", ("completions/mean_length",)),
    ):
        curves = [
            Curve(
                points=[(int(entry["step"]), entry[name]) for entry in history if entry.get(name) is not None], number=i
            )
            for i, name in enumerate(names)
        ]
        if all(len(curve.points) > 1 for curve in curves):
            yield figure(svg(curves, label=title), title, unit)


def _policy(run: RunData) -> Iterator[str]:
    """Of a run that learns from rewards: these, and what became of the answers, as logged."""
    history = run.record.history if run.record is not None else ()
    parts = sorted({name for entry in history for name in entry if re.fullmatch(r"rewards/.+/mean", name)})
    listed = ", ".join(name.split("/")[1] for name in parts)
    for title, unit, names in (
        ("Reward of an answer", "mean", ("reward",)),
        (f"Each reward: {listed}", "mean", tuple(parts) if len(parts) > 1 else ()),
        ("Spread of rewards in a group", "deviation", ("reward_spread",)),
        ("Answers in groups whose rewards are all equal", "share", ("frac_reward_zero_std",)),
        ("Length of an answer", "tokens", ("completions/mean_length",)),
        ("Answers that were cut off", "share", ("completions/clipped_ratio",)),
        ("Calls of tools", "an answer", ("tools/call_frequency",)),
        ("Calls of tools that failed", "share", ("tools/failure_frequency",)),
        ("Distance to the reference", "nats a token", ("kl",)),
        ("Tokens whose ratio went too far", "share", ("clip_ratio/region_mean",)),
        ("Entropy", "nats a token", ("entropy",)),
        ("Generator against trainer", "nats a token", ("sampling/sampling_logp_difference/mean",)),
    ):
        curves = [
            Curve(
                points=[(int(entry["step"]), entry[name]) for entry in history if entry.get(name) is not None], number=i
            )
            for i, name in enumerate(names)
        ]
        if curves and all(len(curve.points) > 1 for curve in curves):
            yield figure(svg(curves, label=title), title, unit)


def _curves(run: RunData) -> Iterator[str]:
    marks = [step for step, _ in run.events]
    evaluated = [
        Curve(points=points, number=number, name=name)
        for number, (name, points) in enumerate(eval_losses(run), start=1)
    ]
    training = replace(_curve(run, "loss", noisy=True), name="training")
    picture = svg([training, *evaluated], label="loss", marks=marks, wide=True)
    figures = [figure(picture, "Loss", _loss_unit([run]))]
    if run.record is not None and run.record.trainer in POLICIES:
        figures += _policy(run)
    else:
        figures += _logged(run)
    figures += _panels([run], marks)
    if not any(figures):
        return
    yield "<h2>Curves</h2>\n"
    yield legend(enumerate(["training", *(name for name, _ in eval_losses(run))]))
    if marks:
        yield '<p class="faint">Dashed vertical lines: something odd happened, listed below.</p>\n'
    yield f'<div class="curves" data-tokens="{escape(_tokens_read(run))}">\n{"".join(figures)}</div>\n'
    others = [(name, points[-1]) for name, points in run.evaluations.items() if not loss_name(name)]
    if others:
        yield "<h3>Other measures of the last evaluation</h3>\n"
        cells = [(name.removeprefix("eval_"), amount(value), f"{step:,}") for name, (step, value) in others]
        yield table(("measure", "value", "step"), cells)


def _scored_pairs(run: RunData) -> Iterator[str]:
    """How a reward model did on pairs that it was not trained on, where `tunesmith eval` has measured that."""
    scores = run.pairs
    if scores is None:
        return
    yield f"<h2>Pairs <small>{scores.pairs:,} of {escape(scores.data)}</small></h2>\n"
    yield numbers([("accuracy", _interval(scores.accuracy)), ("margin", _interval(scores.margin))])
    yield facts([("calibration error", amount(scores.error, 3))])
    rows = [
        f'<tr><td>{item.low:.0%} to {item.high:.0%}</td><td class="n">{item.pairs:,}</td>'
        f'<td class="n">{item.predicted:.1%}</td><td class="n">{item.observed:.1%}</td>'
        f'<td class="bars"><span class="bar" style="width: {100 * item.observed:.1f}%"></span></td></tr>\n'
        for item in scores.bins
    ]
    head = "".join(f'<th class="n">{name}</th>' for name in ("pairs", "predicted", "observed"))
    yield "<h3>Calibration <small>the probability that a margin stands for, and how often it was right</small></h3>\n"
    yield f"<table>\n<tr><th>probability</th>{head}<th></th></tr>\n{''.join(rows)}</table>\n"


def _interval(values: tuple[float, float | None, float | None]) -> str:
    value, low, high = values
    return amount(value, 3) + ("" if low is None else f" ({amount(low, 3)} to {amount(high, 3)})")


def _tokens_read(run: RunData) -> str:
    """The tokens that were read up to some steps, [[step, tokens], ...] as JSON."""
    read = [*accumulate(step.tokens or 0 for step in run.steps)]
    every = max(1, len(read) // MOST_POINTS)
    points = [[step.step, round(tokens)] for step, tokens in zip(run.steps, read, strict=True)]
    return json.dumps([*points[:-1:every], *points[-1:]] if read and read[-1] else [], separators=(",", ":"))


def _curve(run: RunData, field: str, *, number: int = 0, noisy: bool) -> Curve:
    """A `field` of the run's steps."""
    return Curve(points=[(step.step, getattr(step, field)) for step in run.steps], number=number, noisy=noisy)


def _panels(runs: Sequence[RunData], marks: Sequence[int] = ()) -> Iterator[str]:
    for field, title, label, noisy in PANELS:
        curves = [_curve(run, field, number=i, noisy=noisy) for i, run in enumerate(runs)]
        yield figure(svg(curves, label=label, marks=marks), title, "" if label == title.lower() else label)


def _processes(run: RunData) -> Iterator[str]:
    """Of several, how fast each was, and for which of them the others waited."""
    if not run.processes or len({len(line) for line in run.processes}) > 1:  # gone on with by another number
        return
    rows = []
    for rank, lines in enumerate(zip(*run.processes, strict=True)):
        speeds = [line.tokens_per_second for line in lines if line.tokens_per_second is not None]
        memory = max((line.memory_mb or 0.0 for line in lines), default=0.0)
        waited = fmean(line.waited for line in lines)
        rate = f"{median(speeds):,.0f}" if speeds else MISSING
        rows.append((f"{rank}", rate, f"{waited:.0%}", size(memory * 2**20) if memory else MISSING))
    yield "<h2>Processes</h2>\n"
    yield table(("process", "tokens a second", "of its time, waiting", "most memory"), rows)


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
        by_prompt.setdefault(repr(answer.prompt), []).append(answer)
    if not by_prompt:
        return
    yield "<h2>Samples <small>the likeliest answers, before training and on the way</small></h2>\n"
    if any(answer.trained_on for answer in run.answers):
        yield '<p class="warn">No rows were held out, so these prompts are from rows that were trained on.</p>\n'
    for number, answers in enumerate(by_prompt.values(), start=1):
        first = answers[0]
        yield f"<h3>Prompt {number}</h3>\n"
        yield '<div class="answers two">\n'
        yield text_box("asked", cut(prompt_text(first.prompt), LONGEST))
        if first.expected is not None:
            yield text_box("answer in the data", cut(first.expected, LONGEST))
        yield '</div>\n<div class="answers">\n'
        answers.sort(key=lambda item: item.step)
        parts = min(len(answers), SHOWN_ANSWERS) - 1
        for answer in (answers[round(i * (len(answers) - 1) / max(parts, 1))] for i in range(parts + 1)):
            same = first.expected is not None and answer.answer.strip() == first.expected.strip()
            title = "before training" if answer.step == 0 else f"step {answer.step:,}"
            title += ", as in the data" if same else ""
            yield text_box(title, cut(folded(answer.answer), LONGEST) or "(nothing)", same=same)
        yield "</div>\n"


def _drawn(run: RunData) -> Iterator[str]:
    if not run.drawn:
        return
    yield "<h2>Answers <small>The best and the worst of a group, as they were drawn</small></h2>\n"
    parts = min(len(run.drawn), SHOWN_ANSWERS) - 1
    for one in (run.drawn[round(i * (len(run.drawn) - 1) / max(parts, 1))] for i in range(parts + 1)):
        yield f"<h3>Step {one.step:,}</h3>\n"
        yield text_box("asked", cut(prompt_text(one.prompt), LONGEST))
        yield '<div class="answers two">\n'
        for name, answer in (("best", one.best), ("worst", one.worst)):
            each = ", ".join(f"{key} {amount(value, 3)}" for key, value in answer.rewards.items() if value is not None)
            title = f"{name}: {amount(answer.reward, 3)}" + (f" ({each})" if len(answer.rewards) > 1 else "")
            yield text_box(title, cut(answer.text, LONGEST) or "(nothing)")
        yield "</div>\n"


# Rows and data


def _rows(run: RunData) -> Iterator[str]:
    examples = run.examples
    if examples is None:
        return
    where = f"steps {examples.first_step:,} to {examples.last_step:,}"
    yield f"<h2>Rows <small>losses of {examples.rows:,} examples as they were trained on, {where}</small></h2>\n"
    edges = [f"{edge:g}" for edge in examples.edges]
    names = [f"up to {edges[0]}", *(f"{a} to {b}" for a, b in pairwise(edges)), f"over {edges[-1]}"]
    used = [i for i, count in enumerate(examples.histogram) if count]
    shown = list(zip(names, examples.histogram, strict=True))[min(used) : max(used) + 1] if used else []
    yield bars("Mean loss of an example", shown, "nats a token")
    hardest, easiest = examples.hardest, examples.easiest[:SHOWN_EASIEST]
    yield from _ranked("Hardest rows", "furthest above what was usual at their step: odd, wrong, or new", hardest)
    yield from _ranked("Easiest rows", "the lowest loss: known before, or learned; nothing more to gain", easiest)


def _pairs(run: RunData) -> Iterator[str]:
    """Of a run on pairs: whether the rewards go by the length of answers, and the pairs with the lowest margins."""
    examples = run.examples
    if examples is None or not examples.lengths_of_pairs:
        return
    yield f"<h2>Pairs <small>steps {examples.first_step:,} to {examples.last_step:,}</small></h2>\n"
    cells = [(name, f"{count:,}", f"{right / count:.0%}") for name, count, right in examples.lengths_of_pairs]
    yield table(("pairs in which", "pairs", "chosen has the higher reward"), cells)
    yield (
        '<p class="faint">Where these shares are far apart, the model goes by the length of answers rather than by '
        "what they say.</p>\n"
    )
    yield "<h3>Worst pairs <small>their margin is furthest below what was usual at their step: odd, wrong, or hard"
    yield "</small></h3>\n"
    for pair in examples.worst_pairs:
        caption = f"margin {amount(pair.margin)}, usual then {amount(pair.usual)}; step {pair.step:,}"
        yield f'<p class="faint">{caption}</p>\n'
        yield '<div class="answers">\n'
        for title, text in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
            yield text_box(title, cut(text, LONGEST))
        yield "</div>\n"


def _ranked(title: str, about: str, rows: Sequence[ExampleLoss]) -> Iterator[str]:
    if not rows:
        return
    yield f"<h3>{title} <small>{about}. Marked: supervised</small></h3>\n"
    for row in rows:
        caption = (
            f"loss {amount(row.loss)}, usual then {amount(row.usual)}; step {row.step:,}; "
            f"{row.supervised:,} of {row.tokens:,} tokens supervised"
        )
        text = "".join(f"<b>{escape(part)}</b>" if supervised else escape(part) for part, supervised in row.parts)
        yield f'<div class="text row"><small>{caption}</small><pre>{text}</pre></div>\n'


def _data(run: RunData) -> Iterator[str]:
    if not run.splits and not run.notes:
        return
    yield "<h2>Data</h2>\n"
    if run.splits:
        cells = [
            (
                split.name,
                *(f"{count:,}" for count in (split.examples, split.tokens, split.supervised)),
                f"{split.supervised / max(1, split.tokens):.1%}",
                f"{split.longest:,}",
            )
            for split in run.splits
        ]
        yield table(("split", "examples", "tokens", "supervised", "share", "longest"), cells)
    for note in run.notes:
        yield f'<p class="warn">{escape(cut(note, 2000))}</p>\n'
    if run.record is not None and run.record.data:
        yield facts((f"{item.split}: {item.source}", named(item.origin)) for item in run.record.data)
    for split in run.splits:
        yield '<div class="halves">\n'
        for title, unit, lengths in (
            ("length", "tokens", split.lengths),
            ("supervised", "supervised tokens", split.supervised_lengths),
        ):
            rows = [(f"{low:,}" if low == high else f"{low:,} to {high:,}", count) for low, high, count in lengths]
            yield bars(f"{split.name}: {title}", rows, unit)
        yield "</div>\n"


# What it was made with


def _settings(run: RunData) -> Iterator[str]:
    record = run.record
    if record is not None:
        yield '<h2>Settings and versions</h2>\n<div class="halves">\n<div>'
        settings = [(name, cut(setting_text(value), 500)) for name, value in record.settings.items()]
        yield table(("setting", "value"), settings)
        yield "</div>\n<div>"
        yield table(("library", "version"), list(record.versions.items()))
        yield "</div>\n</div>\n"
    if run.recipe:
        yield "<h3>Recipe</h3>\n"
        yield text_box("recipe.yaml", cut(run.recipe, 20_000))


def _checkpoints(run: RunData) -> Iterator[str]:
    if not run.checkpoints:
        return
    yield "<h2>Checkpoints</h2>\n"
    cells = [(item.name, f"{item.step:,}", size(item.size)) for item in run.checkpoints]
    yield table(("folder", "step", "size"), cells)


# Several runs


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One row of the table of results: a value of each run, how it is written, and which is best."""

    name: str
    values: tuple[float | None, ...]
    written: Callable[[float], str] = amount
    better: Callable[[Sequence[float]], float] | None = None

    @property
    def cells(self) -> list[str]:
        return [MISSING if value is None else self.written(value) for value in self.values]

    @property
    def best(self) -> int | None:
        if self.better is None or len({*self.cells} - {MISSING}) < 2:  # as far as a reader sees
            return None
        return self.values.index(self.better([value for value in self.values if value is not None]))


def comparison(runs: Sequence[RunData]) -> str:
    """The page of two runs or more, in their order; tokens and passwords that the environment knows are blacked out."""
    names = distinct(runs)
    title = f"{len(runs)} runs beside each other"
    parts = [f"<h1>{title}</h1>\n", legend(enumerate(names))]
    if results := outcomes(runs):
        best = [None if row.best is None else row.best + 1 for row in results]
        parts += ["<h2>Results</h2>\n", table(("", *names), [[row.name, *row.cells] for row in results], best)]
    parts += [*_curves_of_all(runs), *_differences(runs, names)]
    return scrub(whole_page(title, parts), known_secrets())


def distinct(runs: Sequence[RunData]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    for depth in range(1, max(len(run.folder.parts) for run in runs) + 1):
        names = ["/".join(run.folder.parts[-depth:]) for run in runs]
        if len(set(names)) == len(runs):
            return names
    counts: Counter[str] = Counter()
    names = []
    for run in runs:  # one folder, given twice
        counts[run.name] += 1
        names.append(run.name if counts[run.name] == 1 else f"{run.name} ({counts[run.name]})")
    return names


def outcomes(runs: Sequence[RunData]) -> list[Outcome]:
    """Where each run ended, and what it took."""
    steps = [run.steps for run in runs]
    rows = [
        Outcome(name="steps", values=tuple(part[-1].step if part else None for part in steps)),
        Outcome(name="training loss, at the end", values=tuple(map(final_loss, steps)), better=min),
    ]
    for name, curves in _eval_curves(runs).items():
        losses = [[value for _, value in points] for points in curves]
        last = tuple(values[-1] if values else None for values in losses)
        lowest = tuple(min(values, default=None) for values in losses)
        rows.append(Outcome(name=f"{name} loss, at the end", values=last, better=min))
        rows.append(Outcome(name=f"{name} loss, lowest", values=lowest, better=min))
    rows += [
        Outcome(name="time", values=tuple(map(seconds, runs)), written=duration),
        Outcome(name="tokens a second", values=tuple(map(speed, steps)), better=max),
        Outcome(name="most memory", values=tuple(map(peak_memory, steps)), written=size, better=min),
    ]
    return [row for row in rows if any(value is not None for value in row.values)]


def _eval_curves(runs: Sequence[RunData]) -> dict[str, list[Sequence[tuple[int, float]]]]:
    """The losses of each run, by the data set; empty where a run has none."""
    by_run = [dict(eval_losses(run)) for run in runs]
    return {name: [losses.get(name, ()) for losses in by_run] for name in dict.fromkeys(chain(*by_run))}


def _curves_of_all(runs: Sequence[RunData]) -> Iterator[str]:
    names, unit = distinct(runs), _loss_unit(runs)
    training = [replace(_curve(run, "loss", number=i, noisy=True), name=names[i]) for i, run in enumerate(runs)]
    figures = [figure(svg(training, label="training loss", wide=True), "Training loss", unit)]
    for name, losses in _eval_curves(runs).items():
        evaluated = [Curve(points=points, number=i, name=names[i]) for i, points in enumerate(losses)]
        figures.append(figure(svg(evaluated, label=f"{name} loss"), f"Loss: {name}", unit))
    figures += _panels(runs)
    if any(figures):
        yield f'<h2>Curves</h2>\n<div class="curves">\n{"".join(figures)}</div>\n'


def _differences(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    origins = [_made_with(run) for run in runs]
    rows = differences(origins)
    yield "<h2>What differs</h2>\n"
    if rows:
        yield table(("", *names), rows)
    else:
        yield "<p>Nothing that the runs have written down.</p>\n"
    same = len({key for values in origins for key in values}) - len(rows)
    if rows and same:
        yield f'<p class="faint">{same:,} other settings, counts and versions are the same in all.</p>\n'


def differences(runs: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """The names whose values are not the same in all, with the value of each."""
    rows = [[name, *(values.get(name, MISSING) for values in runs)] for name in dict.fromkeys(chain(*runs))]
    return [row for row in rows if len(set(row[1:])) > 1]


def _made_with(run: RunData) -> dict[str, str]:
    """What a run was made with, by names that are comparable."""
    record = run.record
    if record is None:
        return {}
    values = {
        "base model": named(record.base_model),
        "trained": str(record.method),
        "trained parameters": f"{record.trainable_parameters:,}",
        "device": record.device,
    }
    for item in record.data:
        where = f"{item.split} data" + ("" if item.source == item.split else f", {item.source}")
        values[where] = (
            f"{named(item.origin)}: {item.examples:,} examples, {item.supervised_tokens:,} tokens supervised"
        )
    values |= {name: setting_text(value) for name, value in record.settings.items()}
    return values | {f"version of {name}": value for name, value in record.versions.items()}
