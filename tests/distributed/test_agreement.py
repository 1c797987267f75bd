"""Processes that would not train the same say so before the first step, each of them, and what differs."""

import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.forked import together
from tests.models import tiny
from tests.train.runs import TEXTS
from tunesmith import SFTConfig, SFTTrainer
from tunesmith.errors import TunesmithError
from tunesmith.runs import describe

pytestmark = pytest.mark.processes


def versions(folder: Path, tokenizer_folder: Path) -> None:
    """The second process has another version of torch; the first notes what is said."""
    if os.environ["RANK"] == "1":
        found = describe.versions()
        pytest.MonkeyPatch().setattr("tunesmith.train.agreement.versions", lambda: found | {"torch": "2.0.0"})
    else:
        logging.getLogger("tunesmith").addHandler(logging.FileHandler(folder / "said"))
    run(folder, tokenizer_folder, (0, 0), {}, {})


def test_other_versions_are_said(tiny_model: Path, tmp_path: Path) -> None:
    together(2, versions, tmp_path, tiny_model)
    assert f"other versions: torch 2.0.0, and {version('torch')}. Install" in (tmp_path / "said").read_text()
    assert not [*tmp_path.glob("error*")]


def run(folder: Path, tokenizer_folder: Path, seeds: tuple[int, int], *own: dict[str, Any]) -> None:
    """Notes the error of each process, whose model, row 0 and settings may be its own. One that is `apart` sees nothing
    of what the other writes."""
    rank = int(os.environ["RANK"])
    settings = {"save_strategy": "no", **own[rank]}
    if settings.pop("apart", False):
        seen, hidden = Path.is_dir, f"machine{1 - rank}"
        pytest.MonkeyPatch().setattr(Path, "is_dir", lambda folder: hidden not in str(folder) and seen(folder))
    rows = [settings.pop("row", TEXTS[0]), *TEXTS[1:]]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    args = SFTConfig(
        output_dir=str(folder / f"machine{rank}"), report_to="none", use_cpu=True, precision="fp32", max_steps=1,
        self_test="off", disable_tqdm=True, **settings,
    )  # fmt: skip
    model = tiny("llama", len(tokenizer))
    torch.manual_seed(seeds[rank])
    torch.nn.init.normal_(model.model.norm.weight)
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_dict({"text": rows}), processing_class=tokenizer)
    try:
        trainer.train()
    except TunesmithError as error:
        (folder / f"error{rank}").write_text(str(error))


SAVED = {"shard": "full", "save_strategy": "steps"}


@pytest.mark.parametrize(
    ("seeds", "own", "said"),
    [
        ((0, 0), ({}, {"row": "another"}), "data, content: "),
        ((0, 0), ({}, {"learning_rate": 0.5}), "learning_rate: 0.5, and 2e-05"),
        ((0, 0), ({}, {"logging_steps": 3}), "logging_steps: 3, and 10"),
        ((0, 1), ({"shard": "full"}, {"shard": "full"}), "shard: process 1 on "),
        ((0, 0), (SAVED, SAVED | {"apart": True}), "machine0 of the first process is not there for process 1 on "),
    ],
)
def test_what_differs_is_told_by_all(
    seeds: tuple[int, int], own: tuple[dict[str, Any], ...], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    together(2, run, tmp_path, tiny_model, seeds, *own)
    errors = [(tmp_path / f"error{rank}").read_text() for rank in range(2)]
    assert said in errors[0]
    assert errors[0].replace("machine0", "machine1") == errors[1].replace("machine0", "machine1")


def test_weights_and_folders_of_its_own_do_not_matter_where_the_first_gives_its_weights_to_all(
    tiny_model: Path, tmp_path: Path
) -> None:
    together(2, run, tmp_path, tiny_model, (0, 1), {}, {})
    assert not [*tmp_path.glob("error*")]
