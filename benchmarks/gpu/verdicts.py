"""What a check found, the place that it runs in, and a section of checks."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

Outcome = Literal["passed", "failed", "left out"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one check came to: a sentence for the page, and figures for the JSON."""

    outcome: Outcome
    found: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def judged(right: bool, found: str, **figures: Any) -> Verdict:
    return Verdict(outcome="passed" if right else "failed", found=found, figures=figures)


def left_out(reason: str) -> Verdict:
    return Verdict(outcome="left out", found=reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A verdict and the name of what it is about, unique in its section."""

    name: str
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Without the numbers that JSON has no form for: these become null."""
        text = json.dumps({"name": self.name, **asdict(self.verdict)})
        entry: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Check":
        return cls(
            name=entry["name"],
            verdict=Verdict(outcome=entry["outcome"], found=entry["found"], figures=entry["figures"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where checks run: `out` is the folder of all that is written. Rehearsed, a CPU stands in for the GPU, and sizes
    are tiny."""

    out: Path
    rehearsed: bool

    def size(self, on_gpu: T, rehearsed: T) -> T:
        return rehearsed if self.rehearsed else on_gpu

    def lines(self, section: str) -> Path:
        """The file with the checks of a section, one a line, each written when it is over."""
        return self.out / "sections" / f"{section}.jsonl"

    def checks(self, section: str) -> list[Check]:
        """What a section that ran has found; nothing where it did not come to run. Its last line may be cut off."""
        checks = []
        if self.lines(section).is_file():
            for line in self.lines(section).read_text(encoding="utf-8").splitlines():
                try:
                    checks.append(Check.from_json(json.loads(line)))
                except ValueError:
                    break
        return checks

    def figures(self, section: str, check: str) -> Mapping[str, Any]:
        """The figures of an earlier check; empty where it failed before it had any."""
        return next((entry.verdict.figures for entry in self.checks(section) if entry.name == check), {})


Trial = Callable[[], Verdict]
Trials = Callable[[Place], Iterable[tuple[str, Trial]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Checks that share a process, which ends after `seconds`. `environment` is set before anything is imported."""

    name: str
    title: str
    trials: Trials
    seconds: int
    environment: Mapping[str, str] = field(default_factory=dict)


def checks_of(section: Section, place: Place) -> Iterator[Check]:
    """The checks of a section, in this process. One that raises an error has failed, and the next is made."""
    for name, trial in section.trials(place):
        try:
            verdict = trial()
        except Exception as error:  # of whatever is checked
            verdict = judged(False, f"{type(error).__name__}: {error}")
        yield Check(name=name, verdict=verdict)
