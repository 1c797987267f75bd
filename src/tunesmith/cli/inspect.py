"""`tunesmith inspect`: the tokens of the batch, and which of them are trained on."""

import random as random_numbers
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.data import data_recipe, preparer_of, training_rows
from tunesmith.errors import TunesmithError
from tunesmith.runs.files import check_writable
from tunesmith.terminal.output import finish
from tunesmith.text import printable
from tunesmith.types import IGNORE_INDEX

if TYPE_CHECKING:
    from tunesmith.data.batches import Group
    from tunesmith.report.inspect import InspectedRow, Vocabulary
    from tunesmith.settings.recipe import Recipe

FIRST = 3
"""How many rows are shown when none are asked for."""
USAGE = "[RECIPE.yaml] [--row N | --random K] [--html FILE] [--ids] [--SETTING VALUE]..."
HELP = """Show the tokens of the batch, and which of them are trained on.

Prepares the training data exactly as [cyan]tunesmith train[/cyan] does, with the same recipe and the same options;
only the tokenizer is loaded, no weights. Shows the first three rows, unless told which:

[bold]tunesmith inspect recipe.yaml --row 7 --ids[/bold]

[bold]tunesmith inspect --model demo --data rows.jsonl --train-on assistant --random 5 --html rows.html[/bold]
"""


def inspect(
    ctx: typer.Context,
    row: Annotated[
        int | None, typer.Option(metavar="N", help="Show the N-th prepared example (or pack), counted from 1.")
    ] = None,
    random: Annotated[int | None, typer.Option(metavar="K", help="Show K random ones, drawn with --seed.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write them to an HTML page instead of the terminal.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids, too.")] = False,
) -> None:
    """Show the tokens of the batch, and which are trained on."""
    if row is not None and random is not None:
        raise TunesmithError("--row and --random both say what to show; keep one")
    if random is not None and random < 1:
        raise TunesmithError(f"--random is {random}; show at least 1")
    _check_page(html)
    facts, rows = prepared(data_recipe(ctx.args), row, random)
    if html is not None:
        from tunesmith.report.inspect import page

        try:
            html.write_text(page("tunesmith inspect", facts, rows, ids=ids), encoding="utf-8")
        except OSError as error:
            raise TunesmithError(f"--html {html} can't be written: {error.strerror}") from error
    finish(_as_json(facts, rows, html), lambda: _show(facts, rows, html, ids=ids))


def _as_json(facts: list[tuple[str, str]], rows: list["InspectedRow"], html: Path | None) -> dict[str, Any]:
    """The facts in their order, and each row's pieces: text, ids, and the weight of the loss (0: not supervised)."""
    return {
        "facts": [{"name": name, "found": value} for name, value in facts],
        "rows": [{"title": row.title, "documents": [asdict(document) for document in row.documents]} for row in rows],
        "html": None if html is None else str(html),
    }


def _check_page(html: Path | None) -> None:
    """Before the data is prepared. The suffix keeps a slip of the hand from overwriting a recipe."""
    if html is None:
        return
    if html.suffix.lower() not in (".html", ".htm"):
        raise TunesmithError(f"--html {html}: name the page *.html")
    if not html.parent.is_dir():
        raise TunesmithError(f"--html {html}: there is no folder {html.parent}")
    check_writable(html.parent, f"--html {html}")


def prepared(
    recipe: "Recipe", row: int | None, random: int | None
) -> tuple[list[tuple[str, str]], list["InspectedRow"]]:
    """The facts about the recipe's training data, and the rows that were asked for, as the collator gives them."""
    rows = PreparedRows(recipe)
    return rows.facts, [rows.row(number) for number in _chosen(len(rows), rows.kind, row, random, recipe.config.seed)]


