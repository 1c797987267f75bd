"""From rows to all that a recipe is decided by: looked at, asked for, or taken where nobody is there to ask."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import note, say
from tunesmith.text import counted, size

if TYPE_CHECKING:
    from tunesmith.data.formats import Task
    from tunesmith.data.read import Rows
    from tunesmith.init.advice import Facts, Fit, Goal, Method, ModelFacts, Room
    from tunesmith.init.facts import Lengths, RowFacts
    from tunesmith.plan.memory import Run
    from tunesmith.types import Row

ROOM = 0.9
"""The share of the memory that is planned with: the rest is for what else runs."""
HEAD = 20
"""Rows whose columns are looked at."""
JOINED = (
    "'prompt' and 'completion' are texts, which are joined as they are, without the chat template; to train on turns "
    "write --columns instruction=prompt,output=completion"
)
TABLES = (
    "the rows have tabs as the lines of a table do; if it is one with a header, name the file .tsv: then its columns "
    "are read"
)

DEMO_NOTE = (
    "SmolLM2-135M-Instruct, small and here without a network, to try things out; for better answers write a name on "
    "the hub, such as Qwen/Qwen3-0.6B, or a folder"
)
T = TypeVar("T", bound=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line; None and empty for what was left out. `asks`: somebody is there to ask."""

    recipe: Path
    model: str | None
    data: tuple[str, ...]
    goal: str | None
    method: str | None
    output: str | None
    columns: str | None
    template: str | None
    asks: bool


def facts_of(options: Options) -> tuple["Facts", list[str]]:
    """All that the recipe is decided by, and what is worth a note."""
    from tunesmith.init.advice import PREFERENCES, Facts, Wanted, check_goal, guess_goal, notes_on, train_on
    from tunesmith.init.facts import look, measure

    names, rows = _data(options)
    name, template = options.model or _asked_model(options), options.template
    tokenizer, run = _model(name, template)
    columns = _chosen_columns(options, rows, tokenizer.chat_template is not None)
    survey = look(rows, columns, tokenizer.chat_template, _task(options, rows, columns))
    about = survey.facts
    if about.kind == "conversation" and tokenizer.chat_template is None:
        template = "chatml"
        tokenizer, run = _model(name, template)
    roles = f" of {', '.join(about.roles)}" if about.roles else ""
    separate = "; the prompt is separate" if about.separate else ""
    say(f"{counted(about.rows, 'row')}, format {about.format}{roles}{separate}")
    goal: Goal = options.goal or _asked_goal(options, *guess_goal(about))  # type: ignore[assignment]
    check_goal(goal, about)
    output = options.output or f"runs/{Path(names[0].split(':')[0]).stem or 'first'}"
    if options.asks and not options.output:
        output = str(ask("The folder of the run", default=output))
    wanted = Wanted(
        data=names,
        output=output,
        goal=goal,
        method=options.method or _asked_method(options),  # type: ignore[arg-type]
        columns=columns,
    )
    try:
        supervised = "completion" if about.kind in PREFERENCES else train_on(goal, about)[0]
        lengths = measure(survey, tokenizer, supervised, {})
    except TunesmithError as error:
        if "does not show tool calls" not in str(error):
            raise
        raise TunesmithError(
            f"{error}: --chat-template-path FILE.jinja here, or take a model that calls tools, such as "
            "--model Qwen/Qwen3-0.6B"
        ) from error
    model = _model_facts(name, run, template)
    facts = Facts(
        wanted=wanted,
        rows=about,
        lengths=lengths,
        model=model,
        device=f"{run.device.name} with {size(run.device.memory)}",
        fit=_fit(run, wanted.goal, wanted.method, model, about, lengths),
    )
    joined = about.kind == "pair" and tokenizer.chat_template is not None
    tables = _tables_in(survey.sample)
    return facts, [*([JOINED] if joined else []), *([TABLES] if tables else []), *notes_on(facts)]


def _tables_in(sample: Sequence[tuple[str, "Row"]]) -> bool:
    """Whether rows are texts with as many tabs as the first, as the lines of a table in a .txt file are. Those without
    one may be the rest of a cell with line breaks."""
    from tunesmith.types import Text

    tabs = [row.text.count("\t") for _, row in sample if isinstance(row, Text) and row.prompt is None]
    return len(tabs) > 1 and tabs[0] > 0 and {*tabs} <= {0, tabs[0]} and tabs.count(tabs[0]) >= len(tabs) / 3


