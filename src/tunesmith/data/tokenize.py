"""Rows to examples: token ids and labels from one tokenization of one text.

The mask follows characters: a token is supervised when all its characters lie in a supervised span. Where a token would
straddle the beginning of a span, the text is cut there, as inference cuts it: the model reads the tokens of the prompt,
and generates tokens of its own.

    "Sentiment: " + "positive"    Sentiment | : | _positive   ->   Sentiment | : | _ | positive
                                                                                      ~~~~~~~~
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, islice, pairwise
from typing import Any, Literal, TypeAlias

import numpy as np

from tunesmith.data.arrow import FlatExamples
from tunesmith.data.chat import Rendering, RenderOptions, render
from tunesmith.data.formats import check_characters
from tunesmith.data.notes import UNANSWERED, notes_on_text
from tunesmith.data.prefix import paths, share_prefixes
from tunesmith.data.sandbox import TooLong, time_limit
from tunesmith.data.skipped import BadRow, NotTheRow, Place
from tunesmith.data.template import ChatTemplate, end_ids
from tunesmith.errors import TunesmithError
from tunesmith.types import IGNORE_INDEX, Conversation, Example, Judged, Pair, Rendered, Row, Span, Text, Tokens

RenderedRow: TypeAlias = "tuple[str, Rendering | Tokens | BadRow]"
BATCH_ROWS = 1000
MOST_CHARACTERS = 10_000_000
"""Of a row: its tokens take a hundred times the memory."""
NAMED_ROWS = 5
"""How many dropped rows a report names for each reason."""
NAMED_REASONS = 20
BARE = {"prepend_scheme": "never", "add_prefix_space": False}
NAMED = ("dropped", "notes")
"""The counts that name the first rows."""
TWO = ("answer_tokens", "longer", "judged")
"""The counts that are two numbers."""
EQUAL = "both answers are the same"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions(RenderOptions):
    """What is supervised and what happens to examples over `max_length` tokens. See SFTConfig for the fields.

    `share`: the documents of one conversation are one example, in which they share what they begin with. `ranked`: the
    sides of a pair are whole texts, each with a label where it is scored, at its end. `skip_bad`: a row that
    can't be made an example is left out and counted rather than an error.
    """

    max_length: int | None = 1024
    overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    truncate_prompt: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    share: bool = True
    ranked: bool = False
    skip_bad: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers(Rendering):
    """The documents of answers that are compared or judged, one for each: the better answer first, or one alone.
    `score` and `weight` are those of the row."""

    score: float = 0.0
    weight: float = 1.0


@dataclass(kw_only=True, slots=True)
class Counts:
    """What became of the rows; grows while a data set is prepared.

    `dropped` names the reason, then how many rows and the places of the first few. `truncated` counts the rows
    that were cut, and `lost_tokens` what was cut off. `skipped` counts the bad rows among the dropped; `bad` has those
    that have not been taken yet, with their places.

    `notes` say of how many rows something is worth knowing, as `dropped` does. `arguments`: how many turns were
    rendered with these template arguments beside the run's, as JSON; "{}" for none.

    `ends`: how many examples have this end token as their last supervised token (and each of their documents, if they
    have several, an end token); a model tuned on data without any never stops. `stops`: how many supervised turns and
    texts end with it; generation is to stop at each of them.

    `pairs`: how many pairs there are; `answer_tokens` are the tokens of their better and of their worse answers,
    and `longer` says how many better and how many worse answers are the longer one of their pair. `judged`: how many
    answers are good, and how many bad.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    lost_tokens: int = 0
    dropped: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    notes: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    arguments: dict[str, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    stops: dict[int, int] = field(default_factory=dict)
    skipped: int = 0
    bad: list[tuple[str, BadRow]] = field(default_factory=list)
    pairs: int = 0
    answer_tokens: tuple[int, int] = (0, 0)
    longer: tuple[int, int] = (0, 0)
    judged: tuple[int, int] = (0, 0)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Counts":
        """What `dataclasses.asdict` gave, after a way through JSON, which knows only text as keys and no tuples."""
        named = {name: {key: (count, places) for key, (count, places) in values[name].items()} for name in NAMED}
        tokens = {name: {int(token): count for token, count in values[name].items()} for name in ("ends", "stops")}
        both = {name: tuple(values[name]) for name in TWO}
        return cls(**{**values, **named, **tokens, **both})

    def update(self, part: "Counts") -> None:
        """Add the counts of later rows."""
        self.bad += part.bad
        for name in ("rows", "examples", "tokens", "supervised", "truncated", "lost_tokens", "skipped", "pairs"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for name in TWO:
            self._add_two(name, getattr(part, name))
        for mine, theirs in ((self.dropped, part.dropped), (self.notes, part.notes)):
            for reason, (count, places) in theirs.items():
                _add(mine, reason, places, count)
        for own, others in ((self.ends, part.ends), (self.stops, part.stops)):
            for token, count in others.items():
                own[token] = own.get(token, 0) + count
        for arguments, count in part.arguments.items():
            self.arguments[arguments] = self.arguments.get(arguments, 0) + count

    def drop(self, reason: str, place: str) -> None:
        _add(self.dropped, reason, [place])

    def note_answers(self, sizes: Sequence[int], score: float) -> None:
        """Count a pair, or an answer that was judged, with so many tokens in each answer."""
        if len(sizes) == 1:
            self._add_two("judged", (int(score > 0), int(score < 0)))
            return
        better, worse = sizes
        self.pairs += 1
        self._add_two("answer_tokens", (better, worse))
        self._add_two("longer", (int(better > worse), int(worse > better)))

    def _add_two(self, name: str, numbers: Sequence[int]) -> None:
        setattr(self, name, tuple(mine + more for mine, more in zip(getattr(self, name), numbers, strict=True)))

    def note(self, rendering: Rendering, place: str) -> None:
        """Count what is worth knowing of a row."""
        for note in rendering.notes:
            _add(self.notes, note, [place])
        for arguments in rendering.arguments:
            key = json.dumps(dict(arguments), sort_keys=True)
            self.arguments[key] = self.arguments.get(key, 0) + 1

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


def _add(known: dict[str, tuple[int, list[str]]], reason: str, places: Sequence[str], count: int = 1) -> None:
    before, named = known.get(reason, (0, []))
    known[reason] = before + count, [*named, *map(str, places)][:NAMED_ROWS]


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
    def _bare(self) -> Any:
        """The backend for a text that goes on: it puts no space before it."""
        return without_prefix(self._backend)

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
        rendered: list[RenderedRow] = []
        with time_limit() as begin_anew:
            for place, row in rows:
                begin_anew()
                rendered.append((place, self._at(place, self._rendered, row)))
        return rendered

    def tokenize(self, rendered: Sequence[RenderedRow]) -> Iterator[Any]:
        """Second step, all outside of Python's lock: the encoding of each text, in order."""
        documents = [document for _, item in rendered if isinstance(item, Rendering) for document in item.documents]
        texts = [document for document in documents if not document.literal]
        # Text that a template rendered already holds its special tokens.
        kinds = [(item.special_tokens, item.whole) for item in texts]
        batches = {}
        for added, whole in {*kinds}:
            encode = self._backend.encode_batch_fast if whole else self._backend.encode_batch
            chosen = [item.text for item, kind in zip(texts, kinds, strict=True) if kind == (added, whole)]
            batches[added, whole] = iter(encode(chosen, add_special_tokens=added))
        plain = (next(batches[kind]) for kind in kinds)
        return (self._in_parts(text, text.literal) if text.literal else next(plain) for text in documents)

    def _in_parts(self, document: Rendered, cuts: Iterable[int], whole: Any = None) -> "Parts":
        """The encoding of a text that is cut at some places. `whole` is that of the text without cuts, whose tokens at
        the ends that are not of the text are kept."""
        bounds = sorted({0, *cuts, *document.literal, len(document.text)})
        parts = [document.text[start:stop] for start, stop in pairwise(bounds)]
        backends = [self._backend, *[self._bare] * (len(parts) - 1)]
        encodings = [
            backend.encode(part, add_special_tokens=False) for backend, part in zip(backends, parts, strict=True)
        ]
        added = [0] if whole is None or not document.special_tokens else whole.special_tokens_mask
        front, back = (0, 0) if all(added) else (added.index(0), added[::-1].index(0))
        ends = ([], []) if whole is None else (whole.ids[:front], whole.ids[len(whole.ids) - back :])
        return Parts(encodings, bounds, *ends)

    def examples(self, rendered: Sequence[RenderedRow], encodings: Iterator[Any], counts: Counts) -> list[Example]:
        """Third step: ids, labels and weights within max_length."""
        examples: list[Example] = []
        for place, item in rendered:
            counts.rows += 1
            found: list[tuple[Example, int]] | BadRow
            if isinstance(item, Rendering):
                counts.note(item, place)
                found = [self._example(document, next(encodings)) for document in item.documents]
            else:
                found = item if isinstance(item, BadRow) else self._at(place, self._of_tokens, item)
            if isinstance(found, BadRow):
                counts.skip(place, found)
                continue
            if isinstance(item, Answers):
                examples += self._compared(item, found, place, counts)
                continue
            pieces = [piece for document in found for piece in self._at(place, self._fit, *document)]
            whole = [document for document, _ in found]
            if not pieces:
                counts.drop(self._reason(whole), place)
            elif _tokens(whole) > _tokens(pieces):
                counts.truncated += 1
                counts.lost_tokens += max(0, _tokens(self._shared(whole)) - _tokens(self._shared(pieces)))
            examples += self._shared(pieces, self.options.max_length)
        return examples

    def _compared(
        self, item: Answers, documents: Sequence[tuple[Example, int]], place: str, counts: Counts
    ) -> Sequence[Example]:
        """The example of answers to one prompt within max_length, which takes tokens from the prompt's front only; none
        where the answers leave no room for a prompt, or are the same."""
        if self.options.ranked:
            answers = [scored_at_its_end(answer.input_ids, self.tokenizer.pad_token_id) for answer, _ in documents]
            prompts = [_common(answers)] * len(answers)
        else:
            answers, prompts = [_without_rest(answer) for answer, _ in documents], [prompt for _, prompt in documents]
        limit, longest = self.options.max_length, max(len(answer.input_ids) for answer in answers)
        excess = 0 if limit is None else max(0, longest - limit)
        reason = ""
        if item.weight == 0 or not all(map(_supervised, answers)):
            reason = "nothing in it to train on"
        elif len(answers) > 1 and answers[0].input_ids == answers[1].input_ids:
            reason = EQUAL
        elif excess and self.options.overlong == "error":
            self._at(place, self._fit, max(answers, key=lambda answer: len(answer.input_ids)), 0)
        elif excess and self.options.overlong == "drop":
            reason = f"longer than max_length {limit}"
        if excess and not reason:
            bos = int(min(prompts) > 0 and answers[0].input_ids[0] == self._bos)
            if min(prompts) <= excess + bos:
                reason = f"an answer leaves no room for its prompt within max_length {limit}"
            else:
                answers = [_cut(each, bos + excess, len(each.input_ids), head=bos) for each in answers]
                prompts = [prompt - excess for prompt in prompts]
                counts.truncated += 1
                counts.lost_tokens += excess
        if reason:
            counts.drop(reason, place)
            return []
        shared = min(prompts)
        sizes = [len(each.input_ids) - shared if self.options.ranked else each.supervised for each in answers]
        counts.note_answers(sizes, item.score)
        return [_branched(answers, shared, item)]

    def _shared(self, documents: Sequence[Example], limit: int | None = None) -> Sequence[Example]:
        """The documents of one row as examples."""
        return joined(documents, limit) if self.options.share else documents

    def _at(self, place: str, step: Any, *args: Any) -> Any:
        """The result of a step for a row, or a BadRow. Raises TunesmithError for what must not be skipped."""
        try:
            return step(*args)
        except (TunesmithError, TooLong) as error:
            if self.options.skip_bad and not isinstance(error, NotTheRow | TooLong):
                return BadRow(reason=str(error), content=place.row if isinstance(place, Place) else None)
            reason = f"the chat template refuses the conversation: {error}" if isinstance(error, TooLong) else error
            raise TunesmithError(f"{place}: {reason}") from error

    def _rendered(self, row: Row | BadRow) -> Rendering | Tokens | BadRow:
        if isinstance(row, BadRow):
            return row
        rendered = self._text(row)
        for document in rendered.documents if isinstance(rendered, Rendering) else ():
            if len(document.text) > MOST_CHARACTERS:
                size = f"a text of {len(document.text):,} characters"
                raise TunesmithError(f"{size}; at most {MOST_CHARACTERS:,} are read, divide it")
            check_characters(document.text)
        return rendered

    def _text(self, row: Row) -> Rendering | Tokens:
        train_on = self.options.train_on
        if isinstance(row, Pair):
            read = self._whole if self.options.ranked else self._answer
            parts = (read(row.chosen, "chosen"), _without_unanswered(read(row.rejected, "rejected")))
            if self.options.ranked:  # nothing is generated, and an empty answer may get its score
                parts = (_without_unanswered(parts[0]), parts[1])
            return _answers(parts, row.margin, row.weight * row.chosen.weight)
        if isinstance(row, Judged):
            answer = self._answer(row.answer, "the answer")
            answer = answer if row.good else _without_unanswered(answer)
            return _answers((answer,), 1.0 if row.good else -1.0, row.weight * row.answer.weight)
        if isinstance(row, Tokens):
            if train_on not in (None, "all"):
                raise NotTheRow(f"train_on: {train_on} needs text; this row is tokens, whose `labels` say it")
            return row
        if isinstance(row, Conversation):
            wanted = train_on or ("all" if row.prompt_length is None else "completion")
            return render(row, self.template, replace(self.options, train_on=wanted))
        if train_on in ("assistant", "last_assistant"):
            raise NotTheRow(f"train_on: {train_on} needs conversations; this row is plain text")
        if train_on == "completion" and row.prompt is None:
            raise NotTheRow("train_on: completion needs rows with 'prompt' and 'completion'; this row is one text")
        start = 0 if row.prompt is None or train_on == "all" else len(row.prompt)
        learned = row.weight > 0 and (row.text.strip() or row.prompt is not None)
        spans = (Span(start=start, stop=len(row.text), weight=row.weight),) if learned else ()
        prompt = None if row.prompt is None else len(row.prompt)
        notes = () if not spans or prompt is None else notes_on_text(row.text[:prompt], row.text[prompt:])
        return Rendering(
            documents=(Rendered(text=row.text, spans=spans, prompt=prompt, special_tokens=True),), notes=notes
        )

    def _answer(self, answer: Conversation | Text, name: str) -> Rendering:
        """An answer behind its prompt, as one text, in which what the model would generate is scored."""
        try:
            rendering = self._text(replace(answer, weight=1.0))
        except NotTheRow:
            raise
        except TunesmithError as error:
            raise TunesmithError(f"{name}: {error}") from error
        assert isinstance(rendering, Rendering)
        if len(rendering.documents) > 1:
            raise TunesmithError(
                f"{name}: the answer has several turns, and the template renders earlier ones in another form, so that "
                "no one text holds them as they are generated. Make each turn a row of its own, or write `turns: "
                "whole` with `prompt_mismatch: accept`"
            )
        if any(span.weight != 1.0 for span in rendering.documents[0].spans):
            raise TunesmithError(
                f"{name}: a message of the answer has a weight of its own, and the probability of an answer is that of "
                "all its tokens. Write 'weight' for the whole row, or 0 to leave a message out"
            )
        return rendering

    def _whole(self, side: Conversation | Text, name: str) -> Rendering:
        """A side of a pair as a reward model is asked about it: messages as the chat template renders them, and nothing
        behind them; a text with the end-of-sequence token, unless it ends with that."""
        if isinstance(side, Text):
            end = self.tokenizer.eos_token
            text = side.text if side.text.endswith(end) else side.text + end
            span = Span(start=0, stop=len(text))
            return Rendering(documents=(Rendered(text=text, spans=(span,), special_tokens=True, closed=False),))
        if any(message.weight != 1.0 for message in side.messages):
            raise TunesmithError(
                f"{name}: a message has a weight of its own, and what is scored is the whole conversation. Write "
                "'weight' for the whole row"
            )
        try:
            rendering = render(
                replace(side, weight=1.0, prompt_length=None), self.template, replace(self.options, train_on="all")
            )
        except NotTheRow:
            raise
        except TunesmithError as error:
            raise TunesmithError(f"{name}: {error}") from error
        return replace(rendering, documents=tuple(replace(each, closed=False) for each in rendering.documents))

    def _example(self, rendered: Rendered, encoding: Any) -> tuple[Example, int]:
        """The example of one encoding, and how many of its tokens are the prompt of a prompt-completion row."""
        if not rendered.whole and (cuts := [span.start for span in rendered.spans if _straddled(encoding, span.start)]):
            encoding = self._in_parts(rendered, cuts, encoding)
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
        if examples.parts is not None:
            followed[np.cumsum(examples.parts[1]) - 1] = False
        closing = np.flatnonzero(supervised & ~followed)
        tokens = list[int | None]()  # the end token at each of these places
        for place in closing.tolist():
            tail = labels[max(0, place - 2) : place + 1].tolist()
            end = self._end_token(tail)
            tokens.append(None if end is None else tail[end])
            if end is not None:
                counts.stops[tail[end]] = counts.stops.get(tail[end], 0) + 1
        for lasts in _last_places(closing, examples):
            closed = [end for place in lasts if (end := tokens[place]) is not None]
            if closed and len(closed) == len(lasts):  # all of its documents end with an end token
                counts.ends[closed[-1]] = counts.ends.get(closed[-1], 0) + 1

    def _of_tokens(self, row: Tokens) -> list[tuple[Example, int]]:
        """The row as its owner tokenized it, which has no prompt."""
        wrong = next((token for token in row.input_ids if not 0 <= token < len(self.tokenizer)), None)
        if wrong is not None:
            raise TunesmithError(
                f"'input_ids' has {wrong}, but the tokenizer has {len(self.tokenizer)} tokens; was it another one?"
            )
        labels = list(row.input_ids if row.labels is None else row.labels)
        if row.weight == 0:
            labels = [IGNORE_INDEX] * len(labels)
        weights = None if row.weight in (0.0, 1.0) else [row.weight] * len(labels)
        return [(Example(input_ids=list(row.input_ids), labels=labels, weights=weights), 0)]

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

    def _reason(self, documents: Sequence[Example]) -> str:
        limit = self.options.max_length
        if not any(map(_supervised, documents)):
            return "nothing in it to train on"
        if self.options.overlong == "drop":
            return f"longer than max_length {limit}"
        return f"no supervised token within max_length {limit}"


def _without_unanswered(rendering: Rendering) -> Rendering:
    """Of an answer that the model is not to give: an empty one teaches the opposite."""
    return replace(rendering, notes=tuple(note for note in rendering.notes if note != UNANSWERED))


def _answers(parts: Sequence[Rendering], score: float, weight: float) -> Answers:
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    return Answers(
        documents=tuple(document for part in parts for document in part.documents),
        notes=tuple(notes),
        arguments=tuple(arguments for part in parts for arguments in part.arguments),
        score=score,
        weight=weight,
    )


def _without_rest(answer: Example) -> Example:
    """An answer up to its last scored token: what a template writes behind it decides nothing."""
    labels = answer.labels
    stop = next((i + 1 for i in range(len(labels) - 1, -1, -1) if labels[i] != IGNORE_INDEX), 0)
    return answer if stop in (0, len(labels)) else _cut(answer, 0, stop)


def scored_at_its_end(ids: Sequence[int], pad_token_id: int | None) -> Example:
    """A text with a label where a sequence classifier of `transformers` scores it: at its last token other than the one
    that pads. Where the end-of-sequence token pads, that is the token before it."""
    place = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != pad_token_id), 0)
    return Example(input_ids=[*ids], labels=[ids[i] if i == place else IGNORE_INDEX for i in range(len(ids))])


