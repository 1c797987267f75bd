"""Processes that wait for each other."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from tests.forked import together
from tests.models import tiny
from tests.train.runs import TEXT_ROWS
from tunesmith import SFTConfig, SFTTrainer
from tunesmith.data.dataset import DataPreparer
from tunesmith.train.together import average_gradients, is_lost


def _train(folder: Path, tokenizer: Path) -> None:
    """One of two processes, of which the first takes its time to prepare the data."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    args = SFTConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, precision="fp32", disable_tqdm=True,
        max_steps=1, save_strategy="no",
    )  # fmt: skip
    prepare, began = DataPreparer.everything, dict[str, float]()

    def slow(self: Any, *arguments: Any, **named: Any) -> Any:
        began["at"] = time.monotonic()
        time.sleep(0 if args.process_index else 2)
        return prepare(self, *arguments, **named)

    DataPreparer.everything = slow  # type: ignore[method-assign]
    trainer = SFTTrainer(tiny("llama", len(loaded)), args, train_dataset=TEXT_ROWS, processing_class=loaded)
    trainer.train()
    (folder / f"{args.process_index}.json").write_text(json.dumps([trainer.state.global_step, began["at"]]))


@pytest.mark.slow
def test_the_first_process_prepares_the_data_before_the_others(tiny_model: Path, tmp_path: Path) -> None:
    together(2, _train, tmp_path, tiny_model)
    (first, began), (second, behind) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == 1
    assert behind >= began + 2


def test_errors_that_say_that_another_process_is_gone() -> None:
    assert is_lost(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:41140"))
    assert is_lost(distributed.DistBackendError("NCCL error"))
    assert not is_lost(RuntimeError("shapes cannot be multiplied"))
    assert not is_lost(torch.OutOfMemoryError("out of memory"))
    assert not is_lost(ValueError("Connection closed by peer"))


def _average() -> None:
    """One of two processes, of which the second has gradients three times those of the first."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(2, 3)) for name in "abcde"})
    model["large"] = torch.nn.Parameter(torch.zeros(50, 10))
    model["bf16"] = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    model["frozen"] = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    for name, weight in model.items():
        if name not in ("d", "e", "frozen") or (name == "d" and rank == 1):
            weight.grad = torch.full_like(weight, 1.0 + 2 * rank)
    model["b"].grad = torch.full((3, 2), 1.0 + 2 * rank).t()
    average_gradients(DistributedDataParallel(model, bucket_cap_mb=0.0001))  # 104 bytes: four of the small ones
    for name, weight in model.items():
        expected = {"d": 1.5, "e": None, "frozen": None}.get(name, 2.0)
        found = [] if weight.grad is None else weight.grad.unique().tolist()
        assert found == ([] if expected is None else [expected]), name


def test_gradients_become_their_mean_whatever_their_size_type_and_layout() -> None:
    """Those that only one process has count as zeros in the other; those that none has stay away."""
    together(2, _average)
