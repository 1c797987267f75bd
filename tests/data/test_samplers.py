"""Which documents share a micro-batch, epoch by epoch, in one process or several, and after a break."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tests.train.runs import UNEVEN_ROWS, largest_difference, token_losses, trained, watched
from tunesmith import SFTTrainer
from tunesmith.data.samplers import LengthGroups, TokenBatches, fitting_lengths, lengths_of, reached
from tunesmith.errors import TunesmithError

REPO = Path(__file__).resolve().parents[2]
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def epoch_of(batches: TokenBatches, epoch: int) -> list[list[int]]:
    batches.set_epoch(epoch)
    return list(batches)


def groups(batches: list[list[int]]) -> set[frozenset[int]]:
    """Who shares a batch, whatever the order."""
    return {frozenset(batch) for batch in batches}


# Batches by tokens


@pytest.mark.parametrize("padded", [False, True], ids=["flat", "padded"])
@given(lengths=LENGTHS, most=st.integers(40, 90), seed=st.one_of(st.none(), st.integers(0, 9)))
def test_every_epoch_has_each_document_once_in_as_many_batches_within_the_budget(
    padded: bool, lengths: list[int], most: int, seed: int | None
) -> None:
    batches = TokenBatches(np.array(lengths), most, seed=seed, padded=padded)
    for epoch in range(3):
        found = epoch_of(batches, epoch)
        assert len(found) == len(batches)
        assert sorted(document for batch in found for document in batch) == list(range(len(lengths)))
        for batch in found:
            tokens = [lengths[document] for document in batch]
            assert len(batch) > 0
            assert (max(tokens) * len(tokens) if padded else sum(tokens)) <= most


@pytest.mark.parametrize("padded", [False, True], ids=["flat", "padded"])
def test_an_epoch_has_batches_of_its_own_and_the_same_ones_every_time(padded: bool) -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(100, 900))  # no two documents of one length
    batches = TokenBatches(lengths, 4096, seed=3, padded=padded)
    first, second = epoch_of(batches, 0), epoch_of(batches, 1)
    assert epoch_of(TokenBatches(lengths, 4096, seed=3, padded=padded), 1) == second
    assert len(first) == len(second)
    assert len(groups(first) & groups(second)) < len(first) / 10
    assert not groups(first) & groups(epoch_of(TokenBatches(lengths, 4096, seed=4, padded=padded), 0))
    longest = [max(lengths[batch]) for batch in first]
    assert longest != sorted(longest, reverse=True), "the batches of an epoch are not shuffled"


def test_without_a_seed_all_epochs_are_the_same() -> None:
    batches = TokenBatches(np.array([3, 9, 4, 4, 1]), 10, seed=None)
    assert epoch_of(batches, 0) == epoch_of(batches, 1) == [[1, 4], [2, 3], [0]]
    assert not batches.shuffles


def test_padded_batches_hold_neighbours_in_length() -> None:
    batches = TokenBatches(np.array([2, 10, 9, 3, 3, 2]), 20, seed=None, padded=True)
    assert list(batches) == [[1, 2], [3, 4, 0, 5]]


def test_batches_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 3000).clip(1, 2048).astype(np.int64)
    assert lengths.sum() / len(TokenBatches(lengths, 2048, seed=0)) > 0.97 * 2048


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("documents", [4, 5, 11, 100])
def test_processes_get_equally_many_batches_and_no_document_twice(documents: int, processes: int) -> None:
    lengths = np.random.default_rng(documents).integers(10, 200, documents)
    numbers: Any = range(documents)
    loader: DataLoader[int] = DataLoader(
        numbers,
        batch_sampler=TokenBatches(lengths, 400, seed=0, multiple_of=processes),
        collate_fn=list,
    )
    shares = [
        list(prepare_data_loader(loader, num_processes=processes, process_index=rank)) for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(document for share in shares for batch in share for document in batch) == list(range(documents))


def test_more_processes_than_documents_is_an_error() -> None:
    with pytest.raises(TunesmithError, match="2 documents are too few for 3 processes"):
        TokenBatches(np.array([5, 6]), 20, seed=0, multiple_of=3)


@pytest.mark.parametrize("kind", ["tokens", "groups"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_loader_goes_on_with_the_batches_of_its_epoch(kind: str, processes: int) -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 60)

    def loader(rank: int) -> Any:
        numbers: Any = range(60)
        plain: DataLoader[int]
        if kind == "tokens":
            batches = TokenBatches(lengths, 400, seed=0, multiple_of=processes)
            plain = DataLoader(numbers, batch_sampler=batches, collate_fn=list)
        else:
            plain = DataLoader(numbers, 4, sampler=LengthGroups(lengths, 4, 0), collate_fn=list)
        return reached(prepare_data_loader(plain, num_processes=processes, process_index=rank))

    for rank in range(processes):
        whole = loader(rank)
        epochs = [list(whole) for _ in range(3)]
        assert epochs[0] != epochs[1] != epochs[2]
        resumed = skip_first_batches(loader(rank), 2)
        resumed.set_epoch(1)  # as the Trainer does
        assert list(resumed) == epochs[1][2:]


# Lengths


def test_lengths_follow_a_selection_of_rows() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1] * n for n in (4, 2, 7, 1)]})
    assert lengths_of(dataset).tolist() == [4, 2, 7, 1]
    assert lengths_of(dataset.select([2, 0])).tolist() == [7, 4]
    assert lengths_of(dataset.select(range(1, 3))).tolist() == [2, 7]
    assert lengths_of(dataset.with_format("torch")).tolist() == [4, 2, 7, 1]


def test_a_row_over_the_budget_is_named_with_what_to_write() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1] * n for n in (4, 2, 7, 1)]})
    expected = (
        "eval data: row 2 takes 7 tokens, over max_tokens_per_batch: 6; "
        "write max_tokens_per_batch: 7 or more, or max_length: 6 or less"
    )
    with pytest.raises(TunesmithError) as caught:
        fitting_lengths(dataset, "eval", 6)
    assert str(caught.value) == expected
    assert fitting_lengths(dataset, "eval", 7).tolist() == [4, 2, 7, 1]
    assert fitting_lengths(dataset, "eval", 8, multiple=8).tolist() == [8, 8, 8, 8]
    with pytest.raises(TunesmithError, match="row 0 takes 8 tokens"):
        fitting_lengths(dataset, "eval", 7, multiple=8)


def test_data_without_token_lists_is_refused_with_its_columns() -> None:
    with pytest.raises(TunesmithError, match="need a column input_ids; the data set has text, n"):
        lengths_of(Dataset.from_dict({"text": ["a"], "n": [1]}))


# Runs


@pytest.fixture
def by_tokens(trainer_of: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a trainer with micro-batches of 64 tokens on UNEVEN_ROWS."""

    def make(name: str = "llama", **arguments: Any) -> Any:
        common = {"train_dataset": UNEVEN_ROWS, "max_tokens_per_batch": 64, "per_device_train_batch_size": 8}
        return trainer_of(name, **common | {"optim": "sgd"} | arguments)

    return make


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {}), ("gpt_neo", {}), ("llama", {"padding_free": False, "pad_to_multiple_of": 8})],
    ids=["flat", "padded model", "padded"],
)
def test_a_step_of_all_batches_is_the_step_of_one_batch_of_all_rows(
    name: str, settings: dict[str, Any], by_tokens: Callable[..., Any], trainer_of: Callable[..., Any]
) -> None:
    whole = trainer_of(name, train_dataset=UNEVEN_ROWS, optim="sgd", per_device_train_batch_size=24, **settings)
    expected = trained(whole)
    trainer = by_tokens(name, gradient_accumulation_steps=99, **settings)
    batches = watched(trainer)
    found = trained(trainer)
    assert trainer.state.global_step == 1
    assert len(batches) > 5
    assert sorted(document for batch in batches for document in batch) == sorted(
        tuple(ids) for ids in trainer.train_dataset["input_ids"]
    )
    for batch in batches:
        rows = len(batch) * max(map(len, batch)) if name == "gpt_neo" or settings else sum(map(len, batch))
        assert rows <= 64
    assert largest_difference(found, expected) < 1e-6
    assert trainer.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], abs=1e-5)


