"""`tunesmith plan`: the memory a run will need, before any weight is loaded."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tunesmith.errors import TunesmithError, nearest
from tunesmith.terminal.output import finish
from tunesmith.text import duration, size

if TYPE_CHECKING:
    from rich.table import Table

    from tunesmith.plan.memory import Method, MethodPlan, Run, Shard
    from tunesmith.plan.processes import Spread
    from tunesmith.settings.recipe import Recipe

USAGE = "[RECIPE.yaml] [--gpu NAME] [--method NAME] [--processes N] [--shard WHAT] [--json] [--SETTING VALUE]..."
HELP = """Tell the memory of a run, and whether it fits, before any weight is loaded.

Takes what [cyan]tunesmith train[/cyan] takes; only the model's config is read, and no data. Every way to train is
shown, with the largest max_length and the largest batch that fit. Several processes: the memory of each, what it
sends in a step, and how long a step takes at stated speeds. What deepspeed and activation_offloading move elsewhere is
counted too. Exit code 2 when the recipe does not fit.

[bold]tunesmith plan recipe.yaml --gpu t4[/bold]

[bold]tunesmith plan --model demo --max-length 2048 --method lora --json[/bold]

[bold]tunesmith plan recipe.yaml --gpu h100 --processes 64 --shard full[/bold]
"""
PLANNED = ("sft", "dpo", "kto", "distill")
"""Trainers whose runs are counted."""
QUANTIZED = ("8bit", "4bit")
PARTS = {
    "weights": "weights",
    "teacher": "weights of the teacher",
    "adapters": "adapters",
    "reference": "reference",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "exchanged": "gathered, and sent",
    "activations": "activations",
    "loss": "loss (logits in chunks)",
    "overhead": "libraries, allocator",
}


def plan(
    ctx: typer.Context,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="t4 | a10g | l4 | 3090 | 4090 | a100 | a100-80gb | h100 | h200 | b200 | cpu."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="full | lora | 8bit | 4bit; unset, all.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="What processes share out: none | grad | full; unset, as the recipe says."),
    ] = None,
) -> None:
    """Tell the memory of a run before any weight is loaded."""
    from tunesmith.plan.memory import METHODS, NO_NEED, SHARDS, advice, run_of
    from tunesmith.plan.memory import plan as planned
    from tunesmith.plan.processes import spread
    from tunesmith.settings.recipe import parse_options, resolve

    for name, value, known in (("--method", method, METHODS), ("--shard", shard, SHARDS)):
        if value is not None and value not in known:
            raise TunesmithError(f"{name} {value}: choose {' | '.join(known)}{nearest(value, known)}")
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
    if recipe.trainer not in PLANNED:
        raise TunesmithError(
            f"plan counts runs of {', '.join(PLANNED)}, and this one is {recipe.trainer}. "
            "Start it with memory_limit on a CPU, or let rehearse: always find out in the first step what fits"
        )
    run = run_of(recipe, gpu, cast("Shard | None", shard))
    asked: Any = method or recipe.quantize or ("lora" if recipe.lora not in (None, False) else "full")
    if run.shard != "none" and asked in QUANTIZED:
        raise TunesmithError(
            f"shard is {run.shard}, and {asked} weights can't be cut into rows; leave shard out, so that each process "
            "has them all, or take --method lora"
        )
    shown = [name for name in METHODS if method in (None, name) and (run.shard == "none" or name not in QUANTIZED)]
    plans = {name: planned(run, name) for name in shown}
    hints = [] if plans[asked].fits else advice(run, asked, plans)
    spreads = spread(run, asked) if run.processes > 1 or run.shard != "none" else []
    finish(
        _as_json(recipe, run, plans, hints) | ({"processes": _spreads_as_json(run, spreads)} if spreads else {}),
        lambda: _show(recipe, run, asked, plans, hints, spreads),
    )
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


def _spreads_as_json(run: "Run", spreads: Sequence["Spread"]) -> dict[str, Any]:
    return {
        "processes": run.processes,
        "shard": run.shard,
        "scales": [
            {
                "processes": item.processes,
                "memory": item.memory,
                "fits": item.fits,
                "sent": {
                    "all_reduce": round(item.traffic.all_reduce),
                    "all_gather": round(item.traffic.all_gather),
                    "reduce_scatter": round(item.traffic.reduce_scatter),
                },
                "tokens": item.tokens,
                "seconds": item.seconds,
            }
            for item in spreads
        ],
    }


def _show(
    recipe: "Recipe",
    run: "Run",
    asked: "Method",
    plans: Mapping["Method", "MethodPlan"],
    hints: list[str],
    spreads: Sequence["Spread"],
) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    checkpointing = "on" if run.checkpoint_every else "off"
    each = f"{run.documents} answers of " if run.documents > 1 else ""
    console.print(
        f"{recipe.model} on {run.device.name}, which has {size(run.device.memory)}: {run.precision}, "
        f"{run.rows} rows of {each}{run.length:,} tokens, gradient checkpointing {checkpointing}",
        soft_wrap=True,
    )
    console.print(_table(run, plans))
    if spreads:
        _show_spreads(console, run, asked, spreads)
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


def _show_spreads(console: Any, run: "Run", asked: str, spreads: Sequence["Spread"]) -> None:
    """How the memory, the traffic and the time of a step go with the number of processes."""
    from rich import box
    from rich.table import Table

    from tunesmith.plan.processes import REACHED

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("processes", "GB each", "fits", "GB sent a step", "step", "tokens/s"):
        table.add_column(heading, justify="right")
    for item in spreads:
        least = item.seconds[0] if item.seconds else None
        time = " to ".join(dict.fromkeys(_time(bound) for bound in item.seconds or ()))
        table.add_row(
            f"{item.processes:,}",
            f"{item.memory / 1e9:,.2f}",
            "yes" if item.fits else "no",
            f"{item.traffic.total / 1e9:,.2f}",
            time,
            f"{item.tokens / least:,.0f}" if least else "",
        )
    console.print(f"{asked}, shard {run.shard}, the same rows in each process:")
    console.print(table)
    kinds = {name: getattr(spreads[-1].traffic, name) for name in ("all_reduce", "all_gather", "reduce_scatter")}
    sent = ", ".join(f"{name.replace('_', '-')} {size(count)}" for name, count in kinds.items() if count)
    console.print(f"sent by each of {spreads[-1].processes}: {sent}", soft_wrap=True)
    if spreads[0].seconds is None:
        console.print(f"no time: no speed is stated for {run.device.name} in {run.precision}", soft_wrap=True)
    else:
        console.print(
            f"step: products at {REACHED:.0%} of the stated rate, traffic at the stated bandwidth, at once or in turn; "
            "not measured on several GPUs",
            soft_wrap=True,
        )


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else duration(seconds) if seconds >= 60 else f"{seconds:.1f} s"
