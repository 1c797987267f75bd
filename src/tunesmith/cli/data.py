"""What commands that take a recipe share: settings for looking at its data alone, and its data, opened, not read."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from tunesmith.terminal.output import note

if TYPE_CHECKING:
    from tunesmith.data.dataset import DataPreparer
    from tunesmith.data.formats import Task
    from tunesmith.data.mixture import DataSource
    from tunesmith.data.read import Rows
    from tunesmith.runs.record import Origin
    from tunesmith.settings.recipe import Recipe, Trainer

SAME_DATA: dict[str, Any] = {
    "output_dir": "unused",
    "use_cpu": True,
    "precision": "fp32",
    "bf16": False,
    "fp16": False,
    "tf32": None,
}
"""Settings that a run has and its data doesn't depend on. So set, a recipe needs no output, the device is not measured,
and a recipe for a GPU can be inspected where there is none."""


TASKS: "dict[Trainer, Task]" = {
    "sft": "supervised",
    "dpo": "pairs",
    "kto": "judged",
    "reward": "ranked",
    "distill": "supervised",
}
"""What the rows of a trainer are read as."""


def data_recipe(arguments: list[str]) -> "Recipe":
    """The recipe of a command that looks at its data alone."""
    from tunesmith.settings.recipe import parse_options, resolve

    path, overrides = parse_options(arguments)
    for alias in ("output", "output_dir"):
        overrides.pop(alias, None)
    return resolve(path, overrides | SAME_DATA)


def preparer_of(recipe: "Recipe") -> "DataPreparer":
    """Prepares data as training does; only the tokenizer is loaded. Of rows that only ask, `Questions`."""
    from tunesmith.data.dataset import DataPreparer
    from tunesmith.data.questions import Questions
    from tunesmith.model.load import prepare_tokenizer, resolve_model

    resolve_model(recipe.model, note)
    tokenizer, _ = prepare_tokenizer(None, recipe.model, recipe.config)
    if recipe.trainer not in TASKS:
        from tunesmith.train.tools import tools_of

        return cast(Any, Questions(recipe.config, tokenizer, tools_of(recipe.config).schemas))
    return DataPreparer(recipe.config, tokenizer, None, task=TASKS[recipe.trainer])


def training_rows(recipe: "Recipe") -> "Rows | dict[str, DataSource]":
    """The rows to train on, or the named sources to mix. Raises TunesmithError for a file that isn't there."""
    from tunesmith.data.mixture import DataSource

    if not recipe.sources:
        return _opened(recipe.data, recipe.split, "train")
    sources = {}
    for name, source in recipe.sources.items():
        options = dict(source)
        path, split = options.pop("path"), options.pop("split", recipe.split)
        paths = [path] if isinstance(path, str) else path
        sources[name] = DataSource(rows=_opened(paths, split, "train"), **options)
    return sources


def eval_rows(recipe: "Recipe") -> "Rows | None":
    """The rows of `eval_data`, None without any."""
    return _opened(recipe.eval_data, recipe.eval_split, "test") if recipe.eval_data else None


def held_out_rows(recipe: "Recipe") -> "list[tuple[str, Mapping[str, Any]]]":
    """The rows that training keeps for evaluation, with their places, under our column names: those of `eval_data`, or
    what sources hold out."""
    from tunesmith.data.formats import FormatOptions, renamed
    from tunesmith.data.mixture import split_rows
    from tunesmith.data.read import with_places

    config, sources = recipe.config, training_rows(recipe) if recipe.sources else {}
    parts: list[tuple[Any, Any, Any]] = []
    if (evaluated := eval_rows(recipe)) is not None:
        parts.append((with_places(evaluated), config.columns, config.text_column))
    for name, source in cast("dict[str, DataSource]", sources).items():
        if source.held_out:
            _, held_out = split_rows(name, with_places(source.rows), source.held_out, config.seed)
            columns = config.columns if source.columns is None else source.columns
            parts.append((held_out, columns, source.text_field or config.text_column))
    found: list[tuple[str, Mapping[str, Any]]] = []
    for rows, columns, text in parts:
        options = FormatOptions(columns=columns or {}, text_field=text)
        found += [(place, renamed(row, options)) for place, row in rows if isinstance(row, Mapping)]
    return found


def origins(recipe: "Recipe") -> "dict[str, Origin]":
    """Where the data come from, by split or by the name of the source."""
    from tunesmith.runs.record import Origin

    places: dict[str, Any] = {name: source["path"] for name, source in recipe.sources.items()}
    alone = next(iter(places.values())) if len(places) == 1 else ()  # whose splits are not named after it
    places |= {"train": recipe.data or alone, "eval": recipe.eval_data or alone}
    result: dict[str, Origin] = {}
    for name, paths in places.items():
        listed = [Origin.of_data(path) for path in ([paths] if isinstance(paths, str) else paths)]
        if len(listed) > 1:
            listed = [Origin(kind="file", name=", ".join(origin.name for origin in listed))]
        if listed:
            result[name] = listed[0]
    return result


def _opened(paths: Sequence[str], split: str | None, default_split: str) -> Any:
    from tunesmith.data.read import joined, read_rows

    return joined([read_rows(path, split, default_split=default_split) for path in paths])
