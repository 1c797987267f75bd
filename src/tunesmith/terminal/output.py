"""What commands print: `--quiet` and `--json` of every command, in one place.

| | stdout | stderr |
| --- | --- | --- |
| neither | what happens, and the result | what is not for a pipe |
| `--quiet` | the result | errors |
| `--json` | the result, one JSON object | everything else; an error is one JSON object, `{"error": {...}}` |

Exit codes are the same each way.
"""

import inspect
import json
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.terminal.noise import silent_libraries
from tunesmith.text import printable

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """What the user asked to see."""

    quiet: bool = False
    as_json: bool = False


_mode: ContextVar[Mode] = ContextVar("mode", default=Mode())  # noqa: B039 (it is frozen)

QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result and errors.")]
AS_JSON = Annotated[bool, typer.Option("--json", help="The result as JSON, on stdout.")]


def mode() -> Mode:
    """The mode of the command that runs."""
    return _mode.get()


def say(text: object) -> None:
    """What happens on the way, on stdout; on stderr where stdout is for JSON."""
    if not mode().quiet:
        typer.echo(printable(str(text)), err=mode().as_json)


def note(text: object) -> None:
    """What is not for a pipe, on stderr."""
    if not mode().quiet:
        typer.echo(printable(str(text)), err=True)


def finish(value: Mapping[str, Any], show: Callable[[], None]) -> None:
    """The result: `value` as JSON, or `show` called, which prints it for people."""
    if mode().as_json:
        typer.echo(json.dumps(value, ensure_ascii=False, default=_plain))
    else:
        show()


def finish_lines(value: Mapping[str, Any], lines: list[str]) -> None:
    """The result: `value` as JSON, or `lines`."""
    finish(value, lambda: typer.echo(printable("\n".join(lines))))


def progress_console(*, stderr: bool = False) -> "Console":
    """Where to draw what happens on the way; one of several processes that train draws. What can't be drawn anew in
    place, in a CI's log say, is printed once."""
    from rich.console import Console

    from tunesmith.terminal.live import can_draw

    quiet = mode().quiet or os.environ.get("RANK", "0") != "0"
    console = Console(stderr=stderr or mode().as_json, quiet=quiet)
    return console if can_draw(console) else Console(stderr=console.stderr, quiet=quiet, force_terminal=False)


def _plain(value: Any) -> Any:
    """What JSON has no form for."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def fail(error: BaseException, code: int, *, as_json: bool) -> None:
    """A mistake, on stderr."""
    if as_json:
        message = str(getattr(error, "message", error)) or "interrupted"
        about = {"type": type(error).__name__, "message": message, "exit_code": code}
        typer.echo(json.dumps({"error": about}, ensure_ascii=False), err=True)
    else:
        typer.secho(printable(f"error: {error}"), fg=typer.colors.RED, err=True)


class Application(typer.Typer):
    """Every command of it has `--quiet` and `--json`, unless it has an option of that name itself."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        register = super().command(name, **settings)

        def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
            register(with_modes(function))
            return function

        return with_options


def with_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the two options, run in their mode. It receives only those that it declares itself."""
    signature = inspect.signature(function, eval_str=True)
    own = set(signature.parameters)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", QUIET), ("as_json", AS_JSON))
        if name not in own
    ]

    @wraps(function)
    def command(*args: Any, quiet: bool = False, as_json: bool = False, **kwargs: Any) -> Any:
        kwargs |= {name: value for name, value in (("quiet", quiet), ("as_json", as_json)) if name in own}
        token = _mode.set(Mode(quiet=quiet, as_json=as_json))
        try:
            with silent_libraries(bars=quiet or as_json, warnings_too=quiet):
                return function(*args, **kwargs)
        finally:
            _mode.reset(token)

    parameters = [*signature.parameters.values(), *more]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command
