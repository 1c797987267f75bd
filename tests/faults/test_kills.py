"""A run that was killed at any moment, also while it saves, goes on and ends in the same weights, to the bit."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.children import (
    KILLED,
    Plan,
    broken,
    harmed_saves,
    killed_after,
    killed_at_a_call,
    same,
)
from tests.faults.figures import FIGURES, LONG
from tests.train.children import MODES, in_a_child
from tunesmith.runs.checkpoints import PARTIALS, newest_whole
from tunesmith.runs.files import METRICS

pytestmark = pytest.mark.slow
Whole = Callable[[str], Path]
LATER: dict[str, Any] = {"async_save": True}
ALL_RUNS = [(mode, settings) for mode in MODES for settings in ({}, LATER)]
RUNS = ALL_RUNS if LONG else [("sources", {}), ("full", LATER)]
KILLS = 7 if LONG else 2
CALLS, SECONDS = 90, 1.5
"""A kill is at most so many calls, or so long, behind the beginning; a save has about 70 calls. Where a run is over
by then, half as long, and so on."""


@pytest.mark.parametrize(("mode", "settings"), RUNS, ids=str)
@pytest.mark.timeout(600)
def test_killed_at_random_moments_it_ends_in_the_same_weights(
    mode: str, settings: dict[str, Any], tmp_path: Path, tiny_model: Path, whole: Whole
) -> None:
    """A run that ends before it was killed often enough is compared, and another begun."""
    draw, kills, runs, seconds = random.Random(f"{mode} {settings}"), 0, 0, SECONDS
    while kills < KILLS:
        folder, runs = tmp_path / f"run-{runs}", runs + 1
        assert runs < 6, "kills come too late"
        code = KILLED
        while kills < KILLS and code == KILLED:
            if kills % 2 == 0:
                moment: float = draw.randint(1, CALLS)
                code, saving = killed_at_a_call(mode, folder, tiny_model, int(moment), **settings)
            else:
                moment = draw.uniform(0, seconds)
                code, saving = killed_after(mode, folder, tiny_model, moment, **settings)
            print(f"kill {kills} at {moment}: {code}, in a save: {saving}")
            assert code in (KILLED, 0)
            assert broken(folder / "run") == []
            if code == KILLED:
                kills += 1
                FIGURES["kills"] += 1
                FIGURES["kills in a save"] += saving
            elif isinstance(moment, float):
                seconds /= 2
        if code == KILLED:
            assert in_a_child(mode, folder, tiny_model, **settings) == 0
        assert not list((folder / "run").glob(PARTIALS))
        same(folder, whole(mode))
        FIGURES["runs that ended in the same bits"] += 1
    FIGURES["resumed after a kill"] += kills


@pytest.mark.parametrize("settings", [{}, LATER] if LONG else [{}], ids=str)
@pytest.mark.timeout(600)
def test_killed_at_any_call_of_a_save_only_whole_checkpoints_are_left(
    settings: dict[str, Any], tmp_path: Path, tiny_model: Path, whole: Whole
) -> None:
    plan = Plan(whats=("kill",), onces=(False,), sample=None if LONG else 10, kept=4 if LONG else 1)
    outcomes = harmed_saves("sources", tmp_path / "run", tiny_model, plan, **settings)
    assert len(outcomes) >= (60 if LONG else 10)
    for outcome in outcomes:
        assert outcome.status == KILLED, outcome
        assert outcome.broken == [], outcome
        assert "checkpoint-2" in outcome.left, outcome
    FIGURES["kills"] += len(outcomes)
    FIGURES["kills in a save"] += sum(outcome.path != METRICS for outcome in outcomes)
    survivors = sorted((tmp_path / "run").glob("kill-*"))
    assert len(survivors) == plan.kept
    for folder in survivors:
        assert in_a_child("sources", folder, tiny_model, **settings) == 0
        assert not list((folder / "run").glob(PARTIALS))
        same(folder, whole("sources"))
        FIGURES["resumed after a kill"] += 1
        FIGURES["runs that ended in the same bits"] += 1


def test_it_goes_on_with_the_matrix_library_that_it_began_with(tmp_path: Path, tiny_model: Path, whole: Whole) -> None:
    killed = tmp_path / "killed"
    assert in_a_child("full", killed, tiny_model, ("on_step_begin", 4)) == KILLED
    assert newest_whole(killed / "run").folder.name == "checkpoint-4"
    assert in_a_child("full", killed, tiny_model, onednn=True) == 0
    same(killed, whole("full"))
    last = newest_whole(killed / "run").manifest
    assert last is not None
    assert not last.onednn
