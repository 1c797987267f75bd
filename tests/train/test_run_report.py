"""Every run leaves a page about itself, however it ends, and none is lost over it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from tests.train.runs import PAIR_ROWS
from tunesmith import SFTTrainer
from tunesmith.ship.journal import METRICS, read_lines
from tunesmith.ship.record import RUN, RunRecord

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
    assert "learning rate" in trainer.report.read_text(encoding="utf-8")


def test_an_error_before_the_first_step_leaves_the_page_of_an_earlier_run(
    trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer_of(max_steps=1)
    first.train()
    page = first.report.read_bytes()
    second = trainer_of(max_steps=1)

    def compute_loss(*_: Any, **__: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(second, "compute_loss", compute_loss)
    with pytest.raises(ValueError, match="broken"):
        second.train()
    assert second.report is None
    assert first.report.read_bytes() == page


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

    def choose(self: SFTTrainer) -> None:
        with monkeypatch.context() as faked:
            faked.setattr(self, "is_fsdp_enabled", True)
            chosen(self)

    chosen = SFTTrainer._choose_prompts
    monkeypatch.setattr(SFTTrainer, "_choose_prompts", choose)
    trainer.train()
    [(step, text)] = trainer.events
    assert step == 0
    assert text.startswith("sample_prompts: no prompt is answered, since the weights are spread over processes")
    assert text in [line.get("event") for line in read_lines(tmp_path / "run" / METRICS)]
