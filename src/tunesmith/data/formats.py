"""Source rows to typed rows: each a Conversation, a Text, or Tokens.

The format is read off the first row of a source and every other row must have it too: a file that mixes shapes is more
often a mistake than a wish, and a wrong guess would train on the wrong tokens.

What comes out is made of JSON's types only. Arrow gives a row a null for every key that another row has; such nulls are
taken out at every depth, so that none of them can show up in a prompt.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.skipped import BadRow, Place, SourceRows
from tunesmith.errors import TunesmithError, nearest
from tunesmith.types import IGNORE_INDEX, Conversation, Message, Row, Text, Tokens

# The columns that make a format, most specific first.
FORMATS: dict[str, tuple[str, ...]] = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
EXTRA_COLUMNS = (
    *("input", "system", "labels", "completion_mask", "assistant_masks", "tools", "chat_template_kwargs", "weight"),
)
TEMPLATE_NAMES = ("messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "continue_final_message")
"""What a chat template is given by name already, and what only `apply_chat_template` knows."""
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
ATOMS = frozenset({str, int, float, bool, type(None)})
SUPPORTED = (
    "messages | conversations | prompt + completion | instruction (+ input) + output | text | input_ids (+ labels)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatOptions:
    """How to read rows. `columns` maps our column names to the data's own, e.g. {"prompt": "question"}.

    `arrow`: the rows come out of Arrow, where a null stands for a key that the row does not have. `skip_bad`: a row
    that can't be read is left out rather than an error.
    """

    text_field: str = "text"
    columns: Mapping[str, str] = field(default_factory=dict)
    formatting_func: Callable[[dict[str, Any]], Any] | None = None
    arrow: bool = True
    skip_bad: bool = False

    def __post_init__(self) -> None:
        known = {name for columns in FORMATS.values() for name in columns} | set(EXTRA_COLUMNS)
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
                f"no column {theirs!r}, which `columns` maps to {ours!r}; the row has {', '.join(sorted(row))}"
            )
    return result


def detect(row: Mapping[str, Any], options: FormatOptions) -> str:
    """The name of the format of `row`: one that `columns` names, else the most specific one that is there.

    Raises TunesmithError that lists the columns found and the formats supported.
    """
    row = renamed(row, options)
    present = [name for name, columns in FORMATS.items() if all(row.get(column) is not None for column in columns)]
    named = {*options.columns} | ({"text"} if options.text_field != "text" else set())
    chosen = next((name for name in present if named & {*FORMATS[name]}), None)
    if chosen is not None:
        return chosen
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise TunesmithError(_preferences(row))
    if present:
        return present[0]
    known = [column for columns in FORMATS.values() for column in columns]
    strange = [column for column in sorted(row) if column not in (*known, *EXTRA_COLUMNS)]
    hint = next((hint for column in strange if (hint := nearest(column, known))), "")
    listed = ", ".join(column if row[column] is not None else f"{column} (null)" for column in sorted(row))
    raise TunesmithError(
        f"no known format: the columns are {listed or '(none)'}{hint}\n"
        f"Supported: {SUPPORTED}. Other names: `columns: {{prompt: question, completion: answer}}`, "
        "or a `formatting_func`."
    )


def _preferences(row: Mapping[str, Any]) -> str:
    if isinstance(row["chosen"], Sequence) and not isinstance(row["chosen"], str) and len(row["chosen"]) > 1:
        columns = "{messages: chosen}"
    else:
        prompt = next((name for name in ("prompt", "conversations", "messages") if row.get(name) is not None), "prompt")
        columns = f"{{prompt: {prompt}, completion: chosen}}"
    return (
        "these are preference pairs ('chosen' and 'rejected'); supervised fine-tuning can use one side of each. "
        f"To train on the chosen answers write `columns: {columns}`"
    )


def parse(row: Mapping[str, Any], format_name: str, options: FormatOptions) -> Row:
    """`row` as a value of the format `format_name`. Raises TunesmithError that says what is wrong with it."""
    row = renamed(row, options)
    missing = [column for column in FORMATS[format_name] if row.get(column) is None]
    if missing:
        raise TunesmithError(
            f"no {' and '.join(repr(name) for name in missing)}, which the format {format_name!r} of the first row "
            f"needs; this row has {', '.join(name for name in sorted(row) if row[name] is not None) or 'nothing'}"
        )
    if format_name == "tokens":
        return _tokens(row)
    used = (*FORMATS[format_name], *EXTRA_COLUMNS)
    values = {name: plain(row[name], repr(name), nulls=not options.arrow) for name in used if name in row}
    return PARSERS[format_name](values)


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
        unnamed = FormatOptions(arrow=options.arrow)
        return parse(value, detect(value, unnamed), unnamed)
    raise TunesmithError(
        f"formatting_func returned {type(value).__name__}; it must return a string, a list of messages, "
        "or a (prompt, completion) pair"
    )


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise TunesmithError(f"{place} is {_shown(value)}, expected text")
    return value


def kind_of(value: Any) -> str:
    """What a value is in JSON's terms: "a list", "a number"."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    names |= {bool: "true or false", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def check_characters(text: str) -> None:
    """Raises TunesmithError for half of a surrogate pair, which JSON can hold and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise TunesmithError(f"{half} is half of a surrogate pair and not a character") from error


def _shown(value: Any) -> str:
    return f"{kind_of(value)} ({str(value)[:60]})"


def _weight(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise TunesmithError(f"'weight' is {value!r}, expected a number of at least 0")
    return float(value)


def plain(value: Any, place: str, *, nulls: bool = True) -> Any:
    """A copy of `value`, which may have JSON's types only: a chat template must not reach the methods of others.

    With `nulls` False, objects lose the keys whose value is None, at every depth.
    """
    if type(value) in ATOMS:
        return value
    if isinstance(value, dict | Mapping):
        return {
            str(name): item if type(item) in ATOMS else plain(item, place, nulls=nulls)
            for name, item in value.items()
            if nulls or item is not None
        }
    if isinstance(value, list | tuple):
        return [plain(item, place, nulls=nulls) for item in value]
    raise TunesmithError(f"{place} has {_shown(value)} in it; expected text, numbers, lists and objects")


def template_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a chat template, checked."""
    for name in TEMPLATE_NAMES:
        if name in kwargs:
            raise TunesmithError(f"chat_template_kwargs: {name!r} can't be given to a chat template; leave it out")
    return {str(name): plain(value, f"chat_template_kwargs: {name!r}") for name, value in kwargs.items()}


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise TunesmithError(f"{place} is {_shown(turn)}, expected an object with 'role' and 'content'")
    fields = {name: value for name, value in turn.items() if value is not None}
    if "role" not in fields and "from" in fields:
        fields = _sharegpt(fields, place)
    weight = _weight(fields.pop("weight", None))
    if not isinstance(fields.get("role"), str):
        raise TunesmithError(f"{place} has no 'role'; its keys are {', '.join(fields) or '(none)'}")
    content = fields.get("content")
    if not fields.get("tool_calls"):
        fields.pop("tool_calls", None)  # templates ask whether the key is there
    elif not isinstance(fields["tool_calls"], list) or not all(map(_is_call, fields["tool_calls"])):
        raise TunesmithError(
            f"'tool_calls' of {place} must be a list of {{'function': {{'name': ..., 'arguments': ...}}}}"
        )
    if isinstance(content, list):
        fields["content"] = [_part(part, f"{place}, part {i + 1}") for i, part in enumerate(content)]
    elif content is not None:
        _string(content, f"content of {place}")
    elif "tool_calls" in fields:
        fields["content"] = ""
    else:
        raise TunesmithError(f"{place} (role {fields['role']!r}) has neither 'content' nor 'tool_calls'")
    return Message(fields=fields, weight=weight)


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and "name" in function