def _common(sides: Sequence[Example]) -> int:
    """How many tokens all sides begin with alike, up to where one of them is scored."""
    shortest = min(next(i for i, label in enumerate(side.labels) if label != IGNORE_INDEX) for side in sides)
    columns = zip(*(side.input_ids[:shortest] for side in sides), strict=True)
    return next((i for i, tokens in enumerate(columns) if len({*tokens}) > 1), shortest)


def _branched(answers: Sequence[Example], prompt: int, item: Answers) -> Example:
    """Answers to one prompt as one example: the first `prompt` tokens, as far as they are the same, once, and what
    follows them of each answer."""
    shared = prompt
    for answer in answers[1:]:
        same = (one == two for one, two in zip(answers[0].input_ids[:prompt], answer.input_ids[:prompt], strict=True))
        shared = min(shared, next((i for i, equal in enumerate(same) if not equal), prompt))
    if len(answers) == 1:
        shared = 0
    branches = [slice(shared, len(answer.input_ids)) for answer in answers]
    ids, labels = answers[0].input_ids[:shared], answers[0].labels[:shared]
    for answer, branch in zip(answers, branches, strict=True):
        ids, labels = ids + answer.input_ids[branch], labels + answer.labels[branch]
    lengths = [len(answer.input_ids) - shared for answer in answers]
    parts = ([shared, *lengths], [-1, *[0] * len(lengths)]) if shared else (lengths, [-1] * len(lengths))
    return Example(
        input_ids=ids,
        labels=labels,
        weights=None if item.weight == 1.0 else [item.weight] * len(ids),
        parts=parts if len(answers) > 1 else None,
        score=item.score,
    )


