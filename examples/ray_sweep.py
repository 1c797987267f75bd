"""Which learning rate: a sweep by Ray Tune, each trial a run of a recipe.

    pip install "tunesmith[ray]"
    python examples/ray_sweep.py recipe.yaml

The recipe needs eval_data. Where trials compete, they are stopped by the loss on it.
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from ray.train import FailureConfig, RunConfig
from ray.tune.integration.ray_train import TuneReportCallback

from tunesmith.integrations.ray import train

WORKERS = 1
"""Of a trial. A worker takes a CPU, and the trial that waits for it next to none."""
SPACE = {"learning_rate": tune.grid_search([1e-4, 3e-4, 1e-3]), "lora": {"r": 16, "alpha": 32}}


def trial(chosen: dict[str, Any], recipe: dict[str, Any], runs: Path) -> None:
    """The recipe with the settings of the trial, in a folder of its own. What it logs goes to Tune, too."""
    name = str(tune.get_context().get_trial_id())
    train(
        recipe | chosen | {"output": str(runs / name)},
        num_workers=WORKERS,
        run_config=RunConfig(
            name=name,
            storage_path=str(runs / "ray"),
            failure_config=FailureConfig(max_failures=2),
            callbacks=[TuneReportCallback()],
        ),
    )


def main(path: str) -> None:
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for key in ("data", "eval_data"):  # a trial works in another folder
        recipe[key] = str(Path(recipe[key]).resolve())
    runs = Path(recipe["output"]).resolve()
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, recipe=recipe, runs=runs), {"CPU": 0.01}),
        param_space=SPACE,
        tune_config=tune.TuneConfig(metric="eval_loss", mode="min", max_concurrent_trials=2),
        run_config=tune.RunConfig(storage_path=str(runs / "tune")),
    )
    best = tuner.fit().get_best_result()
    print(f"best: {best.config}, eval_loss {best.metrics['eval_loss']:.4f}: {runs / best.metrics['trial_id']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