def test_accumulation_divides_the_steps_of_an_epoch_and_stays_exact(by_tokens: Callable[..., Any]) -> None:
    trainer = by_tokens(gradient_accumulation_steps=3, num_train_epochs=2, max_steps=-1, learning_rate=0.0)
    batches = watched(trainer)
    trainer.train()
    count = len(batches) // 2
    steps = -(-count // 3)
    assert trainer.state.global_step == 2 * steps
    assert groups([[hash(document) for document in batch] for batch in batches[:count]]) != groups(
        [[hash(document) for document in batch] for batch in batches[count:]]
    )
    # The weights stay as they are, so that each step's loss is the mean over its documents' supervised tokens.
    losses = {
        tuple(row["input_ids"]): loss
        for row, loss in zip(trainer.train_dataset, token_losses(trainer.model, trainer.train_dataset), strict=True)
    }
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    firsts = [*range(0, count, 3), *range(count, 2 * count, 3)]
    for loss, first in zip(logged, firsts, strict=True):
        step = batches[first : min(first + 3, count if first < count else 2 * count)]
        expected = torch.cat([losses[document] for batch in step for document in batch]).mean()
        assert loss == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {"max_tokens_per_batch": 64, "per_device_train_batch_size": 8}), ("gpt_neo", {})],
    ids=["by tokens", "grouped by length"],
)
def test_a_run_resumed_within_its_second_epoch_ends_where_an_uninterrupted_one_does(
    name: str, settings: dict[str, Any], tmp_path: Path, trainer_of: Callable[..., Any]
) -> None:
    def run(folder: str) -> SFTTrainer:
        common = {"max_steps": 8, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 6}
        common |= {"per_device_train_batch_size": 3, "train_dataset": UNEVEN_ROWS, "output_dir": str(tmp_path / folder)}
        trainer: SFTTrainer = trainer_of(name, **common | settings)
        return trainer

    whole = run("whole")
    batches = watched(whole)
    expected = trained(whole)
    resumed = run("resumed")
    again = watched(resumed)
    found = trained(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    in_epoch = len(whole.get_train_dataloader())
    assert in_epoch < 12 < 2 * in_epoch, "the break is not within the second epoch"
    assert [batch for batch in again if batch in batches[12:]][: len(batches) - 12] == batches[12:]
    assert largest_difference(found, expected) == 0.0


def test_rows_per_second_count_the_rows_that_were_read(by_tokens: Callable[..., Any]) -> None:
    trainer = by_tokens(gradient_accumulation_steps=3, max_steps=3)
    batches = watched(trainer)
    metrics = trainer.train().metrics
    read = sum(map(len, batches[:9]))
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(read, rel=0.1)


def test_rows_eight_by_one_or_one_by_eight_end_in_the_same_weights(trainer_of: Callable[..., Any]) -> None:
    def run(batch: int, steps: int) -> Any:
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 6}
        return trained(trainer_of(train_dataset=UNEVEN_ROWS, optim="sgd", learning_rate=0.1, **settings))

    expected = run(8, 1)
    for batch, steps in [(1, 8), (4, 2)]:
        assert largest_difference(run(batch, steps), expected) < 1e-6


