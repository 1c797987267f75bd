"""A recipe's data: opened, not read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.data.mixture import DataSource
    from tunesmith.data.read import Rows
    from tunesmith.runs.record import Origin
    from tunesmith.settings.recipe import Recipe


def training_rows(recipe: "Recipe") -> "Rows | dict[str, DataSource]":
    """The rows to train on, or the named sources to mix. Raises TunesmithError for a file that isn't there."""
    from tunesmith.data.mixture import DataSource

    if not recipe.sources:
        return _opened(recipe.data, recipe.split, "train")
    sources = {}
    for name, given in recipe.sources.items():
        options = dict(given)
        path, split = options.pop("path"), options.pop("split", recipe.split)
        paths = [path] if isinstance(path, str) else path
        sources[name] = DataSource(rows=_opened(paths, split, "train"), **options)
    return sources


def eval_rows(recipe: "Recipe") -> "Rows | None":
    """The rows of `eval_data`, None without any."""
    return _opened(recipe.eval_data, recipe.eval_split, "test") if recipe.eval_data else None


def origins(recipe: "Recipe") -> "dict[str, Origin]":
    """Where the data come from, by split or by the name of the source."""
    from tunesmith.runs.record import Origin

    given: dict[str, Any] = {name: source["path"] for name, source in recipe.sources.items()}
    given |= {"train": recipe.data, "eval": recipe.eval_data}
    found: dict[str, Origin] = {}
    for name, paths in given.items():
        listed = [Origin.of_data(path) for path in ([paths] if isinstance(paths, str) else paths)]
        if len(listed) > 1:
            listed = [Origin(kind="file", name=", ".join(origin.name for origin in listed))]
        if listed:
            found[name] = listed[0]
    return found


def _opened(paths: Sequence[str], split: str | None, default_split: str) -> Any:
    from tunesmith.data.read import joined, read_rows

    return joined([read_rows(path, split, default_split=default_split) for path in paths])
