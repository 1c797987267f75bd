"""What a run was, gathered from its trainer for `run.json`."""

from typing import Any

from peft import PeftModel

from tunesmith.model.adapters import Model, base_model
from tunesmith.runs.describe import adapter_settings_of, counts_of, method_of, prompts_of, settings_of, versions
from tunesmith.runs.record import Origin, RunRecord

PROMPTS = 3


def record_of(trainer: Any) -> RunRecord:
    """The record of `trainer`, a `BaseTrainer`, as things stand, with the answers before and after training, where
    there are any. Data whose origin it doesn't know were made by a program."""
    state = trainer.state
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    last = [entry for entry in evaluations if entry["step"] == evaluations[-1]["step"]]  # one for each data set
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    amount = trainer.trainable
    # A best model that was loaded at the end is that of an earlier step.
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    return RunRecord(
        versions=versions(),
        base_model=_origin(trainer.model),
        base_revision=_revision(trainer.model),
        method=method_of(trainer.model),
        trainable_parameters=amount.trained,
        total_parameters=amount.parameters,
        data=() if trainer.preflight is None else counts_of(trainer.preflight, trainer.origins),
        settings=settings_of(trainer.args) | adapter_settings_of(trainer.model),
        history=tuple(state.log_history),
        steps=state.global_step,
        planned_steps=state.max_steps,
        ended=trainer.journal.ended,
        metrics={name: value for entry in last for name, value in entry.items() if name.startswith("eval_")},
        seconds=sum(seconds) if seconds else None,
        device=trainer.args.device.type,
        prompts=() if trainer.data is None else prompts_of(trainer.data.first_rows(), PROMPTS),
        samples=trainer.journal.samples(best or state.global_step),
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
