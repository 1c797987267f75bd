"""`tunesmith train`: a recipe to a trained model."""

import os
import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.errors import TunesmithError

if TYPE_CHECKING:
    from tunesmith.recipe import Recipe
    from tunesmith.train.trainer import SFTTrainer

RECIPE = "recipe.yaml"
SAMPLE_PROMPTS = 3
USAGE = "[RECIPE.yaml] [--SETTING VALUE]..."
HELP = """Train a model, as a recipe says.

A recipe is a YAML file with lines of `setting: value`. Every setting is an
option, too, which overrides the recipe. With options alone:

[bold]tunesmith train --model demo --data rows.jsonl --lora --output runs/first[/bold]

The settings used most:

\b
[cyan]--model[/cyan]        a name on the hub, a folder, or demo
[cyan]--data[/cyan]         .jsonl .json .csv .tsv .parquet .txt, or a name on the hub
[cyan]--eval-data[/cyan]    the same, to evaluate on after each epoch
[cyan]--output[/cyan]       the folder for the run
[cyan]--lora[/cyan]         train adapters: alone, or r=16,alpha=32,target=all-linear
[cyan]--quantize[/cyan]     8bit | 4bit: the base model in less memory
[cyan]--train-on[/cyan]     all | completion | assistant | last_assistant
[cyan]--max-length[/cyan]   most tokens of an example (1024)
[cyan]--packing[/cyan]      several examples to a row of that length
[cyan]--learning-rate[/cyan]  [cyan]--num-train-epochs[/cyan]  [cyan]--max-steps[/cyan]
[cyan]--per-device-train-batch-size[/cyan]  [cyan]--gradient-accumulation-steps[/cyan]
[cyan]--resume-from-checkpoint[/cyan]   go on from the newest whole one in the output folder
"""


def _list_settings(wanted: bool) -> None:
    if wanted:
        _print_settings()
        raise typer.Exit


def train(
    ctx: typer.Context,
    fields: Annotated[
        bool, typer.Option("--fields", callback=_list_settings, is_eager=True, help="List all settings, and exit.")
    ] = False,
) -> None:
    """Train a model, as a recipe says."""
    from tunesmith.recipe import parse_options, resolve

    path, overrides = parse_options(ctx.args)
    run(resolve(path, overrides))


def run(recipe: "Recipe") -> None:
    """Trains as `recipe` says, and saves the model. Ctrl-C saves a checkpoint and exits with 130, SIGTERM
    with 143."""
    from tunesmith.cli.rows import eval_rows, origins, training_rows
    from tunesmith.model.load import compute_dtype, resolve_model
    from tunesmith.model.lora import lora_config
    from tunesmith.model.quantize import quantization

    adapters = lora_config(recipe.lora) if recipe.lora not in (None, False) else None
    _check_resume(recipe)
    rows, held_out = training_rows(recipe), eval_rows(recipe)
    for name, (value, reason) in recipe.chosen.items():
        _say(f"{name}: {value} ({reason})")
    if recipe.config.precision_note:
        _say(recipe.config.precision_note)
    resolve_model(recipe.model, _say)
    if recipe.config.sample_prompts is None:
        recipe.config.sample_prompts = SAMPLE_PROMPTS

    from rich.console import Console

    from tunesmith.train.interrupt import StopOnInterrupt
    from tunesmith.train.progress import TrainingProgress
    from tunesmith.train.trainer import SFTTrainer

    with StopOnInterrupt(_say) as stop:
        trainer = SFTTrainer(
            model=recipe.model,
            args=recipe.config,
            train_dataset=rows,
            eval_dataset=held_out,
            peft_config=adapters,
            quantization_config=quantization(recipe.quantize, compute_dtype(recipe.config))
            if recipe.quantize
            else None,
            callbacks=[stop],
        )
        trainer.origins |= origins(recipe)
        _save_recipe(recipe, trainer)
        _say_preflight(trainer)
        _say(trainer.trainable)
        with TrainingProgress.attach(trainer, Console()):
            trainer.train(resume_from_checkpoint=recipe.config.resume_from_checkpoint)
    output = str(recipe.config.output_dir)
    if not stop.stopped:
        trainer.save_model()
    _report(trainer)
    if stop.stopped:
        recipe_file = shlex.quote(str(Path(output) / RECIPE))
        _say(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, with a checkpoint in {output}")
        _say(f"go on:  tunesmith train {recipe_file} --resume-from-checkpoint")
        raise typer.Exit(stop.exit_code)
    _say(f"saved {'the adapters' if trainer.has_adapters else 'the model'} to {output}")
    _say(f"try it:  tunesmith chat {shlex.quote(output)}")


def _report(trainer: "SFTTrainer") -> None:
    """A run stands without its report."""
    from tunesmith.cli.report import write_report

    if not trainer.is_world_process_zero():
        return
    output = str(trainer.args.output_dir)
    trainer.record().write(output)  # also of a run that was stopped
    try:
        _say(f"how it went:  {write_report([output])}")
    except TunesmithError as error:
        _say(f"note: there is no report: {error}")


def _say_preflight(trainer: "SFTTrainer") -> None:
    from tunesmith.cli.check import lines

    for name, report in trainer.preflight.splits.items():
        for line in lines(name, report):
            _say(line)
    for note in trainer.preflight.notes:
        _say(f"note: {note}")


def _check_resume(recipe: "Recipe") -> None:
    """Before anything is loaded: is there a checkpoint to go on from?"""
    from tunesmith.model.load import newest_checkpoint

    wanted, output = recipe.config.resume_from_checkpoint, str(recipe.config.output_dir)
    if wanted and newest_checkpoint(Path(output)) is None and not isinstance(wanted, str):
        raise TunesmithError(f"resume_from_checkpoint: there is no checkpoint in {output}; leave it out to start anew")
    if isinstance(wanted, str) and not (Path(wanted) / "trainer_state.json").is_file():
        raise TunesmithError(f"resume_from_checkpoint: {wanted} is no checkpoint: it has no trainer_state.json")


def _save_recipe(recipe: "Recipe", trainer: "SFTTrainer") -> None:
    if trainer.is_world_process_zero():
        folder = Path(str(recipe.config.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")


def _say(text: object) -> None:
    """Once, however many processes train."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(str(text))


def _print_settings() -> None:
    """Every setting with its type, default and help."""
    from dataclasses import MISSING

    from tunesmith.coerce import expected
    from tunesmith.recipe import all_settings

    for name, setting in all_settings().items():
        default = getattr(setting.default, "value", setting.default)
        typer.echo(f"{name}: {expected(setting.kind)}" + ("" if default is MISSING else f" (default: {default!r})"))
        typer.echo(textwrap.fill(setting.help, 100, initial_indent="    ", subsequent_indent="    ") + "\n")
