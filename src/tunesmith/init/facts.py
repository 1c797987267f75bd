"""What the rows of a data source are like, as far as it decides how to train on them.

All rows are read and understood, as training would, so what is wrong with one is said here in the same words; the
lengths in tokens are those of a random sample.
"""

import hashlib
import json
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from tunesmith.data.columns import ANSWERS, guessed_columns, named_column, question_columns
from tunesmith.data.formats import FormatOptions, Task, detect, parse_rows
from tunesmith.data.messages import TurnOptions, names_in
from tunesmith.data.tokenize import BATCH_ROWS, Counts, EncodeOptions, Encoder
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation, Judged, Pair, Row, Text, TrainOn

Kind = Literal["conversation", "pair", "text", "tokens", "preference", "judged"]
SAMPLE = 5_000
MOST_LABELS = 200
"""With more different answers than that, they are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFacts:
    """All rows of a source, in numbers.

    `kind`: a conversation, a pair of texts, one text, or tokens; two answers of which one is preferred, or a judged
    answer. `good` counts the answers that are judged good. `separate`: rows say what of them is the prompt.
    `answers` is the most assistant turns of a row; `tools` counts rows with tools or calls of them; `json_answers` is
    the share of last answers that are a JSON object or list; `labels` counts each different last answer, the most
    frequent first, and is empty where there are more than MOST_LABELS.
    """

    rows: int
    format: str
    kind: Kind
    separate: bool = False
    roles: tuple[str, ...] = ()
    answers: int = 0
    duplicates: int = 0
    tools: int = 0
    json_answers: float = 0.0
    labels: tuple[tuple[str, int], ...] = ()
    good: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of sampled examples, ascending, and the share of them that is trained on; `rows` stand for all. Of pairs,
    each answer with its prompt is one."""

    sizes: tuple[int, ...]
    rows: int
    supervised: float

    def share(self, part: float) -> int:
        """The length that `part` of the rows do not exceed."""
        return self.sizes[min(len(self.sizes) - 1, max(0, int(part * len(self.sizes) + 0.999999) - 1))]

    @property
    def longest(self) -> int:
        return self.sizes[-1]

    @property
    def mean(self) -> float:
        return sum(self.sizes) / len(self.sizes)

    @property
    def sampled(self) -> bool:
        return len(self.sizes) < self.rows

    def over(self, length: int) -> int:
        """How many rows have more tokens than `length`; of a sample, about so many."""
        longer = len(self.sizes) - bisect_right(self.sizes, length)
        return round(longer * self.rows / len(self.sizes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What is known of the rows, and a random sample of them with their places."""

    facts: RowFacts
    sample: list[tuple[str, Row]]


@dataclass(kw_only=True, slots=True)
class _Tally:
    """What grows while rows are read."""

    rows: int = 0
    seen: set[bytes] = field(default_factory=set)
    roles: dict[str, None] = field(default_factory=dict)
    answers: int = 0
    tools: int = 0
    json_answers: int = 0
    good: int = 0
    labels: Counter[str] | None = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        self.rows += 1
        self.seen.add(hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=8).digest())
        self.good += isinstance(row, Judged) and row.good
        row = answers_of(row)[0]
        if isinstance(row, Conversation):
            self.roles |= dict.fromkeys(message.role for message in row.messages)
            self.answers = max(self.answers, sum(message.role == "assistant" for message in row.messages))
            self.tools += bool(row.tools) or any("tool_calls" in message.fields for message in row.messages)
        answer = _answer(row)
        self.json_answers += _is_json(answer)
        if self.labels is not None:
            self.labels[answer.strip()] += 1
            self.labels = None if len(self.labels) > MOST_LABELS else self.labels


def look(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    columns: Mapping[str, str],
    template: str | None = None,
    task: Task = "supervised",
) -> Survey:
    """Reads all of `rows`, (place, row) pairs, as of `task`. `template` is the source of the chat template, which may
    know roles of its own. Raises TunesmithError, with the place, for a row that can't be trained on or has another
    shape than the first."""
    options = FormatOptions(columns=columns, turns=TurnOptions(known_roles=names_in(template)), task=task)
    tally, dice = _Tally(), random.Random(0)
    sample: list[tuple[str, Row]] = []
    names: list[str] = []
    for place, row in parse_rows(_with_format(rows, options, names), options):
        tally.add(row)
        if len(sample) < SAMPLE:
            sample.append((place, row))
        elif (at := dice.randrange(tally.rows)) < SAMPLE:
            sample[at] = place, row
    if not sample:
        raise TunesmithError("the data set is empty")
    first = answers_of(sample[0][1])[0]
    prompt = (
        first.prompt_length if isinstance(first, Conversation) else first.prompt if isinstance(first, Text) else None
    )
    kind: Kind = "conversation" if isinstance(first, Conversation) else "tokens"
    if isinstance(first, Text):
        kind = "text" if first.prompt is None else "pair"
    if task != "supervised":
        kind = "preference" if task == "pairs" else "judged"
    facts = RowFacts(
        rows=tally.rows,
        format=names[0],
        kind=kind,
        separate=prompt is not None,
        roles=tuple(tally.roles),
        answers=tally.answers,
        duplicates=tally.rows - len(tally.seen),
        tools=tally.tools,
        json_answers=tally.json_answers / tally.rows,
        labels=tuple(tally.labels.most_common()) if tally.labels is not None else (),
        good=tally.good,
    )
    return Survey(facts=facts, sample=sample)


def measure(survey: Survey, tokenizer: Any, train_on: TrainOn | None, template_kwargs: Mapping[str, Any]) -> Lengths:
    """The lengths of the sampled rows under the tokenizer's chat template. Raises TunesmithError, with the place, for a
    row that the template refuses."""
    options = EncodeOptions(train_on=train_on, max_length=None, template_kwargs=template_kwargs)
    encoder, counts, sizes = Encoder(tokenizer, options), Counts(), list[int]()
    rest = iter((place, answer) for place, row in survey.sample for answer in answers_of(row))
    while part := list(islice(rest, BATCH_ROWS)):
        sizes += [len(example.input_ids) for example in encoder.encode(part, counts)]
    if not sizes:
        reason, (count, places) = next(iter(counts.dropped.items()))
        raise TunesmithError(f"no example is left of {counts.rows} rows ({reason}: {count}, {places[0]}...)")
    share = counts.supervised / max(1, counts.tokens)
    answers = survey.facts.rows * (2 if survey.facts.kind == "preference" else 1)
    return Lengths(sizes=tuple(sorted(sizes)), rows=answers, supervised=share)


def answers_of(row: Row) -> list[Row]:
    """A row as the supervised rows that its answers would be, each behind the prompt: two of a pair, the better one
    first."""
    if isinstance(row, Pair):
        return [row.chosen, row.rejected]
    return [row.answer if isinstance(row, Judged) else row]


def proposed_columns(row: Mapping[str, Any], *, templated: bool) -> dict[str, str] | None:
    """A `columns` setting that makes a known format of a row: empty when it has one already, None when its names say
    nothing. `templated`: the model has a chat template, so a question and an answer become two turns of it.

    Raises TunesmithError for preference pairs, whose better side is the user's to choose.
    """
    try:
        known: str | None = detect(row, FormatOptions())
    except TunesmithError:
        if row.get("chosen") is not None and row.get("rejected") is not None:
            raise
        known = None
    if known == "text" and (answer := named_column(row, ANSWERS)) is not None:
        return question_columns(row, "text", answer, templated=templated)
    if known is not None:
        return {}
    return guessed_columns(row, templated=templated)


def _with_format(
    rows: Iterable[tuple[str, Mapping[str, Any]]], options: FormatOptions, names: list[str]
) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """`rows`, and into `names` the format of the first."""
    for place, row in rows:
        if not names:
            try:
                names.append(detect(row, options))
            except TunesmithError as error:
                raise TunesmithError(f"{place}: {error}") from error
        yield place, row


def _answer(row: Row) -> str:
    """The last answer in a row; empty where there is none, or none in text."""
    if isinstance(row, Text):
        return "" if row.prompt is None else row.text[len(row.prompt) :]
    if isinstance(row, Conversation) and row.messages[-1].role == "assistant":
        content = row.messages[-1].fields.get("content")
        return content if isinstance(content, str) else ""
    return ""


def _is_json(answer: str) -> bool:
    if not answer.strip().startswith(("{", "[")):
        return False
    try:
        json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return True