def _tokens(examples: Iterable[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


def _supervised(example: Example) -> bool:
    """Whether a token has a label that counts: nothing predicts the first. Most examples show it at their end."""
    labels = example.labels
    return any(labels[i] != IGNORE_INDEX for i in range(len(labels) - 1, 0, -1))


def joined(documents: Sequence[Example], limit: int | None) -> list[Example]:
    """Documents of one row, those that begin alike as one example of at most `limit` tokens, in order."""
    together = _tree(documents) if documents else None
    if together is not None and (limit is None or len(together.input_ids) <= limit):
        return [together]
    examples, group = list[Example](), list[Example]()
    for document in documents:
        longer = _tree([*group, document])
        if group and (longer is None or (limit is not None and len(longer.input_ids) > limit)):
            examples += [_tree(group) or group[0]]
            group = [document]
        else:
            group.append(document)
    return [*examples, *([_tree(group) or group[0]] if group else [])]


def _tree(documents: Sequence[Example]) -> Example | None:
    """Documents as one example; None where two of them share too little, or both supervise a token that they share:
    it would be learned once, and is meant twice."""
    if len(documents) == 1:
        return documents[0]
    row = share_prefixes([document.input_ids for document in documents], saves=0)
    if row is None or row.parents.count(-1) > 1:
        return None
    labels, weights = [IGNORE_INDEX] * len(row.tokens), [1.0] * len(row.tokens)
    for document, places in zip(documents, row.places, strict=True):
        for i in np.flatnonzero(np.asarray(document.labels) != IGNORE_INDEX).tolist():
            place = places[i]
            if labels[place] != IGNORE_INDEX:
                return None
            labels[place] = document.labels[i]
            weights[place] = 1.0 if document.weights is None else document.weights[i]
    weighted = any(document.weights is not None for document in documents)
    return Example(
        input_ids=row.tokens,
        labels=labels,
        weights=weights if weighted else None,
        parts=(row.lengths, row.parents),
    )


def _last_places(closing: Any, examples: FlatExamples) -> Iterator[list[int]]:
    """For each example, the last of the places `closing` in each of its documents, as indices of them."""
    if examples.parts is None:
        yield from ([last] for last in (np.searchsorted(closing, np.cumsum(examples.lengths)) - 1).tolist())
        return
    sizes, lengths, parents = examples.parts
    stops = np.cumsum(lengths)
    firsts, lasts = np.searchsorted(closing, stops - lengths).tolist(), (np.searchsorted(closing, stops) - 1).tolist()
    start = 0
    for size in sizes.tolist():
        own = parents[start : start + size].tolist()
        found = list[int]()  # in each segment, or in those that it continues; -1 for none
        for segment, parent in enumerate(own, start):
            inherited = found[parent] if parent >= 0 else -1
            found.append(lasts[segment] if lasts[segment] >= firsts[segment] else inherited)
        yield [found[path[-1]] for path in paths(own) if found[path[-1]] >= 0]
        start += size


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


def without_prefix(backend: Any) -> Any:
    """A copy of the backend that puts no space before a text."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    waiting = [state.get("normalizer"), state.get("pre_tokenizer")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            part |= {name: value for name, value in BARE.items() if name in part}
            if part.get("type") == "Prepend":  # of nothing, it would give the first character no place
                part |= {"type": "Sequence", "normalizers": []}
                del part["prepend"]
            waiting += [*part.get("normalizers", ()), *part.get("pretokenizers", ())]
    bare = Tokenizer.from_str(json.dumps(state))
    bare.encode_special_tokens = backend.encode_special_tokens
    return bare


class Parts:
    """Encodings of the parts of a text, one after another, as one. `bounds` are the parts' first characters and the
    text's end; `front` and `back` are tokens that are not of the text."""

    def __init__(self, encodings: Sequence[Any], bounds: Sequence[int], front: Sequence[int], back: Sequence[int]):
        self._encodings, self._bounds = encodings, bounds
        sizes = [len(encoding.ids) for encoding in encodings]
        self._firsts = list(accumulate(sizes, initial=len(front)))
        self.ids = [*front, *chain.from_iterable(encoding.ids for encoding in encodings), *back]
        self.special_tokens_mask = [1] * len(front) + [0] * sum(sizes) + [1] * len(back)

    def char_to_token(self, place: int) -> int | None:
        part = bisect_right(self._bounds, place, hi=len(self._encodings)) - 1
        token = self._encodings[part].char_to_token(place - self._bounds[part])
        return None if token is None else token + self._firsts[part]

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        part = bisect_right(self._firsts, token, hi=len(self._encodings)) - 1
        if part < 0 or token >= self._firsts[-1]:
            return None
        chars = self._encodings[part].token_to_chars(token - self._firsts[part])
        return None if chars is None else (chars[0] + self._bounds[part], chars[1] + self._bounds[part])


def _straddled(encoding: Any, place: int) -> bool:
    """Whether a token has characters on both sides of a place in the text."""
    token = encoding.char_to_token(place)
    return token is not None and encoding.token_to_chars(token)[0] < place


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
