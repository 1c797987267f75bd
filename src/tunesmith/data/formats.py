"""Source rows to typed rows: each a Conversation, a Text, or Tokens; for preferences a Pair, or Judged.

The format is read off the first row of a source and every other row must have it too: a file that mixes shapes is more
often a mistake than a wish, and a wrong guess would train on the wrong tokens.

What comes out is made of JSON's types only. Arrow gives a row a null for every key that another row has; from an
`ArrowRow` such nulls are taken out at every depth, so that none of them can show up in a prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from tunesmith.data.calls import tools_of
from tunesmith.data.columns import guessed_columns, pair_columns
from tunesmith.data.messages import FACTORS, TurnOptions, Turns, agreed_weight, read_turns, stated_training
from tunesmith.data.pairs import LABELS, PROMPTS, SIDES, read_judged, read_pair
from tunesmith.data.skipped import BadRow, Place, SourceRows
from tunesmith.data.values import from_json, plain, shown, string
from tunesmith.errors import TunesmithError, nearest
from tunesmith.text import listing
from tunesmith.types import IGNORE_INDEX, Conversation, Judged, Pair, Row, Text, Tokens

# The columns that make a format, most specific first.
FORMATS: dict[str, tuple[str, ...]] = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "conversation": ("conversation",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
    "contents": ("contents",),
}
Task = Literal["supervised", "pairs", "ranked", "judged"]
"""What rows are read as: texts to learn, two answers to one prompt, or answers that are good or bad."""
GUESSED = 100
"""Columns of a row that are compared with the names of formats, to find a misspelt one."""
EXTRA_COLUMNS = (
    *("input", "history", "system", "labels", "completion_mask", "assistant_masks", "tools", "chat_template_kwargs"),
    "weight",
)
SYSTEM_COLUMNS = ("system", "system_prompt", "systemInstruction", "system_instruction")
ROW_FLAGS = ("train", "training", "loss", "masked")
TRAINING = frozenset({*FACTORS, *ROW_FLAGS})
"""Columns that may say whether a row is trained on."""
USED = {name: frozenset({*columns, *EXTRA_COLUMNS, *SYSTEM_COLUMNS, "functions"}) for name, columns in FORMATS.items()}
"""What is read of a row, by its format."""
MEDIA = {"image": "images", "images": "images", "video": "videos", "videos": "videos"} | dict.fromkeys(
    ("audio", "audios"), "sounds"
)
"""Columns of other things than text, and what they hold."""
TALKS = frozenset({"messages", "conversations", "conversation", "contents"})
"""The formats that are lists of turns."""
TEMPLATE_NAMES = ("messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "continue_final_message")
"""What a chat template is given by name already, and what only `apply_chat_template` knows."""
SUPPORTED = (
    "messages | conversations | prompt + completion | instruction (+ input) + output | text | input_ids (+ labels) | "
    "contents (Gemini)"
)


class ArrowRow(dict[str, Any]):
    """A row that comes out of Arrow, where a null stands for a key that the row does not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatOptions:
    """How to read rows. `columns` maps our column names to the data's own, e.g. {"prompt": "question"}.

    `skip_bad`: a row that can't be read is left out rather than an error. `turns`: how messages are read.
    `task`: what the rows are for; "ranked" are pairs of which each side is read as a whole, whatever its prompt.
    """

    text_field: str = "text"
    columns: Mapping[str, str] = field(default_factory=dict)
    formatting_func: Callable[[dict[str, Any]], Any] | None = None
    skip_bad: bool = False
    turns: TurnOptions = field(default_factory=TurnOptions)
    task: Task = "supervised"

    def __post_init__(self) -> None:
        known = {name for columns in FORMATS.values() for name in columns} | set(EXTRA_COLUMNS)
        pairs = {*SIDES, "margin"}
        known |= {"pairs": pairs, "ranked": pairs, "judged": {*LABELS}, "supervised": set[str]()}[self.task]
        for name in self.columns:
            if name not in known:
                raise TunesmithError(
                    f"columns: {name!r} is not a column that a format uses{nearest(name, known)}\n"
                    f"Write `columns: {{ours: yours}}` with ours among {', '.join(sorted(known))}."
                )


