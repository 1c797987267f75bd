"""One process, two and four train the same: weights, what is logged, what is evaluated, and each row once."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.cases import CASES, run_all
from tests.forked import together
from tests.train.runs import largest_difference

pytestmark = pytest.mark.processes
LOGGED = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with those of each number of processes."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2, 4):
        (folder / str(processes)).mkdir()
        together(processes, run_all, folder / str(processes), tiny_model, [*CASES])
    return folder


def noted(folder: Path, name: str) -> list[Any]:
    """What each process noted of a case."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}.[0-9].json"))]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_several_processes_train_as_one_does(name: str, processes: int, runs: Path) -> None:
    [one], several = noted(runs / "1", name), noted(runs / str(processes), name)
    assert len(several) == processes
    weights = [load_file(runs / str(number) / f"{name}.safetensors") for number in (1, processes)]
    assert largest_difference(*weights) < (1e-5 if "AdamW" in name else 1e-6)
    assert one["steps"] == several[0]["steps"] == len(one["logs"]) == len(several[0]["logs"])
    for expected, found in zip(one["logs"], several[0]["logs"], strict=True):
        assert [found.get(key) for key in LOGGED] == pytest.approx([expected.get(key) for key in LOGGED], abs=1e-5)
    if name == "loss function":  # whose evaluation is the mean over batches, of which several processes make fewer
        assert several[0]["eval"]["eval_loss"] == pytest.approx(one["eval"]["eval_loss"], rel=0.4)
    elif name != "drop_last":  # which one process heeds in evaluations, too
        evaluated = {key: value for key, value in one["eval"].items() if not key.endswith(("second", "time", "epoch"))}
        assert {key: several[0]["eval"][key] for key in evaluated} == pytest.approx(evaluated, abs=1e-5)
    if not name.startswith(("stream", "drop_last")):  # of which batches are read ahead
        rows = [sorted(row for part in parts for batch in part["rows"] for row in batch) for parts in ([one], several)]
        assert rows[0] == rows[1]
        if name == "loss function":  # of whose tokens nobody knows the losses
            return
        assert several[0]["examples"].pop("mean") == pytest.approx(one["examples"].pop("mean"), abs=1e-5)
        assert several[0]["examples"] == one["examples"]
