"""`tunesmith plan`: the memory a run will need, before any weight is loaded."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.errors import TunesmithError, nearest
from tunesmith.terminal.output import finish

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
NO_NEED: dict[str, Any] = {"output_dir": "unused", "use_cpu": True, "tf32": None, "activation_offloading": False}
"""Settings that don't decide about memory here, or need the device itself."""
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
    """Tell the memory of a run, and whether it fits, before any weight is loaded."""
    from tunesmith.plan.memory import METHODS
    from tunesmith.plan.memory import plan as planned

    if method is not None and method not in METHODS:
        raise TunesmithError(f"--method {method}: choose {' | '.join(METHODS)}{nearest(method, METHODS)}")
    recipe = _recipe(ctx.args)
    run = run_of(recipe, gpu)
    asked: Any = method or recipe.quantize or ("lora" if recipe.lora not in (None, False) else "full")
    plans = {name: planned(run, name) for name in METHODS if method in (None, name)}
    hints = [] if plans[asked].fits else advice(run, asked, plans)
    finish(_as_json(recipe, run, plans, hints), lambda: _show(recipe, run, asked, plans, hints))
    if not plans[asked].fits:
        raise typer.Exit(2)


def _recipe(arguments: list[str]) -> "Recipe":
    from tunesmith.settings.recipe import parse_options, resolve

    path, overrides = parse_options(arguments)
    overrides.pop("output", None)
    if path is None:
        overrides.setdefault("data", "unused")
    return resolve(path, overrides | NO_NEED)


def run_of(recipe: "Recipe", gpu: str | None) -> "Run":
    """What of `recipe` decides about its memory on the device `gpu`. Raises TunesmithError for an unknown device and a
    model whose config can't be had."""
    from tunesmith.model.devices import device
    from tunesmith.model.load import base_of, holds_adapters, load_config, resolve_model
    from tunesmith.model.precision import settle_precision
    from tunesmith.plan.memory import Run
    from tunesmith.settings.lora import lora_config

    config = recipe.config
    measured_here = settle_precision(config) != ""
    target = device(gpu, config.precision)  # type: ignore[arg-type]
    name, settings = recipe.model, dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    revision = {"revision": settings["revision"]} if settings.get("revision") else {}
    if holds_adapters(name):
        name, revision = base_of(resolve_model(name))
    rows, length = _batch(recipe)
    more: dict[str, Any] = config.activation_checkpointing_kwargs or {}  # type: ignore[assignment]
    return Run(
        config=load_config(name, trust_remote_code=config.trust_remote_code, **revision),
        lora=lora_config(recipe.lora if recipe.lora not in (None, False) else True),
        device=target,
        precision=target.precision if measured_here else config.precision,  # type: ignore[arg-type]
        rows=rows,
        length=length,
        flat=config.padding_free,
        checkpoint_every=int(more.get("every_n_layers", 1)) if config.activation_checkpointing else 0,
        accumulation=config.gradient_accumulation_steps,
        optimizer=str(getattr(config.optim, "value", config.optim)),
        trust_remote_code=config.trust_remote_code,
    )


def _batch(recipe: "Recipe") -> tuple[int, int]:
    """Documents of a micro-batch at its largest, and the tokens of each."""
    config = recipe.config
    tokens = config.max_tokens_per_batch
    if config.max_length is None and tokens is None:
        raise TunesmithError("max_length is None, so any batch may come; write the length to plan for, --max-length N")
    if tokens is None:
        return config.per_device_train_batch_size, int(config.max_length or 0)
    length = min(config.max_length or tokens, tokens)
    return tokens // length, length


# What to change


def advice(run: "Run", method: "Method", plans: Mapping["Method", "MethodPlan"]) -> list[str]:
    """Settings that would make `method` fit, or another one, with the memory that each takes."""
    from tunesmith.plan.memory import plan as planned

    hints, found = [], plans[method]
    if not run.checkpoint_every:
        other = planned(replace(run, checkpoint_every=1), method)
        hints.append(f"gradient_checkpointing: true   {_gb(other.memory.total)}, {_judged(other)}")
        found = other if not found.most_rows and not found.longest else found
    tail = "" if found is plans[method] else " with it"
    if 0 < found.longest < run.length:
        hints.append(f"max_length: {found.longest}   the most that fits{tail}, with {run.rows} rows")
    if 0 < found.most_rows < run.rows:
        steps = -(-run.rows * run.accumulation // found.most_rows)
        hints.append(
            f"per_device_train_batch_size: {found.most_rows}, gradient_accumulation_steps: {steps}   "
            f"fits{tail}, in steps of as many rows"
        )
    settings = {"lora": "lora: true", "8bit": "lora: true, quantize: 8bit", "4bit": "lora: true, quantize: 4bit"}
    for name, text in settings.items():
        if name in plans and name != method:
            other = plans[name]  # type: ignore[index]
            hints.append(f"{text}   {_gb(other.memory.total)}, {_judged(other)}")
    if not hints or not any("fits" in hint for hint in hints):
        hints.append(f"a smaller model, or more memory than {run.device.name} has")
    return hints


def _judged(plan: "MethodPlan") -> str:
    return "fits" if plan.fits else "still too much"


# Output


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 1e10 else f"{size / 1e9:,.1f} GB"


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
        f"{recipe.model} on {run.device.name}, which has {_gb(run.device.memory)}: {run.precision}, "
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
        sizes = [item.memory.parts()[part] for item in plans.values()]
        if any(sizes):
            table.add_row(label, *(f"{size / 1e9:,.2f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("together", *(f"{item.memory.total / 1e9:,.2f}" for item in plans.values()))
    table.add_row("fits", *("yes" if item.fits else "no" for item in plans.values()))
    table.add_row(f"largest max_length, {run.rows} rows", *(_most(item.longest) for item in plans.values()))
    table.add_row(f"most rows of {run.length:,}", *(_most(item.most_rows) for item in plans.values()))
    return table


def _most(number: int) -> str:
    return f"{number:,}" if number else "none"
