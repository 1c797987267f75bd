"""`tunesmith train`: a recipe to a trained model."""

import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import data
from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import finish_lines, progress_console, say

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from tunesmith.settings.recipe import Recipe, Trainer
    from tunesmith.trainers import Published as PublicTrainer

Nodes = Annotated[int, typer.Option("--nodes", metavar="M", help="Train on so many machines.")]
NodeRank = Annotated[int, typer.Option("--node-rank", metavar="R", help="The number of this machine, from 0.")]
Rendezvous = Annotated[
    str | None, typer.Option("--rendezvous", metavar="HOST:PORT", help="Where machines meet: on the first one.")
]

LaunchConfig = Annotated[
    str | None,
    typer.Option("--launch-config", metavar="NAME", help="multi_gpu | fsdp2 | accelerate's YAML."),
]

RECIPE = "recipe.yaml"
TELLING = 10.0
"""Seconds that a process has to tell its error."""
USAGE = "[RECIPE.yaml] [--SETTING VALUE]..."
HELP = """Train a model, as a recipe says.

A recipe is a YAML file with lines of `setting: value`. Every setting is an
option, too, which overrides the recipe. With options alone:

[bold]tunesmith train --model demo --data rows.jsonl --lora --output runs/first[/bold]

The settings used most:

\b
[cyan]--model[/cyan]        a name on the hub, a folder, or demo
[cyan]--data[/cyan]         a file, a folder, 'data/*.jsonl', or a name on the hub
[cyan]--eval-data[/cyan]    the same, to evaluate on after each epoch
[cyan]--output[/cyan]       the folder for the run
[cyan]--lora[/cyan]         train adapters: alone, or r=16,alpha=32,target=all-linear
[cyan]--quantize[/cyan]     8bit | 4bit: the base model in less memory
[cyan]--train-on[/cyan]     all | completion | assistant | last_assistant
[cyan]--max-length[/cyan]   most tokens of an example (1024)
[cyan]--packing[/cyan]      several examples to a row of that length
[cyan]--learning-rate[/cyan]  [cyan]--num-train-epochs[/cyan]  [cyan]--max-steps[/cyan]
[cyan]--per-device-train-batch-size[/cyan]  [cyan]--gradient-accumulation-steps[/cyan]
[cyan]--processes[/cyan]    so many on this machine, a GPU each; they train what one does
[cyan]--resume-from-checkpoint[/cyan]   go on from the newest whole one in --output
"""


def list_settings(trainer: "Trainer") -> None:
    """Prints every setting of a trainer with its type, default and help, and ends the command."""
    from dataclasses import MISSING

    from tunesmith.settings.coerce import expected
    from tunesmith.settings.recipe import all_settings

    for name, setting in all_settings(trainer).items():
        default = getattr(setting.default, "value", setting.default)
        typer.echo(f"{name}: {expected(setting.kind)}" + ("" if default is MISSING else f" (default: {default!r})"))
        typer.echo(textwrap.fill(setting.help, 100, initial_indent="    ", subsequent_indent="    ") + "\n")
    raise typer.Exit


def _list_settings(wanted: bool) -> None:
    if wanted:
        list_settings("sft")


def _print_schema(wanted: bool) -> None:
    if wanted:
        from tunesmith.settings.schema import recipe_schema

        typer.echo(json.dumps(recipe_schema(), indent=1, ensure_ascii=False))
        raise typer.Exit


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """How many train together, which of them this is, and where they meet."""

    nodes: int
    node_rank: int
    rendezvous: str | None


def train(
    ctx: typer.Context,
    fields: Annotated[
        bool, typer.Option("--fields", callback=_list_settings, is_eager=True, help="List all settings, and exit.")
    ] = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", callback=_print_schema, is_eager=True, help="Print the JSON schema of recipes, and exit."
        ),
    ] = False,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = None,
    launch_config: LaunchConfig = None,
) -> None:
    """Train a model, as a recipe says."""
    machines = Machines(nodes=nodes, node_rank=node_rank, rendezvous=rendezvous)
    begin(ctx.args, machines, launch_config)


def command_of(trainer: "Trainer", summary: str) -> Callable[..., None]:
    """The command that is `tunesmith train` with this `trainer`; `summary` is its line in the list of commands."""

    def list_own(wanted: bool) -> None:
        if wanted:
            list_settings(trainer)

    def command(
        ctx: typer.Context,
        fields: Annotated[
            bool, typer.Option("--fields", callback=list_own, is_eager=True, help="List all settings, and exit.")
        ] = False,
        nodes: Nodes = 1,
        node_rank: NodeRank = 0,
        rendezvous: Rendezvous = None,
        launch_config: LaunchConfig = None,
    ) -> None:
        machines = Machines(nodes=nodes, node_rank=node_rank, rendezvous=rendezvous)
        begin(ctx.args, machines, launch_config, trainer=trainer)

    command.__name__, command.__doc__ = trainer, summary
    return command


