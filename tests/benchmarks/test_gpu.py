"""The checks of a GPU, rehearsed: what is right passes, and what is wrong is reported as failed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import kernel_checks, training_checks
from benchmarks.gpu.__main__ import SECTIONS, examine, in_process_of_its_own, main, write
from benchmarks.gpu.kernel_checks import BY_DOCUMENT
from benchmarks.gpu.stand_ins import gpu_stand_ins
from benchmarks.gpu.verdicts import Check, Outcome, Place, Section, checks_of, judged
from tests.model.kernels import Kernels, by_document
from tunesmith.model import attention
from tunesmith.train.recovery import Recovery


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "sections").mkdir()
    return Place(out=tmp_path, rehearsed=True)


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    with gpu_stand_ins() as kernels:
        yield kernels


@pytest.fixture
def one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is taken: that is no matter of right and wrong."""
    monkeypatch.setattr(kernel_checks, "_milliseconds", lambda *_: 1.0)


def outcomes(trials: Callable[[Place], Any], place: Place, *parts: str) -> dict[str, Outcome]:
    """Outcomes by name, of the checks in whose name one of the `parts` is."""

    def chosen(place: Place) -> Iterator[Any]:
        return (pair for pair in trials(place) if not parts or any(part in pair[0] for part in parts))

    section = Section(name="chosen", title="", trials=chosen, seconds=1)
    return {check.name: check.verdict.outcome for check in checks_of(section, place)}


# Kernels


@pytest.mark.usefixtures("one_shape", "kernels")
def test_right_kernels_pass(place: Place) -> None:
    found = outcomes(kernel_checks.attention, place)
    assert set(found.values()) == {"passed"}
    assert len(found) == 4 + 6 + 12 + 3 + 2 + 9  # PyTorch's, FlashAttention 2, by document, taken, speed, trees


WRONG: dict[str, Callable[..., Tensor]] = {
    "outputs": lambda q, k, v, *rest: by_document(q, k, v, *rest) * 1.01,
    "gradient": lambda q, k, v, *rest: by_document(q, 1.01 * k - 0.01 * k.detach(), v, *rest),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("one_shape")
def test_a_kernel_that_is_wrong_by_one_percent_has_failed(place: Place, kernels: Kernels, name: str) -> None:
    """A run takes it: its own trial on a small example allows what bfloat16 rounds."""
    kernels.compute = WRONG[name]
    found = outcomes(kernel_checks.attention, place)
    wrong = {check for check, outcome in found.items() if outcome == "failed"}
    assert wrong == {check for check in found if check.startswith(("PyTorch's varlen attention", "FlashAttention 2"))}
    assert found["what a run takes in bf16"] == "passed"


def test_a_kernel_that_a_run_leaves_alone_has_failed(place: Place, kernels: Kernels) -> None:
    kernels.compute = lambda *arguments: by_document(*arguments) * 2
    assert outcomes(kernel_checks.attention, place, "taken", "takes in bf16") == {"what a run takes in bf16": "failed"}


@pytest.mark.usefixtures("kernels")
def test_a_branch_that_does_not_see_what_it_continues_has_failed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = attention._runs
    monkeypatch.setattr(attention, "_runs", lambda parents: runs([-1] * len(parents)))
    found = outcomes(kernel_checks.attention, place, "tree")
    assert set(found.values()) == {"failed"}


def test_kernels_that_are_not_there_are_left_out(place: Place, kernels: Kernels) -> None:
    kernels.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    found = outcomes(kernel_checks.attention, place, "bf16, causal", "takes in bf16")
    assert found == {
        "PyTorch's varlen attention, bf16, causal": "left out",
        "FlashAttention 2, bf16, causal": "left out",
        f"{BY_DOCUMENT}, bf16, causal": "passed",
        "tree of prefixes, bf16, causal": "passed",
        "what a run takes in bf16": "passed",
    }


# Training


def test_losses_other_than_those_of_the_cpu_have_failed(place: Place) -> None:
    [trial] = [trial for name, trial in training_checks.reference(place) if name == "lora"]
    line = json.dumps(Check(name="lora", verdict=trial()).to_json())
    place.lines("reference").write_text(line)
    assert outcomes(training_checks.training, place, "lora, fp32") == {"lora, fp32": "passed"}
    place.lines("reference").write_text(line.replace('"losses": [', '"losses": [1'))
    assert outcomes(training_checks.training, place, "lora, fp32") == {"lora, fp32": "failed"}


def test_a_recovery_that_loses_a_part_of_the_batch_has_failed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcomes(training_checks.recovery, place, "in a step") == {"a batch, in a step": "passed"}
    parts = Recovery._parts
    monkeypatch.setattr(Recovery, "_parts", lambda self, batch: parts(self, batch)[:1])
    assert outcomes(training_checks.recovery, place, "in a step") == {"a batch, in a step": "failed"}


# Sections and results


def test_a_section_that_crashes_or_hangs_has_failed_and_keeps_what_it_found(place: Place) -> None:
    (place.out / "logs").mkdir()
    unknown = Section(name="unknown", title="", trials=lambda place: [], seconds=60)
    before = Check(name="before", verdict=judged(True, "right"))
    place.lines("unknown").write_text(json.dumps(before.to_json()) + '\n{"name": "cut o')
    kept, crash = in_process_of_its_own(unknown, place, seconds=60)
    assert kept == before
    assert crash.verdict.outcome == "failed"
    assert "crashed with exit code 1" in crash.verdict.found
    assert "KeyError: 'unknown'" in crash.verdict.found  # the end of its log
    [hang] = in_process_of_its_own(SECTIONS[0], place, seconds=0.01)
    assert (hang.verdict.outcome, hang.verdict.found[:15]) == ("failed", "was ended after")
    [late] = in_process_of_its_own(unknown, place, seconds=0)
    assert late.verdict.outcome == "failed"


@pytest.mark.parametrize(("right", "code"), [(True, 0), (False, 1)])
def test_the_json_the_page_and_the_exit_code_say_the_same(
    place: Place, right: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(section: Section, place: Place, *, seconds: float) -> list[Check]:
        return [Check(name="<kernel>", verdict=judged(right, "1% off", error=float("nan")))]

    monkeypatch.setattr("benchmarks.gpu.__main__.in_process_of_its_own", found)
    assert write(examine(SECTIONS[1:2], place), place) == code
    result = json.loads((place.out / "gpu.json").read_text())
    [section] = result["sections"]
    assert section["checks"] == [
        {"name": "<kernel>", "outcome": "passed" if right else "failed", "found": "1% off", "figures": {"error": None}}
    ]
    page = (place.out / "gpu.html").read_text()
    assert ("All 1 check passed" in page, "1 check failed" in page, "What failed" in page) == (
        (True, False, False) if right else (False, True, True)
    )
    assert "&lt;kernel&gt;" in page
    assert "A rehearsal on a CPU" in page


def test_without_a_gpu_that_is_said_and_nothing_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("There is no NVIDIA GPU here that torch can use;")
    assert not (tmp_path / "out").exists()
