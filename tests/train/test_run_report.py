"""Every run leaves a page about itself, however it ends, and none is lost over it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from tests.train.runs import PAIR_ROWS
from tunesmith.runs.files import METRICS, read_lines
from tunesmith.runs.record import RUN, RunRecord
from tunesmith.train.journal import Journal

pytestmark = pytest.mark.reports


def test_a_run_from_python_leaves_a_page_with_what_was_chosen(trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", use_rslora=True)
    trainer = trainer_of(
        peft_config=lora,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=PAIR_ROWS[:2],
        adam_epsilon=1e-6,
    )
    assert trainer.report is None
    trainer.train()
    assert trainer.report == tmp_path / "run" / "report.html"
    page = trainer.report.read_text(encoding="utf-8")
    for wanted in ("training loss, at the end", "Hardest rows", "eval_steps", "adam_epsilon", "lora.use_rslora"):
        assert wanted in page, wanted
    record = RunRecord.read(tmp_path / "run")
    assert record is not None
    assert record.settings["lora.use_rslora"] is True
    assert record.settings["adam_epsilon"] == 1e-6
    assert not {"output_dir", "report_to", "lora.r"} & record.settings.keys()


def test_a_run_that_an_error_ends_has_a_page_of_the_steps_before(
    trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(max_steps=4)
    whole = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            raise ValueError("broken")
        return whole(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    with pytest.raises(ValueError, match=r"^broken$"):
        trainer.train()
    assert trainer.report is not None
    page = trainer.report.read_text(encoding="utf-8")
    for wanted in ("An error, the last of the events, ended the run at step 2 of 4.", "ValueError: broken"):
        assert wanted in page, wanted


def test_ctrl_c_leaves_a_page_too(trainer_of: Callable[..., Any]) -> None:
    class Interrupted(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = trainer_of(max_steps=4, callbacks=[Interrupted()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "KeyboardInterrupt" in trainer.report.read_text(encoding="utf-8")


def test_a_run_that_is_stopped_says_so_and_one_that_is_finished_does_not(trainer_of: Callable[..., Any]) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 1

    stopped = trainer_of(max_steps=4, callbacks=[Stop()])
    stopped.train()
    assert "The run was stopped at step 1 of 4." in stopped.report.read_text(encoding="utf-8")
    finished = trainer_of(max_steps=4)
    finished.train()
    page = finished.report.read_text(encoding="utf-8")
    assert "ended the run" not in page
    assert "was stopped" not in page


def test_evaluations_before_and_after_training_are_in_the_journal_and_the_page(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = trainer_of(max_steps=2, eval_dataset=PAIR_ROWS[:2])
    trainer.evaluate()
    assert not (tmp_path / "run" / METRICS).exists()
    trainer.train()
    trainer.evaluate()
    lines = read_lines(tmp_path / "run" / METRICS)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2]
    assert "evaluation loss, at the end" in trainer.report.read_text(encoding="utf-8")


def test_prompts_of_rows_that_were_trained_on_are_said_to_be(trainer_of: Callable[..., Any]) -> None:
    seen, held_out = (
        trainer_of(sample_prompts=1, max_steps=1),
        trainer_of(sample_prompts=1, max_steps=1, eval_dataset=PAIR_ROWS[:1]),
    )
    for trainer, trained_on in ((seen, True), (held_out, False)):
        trainer.train()
        page = trainer.report.read_text(encoding="utf-8")
        assert ("No rows were held out, so these prompts are from rows that were trained on" in page) is trained_on


def test_a_run_that_goes_on_from_its_last_step_has_its_page(trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer_of(**settings).train()
    (tmp_path / "run" / "report.html").unlink()
    again = trainer_of(**settings)
    again.train(resume_from_checkpoint=True)
    assert again.report == tmp_path / "run" / "report.html"
    assert [line["step"] for line in read_lines(tmp_path / "run" / METRICS) if "loss" in line] == [1, 2]
    assert "Hardest rows" in again.report.read_text(encoding="utf-8")


def test_a_damaged_journal_of_an_earlier_run_is_none_of_a_new_ones_business(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / METRICS).write_text("no json\n", encoding="utf-8")
    trainer_of(max_steps=1).train()
    assert [line["step"] for line in read_lines(tmp_path / "run" / METRICS)] == [1]


def test_an_error_before_the_first_step_leaves_an_earlier_run_as_it_was(
    trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = trainer_of(max_steps=1, sample_prompts=1)
    first.train()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.is_file()}
    second = trainer_of(max_steps=1, sample_prompts=1, learning_rate=9e-3)

    def compute_loss(*_: Any, **__: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(second, "compute_loss", compute_loss)
    with pytest.raises(ValueError, match="broken"):
        second.train()
    assert second.report is None
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    assert {"report.html", "metrics.jsonl", "samples.jsonl", "preflight.json", "examples.json"} <= before.keys()


def test_a_page_that_can_not_be_written_costs_the_page_and_not_the_run(
    trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    trainer = trainer_of(max_steps=1)

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("of a curve")

    monkeypatch.setattr("tunesmith.report.run_html.page", broken)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.report is None
    assert f"{tmp_path / 'run'} has no report (ZeroDivisionError): of a curve" in caplog.text
    assert (tmp_path / "run" / RUN).is_file()


def test_weights_over_several_processes_answer_nothing_and_the_run_says_so(
    trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = trainer_of(sample_prompts=2, max_steps=1)

    def choose(self: Journal) -> None:
        with monkeypatch.context() as faked:
            faked.setattr(trainer, "is_deepspeed_enabled", True)
            chosen(self)

    chosen = Journal._choose_prompts
    monkeypatch.setattr(Journal, "_choose_prompts", choose)
    trainer.train()
    [(step, text)] = trainer.events
    assert step == 0
    assert text.startswith("sample_prompts: no prompt is answered, since the weights are spread over processes")
    assert text in [line.get("event") for line in read_lines(tmp_path / "run" / METRICS)]
