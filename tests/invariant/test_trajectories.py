"""Small runs of every kind go as they went when `pinned.json` was written.

Where a change is meant, `python tests/invariant/trajectories.py pin tests/invariant/pinned.json` writes it anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.invariant.small_runs import RUNS, build_models
from tests.invariant.trajectories import differences, dropout_mask, pinned, run

PINNED: dict[str, Any] = json.loads((Path(__file__).parent / "pinned.json").read_text(encoding="utf-8"))

# Another processor, or another number of threads, takes the same sums in fp32 in another order. Each is off by some
# 1e-7 of itself then, which twelve steps at moderate learning rates hardly amplify: with MKL and torch held to SSE or
# AVX2 in place of AVX-512, with oneDNN on two threads, and with the last bit of every weight drawn anew, losses moved
# by up to 5e-7 and gradient norms by up to 4e-6. A learning rate that is off by a thousandth moves losses by 1e-4.
TOLERANCE = 2e-5
# Activations that are rounded to 8 bits may fall on the other side of a step, a 127th of the row's largest. One such
# moved a loss by 4e-5 and a gradient norm by 7e-4.
TOLERANCE_OF_EIGHT_BIT = 5e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_models(folder)
    return folder


@pytest.mark.reports  # which are among the files
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_as_it_went(name: str, models: Path, tmp_path: Path) -> None:
    found, expected = pinned(run(name, models, tmp_path / "run")), PINNED["runs"][name]
    if name == "lora" and dropout_mask() != PINNED["dropout"]:  # the same run with other random numbers
        for facts in (found, expected):
            del facts["steps"]["loss"], facts["steps"]["grad_norm"]
    told = list(differences(found, expected, TOLERANCE_OF_EIGHT_BIT if name == "eight_bit" else TOLERANCE))
    assert not told, "\n".join(told)


def test_what_is_pinned_is_what_runs() -> None:
    assert list(PINNED["runs"]) == list(RUNS)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"a": [1.0, 2]}, []),
        ({"a": [1.0000000000000002, 2]}, ["/a/0: 1.0000000000000002, expected 1.0 (relative 2.2e-16)"]),
        ({"a": [1.0, 3]}, ["/a/1: 3, expected 2"]),
        ({"a": [1.0, 2.0]}, ["/a/1: 2.0, expected 2"]),
        ({"a": [1.0]}, ["/a: 1 items, expected 2"]),
        ({"a": None}, ["/a: None, expected [1.0, 2]"]),
        ({"a": [1.0, 2], "b": 1}, ["/b: only in what was found"]),
        ({}, ["/a: only in what was expected"]),
    ],
)
def test_every_difference_is_told(found: Any, told: list[str]) -> None:
    assert list(differences(found, {"a": [1.0, 2]})) == told


def test_a_tolerance_is_for_floats_only() -> None:
    assert not list(differences([1.00001, 1], [1.0, 1], tolerance=2e-5))
    assert len(list(differences([1.00003, 100001], [1.0, 100000], tolerance=2e-5))) == 2