# The data and the model


def _data(options: Options) -> tuple[tuple[str, ...], "Rows"]:
    """The names of the data and their rows, opened. At a terminal, a name that is none is asked for again."""
    from tunesmith.data.read import joined, read_rows

    if options.data:
        return options.data, joined([read_rows(name) for name in options.data])
    if not options.asks:
        raise TunesmithError("no data; write --data rows.jsonl: a file, a folder, or a name on the hub")
    while True:
        name = ask("Your rows: a file (.jsonl, .json, .csv, .parquet, ...), a folder, or a name on the hub")
        try:
            return (name,), read_rows(name)
        except TunesmithError as error:
            typer.secho(f"error: {error}", fg=typer.colors.RED)


def _model(name: str, template: str | None) -> tuple[Any, "Run"]:
    """The tokenizer as a run would have it, and what is planned for, by LoRA of the usual rank."""
    from tunesmith.model.load import prepare_tokenizer, resolve_model
    from tunesmith.plan.memory import NO_NEED, run_of
    from tunesmith.settings.recipe import resolve

    resolve_model(name, note)
    more = {} if template is None else {"chat_template_path": template}
    recipe = resolve(None, {"model": name, "data": "unused", "lora": True, **more, **NO_NEED})
    try:
        run = run_of(recipe, None)
        tokenizer, _ = prepare_tokenizer(None, name, recipe.config)
    except TunesmithError as error:
        if Path(name).expanduser().is_dir():
            raise
        raise TunesmithError(f"{error}\n`--model demo` is here without a network") from error
    return tokenizer, run


def _model_facts(name: str, run: "Run", template: str | None) -> "ModelFacts":
    from tunesmith.home import DEMO
    from tunesmith.init.advice import ModelFacts
    from tunesmith.plan.memory import count

    parameters = count(run, "full").static["weights"] // 4
    context = getattr(run.config.get_text_config(), "max_position_embeddings", None)
    about = DEMO_NOTE if name == DEMO else f"{parameters / 1e6:,.0f} million parameters"
    return ModelFacts(name=name, parameters=parameters, context=context, note=about, template=template)


def _fit(
    run: "Run", goal: "Goal", method: "Method | None", model: "ModelFacts", rows: "RowFacts", lengths: "Lengths"
) -> "Fit":
    """The first way to train that this machine has room for."""
    from tunesmith.init.advice import PREFERENCES, fit, pack_length, step_rows, wanted_length
    from tunesmith.plan.memory import count

    if rows.kind in PREFERENCES:  # with a reference; KTO also asks for answers to other prompts
        is_pair = rows.kind == "preference"
        run = replace(run, documents=1 + is_pair, scores=True, passes=1 if is_pair else 3, has_reference=True)
    methods: tuple[Method, ...] = (method,) if method else ("lora", "8bit", "4bit")
    packed, alone = pack_length(goal, rows, lengths, model), wanted_length(goal, rows, lengths, model)
    most, capacity = step_rows(rows.rows), int(ROOM * run.device.memory)

    def first_that_fits(length: int) -> "Fit":
        def room(method: "Method", checkpointing: bool) -> "Room":
            model = count(replace(run, rows=most, length=length, checkpoint_every=int(checkpointing)), method)
            # What is too large by its weights alone needs no step to be counted.
            too_large = sum(model.static.values()) >= capacity
            return lambda rows, length: not too_large and model.memory(rows, length).total <= capacity

        return fit(room, methods, length, most)

    choice = first_that_fits(packed or alone)
    if packed and goal != "continue" and (choice.length < packed or not choice.fits or choice.method != methods[0]):
        return first_that_fits(alone)  # packs are not worth that
    return choice


# Columns


def _task(options: Options, rows: "Rows", columns: Mapping[str, str]) -> "Task":
    """What the first row is for. Who names a goal of supervised rows wants one side of a pair, or no label."""
    from tunesmith.data.formats import task_of
    from tunesmith.init.advice import PREFERENCES

    if options.goal is not None and options.goal not in PREFERENCES.values():
        return "supervised"
    return task_of(next(iter(rows))[1], columns)


