"""`tunesmith export`: a run as one file for llama.cpp and Ollama."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.complete import RUN
from tunesmith.errors import TunesmithError, nearest
from tunesmith.terminal.output import finish_lines, note
from tunesmith.text import size

FORMATS = ("gguf",)


def export(
    run: RUN,
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
    """Write a run as a GGUF file, for llama.cpp and Ollama.

    Adapters are merged in, and a Modelfile for Ollama is written beside it.
    Example: tunesmith export runs/first --output first.gguf --quant q8_0
    """
    if to not in FORMATS:
        raise TunesmithError(f"--to is {to!r}; write {', '.join(FORMATS)}{nearest(to, FORMATS)}")
    from tunesmith.ship.gguf import export_gguf

    done = export_gguf(run, output, quant=quant, check=check, progress=note)
    for text in done.notes:
        note(f"note: {text}")
    lines = [*done.checked, f"{done.gguf} ({size(done.size)})"]
    if done.modelfile is not None:
        lines.append(f"{done.modelfile}: ollama create NAME -f {done.modelfile}")
    finish_lines({field.name: getattr(done, field.name) for field in fields(done)}, lines)
