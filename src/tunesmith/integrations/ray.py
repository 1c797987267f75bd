"""A recipe trained by the workers of Ray Train, which starts them again where one is lost.

Each worker is a process of the run, as `torchrun` would have started it. What the run logs goes to Ray, and so does
each checkpoint, as a copy in Ray's storage. Workers that Ray starts again go on from the last of these, on whichever
machine they are.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError

if find_spec("ray") is None:
    raise TunesmithError('tunesmith.integrations.ray needs ray: pip install "tunesmith[ray]"')

from ray.train import Checkpoint, Result, RunConfig, ScalingConfig, get_checkpoint, report
from ray.train import WorkerGroupError as WorkersFailed
from ray.train.torch import TorchTrainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunesmith.cli.train import opened, trainer_of
from tunesmith.runs.checkpoints import Manifest, belongs_to
from tunesmith.settings.recipe import resolve
from tunesmith.train.trainer import BaseTrainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What each worker is to do: the `settings` of a recipe. Relative paths in them begin in `folder`."""

    settings: Mapping[str, Any]
    folder: str


def train(
    recipe: str | Path | Mapping[str, Any],
    *,
    num_workers: int = 1,
    use_gpu: bool = False,
    run_config: RunConfig | None = None,
) -> Result:
    """Train as `recipe` says, in `num_workers` processes that Ray places on its cluster, each with a GPU if `use_gpu`.

    `recipe` is the path of a YAML file, or its settings. `run_config` is Ray's: where it stores what it is told
    (`storage_path`), how often workers that were lost are started again (`failure_config`; not at all, by default), how
    many checkpoints it keeps. The result has the last metrics, and a checkpoint whose folder is a model to load. The
    run itself is in the recipe's `output`, on the machine of the first worker.

    Raises TunesmithError for what the recipe has wrong, and `ray.train.TrainingFailedError` where workers fail more
    often than they are started again.
    """
    path, settings = (None, dict(recipe)) if isinstance(recipe, Mapping) else (str(recipe), {})
    checked = resolve(path, settings)
    if checked.processes != 1:
        raise TunesmithError(
            f"processes is {checked.processes}, and Ray starts num_workers={num_workers}; leave processes out"
        )
    given = {**checked.given, "output_dir": str(Path(checked.given["output_dir"]).absolute())}
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config=asdict(Work(settings=given, folder=os.getcwd())),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=run_config,
    )
    try:
        return trainer.fit()
    except WorkersFailed as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, TunesmithError):
                raise failure from error
        raise


def train_on_worker(work: dict[str, Any]) -> None:
    """The run in a worker of Ray, from the last checkpoint that Ray was told of. `work` are the fields of `Work`."""
    if Path(work["folder"]).is_dir():
        os.chdir(work["folder"])
    recipe, reports = resolve(None, work["settings"]), Reports()
    trainer = trainer_of(recipe, opened(recipe), [reports])
    reports.trainer = trainer
    with _last_checkpoint(trainer) as folder:
        trainer.train(resume_from_checkpoint=folder)
    trainer.save_model()


@contextmanager
def _last_checkpoint(trainer: BaseTrainer) -> Iterator[str | None]:
    """The folder of the last checkpoint that Ray was told of; None at the start of a run.

    Where the output folder still has the one that Ray has copied, it is that one, so that the run there goes on.
    """
    stored = get_checkpoint()
    if stored is None:
        yield None
        return
    with stored.as_directory() as folder:
        manifest = Manifest.read(Path(folder))
        own = Path(str(trainer.args.output_dir)) / f"checkpoint-{manifest.step}"
        yield str(own) if trainer.is_world_process_zero() and belongs_to(own, manifest.run) else folder


class Reports(TrainerCallback):
    """Tells Ray what is logged, and each checkpoint when it is whole; once a step, because Ray lets workers wait for
    each other then. All workers tell at the same steps, as Ray wants, and the first one has the checkpoint."""

    trainer: BaseTrainer

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._untold = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._metrics |= {**(logs or {}), "step": state.global_step}
        self._untold = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._metrics["step"] = state.global_step
        checkpoint = None
        if state.is_world_process_zero:
            self.trainer.keeper.wait()  # with async_save, the checkpoint is written meanwhile
            checkpoint = Checkpoint.from_directory(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        self._tell(checkpoint)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._untold:
            self._tell()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._untold:
            self._tell()

    def _tell(self, checkpoint: Checkpoint | None = None) -> None:
        self._untold = False
        report(dict(self._metrics), checkpoint=checkpoint)
