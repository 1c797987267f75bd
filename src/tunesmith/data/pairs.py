"""Rows with a preference: two answers to one prompt, or one answer that somebody has judged.

Each answer is read as the row that it would be alone, so that everything that holds for supervised rows holds for it:

    prompt       chosen    rejected         prompt + chosen, prompt + rejected
    "Hi"         "Yes"     "No"             two texts
    [user]       [answer]  [answer]         two conversations
                 [user, answer], twice      two conversations, whose common messages are the prompt

What two conversations have in common is found by messages, never by characters: answers may begin alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from tunesmith.data.messages import CALL, HEAVIEST, ROLES
from tunesmith.data.values import shown
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation, Judged, Pair, Row, Text

SIDES = ("chosen", "rejected")
LABELS = ("label", "kto_tag")
PROMPTS = ("prompt", "conversations", "messages", "conversation")
"""The columns that may hold the prompt of a pair."""
Read: TypeAlias = Callable[[dict[str, Any], str], Row]
"""A row and the name of its format to what it is."""


def read_pair(row: Mapping[str, Any], read: Read, *, whole: bool = False) -> Pair:
    """The pair of a row with `chosen` and `rejected`. With `whole`, each side counts as it stands, prompt and answer
    together. Otherwise raises TunesmithError where the answer of a side can't be told from its prompt, and for answers
    to different prompts."""
    column = next((name for name in PROMPTS if row.get(name) is not None), None)
    rest = {name: value for name, value in row.items() if name not in (*SIDES, *PROMPTS, "margin", "weight")}
    if column is None and row.get("instruction") is not None:
        answers = [_read_side(rest | {"output": row[side]}, "instruction", side, read) for side in SIDES]
    else:
        answers = [_side(row, side, column, rest, read, whole=whole) for side in SIDES]
    chosen, rejected = answers
    if isinstance(chosen, Conversation) and isinstance(rejected, Conversation):
        if chosen.prompt_length is None or rejected.prompt_length is None:
            if not whole:
                chosen, rejected = _divided(chosen, rejected)
            _check_repeated(row, column, chosen)
    elif not (isinstance(chosen, Text) and isinstance(rejected, Text)):
        raise TunesmithError("'chosen' and 'rejected' are of two kinds; both must be text, or both messages")
    return Pair(chosen=chosen, rejected=rejected, margin=_margin(row.get("margin")), weight=_weight(row, read))


def read_judged(row: Mapping[str, Any], read: Read) -> Judged:
    """The answer of a row that says whether it is good. Without a prompt of its own, all but the last message of a
    conversation is the prompt."""
    name = next(name for name in LABELS if row.get(name) is not None)
    label = row[name]
    if label not in (True, False):
        raise TunesmithError(f"{name!r} is {shown(label)}, expected true (a good answer) or false")
    rest = {key: value for key, value in row.items() if key not in (*LABELS, "weight")}
    formats = {"prompt": "prompt-completion", "messages": "messages", "conversations": "conversations"}
    column = next((key for key in formats if row.get(key) is not None), "prompt")
    if column == "prompt" and row.get("completion") is None:
        raise TunesmithError("no answer: a row needs 'prompt' and 'completion', or 'messages', beside its label")
    answer = read(rest, formats[column])
    assert isinstance(answer, Conversation | Text)
    if isinstance(answer, Conversation) and answer.prompt_length is None:
        if answer.messages[-1].role != "assistant":
            raise TunesmithError("the last message is not the assistant's, so there is no answer to judge")
        if len(answer.messages) == 1:
            raise TunesmithError("the answer has no prompt before it")
        answer = replace(answer, prompt_length=len(answer.messages) - 1)
    return Judged(answer=answer, good=bool(label), weight=_weight(row, read))


def _side(
    row: Mapping[str, Any], side: str, column: str | None, rest: dict[str, Any], read: Read, *, whole: bool
) -> Row:
    """One answer with its prompt, as a row of its own; a conversation without `prompt_length` where the answer's
    messages begin with the prompt, and with `whole` a text without a prompt."""
    answer, prompt = row[side], None if column is None else row[column]
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list | tuple) and not (answer and _is_answer(answer[0])):
        return _read_side(rest | {"messages": answer}, "messages", side, read)
    if column is None and whole and isinstance(answer, str):
        return _read_side(rest | {"text": answer}, "text", side, read)
    if column is None:
        raise TunesmithError(
            f"{side!r} is {shown(row[side])}, and the row has no prompt, so where the answer begins can't be told. "
            "Write `columns: {prompt: ...}` with the column of the prompt, or give whole conversations as messages"
        )
    if isinstance(prompt, str):
        system = any(rest.get(name) for name in ("system", "system_prompt"))
        if isinstance(answer, str) and not system:
            return _read_side(rest | {"prompt": prompt, "completion": answer}, "prompt-completion", side, read)
        if isinstance(answer, str):
            return _read_side(rest | {"instruction": prompt, "output": answer}, "instruction", side, read)
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return _read_side(rest | {"prompt": prompt, "completion": answer}, "prompt-completion", side, read)


def _read_side(row: dict[str, Any], format_name: str, side: str, read: Read) -> Row:
    try:
        return read(row, format_name)
    except TunesmithError as error:
        raise TunesmithError(f"{side!r}: {error}") from error


def _is_answer(turn: Any) -> bool:
    """Whether a turn, as any tool writes it, is the assistant's."""
    speaker = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    return isinstance(speaker, str) and ROLES.get(speaker.lower()) in ("assistant", CALL)


