"""A second trainer, written only against what a maintainer is meant to use: pairs of answers, a toy objective.

What `BaseTrainer` promises to the next trainer is shown on it: checkpoints, an exact resume after a kill, recovery from
out of memory that never divides a pair, the journal and the log.
"""

import inspect
import os
import re
import signal
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from tests.forked import finished, start
from tests.models import tiny
from tests.train.runs import UNEVEN_ROWS, largest_difference, token_losses, weights_of
from tunesmith.data.batches import Batch, FlatCollator, PaddedCollator, one_group_of
from tunesmith.data.samplers import with_blank_rows
from tunesmith.objectives.logprobs import TokenLogProbs, token_logprobs
from tunesmith.runs.files import METRICS, read_lines
from tunesmith.settings.config import SFTConfig
from tunesmith.train import sft
from tunesmith.train.loaders import Batching
from tunesmith.train.meter import BatchLoss
from tunesmith.train.setup import ready_for_batches
from tunesmith.train.trainer import BaseTrainer

ROOT = Path(__file__).parents[2]


class PairTrainer(BaseTrainer):
    """Makes the first answer of each pair likelier than the second: minus the log-sigmoid of the difference."""

    means = ("margin", "accuracy")

    def batch_loss(self, model: nn.Module, batch: Batch, *, with_outputs: bool = False) -> BatchLoss:
        answer = self.predict_targets(model, batch, batch.targets(), token_logprobs, with_outputs=with_outputs)
        scored: TokenLogProbs = answer.outcome
        sums = torch.stack([values.sum() for values in batch.by_document(scored.logprobs)])
        margins = (sums[0::2] - sums[1::2])[self.are_pairs(batch)]
        return BatchLoss(
            loss=-nn.functional.logsigmoid(0.1 * margins).sum(),
            count=len(margins),
            sums={"margin": margins.detach().sum(), "accuracy": (margins > 0).sum()},
            nll=-scored.logprobs.detach(),
            outputs=answer.outputs,
        )

    def batch_weight(self, batch: Batch) -> torch.Tensor:
        return self.are_pairs(batch).sum()

    def are_pairs(self, batch: Batch) -> torch.Tensor:
        """(groups,): blank ones, which even out processes, have no targets."""
        return torch.tensor([any(example.target_count for example in group) for group in batch.groups])


