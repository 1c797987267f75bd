"""A disk that refuses any call of a save: the run stops and says so, what was saved before is whole, and it goes on."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.children import SAVED_AT, Outcome, Plan, harmed_saves, same
from tests.faults.figures import FIGURES, LONG
from tests.faults.layer import ERRORS, REMOVING
from tests.train.children import in_a_child
from tunesmith.runs.checkpoints import newest_whole

pytestmark = pytest.mark.slow
LATER: dict[str, Any] = {"async_save": True}
SAID = {
    "ENOSPC": r"the disk of .*run is full: the checkpoint takes about .* free .* and go on with --resume-from-check",
    "EIO": r"no checkpoint can be written to .*run: .*Input/output error.*go on with --resume-from-checkpoint",
    "EACCES": r"no checkpoint can be written to .*run: .*Permission denied.*go on with --resume-from-checkpoint",
}
NEW = f"checkpoint-{SAVED_AT}"


def judge(outcome: Outcome) -> None:
    """One error at a call that the disk may refuse once is tried again, or is of no weight; a full disk is said at
    once. Whatever happens, there is no half of a checkpoint, and no partial folder but of what could not be removed."""
    assert outcome.status == 0, outcome
    assert outcome.broken == [], outcome
    assert "checkpoint-2" in outcome.left, outcome
    if outcome.kind in REMOVING and outcome.error is None:
        return
    assert outcome.partials == 0, outcome
    if outcome.error is None:
        assert NEW in outcome.left, outcome
        return
    name, text = outcome.error
    assert name == "TunesmithError", outcome
    assert re.search(SAID[outcome.what], text), outcome
    assert not outcome.once or outcome.what == "ENOSPC", outcome


@pytest.mark.parametrize("settings", [{}, LATER] if LONG else [{}], ids=str)
@pytest.mark.timeout(600)
def test_an_error_at_any_call_of_a_save_is_said_and_leaves_what_was_whole(
    settings: dict[str, Any], tmp_path: Path, tiny_model: Path, whole: Callable[[str], Path]
) -> None:
    sample = (10 if settings else None) if LONG else 3
    plan = Plan(whats=tuple(ERRORS), onces=(False, True), sample=sample, once_sample=12 if LONG else 2, kept=1)
    outcomes = harmed_saves("sources", tmp_path / "run", tiny_model, plan, **settings)
    for outcome in outcomes:
        judge(outcome)
    FIGURES["injected errors"] += len(outcomes)
    stopped = [outcome for outcome in outcomes if outcome.error is not None]
    FIGURES["injected errors that stopped the run, with a message"] += len(stopped)
    assert {outcome.what for outcome in stopped} == set(ERRORS)
    kept = sorted((tmp_path / "run").glob("E*"))
    assert len(kept) == 6
    for folder in kept if LONG and not settings else kept[:1]:
        before = newest_whole(folder / "run").folder.name
        assert before in ("checkpoint-2", NEW)
        assert in_a_child("sources", folder, tiny_model, **settings) == 0
        same(folder, whole("sources"))
        FIGURES["resumed after an error"] += 1
        FIGURES["runs that ended in the same bits"] += 1