class PreparedRows:
    """The training rows of a recipe, as the collator gives them; `facts` are labels and values about all of them."""

    def __init__(self, recipe: "Recipe") -> None:
        from tunesmith.report.inspect import Vocabulary

        if recipe.trainer in ("grpo", "rloo"):
            raise TunesmithError(
                f"this run is {recipe.trainer}: its rows have no answers yet, which are drawn when it trains; look at "
                "answers.jsonl in the run's folder, and check the prompts with `tunesmith check`"
            )
        source, preparer = training_rows(recipe), preparer_of(recipe)
        packing = recipe.config.packing
        self._dataset: Any
        if isinstance(source, dict):
            self._dataset, _ = preparer.mixture(source, packing=packing, eval_packing=preparer.packs_eval)
        else:
            self._dataset = preparer(source, "train", packing=packing)
        self._recipe, self._vocabulary = recipe, Vocabulary.of(preparer.tokenizer)
        self.kind = "pack" if packing else "example"
        self.facts = self._facts(preparer.counts)

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, number: int) -> "InspectedRow":
        """The `number`-th row, counted from 1."""
        from tunesmith.data.batches import FlatCollator, pairs_of
        from tunesmith.report.inspect import SCORED, inspect_row

        title = f"{self.kind} {number:,} of {len(self):,}"
        if self._recipe.trainer in ("dpo", "reward"):
            about = SCORED if self._recipe.trainer == "reward" else ""
            return _tree(title, pairs_of(self._dataset[number - 1]), self._vocabulary, about)
        batch = FlatCollator()([self._dataset[number - 1]])
        if self._recipe.trainer == "kto" and self.kind != "pack":
            title += ", a good answer" if batch.documents[0].score > 0 else ", a bad answer"
        documents = [example.input_ids for example in batch.documents]
        weights = batch["weights"][0].tolist() if "weights" in batch else None
        ids, labels = [*chain.from_iterable(documents)], batch.labels[0].tolist()
        shown = inspect_row(title, ids, labels, weights, [*map(len, documents)], self._vocabulary)
        return replace(shown, computed=batch.computed_tokens)

    def text(self, number: int) -> str:
        """The text of the `number`-th row, special tokens and all."""
        return "".join(piece.text for document in self.row(number).documents for piece in document.pieces)

    def _facts(self, counts: Any) -> list[tuple[str, str]]:
        from tunesmith.report.inspect import count_facts

        facts, config = _settings(self._recipe), self._recipe.config
        for split, found in counts.items():
            facts += [("split", split)] if len(counts) > 1 else []
            facts += count_facts(found)
        if config.packing:
            size: Any = config.max_length
            full = sum(len(row) for row in self._dataset["input_ids"]) / (len(self) * size)
            facts.append(("packs", f"{len(self):,} of up to {size:,} tokens, {full:.0%} full"))
        return facts


def _tree(title: str, pairs: Sequence["Group"], vocabulary: "Vocabulary", about: str) -> "InspectedRow":
    """Pairs as what both sides begin with alike up to where one is scored, once, and the two answers behind it, with
    what is to be said `about` each."""
    from tunesmith.report.inspect import inspect_row

    parts: list[tuple[str, Sequence[int], Sequence[int], float]] = []
    for chosen, rejected in pairs:
        places = zip(chosen.input_ids, rejected.input_ids, chosen.labels, rejected.labels, strict=False)
        shared = 0
        for one, two, *labels in places:
            if one != two or {*labels} != {IGNORE_INDEX}:
                break
            shared += 1
        if shared:
            parts.append(("prompt", chosen.input_ids[:shared], chosen.labels[:shared], 1.0))
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            weight = 1.0 if answer.weights is None else answer.weights[-1]
            parts.append((f"{name}{about}", answer.input_ids[shared:], answer.labels[shared:], weight))
    return inspect_row(
        title,
        [*chain.from_iterable(ids for _, ids, _, _ in parts)],
        [*chain.from_iterable(labels for _, _, labels, _ in parts)],
        [weight for _, ids, _, weight in parts for _ in ids],
        [len(ids) for _, ids, _, _ in parts],
        vocabulary,
        [name for name, _, _, _ in parts],
    )


def _chosen(count: int, kind: str, row: int | None, random: int | None, seed: int) -> Sequence[int]:
    """Numbers, from 1, of the rows to show."""
    if row is not None:
        if not 1 <= row <= count:
            raise TunesmithError(f"--row {row}: there are {kind}s 1 to {count:,}")
        return [row]
    if random is not None:
        return sorted(random_numbers.Random(seed).sample(range(1, count + 1), min(random, count)))
    return range(1, min(FIRST, count) + 1)


def _settings(recipe: "Recipe") -> list[tuple[str, str]]:
    config = recipe.config
    ways = {
        "dpo": "both answers, chosen against rejected",
        "kto": "the answer, good or bad",
        "reward": "a score of each side at its end, chosen against rejected",
    }
    trained: str = config.resolved_train_on or "the completion of prompt-completion rows, else all (train_on is unset)"
    trained = ways.get(recipe.trainer, trained)
    packing = config.packing_strategy if config.packing else "no"
    return [
        ("model", f"{recipe.model} (its tokenizer; no weights are loaded)"),
        ("data", f"{', '.join(recipe.data or recipe.sources)}, prepared exactly as tunesmith train does"),
        ("trained on", trained),
        ("max_length", f"{config.max_length} (overlong: {config.overlong}), packing: {packing}"),
    ]


def _show(facts: list[tuple[str, str]], rows: list["InspectedRow"], html: Path | None, *, ids: bool) -> None:
    from rich.console import Console

    from tunesmith.report.inspect import legend, terminal

    console = Console(highlight=False, markup=False, emoji=False)
    plain = console.no_color or console.color_system is None
    for name, value in facts:
        console.print(printable(f"{name:<12}{value}"), soft_wrap=True)
    if html is None:
        for text in (legend(plain=plain), *(terminal(row, plain=plain, ids=ids) for row in rows)):
            console.print()
            # The terminal wraps: rich would drop spaces at the ends of lines, and characters where it errs in widths.
            console.print(text, end="", soft_wrap=True)
        return
    console.print(printable(f"wrote {', '.join(row.title for row in rows)} to {html}"), soft_wrap=True)