def parse_rows(rows: SourceRows, options: FormatOptions) -> Iterator[tuple[str, Row]]:
    """Source rows with their places to typed rows, all in the format of the first.

    A bad row is left out with `skip_bad`, else TunesmithError is raised.
    """
    return ((place, row) for place, row in parse_each(rows, options) if not isinstance(row, BadRow))


def parse_each(rows: SourceRows, options: FormatOptions) -> Iterator[tuple[str, Row | BadRow]]:
    """As `parse_rows`, with the bad rows between the others; the format is that of the first row that has one."""
    reader = _Reader(options)
    for place, row in rows:
        if isinstance(row, BadRow):
            if not options.skip_bad:
                raise row.error(place)
            yield place, row
            continue
        try:
            value: Row | BadRow = reader.read(row)
        except TunesmithError as error:
            if not options.skip_bad:
                raise TunesmithError(f"{place}: {error}") from error
            value = BadRow(reason=str(error), content=dict(row))
        yield (Place(place, row) if options.skip_bad else place), value


class _Reader:
    """Reads row after row in the format of the first one."""

    def __init__(self, options: FormatOptions) -> None:
        self.options = options
        self.format_name = self.kind = ""

    def read(self, row: Mapping[str, Any]) -> Row:
        for name in row:
            if not isinstance(name, str):
                raise TunesmithError(f"a column is named {name!r}, expected text")
        try:
            if self.options.formatting_func is not None:
                value, name = format_row(row, self.options), ""
            else:
                name = self.format_name or detect(row, self.options)
                value = parse(row, name, self.options)
        except RecursionError:
            raise TunesmithError("lists or objects are nested too deeply") from None
        kind = _row_kind(value)
        if self.kind not in ("", kind):
            raise TunesmithError(f"this row is {kind}, the rows before it are each {self.kind}")
        self.format_name, self.kind = name, kind
        return value


def _row_kind(row: Row) -> str:
    """What a row is, in words: rows of two kinds would be trained on differently."""
    if isinstance(row, Pair):
        return f"a pair, of which each side is {_row_kind(row.chosen)}"
    if isinstance(row, Judged):
        return f"a judged answer, which is {_row_kind(row.answer)}"
    if isinstance(row, Tokens):
        return "tokens"
    if isinstance(row, Text):
        return "a text" if row.prompt is None else "a prompt and a completion, both text"
    return "a conversation" if row.prompt_length is None else "a prompt and a completion, both messages"


def renamed(row: Mapping[str, Any], options: FormatOptions) -> dict[str, Any]:
    """`row` under our column names, and no longer under those that were mapped. A column that `columns` names and the
    row lacks is an error."""
    names = dict(options.columns)
    if options.text_field != "text":
        names.setdefault("text", options.text_field)
    # A mapped `input` must not be read again as the input of an instruction.
    result = {name: value for name, value in row.items() if name not in names.values()}
    for ours, theirs in names.items():
        if theirs in row:
            result[ours] = row[theirs]
        elif ours in options.columns:
            raise TunesmithError(
                f"no column {theirs!r}, which `columns` maps to {ours!r}; the row has {listing(sorted(row))}"
            )
    return result


def detect(row: Mapping[str, Any], options: FormatOptions) -> str:
    """The name of the format of `row`: one that `columns` names, else the most specific one that is there.

    Raises TunesmithError that lists the columns found and the formats supported.
    """
    row = renamed(row, options)
    if options.task != "supervised":
        _check_preference(row, options.task)
        return options.task
    present = [name for name, columns in FORMATS.items() if all(row.get(column) is not None for column in columns)]
    named = {*options.columns} | ({"text"} if options.text_field != "text" else set())
    chosen = next((name for name in present if named & {*FORMATS[name]}), None)
    if chosen is not None:
        return chosen
    for better, worse in (("chosen", "rejected"), ("chosen_messages", "rejected_messages")):
        if row.get(better) is not None and row.get(worse) is not None:
            raise TunesmithError(_preferences(row, better, worse))
    if present:
        return present[0]
    raise TunesmithError(_no_format(row))


def task_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> Task:
    """What a row is for, by its columns under our names: two answers make a pair, and an answer with a label that is
    true or false is judged."""
    there = {name: value for name, value in row.items() if value is not None and name not in columns.values()}
    there |= {ours: row[theirs] for ours, theirs in columns.items() if row.get(theirs) is not None}
    if there.keys() >= {*SIDES}:
        return "pairs"
    answered = there.keys() >= {"prompt", "completion"} or not there.keys().isdisjoint(("messages", "conversations"))
    return "judged" if answered and any(type(there.get(name)) is bool for name in LABELS) else "supervised"


