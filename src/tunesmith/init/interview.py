"""What `tunesmith init` asks where somebody is there to answer, and what it takes where nobody is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import say

if TYPE_CHECKING:
    from tunesmith.data.read import Rows
    from tunesmith.init.advice import Goal, Method

DEMO_NOTE = (
    "SmolLM2-135M-Instruct, small and here without a network, to try things out; for better answers write a name on "
    "the hub, such as Qwen/Qwen3-0.6B, or a folder"
)
T = TypeVar("T", bound=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What was said on the command line; None and empty for what was left out. `asks`: somebody is there to ask."""

    recipe: Path
    model: str | None
    data: tuple[str, ...]
    goal: str | None
    method: str | None
    output: str | None
    columns: str | None
    template: str | None
    asks: bool


# Columns


def chosen_columns(options: Options, rows: "Rows", templated: bool) -> dict[str, str]:
    """The `columns` setting: as was said, as the names of the columns suggest, or as somebody answers."""
    from tunesmith.data.formats import FormatOptions, detect
    from tunesmith.init.facts import proposed_columns

    place, first = next(iter(rows))
    if options.columns is not None:
        return _said_columns(options.columns)
    try:
        proposed = proposed_columns(first, templated=templated)
    except TunesmithError as error:
        raise TunesmithError(f"{place}: {error}") from error
    if proposed is None and not options.asks:
        try:
            detect(first, FormatOptions(arrow=False))
        except TunesmithError as error:
            raise TunesmithError(f"{place}: {error}\nHere: --columns instruction=question,output=answer") from error
    if proposed:
        said = ", ".join(f"{theirs!r} as {ours!r}" for ours, theirs in proposed.items())
        tell = typer.echo if options.asks else say  # who is asked whether that is right has to see it
        tell(f"the columns are {', '.join(map(str, first))}; taken are {said}")
        if options.asks and not confirm("Is that right?"):
            proposed = None
    return _asked_columns(first, templated) if proposed is None else proposed


def _said_columns(text: str) -> dict[str, str]:
    """`ours=yours,...`, or an object as in a recipe, as a `columns` setting."""
    from tunesmith.settings.coerce import coerce

    if text.lstrip().startswith("{"):
        try:
            return dict(coerce(text, dict[str, str]))
        except ValueError as error:
            raise TunesmithError(f"--columns {error}") from error
    pairs = [part.partition("=") for part in text.split(",")]
    columns = {ours.strip(): yours.strip() for ours, _, yours in pairs}
    if not all(columns) or not all(columns.values()) or len(columns) < len(pairs):
        raise TunesmithError(f"--columns {text}: write ours=yours,... such as instruction=question,output=answer")
    return columns


def _asked_columns(row: Mapping[str, Any], templated: bool) -> dict[str, str]:
    """Which column asks and which answers, of those that are texts."""
    from tunesmith.init.facts import pair_columns

    texts = [str(name) for name, value in row.items() if isinstance(value, str)]
    if not texts:
        raise TunesmithError(f"the first row has no text in its columns {', '.join(map(str, row)) or '(none)'}")
    if len(texts) == 1:
        return {"text": texts[0]}
    question = ask("Which column is the question", texts, texts[0])
    rest = [name for name in texts if name != question]
    return pair_columns(question, ask("Which is the answer", rest, rest[0]), templated=templated)


# Questions


def ask(question: str, choices: Sequence[T] | None = None, default: T | None = None) -> Any:
    from rich.prompt import Prompt
    from rich.text import Text

    more: dict[str, Any] = {} if default is None else {"default": default}
    while True:
        try:
            answer = Prompt.ask(Text(question), choices=list(choices) if choices else None, **more)
        except EOFError as error:
            raise TunesmithError("the input ended before all was answered; nothing was written") from error
        if answer and answer.strip():
            return answer.strip()


def confirm(question: str) -> bool:
    return bool(ask(question, ("y", "n"), "y") == "y")


def asked_model(options: Options) -> str:
    from tunesmith.home import DEMO

    if not options.asks:
        say(f"model: {DEMO} ({DEMO_NOTE})")
        return DEMO
    typer.echo(f"{DEMO} is {DEMO_NOTE}.")
    return str(ask("Which model: a name on the hub, a folder, or demo", default=DEMO))


def asked_goal(options: Options, guessed: "Goal", why: str) -> "Goal":
    from tunesmith.init.advice import GOALS

    if not options.asks:
        say(f"goal: {guessed} ({why})")
        return guessed
    for name, text in GOALS.items():
        typer.echo(f"  {name:<9} {text}{f'  <- {why}' if name == guessed else ''}")
    answer: Goal = ask("What are they for", tuple(GOALS), guessed)
    return answer


def asked_method(options: Options) -> "Method | None":
    """None: LoRA, or what takes less memory if it must."""
    from tunesmith.init.advice import METHODS

    if not options.asks:
        return None
    for name, text in METHODS.items():
        typer.echo(f"  {name:<9} {text}")
    answer = ask("What is trained (auto: adapters, in 8 or 4 bits where memory is short)", ("auto", *METHODS), "auto")
    return None if answer == "auto" else answer


def asked_output(options: Options, data: str) -> str:
    default = f"runs/{Path(data.split(':')[0]).stem or 'first'}"
    return str(ask("The folder of the run", default=default)) if options.asks else default
