"""From what is known of rows, model and machine to how to train: for what, on what, by which method, in which steps.

Everything here is a function of facts: nothing is read, loaded or asked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from tunesmith.errors import TunesmithError
from tunesmith.init.facts import Lengths, RowFacts
from tunesmith.text import counted, verb
from tunesmith.types import TrainOn

Goal = Literal["chat", "instruct", "classify", "tools", "json", "continue", "dpo", "kto"]
Method = Literal["lora", "full", "8bit", "4bit"]
GOALS: dict[Goal, str] = {
    "chat": "conversations of several turns",
    "instruct": "one question, one answer",
    "classify": "one of a few labels as the answer",
    "tools": "calls of tools",
    "json": "JSON as the answer",
    "continue": "plain text, as in pretraining",
    "dpo": "pairs of a better and a worse answer",
    "kto": "answers that are good or bad",
}
PREFERENCES: dict[str, Goal] = {"preference": "dpo", "judged": "kto"}
"""What rows with a preference are for, by their kind."""
METHODS: dict[Method, str] = {
    "lora": "adapters beside frozen weights",
    "full": "all weights",
    "8bit": "adapters beside weights in 8 bits",
    "4bit": "adapters beside weights in 4 bits",
}

SHORTEST = 64
"""Lengths are multiples of it."""
FEW_LABELS, LABEL_WORDS = 50, 6
MOSTLY = 0.9
STEP_ROWS = ((500, 4), (2_000, 8), (20_000, 16), (100_000, 32))
"""Up to this many rows of data, this many rows a step: small data needs steps, large data allows quieter gradients."""
MOST_STEP_ROWS = 64
EPOCHS = ((300, 5), (2_000, 3), (20_000, 2))
PREFERENCE_EPOCHS = ((300, 3), (2_000, 2))
HELD_OUT = ((49, 0.0), (200, 0.1), (10_000, 0.05))
MOST_HELD_OUT = 500
PACK, PACK_ROWS = 1024, 1_000
"""The least tokens of a pack, and the number of rows, short beside it, from which packing pays."""
SHORT, LEAST_PACKS = 4, 4
LEAST_STEPS = 20
"""An epoch of packs has at least this many steps, if it can."""


Room = Callable[[int, int], bool]
"""Of rows and tokens: whether memory has room for micro-batches of that many rows of that many tokens."""
Planner = Callable[[Method, bool], Room]
"""The room beside a model by this method, with or without gradient checkpointing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """`context`: the most tokens that the model has positions for. `note`: what to say of it in the recipe.
    `template` is what the run is to take for a chat template where the model has none, or another is wanted."""

    name: str
    parameters: int
    context: int | None = None
    note: str = ""
    template: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What somebody decided, or a default that was taken for them. `columns`: ours to the data's."""

    data: tuple[str, ...]
    output: str
    goal: Goal
    method: Method | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The way to train that the machine's memory allows. `rows`: of `length` tokens at the most, in a micro-batch.
    `fits` False: nothing does, and this is the least."""

    method: Method
    length: int
    rows: int
    checkpointing: bool
    fits: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that settings are decided by. `device` is a name for people, with its memory."""

    wanted: Wanted
    rows: RowFacts
    lengths: Lengths
    model: ModelFacts
    device: str
    fit: Fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How the rows are gone through: a step has `micro` times `accumulation` rows, or packs of rows."""

    train_rows: int
    held_out: float
    epochs: int
    packing: bool
    micro: int
    accumulation: int
    steps: int


# What the rows are for


def guess_goal(rows: RowFacts) -> tuple[Goal, str]:
    """What rows like these are mostly trained for, and what shows it."""
    if rows.kind == "preference":
        return "dpo", "each row has a better and a worse answer"
    if rows.kind == "judged":
        return "kto", f"{rows.good:,} of {rows.rows:,} answers are labelled good"
    if rows.kind in ("text", "tokens"):
        return "continue", "the rows are " + ("plain text" if rows.kind == "text" else "tokens")
    if rows.tools:
        return "tools", f"{rows.tools:,} of {rows.rows:,} rows have tools or calls of them"
    if rows.json_answers >= MOSTLY:
        return "json", f"{rows.json_answers:.0%} of the answers are JSON"
    if labels := _few_labels(rows):
        return "classify", f"there are only {labels} different answers in {rows.rows:,} rows"
    if rows.answers > 1:
        return "chat", f"conversations have up to {rows.answers} answers"
    return "instruct", "each row has one answer"


def _few_labels(rows: RowFacts) -> int:
    """How many labels there are, if the answers look like labels: few, short, each used several times."""
    count = len(rows.labels)
    if not 2 <= count <= min(FEW_LABELS, rows.rows // 4):
        return 0
    return count if all(len(label.split()) <= LABEL_WORDS and len(label) <= 60 for label, _ in rows.labels) else 0


def check_goal(goal: Goal, rows: RowFacts) -> None:
    """Raises TunesmithError for a goal that rows like these can't serve."""
    if goal in PREFERENCES.values() and PREFERENCES.get(rows.kind) != goal:
        wanted = "'chosen' and 'rejected'" if goal == "dpo" else "'label', true or false, beside prompt and answer"
        raise TunesmithError(
            f"--goal {goal} needs rows with {wanted}; write --goal {guess_goal(rows)[0]}, or leave it out, or say "
            f"which columns are which: --columns {'chosen=good,rejected=bad' if goal == 'dpo' else 'label=is_good'}"
        )
    if goal != "continue" and rows.kind == "text":
        raise TunesmithError(
            f"--goal {goal} needs questions and answers, but the rows are plain text (format {rows.format!r}); write "
            "--goal continue, or say which columns are which: --columns instruction=question,output=answer"
        )
    if goal == "tools" and not rows.tools:
        raise TunesmithError(
            "--goal tools needs rows with `tools` or messages with `tool_calls`, and none of these rows has any; "
            f"write --goal {guess_goal(rows)[0]}, or leave it out"
        )


