"""A source's rows to a prepared data set on disk, with the counts of what became of them.

Rows flow through in batches: what is in memory does not grow with the data. A data set that was prepared before, from
the same rows by the same means, is found in the cache instead.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import islice
from multiprocessing import get_context
from typing import Any

from tunesmith.data.arrow import Columns, table
from tunesmith.data.cache import Store, code_fingerprint, fingerprint
from tunesmith.data.formats import FormatOptions
from tunesmith.data.preflight import SplitReport, examine
from tunesmith.data.read import Rows
from tunesmith.data.skipped import SKIPPED, BadRow, SkippedRows
from tunesmith.data.tokenize import BATCH_ROWS, Counts, EncodeOptions, Encoder, encoded
from tunesmith.data.typed import Source, sifted
from tunesmith.errors import TunesmithError
from tunesmith.types import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """Everything that decides what becomes of a row, and how many processes do it."""

    tokenizer: Any
    encode: EncodeOptions
    formats: FormatOptions
    processes: int = 1

    def key(self, identity: str | None) -> str | None:
        """The name of the prepared data in the cache; None for what must not be found there again.

        `identity` stands for the rows. A `formatting_func` is code whose content nobody can tell, so its results are
        never cached. A template that writes the date gives other texts tomorrow.
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
        # The name belongs to it: the kept report names the places of dropped rows, file and line.
        return fingerprint("files", source.name, *source.files) if source.files else None
    if isinstance(source, Sequence):
        try:
            return fingerprint("rows", list(source))
        except (TypeError, ValueError, RecursionError):
            return None
    if getattr(source, "format", {}).get("type") == "custom":  # a transform that runs when rows are read
        return None
    # A `datasets.Dataset` keeps track of the content it was made from; transforms that it can't hash get a random mark.
    mark = getattr(source, "_fingerprint", None)
    return None if mark is None else fingerprint("dataset", mark)


def prepare(
    rows: Source,
    preparation: Preparation,
    *,
    store: Store | None = None,
    source: Any = None,
    skipped: SkippedRows | None = None,
) -> tuple[Any, SplitReport]:
    """All rows as a memory-mapped `datasets.Dataset` with `input_ids`, `labels` and, where any is not 1, `weights`.

    `source` is what `rows` come from, if the result is to be cached. Raises TunesmithError for a row that can't be read
    or supervised, unless bad rows are to be skipped, which are added to `skipped`; and when no example is left.
    """
    store, left_out = store or Store(), SkippedRows() if skipped is None else skipped
    key = preparation.key(None if source is None else identity(source))
    found = store.find(key) if key is not None else None
    if found is not None:
        assert key is not None
        dataset, kept = found
        if (file := store.beside(key, SKIPPED)) is not None:
            left_out.take(file)
        return _without_empty_weights(dataset, kept["weighted"]), SplitReport.from_json(kept["report"])
    counts, made = Counts(), dict[str, Any]()

    def notes(dataset: Any) -> dict[str, Any]:
        made["report"] = examine(dataset, counts, preparation.tokenizer.bos_token_id)
        return {"report": made["report"].as_json(), "weighted": made["weighted"]}

    def tables() -> Iterator[Any]:
        made["weighted"] = False
        for batch in _batches(rows, preparation, counts):
            left_out.add(counts.taken())
            if not len(batch.sizes):  # none of these rows is left
                continue
            made["weighted"] |= batch.weights is not None
            yield table(batch)
        if not counts.rows:
            raise TunesmithError("the data set is empty")
        _check_left(counts)

    with _frozen_garbage():
        dataset = store.write(key, tables(), notes, left_out.path)
    return _without_empty_weights(dataset, made["weighted"]), made["report"]


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """The collector leaves out what existed before: its passes over all imported code cost a tenth of the time."""
    if gc.get_freeze_count():  # somebody else's choice, and unfreezing would undo it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _without_empty_weights(dataset: Any, weighted: bool) -> Any:
    return dataset if weighted else dataset.remove_columns("weights")


def _check_left(counts: Counts) -> None:
    if counts.examples:
        return
    reasons = "; ".join(f"{reason}: {count} ({places[0]}...)" for reason, (count, places) in counts.dropped.items())
    raise TunesmithError(f"no example is left of {counts.rows} rows ({reasons})")


def _batches(rows: Source, preparation: Preparation, counts: Counts) -> Iterator[Columns]:
    typed = sifted(rows, preparation.formats)
    if preparation.processes == 1:
        return encoded(typed, Encoder(preparation.tokenizer, preparation.encode), counts)
    return _in_processes(typed, preparation, counts)


def _in_processes(
    rows: Iterator[tuple[str, Row | BadRow]], preparation: Preparation, counts: Counts
) -> Iterator[Columns]:
    """Batches encoded by several processes, in order, with a bounded number of them on the way."""
    waiting: list[Future[tuple[Columns, Counts]]] = []

    def finished() -> Columns:
        columns, part = waiting.pop(0).result()
        counts.update(part)
        return columns

    # `spawn`: a fork of a process whose tokenizer has started threads can hang.
    with ProcessPoolExecutor(
        preparation.processes, get_context("spawn"), _start_worker, (preparation.tokenizer, preparation.encode)
    ) as pool:
        while part := list(islice(rows, BATCH_ROWS)):
            waiting.append(pool.submit(_work, part))
            if len(waiting) > 2 * preparation.processes:
                yield finished()
        while waiting:
            yield finished()


_worker: Callable[[list[tuple[str, Row | BadRow]]], tuple[Columns, Counts]]


def _start_worker(tokenizer: Any, options: EncodeOptions) -> None:
    global _worker
    encoder = Encoder(tokenizer, options)

    def work(rows: list[tuple[str, Row | BadRow]]) -> tuple[Columns, Counts]:
        counts = Counts()
        columns = next(encoded(iter(rows), encoder, counts))
        return columns, counts

    _worker = work


def _work(rows: list[tuple[str, Row | BadRow]]) -> tuple[Columns, Counts]:
    return _worker(rows)