def test_evaluation_by_tokens_is_evaluation_by_rows(
    by_tokens: Callable[..., Any], trainer_of: Callable[..., Any]
) -> None:
    names = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    trainer = by_tokens(eval_dataset=UNEVEN_ROWS[:11])
    batches = watched(trainer)
    found, expected = trainer.evaluate(), trainer_of(eval_dataset=UNEVEN_ROWS[:11]).evaluate()
    assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], abs=1e-6)
    assert len(batches) > 1
    assert all(sum(map(len, batch)) <= 64 for batch in batches)
    assert max(map(len, batches)) > 3


def test_metrics_and_predictions_still_come_row_by_row_in_order(by_tokens: Callable[..., Any]) -> None:
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.extend([x for x in row if x != -100] for row in prediction.label_ids)
        return {}

    trainer = by_tokens(eval_dataset=UNEVEN_ROWS[:11], compute_metrics=compute_metrics, per_device_eval_batch_size=2)
    trainer.evaluate()
    expected = [[x for x in row if x != -100] for row in trainer.eval_dataset["labels"]]
    assert seen == expected
    found = trainer.predict(UNEVEN_ROWS[:11]).label_ids
    assert [[x for x in row if x != -100] for row in found] == expected


@pytest.mark.parametrize("split", ["train", "eval"])
def test_an_example_over_the_budget_stops_before_weights_load(
    split: str, by_tokens: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.train.sft.prepare_model", lambda *_: pytest.fail("weights were loaded"))
    long = [*UNEVEN_ROWS[:2], {"prompt": "a" * 60, "completion": "b" * 10}]
    data = {"train_dataset": long} if split == "train" else {"eval_dataset": {"eval": long}}
    with pytest.raises(TunesmithError, match=f"{split} data: row 2 takes 71 tokens, over max_tokens_per_batch: 64"):
        by_tokens(**data)


@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
def test_a_stream_has_no_lengths_to_batch_by(split: str, by_tokens: Callable[..., Any]) -> None:
    with pytest.raises(TunesmithError, match="needs all lengths, which a stream does not tell"):
        by_tokens(**{split: Dataset.from_list(UNEVEN_ROWS).to_iterable_dataset()})


SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from tests.models import tiny
from tests.train.runs import trained
from tests.data.test_samplers import UNEVEN_ROWS, TWO_PROCESSES
from tunesmith import SFTConfig, SFTTrainer

folder, tokenizer = sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2])
args = SFTConfig(output_dir=folder, report_to="none", use_cpu=True, precision="fp32", disable_tqdm=True,
                 max_grad_norm=0.0, logging_steps=1, gradient_accumulation_steps=1, **TWO_PROCESSES)
