"""A run's folder, read back: what it wrote of itself while it trained, for the report."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.data.preflight import is_train
from tunesmith.errors import TunesmithError
from tunesmith.runs.files import EXAMPLES, METRICS, PREFLIGHT, SAMPLES, read, read_lines
from tunesmith.runs.record import RUN, RunRecord, Text

RECIPE, TRAINER_STATE = "recipe.yaml", "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
NO_METRIC = re.compile(r"_(runtime|samples_per_second|steps_per_second|model_preparation_time)$")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step. None: not known, or not finite. `memory` in MiB, `seconds` since the run began."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: float | None = None
    supervised_tokens: float | None = None
    tokens_per_second: float | None = None
    memory: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """`asked` stands for the prompt: a text, or messages; `trained_on` says whether its row is one of those."""

    step: int
    asked: Text
    expected: str | None
    answer: str
    trained_on: bool = False


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
class Examples:
    """The losses of the `rows` of the last pass over the data. `histogram` counts those up to each of `edges`, and
    those above the last."""

    rows: int
    mean: float
    first_step: int
    last_step: int
    edges: tuple[float, ...]
    histogram: tuple[int, ...]
    easiest: tuple[ExampleLoss, ...]
    hardest: tuple[ExampleLoss, ...]


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

    @property
    def is_train(self) -> bool:
        return is_train(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """`size` in bytes."""

    name: str
    step: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """All that is known of the run in `folder`. `evaluations` has, by the name of the metric, its value at each step;
    what the run did not write is empty."""

    name: str
    folder: Path
    record: RunRecord | None = None
    steps: tuple[Step, ...] = ()
    evaluations: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    events: tuple[tuple[int, str], ...] = ()
    answers: tuple[Answer, ...] = ()
    examples: Examples | None = None
    splits: tuple[Split, ...] = ()
    notes: tuple[str, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    recipe: str = ""


def read_run(run: str | Path) -> RunData:
    """What is in the folder `run`, or, where it is a checkpoint, in that of its run.

    Raises TunesmithError for what is no run, and for files in it that can't be read.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise TunesmithError(f"there is no folder {run}; give the folder that a run was saved to")
    folder = folder.resolve()
    if CHECKPOINT.fullmatch(folder.name) and not (folder / METRICS).is_file():
        folder = folder.parent
    record = RunRecord.read(folder)
    lines = read_lines(folder / METRICS) or _logged(folder, record)
    if record is None and not lines:
        raise TunesmithError(
            f"{run} is no run that can be reported on: it has neither {METRICS} nor {RUN}; give the folder that "
            "`tunesmith train` or SFTTrainer wrote to"
        )
    preflight = read(folder / PREFLIGHT) or {}
    return RunData(
        name=folder.name,
        folder=folder,
        record=record,
        steps=_made(folder / METRICS, lambda: tuple(_step(line) for line in lines if "loss" in line)),
        evaluations=_made(folder / METRICS, lambda: _evaluations(lines)),
        events=tuple((int(line.get("step") or 0), str(line["event"])) for line in lines if "event" in line),
        answers=_made(folder / SAMPLES, lambda: tuple(_answer(line) for line in read_lines(folder / SAMPLES))),
        examples=_made(folder / EXAMPLES, lambda: _examples(read(folder / EXAMPLES))),
        splits=_made(folder / PREFLIGHT, lambda: _splits(preflight)),
        notes=tuple(str(note) for note in preflight.get("notes") or ()),
        checkpoints=_checkpoints(folder),
        recipe=_text(folder / RECIPE),
    )


def _made(path: Path, make: Callable[[], Made]) -> Made:
    """What `make` makes of the content of `path`."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, TunesmithError):
            raise
        raise TunesmithError(
            f"{path} is not what a run writes there ({type(error).__name__}: {error}). Delete it to go on without it"
        ) from error


def _logged(folder: Path, record: RunRecord | None) -> list[dict[str, Any]]:
    """Of a run without a line for each step, what the trainer logged."""
    if record is not None:
        return [dict(entry) for entry in record.history]
    for checkpoint in reversed(_checkpoints(folder)):
        history = (read(folder / checkpoint.name / TRAINER_STATE) or {}).get("log_history")
        if history:
            return [dict(entry) for entry in history]
    return []


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _step(line: Mapping[str, Any]) -> Step:
    names = ("loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "tokens_per_second", "seconds")
    found = {name: _number(line.get(name)) for name in names}
    return Step(step=int(line["step"]), memory=_number(line.get("memory_mb")), **found)


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[tuple[int, float], ...]]:
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("eval_") and not NO_METRIC.search(name) and isinstance(value, int | float):
                found.setdefault(name, {})[int(line["step"])] = float(value)
    return {name: tuple(sorted(values.items())) for name, values in found.items()}


def _answer(line: Mapping[str, Any]) -> Answer:
    asked, expected = line["prompt"], line.get("expected")
    messages = asked if isinstance(asked, str) else tuple(dict(message) for message in asked)
    return Answer(
        step=int(line["step"]),
        asked=messages,
        expected=None if expected is None else str(expected),
        answer=str(line["answer"]),
        trained_on=bool(line.get("trained_on")),
    )


def _examples(found: Mapping[str, Any] | None) -> Examples | None:
    if found is None:
        return None
    return Examples(
        rows=int(found["rows"]),
        mean=float(found["mean"]),
        first_step=int(found["first_step"]),
        last_step=int(found["last_step"]),
        edges=tuple(float(edge) for edge in found["edges"]),
        histogram=tuple(int(count) for count in found["histogram"]),
        easiest=tuple(_example(entry) for entry in found["easiest"]),
        hardest=tuple(_example(entry) for entry in found["hardest"]),
    )


def _example(entry: Mapping[str, Any]) -> ExampleLoss:
    return ExampleLoss(
        loss=float(entry["loss"]),
        usual=float(entry["usual"]),
        step=int(entry["step"]),
        tokens=int(entry["tokens"]),
        supervised=int(entry["supervised"]),
        parts=tuple((str(text), bool(learned)) for text, learned in entry["parts"]),
    )


def _splits(preflight: Mapping[str, Any]) -> tuple[Split, ...]:
    supervised = preflight.get("supervised_lengths") or {}
    return tuple(
        Split(
            name=str(name),
            examples=int(report["counts"]["examples"]),
            tokens=int(report["counts"]["tokens"]),
            supervised=int(report["counts"]["supervised"]),
            longest=int(report["longest"]),
            lengths=_buckets(report["lengths"]),
            supervised_lengths=_buckets(supervised.get(name) or ()),
        )
        for name, report in (preflight.get("splits") or {}).items()
    )


def _buckets(found: Sequence[Any]) -> Buckets:
    return tuple((int(low), int(high), int(count)) for low, high, count in found)


def _checkpoints(folder: Path) -> tuple[Checkpoint, ...]:
    found = []
    for item in folder.iterdir():
        if (name := CHECKPOINT.fullmatch(item.name)) and item.is_dir():
            size = sum(file.stat().st_size for file in item.rglob("*") if file.is_file())
            found.append(Checkpoint(name=item.name, step=int(name[1]), size=size))
    return tuple(sorted(found, key=lambda item: item.step))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
