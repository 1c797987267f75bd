"""What a run says to TensorBoard, Weights & Biases, MLflow and Trackio arrives there, offline and without secrets."""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.forked import finished, start
from tests.train.runs import TEXT_ROWS
from tunesmith import SFTConfig, SFTTrainer
from tunesmith.cli.main import app
from tunesmith.errors import TunesmithError
from tunesmith.train.setup import check_trackers

SECRET = "hf_" + "s3cr3t" * 5
STEPS = 3
PATIENCE_S = 10


def followed(tiny_model: Path, folder: Path, tracker: str) -> list[dict[str, Any]]:
    """A short run that reports to `tracker`; returns what was logged of its steps."""
    args = SFTConfig(
        output_dir=str(folder / "run"),
        max_steps=STEPS,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=STEPS,
        report_to=[tracker],
        run_name="first",
        hub_token=SECRET,
        use_cpu=True,
        precision="fp32",
        save_strategy="no",
        sample_prompts=0,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model=str(tiny_model), args=args, train_dataset=TEXT_ROWS, eval_dataset=TEXT_ROWS)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]


def no_secret_in(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_tensorboard_gets_the_losses(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    logged = followed(tiny_model, tmp_path, "tensorboard")
    (file,) = [path for path in (tmp_path / "events").rglob("*tfevents*") if path.is_file()]
    events = EventAccumulator(str(file)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(entry["step"], pytest.approx(entry["loss"])) for entry in logged if "loss" in entry]
    assert events.Scalars("eval/loss")[0].value == pytest.approx(logged[-1]["eval_loss"])
    assert events.Scalars("train/num_tokens")[-1].value > 0
    no_secret_in(tmp_path)


def test_wandb_gets_the_losses_offline(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true"), ("DISABLE_CODE", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    logged = followed(tiny_model, tmp_path, "wandb")
    wandb.finish()
    (file,) = tmp_path.rglob("*.wandb")
    content, until = file.read_bytes(), time.monotonic() + PATIENCE_S
    while b"eval/loss" not in content and time.monotonic() < until:  # another process writes it
        time.sleep(0.05)
        content = file.read_bytes()
    assert b"train/loss" in content
    assert b"eval/loss" in content
    for entry in logged[:STEPS]:
        assert repr(entry["loss"]).encode() in content
    no_secret_in(tmp_path)


def test_mlflow_gets_the_losses(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logged = followed(tiny_model, tmp_path, "mlflow")
    mlflow.end_run()
    (losses,) = [path for path in (tmp_path / "mlruns").rglob("metrics/loss") if path.is_file()]
    found = [float(line.split()[1]) for line in losses.read_text().splitlines()]
    assert found == [pytest.approx(entry["loss"]) for entry in logged if "loss" in entry]
    assert list((tmp_path / "mlruns").rglob("metrics/eval_loss"))
    no_secret_in(tmp_path)


def with_trackio(model: Path, folder: Path) -> None:
    """In a process of its own: Trackio reads where to write when it is imported."""
    for name in [name for name in os.environ if name.startswith("TRACKIO_")]:
        del os.environ[name]
    os.environ |= {"TRACKIO_DIR": str(folder / "trackio"), "TUNESMITH_HOME": str(folder / "home")}
    logged = followed(model, folder, "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (project,) = SQLiteStorage.get_projects()
    (run,) = SQLiteStorage.get_runs(project)
    (folder / "found.json").write_text(json.dumps([run, logged, SQLiteStorage.get_logs(project, run)]))


def test_trackio_gets_the_losses_offline(tiny_model: Path, tmp_path: Path) -> None:
    assert finished(start(with_trackio, tiny_model, tmp_path)) == 0
    run, logged, kept = json.loads((tmp_path / "found.json").read_text())
    assert run == "first"
    losses = [(entry["train/global_step"], entry["train/loss"]) for entry in kept if "train/loss" in entry]
    assert losses == [(entry["step"], pytest.approx(entry["loss"])) for entry in logged if "loss" in entry]
    assert len(losses) == STEPS
    (held_out,) = [entry["eval/loss"] for entry in kept if "eval/loss" in entry]
    assert held_out == pytest.approx(logged[-1]["eval_loss"])
    no_secret_in(tmp_path / "trackio")


def test_the_command_line_that_a_tracker_keeps_has_no_token(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", "--model", str(tiny_model), "--data", "nowhere.jsonl", "--output", str(tmp_path / "run")]
    arguments += [f"--hub-token={SECRET[3:]}", "--use-cpu", "--precision=fp32"]
    monkeypatch.setattr(sys, "argv", ["tunesmith", *arguments])
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert "--hub-token=<secret>" in sys.argv
    assert not any(SECRET[3:] in word for word in sys.argv)


def test_a_tracker_that_is_missing_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.train.setup.find_spec", lambda name: None)
    with pytest.raises(TunesmithError, match=re.escape("trackio is not installed; run: pip install trackio")):
        check_trackers(["trackio"])
    with pytest.raises(TunesmithError, match="pip install mlflow-skinny"):
        check_trackers("mlflow")
    with pytest.raises(TunesmithError, match="no tracker is called 'wandbb'; did you mean 'wandb'"):
        check_trackers("wandbb")
    check_trackers("none")
    arguments = ["train", "--model", "no/where", "--data", "rows.jsonl", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*arguments, "--report-to", "trackio", "--use-cpu", "--precision=fp32"])
    assert result.exit_code == 2
    assert "trackio is not installed; run: pip install trackio" in result.stderr
    assert not (tmp_path / "run").exists()
