"""A run's folder, read back: what it wrote of itself while it trained, for the report."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.errors import TunesmithError
from tunesmith.runs.calibration import PairScores
from tunesmith.runs.checkpoints import STATE, all_checkpoints, checkpoints
from tunesmith.runs.files import ANSWERS, EXAMPLES, METRICS, PREFLIGHT, SAMPLES, from_json, read, read_lines
from tunesmith.runs.record import RUN, RunRecord, Text

RECIPE = "recipe.yaml"
NO_METRIC = re.compile(r"_(runtime|samples_per_second|steps_per_second|model_preparation_time)$")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step. None: not known, or not finite. `memory_mb` in MiB, `seconds` since the run began."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: float | None = None
    supervised_tokens: float | None = None
    tokens_per_second: float | None = None
    memory_mb: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One of several processes in a step that was logged, and those before it: its tokens a second while it did not
    wait, the part of its time that it waited for others, and its memory in MiB."""

    tokens_per_second: float | None = None
    waited: float = 0.0
    memory_mb: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A line of samples.jsonl. `trained_on` says whether the prompt's row is one of those."""

    step: int
    prompt: Text
    answer: str
    expected: str | None = None
    trained_on: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnAnswer:
    """An answer that a policy drew, and its reward; None where none applied."""

    text: str
    reward: float | None
    rewards: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """The best and the worst answer of a group, drawn for a step."""

    step: int
    prompt: Text
    best: DrawnAnswer
    worst: DrawnAnswer


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleLoss:
    """A training example in `parts`, each with whether it is supervised; losses in nats a token."""

    loss: float
    usual: float
    step: int
    tokens: int
    supervised: int
    parts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairMargin:
    """A pair, by how much the reward of `chosen` was above that of `rejected` at `step`, and what was usual then."""

    margin: float
    usual: float
    step: int
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """The losses of the `rows` of the last pass over the data. `histogram` counts those up to each of `edges`, and
    those above the last. Of pairs, `lengths_of_pairs` has, by which answer is longer, how many there are and in how
    many the chosen one has the higher reward."""

    rows: int
    mean: float
    first_step: int
    last_step: int
    edges: tuple[float, ...]
    histogram: tuple[int, ...]
    easiest: tuple[ExampleLoss, ...]
    hardest: tuple[ExampleLoss, ...]
    lengths_of_pairs: tuple[tuple[str, int, int], ...] = ()
    worst_pairs: tuple[PairMargin, ...] = ()


