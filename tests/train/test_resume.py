"""A run goes on from its own checkpoints exactly, and from those of other runs not at all."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.train.runs import REASONING, TALKS, UNEVEN_ROWS, largest_difference, trained, watched, weights_of
from tunesmith import SFTTrainer
from tunesmith.errors import TunesmithError
from tunesmith.model.load import newest_checkpoint
from tunesmith.runs import folder as disk
from tunesmith.runs.checkpoints import (
    CURRENT,
    MANIFEST,
    PICKLES,
    Identity,
    all_checkpoints,
    checkpoints,
    verify,
)
from tunesmith.runs.states import read_state
from tunesmith.train.identity import identity_of

Runs = Callable[..., SFTTrainer]
LORA = LoraConfig(target_modules="all-linear", lora_dropout=0.2)


@pytest.fixture
def run(tmp_path: Path, trainer_of: Callable[..., Any]) -> Runs:
    """Makes a run of 8 steps in `folder`, which saves every other step."""

    def make(folder: str = "run", **settings: Any) -> SFTTrainer:
        common = {"max_steps": 8, "per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 2}
        common |= {"train_dataset": UNEVEN_ROWS, "output_dir": str(tmp_path / folder), "self_test": "off"}
        trainer: SFTTrainer = trainer_of(**common | settings)
        return trainer

    return make


class Until(TrainerCallback):
    """Ends a run at a step, as if it had been killed after what it saved there; or does something else at it."""

    def __init__(self, step: int, act: Callable[[], object] | None = None) -> None:
        self._step, self._act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            if self._act is None:
                raise InterruptedError
            self._act()


def broken_off(trainer: SFTTrainer, step: int) -> None:
    trainer.add_callback(Until(step))
    with pytest.raises(InterruptedError):
        trainer.train()


PREFIX_ROWS = [
    row | {"prompt": ("Answer in one word, please: ", "Translate into another language: ")[i % 2] + row["prompt"]}
    for i, row in enumerate(UNEVEN_ROWS[:30])
]


def stream() -> IterableDataset:
    made: IterableDataset = IterableDataset.from_generator(lambda: iter(UNEVEN_ROWS[:20]))
    return made


# Exactly


@pytest.mark.parametrize(
    "settings",
    [
        {"async_save": True},
        {"async_save": True, "peft_config": LORA},
        {"optim": "adamw_bnb_8bit"},
        {"optim": "adafactor", "lr_scheduler_type": "reduce_lr_on_plateau", "eval": True},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}, "neftune_noise_alpha": 5},
        {"train_sampling_strategy": "group_by_prefix", "train_dataset": PREFIX_ROWS, "gradient_accumulation_steps": 2},
    ],
    ids=["async", "async adapters", "8-bit optimizer", "plateau", "noise", "like beginnings"],
)
def test_it_ends_where_an_uninterrupted_run_does(settings: dict[str, Any], run: Runs) -> None:
    if settings.get("eval"):
        settings = {name: value for name, value in settings.items() if name != "eval"}
        settings |= {"eval_dataset": UNEVEN_ROWS[:5], "eval_strategy": "steps", "eval_steps": 2}
    expected = trained(run("whole", **settings))
    broken_off(run(**settings), 5)
    resumed = run(**settings)
    assert largest_difference(trained(resumed, resume_from_checkpoint=True), expected) == 0.0
    for folder in checkpoints(Path(str(resumed.args.output_dir))):
        verify(folder)
        assert not [item for pattern in (*PICKLES, "*.bin") for item in folder.rglob(pattern)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"packing": True, "max_length": 256}, {"max_tokens_per_batch": 256, "per_device_train_batch_size": 8}],
    ids=["rows", "packs", "tokens"],
)
def test_conversations_of_several_documents_go_on_too(settings: dict[str, Any], run: Runs, tokenizer: Any) -> None:
    tokenizer.chat_template = REASONING
    settings |= {"train_dataset": TALKS, "train_on": "assistant"}
    expected = trained(run("whole", **settings))
    broken_off(run(**settings), 5)
    assert largest_difference(trained(run(**settings), resume_from_checkpoint=True), expected) == 0.0


def test_an_evaluation_that_is_not_repeated_changes_nothing(run: Runs) -> None:
    """The checkpoint of an epoch's last step is written before the epoch's evaluation."""
    settings = {"peft_config": LORA, "eval_dataset": UNEVEN_ROWS[:5], "eval_strategy": "epoch", "save_steps": 8}
    settings |= {"max_steps": 10}
    expected = trained(run("whole", **settings))
    broken_off(run(**settings), 8)
    assert largest_difference(trained(run(**settings), resume_from_checkpoint=True), expected) == 0.0


def test_a_finished_run_takes_no_further_step(run: Runs) -> None:
    expected = trained(run())
    again = run(max_steps=8)
    assert largest_difference(trained(again, resume_from_checkpoint=True), expected) == 0.0
    assert again.state.global_step == 8


def test_the_trainer_that_saved_a_checkpoint_can_go_on_from_it(run: Runs) -> None:
    expected = trained(run("whole"))
    trainer = run()
    trainer.train()
    shutil.rmtree(Path(str(trainer.args.output_dir)) / "checkpoint-8")
    assert largest_difference(trained(trainer, resume_from_checkpoint=True), expected) == 0.0


def test_no_row_is_read_twice(run: Runs) -> None:
    whole = run("whole")
    expected = watched(whole)
    whole.train()
    broken_off(run(), 5)
    resumed = run()
    read = watched(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert read == expected[4:]


def test_a_stream_goes_on_where_it_was_without_reading_again(run: Runs, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"max_steps": 12, "save_steps": 5, "peft_config": LORA}  # 7 steps an epoch
    expected = trained(run("whole", train_dataset=stream(), **settings))
    broken_off(run(train_dataset=stream(), **settings), 11)
    resumed = run(train_dataset=stream(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(weights_of(resumed), expected) == 0.0
    assert "Reads" not in caplog.text
    assert resumed.state.epoch == pytest.approx(1 + 5 / 12)


@pytest.mark.parametrize("own", [False, True], ids=["shuffle_dataset", "shuffle()"])
def test_a_stream_shuffled_in_a_buffer_goes_on_too(own: bool, run: Runs, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"shuffle_dataset": not own, "shuffle_buffer_size": 8, "max_steps": 12, "save_steps": 5}

    def data() -> IterableDataset:
        return stream().shuffle(seed=1, buffer_size=8) if own else stream()

    expected = trained(run("whole", train_dataset=data(), **settings))
    broken_off(run(train_dataset=data(), **settings), 11)
    resumed = run(train_dataset=data(), **settings)
    assert largest_difference(trained(resumed, resume_from_checkpoint=True), expected) == 0.0
    assert "Reads" not in caplog.text


def test_the_log_goes_on(run: Runs) -> None:
    def log(trainer: SFTTrainer) -> Any:
        names = ("step", "loss", "num_tokens", "entropy")
        return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]

    whole, settings = run("whole", logging_steps=3), {"logging_steps": 3}
    whole.train()
    broken_off(run(**settings), 5)  # a step after a log, and before the next
    resumed = run(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert log(resumed) == log(whole)


# Which


def test_a_damaged_checkpoint_is_passed_over_or_named(run: Runs, caplog: pytest.LogCaptureFixture) -> None:
    whole = run()
    expected = trained(whole)
    *_, before, last = checkpoints(Path(str(whole.args.output_dir)))
    (last / "optimizer.safetensors").write_bytes(b"half")
    with pytest.raises(TunesmithError, match=r"optimizer.safetensors has 4 bytes"):
        run().train(resume_from_checkpoint=str(last))
    resumed = run()
    assert largest_difference(trained(resumed, resume_from_checkpoint=True), expected) == 0.0
    assert "Passed over" in caplog.text
    assert "checkpoint-8/optimizer.safetensors has 4 bytes" in caplog.text
    verify(last)  # written anew
    assert before.name == "checkpoint-6"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_dataset": UNEVEN_ROWS[:23]}, ["data, content: ", "data, examples: 24 -> 23"]),
        ({"learning_rate": 0.5}, ["learning_rate: 0.01 -> 0.5"]),
        ({"max_length": 5}, ["data, content: ", "max_length: 1024 -> 5"]),
        ({"name": "qwen2"}, ["model, config.model_type: llama -> qwen2"]),
        ({"peft_config": LORA}, ["model, trained weights: "]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_has_changed_is_listed(changes: dict[str, Any], said: list[str], run: Runs) -> None:
    run(max_steps=2).train()
    with pytest.raises(TunesmithError, match="belongs to another run; was -> is:") as caught:
        run(**changes).train(resume_from_checkpoint=True)
    lines = str(caught.value).splitlines()
    assert all(any(line.strip().startswith(start) for line in lines) for start in said), lines
    assert "force_resume: true (--force-resume)" in lines[-1]


def test_what_may_change_may(run: Runs, caplog: pytest.LogCaptureFixture) -> None:
    run(max_steps=2).train()
    free = {"logging_steps": 2, "save_total_limit": 1, "run_name": "x", "self_test": "auto", "save_steps": 1}
    resumed = run(max_steps=4, dataloader_num_workers=0, per_device_eval_batch_size=1, **free)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    forced = run(max_steps=6, force_resume=True, weight_decay=0.1)
    forced.train(resume_from_checkpoint=True)
    assert forced.state.global_step == 6
    assert "weight_decay: 0.0 -> 0.1" in caplog.text


def test_without_the_optimizers_state_it_does_not_go_on(run: Runs) -> None:
    run(max_steps=2, save_only_model=True).train()
    with pytest.raises(TunesmithError, match="optimizer's state: not saved"):
        run().train(resume_from_checkpoint=True)
    resumed = run(force_resume=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


# Other tools


def as_another_tool_writes(checkpoint: Path) -> None:
    """Turns a checkpoint of ours into what `transformers` writes."""
    states = {name: read_state(checkpoint, name) for name in ("optimizer", "scheduler", "random")}
    torch.save(states["optimizer"], checkpoint / "optimizer.pt")
    torch.save(states["scheduler"], checkpoint / "scheduler.pt")
    for name in (*states, "progress"):
        (checkpoint / f"{name}.json").unlink()
        (checkpoint / f"{name}.safetensors").unlink(missing_ok=True)
    (checkpoint / "manifest.json").unlink()


def test_a_checkpoint_of_another_tool_is_read_when_allowed_but_never_run(run: Runs, tmp_path: Path) -> None:
    whole = run("whole")
    expected = trained(whole)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    as_another_tool_writes(checkpoint)
    with pytest.raises(TunesmithError, match=r"optimizer.pt, scheduler.pt are pickles"):
        run().train(resume_from_checkpoint=str(checkpoint))
    found = trained(run(allow_pickle=True), resume_from_checkpoint=str(checkpoint))
    assert largest_difference(found, expected) == 0.0
    torch.save(Path("x"), checkpoint / "optimizer.pt")  # an object of a class, which reading would have to make
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        run("other", allow_pickle=True).train(resume_from_checkpoint=str(checkpoint))


# In a folder that was used before


def test_a_fresh_run_in_a_used_folder_keeps_and_resumes_its_own_checkpoints(
    run: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    run(max_steps=12, save_steps=6).train()
    expected = trained(run("whole", learning_rate=1e-3))
    caplog.clear()
    broken_off(run(learning_rate=1e-3, save_total_limit=1), 5)
    assert "holds checkpoints of an earlier run: checkpoint-6, checkpoint-12. They stay" in caplog.text
    assert [item.name for item in checkpoints(folder)] == ["checkpoint-4"]
    assert [item.name for item in all_checkpoints(folder)] == ["checkpoint-4", "checkpoint-6", "checkpoint-12"]
    resumed = run(learning_rate=1e-3, save_total_limit=1)
    assert largest_difference(trained(resumed, resume_from_checkpoint=True), expected) == 0.0
    assert resumed.state.global_step == 8
    assert [item.name for item in checkpoints(folder)] == ["checkpoint-8"]
    assert [item.name for item in all_checkpoints(folder)] == ["checkpoint-8", "checkpoint-12"]
    assert newest_checkpoint(folder) == folder / "checkpoint-8"


def test_a_run_that_saved_nothing_is_not_taken_for_the_one_before(run: Runs, tmp_path: Path) -> None:
    expected = trained(run())
    broken_off(run(), 1)  # before its first save
    with pytest.raises(TunesmithError, match=r"the last run there saved none, and checkpoint-8 is of an earlier run"):
        run().train(resume_from_checkpoint=True)
    earlier = run()
    earlier.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))  # and not from its last
    assert largest_difference(weights_of(earlier), expected) == 0.0
    assert [item.name for item in checkpoints(tmp_path / "run")] == ["checkpoint-8"]


def test_a_run_that_stops_before_its_first_step_leaves_the_folder_to_the_one_before(run: Runs) -> None:
    expected = trained(run())
    broken_off(run(), 0)
    assert largest_difference(trained(run(), resume_from_checkpoint=True), expected) == 0.0


def test_the_best_checkpoint_is_none_of_an_earlier_run(run: Runs, tmp_path: Path) -> None:
    settings = {"eval_dataset": UNEVEN_ROWS[:5], "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    run().train()
    again = run(metric_for_best_model="loss", save_steps=4, **settings)
    again.train()
    assert again.state.best_global_step == 2  # the loss falls, and more is better here
    assert again.state.best_model_checkpoint is None


def test_checkpoints_without_a_run_are_one_run(run: Runs, tmp_path: Path) -> None:
    """Version 0.1 wrote them so."""
    folder = tmp_path / "run"
    expected = trained(run("whole"))
    broken_off(run(), 5)
    (folder / CURRENT).unlink()
    for checkpoint in checkpoints(folder):
        file = checkpoint / MANIFEST
        values = json.loads(file.read_text())
        del values["run"], values["sha256"]
        file.write_text(json.dumps(values | {"format": 1}))
    resumed = run(save_total_limit=2)
    assert largest_difference(trained(resumed, resume_from_checkpoint=True), expected) == 0.0
    assert [item.name for item in all_checkpoints(folder)] == ["checkpoint-6", "checkpoint-8"]


def test_checkpoints_that_can_not_say_whose_they_are_keep_a_fresh_run_out(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "checkpoint-9").mkdir(parents=True)
    trainer = run()
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(TunesmithError, match=r"holds checkpoint-9 of an earlier run, and the checkpoints of DeepSpeed"):
        trainer.keeper.begin(None)
    assert trainer.keeper.begin(True) is True


# Saving


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(run: Runs) -> None:
    settings = {"eval_dataset": UNEVEN_ROWS[:5], "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    trainer = run(load_best_model_at_end=True, save_total_limit=1, async_save=True, **settings)
    trainer.train()
    folder = Path(str(trainer.args.output_dir))
    assert trainer.state.best_model_checkpoint == str(
        folder / "checkpoint-2"
    )  # the loss falls, and more is better here
    assert [item.name for item in checkpoints(folder)] == ["checkpoint-2"]
    verify(folder / "checkpoint-2")
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "checkpoint-2")


@pytest.mark.parametrize("step", [4, 6])
def test_a_resumed_run_stops_early_where_an_unbroken_one_does(step: int, run: Runs) -> None:
    """The first evaluation is the best: the loss falls, and more is better here. Two others end the run, at step 6."""
    settings = {"eval_dataset": UNEVEN_ROWS[:5], "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    settings |= {"load_best_model_at_end": True, "max_steps": 20}
    for checkpoint in (None, f"checkpoint-{step}"):
        trainer = run(**settings)
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
        trainer.train(resume_from_checkpoint=checkpoint and str(Path(str(trainer.args.output_dir)) / checkpoint))
        assert trainer.state.global_step == 6


def test_a_disk_without_room_stops_the_run_before_it_begins(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(TunesmithError, match=r"the next checkpoint takes about 17 MB, and 1 kB are free"):
        run().train()
    trainer = run(save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("later", [False, True], ids=["at once", "in a thread"])
def test_a_folder_that_can_not_be_written_stops_the_run_and_says_so(
    later: bool, run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PAUSE", 0)

    def replace_the_folder() -> None:
        (tmp_path / "run").rename(tmp_path / "away")
        (tmp_path / "run").write_text("a file")

    trainer = run(async_save=later)
    trainer.add_callback(Until(3, replace_the_folder))
    with pytest.raises(TunesmithError, match=r"no checkpoint can be written to .*run: .*Not a directory|File exists"):
        trainer.train()
    assert trainer.state.global_step in ((4, 5) if later else (4,))
    if not later:  # which may have been writing when the folder went
        verify(tmp_path / "away" / "checkpoint-2")


def test_a_folder_that_was_away_for_a_moment_is_made_again(run: Runs, tmp_path: Path) -> None:
    trainer = run()
    trainer.add_callback(Until(3, lambda: shutil.rmtree(tmp_path / "run")))
    trainer.train()
    assert [item.name for item in checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_a_failure_in_the_thread_ends_the_run_at_the_next_step(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(async_save=True, save_steps=1)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tunesmith.train.keeper.finish", fail)
    with pytest.raises(TunesmithError, match="is full"):
        trainer.train()
    assert trainer.state.global_step <= 2
    assert not list(Path(str(trainer.args.output_dir)).glob("*checkpoint-*"))


def test_optimizers_that_only_pickle_can_write_are_refused_before_training(run: Runs) -> None:
    trainer = run()
    trainer.args.optim = "adamw_torch_8bit"
    with pytest.raises(TunesmithError, match="whose state only pickle can write"):
        trainer.train()


def test_batches_by_tokens_of_a_version_that_filled_them_otherwise_are_refused(
    trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_tokens_per_batch": 64, "max_steps": 2, "save_steps": 1, "save_strategy": "steps"}

    def before(*arguments: Any) -> Identity:
        identity = identity_of(*arguments)
        return replace(identity, settings={k: v for k, v in identity.settings.items() if k != "token_batches"})

    with monkeypatch.context() as old:
        old.setattr("tunesmith.train.keeper.identity_of", before)
        trainer_of(**settings).train()
    with pytest.raises(TunesmithError, match="token_batches: filled as in version 0"):
        trainer_of(**settings | {"max_steps": 4}).train(resume_from_checkpoint=True)