def _divided(chosen: Conversation, rejected: Conversation) -> tuple[Conversation, Conversation]:
    """Two whole conversations with the messages that they have in common as their prompt."""
    both = [*zip(chosen.messages, rejected.messages, strict=False)]
    common = next((i for i, (one, two) in enumerate(both) if one.fields != two.fields), len(both))
    while common and common in (len(chosen.messages), len(rejected.messages)):
        common -= 1  # equal as far as one of them goes: its last message is the answer
    if not common:
        raise TunesmithError("'chosen' and 'rejected' share no prompt: their first messages differ")
    for name, conversation in zip(SIDES, (chosen, rejected), strict=True):
        if (role := conversation.messages[common].role) != "assistant":
            raise TunesmithError(
                f"'chosen' and 'rejected' part at message {common + 1}, which is the {role}'s in {name!r}: they answer "
                "different prompts"
            )
    return replace(chosen, prompt_length=common), replace(rejected, prompt_length=common)


def _check_repeated(row: Mapping[str, Any], column: str | None, chosen: Conversation) -> None:
    """The prompt that a row has beside whole conversations must be theirs."""
    prompt = None if column is None else row[column]
    if isinstance(prompt, str) and prompt:
        spoken = [message.fields.get("content") for message in chosen.messages[: chosen.prompt_length]]
        if prompt.strip() not in [text.strip() for text in spoken if isinstance(text, str)]:
            raise TunesmithError(
                f"'prompt' is {shown(prompt)}, and no message before the answers says that; take the column out of the "
                "data, or the prompt out of 'chosen' and 'rejected'"
            )


def _margin(value: Any) -> float:
    if value is None:
        return 0.0
    if type(value) not in (int, float) or not abs(value) <= HEAVIEST:
        raise TunesmithError(f"'margin' is {shown(value)}, expected a number from {-HEAVIEST:,} to {HEAVIEST:,}")
    return float(value)


def _weight(row: Mapping[str, Any], read: Read) -> float:
    """The weight of the whole row, read as that of any other."""
    if "weight" not in row:
        return 1.0
    weighed = read({"text": "", "weight": row["weight"]}, "text")
    assert isinstance(weighed, Text)
    return weighed.weight
