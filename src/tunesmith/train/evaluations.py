"""What a run needs for the evaluations that its settings and callbacks count on."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, Trainer

from tunesmith.errors import TunesmithError
from tunesmith.settings.config import Config


def check_data(args: Config, evaluated: Any) -> None:
    """Raises TunesmithError where evaluations are asked for, and nothing is there to evaluate on."""
    if args.eval_strategy != "no" and not evaluated:
        raise TunesmithError(
            f"eval_strategy is {getattr(args.eval_strategy, 'value', args.eval_strategy)}, and there is nothing to "
            "evaluate on: give an eval_dataset, hold rows out of a source, or set eval_strategy: no"
        )


def check_metric(trainer: Trainer, means: Sequence[str]) -> None:
    """Raises TunesmithError where the run would look for a metric that no evaluation gives it; `means` are those that
    the trainer adds to the loss."""
    args = trainer.args
    wanted = args.metric_for_best_model
    ours = trainer.compute_metrics is None and type(trainer).evaluate.__module__.partition(".")[0] == "tunesmith"
    if wanted is not None and args.eval_strategy != "no" and ours:
        measured = ("loss", *means, "runtime", "samples_per_second", "steps_per_second")
        sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, Mapping) else None
        known = [name if sets is None else f"{one}_{name}" for one in sets or ("",) for name in measured]
        if wanted.removeprefix("eval_") not in known:
            raise TunesmithError(
                f"metric_for_best_model is {wanted!r}, which no evaluation measures: give compute_metrics, which "
                f"returns it, or take one of {', '.join(known)}"
            )
    stops_early = any(isinstance(item, EarlyStoppingCallback) for item in trainer.callback_handler.callbacks)
    if not stops_early:
        return
    if args.eval_strategy == "no":
        raise TunesmithError(
            "EarlyStoppingCallback compares evaluations, and there are none: give an eval_dataset, and set "
            "eval_strategy: steps or epoch"
        )
    if args.metric_for_best_model is None:
        raise TunesmithError("EarlyStoppingCallback compares a metric: set metric_for_best_model, such as eval_loss")