def pairs(count: int = 12) -> Dataset:
    """Rows of two documents each, of different lengths, that begin alike."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        prompt = torch.randint(3, 97, (4 + i % 5,), generator=generator).tolist()
        answers = [torch.randint(3, 97, (size,), generator=generator).tolist() for size in (2 + i % 3, 3 + i % 4)]
        documents = [[*prompt, *answer] for answer in answers]
        labels = [[-100] * len(prompt) + answer for answer in answers]
        ids, marks = ([token for part in parts for token in part] for parts in (documents, labels))
        rows.append({"input_ids": ids, "labels": marks, "seq_lengths": list(map(len, documents))})
    return Dataset.from_list(rows)


def trainer_in(
    folder: Path, *, flat: bool = True, kind: type[BaseTrainer] = PairTrainer, **settings: Any
) -> BaseTrainer:
    common: dict[str, Any] = {"max_steps": 6, "learning_rate": 0.05, "save_steps": 2, "logging_steps": 2}
    common |= {"optim": "sgd", "report_to": "none", "use_cpu": True, "precision": "fp32", "self_test": "off"}
    if "max_tokens_per_batch" not in settings:
        common["per_device_train_batch_size"] = 3
    model = tiny("llama", attention_dropout=0.1).train()
    ready_for_batches(model, flat=flat)
    padded = PaddedCollator(read=one_group_of)
    batching = Batching(collator=FlatCollator(read=one_group_of, share_prefix=True) if flat else padded, by_row=padded)
    return kind(
        model,
        SFTConfig(output_dir=str(folder), **common | settings),
        batching,
        train_dataset=pairs(),
        eval_dataset=pairs(5),
    )


def differences(model: Any, rows: Dataset) -> list[float]:
    """By how much the first answer of each pair is likelier than the second, by PyTorch, in nats."""
    found = []
    model.eval()
    for row in rows:
        start, sums = 0, []
        for size in row["seq_lengths"]:
            ids = torch.tensor([row["input_ids"][start : start + size]])
            labels = torch.tensor(row["labels"][start : start + size])
            logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(dim=-1)
            learned = labels[1:] != -100
            sums.append(logprobs[learned].gather(1, labels[1:][learned][:, None]).sum())
            start += size
        found.append(float(sums[0] - sums[1]))
    return found


def code_of(page: str, heading: str, fence: str) -> list[str]:
    """The blocks of code below a heading; `fence` begins each line of one, or is the line before it."""
    section = re.split(r"\n#+ ", (ROOT / page).read_text(encoding="utf-8").partition(heading)[2])[0]
    if not fence.isspace():
        return re.findall(rf"{fence}\n(.*?)```", section, flags=re.DOTALL)
    return [textwrap.dedent(block) for block in re.findall(rf"(?:^{fence}.*\n|^\n(?={fence}))+", section, flags=re.M)]


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_objective_that_contributing_shows_passes_its_own_test(
    padding_free: bool, model_of: Any, tokenizer: Any, config: Any
) -> None:
    blocks = code_of("CONTRIBUTING.md", "### A new objective\n", " " * 7)
    names: dict[str, Any] = vars(sft) | globals() | {"Callable": Callable, "Sequence": Sequence}
    names |= {"UNEVEN_ROWS": UNEVEN_ROWS, "token_losses": token_losses}
    exec("from __future__ import annotations\n" + "\n".join(blocks), names)
    names["test_a_step_is_the_mean_over_documents"](padding_free, model_of, tokenizer, config)


def test_the_trainer_that_architecture_shows_trains(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    [block] = code_of("docs/architecture.md", "## A second trainer\n", "```python")
    exec(block, names)
    trainer = trainer_in(tmp_path, kind=names["PairTrainer"], save_strategy="no", max_steps=1)
    expected = torch.tensor(differences(trainer.model, pairs(5)))
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(float(-nn.functional.logsigmoid(expected).mean()), rel=1e-4)
    assert found["eval_margin"] == pytest.approx(float(expected.mean()), rel=1e-3)
    trainer.train()
    assert "margin" in next(entry for entry in trainer.state.log_history if "loss" in entry or "train_loss" in entry)


def test_it_uses_no_private_name_of_ours() -> None:
    source = inspect.getsource(PairTrainer) + inspect.getsource(trainer_in)
    assert "._" not in source


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
def test_a_step_is_the_mean_over_pairs(flat: bool, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, flat=flat, max_steps=1, gradient_accumulation_steps=2, seed=1, logging_steps=1)
    model: Any = trainer.model
    losses = [float(-nn.functional.logsigmoid(torch.tensor(0.1 * value))) for value in differences(model, pairs())]
    batches = list(trainer.get_train_dataloader())[:2]
    seen = [group for batch in batches for group in batch.groups]
    rows = [[token for example in group for token in example.input_ids] for group in seen]
    expected = [loss for loss, row in zip(losses, pairs(), strict=True) if row["input_ids"] in rows]
    assert len(expected) == 6
    total = sum(float(trainer.compute_loss(model, batch, num_items_in_batch=6)) for batch in batches)
    assert total == pytest.approx(sum(expected) / 6, rel=1e-5)


def test_what_it_measures_is_logged_and_each_step_is_in_the_journal(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert all({"margin", "accuracy", "num_tokens"} <= entry.keys() for entry in logged)
    assert [line["step"] for line in read_lines(tmp_path / METRICS) if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
def test_out_of_memory_is_answered_without_tearing_a_pair_apart(flat: bool, tmp_path: Path) -> None:
    whole = trainer_in(tmp_path / "whole", flat=flat)
    split = trainer_in(tmp_path / "split", flat=flat)
    for trainer in (whole, split):
        model: Any = trainer.model
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
    groups: list[list[int]] = []
    right = split.batch_loss

    def small(model: nn.Module, batch: Batch, **arguments: Any) -> BatchLoss:
        if len(batch.groups) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        groups.append([len(group) for group in batch.groups])
        return right(model, batch, **arguments)

    split.batch_loss = small  # type: ignore[method-assign]
    whole.train()
    split.train()
    assert groups
    assert all(sizes == [2] for sizes in groups)
    assert any("same gradients" in text for _, text in split.events)
    assert largest_difference(weights_of(split), weights_of(whole)) < 1e-6


def _train(folder: str, kill_at: int) -> None:
    torch.set_num_threads(1)
    trainer = trainer_in(Path(folder))

    def kill(line: Any) -> None:
        if line.get("step") == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.listeners.append(kill)
    trainer.train()


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        unbroken = trainer_in(tmp_path / "unbroken")
        unbroken.train()
        assert finished(start(_train, str(tmp_path / "killed"), 5)) == -signal.SIGKILL
        resumed = trainer_in(tmp_path / "killed")
        resumed.train(resume_from_checkpoint=True)
    finally:
        torch.set_num_threads(threads)
    assert resumed.state.global_step == 6
    assert largest_difference(weights_of(resumed), weights_of(unbroken)) == 0.0
    assert resumed.state.log_history[-2] == unbroken.state.log_history[-2]  # the last entry has times


def test_the_states_of_parts_come_back(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.guard.restore({"bad_steps": 2, "in_a_row": 0})
    trainer.recovery.restore({"most_tokens": 64})
    trainer.train()
    again = trainer_in(tmp_path, max_steps=8)
    again.train(resume_from_checkpoint=True)
    assert (again.bad_steps, again.recovery.state()) == (2, {"most_tokens": [64]})


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
def test_an_evaluation_is_the_mean_over_pairs_however_they_are_batched(flat: bool, tmp_path: Path) -> None:
    losses = []
    for size in (1, 2, 5):
        trainer = trainer_in(tmp_path, flat=flat, per_device_eval_batch_size=size)
        metrics = trainer.evaluate()
        losses.append(metrics["eval_loss"])
        assert {"eval_margin", "eval_accuracy"} <= metrics.keys()
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    stream = trainer.evaluate(pairs(5).to_iterable_dataset())
    assert stream["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert stream["eval_samples_per_second"] > 0


def test_blank_rows_that_even_out_processes_weigh_nothing(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    model: Any = trainer.model.eval()  # type: ignore[union-attr]
    collator: Any = trainer.loaders.batching.collator
    rows = list(with_blank_rows(pairs(3), 4))
    without, with_blank = collator(rows[:3]), collator(rows)
    assert [len(group) for group in with_blank.groups] == [2, 2, 2, 2]
    assert (int(trainer.batch_weight(without)), int(trainer.batch_weight(with_blank))) == (3, 3)
    losses = [float(trainer.compute_loss(model, batch)) for batch in (without, with_blank)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
def test_batches_by_tokens_hold_what_they_compute_within_the_budget(flat: bool, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, flat=flat, max_tokens_per_batch=60, rehearse="always")
    batches = list(trainer.get_train_dataloader())
    assert sum(len(batch.groups) for batch in batches) == len(pairs())
    assert all(batch.computed_tokens <= 60 for batch in batches)
    trainer.train()


def test_a_run_that_broke_off_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "twice", gradient_accumulation_steps=2, save_strategy="no")
    right = trainer.batch_loss
    calls = iter(range(100))

    def breaking(*arguments: Any, **more: Any) -> BatchLoss:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return right(*arguments, **more)

    trainer.batch_loss = breaking  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    once = trainer_in(tmp_path / "once", gradient_accumulation_steps=2, save_strategy="no")
    once.train()
    counts = [[entry["num_tokens"] for entry in each.state.log_history if "loss" in entry] for each in (trainer, once)]
    assert counts[0] == counts[1]
    assert not trainer.events


def test_a_second_run_of_a_trainer_counts_from_its_own_start(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=2, save_strategy="no")
    counts = []
    for _ in range(2):
        trainer.train()
        counts.append([entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry])
    assert counts[0] == counts[1]
