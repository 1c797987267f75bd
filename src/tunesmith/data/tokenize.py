"""Rows to examples: token ids and labels from one tokenization of one text.

The mask follows characters: a token is supervised when all its characters lie in a supervised span. A token that
straddles a boundary is not, because the model would have had to generate characters of its own prompt.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal, TypeAlias

import numpy as np

from tunesmith.data.arrow import FlatExamples
from tunesmith.data.chat import ChatTemplate, Rendered, Span, end_ids, render
from tunesmith.data.formats import check_characters
from tunesmith.data.sandbox import TooLong, time_limit
from tunesmith.data.skipped import BadRow, NotTheRow, Place
from tunesmith.errors import TunesmithError
from tunesmith.types import IGNORE_INDEX, Conversation, Example, Row, Tokens, TrainOn

RenderedRow: TypeAlias = "tuple[str, Rendered | Tokens | BadRow]"
BATCH_ROWS = 1000
MOST_CHARACTERS = 10_000_000
"""Of a row: its tokens take a hundred times the memory."""
NAMED_ROWS = 5
"""How many dropped rows a report names for each reason."""
NAMED_REASONS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions:
    """What is supervised and what happens to examples over `max_length` tokens. See SFTConfig for the fields.

    `skip_bad`: a row that can't be made an example is left out and counted rather than an error.
    """

    train_on: TrainOn | None = None
    max_length: int | None = 1024
    overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    truncate_prompt: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    skip_bad: bool = False


@dataclass(kw_only=True, slots=True)
class Counts:
    """What became of the rows; grows while a data set is prepared.

    `dropped` names the reason, then how many rows and the places of the first few. `truncated` counts the rows
    that were cut, and `lost_tokens` what was cut off. `skipped` counts the bad rows among the dropped; `bad` has those
    that have not been taken yet, with their places.

    `ends`: how many examples have this end token as their last supervised token; a model tuned on data without any
    never stops. `stops`: how many supervised turns and texts end with it; generation is to stop at each of them.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    lost_tokens: int = 0
    dropped: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    stops: dict[int, int] = field(default_factory=dict)
    skipped: int = 0
    bad: list[tuple[str, BadRow]] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Counts":
        """What `dataclasses.asdict` gave, after a way through JSON, which knows only text as keys and no tuples."""
        dropped = {reason: (count, places) for reason, (count, places) in values["dropped"].items()}
        tokens = {name: {int(token): count for token, count in values[name].items()} for name in ("ends", "stops")}
        return cls(**{**values, "dropped": dropped, **tokens})

    def update(self, part: "Counts") -> None:
        """Add the counts of later rows."""
        self.bad += part.bad
        for name in ("rows", "examples", "tokens", "supervised", "truncated", "lost_tokens", "skipped"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for reason, (count, places) in part.dropped.items():
            self.drop(reason, *places, count=count)
        for mine, theirs in ((self.ends, part.ends), (self.stops, part.stops)):
            for token, count in theirs.items():
                mine[token] = mine.get(token, 0) + count

    def drop(self, reason: str, *places: str, count: int = 1) -> None:
        known, named = self.dropped.get(reason, (0, []))
        self.dropped[reason] = (known + count, [*named, *places][:NAMED_ROWS])

    def skip(self, place: str, bad: BadRow) -> None:
        """Count a bad row. There are as many different reasons as rows can be wrong; those after the first few are
        counted together."""
        reason = f"bad row: {bad.kind}"
        many = sum(known.startswith("bad row: ") for known in self.dropped) >= NAMED_REASONS
        self.skipped += 1
        self.drop(reason if reason in self.dropped or not many else "bad row: other reasons", str(place))
        self.bad.append((place, bad))

    def take_bad(self) -> list[tuple[str, BadRow]]:
        """The bad rows since the last time this was asked."""
        bad, self.bad = self.bad, []
        return bad


class Encoder:
    """Rows to examples with one tokenizer and one set of options."""

    def __init__(self, tokenizer: Any, options: EncodeOptions) -> None:
        if tokenizer.eos_token_id is None:
            raise TunesmithError("the tokenizer has no end-of-sequence token; set `eos_token` to one of its tokens")
        self.tokenizer, self.options = tokenizer, options
        self.end_ids, self._eos, self._bos = end_ids(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id
        self._backend = untrimmed(tokenizer)
        self._blanks: dict[int, bool] = {}

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.options.template_kwargs)

    def encode(self, rows: Sequence[tuple[str, Row | BadRow]], counts: Counts) -> list[Example]:
        """Examples of `rows`, pairs of a place ("row 7") and a row. Adds to `counts`; errors name the place."""
        rendered = self.render(rows)
        examples = self.examples(rendered, self.tokenize(rendered), counts)
        self.count(FlatExamples.of(examples), counts)
        return examples

    def render(self, rows: Sequence[tuple[str, Row | BadRow]]) -> list[RenderedRow]:
        """First step: the text of each row and what is supervised of it."""
        with time_limit():
            return [(place, self._at(place, self._rendered, row)) for place, row in rows]

    def tokenize(self, rendered: Sequence[RenderedRow]) -> Iterator[Any]:
        """Second step, all outside of Python's lock: the encoding of each text, in order."""
        texts = [item for _, item in rendered if isinstance(item, Rendered)]
        # Text that a template rendered already holds its special tokens.
        kinds = [(item.special_tokens, item.whole) for item in texts]
        batches = {}
        for added, whole in {*kinds}:
            encode = self._backend.encode_batch_fast if whole else self._backend.encode_batch
            chosen = [item.text for item, kind in zip(texts, kinds, strict=True) if kind == (added, whole)]
            batches[added, whole] = iter(encode(chosen, add_special_tokens=added))
        return (next(batches[kind]) for kind in kinds)

    def examples(self, rendered: Sequence[RenderedRow], encodings: Iterator[Any], counts: Counts) -> list[Example]:
        """Third step: ids, labels and weights within max_length."""
        examples: list[Example] = []
        for place, item in rendered:
            counts.rows += 1
            example: Example | BadRow
            prompt = 0
            if isinstance(item, Rendered):
                example, prompt = self._example(item, next(encodings))
            else:
                example = item if isinstance(item, BadRow) else self._at(place, self._of_tokens, item)
            if isinstance(example, BadRow):
                counts.skip(place, example)
                continue
            pieces = self._at(place, self._fit, example, prompt)
            lost = len(example.input_ids) - sum(len(piece.input_ids) for piece in pieces)
            if not pieces:
                counts.drop(self._reason(example), place)
            elif lost:
                counts.truncated += 1
                counts.lost_tokens += lost
            examples += pieces
        return examples

    def _at(self, place: str, step: Any, *args: Any) -> Any:
        """The result of a step for a row, or a BadRow. Raises TunesmithError for what must not be skipped."""
        try:
            return step(*args)
        except TunesmithError as error:
            if self.options.skip_bad and _is_of_the_row(error):
                return BadRow(reason=str(error), content=place.row if isinstance(place, Place) else None)
            raise TunesmithError(f"{place}: {error}") from error

    def _rendered(self, row: Row | BadRow) -> Rendered | Tokens | BadRow:
        if isinstance(row, BadRow):
            return row
        rendered = self._text(row)
        if isinstance(rendered, Rendered):
            if len(rendered.text) > MOST_CHARACTERS:
                size = f"a text of {len(rendered.text):,} characters"
                raise TunesmithError(f"{size}; at most {MOST_CHARACTERS:,} are read, divide it")
            check_characters(rendered.text)
        return rendered

    def _text(self, row: Row) -> Rendered | Tokens:
        train_on = self.options.train_on
        if isinstance(row, Tokens):
            if train_on not in (None, "all"):
                raise NotTheRow(f"train_on: {train_on} needs text; this row is tokens, whose `labels` say it")
            return row
        if isinstance(row, Conversation):
            return render(row, self.template, train_on or ("all" if row.prompt_length is None else "completion"))
        if train_on in ("assistant", "last_assistant"):
            raise NotTheRow(f"train_on: {train_on} needs conversations; this row is plain text")
        if train_on == "completion" and row.prompt is None:
            raise NotTheRow("train_on: completion needs rows with 'prompt' and 'completion'; this row is one text")
        start = 0 if row.prompt is None or train_on == "all" else len(row.prompt)
        wanted = row.weight > 0 and (row.text.strip() or row.prompt is not None)
        spans = (Span(start=start, stop=len(row.text), weight=row.weight),) if wanted else ()
        prompt = None if row.prompt is None else len(row.prompt)
        return Rendered(text=row.text, spans=spans, prompt=prompt, special_tokens=True)

    def _example(self, rendered: Rendered, encoding: Any) -> tuple[Example, int]:
        """The example of one encoding, and how many of its tokens are the prompt of a prompt-completion row."""
        ids = encoding.ids
        labels, weights = [IGNORE_INDEX] * len(ids), None
        if any(span.weight != 1.0 for span in rendered.spans):
            weights = [0.0] * len(ids)
        for span in rendered.spans:
            # The tokenizer's special tokens at the ends have no characters.
            first, last = (0, len(ids)) if rendered.whole else token_range(encoding, span.start, span.stop)
            labels[first:last] = ids[first:last]
            if weights is not None:
                weights[first:last] = [span.weight] * (last - first)
        prompt = token_range(encoding, 0, rendered.prompt)[1] if rendered.prompt else 0
        columns: list[list[Any]] = [ids, labels] if weights is None else [ids, labels, weights]
        added = encoding.special_tokens_mask if rendered.special_tokens else [0] * len(ids)
        # Without a BOS or an EOS that the tokenizer added though the text has its own.
        front = int(ids[:2] == [self._bos] * 2 and added[0] == 1)
        back = int(ids[-2:] == [self._eos] * 2 and added[-1] == 1)
        for column in columns if front or back else ():
            column[:] = column[front : len(column) - back]
        if rendered.spans and rendered.closed:
            self._close(columns, rendered.spans[-1].weight, supervise=added[-1:] == [1] and not back)
        return Example(input_ids=ids, labels=labels, weights=weights), prompt - front

    def _close(self, columns: list[list[Any]], weight: float, *, supervise: bool) -> None:
        """Append a supervised end-of-sequence token to ids, labels and weights that have no end token.

        One that the tokenizer put there is supervised with `supervise`; one of a template is what its turns say.
        """
        ids, labels = columns[:2]
        end = self._end_token(ids)
        if end is None or (labels[end] == IGNORE_INDEX and {*labels[end:]} != {IGNORE_INDEX}):
            for column, value in zip(columns, (self._eos, self._eos, weight), strict=False):
                column.append(value)  # there is none, or only the header of an empty turn
        elif supervise:
            for column, value in zip(columns[1:], (ids[end], weight), strict=False):
                column[end] = value

    def _end_token(self, tokens: Sequence[int]) -> int | None:
        """The place of the end token that `tokens` end with, white space after it aside; None without one."""
        for i in range(len(tokens) - 1, max(-1, len(tokens) - 4), -1):
            if tokens[i] in self.end_ids:
                return i
            if not self._is_blank(tokens[i]):
                return None
        return None

    def _is_blank(self, token: int) -> bool:
        if token not in self._blanks:
            self._blanks[token] = token != IGNORE_INDEX and not self.tokenizer.decode([token]).strip()
        return self._blanks[token]

    def count(self, examples: FlatExamples, counts: Counts) -> None:
        """Add `examples` to `counts`."""
        labels, ends = examples.labels, np.cumsum(examples.lengths)
        supervised = labels != IGNORE_INDEX
        counts.examples += len(ends)
        counts.tokens += len(labels)
        counts.supervised += int(supervised.sum())
        followed = np.append(supervised[1:], False)
        followed[ends - 1] = False
        closing = np.flatnonzero(supervised & ~followed)
        lasts = {*(np.searchsorted(closing, ends) - 1).tolist()}  # the last place of each example
        for i, place in enumerate(closing.tolist()):
            tail = labels[max(0, place - 2) : place + 1].tolist()
            if (end := self._end_token(tail)) is not None:
                counts.stops[tail[end]] = counts.stops.get(tail[end], 0) + 1
                if i in lasts:
                    counts.ends[tail[end]] = counts.ends.get(tail[end], 0) + 1

    def _of_tokens(self, row: Tokens) -> Example:
        """The row as its owner tokenized it."""
        wrong = next((token for token in row.input_ids if not 0 <= token < len(self.tokenizer)), None)
        if wrong is not None:
            raise TunesmithError(
                f"'input_ids' has {wrong}, but the tokenizer has {len(self.tokenizer)} tokens; was it another one?"
            )
        labels = list(row.input_ids if row.labels is None else row.labels)
        if row.weight == 0:
            labels = [IGNORE_INDEX] * len(labels)
        weights = None if row.weight in (0.0, 1.0) else [row.weight] * len(labels)
        return Example(input_ids=list(row.input_ids), labels=labels, weights=weights)

    def _fit(self, example: Example, prompt: int) -> list[Example]:
        """`example` within max_length: one, several (split), or none."""
        limit, size = self.options.max_length, len(example.input_ids)
        pieces = [example]
        if limit is not None and size > limit:
            if self.options.overlong == "error":
                raise NotTheRow(f"{size} tokens, more than max_length {limit} (overlong: error)")
            pieces = [] if self.options.overlong == "drop" else self._shorten(example, prompt, limit)
        return [piece for piece in pieces if _supervised(piece)]

    def _shorten(self, example: Example, prompt: int, limit: int) -> list[Example]:
        size = len(example.input_ids)
        if self.options.overlong == "split":
            return [_cut(example, start, start + limit) for start in range(0, size, limit)]
        bos = int(example.input_ids[0] == self._bos)
        excess = size - limit
        if self.options.truncate_prompt and prompt > excess + bos:
            return [_cut(example, bos + excess, size, head=bos)]
        return [_cut(example, 0, limit)]

    def _reason(self, example: Example) -> str:
        limit = self.options.max_length
        if not _supervised(example):
            return "nothing in it to train on"
        if self.options.overlong == "drop":
            return f"longer than max_length {limit}"
        return f"no supervised token within max_length {limit}"


def _supervised(example: Example) -> bool:
    """Whether a token has a label that counts: nothing predicts the first. Most examples show it at their end."""
    labels = example.labels
    return any(labels[i] != IGNORE_INDEX for i in range(len(labels) - 1, 0, -1))


def untrimmed(tokenizer: Any) -> Any:
    """The tokenizer's backend, with offsets that include the white space at a token's ends.

    Byte-level tokenizers can leave it out of the offsets they report, which would hide that a token straddles a
    boundary.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TunesmithError(
            f"{type(tokenizer).__name__} has no `tokenizers` backend, which says where each token's characters are; "
            "use the fast tokenizer of this model"
        )
    backend = Tokenizer.from_str(backend.to_str())
    if (processor := backend.post_processor) is not None:
        state = json.loads(processor.__getstate__())
        _keep_offsets(state)
        processor.__setstate__(json.dumps(state).encode())
        backend.post_processor = processor
    backend.encode_special_tokens = tokenizer.split_special_tokens
    backend.no_truncation()
    backend.no_padding()
    return backend


def _keep_offsets(part: Any) -> None:
    """Turn `trim_offsets` off in a post-processor, and in those that it is made of."""
    if isinstance(part, dict):
        if "trim_offsets" in part:
            part["trim_offsets"] = False
        for processor in part.get("processors", ()):
            _keep_offsets(processor)


def token_range(encoding: Any, start: int, stop: int) -> tuple[int, int]:
    """The tokens [first, last) all of whose characters lie in [start, stop)."""
    while start < stop and encoding.char_to_token(start) is None:
        start += 1  # a character that the normalizer dropped
    while stop > start and encoding.char_to_token(stop - 1) is None:
        stop -= 1
    if start >= stop:
        return 0, 0
    first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
    if encoding.token_to_chars(first)[0] < start:
        first += 1
    size = len(encoding.ids)
    # Several tokens share a character whose bytes were split; `last` is the first of them.
    while last < size and (chars := encoding.token_to_chars(last)) is not None and chars[1] <= stop and chars[0] < stop:
        last += 1
    return first, max(first, last)


def _is_of_the_row(error: BaseException) -> bool:
    """Whether the row is at fault. A template that ran too long left no time for the rows after it."""
    if isinstance(error, NotTheRow | TooLong):
        return False
    return error.__cause__ is None or _is_of_the_row(error.__cause__)


def _cut(example: Example, start: int, stop: int, head: int = 0) -> Example:
    """Tokens [start, stop) of `example`, after its first `head` ones."""

    def cut(values: list[Any]) -> list[Any]:
        return values[:head] + values[start:stop]

    weights = None if example.weights is None else cut(example.weights)
    return Example(input_ids=cut(example.input_ids), labels=cut(example.labels), weights=weights)


def encoded(rows: Iterator[tuple[str, Row | BadRow]], encoder: Encoder, counts: Counts) -> Iterator[FlatExamples]:
    """Examples in batches: one is tokenized while the next is rendered."""

    def finished(rendered: list[RenderedRow], encodings: "Future[Iterator[Any]]") -> FlatExamples:
        examples = FlatExamples.of(encoder.examples(rendered, encodings.result(), counts))
        encoder.count(examples, counts)
        return examples

    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[list[RenderedRow], Future[Iterator[Any]]]] = []
        while part := list(islice(rows, BATCH_ROWS)):
            rendered = encoder.render(part)
            waiting.append((rendered, pool.submit(encoder.tokenize, rendered)))
            if len(waiting) > 1:
                yield finished(*waiting.pop(0))
        for batch in waiting:
            yield finished(*batch)
