"""`tunesmith templates`: what a chat template makes of conversations of every kind."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import finish
from tunesmith.text import counted, listing

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from tunesmith.data.survey import Survey

WIDTH = 170
NAMED = 4


def templates(
    source: Annotated[
        str,
        typer.Argument(
            metavar="TEMPLATE", help="A .jinja file, a folder of them, a model's folder, or a name on the hub."
        ),
    ],
    show: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Print the texts of a kind, such as tools, what is supervised in [[ ]]."),
    ] = None,
) -> None:
    """Say what a chat template trains on.

    Each template is given conversations of several kinds. They train as one text (whole), turn by turn (each), or are
    refused.
    Example: tunesmith templates demo
    """
    from tunesmith.data.survey import KINDS, surveyed

    if show and show not in KINDS:
        raise TunesmithError(f"--show {show}: choose {' | '.join(KINDS)}")
    surveys, broken = list["Survey"](), dict[str, str]()
    for name, tokenizer in _tokenizers(source):
        try:
            surveys.append(surveyed(name, tokenizer()))
        except TunesmithError as error:
            broken[name] = str(error)
    if not surveys:
        raise TunesmithError("\n".join(f"{name}: {reason}" for name, reason in broken.items()))
    value = {"templates": {survey.name: survey.as_json() for survey in surveys}, "broken": broken}
    finish(value, lambda: _show(surveys, broken, show))


def _tokenizers(source: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The templates by name, each with what makes its tokenizer."""
    from tunesmith.data.survey import tokenizer_for

    path = Path(source)
    if any((path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")) or not path.exists():
        from tunesmith.model.load import load_tokenizer

        yield source, partial(load_tokenizer, source)
        return
    files = [path] if path.is_file() else sorted(path.rglob("*.jinja"))
    if not files:
        raise TunesmithError(f"{source}: there is no .jinja file and no tokenizer in it")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TunesmithError(f"{file}: a template is text in UTF-8, and this file is not ({error})") from error
        yield file.stem if len(files) > 1 else file.name, partial(tokenizer_for, text)


def _show(surveys: Sequence["Survey"], broken: dict[str, str], kind: str | None) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if kind:
        for survey in surveys:
            for text in _texts(survey, kind):
                console.print(text, soft_wrap=True)
        return
    wide = console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=WIDTH)
    wide.print(_table(surveys))
    for title, reasons in (("refused", _by_reason(surveys, "refusals")), ("note", _by_reason(surveys, "notes"))):
        for reason, talks in reasons.items():
            console.print(f"{title}: {reason}", soft_wrap=True)
            console.print(f"  {_where(talks, len(surveys))}", soft_wrap=True)
    for name, reason in broken.items():
        console.print(f"broken: {name}: {reason}", soft_wrap=True)
    if len(surveys) > 1:
        console.print(_sums(surveys), soft_wrap=True)


def _table(surveys: Sequence["Survey"]) -> "Table":
    """A row a template, a column a kind."""
    from rich import box
    from rich.table import Table

    from tunesmith.data.survey import KINDS

    table = Table(box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("template", no_wrap=True)
    for column in (*KINDS, "switch"):
        table.add_column(column, overflow="fold")
    for survey in surveys:
        switches = ", ".join(f"{key}={value}" for switch in survey.switches for key, value in switch.items())
        table.add_row(survey.name, *(survey.cell(kind) for kind in KINDS), switches)
    return table


def _by_reason(surveys: Sequence["Survey"], what: str) -> dict[str, dict[str, list[str]]]:
    """Of each reason, the templates and their talks."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for survey in surveys:
        for reason, talks in getattr(survey, what)().items():
            reasons.setdefault(reason, {})[survey.name] = talks
    return reasons


def _where(talks: dict[str, list[str]], templates: int) -> str:
    """The talks of one template, or the first of several templates."""
    if templates == 1:
        return ", ".join(*talks.values())
    return f"{counted(len(talks), 'template')}: {listing([*talks], NAMED)}"


def _sums(surveys: Sequence["Survey"]) -> str:
    from tunesmith.data.survey import KINDS

    shares = []
    for kind in KINDS:
        counts = [survey.counts(kind) for survey in surveys]
        total, refused = sum(count.total() for count in counts), sum(count["refused"] for count in counts)
        shares.append(f"{kind} {(total - refused) / total:.1%}")
    return f"{counted(len(surveys), 'template')}; trained: {', '.join(shares)}"


def _texts(survey: "Survey", kind: str) -> Iterator["Text"]:
    """The documents of a kind's talks, with what is supervised in brackets."""
    from rich.text import Text

    for trial in survey.trials:
        if trial.talk.kind != kind:
            continue
        yield Text(f"{survey.name}: {trial.talk.name}: {trial.outcome}", style="bold")
        if trial.rendering is None:
            yield Text(trial.refusal)
            continue
        for note in trial.rendering.notes:
            yield Text(f"note: {note}", style="dim")
        for arguments in dict.fromkeys(map(str, filter(None, map(dict, trial.rendering.arguments)))):
            yield Text(f"rendered with {arguments}", style="dim")
        for document in trial.rendering.documents:
            text, position = Text(), 0
            for span in document.spans:
                text.append(document.text[position : span.start])
                text.append(f"[[{document.text[span.start : span.stop]}]]", style="green")
                position = span.stop
            text.append(document.text[position:])
            yield text
            yield Text("---", style="dim")