def _chosen_columns(options: Options, rows: "Rows", templated: bool) -> dict[str, str]:
    """The `columns` setting: as given, as the names of the columns suggest, or as somebody answers."""
    from tunesmith.data.columns import likely_columns
    from tunesmith.data.formats import FormatOptions, detect
    from tunesmith.init.facts import proposed_columns
    from tunesmith.settings.coerce import columns_of

    head = list(islice(rows, HEAD))
    place, first = head[0]
    if options.columns is not None:
        return columns_of(options.columns)
    if _task(options, rows, {}) != "supervised":
        return {}
    try:
        proposed = proposed_columns(first, templated=templated)
    except TunesmithError as error:
        raise TunesmithError(f"{place}: {error}") from error
    likely = likely_columns([row for _, row in head if isinstance(row, Mapping)])
    if proposed is None and not options.asks:
        try:
            detect(first, FormatOptions())
        except TunesmithError as error:
            raise TunesmithError(f"{place}: {error}\nHere: {_columns_to_write(first, likely, templated)}") from error
    if proposed:
        named = ", ".join(f"{theirs!r} as {ours!r}" for ours, theirs in proposed.items())
        tell = typer.echo if options.asks else say  # who is asked whether that is right has to see it
        tell(f"the columns are {', '.join(map(str, first))}; taken are {named}")
        if options.asks and not confirm("Is that right?"):
            proposed = None
    return _asked_columns(first, likely, templated) if proposed is None else proposed


def _columns_to_write(row: Mapping[str, Any], likely: Sequence[str], templated: bool) -> str:
    """The option for rows whose columns say nothing, with the names of two if so many are texts."""
    from tunesmith.data.columns import pair_columns

    texts = [name for name in likely if not set(",=") & set(name)]
    if len(row) == 1 and texts:
        return f"--columns text={shlex.quote(texts[0])}; if that is a title, delete the lines above the header"
    one, two = texts[:2] if len(texts) >= 2 else ("question", "answer")
    named = ",".join(f"{ours}={theirs}" for ours, theirs in pair_columns(one, two, templated=templated).items())
    why = f", if {one!r} is the question and {two!r} the answer" if len(texts) >= 2 else ""
    return f"--columns {shlex.quote(named)}{why}"


def _asked_columns(row: Mapping[str, Any], likely: Sequence[str], templated: bool) -> dict[str, str]:
    """Which column asks and which answers, of those that are texts."""
    from tunesmith.data.columns import pair_columns

    if not likely:
        raise TunesmithError(f"the first row has no text in its columns {', '.join(map(str, row)) or '(none)'}")
    if len(likely) == 1:
        return {"text": likely[0]}
    question = ask("Which column is the question", likely, likely[0])
    rest = [name for name in likely if name != question]
    return pair_columns(question, ask("Which is the answer", rest, rest[0]), templated=templated)


# Questions


def ask(question: str, choices: Sequence[T] | None = None, default: T | None = None) -> Any:
    """The answer, one of `choices` if there are any, asked for until there is one."""
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


def _asked_model(options: Options) -> str:
    from tunesmith.home import DEMO

    if not options.asks:
        say(f"model: {DEMO} ({DEMO_NOTE})")
        return DEMO
    typer.echo(f"{DEMO} is {DEMO_NOTE}.")
    return str(ask("Which model: a name on the hub, a folder, or demo", default=DEMO))


def _asked_goal(options: Options, guessed: "Goal", why: str) -> "Goal":
    from tunesmith.init.advice import GOALS, PREFERENCES

    if not options.asks or guessed in PREFERENCES.values():
        say(f"goal: {guessed} ({why})")
        return guessed
    goals = {name: text for name, text in GOALS.items() if name not in PREFERENCES.values()}
    for name, text in goals.items():
        typer.echo(f"  {name:<9} {text}{f'  <- {why}' if name == guessed else ''}")
    answer: Goal = ask("What are they for", tuple(goals), guessed)
    return answer


def _asked_method(options: Options) -> "Method | None":
    """None: LoRA, or what takes less memory if it must."""
    from tunesmith.init.advice import METHODS

    if not options.asks:
        return None
    for name, text in METHODS.items():
        typer.echo(f"  {name:<9} {text}")
    answer = ask("What is trained (auto: adapters, in 8 or 4 bits where memory is short)", ("auto", *METHODS), "auto")
    return None if answer == "auto" else answer
