"""`tunesmith merge`: adapters and their base model into one model."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.complete import TRUST, runs
from tunesmith.terminal.output import finish_lines, note
from tunesmith.text import counted, size

if TYPE_CHECKING:
    from tunesmith.ship.merge import MergeReport


def merge(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The folder of a run that trained adapters.", autocompletion=runs)
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The new folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; unset, the base model's.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, and most weights in memory at once.")] = "2GB",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative difference of logits; unset, by dtype."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Compare answers to this; repeatable.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare what was written with the adapters.")
    ] = True,
    adapter: Annotated[str | None, typer.Option(help="The subfolder of RUN that holds the adapters.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model, if it is not where the adapters say.")
    ] = None,
    trust_remote_code: TRUST = False,
) -> None:
    """Merge the adapters of a run into their base model.

    Example: tunesmith merge runs/first --output merged
    """
    from tunesmith.ship.merge import MergeOptions
    from tunesmith.ship.merge import merge as merge_run

    chosen: Any = dtype  # checked there
    options = MergeOptions(
        dtype=chosen,
        max_shard_size=max_shard_size,
        tolerance=tolerance,
        prompts=prompt or None,
        check=check,
        adapter=adapter,
        base=base,
        trust_remote_code=trust_remote_code,
    )
    report = merge_run(run, output, options, progress=note)
    dtype = str(report.dtype).removeprefix("torch.")
    about = {field.name: getattr(report, field.name) for field in fields(report)}
    finish_lines(about | {"dtype": dtype}, lines(report, output))


def lines(report: "MergeReport", output: Path) -> list[str]:
    """What is said at the end; `output` is the folder as the user named it."""
    from tunesmith.runs.record import adapters_of

    dtype = str(report.dtype).removeprefix("torch.")
    summary = [
        f"{output}: {report.layers} layers merged ({adapters_of(report.kind)}), {size(report.size)} of weights in "
        f"{dtype}, {counted(report.files, 'file')}"
    ]
    if report.untied:
        summary.append("The input embeddings and the head are no longer one weight: the adapters made them different.")
    if report.drift is None:
        summary.append("Not compared with the adapters on the base model.")
    else:
        summary.append(f"Compared with the adapters on the base model: {report.drift}")
    return summary
