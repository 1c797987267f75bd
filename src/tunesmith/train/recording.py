"""What a run was, gathered from its trainer for `run.json`."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel

from tunesmith.runs.describe import adapter_settings_of, counts_of, method_of, prompts_of, settings_of, versions
from tunesmith.runs.record import Origin, RunRecord
from tunesmith.train.setup import Model, base_model

PROMPTS = 3


def record_of(trainer: Any, origins: Mapping[str, Origin]) -> RunRecord:
    """The record of `trainer`, an SFTTrainer, as things stand. `origins` says where data come from, by split or source;
    what has none was made by a program."""
    history = trainer.state.log_history
    evaluations = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
    last = [entry for entry in evaluations if entry["step"] == evaluations[-1]["step"]]  # one for each data set
    seconds = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    amount = trainer.trainable
    return RunRecord(
        versions=versions(),
        base_model=_origin(trainer.model),
        base_revision=_revision(trainer.model),
        method=method_of(trainer.model),
        trainable_parameters=amount.trained,
        total_parameters=amount.parameters,
        data=counts_of(trainer.preflight, origins),
        settings=settings_of(trainer.args) | adapter_settings_of(trainer.model),
        history=tuple(history),
        steps=trainer.state.global_step,
        planned_steps=trainer.state.max_steps,
        metrics={name: value for entry in last for name, value in entry.items() if name.startswith("eval_")},
        seconds=sum(seconds) if seconds else None,
        device=trainer.args.device.type,
        prompts=prompts_of(trainer.first_rows(), PROMPTS),
    )


def _origin(model: Model) -> Origin:
    base = base_model(model)
    name = base.config.name_or_path
    if isinstance(model, PeftModel):
        name = model.active_peft_config.base_model_name_or_path or name
    return Origin.of_model(name) if name else Origin(kind="memory", name=type(base).__name__)


def _revision(model: Model) -> str | None:
    commit = getattr(base_model(model).config, "_commit_hash", None)
    return commit if isinstance(commit, str) else None
