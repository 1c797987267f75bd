"""Two workers of Ray, one of which is killed, end where a run without Ray does."""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.models import tiny
from tests.train.runs import TEXTS, largest_difference
from tunesmith.errors import TunesmithError
from tunesmith.runs.checkpoints import Manifest

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")
STEPS, KILLED = 5, 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two cores on this machine, which nothing outside it reaches."""
    variables = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a cluster of one machine, at its loopback address
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        import ray

        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, logging_level=logging.ERROR)
        yield
        ray.shutdown()


def work_and_die_once(work: dict[str, Any]) -> None:
    """As `train_on_worker`, but the second worker is killed in a step, the first time."""
    from transformers import TrainerCallback

    from tunesmith.integrations import ray as integration
    from tunesmith.train.trainer import BaseTrainer

    once = Path(work["settings"]["output_dir"]).parent / "killed"

    class Fault(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == KILLED and args.process_index == 1 and not once.exists():
                once.write_text(os.environ["MASTER_ADDR"])
                os.kill(os.getpid(), signal.SIGKILL)

    begin = BaseTrainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.add_callback(Fault())

    BaseTrainer.__init__ = init  # type: ignore[method-assign]
    integration.train_on_worker(work)


def settings_of(folder: Path, tiny_model: Path) -> dict[str, Any]:
    model = tiny("llama", 259)
    model.save_pretrained(folder / "model")
    for file in tiny_model.iterdir():
        if "tok" in file.name or "template" in file.name:
            (folder / "model" / file.name).write_bytes(file.read_bytes())
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / "rows.jsonl"),
        "output": str(folder / "run"),
    }
    settings |= {"self_test": "off", "sample_prompts": 0, "use_cpu": True, "precision": "fp32", "optim": "sgd"}
    settings |= {
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 0.5,
    }
    return settings | {"disable_tqdm": True, "per_device_train_batch_size": 2}


@pytest.mark.processes
@needs_ray
def test_a_killed_worker_is_started_again_and_the_end_is_that_of_an_unbroken_run(
    tiny_model: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train import FailureConfig, RunConfig

    from tunesmith.cli.train import run
    from tunesmith.integrations import ray as integration
    from tunesmith.settings.recipe import resolve

    settings = settings_of(tmp_path, tiny_model)
    monkeypatch.setattr(integration, "train_on_worker", work_and_die_once)
    result = integration.train(
        settings,
        num_workers=2,
        run_config=RunConfig(storage_path=str(tmp_path / "store"), failure_config=FailureConfig(max_failures=1)),
    )
    assert (tmp_path / "killed").read_text() == "127.0.0.1"
    alone = tmp_path / "alone"
    run(resolve(None, settings | {"output": str(alone), "per_device_train_batch_size": 4}))
    expected = load_file(alone / "model.safetensors")
    assert largest_difference(load_file(tmp_path / "run" / "model.safetensors"), expected) < 1e-6

    assert result.checkpoint is not None
    assert largest_difference(load_file(Path(result.checkpoint.path) / "model.safetensors"), expected) < 1e-6
    logged = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    last = [entry["loss"] for entry in logged if entry.get("step") == STEPS and "loss" in entry]
    assert result.metrics is not None
    assert result.metrics["step"] == STEPS
    assert result.metrics["loss"] == pytest.approx(last[0], abs=1e-5)
    steps = [Manifest.read(Path(checkpoint.path)).step for checkpoint, _ in result.best_checkpoints or ()]
    assert sorted(steps) == [2, 4, 5]
    # The run in the output folder went on, where its checkpoint was still there.
    folders = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len({Manifest.read(folder).run for folder in folders}) == 1


@pytest.mark.processes
@needs_ray
def test_what_a_worker_finds_wrong_is_the_error_of_the_run(tiny_model: Path, tmp_path: Path, cluster: None) -> None:
    from ray.train import RunConfig

    from tunesmith.integrations.ray import train

    settings = settings_of(tmp_path, tiny_model)
    (tmp_path / "rows.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(TunesmithError, match="question"):
        train(settings, run_config=RunConfig(storage_path=str(tmp_path / "store")))
    with pytest.raises(TunesmithError, match="processes is 4, and Ray starts num_workers=1; leave processes out"):
        train(settings | {"processes": 4})


def test_without_ray_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tunesmith.integrations.ray", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TunesmithError, match=r'integrations\.ray needs ray: pip install "tunesmith\[ray\]"$'):
        import_module("tunesmith.integrations.ray")
