"""Arguments that commands share, and what the shell completes: runs, recipe files, and settings.

Nothing heavy is imported: settings come from a list that `python -m tunesmith.cli.complete` writes."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

RUNS = Path("runs")
MARKS = ("run.json", "adapter_config.json", "config.json", "recipe.yaml")
"""A folder with one of these is a run, or a model."""
SUFFIXES = (".yaml", ".yml")
SETTINGS = Path(__file__).with_name("settings.txt")
"""The settings of a recipe, which otherwise only heavy imports tell: on each line a name, a tab, and its help."""


TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]
"""The option of every command that loads a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A word for the shell, of the form that `typer` reads."""

    value: str
    type: str = "plain"
    help: str | None = None


def runs(incomplete: str) -> list[str]:
    """`demo`, the runs in runs/, and those in the folder that has been typed so far."""
    names = ["demo"]
    for folder in dict.fromkeys((RUNS, Path(incomplete.rpartition("/")[0] or "."))):
        names += [str(path) for path in _listed(folder) if any((path / mark).is_file() for mark in MARKS)]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


RUN = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's or model's folder, a name, or demo.", autocompletion=runs)
]
"""The argument of every command that asks or ships a model."""


def recipes(incomplete: str) -> list[str]:
    """Recipe files, and folders to look for them in, where one has been typed so far."""
    listed = _listed(Path(incomplete.rpartition("/")[0] or "."))
    files = [str(path) for path in listed if path.suffix in SUFFIXES and path.is_file()]
    return [name for name in files if name.startswith(incomplete)]


def settings(incomplete: str) -> list[Completion]:
    """The settings that begin with `incomplete`, as options."""
    try:
        lines = SETTINGS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    named = [line.partition("\t") for line in lines]
    options = [Completion(value=f"--{name.replace('_', '-')}", help=text or None) for name, _, text in named]
    return [option for option in options if option.value.startswith(incomplete.replace("_", "-"))]


def settings_text() -> str:
    """What `SETTINGS` is to hold. Imports all that settings come from."""
    from tunesmith.settings.recipe import ALIASES, every_setting

    known = every_setting()
    helps = {name: known[name if name in known else ALIASES[name]].help for name in (*known, *ALIASES)}
    sentences = {name: re.split(r"(?<=[.!?])\s", " ".join(text.split()))[0] for name, text in helps.items()}
    return "".join(f"{name}\t{textwrap.shorten(text, 80, placeholder=' ...')}\n" for name, text in sentences.items())


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


class RecipeCommand(TyperCommand):
    """A command whose options are the settings of a recipe, which it sorts out itself."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Its own options, settings, and recipes; behind a setting, whatever the shell completes."""
        words = list(super().shell_complete(ctx, incomplete))
        if incomplete.startswith("--"):
            own = {item.value for item in words}
            return words + [option for option in settings(incomplete) if option.value not in own]
        if incomplete.startswith("-") or (ctx.args and ctx.args[-1].startswith("--") and "=" not in ctx.args[-1]):
            return words
        return words + [Completion(value=name) for name in recipes(incomplete)]


if __name__ == "__main__":
    SETTINGS.write_text(settings_text(), encoding="utf-8", newline="\n")