def begin(arguments: list[str], machines: Machines, launch_config: str | None = None, **settings: Any) -> None:
    """Trains as the command line says, with `settings` that it can't change. What a launch config says goes before the
    recipe, and behind an option."""
    from tunesmith.secrets import scrub
    from tunesmith.settings.recipe import parse_options, resolve

    path, overrides = parse_options(arguments)
    if launch_config is not None:
        configured, machines = _configured(launch_config, machines)
        overrides = configured | overrides
    recipe = resolve(path, overrides | settings)
    if launch_config is not None and "processes" not in recipe.given:
        recipe = resolve(path, overrides | settings | {"processes": _one_for_each_gpu(launch_config)})
    if (recipe.processes > 1 or recipe.max_restarts or machines.nodes > 1) and "RANK" not in os.environ:
        _launch(recipe, machines)
    _check_launched(recipe)
    if "RANK" in os.environ:
        from tunesmith.train.together import leave_with_agent

        leave_with_agent()
    # Trackers keep the command line that a run was started with.
    tokens = [str(value) for name, value in recipe.given.items() if name.endswith("token") and value]
    sys.argv = [scrub(word, tokens) for word in sys.argv]
    try:
        run(recipe)
    except Exception as error:
        _end_as_lost(error)
        raise


def _configured(name: str, machines: Machines) -> tuple[dict[str, Any], Machines]:
    """The settings of a launch config, and its machines, where options do not say which."""
    from tunesmith.settings.launch_config import read_launch_config

    config = read_launch_config(name)
    return dict(config.settings), Machines(
        nodes=config.nodes if machines.nodes == 1 else machines.nodes,
        node_rank=machines.node_rank or config.node_rank,
        rendezvous=machines.rendezvous or config.rendezvous,
    )


def _one_for_each_gpu(name: str) -> int:
    """How many processes a machine gets; one that was started knows how many others were."""
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or torch.cuda.device_count())
    if not processes:
        raise TunesmithError(
            f"--launch-config {name} starts a process for each GPU, and this machine shows none; write --processes 2 "
            "beside it for two processes that share its cores"
        )
    return processes


def _launch(recipe: "Recipe", machines: Machines) -> None:
    """Run this command in each process of this machine, and end as they do."""
    from tunesmith.train.launch import Place, launch

    place = Place(
        processes=recipe.processes,
        max_restarts=recipe.max_restarts,
        nodes=machines.nodes,
        node_rank=machines.node_rank,
        rendezvous=machines.rendezvous,
    )
    output = Path(str(recipe.config.output_dir))
    code, text = launch(sys.argv[1:], place, output, lambda line: typer.echo(line, err=True))
    if text:
        typer.echo(text, err=True)
    raise typer.Exit(code)


def _check_launched(recipe: "Recipe") -> None:
    """Raises TunesmithError where something else has started other processes than the recipe says."""
    started = {
        "processes": os.environ.get("LOCAL_WORLD_SIZE"),
        "max_restarts": os.environ.get("TORCHELASTIC_MAX_RESTARTS") or "0" if "RANK" in os.environ else None,
    }
    for name, value in started.items():
        wanted = recipe.given.get(name)
        if wanted is not None and value is not None and int(value) != wanted:
            what = f"{value} were started on this machine" if name == "processes" else f"what started this has {value}"
            raise TunesmithError(
                f"{name} is {wanted}, and {what}; leave the setting out, or start the command without `torchrun`"
            )


def _end_as_lost(error: Exception) -> None:
    """Exits quietly where the error is only that another process ended, which tells its own."""
    from tunesmith.train.together import LOST, is_lost, number_of_processes

    if number_of_processes() > 1 and is_lost(error):
        _say("another process ended, and so does this one")
        time.sleep(TELLING)  # that one may still be there, and with the first that ends the others are ended
        raise typer.Exit(LOST) from error


def run(recipe: "Recipe") -> None:
    """Trains as `recipe` says, and saves the model. Ctrl-C saves a checkpoint and exits with 130, SIGTERM
    with 143."""
    from tunesmith.train.interrupt import StopOnInterrupt
    from tunesmith.train.progress import TrainingProgress
    from tunesmith.train.together import number_of_processes, part

    output, rows = Path(str(recipe.config.output_dir)), opened(recipe)
    with TrainingProgress(progress_console()) as view, StopOnInterrupt(view.say) as stop:
        trainer = trainer_of(recipe, rows, [stop])
        view.follow(trainer)
        with _reporting(trainer, output):
            trainer.train(resume_from_checkpoint=recipe.config.resume_from_checkpoint)
        if not stop.stopped:
            trainer.save_model()
    _say_report(trainer)
    _finish(trainer, stopped=stop.stopped)
    part()
    # Who started several processes would end those that still write, where the first of them seems to have failed.
    if stop.stopped and number_of_processes() == 1:
        raise typer.Exit(stop.exit_code)


