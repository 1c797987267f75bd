"""`tunesmith merge`: adapters and their base model into one model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tunesmith.ship.merge import MergeReport


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run that trained adapters.")],
    output: Annotated[Path, typer.Option(help="The folder to write, which must not exist yet.")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. Without it: what the base model's files have.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of the files, and about the memory needed.")] = "2GB",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest difference of logits, relative to the largest logit. Without it: by dtype."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Compare the answers to this; give it several times for more.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load what was written, and compare it with the adapters.")
    ] = True,
    adapter: Annotated[
        str | None, typer.Option(help="The subfolder of RUN that holds the adapters, if they have a name.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that comes with the model.")] = False,
) -> None:
    """Merge the adapters of a run into their base model."""
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
        trust_remote_code=trust_remote_code,
    )
    report = merge_run(run, output, options, progress=_say)
    for line in lines(report):
        typer.echo(line)


def lines(report: "MergeReport") -> list[str]:
    """What is said at the end."""
    count = f"{report.files} file{'' if report.files == 1 else 's'}"
    dtype = str(report.dtype).removeprefix("torch.")
    found = [
        f"{report.folder}: {report.layers} layers merged ({report.kind} adapters), {report.size / 1e6:,.0f} MB of "
        f"weights in {dtype}, {count}"
    ]
    if report.untied:
        found.append("The input embeddings and the head are no longer one weight: the adapters made them different.")
    if report.drift is None:
        found.append("Not compared with the adapters on the base model.")
    else:
        found.append(f"Compared with the adapters on the base model: {report.drift}")
    return found


def _say(text: str) -> None:
    typer.echo(text, err=True)
