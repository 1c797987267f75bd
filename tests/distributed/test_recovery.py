"""A process that is out of memory does its part of the step again, the others wait, and the weights stay right."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.cases import trainer
from tests.forked import together
from tests.train.runs import largest_difference, trained
from tunesmith import SFTTrainer

pytestmark = pytest.mark.processes
# By the names of `cases.CASES`: the most tokens for which process 1 has room.
ROOM = {"short last step": 60, "accumulation": 40, "padded": 60, "a step of one row": 10, "LoRA, AdamW": 60}
LATE = ("accumulation", "packed")
"""Cases in which a backward of process 1 fails, when half of its gradients are there."""
CASES = sorted({*ROOM, *LATE})


def run_short_of_memory(folder: Path, tokenizer: Path) -> None:
    """Train each case, process 1 of 2 without room for larger micro-batches than ROOM."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    SFTTrainer.draw_page = None
    for name in CASES:
        made = trainer(name, processes, tokenizer, folder / name, self_test="off", rehearse="auto")
        if rank == 1:
            _let_backward_fail(made) if name in LATE else _give_room(made, ROOM[name])
        weights = trained(made)
        if rank == 0:
            _check_what_is_told(made, folder / name, processes)
            save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{name}.safetensors")


def _check_what_is_told(made: Any, folder: Path, processes: int) -> None:
    """By the first process, of all."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = [text for _, text in made.events]
    assert [line["event"] for line in lines if "event" in line] == events
    if processes == 1:
        assert not events
        assert not any("processes" in line for line in lines)
        return
    assert any(text.startswith("process 1: out of memory in a micro-batch of ") for text in events)
    for line in lines:
        if "loss" in line:
            assert [sorted(of_one) for of_one in line["processes"]] == 2 * [
                ["memory_mb", "tokens_per_second", "waited"]
            ]
            assert all(0 <= of_one["waited"] < 1 for of_one in line["processes"])


def _give_room(made: Any, tokens: int) -> None:
    model: Any = made.model
    forward = model.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].numel() > tokens and not model.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    model.forward = limited


def _let_backward_fail(made: Any) -> None:
    calls = [0]

    def fail(gradient: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient

    made.model.get_parameter("model.layers.0.self_attn.q_proj.weight").register_hook(fail)


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
        together(processes, run_short_of_memory, folder / str(processes), tiny_model)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_one_process_short_of_memory_changes_no_weights(name: str, runs: Path) -> None:
    weights = [load_file(runs / str(processes) / f"{name}.safetensors") for processes in (1, 2)]
    assert largest_difference(*weights) < (1e-5 if "AdamW" in name else 1e-6)
