"""A stream in parts: each process reads its own files, each row is trained on once an epoch, also after a kill."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from torch import distributed
from transformers import AutoTokenizer, TrainerCallback

from tests.forked import together
from tests.models import tiny
from tunesmith import SFTConfig, SFTTrainer
from tunesmith.errors import TunesmithError

pytestmark = pytest.mark.processes
FILES = (70, 70, 71, 67)
"""Rows of each file. A step takes 8 of either half, 140 and 138 rows: an epoch has 18 steps."""
EPOCH, STEPS, KILLED = 18, 24, 11


def row(number: int) -> dict[str, list[int]]:
    return {"input_ids": [number // 256 + 1, number % 256, 3, 4], "labels": [number // 256 + 1, number % 256, 3, 4]}


def rows(files: list[int], counted: str) -> Iterator[dict[str, Any]]:
    for file in files:
        for number in range(sum(FILES[:file]), sum(FILES[: file + 1])):
            with Path(counted).open("a") as read:
                read.write(f"{number}\n")
            yield row(number)


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step != STEPS:
            distributed.barrier()
            time.sleep(1)  # until the others are through, too
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, tokenizer: Path, last: int) -> None:
    """Train up to step `last`, where all processes are killed, from the checkpoint that there is. The rows that reach
    the collator are written down as they come."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    SFTTrainer.draw_page = None
    counted = str(folder / f"read.{rank}")
    args = SFTConfig(
        output_dir=str(folder / "run"), report_to="none", use_cpu=True, precision="fp32", disable_tqdm=True,
        per_device_train_batch_size=16 // processes, max_steps=STEPS, save_strategy="steps", save_steps=4,
        stream_parts=2, shuffle_dataset=True, shuffle_buffer_size=10, allow_no_eos=True, self_test="off",
        logging_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        tiny("llama", 259),
        args,
        train_dataset=IterableDataset.from_generator(rows, gen_kwargs={"files": [0, 1, 2, 3], "counted": counted}),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
        callbacks=[Kill(last)],
    )
    collate, read = trainer.data_collator, folder / f"rows.{rank}.{last}"

    def noting(batch: list[dict[str, Any]]) -> Any:
        numbers = [(one["input_ids"][0] - 1) * 256 + one["input_ids"][1] for one in batch if len(one["labels"]) > 1]
        with read.open("a") as file:
            file.write(json.dumps(numbers) + "\n")
        return collate(batch)

    trainer.data_collator = noting
    Path(counted).unlink()  # what was looked at before training
    saved = [int(path.name.rpartition("-")[2]) for path in (folder / "run").glob("checkpoint-*")]
    if rank == 0:
        (folder / f"began.{last}").write_text(str(max(saved, default=0)))
    trainer.train(resume_from_checkpoint=bool(saved))


def steps(folder: Path, processes: int, *ends: int) -> list[list[int]]:
    """The rows of each step that was taken last, sorted; of runs that ended at the steps `ends`."""
    taken: dict[int, list[int]] = {}
    for end in ends:
        began = int((folder / f"began.{end}").read_text())
        own = [(folder / f"rows.{rank}.{end}").read_text().splitlines() for rank in range(processes)]
        for step, parts in zip(range(began, end), zip(*own, strict=True), strict=False):
            taken[step] = sorted(number for part in parts for number in json.loads(part))
    return [taken[step] for step in range(STEPS)]


@pytest.mark.timeout(400)
def test_each_row_comes_once_an_epoch_from_its_own_process_and_a_kill_changes_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    found = {}
    for name, processes, ends in (
        ("one", 1, [STEPS]),
        ("two", 2, [STEPS]),
        ("killed", 2, [KILLED, EPOCH + 3, STEPS]),
    ):
        (tmp_path / name).mkdir()
        for end in ends:
            together(processes, run, tmp_path / name, tiny_model, end, code=0 if end == STEPS else -signal.SIGKILL)
        found[name] = steps(tmp_path / name, processes, *ends)
    assert found["one"] == found["two"] == found["killed"]
    epoch = [number for step in found["one"][:EPOCH] for number in step]
    assert sorted(epoch) == [*range(sum(FILES))]
    again = [number for step in found["one"][EPOCH:] for number in step]
    assert max(Counter(again).values()) == 1
    assert found["one"][EPOCH:] != found["one"][: STEPS - EPOCH]
    for rank in (0, 1):
        lines = (tmp_path / "two" / f"rows.{rank}.{STEPS}").read_text().splitlines()
        own = {number for line in lines for number in json.loads(line)}
        assert len(own) in (sum(FILES[:2]), sum(FILES[2:]))
        read = Counter(map(int, (tmp_path / "two" / f"read.{rank}").read_text().split()))
        # A run is known by the first examples of the stream, for which the first process reads a batch of it once.
        assert all(read[number] <= 1 - rank for number in range(sum(FILES)) if number not in own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stream_parts": 5}, "of which a stream has 4; write 4 or less"),
        ({"stream_parts": 3}, "of which the 8 rows of a step can't come evenly; write a divisor of 8"),
        ({"stream_parts": 2, "dataloader_num_workers": 1}, "dataloader_num_workers is 1; write 0"),
        ({"stream_parts": 2, "train_dataset": [row(1)]}, "train_dataset is no stream"),
        ({"stream_parts": 0}, "stream_parts is 0; write 1 or more"),
    ],
)
def test_what_can_not_be_read_in_parts_is_refused(
    settings: dict[str, Any], message: str, trainer_of: Any, tmp_path: Path
) -> None:
    kwargs = {"files": [0, 1, 2, 3], "counted": str(tmp_path / "read")}
    data = {"train_dataset": IterableDataset.from_generator(rows, gen_kwargs=kwargs), "max_steps": 1}
    with pytest.raises(TunesmithError, match=message):
        trainer_of(**data | {"per_device_train_batch_size": 8} | settings)