def opened(recipe: "Recipe") -> tuple[Any, Any]:
    """The rows to train on and those to evaluate on, before any weight is loaded: what can be wrong with the recipe
    shows, and the model is there."""
    from tunesmith.model.load import resolve_model
    from tunesmith.model.precision import settle_precision
    from tunesmith.runs.files import check_writable
    from tunesmith.train.setup import check_trackers

    output = Path(str(recipe.config.output_dir))
    check_trackers(recipe.config.report_to)
    _check_resume(recipe.config.resume_from_checkpoint, output)
    if _is_main():
        check_writable(output)
    rows = data.training_rows(recipe), data.eval_rows(recipe)
    for name, (value, reason) in recipe.chosen.items():
        _say(f"{name}: {value} ({reason})")
    if note := settle_precision(recipe.config):
        _say(note)
    resolve_model(recipe.model, _say)
    return rows


def trainer_of(recipe: "Recipe", rows: tuple[Any, Any], callbacks: "list[TrainerCallback]") -> "PublicTrainer":
    """A trainer that is ready to train on `rows` as `recipe` says, which is in its output folder then."""
    from tunesmith.model.precision import compute_dtype
    from tunesmith.model.quantize import quantization
    from tunesmith.settings.lora import lora_config
    from tunesmith.trainers import TRAINERS

    trainer = TRAINERS[recipe.trainer](
        model=recipe.model,
        args=recipe.config,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        callbacks=callbacks,
        peft_config=lora_config(recipe.lora) if recipe.lora not in (None, False) else None,
        quantization_config=quantization(recipe.quantize, compute_dtype(recipe.config)) if recipe.quantize else None,
    )
    trainer.origins |= data.origins(recipe)
    output = Path(str(recipe.config.output_dir))
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        (output / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    _say_preflight(trainer)
    _say(trainer.trainable)
    return trainer


def _finish(trainer: "PublicTrainer", *, stopped: bool) -> None:
    """What came of it, and what can be done with it."""
    output, state = str(trainer.args.output_dir), trainer.state
    saved = "adapters" if trainer.has_adapters else "model"
    if stopped:
        recipe_file = shlex.quote(str(Path(output) / RECIPE))
        lines = [
            f"stopped at step {state.global_step} of {state.max_steps}, with a checkpoint in {output}",
            f"go on:  tunesmith train {recipe_file} --resume-from-checkpoint",
        ]
    else:
        use = f"tunesmith eval {shlex.quote(output)} --data PAIRS" if trainer.kind == "reward" else None
        use = use or f"tunesmith chat {shlex.quote(output)}"
        lines = [f"saved the {saved} to {output}", f"try it:  {use}"]
    if _is_main():
        finish_lines(_result(trainer) | {"saved": None if stopped else saved, "stopped": stopped}, lines)


def _result(trainer: "PublicTrainer") -> dict[str, Any]:
    """The numbers of a run: the last of each, and what was odd."""
    last: dict[str, Any] = {}
    for entry in trainer.state.log_history:
        last |= entry
    return {
        "output": str(trainer.args.output_dir),
        "steps": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "epoch": trainer.state.epoch,
        "loss": last.get("loss"),
        "mean_loss": last.get("train_loss"),
        "eval": {name: value for name, value in last.items() if name.startswith("eval_")},
        "tokens": last.get("num_tokens"),
        "seconds": last.get("train_runtime"),
        "trained_parameters": trainer.trainable.trained,
        "parameters": trainer.trainable.parameters,
        "events": [{"step": step, "event": text} for step, text in trainer.events],
        "report": None if trainer.report is None else str(trainer.report),
    }


@contextmanager
def _reporting(trainer: "PublicTrainer", output: Path) -> Iterator[None]:
    """An error leaves a report. A second Ctrl-C leaves at once; what was saved before stays."""
    from tunesmith.runs.checkpoints import checkpoints

    try:
        yield
    except Exception:
        _say_report(trainer)
        raise
    except KeyboardInterrupt:
        saved = checkpoints(output)
        newest = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was saved"
        typer.echo(f"left at once; {newest}", err=True)
        raise


def _say_report(trainer: "PublicTrainer") -> None:
    if trainer.report is not None:
        _say(f"how it went:  {trainer.report}")


def _say_preflight(trainer: "PublicTrainer") -> None:
    from tunesmith.cli.check import split_lines

    assert trainer.preflight is not None
    for name, report in trainer.preflight.splits.items():
        for line in split_lines(name, report):
            _say(line)
    for note in trainer.preflight.notes:
        _say(f"note: {note}")


def _check_resume(wanted: bool | str | None, output: Path) -> None:
    """Before anything is loaded: is there a checkpoint to go on from?"""
    from tunesmith.runs.checkpoints import PARTIALS, STATE, checkpoints, none_to_go_on_from

    if not _is_main():  # the first process says what is wrong with it, and this one whether it is here
        return
    if isinstance(wanted, str):
        if not (Path(wanted) / STATE).is_file():
            raise TunesmithError(f"resume_from_checkpoint: {wanted} is no checkpoint: it has no {STATE}")
    # One that was cut short may lack nothing but its name, which the trainer sees.
    elif wanted and not checkpoints(output) and not any(output.glob(PARTIALS)):
        raise TunesmithError(none_to_go_on_from(output))


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: object) -> None:
    """Once, however many processes train."""
    if _is_main():
        say(text)