def train_on(goal: Goal, rows: RowFacts) -> tuple[TrainOn | None, str]:
    """Which part of a row is supervised, and why; None for rows whose own labels say it, or their preference."""
    if rows.kind == "tokens" or rows.kind in PREFERENCES:
        return None, ""
    if goal == "continue" or rows.kind == "text":
        return "all", "the whole text is learned"
    if rows.separate:
        return "completion", f"the answers alone: {rows.format} rows say which part is the prompt"
    if goal in ("classify", "json"):
        return "last_assistant", "the last answer alone is the result"
    more = ", calls of tools among them; what tools return is not learned" if rows.tools else ""
    return "assistant", f"every turn of the assistant{more}, and nothing of what is asked"


# What fits


def wanted_length(goal: Goal, rows: RowFacts, lengths: Lengths, model: ModelFacts) -> int:
    """The `max_length` that the rows ask for: all of them, unless a few are far longer than the others."""
    tail, room = _rounded(lengths.share(0.99)), model.context
    if goal == "continue":
        length = max(SHORTEST, min(PACK, _rounded(ceil(lengths.mean * lengths.rows / LEAST_PACKS))))
    elif goal in ("json", "tools", "classify"):
        length = _rounded(lengths.longest) if lengths.longest <= 4 * tail else tail
    else:
        length = _rounded(lengths.longest) if lengths.longest <= 2 * tail else tail
    return min(length, room) if room else length


def _rounded(length: int) -> int:
    return SHORTEST * ceil(length / SHORTEST)


def step_rows(rows: int) -> int:
    return next((size for most, size in STEP_ROWS if rows <= most), MOST_STEP_ROWS)


