"""One source's rows to a prepared data set on disk, with the counts of what became of them.

Rows flow through in batches: what is in memory does not grow with the data. A data set that was prepared before, from
the same rows by the same means, is found in the cache instead. Which sources a run has, and what becomes of prepared
data, is up to `dataset`: the processes that encode rows load this module, and it needs neither torch nor the run.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.data.arrow import FlatExamples
from tunesmith.data.cache import Store, fingerprint
from tunesmith.data.formats import ArrowRow, FormatOptions, parse_each
from tunesmith.data.preflight import SplitReport, examine
from tunesmith.data.read import Rows
from tunesmith.data.skipped import SKIPPED, BadRow, SkippedRows, SourceRows
from tunesmith.data.tokenize import BATCH_ROWS, Counts, EncodeOptions, Encoder, encoded
from tunesmith.data.workers import Workers
from tunesmith.errors import TunesmithError
from tunesmith.types import Row

DECIDING_MODULES = (
    *("alike", "arrow", "calls", "chat", "columns", "content", "folders", "formats", "history", "jsontext", "lines"),
    *(
        "messages",
        "notes",
        "pairs",
        "preflight",
        "prefix",
        "prepare",
        "read",
        "sandbox",
        "skipped",
        "template",
        "tokenize",
        "turns",
    ),
    "values",
)
"""The modules of this folder that decide which tokens a row becomes, or what is counted of it."""


@cache
def code_fingerprint(folder: Path = Path(__file__).parent) -> str:
    """A digest of the code that turns rows into tokens: data prepared by other code is not used."""
    return fingerprint(*(folder / f"{name}.py" for name in DECIDING_MODULES))


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """Everything that decides what becomes of a row, and how many processes do it."""

    tokenizer: Any
    encode: EncodeOptions
    formats: FormatOptions
    processes: int = 1

    def key(self, identity: str | None) -> str | None:
        """The name of the prepared data in the cache; None for what must not be found there again.

        `identity` stands for the rows. What a `formatting_func` does can't be told, so its results are never
        cached. A template that writes the date gives other texts tomorrow.
        """
        if identity is None or self.formats.formatting_func is not None:
            return None
        template = self.tokenizer.chat_template
        try:
            return fingerprint(
                code_fingerprint(),
                identity,
                asdict(self.encode),
                asdict(replace(self.formats, columns=dict(self.formats.columns))),
                template,
                {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
                self.tokenizer.split_special_tokens,
                self.tokenizer.backend_tokenizer.to_str().encode(),
                str(date.today()) if "strftime_now" in str(template) else "",
            )
        except (TypeError, AttributeError):  # something without content, or a tokenizer without a backend
            return None


def identity(source: Any) -> str | None:
    """What tells a source's rows from all others by their content, or None when that can't be told."""
    if isinstance(source, Rows):
        # The names belong to it: the kept report names the places of dropped rows, file and line.
        names = [source.name, source.part, *map(str, source.files)]
        return fingerprint("files", names, *source.files) if source.files else None
    if isinstance(source, Sequence):
        rows = list(source)
        padded = [i for i, row in enumerate(rows) if isinstance(row[1] if isinstance(row, tuple) else row, ArrowRow)]
        try:
            return fingerprint("rows", rows, padded)
        except (TypeError, ValueError, RecursionError):
            return None
    if getattr(source, "format", {}).get("type") == "custom":  # a transform that runs when rows are read
        return None
    # A `datasets.Dataset` keeps track of the content it was made from; transforms that it can't hash get a random mark.
    mark = getattr(source, "_fingerprint", None)
    return None if mark is None else fingerprint("dataset", mark)


def prepare(
    rows: SourceRows,
    preparation: Preparation,
    *,
    store: Store | None = None,
    source: Any = None,
    skipped: SkippedRows | None = None,
) -> tuple[Any, SplitReport]:
    """All rows as a memory-mapped `datasets.Dataset` with `input_ids`, `labels` and, where any is not 1, `weights`;
    of pairs the segments, and `scores` where any is not 0.

    `source` is what `rows` come from, if the result is to be cached. Raises TunesmithError for a row that can't be read
    or supervised, unless bad rows are to be skipped, which are added to `skipped`; and when no example is left.
    """
    store, skipped = store or Store(), SkippedRows() if skipped is None else skipped
    key = preparation.key(None if source is None else identity(source))
    stored = None if key is None else store.find(key)
    if key is None or stored is None:
        counts = Counts()

        def report(dataset: Any) -> dict[str, Any]:
            ranked = preparation.encode.ranked
            return examine(dataset, counts, preparation.tokenizer.bos_token_id, ranked=ranked).as_json()

        with _no_full_collections():
            stored = store.write(key, _tables(rows, preparation, counts, skipped), report, skipped.path)
    elif (file := store.attachment(key, SKIPPED)) is not None:
        skipped.take(file)
    dataset, notes = stored
    empty = ("weights", "scores", "seq_lengths", "parents")
    unused = [name for name in empty if (column := dataset.data.column(name)).null_count == len(column)]
    return dataset.remove_columns(unused), SplitReport.from_json(notes)


def _tables(rows: SourceRows, preparation: Preparation, counts: Counts, skipped: SkippedRows) -> Iterator[Any]:
    for batch in _batches(rows, preparation, counts):
        skipped.add(counts.take_bad())
        if len(batch.lengths):
            yield batch.table()
    if not counts.rows:
        raise TunesmithError("the data set is empty")
    if not counts.examples:
        reasons = "; ".join(f"{reason}: {count} ({places[0]}...)" for reason, (count, places) in counts.dropped.items())
        raise TunesmithError(f"no example is left of {counts.rows} rows ({reasons})")


@contextmanager
def _no_full_collections() -> Iterator[None]:
    """The collector leaves out what is old: its passes over all imported code cost a tenth of the time."""
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 2**30)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)


def _batches(rows: SourceRows, preparation: Preparation, counts: Counts) -> Iterator[FlatExamples]:
    typed = parse_each(rows, preparation.formats)
    if preparation.processes == 1:
        return encoded(typed, Encoder(preparation.tokenizer, preparation.encode), counts)
    return _in_processes(typed, preparation, counts)


def _in_processes(
    rows: Iterator[tuple[str, Row | BadRow]], preparation: Preparation, counts: Counts
) -> Iterator[FlatExamples]:
    """Batches encoded by several processes, in order, with a bounded number of them on the way."""
    waiting: list[Future[tuple[FlatExamples, Counts]]] = []

    def finished() -> FlatExamples:
        examples, part = waiting.pop(0).result()
        counts.update(part)
        return examples

    with Workers(preparation.processes, _encoding, preparation.tokenizer, preparation.encode) as workers:
        while part := list(islice(rows, BATCH_ROWS)):
            waiting.append(workers.submit(part))
            if len(waiting) > 2 * preparation.processes:
                yield finished()
        while waiting:
            yield finished()


def _encoding(
    tokenizer: Any, options: EncodeOptions
) -> Callable[[list[tuple[str, Row | BadRow]]], tuple[FlatExamples, Counts]]:
    """What each process does with a part of the rows."""
    encoder = Encoder(tokenizer, options)

    def encode(rows: list[tuple[str, Row | BadRow]]) -> tuple[FlatExamples, Counts]:
        counts = Counts()
        return next(encoded(iter(rows), encoder, counts)), counts

    return encode
