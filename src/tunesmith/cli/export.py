"""`tunesmith export`: a run as one file for llama.cpp and Ollama."""

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.errors import TunesmithError, nearest

FORMATS = ("gguf",)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, a model's folder or name, or demo.")],
    output: Annotated[
        Path, typer.Option(metavar="FILE_OR_DIR", help="A file that ends in .gguf, or a folder for model.gguf.")
    ],
    to: Annotated[str, typer.Option(help="The format: gguf.")] = "gguf",
    quant: Annotated[
        str, typer.Option(help="What matrices are stored as: f32 (exact), f16, or q8_0 (half of f16).")
    ] = "f16",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Read the file back, and compare it with the model.")
    ] = True,
) -> None:
    """Write a run, adapters merged in, as a GGUF file with a Modelfile for Ollama."""
    if to not in FORMATS:
        raise TunesmithError(f"--to is {to!r}; write {', '.join(FORMATS)}{nearest(to, FORMATS)}")
    from tunesmith.ship.gguf import export_gguf

    done = export_gguf(run, output, quant=quant, check=check, progress=_say)
    for sentence in done.checked:
        typer.echo(sentence)
    for note in done.notes:
        _say(f"note: {note}")
    typer.echo(f"{done.gguf} ({done.size / 1e6:,.1f} MB)")
    if done.modelfile is not None:
        typer.echo(f"{done.modelfile}: ollama create NAME -f {done.modelfile}")


def _say(text: str) -> None:
    """What is not the result goes to stderr."""
    typer.echo(text, err=True)
