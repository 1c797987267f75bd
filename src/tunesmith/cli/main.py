"""The command `tunesmith`. What is heavy is imported by the commands when they run.

Exit codes: 0 done, 1 failed, 2 the user's mistake, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import gc
import sys
import traceback
from types import ModuleType
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from tunesmith import __version__
from tunesmith.cli import (
    board,
    chat,
    check,
    demo,
    distill,
    doctor,
    dpo,
    export,
    grpo,
    init,
    inspect,
    kto,
    merge,
    plan,
    push,
    report,
    reward,
    rloo,
    serve,
    templates,
    train,
)
from tunesmith.cli.complete import RecipeCommand
from tunesmith.cli.eval import evaluate
from tunesmith.errors import TunesmithError
from tunesmith.terminal.noise import hide_noise, silent_libraries
from tunesmith.terminal.output import Application, fail

MISTAKE = 2
INTERRUPTED = 130
DATA_ONLY = {"check", "inspect"}
"""Commands that load no weights."""
MODELS = {
    *("train", "dpo", "kto", "reward", "distill", "grpo", "rloo", "plan"),
    *("eval", "chat", "serve", "demo", "merge", "export"),
}
"""Commands that load some, or settings of training."""
PROCESS = "process"
"""The `obj` of a command line that has a process to itself."""
HELP = {"--help", "-h"}


class Commands(TyperGroup):
    """Turns a TunesmithError of any command into a message and exit code 2, and Ctrl-C into 130."""

    def get_params(self, ctx: Any) -> Any:
        """Without the help of an option that `--install-completion` makes needless."""
        params = super().get_params(ctx)
        for param in params:
            if param.name == "show_completion":
                param.hidden = True  # type: ignore[attr-defined]
        return params

    def invoke(self, ctx: Any) -> Any:
        as_json = "--json" in ctx.args  # also where the rest of the line is wrong
        try:
            return super().invoke(ctx)
        except TunesmithError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            fail(error, MISTAKE, as_json=as_json)
            raise typer.Exit(MISTAKE) from error
        except KeyboardInterrupt as interrupt:
            if as_json:
                fail(interrupt, INTERRUPTED, as_json=True)
            else:
                typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from interrupt
        except Exception as error:
            if not as_json or not hasattr(error, "format_message"):  # which mistakes in a command line have
                raise
            fail(error, MISTAKE, as_json=True)
            raise typer.Exit(MISTAKE) from error
        except BaseException as panic:
            if type(panic).__name__ != "PanicException":  # of libraries in Rust, and no Exception
                raise
            problem = TunesmithError(
                f"a library failed: {panic}. Most often that is a rule of the model's tokenizer.json that can't be "
                "applied to a text; take another tokenizer"
            )
            fail(problem, MISTAKE, as_json=as_json)
            raise typer.Exit(MISTAKE) from panic


app = Application(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they print the values of all variables, tokens and texts among them
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of a mistake, too.")] = False,
) -> None:
    """Fine-tuning of language models, on texts, on preferences, or by a teacher.

    Begin: tunesmith demo, or tunesmith init recipe.yaml --data rows.jsonl
    Every command has --quiet and --json, and shows an example with --help.
    """
    hide_noise()
    command = ctx.invoked_subcommand
    if ctx.obj == PROCESS and command in DATA_ONLY | MODELS and HELP.isdisjoint(sys.argv):
        quiet = not {"--quiet", "-q"}.isdisjoint(sys.argv)
        with silent_libraries(bars=quiet or "--json" in sys.argv, warnings_too=quiet):
            load_transformers(alone=command in DATA_ONLY)


def summary(command: Any) -> str:
    """The line about it in the list of commands: the first of its docstring."""
    return str(command.__doc__).partition("\n")[0]


# These sort out their options themselves: every key of a recipe is one.
for command, text, usage in (
    (train.train, train.HELP, train.USAGE),
    (dpo.dpo, dpo.HELP, train.USAGE),
    (kto.kto, kto.HELP, train.USAGE),
    (reward.reward, reward.HELP, train.USAGE),
    (distill.distill, distill.HELP, train.USAGE),
    (grpo.grpo, grpo.HELP, train.USAGE),
    (rloo.rloo, rloo.HELP, train.USAGE),
    (check.check, check.HELP, check.USAGE),
    (inspect.inspect, inspect.HELP, inspect.USAGE),
    (plan.plan, plan.HELP, plan.USAGE),
):
    app.command(
        cls=RecipeCommand,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        help=text,
        short_help=summary(command),
        options_metavar=usage,
    )(command)
app.command("eval", short_help=summary(evaluate))(evaluate)
for other in (
    *(init.init, board.board, chat.chat, serve.serve, demo.demo, report.report),
    *(merge.merge, export.export, push.push, templates.templates, doctor.doctor),
):
    app.command(short_help=summary(other))(other)


def main() -> None:
    """The entry point of the installed command."""
    app(obj=PROCESS)


def load_transformers(*, alone: bool) -> None:
    """Import the settings of `transformers` and what comes with them, for a process that is a command which needs them.

    With `alone`, without what comes only where it is installed: `peft`, which brings bitsandbytes and the compiler of
    torch, and a tracker. `transformers` will not look for them again.

    All of it stays, so no garbage is looked for in it, neither now nor as the process ends: a quarter of the time of a
    short command."""
    hidden = [name for name in ("peft", "bitsandbytes", "wandb") if alone and name not in sys.modules]
    # Importing one fails then, as if it were not installed.
    sys.modules.update(cast("dict[str, ModuleType]", dict.fromkeys(hidden)))
    gc.disable()
    try:
        import transformers.integrations.integration_utils  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
        for name in hidden:
            del sys.modules[name]