def _check_preference(row: Mapping[str, Any], task: Task) -> None:
    """Raises TunesmithError for a row without a preference, with what it has."""
    listed = listing([name for name in sorted(row) if row[name] is not None]) or "(none)"
    if task in ("pairs", "ranked") and not all(row.get(name) is not None for name in SIDES):
        way = "`columns: {chosen: ..., rejected: ...}` with the columns of the better and the worse answer"
        if row.get("chosen_messages") is not None and row.get("rejected_messages") is not None:
            way = "`columns: {chosen: chosen_messages, rejected: rejected_messages}`"
        elif any(isinstance(row.get(name), bool) for name in LABELS):
            way = "`tunesmith kto` (KTOTrainer), which learns from single answers with a label; or pairs"
        raise TunesmithError(
            f"no pair: the columns are {listed}\nA pair has 'chosen' and 'rejected', and {' or '.join(PROMPTS)} unless "
            f"both are whole {'texts or ' if task == 'ranked' else ''}conversations. Write {way}."
        )
    if task == "judged" and all(row.get(name) is None for name in LABELS):
        raise TunesmithError(
            f"no label: the columns are {listed}\nA judged answer has 'label', true or false, beside 'prompt' and "
            "'completion', or 'messages'. Write `columns: {label: ...}` with the column that says whether it is good."
        )


def _no_format(row: Mapping[str, Any]) -> str:
    known = [column for columns in FORMATS.values() for column in columns]
    strange = [column for column in row if column not in (*known, *EXTRA_COLUMNS)][:GUESSED]
    commoner = [column for column in known if column not in ("conversation", "contents")]
    hint = next((hint for column in strange if (hint := nearest(column, commoner))), "")
    for name, columns in FORMATS.items():
        if all(column in row for column in columns):
            nulls = " and ".join(repr(column) for column in columns if row[column] is None)
            hint = f"; {nulls} is null, which the format {name!r} needs"
            break
    listed = listing([column if value is not None else f"{column} (null)" for column, value in row.items()])
    guesses = [guessed_columns(row, templated=templated) for templated in (True, False)]
    examples = [pair_columns("question", "answer", templated=templated) for templated in (True, False)]
    lines = [
        f"`columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in (guess or example).items())}}}`"
        for guess, example in zip(guesses, examples, strict=True)
    ]
    named = "Write" if any(guesses) else "Other names:"
    text = f", or {lines[1]} without a chat template," if lines[1] != lines[0] else ","
    return (
        f"no known format: the columns are {listed or '(none)'}{hint}\n"
        f"Supported: {SUPPORTED}. {named} {lines[0]}{text} or a `formatting_func`."
    )


def _preferences(row: Mapping[str, Any], chosen: str, rejected: str) -> str:
    side = row[chosen]
    if isinstance(side, Sequence) and not isinstance(side, str) and len(side) > 1:
        columns = f"{{messages: {chosen}}}"
    else:
        prompt = next((name for name in ("prompt", "conversations", "messages") if row.get(name) is not None), "prompt")
        columns = f"{{prompt: {prompt}, completion: {chosen}}}"
    return (
        f"these are preference pairs ({chosen!r} and {rejected!r}); supervised fine-tuning can use one side of each. "
        f"To train on the chosen answers write `columns: {columns}`. `tunesmith dpo` (DPOTrainer) learns from both"
    )


