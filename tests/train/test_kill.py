"""A run that was killed at any moment and goes on ends in the same weights, to the bit, as one that was not."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.train.children import MODES, STEPS, in_a_child, log_in, weights_in
from tunesmith.train.checkpoint import PARTIALS, checkpoints, newest_whole, verify

EVENTS = ("on_step_begin", "on_substep_end", "on_optimizer_step", "on_step_end", "on_save")
KILLED = -9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[str], Path]:
    """The folder of the run of a mode that nobody kills."""
    found: dict[str, Path] = {}

    def make(mode: str) -> Path:
        if mode not in found:
            found[mode] = tmp_path_factory.mktemp("whole")
            assert in_a_child(mode, found[mode], tiny_model) == 0
        return found[mode]

    return make


def same(first: Path, second: Path) -> None:
    found, expected = weights_in(first), weights_in(second)
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    assert different == []
    names = ("step", "loss", "num_tokens", "learning_rate", "epoch", "mean_token_accuracy", "grad_norm")
    logs = [[[entry[name] for name in names] for entry in log_in(folder)] for folder in (first, second)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[pytest.mark.slow] if mode != "sources" else []) for mode in MODES]
)
def test_killed_at_random_steps_it_ends_in_the_same_weights(
    mode: str, tmp_path: Path, tiny_model: Path, whole: Callable[[str], Path]
) -> None:
    killed = tmp_path / "killed"
    draw = random.Random()
    moments = sorted(draw.sample(range(1, STEPS), 2))
    events = [draw.choice(EVENTS) for _ in moments]
    print(f"killed at {list(zip(events, moments, strict=True))}")
    for event, step in zip(events, moments, strict=True):
        assert in_a_child(mode, killed, tiny_model, (event, step)) == KILLED
    assert in_a_child(mode, killed, tiny_model) == 0
    same(killed, whole(mode))


def test_killed_while_it_saves_it_goes_on_from_the_checkpoint_before(
    tmp_path: Path, tiny_model: Path, whole: Callable[[str], Path]
) -> None:
    """A save flushes about 20 times: killed in the first one, there is nothing; later, there is what was whole."""
    killed = tmp_path / "killed"
    last = whole("sources") / "run" / f"checkpoint-{STEPS}"
    flushes = len([path for path in last.rglob("*") if path.is_file()])
    for number in (2, flushes + 5, 3 * flushes):
        assert in_a_child("sources", killed, tiny_model, ("fsync", number)) == KILLED
        assert len(list((killed / "run").glob(PARTIALS))) == 1
        for folder in checkpoints(killed / "run"):
            verify(folder)
    assert in_a_child("sources", killed, tiny_model, async_save=True, save_steps=2) == 0
    assert not list((killed / "run").glob(PARTIALS))
    same(killed, whole("sources"))


@pytest.mark.slow
def test_it_goes_on_with_the_matrix_library_that_it_began_with(
    tmp_path: Path, tiny_model: Path, whole: Callable[[str], Path]
) -> None:
    killed, other = tmp_path / "killed", tmp_path / "other"
    assert in_a_child("full", killed, tiny_model, ("on_step_begin", 4)) == KILLED
    assert newest_whole(killed / "run").folder.name == "checkpoint-4"
    assert in_a_child("full", killed, tiny_model, onednn=True) == 0
    same(killed, whole("full"))
    assert in_a_child("full", other, tiny_model, onednn=True) == 0
    expected = weights_in(whole("full"))
    assert any(not torch.equal(value, expected[name]) for name, value in weights_in(other).items())
