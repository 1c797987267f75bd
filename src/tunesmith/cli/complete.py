"""What the shell completes: runs, and recipe files. Nothing heavy is imported, and nothing is read but folders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

RUNS = Path("runs")
MARKS = ("run.json", "adapter_config.json", "config.json", "recipe.yaml")
"""A folder with one of these is a run, or a model."""
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A word for the shell, of the form that `typer` reads."""

    value: str
    type: str = "plain"
    help: str | None = None


def runs(incomplete: str) -> list[str]:
    """`demo`, the runs in runs/, and those in the folder that has been typed so far."""
    typed = incomplete.rpartition("/")[0]
    found = ["demo"]
    for folder in dict.fromkeys((RUNS, Path(typed or "."))):
        found += [str(path) for path in _listed(folder) if any((path / mark).is_file() for mark in MARKS)]
    return [name for name in dict.fromkeys(found) if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Recipe files, and folders to look for them in, where one has been typed so far."""
    listed = _listed(Path(incomplete.rpartition("/")[0] or "."))
    files = [str(path) for path in listed if path.suffix in SUFFIXES and path.is_file()]
    return [name for name in files if name.startswith(incomplete)]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


class RecipeCommand(TyperCommand):
    """A command whose options are the settings of a recipe, which it sorts out itself."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Its own options, and recipes; behind a setting, whatever the shell completes."""
        found = list(super().shell_complete(ctx, incomplete))
        if incomplete.startswith("-") or (ctx.args and ctx.args[-1].startswith("--") and "=" not in ctx.args[-1]):
            return found
        return found + [Completion(value=name) for name in recipes(incomplete)]