trainer = SFTTrainer(tiny("llama", len(tokenizer)), args, train_dataset=UNEVEN_ROWS, eval_dataset=UNEVEN_ROWS[:11],
                     processing_class=tokenizer)
weights = trained(trainer, resume_from_checkpoint=(sys.argv[3:] or [None])[0])
weights["eval_loss"] = torch.tensor(trainer.evaluate()["eval_loss"])
if trainer.is_world_process_zero():
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    save_file(weights, folder + "/weights.safetensors")
torch.distributed.destroy_process_group()
"""
TWO_PROCESSES: dict[str, Any] = {
    "max_tokens_per_batch": 72,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 6,
    "optim": "sgd",  # Adam's first steps are signs of gradients: rounding could turn one
    "learning_rate": 0.1,
}


@pytest.mark.slow
def test_two_processes_train_by_tokens_as_one_does_and_resume(
    trainer_of: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    one = trainer_of(
        train_dataset=UNEVEN_ROWS, eval_dataset=UNEVEN_ROWS[:11], gradient_accumulation_steps=2, **TWO_PROCESSES
    )
    in_epoch = len(one.get_train_dataloader())
    assert in_epoch % 2 == 0  # or two processes would halve a batch
    assert in_epoch < 12 < 2 * in_epoch
    expected = trained(one)
    expected["eval_loss"] = torch.tensor(one.evaluate()["eval_loss"])

    def run(folder: Path, *arguments: str) -> Any:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'src'}"}
        folder.mkdir()
        (folder / "script.py").write_text(SCRIPT)
        done = subprocess.run(
            [*command, str(folder / "script.py"), str(folder), str(tiny_model), *arguments],
            env=environment, cwd=REPO, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return load_file(folder / "weights.safetensors")

    assert largest_difference(run(tmp_path / "whole"), expected) < 1e-6
    found = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-6"))
    assert largest_difference(found, expected) < 1e-6
