"""`tunesmith plan`: the memory a run will need, before any weight is loaded."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.errors import TunesmithError, nearest
from tunesmith.terminal.output import finish
from tunesmith.text import size

if TYPE_CHECKING:
    from rich.table import Table

    from tunesmith.plan.memory import Method, MethodPlan, Run
    from tunesmith.settings.recipe import Recipe

USAGE = "[RECIPE.yaml] [--gpu NAME] [--method NAME] [--json] [--SETTING VALUE]..."
HELP = """Tell the memory of a run, and whether it fits, before any weight is loaded.

Takes what [cyan]tunesmith train[/cyan] takes; only the model's config is read, and no data. Every way to train is
shown, with the largest max_length and the largest batch that fit. It counts one device: what fsdp, deepspeed and
activation_offloading move elsewhere is counted too. Exit code 2 when the recipe does not fit.

[bold]tunesmith plan recipe.yaml --gpu t4[/bold]

[bold]tunesmith plan --model demo --max-length 2048 --method lora --json[/bold]
"""
PARTS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "loss (logits in chunks)",
    "overhead": "libraries, allocator",
}


def plan(
    ctx: typer.Context,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="t4 | a10g | l4 | 3090 | 4090 | a100 | a100-80gb | h100 | cpu.")
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="full | lora | 8bit | 4bit; unset, all.")] = None,
) -> None:
    """Tell the memory of a run before any weight is loaded."""
    from tunesmith.plan.memory import METHODS, NO_NEED, advice, run_of
    from tunesmith.plan.memory import plan as planned
    from tunesmith.settings.recipe import parse_options, resolve

    if method is not None and method not in METHODS:
        raise TunesmithError(f"--method {method}: choose {' | '.join(METHODS)}{nearest(method, METHODS)}")
    path, overrides = parse_options(ctx.args)
    overrides.pop("output", None)
    if path is None:
        overrides.setdefault("data", "unused")
    recipe = resolve(path, overrides | NO_NEED)
    if recipe.trainer in ("grpo", "rloo"):
        raise TunesmithError(
            f"plan counts supervised runs, and this one is {recipe.trainer}, whose answers are drawn in training; a "
            "micro-batch that does not fit is split then, with the same gradients"
        )
    if recipe.trainer != "sft":
        raise TunesmithError(
            f"plan counts supervised runs, and this one is {recipe.trainer}, which also has a reference. "
            "Start it with memory_limit on a CPU, or let rehearse: always find out in the first step what fits"
        )
    run = run_of(recipe, gpu)
    asked: Any = method or recipe.quantize or ("lora" if recipe.lora not in (None, False) else "full")
    plans = {name: planned(run, name) for name in METHODS if method in (None, name)}
    hints = [] if plans[asked].fits else advice(run, asked, plans)
    finish(_as_json(recipe, run, plans, hints), lambda: _show(recipe, run, asked, plans, hints))
    if not plans[asked].fits:
        raise typer.Exit(2)


def _as_json(recipe: "Recipe", run: "Run", plans: Mapping["Method", "MethodPlan"], hints: list[str]) -> dict[str, Any]:
    return {
        "model": recipe.model,
        "device": run.device.name,
        "device_memory": run.device.memory,
        "precision": run.precision,
        "rows": run.rows,
        "max_length": run.length,
        "gradient_checkpointing": bool(run.checkpoint_every),
        "methods": {
            name: {
                "memory": item.memory.parts(),
                "total": item.memory.total,
                "fits": item.fits,
                "largest_max_length": item.longest,
                "largest_rows": item.most_rows,
                "notes": list(item.notes),
            }
            for name, item in plans.items()
        },
        "advice": hints,
    }


def _show(
    recipe: "Recipe", run: "Run", asked: "Method", plans: Mapping["Method", "MethodPlan"], hints: list[str]
) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    checkpointing = "on" if run.checkpoint_every else "off"
    console.print(
        f"{recipe.model} on {run.device.name}, which has {size(run.device.memory)}: {run.precision}, "
        f"{run.rows} rows of {run.length:,} tokens, gradient checkpointing {checkpointing}",
        soft_wrap=True,
    )
    console.print(_table(run, plans))
    for note in dict.fromkeys(note for item in plans.values() for note in item.notes):
        console.print(f"note: {note}", soft_wrap=True)
    if hints:
        console.print(f"{asked} does not fit. What would change that:")
        for hint in hints:
            console.print(f"  {hint}", soft_wrap=True)
    else:
        console.print(f"{asked} fits.")


def _table(run: "Run", plans: Mapping["Method", "MethodPlan"]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("GB")
    for name in plans:
        table.add_column(name, justify="right")
    for part, label in PARTS.items():
        numbers = [item.memory.parts()[part] for item in plans.values()]
        if any(numbers):
            table.add_row(label, *(f"{number / 1e9:,.2f}" if number else "" for number in numbers))
    table.add_section()
    table.add_row("together", *(f"{item.memory.total / 1e9:,.2f}" for item in plans.values()))
    table.add_row("fits", *("yes" if item.fits else "no" for item in plans.values()))
    table.add_row(f"largest max_length, {run.rows} rows", *(_most(item.longest) for item in plans.values()))
    table.add_row(f"most rows of {run.length:,}", *(_most(item.most_rows) for item in plans.values()))
    return table


def _most(number: int) -> str:
    return f"{number:,}" if number else "none"