def parse(row: Mapping[str, Any], format_name: str, options: FormatOptions) -> Row:
    """`row` as a value of the format `format_name`. Raises TunesmithError that says what is wrong with it."""
    is_padded, row = isinstance(row, ArrowRow), renamed(row, options)
    if format_name in ("pairs", "ranked", "judged"):
        _check_preference(row, options.task)
        plainly = FormatOptions(turns=options.turns)

        def read(answer: dict[str, Any], name: str) -> Row:
            return parse(ArrowRow(answer) if is_padded else answer, name, plainly)

        if format_name == "judged":
            return read_judged(row, read)
        return read_pair(row, read, whole=format_name == "ranked")
    missing = [column for column in FORMATS[format_name] if row.get(column) is None]
    if missing:
        raise TunesmithError(
            f"no {' and '.join(repr(name) for name in missing)}, which the format {format_name!r} of the first row "
            f"needs; this row has {', '.join(name for name in sorted(row) if row[name] is not None) or 'nothing'}"
        )
    if not REFUSED.isdisjoint(row):
        _refuse_unread(row, format_name, options.columns)
    if format_name == "tokens":
        return _tokens(row)
    used, nulls = USED[format_name], not is_padded
    values = {name: plain(item, repr(name), nulls=nulls) for name, item in row.items() if name in used}
    if not TRAINING.isdisjoint(row):
        values |= {name: row[name] for name in TRAINING if type(row.get(name)) in (bool, int, float)}
    return PARSERS[format_name](values, options.turns)


