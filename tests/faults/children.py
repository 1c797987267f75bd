"""Processes in which the layer does its harm. They share what a server has imported, and fork where a save begins."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.faults.layer import ERRORS, Act, Call, Layer, fail, kill
from tests.forked import event, finished, start
from tests.train.children import Settings, log_in, run, trainer_of, weights_in
from tunesmith.errors import TunesmithError
from tunesmith.model import ways
from tunesmith.runs import folder as disk
from tunesmith.runs.checkpoints import PARTIALS, checkpoints, reason_against

KILLED = -signal.SIGKILL
KILLS = "kills.jsonl"
SAVED_AT = 3
"""The step whose save does harm: two checkpoints are there, of which it removes one."""


def started(target: Callable[..., None], *args: Any) -> Any:
    """A process that runs `target`, and an event that it may set."""
    begun = event()
    return start(target, *args, begun), begun


def ended(child: Any) -> int:
    return finished(child, 240)


def broken(run: Path) -> list[str]:
    """Why which checkpoints of a run are not whole; there must be none."""
    return [reason for folder in checkpoints(run) if (reason := reason_against(folder)) is not None]


def same(first: Path, second: Path) -> None:
    """Two runs ended in the same weights and logs, to the bit."""
    found, expected = weights_in(first), weights_in(second)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    names = ("step", "loss", "num_tokens", "learning_rate", "epoch", "mean_token_accuracy", "grad_norm")
    logs = [[[entry[name] for name in names] for entry in log_in(folder)] for folder in (first, second)]
    assert logs[0] == logs[1]


# Kills


def _faulty(mode: str, folder: Path, tokenizer: Path, number: int, settings: Settings, begun: Any) -> None:
    def note(call: Call) -> None:
        with (folder / KILLS).open("a") as file:
            file.write(json.dumps({"kind": call.kind, "path": call.path, "save": call.of_a_save}) + "\n")

    def act(call: Call) -> None:
        begun.set()
        harm(call)

    harm = kill(number, note)
    Layer(folder / "run", act).install()
    run(mode, folder, tokenizer, ("never", 0), False, settings)


def killed_at_a_call(mode: str, folder: Path, tokenizer: Path, number: int, **settings: Any) -> tuple[int, bool]:
    """The exit code of a run that kills itself at its call `number`, and whether that was in a save."""
    folder.mkdir(exist_ok=True)
    (folder / KILLS).unlink(missing_ok=True)
    child, _ = started(_faulty, mode, folder, tokenizer, number, settings)
    code = ended(child)
    return code, code == KILLED and bool(json.loads((folder / KILLS).read_text())["save"])


def killed_after(mode: str, folder: Path, tokenizer: Path, seconds: float, **settings: Any) -> tuple[int, bool]:
    """As `killed_at_a_call`, by this process, so long after the run began to write."""
    folder.mkdir(exist_ok=True)
    child, begun = started(_faulty, mode, folder, tokenizer, 0, settings)
    assert begun.wait(timeout=120), "the run does not begin"
    child.join(timeout=seconds)
    child.kill()
    code = ended(child)
    return code, code == KILLED and any((folder / "run").glob(PARTIALS))


# Every call of a save


@dataclass(frozen=True, kw_only=True, slots=True)
class Harm:
    """What is done at the call `number`: "kill", or the name of an error, `once` or from there on."""

    what: str
    number: int
    once: bool = False

    def act(self) -> Act:
        return kill(self.number) if self.what == "kill" else fail(self.number, ERRORS[self.what], once=self.once)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a save ended that was harmed, and what it left. `error` is the type and the text of what was raised."""

    what: str
    number: int
    once: bool
    kind: str
    path: str
    status: int
    error: list[str] | None
    left: list[str]
    partials: int
    broken: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which calls of the save are harmed how: all of them, or `sample` drawn ones; of those harmed once, `once_sample`.
    Of `kept` outcomes of each kind the
    run's folder is kept."""

    whats: tuple[str, ...]
    onces: tuple[bool, ...]
    sample: int | None
    kept: int
    once_sample: int = 0

    def harms(self, calls: int) -> Iterator[Harm]:
        draw = random.Random(0)
        numbers = range(1, calls + 1)
        for what in self.whats:
            for once in (False,) if what == "kill" else self.onces:
                sample = self.once_sample if once else self.sample
                chosen = numbers if sample is None else _spread(draw, numbers, min(sample, calls))
                for number in chosen:
                    yield Harm(what=what, number=number, once=once)