def _part(part: Any, place: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = repr(part.get("type")) if isinstance(part, dict) else _shown(part)
        raise TunesmithError(f"{place} is {kind}; only text parts {{'type': 'text', 'text': ...}} can be trained on")
    return {name: value for name, value in part.items() if value is not None}


def _messages(turns: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(turns, list | tuple):
        raise TunesmithError(f"{column!r} is {_shown(turns)}, expected a list of messages")
    if not turns:
        raise TunesmithError(f"{column!r} is empty")
    return tuple(_message(turn, f"message {i + 1} of {column!r}") for i, turn in enumerate(turns))


def _json(value: Any, column: str, kind: type) -> Any:
    """A column that holds a value or its JSON text. The text is taken as it is, nulls included."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise TunesmithError(f"{column!r} is text that is not JSON: {error}") from error
    if value is not None and not isinstance(value, kind):
        expected = "a list" if kind is list else "an object"
        raise TunesmithError(f"{column!r} is {_shown(value)}, expected {expected}, or its JSON text")
    return value


def _extras(row: Mapping[str, Any]) -> dict[str, Any]:
    tools = _json(row.get("tools"), "tools", list) or None
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise TunesmithError(f"tool {i + 1} of 'tools' is {_shown(tool)}, expected an object (a JSON schema)")
    return {
        "tools": tools,
        "template_kwargs": template_arguments(
            _json(row.get("chat_template_kwargs"), "chat_template_kwargs", dict) or {}
        ),
        "weight": _weight(row.get("weight")),
    }


def _conversation(row: Mapping[str, Any]) -> Conversation:
    return Conversation(messages=_messages(row["messages"], "messages"), **_extras(row))


def _conversations(row: Mapping[str, Any]) -> Conversation:
    messages = _messages(row["conversations"], "conversations")
    if row.get("system"):
        system = {"role": "system", "content": _string(row["system"], "'system'")}
        messages = (Message(fields=system), *messages)
    return Conversation(messages=messages, **_extras(row))


def _sharegpt(turn: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The turn of a ShareGPT conversation with the keys that templates know."""
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise TunesmithError(f"{place} is from {speaker!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
    value = _string(turn.get("value"), f"'value' of {place}")
    rest = {name: item for name, item in turn.items() if name not in ("from", "value")}
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, place), **rest}
    return {"role": SHAREGPT_ROLES[speaker], "content": value, **rest}


def _calls(value: str, place: str) -> list[dict[str, Any]]:
    try:
        parsed = json.loads(value)
        calls = parsed if isinstance(parsed, list) else [parsed]
        return [
            {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise TunesmithError(
            f'{place} (function_call) is {value[:80]!r}; expected JSON {{"name": ..., "arguments": {{...}}}}'
        ) from error


def _prompt_completion(row: Mapping[str, Any]) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Text(text=prompt + completion, prompt=prompt, weight=_weight(row.get("weight")))
    if isinstance(prompt, list | dict) and isinstance(completion, list | dict):
        parts = {"prompt": prompt, "completion": completion}
        head, tail = (_messages([value] if isinstance(value, dict) else value, name) for name, value in parts.items())
        return Conversation(messages=head + tail, prompt_length=len(head), **_extras(row))
    raise TunesmithError(
        f"'prompt' is {_shown(prompt)} and 'completion' is {_shown(completion)}; both must be text, "
        "or both lists of messages"
    )


def _instruction(row: Mapping[str, Any]) -> Conversation:
    instruction, output = _string(row["instruction"], "'instruction'"), _string(row["output"], "'output'")
    if row.get("input"):
        instruction += "\n\n" + _string(row["input"], "'input'")
    turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": _string(row["system"], "'system'")})
    return Conversation(messages=_messages(turns, "instruction"), prompt_length=len(turns) - 1, **_extras(row))


def _text(row: Mapping[str, Any]) -> Text:
    return Text(text=_string(row["text"], "'text'"), weight=_weight(row.get("weight")))


def _tokens(row: Mapping[str, Any]) -> Tokens:
    ids = _whole_numbers(row["input_ids"], "input_ids")
    labels = None if row.get("labels") is None else _whole_numbers(row["labels"], "labels", len(ids))
    masks = [
        _whole_numbers(row[name], name, len(ids))
        for name in ("completion_mask", "assistant_masks")
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
    return Tokens(input_ids=ids, labels=labels, weight=_weight(row.get("weight")))


def _whole_numbers(values: Any, name: str, size: int | None = None) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or not {*map(type, values)} <= {int, bool}:
        raise TunesmithError(f"{name!r} is {_shown(values)}, expected a list of whole numbers")
    if size is not None and len(values) != size:
        raise TunesmithError(f"{name!r} has {len(values)} entries and 'input_ids' {size}; they must be as many")
    return list(values)


PARSERS: dict[str, Callable[[Mapping[str, Any]], Row]] = {
    "messages": _conversation,
    "conversations": _conversations,
    "prompt-completion": _prompt_completion,
    "instruction": _instruction,
    "text": _text,
}