def format_row(row: Mapping[str, Any], options: FormatOptions) -> Row:
    """The row that `formatting_func` makes of `row`: a string, a list of messages, or a prompt-completion pair.

    With `skip_bad`, whatever the function raises is a TunesmithError: a reason to skip the row.
    """
    assert options.formatting_func is not None
    try:
        value = options.formatting_func(dict(row))
    except Exception as error:
        if isinstance(error, TunesmithError) or not options.skip_bad:
            error.add_note("formatting_func is called with one row, and not with a batch: it returns the row's text")
            raise
        raise TunesmithError(f"formatting_func raised {type(error).__name__}: {error}") from error
    if isinstance(value, str):
        return Text(text=value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        raise TunesmithError(
            "formatting_func returned a list of strings; it is called with one row and returns one string"
        )
    if isinstance(value, list):
        value = {"messages": value}
    elif isinstance(value, tuple) and len(value) == 2:
        value = {"prompt": value[0], "completion": value[1]}
    if isinstance(value, Mapping):
        unnamed = FormatOptions(turns=options.turns, task=options.task)
        made = ArrowRow(value) if isinstance(row, ArrowRow) else value
        return parse(made, detect(made, unnamed), unnamed)
    raise TunesmithError(
        f"formatting_func returned {type(value).__name__}; it must return a string, a list of messages, "
        "or a (prompt, completion) pair"
    )


def check_characters(text: str) -> None:
    """Raises TunesmithError for half of a surrogate pair, which JSON can hold and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise TunesmithError(f"{half} is half of a surrogate pair and not a character") from error


def template_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a chat template, checked."""
    for name in TEMPLATE_NAMES:
        if name in kwargs:
            raise TunesmithError(f"chat_template_kwargs: {name!r} can't be given to a chat template; leave it out")
    return {str(name): plain(value, f"chat_template_kwargs: {name!r}") for name, value in kwargs.items()}


# What a format leaves unread


UNREAD = {
    "history": {"prompt-completion", *TALKS},
    "system": {"prompt-completion"},
    "system_prompt": {"prompt-completion"},
    "tools": {"prompt-completion"},
    "functions": {"prompt-completion"},
    "context": {"prompt-completion", "instruction"},
}
"""Columns that other tools, or other formats here, put into the prompt; and the formats that would lose them."""
REFUSED = frozenset({*MEDIA, *UNREAD, "kto_tag", "label", "mask", "loss_scale", "loss_weights"})


def _refuse_unread(row: Mapping[str, Any], format_name: str, columns: Mapping[str, str]) -> None:
    """Raises TunesmithError for a column that says something of the row which would be lost in training.

    A column that no tool reads as input or as supervision may be there. `columns` is the setting of that name.
    """
    for name in MEDIA:
        if _holds_something(row.get(name)):
            raise TunesmithError(
                f"the row has {MEDIA[name]} ({name!r}), and only text can be trained on. Leave the row out, or take "
                "the column out of the data"
            )
    answered = format_name in TALKS or format_name == "prompt-completion"
    tag = next((name for name in ("kto_tag", "label") if isinstance(row.get(name), bool)), None)
    if tag == "kto_tag" or (tag and answered):
        raise TunesmithError(
            f"{tag!r} is {str(row[tag]).lower()}: a row for preference training (KTO), where false marks an answer "
            f"that the model should not give. To train on the good answers keep the rows whose {tag!r} is true, "
            "without that column"
        )
    if isinstance(row.get("mask"), str) and format_name in TALKS:
        raise TunesmithError(
            f"'mask' is {row['mask']!r}, in NeMo's format the speaker that is not trained on; take the column out of "
            "the data, and set `train_on: assistant` to train on the answers"
        )
    if format_name == "tokens":
        for name in ("loss_scale", "loss_weights"):
            if isinstance(row.get(name), Sequence):
                raise TunesmithError(f"{name!r} has a weight for each token; only 'weight', for the whole row, is read")
    texts = format_name == "prompt-completion" and isinstance(row["prompt"], str)
    for name, losing in UNREAD.items():
        lost = format_name in losing and _holds_something(row.get(name))
        if format_name == "instruction" and _holds_something(row.get("input")):
            lost = False  # this is what goes with the instruction
        if lost and (texts or format_name != "prompt-completion" or name == "history"):
            raise TunesmithError(_unread(format_name, name, columns))


def _unread(format_name: str, name: str, columns: Mapping[str, str]) -> str:
    prompt, completion = (columns.get(ours, ours) for ours in ("prompt", "completion"))
    if format_name in TALKS:
        way = f"Write its turns as messages of {format_name!r}"
    elif format_name == "instruction":
        way = f"`columns: {{input: {name}}}` puts it behind the instruction"
    elif name == "context":
        way = f"`columns: {{instruction: {prompt}, input: {name}, output: {completion}}}` makes one question of both"
    else:
        way = f"`columns: {{instruction: {prompt}, output: {completion}}}` makes a conversation of the row, with it"
    problem = f"{name!r} would be lost: the format {format_name!r} does not read it"
    return f"{problem}. {way}; or take the column out of the data"


def _holds_something(value: Any) -> bool:
    """Whether a column has content: no null, no number, and nothing empty."""
    if value is None or isinstance(value, bool | int | float):
        return False
    if isinstance(value, Mapping):
        return any(item is not None for item in value.values())
    if isinstance(value, list | tuple):
        return any(item is not None for item in value)
    return value.strip() not in ("", "[]", "{}", "null") if isinstance(value, str) else True


# The formats


def _row_weight(row: Mapping[str, Any]) -> float:
    """What a row says of its training. A column with one of these names may be something else: a loss that somebody
    measured, or the name of a split."""
    if TRAINING.isdisjoint(row):
        return 1.0
    numbers = {name: row.get(name) for name in FACTORS if name == "weight" or type(row.get(name)) in (int, float)}
    flags = {name: row[name] for name in ROW_FLAGS if isinstance(row.get(name), bool)}
    weight = agreed_weight(*stated_training(numbers | flags, "the row"), "the row")
    return 1.0 if weight is None else weight


def _conversation(
    row: Mapping[str, Any], turns: Sequence[Turns], options: TurnOptions, *, prompted: bool = False
) -> Conversation:
    """A row's turns, with its system prompt before them and its tools. `prompted`: all but the last are the prompt."""
    system = _system(row, options)
    first = turns[0].messages[0]
    if system and first.role == "system":
        if first.fields["content"] != system.messages[0].fields["content"]:
            raise TunesmithError(
                "the row has a system prompt in a column, and another one in its first message; keep one of them"
            )
        system = None
    heads, last = [*([system] if system else []), *turns[:-1]], turns[-1]
    messages = [message for part in (*heads, last) for message in part.messages]
    return Conversation(
        messages=tuple(messages),
        prompt_length=len(messages) - len(last.messages) if prompted else None,
        tools=_tools(row),
        template_kwargs=template_arguments(
            from_json(row.get("chat_template_kwargs"), "'chat_template_kwargs'", dict) or {}
        ),
        weight=_row_weight(row),
        notes=tuple(dict.fromkeys(note for part in turns for note in part.notes)),
    )


def _system(row: Mapping[str, Any], options: TurnOptions) -> Turns | None:
    """The system prompt that a row has beside its turns: text, or parts in Anthropic's or in Gemini's form."""
    if not (given := {name: row[name] for name in SYSTEM_COLUMNS if row.get(name)}):
        return None
    read = []
    for name, value in given.items():
        parts = value if isinstance(value, dict) and "parts" in value else {"content": value}
        turn = {name: item for name, item in parts.items() if name != "role"} | {"role": "system"}
        read.append(read_turns([turn], name, replace(options, merge_turns=False)))
    if len({str(turns.messages) for turns in read}) > 1:
        raise TunesmithError(f"{' and '.join(map(repr, given))} differ; keep one system prompt")
    return read[0]


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    if "tools" not in row and "functions" not in row:
        return None
    read = {name: tools for name in ("tools", "functions") if (tools := tools_of(row.get(name), repr(name)))}
    if len(read) == 2 and read["tools"] != read["functions"]:
        raise TunesmithError("the row has both 'tools' and 'functions', and they differ; keep 'tools'")
    return next(iter(read.values()), None)


def _talk(column: str) -> "Parser":
    """The parser of a column that is a list of turns."""

    def parsed(row: Mapping[str, Any], options: TurnOptions) -> Conversation:
        return _conversation(row, [read_turns(row[column], column, options)], options)

    return parsed


def _prompt_completion(row: Mapping[str, Any], options: TurnOptions) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Text(text=prompt + completion, prompt=prompt, weight=_row_weight(row))
    if isinstance(prompt, list | dict) and isinstance(completion, list | dict):
        parts = {"prompt": prompt, "completion": completion}
        turns = [
            read_turns([value] if isinstance(value, dict) else value, name, options) for name, value in parts.items()
        ]
        return _conversation(row, turns, options, prompted=True)
    raise TunesmithError(
        f"'prompt' is {shown(prompt)} and 'completion' is {shown(completion)}; both must be text, "
        "or both lists of messages"
    )


def _instruction(row: Mapping[str, Any], options: TurnOptions) -> Conversation:
    """A question and its answer, which is the completion. Earlier rounds in `history` are part of the prompt."""
    instruction, output = string(row["instruction"], "'instruction'"), string(row["output"], "'output'")
    if row.get("input"):
        instruction += "\n\n" + string(row["input"], "'input'")
    asked = []
    for i, round_ in enumerate(from_json(row.get("history"), "'history'", list) or ()):
        if not isinstance(round_, list) or len(round_) != 2:
            raise TunesmithError(f"round {i + 1} of 'history' is {shown(round_)}, expected [question, answer]")
        texts = [string(text, f"round {i + 1} of 'history'") for text in round_]
        asked += [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    turns = [[*asked, {"role": "user", "content": instruction}], [{"role": "assistant", "content": output}]]
    return _conversation(row, [read_turns(part, "instruction", options) for part in turns], options, prompted=True)


def _text(row: Mapping[str, Any], options: TurnOptions) -> Text:
    return Text(text=string(row["text"], "'text'"), weight=_row_weight(row))


def _tokens(row: Mapping[str, Any]) -> Tokens:
    ids = _whole_numbers(row["input_ids"], "input_ids")
    labels = None if row.get("labels") is None else _whole_numbers(row["labels"], "labels", len(ids))
    masks = [
        _whole_numbers(row[name], name, len(ids))
        for name in ("completion_mask", "assistant_masks", "loss_mask")
        if row.get(name) is not None
    ]
    if labels is None and masks:
        labels = [token if all(marks) else IGNORE_INDEX for token, *marks in zip(ids, *masks, strict=True)]
    for i, (label, token) in enumerate(zip(labels or (), ids, strict=False)):
        if label not in (IGNORE_INDEX, token):
            raise TunesmithError(
                f"'labels' is {label} at place {i} where 'input_ids' is {token}; labels are not shifted: "
                f"each is its own token's id, or {IGNORE_INDEX}"
            )
    return Tokens(input_ids=ids, labels=labels, weight=_row_weight(row))


def _whole_numbers(values: Any, name: str, size: int | None = None) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or not {*map(type, values)} <= {int, bool}:
        raise TunesmithError(f"{name!r} is {shown(values)}, expected a list of whole numbers")
    if size is not None and len(values) != size:
        raise TunesmithError(f"{name!r} has {len(values)} entries and 'input_ids' {size}; they must be as many")
    return list(values)


Parser: TypeAlias = Callable[[Mapping[str, Any], TurnOptions], Row]
PARSERS: dict[str, Parser] = {
    **{column: _talk(column) for column in ("messages", "conversations", "conversation", "contents")},
    "prompt-completion": _prompt_completion,
    "instruction": _instruction,
    "text": _text,
}
