"""Processes don't look for weights that a step has not used, unless they are told to, and stop where there are some."""

from pathlib import Path

import pytest
import torch

from tests.distributed.cases import trainer
from tests.forked import together
from tunesmith import SFTTrainer
from tunesmith.errors import TunesmithError

pytestmark = pytest.mark.processes


def _train(folder: Path, tokenizer: Path) -> None:
    SFTTrainer.draw_page = None
    for searched in (None, True):
        made = trainer("short last step", 2, tokenizer, folder, max_steps=2, ddp_find_unused_parameters=searched)
        made.model.idle = torch.nn.Linear(2, 2)
        assert made.accelerator.ddp_handler.find_unused_parameters is bool(searched)
        if searched:
            made.train()
            assert made.state.global_step == 2
        else:
            with pytest.raises(TunesmithError, match=r"idle\.weight, idle\.bias\. Processes wait for these.*: true"):
                made.train()


def test_a_weight_that_is_not_used_stops_processes_that_wait_for_it(tiny_model: Path, tmp_path: Path) -> None:
    together(2, _train, tmp_path, tiny_model)