def _spread(draw: random.Random, numbers: range, count: int) -> list[int]:
    """`count` of the numbers, one drawn from each of as many parts: from the beginning, the middle and the end."""
    bounds = [len(numbers) * part // count for part in range(count + 1)]
    return [numbers[draw.randrange(start, stop)] for start, stop in pairwise(bounds)]


class _Harmed(TrainerCallback):
    """Forks before the save of step `SAVED_AT`, for each harm. The forked process goes on until the next step; this one
    looks at what is left, and puts it back."""

    def __init__(self, trainer: Any, folder: Path, plan: Plan) -> None:
        self._trainer, self._folder, self._plan, self._parent = trainer, folder, plan, os.getpid()
        self._run, self._backup = folder / "run", folder / "backup"
        self.layer: Layer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.layer is not None:
            self._trainer.keeper.wait()
            raise InterruptedError

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != SAVED_AT:
            return
        self._trainer.keeper.wait()
        shutil.copytree(self._run, self._backup)
        calls = self._counted()
        if calls is None:
            return
        kept: dict[tuple[str, bool], int] = {}
        with (self._folder / "outcomes.jsonl").open("w", buffering=1) as file:  # nothing to write again when forked
            for harm in self._plan.harms(calls):
                outcome = self._after(harm)
                if outcome is None:
                    return
                file.write(json.dumps(asdict(outcome)) + "\n")
                key = (harm.what, harm.once)
                apart = 1 if harm.once or self._plan.sample is not None else max(1, calls // self._plan.kept)
                if kept.get(key, 0) < self._plan.kept and harm.number % apart == 0:
                    kept[key] = kept.get(key, 0) + 1
                    shutil.copytree(self._run, self._folder / f"{harm.what}-{harm.once}-{harm.number}" / "run")
                self._put_back()
        raise InterruptedError

    def _counted(self) -> int | None:
        """How many calls a save has; None in the forked process."""
        if not self._forked(lambda call: None):
            return None
        calls: int = json.loads((self._folder / "outcome.json").read_text())["calls"]
        self._put_back()
        return calls

    def _after(self, harm: Harm) -> Outcome | None:
        """None in the forked process, which then does what is asked."""
        (self._folder / "outcome.json").unlink(missing_ok=True)

        def noted(call: Call) -> None:
            if call.number == harm.number:
                (self._folder.parent / f"{self._folder.name}-call").write_text(json.dumps([call.kind, call.path]))
            act(call)

        act = harm.act()
        status = self._forked(noted)
        if status is None:
            return None
        note = self._folder.parent / f"{self._folder.name}-call"
        kind, path = json.loads(note.read_text()) if note.is_file() else ("", "")
        note.unlink(missing_ok=True)
        result = self._folder / "outcome.json"
        return Outcome(
            what=harm.what,
            number=harm.number,
            once=harm.once,
            kind=kind,
            path=Path(path).name,
            status=status[0],
            error=json.loads(result.read_text())["error"] if result.is_file() else None,
            left=[item.name for item in checkpoints(self._run)],
            partials=len(list(self._run.glob(PARTIALS))),
            broken=broken(self._run),
        )

    def _forked(self, act: Act) -> tuple[int] | None:
        """The exit code of the forked process, which gets None and goes on with `act` at its calls."""
        child = os.fork()
        if child == 0:
            disk.PAUSE = 0
            self.layer = Layer(self._run, act)
            self.layer.install()
            return None
        return (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]),)

    def _put_back(self) -> None:
        for item in (*self._run.glob("checkpoint-*"), *self._run.glob(PARTIALS)):
            shutil.rmtree(item)
        shutil.copytree(self._backup, self._run, dirs_exist_ok=True)  # with the log, which may end in half a line


def _every_call(mode: str, folder: Path, tokenizer: Path, plan: Plan, settings: Settings, begun: Any) -> None:
    torch.set_num_threads(1)
    os.environ["TUNESMITH_HOME"] = str(folder / "home")
    ways.force(False)
    trainer = trainer_of(mode, folder, tokenizer, **settings)
    harmed = _Harmed(trainer, folder, plan)
    trainer.add_callback(harmed)
    error: BaseException | None = None
    try:
        trainer.train()
    except InterruptedError as stop:
        if stop.errno is not None:
            error = stop
    except BaseException as raised:
        error = raised
    if harmed.layer is not None:
        harmed.layer.remove()
        found = None if error is None else (_name(error), str(error))
        (folder / "outcome.json").write_text(json.dumps({"error": found, "calls": len(harmed.layer.calls)}))
        os._exit(0)
    if error is not None:
        raise error


def _name(error: BaseException) -> str:
    return TunesmithError.__name__ if isinstance(error, TunesmithError) else type(error).__name__


def harmed_saves(mode: str, folder: Path, tokenizer: Path, plan: Plan, **settings: Any) -> list[Outcome]:
    """What came of each harm; kept folders are below `folder`, each with the run in `run`."""
    folder.mkdir()
    child, _ = started(_every_call, mode, folder, tokenizer, plan, settings)
    assert ended(child) == 0
    lines = (folder / "outcomes.jsonl").read_text().splitlines()
    return [Outcome(**json.loads(line)) for line in lines]
