"""A run goes on with another number of processes, as if it had not been broken off."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.cases import RESUMED, run_up_to
from tests.forked import together
from tests.train.runs import largest_difference, trained
from tunesmith.errors import TunesmithError

pytestmark = pytest.mark.processes
END = 7


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with those of one process, and those of which two took 3 steps, one 2 more, and four the rest."""
    folder = tmp_path_factory.mktemp("runs")
    for name, turns in {"unbroken": [(1, END)], "resumed": [(2, 3), (1, 5), (4, END)]}.items():
        (folder / name).mkdir()
        for processes, steps in turns:
            together(processes, run_up_to, folder / name, tiny_model, steps, END)
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_two_then_one_then_four_processes_end_where_one_does(name: str, runs: Path) -> None:
    weights = [load_file(runs / kind / f"{name}.safetensors") for kind in ("unbroken", "resumed")]
    assert largest_difference(*weights) < (1e-5 if "AdamW" in name else 1e-6)
    logs: list[Any] = [json.loads((runs / kind / f"{name}.json").read_text()) for kind in ("unbroken", "resumed")]
    for expected, found in zip(*logs, strict=True):
        names = ("step", "loss", "num_tokens", "entropy", "mean_token_accuracy", "learning_rate")
        assert [found[key] for key in names] == pytest.approx([expected[key] for key in names], abs=1e-5)


def test_a_step_of_another_size_is_another_run(trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "optim": "sgd"}
    settings |= {"output_dir": str(tmp_path / "run")}
    trained(trainer_of(**settings, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    with pytest.raises(TunesmithError, match="per_device_train_batch_size: 2 -> 4"):
        trainer_of(**settings, per_device_train_batch_size=4, gradient_accumulation_steps=2).train(True)
    trainer = trainer_of(**settings | {"max_steps": 3}, per_device_train_batch_size=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