def fit(planner: Planner, methods: Sequence[Method], length: int, rows: int) -> Fit:
    """The first of `methods`, without gradient checkpointing if that can be, that has room for examples of `length`
    tokens; with micro-batches of up to `rows`, a power of two. Where none has, the last with the length that it has
    room for."""
    for method in methods:
        for checkpointing in (False, True):
            room, micro = planner(method, checkpointing), rows
            while micro and not room(micro, length):
                micro //= 2
            if micro:
                return Fit(method=method, length=length, rows=micro, checkpointing=checkpointing)
    shorter = _longest(planner(methods[-1], True), length)
    return Fit(method=methods[-1], length=shorter or SHORTEST, rows=1, checkpointing=True, fits=bool(shorter))


def _longest(room: Room, length: int) -> int:
    """The most tokens, in steps of SHORTEST below `length`, that one row may have; 0 where not even one step fits."""
    low, high = 0, ceil(length / SHORTEST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if room(1, SHORTEST * middle) else (low, middle)
    return SHORTEST * low


def schedule(facts: Facts) -> Schedule:
    """Steps and epochs for so many rows."""
    total, lengths, length = facts.rows.rows, facts.lengths, facts.fit.length
    share = next((share for most, share in HELD_OUT if total <= most), float(f"{MOST_HELD_OUT / total:.1g}"))
    train = total - round(share * total)
    table = PREFERENCE_EPOCHS if facts.rows.kind in PREFERENCES else EPOCHS
    epochs = next((count for most, count in table if train <= most), 1)
    packing, units, size = packs(facts), train, step_rows(train)
    if packing:
        units = max(1, ceil(train * lengths.mean / length))
        if facts.wanted.goal != "continue":
            size = round(size * lengths.mean / length)  # as many rows as without packs
        size = max(1, min(size, units // LEAST_STEPS))
    micro = min(size, facts.fit.rows)
    accumulation = ceil(size / micro)
    return Schedule(
        train_rows=train,
        held_out=share,
        epochs=epochs,
        packing=packing,
        micro=micro,
        accumulation=accumulation,
        steps=epochs * ceil(units / (micro * accumulation)),
    )


def pack_length(goal: Goal, rows: RowFacts, lengths: Lengths, model: ModelFacts) -> int | None:
    """The size of packs, where rows are short and many; None where each is to stand alone."""
    length = wanted_length(goal, rows, lengths, model)
    if goal == "continue":
        return length
    pack = min(max(length, PACK), model.context or PACK)
    is_short = rows.rows >= PACK_ROWS and lengths.mean * SHORT <= pack and lengths.longest <= pack
    return pack if is_short and goal != "classify" and goal not in PREFERENCES.values() else None


def packs(facts: Facts) -> bool:
    """Whether rows are to share packs; not where memory has no room for packs that are worth it."""
    goal, length = facts.wanted.goal, facts.fit.length
    if goal == "continue":
        return True
    wanted = pack_length(goal, facts.rows, facts.lengths, facts.model)
    return wanted is not None and facts.lengths.longest <= length and facts.lengths.mean * SHORT <= length


def notes_on(facts: Facts) -> list[str]:
    """What somebody should know before they train."""
    rows, lengths, notes = facts.rows, facts.lengths, []
    if rows.duplicates:
        copies = verb(rows.duplicates, "is an exact copy of another", "are exact copies of others")
        notes.append(f"{counted(rows.duplicates, 'row')} {copies}; what is held out may be among them")
    if rows.kind in PREFERENCES:
        notes.append(
            "preferences refine a model that answers already: --model takes the folder of a run of `tunesmith train`"
        )
    if facts.wanted.goal == "classify" and rows.labels:
        most = ", ".join(f"{label or '(empty)'} {count / rows.rows:.0%}" for label, count in rows.labels[:6])
        notes.append(f"{len(rows.labels):,} labels: {most}{', ...' if len(rows.labels) > 6 else ''}")
    if lengths.sampled:
        notes.append(f"lengths are those of {len(lengths.sizes):,} rows drawn at random; `tunesmith check` takes all")
    if not facts.fit.fits:
        notes.append(
            f"{facts.model.name} is planned not to fit into {facts.device}, even by {facts.fit.method}; take a smaller "
            "model, or another machine (`tunesmith plan` tells)"
        )
    return notes
