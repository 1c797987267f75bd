"""`tunesmith train --processes`: started together, stopped together, and one that fails ends all with its error."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import Command, free_port
from tests.models import tiny
from tests.train.runs import TEXTS, largest_difference
from tunesmith.errors import TunesmithError
from tunesmith.train.launch import Place

pytestmark = pytest.mark.processes
SETTINGS: tuple[Any, ...] = (
    "--sample-prompts",
    0,
    "--self-test",
    "off",
    "--max-steps",
    3,
    "--use-cpu",
    "--precision",
    "fp32",
    "--optim",
    "sgd",
    "--logging-steps",
    1,
)
STARTED = 120
"""Seconds in which processes that were started again must be through, on a machine that has other things to do."""
SITE = """
import os, signal, sys
from transformers import TrainerCallback

RANK, KIND = os.environ.get("RANK"), os.environ.get("FAULT")
# Which process is killed at which step, of each start: "1@2 0@3".
KILLS = os.environ.get("FAULT_KILLS", "1@1").split()


class Fault(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if KIND == "kill" and KILLS[start:] and KILLS[start] == f"{RANK}@{state.global_step}":
            os.kill(os.getpid(), signal.SIGKILL)


if RANK is not None:
    from tunesmith import SFTTrainer
    from tunesmith.model import ways

    SFTTrainer.draw_page = None
    ways.force(False)  # which way is the faster one is another question in every run

if RANK == "1" and KIND == "early":
    from tunesmith.cli import train
    from tunesmith.errors import TunesmithError

    def opened(recipe):
        raise TunesmithError("a fault before all met")

    train.opened = opened

if RANK is not None and KIND:
    import tunesmith.train.sft as sft
    from tunesmith.errors import TunesmithError

    prepare, make = sft.DataPreparer.everything, sft.BaseTrainer.__init__

    def everything(self, *args, **kwargs):
        if KIND == "data" and RANK == "1":
            raise TunesmithError("a fault in preparation")
        return prepare(self, *args, **kwargs)

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.add_callback(Fault())
        save = self.keeper._write
        if KIND == "save" and RANK == "0":
            def fail(*args, **kwargs):
                raise OSError(28, "a fault in saving")
            self.keeper._write = fail

    sft.DataPreparer.everything, sft.BaseTrainer.__init__ = everything, init
"""


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path) -> Callable[..., Command]:
    """Starts the command on TEXTS, with options and variables."""
    model = tiny("llama", 259)
    model.save_pretrained(tmp_path / "model")
    for file in tiny_model.iterdir():
        if "tok" in file.name or "template" in file.name:
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)

    def start(name: str, *options: Any, **variables: str) -> Command:
        common = ("--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / name)
        path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "TUNESMITH_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        return Command(tmp_path / f"{name}.log", "train", *common, *SETTINGS, *options, env=env | variables)

    return start


def test_two_agents_meet_as_two_machines_would_and_make_the_model_of_one(
    train: Callable[..., Command], tmp_path: Path
) -> None:
    one = train("one", "--per-device-train-batch-size", 4)
    meeting = (
        "--nodes",
        2,
        "--rendezvous",
        f"127.0.0.1:{free_port()}",
        "--per-device-train-batch-size",
        2,
        "--shard",
        "full",
    )
    machines = [train(f"machine{rank}", "--node-rank", rank, *meeting) for rank in range(2)]
    codes = [run.finish() for run in (one, *machines)]
    assert codes == [0, 0, 0], machines[0].stderr + machines[1].stderr
    assert [machine.stdout.count("saved the model") for machine in machines] == [1, 0]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "machine0")]
    assert largest_difference(*weights) < 1e-6


def test_a_machine_that_fails_before_its_processes_meet_the_others_ends_these_with_its_error(
    train: Callable[..., Command],
) -> None:
    meeting = ("--nodes", 2, "--rendezvous", f"127.0.0.1:{free_port()}")
    machines = [train(f"machine{rank}", "--node-rank", rank, *meeting, FAULT="early") for rank in range(2)]
    assert [machine.finish() for machine in machines] == [1, 2], machines[0].stderr
    assert "(--node-rank 1): process 1 of 2 failed:\n" in machines[0].stderr
    assert "error: a fault before all met\n" in machines[0].stderr
    assert "start the command on all machines again, with --resume-from-checkpoint" in machines[0].stderr


def test_a_command_that_is_killed_takes_its_processes_along_and_ends_the_other_machine(
    train: Callable[..., Command],
) -> None:
    meeting = ("--nodes", 2, "--rendezvous", f"127.0.0.1:{free_port()}", "--max-steps", 100000)
    machines = [train(f"machine{rank}", "--node-rank", rank, *meeting) for rank in range(2)]
    machines[0].until(lambda: "step 2/" in machines[0].stdout)
    machines[1].process.kill()
    assert machines[0].finish() == 1
    assert "another machine is gone\nstart the command on all machines again" in machines[0].stderr


def test_a_config_of_accelerate_starts_as_many_processes_which_share_weights_out_as_it_says(
    train: Callable[..., Command], tmp_path: Path
) -> None:
    """What is written beside it counts more."""
    (tmp_path / "accelerate.yaml").write_text(
        "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nmixed_precision: bf16\nnum_processes: 2\n"
    )
    one = train("one", "--per-device-train-batch-size", 4)
    two = train("two", "--per-device-train-batch-size", 2, "--launch-config", tmp_path / "accelerate.yaml")
    none = train("none", "--launch-config", "multi_gpu")
    codes = [run.finish() for run in (one, two, none)]
    assert codes == [0, 0, 0 if torch.cuda.is_available() else 2], two.stderr
    assert torch.cuda.is_available() or "and this machine shows none; write --processes 2" in none.stderr
    recipe = (tmp_path / "two" / "recipe.yaml").read_text()
    assert all(line in recipe for line in ("processes: 2", "shard: full", "precision: fp32"))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert largest_difference(*weights) < 1e-6


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("data", 2, "error: a fault in preparation"),
        ("save", 1, "a fault in saving"),
        ("kill", 1, "process 1 of 2 was killed: SIGKILL"),
    ],
)
def test_one_that_fails_ends_all_with_its_error(
    fault: str, code: int, said: str, train: Callable[..., Command]
) -> None:
    options = ("--per-device-train-batch-size", 2, "--save-strategy", "steps", "--save-steps", 1)
    run = train("run", *options, "--processes", 2, FAULT=fault)
    assert run.finish() == code, run.stderr
    assert said in run.stderr
    assert "Connection closed" not in run.stderr


@pytest.mark.timeout(600)  # eight processes start, two at a time
def test_killed_processes_are_started_again_and_end_in_the_same_bits(
    train: Callable[..., Command], tmp_path: Path
) -> None:
    """Before the first checkpoint, and behind the second. That of an earlier run in the folder is left alone."""
    saving = ("--save-strategy", "steps", "--save-steps", 1)
    options = ("--processes", 2, "--per-device-train-batch-size", 2, *saving, "--optim", "adamw_torch")
    whole = train("whole", *options)
    assert whole.finish() == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    run = train("run", *options, "--max-restarts", 2, FAULT="kill", FAULT_KILLS="1@0 0@2")
    assert run.finish(3 * STARTED) == 0, run.stderr
    assert "process 1 of 2 was killed: SIGKILL\nthe run begins again, since it has saved no checkpoint" in run.stderr
    assert "process 0 of 2 was killed: SIGKILL\nthe run goes on from checkpoint-2 (restart 2 of 2)" in run.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("fault", "code", "restarts"), [("kill", 1, 1), ("data", 2, 0)])
def test_what_fails_again_ends_the_run(fault: str, code: int, restarts: int, train: Callable[..., Command]) -> None:
    options = ("--processes", 2, "--per-device-train-batch-size", 2, "--max-restarts", 1, "--save-strategy", "no")
    run = train("run", *options, FAULT=fault, FAULT_KILLS="1@1 1@1")
    assert run.finish(2 * STARTED) == code, run.stderr
    assert run.stderr.count("(restart ") == restarts


def test_sigterm_to_the_command_saves_once_and_stops_all(train: Callable[..., Command], tmp_path: Path) -> None:
    run = train("run", "--per-device-train-batch-size", 2, "--processes", 2, "--max-steps", 100000)
    run.until(lambda: "step 2/" in run.stdout)
    os.kill(run.process.pid, signal.SIGTERM)
    started = time.monotonic()
    assert run.finish() == 143, run.stderr
    assert time.monotonic() - started < 30
    assert len([*(tmp_path / "run").glob("checkpoint-*")]) == 1
    assert run.stdout.count("go on:") == 1
    assert "Warning" not in run.stderr
    assert "processes: 2" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_what_cannot_be_started_is_refused() -> None:
    for place, message in (
        (Place(processes=0), "processes is 0; write 1 or more"),
        (Place(processes=1, nodes=2, node_rank=2), "--node-rank is 2 of --nodes 2"),
        (Place(processes=1, nodes=2), "--nodes needs --rendezvous HOST:PORT"),
        (Place(processes=1, max_restarts=-1), "max_restarts is -1; write 0 or more"),
        (Place(processes=1, max_restarts=1, nodes=2, rendezvous="a:1"), "max_restarts is for the processes of one"),
        (Place(processes=1, nodes=2, rendezvous="there"), "--rendezvous is there; write HOST:PORT"),
    ):
        with pytest.raises(TunesmithError, match=message):
            place.check()