Buckets = tuple[tuple[int, int, int], ...]
"""A histogram: (first length, last length, examples)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One split of the data, as the preflight counted it."""

    name: str
    examples: int
    tokens: int
    supervised: int
    longest: int
    lengths: Buckets
    supervised_lengths: Buckets


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """`size` in bytes."""

    name: str
    step: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """All that is known of the run in `folder`. `processes` are those of each step that tells of them. `evaluations`
    has, by the name of the metric, its value at each step; what the run did not write is empty."""

    name: str
    folder: Path
    record: RunRecord | None = None
    steps: tuple[Step, ...] = ()
    processes: tuple[tuple[Process, ...], ...] = ()
    evaluations: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    events: tuple[tuple[int, str], ...] = ()
    answers: tuple[Answer, ...] = ()
    drawn: tuple[Drawn, ...] = ()
    examples: Examples | None = None
    splits: tuple[Split, ...] = ()
    notes: tuple[str, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    recipe: str = ""
    pairs: PairScores | None = None


def read_run(run: str | Path) -> RunData:
    """What is in the folder `run`, or, where it is a checkpoint, in that of its run.

    Raises TunesmithError for what is no run, and for files in it that can't be read.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise TunesmithError(f"there is no folder {run}; give the folder that a run was saved to")
    folder = folder.resolve()
    if folder in all_checkpoints(folder.parent) and not (folder / METRICS).is_file():
        folder = folder.parent
    record = RunRecord.read(folder)
    lines = read_lines(folder / METRICS) or _logged(folder, record)
    if record is None and not lines:
        raise TunesmithError(
            f"{run} is no run that can be reported on: it has neither {METRICS} nor {RUN}; give the folder that "
            "`tunesmith train` or SFTTrainer wrote to"
        )
    preflight, examples, recipe = read(folder / PREFLIGHT) or {}, read(folder / EXAMPLES), folder / RECIPE
    answers = read_lines(folder / SAMPLES)
    return RunData(
        name=folder.name,
        folder=folder,
        record=record,
        steps=_as_written(folder / METRICS, lambda: tuple(_step(line) for line in lines if "loss" in line)),
        processes=_as_written(
            folder / METRICS,
            lambda: tuple(from_json(line["processes"], tuple[Process, ...]) for line in lines if "processes" in line),
        ),
        evaluations=_as_written(folder / METRICS, lambda: _evaluations(lines)),
        events=tuple((int(line.get("step") or 0), str(line["event"])) for line in lines if "event" in line),
        answers=_as_written(folder / SAMPLES, lambda: from_json(answers, tuple[Answer, ...])),
        drawn=_as_written(folder / ANSWERS, lambda: tuple(map(_drawn, read_lines(folder / ANSWERS)))),
        examples=_as_written(folder / EXAMPLES, lambda: from_json(examples, Examples | None)),
        splits=_as_written(folder / PREFLIGHT, lambda: _splits(preflight)),
        notes=tuple(str(note) for note in preflight.get("notes") or ()),
        checkpoints=tuple(map(_checkpoint, checkpoints(folder))),
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        pairs=PairScores.read(folder),
    )


def _as_written(path: Path, make: Callable[[], T]) -> T:
    """`make()`, whose errors are about the content of `path`."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TunesmithError(
            f"{path} is not what a run writes there ({type(error).__name__}: {error}). Delete it to go on without it"
        ) from error


def _logged(folder: Path, record: RunRecord | None) -> list[dict[str, Any]]:
    """What the trainer logged, for a run without a line for each step."""
    if record is not None:
        return list(record.history)
    for checkpoint in reversed(checkpoints(folder)):
        if history := (read(checkpoint / STATE) or {}).get("log_history"):
            return list(history)
    return []


def _drawn(line: Mapping[str, Any]) -> Drawn:
    """Without what functions had to say besides."""
    best, worst = (
        DrawnAnswer(text=str(line[name]["text"]), reward=line[name]["reward"], rewards=line[name]["rewards"])
        for name in ("best", "worst")
    )
    asked = line["prompt"]
    return Drawn(
        step=int(line["step"]), prompt=asked if isinstance(asked, str) else tuple(asked), best=best, worst=worst
    )


def _step(line: Mapping[str, Any]) -> Step:
    values = {item.name: line.get(item.name) for item in fields(Step)}
    return Step(
        step=int(values.pop("step")),  # type: ignore[arg-type]
        **{name: None if value is None else float(value) for name, value in values.items()},
    )


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[tuple[int, float], ...]]:
    curves: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("eval_") and not NO_METRIC.search(name) and isinstance(value, int | float):
                curves.setdefault(name, {})[int(line["step"])] = float(value)
    return {name: tuple(sorted(points.items())) for name, points in curves.items()}


def _splits(preflight: Mapping[str, Any]) -> tuple[Split, ...]:
    supervised = preflight.get("supervised_lengths") or {}
    return tuple(
        from_json(
            {
                "name": name,
                **report["counts"],
                **{key: report[key] for key in ("longest", "lengths")},
                "supervised_lengths": supervised.get(name) or [],
            },
            Split,
        )
        for name, report in (preflight.get("splits") or {}).items()
    )


def _checkpoint(folder: Path) -> Checkpoint:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Checkpoint(name=folder.name, step=int(folder.name.rpartition("-")[2]), size=size)
