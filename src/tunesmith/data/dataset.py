"""What the user gave as data to what the trainer reads: prepared, mixed, shuffled and packed data sets."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias, cast
from weakref import WeakSet

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.table import InMemoryTable

from tunesmith.data.arrow import flat_weights
from tunesmith.data.formats import FormatOptions
from tunesmith.data.mixture import DataSource, mixed, split_rows, used
from tunesmith.data.pack import pack
from tunesmith.data.preflight import Preflight, SplitReport, is_train, judge, shared_examples
from tunesmith.data.prepare import Preparation, prepare
from tunesmith.data.read import Rows
from tunesmith.data.skipped import SKIPPED, BadRow, SkippedRows
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder
from tunesmith.data.typed import parsed, sifted
from tunesmith.errors import TunesmithError
from tunesmith.settings.config import SFTConfig
from tunesmith.types import IGNORE_INDEX, Row

Source: TypeAlias = Dataset | IterableDataset | Rows | Sequence[Mapping[str, Any]]
LOOKED_AT = 64
"""How many rows of a stream are looked at before training."""
COLUMNS = ["input_ids", "labels", "weights", "seq_lengths"]


class DataPreparer:
    """Prepares each split of a run with the same tokenizer and settings, and keeps a report of each.

    `counts` has what became of the rows, by split; `stops` the tokens that end supervised turns and texts; `skipped`
    the rows that `on_bad_row: skip` left out.
    """

    def __init__(self, args: SFTConfig, tokenizer: Any, formatting_func: Callable[..., Any] | None) -> None:
        if formatting_func is not None and args.resolved_train_on == "completion":
            raise TunesmithError(
                "formatting_func makes texts or conversations; with train_on: completion it must return "
                "(prompt, completion) pairs, for which completion is the default: leave train_on unset"
            )
        self.args, self.tokenizer = args, tokenizer
        self.formats = FormatOptions(
            text_field=args.dataset_text_field,
            columns=cast(dict[str, str], args.columns or {}),
            formatting_func=formatting_func,
            skip_bad=args.on_bad_row == "skip",
        )
        self.skipped: dict[str, SkippedRows] = {}
        self._saves_skipped = False
        self.counts: dict[str, Counts] = {}
        self.reports: dict[str, SplitReport] = {}
        self.examples: dict[str, Dataset] = {}
        self._made: WeakSet[Dataset | IterableDataset] = WeakSet()
        self._mixture: dict[str, int] = {}
        self._looked: dict[str, Counts] = {}
        self._sources: dict[str, tuple[Source, FormatOptions]] = {}

    def __call__(self, source: Source, split: str, *, packing: bool) -> Dataset | IterableDataset:
        """`source` ready for the collator. Rows that are tokenized already pass through the same checks; what was made
        here is returned as it is, so that `trainer.evaluate(trainer.train_dataset)` means what it says."""
        if isinstance(source, Dataset | IterableDataset) and source in self._made:
            return source
        made = self._make(source, split, packing)
        self._made.add(made)
        return made

    @property
    def packs_eval(self) -> bool:
        """Whether evaluation reads packs: as training does, unless `eval_packing` says otherwise."""
        return bool(self.args.packing if self.args.eval_packing is None else self.args.eval_packing)

    def everything(self, train: Any, evaluated: Any, *, by_row: bool = False) -> tuple[Any, Any]:
        """What is trained on, and what is evaluated on: nothing, one data set, or several by name. `by_row`: as
        `evaluated`."""
        prepared_eval = self.evaluated(evaluated, by_row=by_row)
        if not isinstance(train, Mapping):
            return self(train, "train", packing=self.args.packing), prepared_eval
        packs = self.packs_eval and not by_row
        prepared, held_out = self.mixture(train, packing=self.args.packing, eval_packing=packs)
        if held_out and prepared_eval is not None:
            raise TunesmithError("eval_dataset is given, and sources hold rows out; keep one of them")
        return prepared, held_out or prepared_eval

    def evaluated(self, source: Any, *, by_row: bool) -> Any:
        """One data set to evaluate on, or several by name. `by_row`: logits are wanted row by row, so rows are not
        packed."""
        if by_row and self.args.eval_packing:
            raise TunesmithError("compute_metrics gets logits row by row, and eval_packing: true packs rows; drop one")
        packs = self.packs_eval and not by_row
        if isinstance(source, Mapping):
            return {name: self(rows, name, packing=packs) for name, rows in source.items()}
        return None if source is None else self(source, "eval", packing=packs)

    def mixture(
        self, sources: Mapping[str, DataSource | Source], *, packing: bool, eval_packing: bool
    ) -> tuple[Dataset | IterableDataset, dict[str, Dataset | IterableDataset]]:
        """Named sources as one training set, and what they hold out, by source."""
        named = {
            name: source if isinstance(source, DataSource) else DataSource(rows=source)
            for name, source in sources.items()
        }
        train, held_out = {}, {}
        for name, source in named.items():
            formats = replace(
                self.formats,
                columns=self.formats.columns if source.columns is None else source.columns,
                text_field=source.text_field or self.formats.text_field,
                arrow=_through_arrow(source.rows),
            )
            rows, kept = source.rows, None
            if source.held_out:
                rows, kept = split_rows(name, list(numbered(source.rows)), source.held_out, self.args.seed)
            train[name] = self._prepared(rows, f"train/{name}", self._options(packing), formats)
            if kept:
                examples = self._prepared(kept, name, self._options(eval_packing), formats)
                held_out[name] = self._pack(examples) if eval_packing else examples
        sizes = {name: len(examples) for name, examples in train.items()}
        order = mixed(sizes, named, self.args.seed)
        self._mixture = {name: len(used(name, named[name], size, self.args.seed)) for name, size in sizes.items()}
        weighted = any("weights" in examples.column_names for examples in train.values())
        parts = [_with_weights(examples) if weighted else examples for examples in train.values()]
        dataset = concatenate_datasets(parts).select(order)
        made = self._pack(dataset) if packing else dataset
        self._made.update([made, *held_out.values()])
        return made, held_out

    def preflight(self) -> Preflight:
        """What is worth knowing about all that was prepared so far, and what must stop the run."""
        ends = " ".join(sorted({str(self.tokenizer.eos_token)}))
        shared = shared_examples(self.examples)
        # What a stream holds is not known before it is read, nor what the user prepared.
        unknown = not any(is_train(split) for split in self.reports)
        allow_no_eos = self.args.allow_no_eos or unknown
        found = judge(self.reports, shared=shared, allow_no_eos=allow_no_eos, end_tokens=ends)
        if self._mixture:
            parts = ", ".join(f"{count:,} of {name}" for name, count in self._mixture.items())
            found.notes.insert(0, f"train: an epoch uses {parts}")
        return found

    def save_skipped(self) -> None:
        """Write the rows that were left out to `skipped_rows.jsonl` in the output folder, and those that will be."""
        if self.args.process_index:
            return
        file = Path(str(self.args.output_dir)) / SKIPPED
        try:
            if not self._saves_skipped and self.args.resume_from_checkpoint:
                for split in self._looked.keys() & self.skipped.keys():  # streams are not read again from the start
                    self.skipped[split].recall(file, split)
            self._saves_skipped = True
            file.unlink(missing_ok=True)
            for split, skipped in self.skipped.items():
                skipped.copy_to(file, split)
        except OSError as error:
            raise TunesmithError(f"{file} can't be written: {error.strerror}") from error

    def _left_out(self, split: str) -> SkippedRows | None:
        """Where the bad rows of a split go; None when they are errors."""
        if not self.formats.skip_bad:
            return None
        skipped = self.skipped[split] = SkippedRows()
        return skipped

    def rows(self, trained_on: bool) -> Iterator[Row]:
        """The first rows of each source that is trained on, or of the others, as they were understood."""
        for split, (source, formats) in self._sources.items():
            if is_train(split) == trained_on:
                for _, row in islice(parsed(numbered(source), formats), LOOKED_AT):
                    yield row

    def first_rows(self, count: int = LOOKED_AT) -> Iterator[Row]:
        """The first rows of each source, as they were understood; those that are not trained on come first."""
        for _, (source, formats) in sorted(self._sources.items(), key=lambda item: is_train(item[0])):
            for _, row in islice(parsed(numbered(source), formats), count):
                yield row

    @property
    def stops(self) -> set[int]:
        """The tokens at which generation is to stop: all that end a supervised turn or text."""
        found = [*self.counts.values(), *self._looked.values()]
        return {token for counts in found for token in counts.stops}

    def _make(self, source: Source, split: str, packing: bool) -> Dataset | IterableDataset:
        if cast(dict[str, Any], self.args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            if not isinstance(source, Dataset | IterableDataset):
                raise TunesmithError(f"{split}: skip_prepare_dataset needs a datasets.Dataset, not {_name(source)}")
            return source
        options = self._options(packing)
        if isinstance(source, IterableDataset):
            if packing:
                raise TunesmithError(f"{split}: packing needs all lengths; load the stream, or set packing: false")
            return self._stream(source, split, Encoder(self.tokenizer, options))
        formats = replace(self.formats, arrow=_through_arrow(source))
        dataset = self._prepared(source, split, options, formats)
        if self.args.shuffle_dataset:
            dataset = dataset.shuffle(seed=self.args.seed)
        return self._pack(dataset) if packing else dataset

    def _prepared(self, source: Source, split: str, options: EncodeOptions, formats: FormatOptions) -> Dataset:
        preparation = Preparation(
            tokenizer=self.tokenizer, encode=options, formats=formats, processes=self.args.dataset_num_proc or 1
        )
        try:
            skipped = self._left_out(split)
            dataset, report = prepare(numbered(source), preparation, source=source, skipped=skipped)
        except TunesmithError as error:
            raise TunesmithError(f"{split} data: {error}") from error
        self.counts[split], self.reports[split], self.examples[split] = report.counts, report, dataset
        self._sources[split] = source, formats
        if self._saves_skipped:  # data for an evaluation in between
            self.save_skipped()
        return dataset

    def _options(self, packing: bool) -> EncodeOptions:
        cuts = packing and self.args.packing_strategy != "bfd"  # those strategies cut overlong examples themselves
        return EncodeOptions(
            train_on=self.args.resolved_train_on,
            max_length=None if cuts else self.args.max_length,
            overlong=self.args.overlong,
            truncate_prompt=self.args.truncate_prompt,
            template_kwargs=cast(dict[str, Any], self.args.chat_template_kwargs or {}),
            skip_bad=self.formats.skip_bad,
        )

    def _stream(self, source: IterableDataset, split: str, encoder: Encoder) -> IterableDataset:
        """A stream whose rows are prepared as they come. Its first rows are looked at now, in place of a preflight."""
        counts = self.counts[split] = Counts()
        ahead = list(source.take(LOOKED_AT))
        if not ahead:
            raise TunesmithError(f"{split} data: the stream is empty")

        pattern, skipped = self._pattern(ahead, split), self._left_out(split)

        def typed(batch: Iterable[Mapping[str, Any]], numbers: Iterable[int]) -> list[Any]:
            rows = ((f"row {i}", row) for i, row in zip(numbers, batch, strict=True))
            return list(islice(sifted(chain([pattern], rows), self.formats), 1, None))

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            examples = encoder.encode(typed(unbatched(batch), indices), counts)
            if skipped is not None:
                skipped.add(counts.taken())
            return {
                "input_ids": [example.input_ids for example in examples],
                "labels": [example.labels for example in examples],
                "weights": [example.weights for example in examples],
            }

        looked = Counts()
        encoder.encode(typed(ahead, range(len(ahead))), looked)
        if is_train(split) and not looked.stops and not self.args.allow_no_eos:
            raise TunesmithError(
                f"{split} data: no supervised token ends a text in the first {len(ahead)} rows of the stream, so the "
                "model would never learn to stop. Train on whole texts, raise max_length, or set allow_no_eos: true"
            )
        self._looked[split] = looked
        if skipped is not None:
            skipped.add(looked.taken())
        if self.args.shuffle_dataset:
            source = source.shuffle(seed=self.args.seed)
        return source.map(encode, batched=True, with_indices=True, remove_columns=list(ahead[0]))

    def _pattern(self, ahead: Sequence[Mapping[str, Any]], split: str) -> tuple[str, Mapping[str, Any]]:
        """The first row of a stream that can be read, with its place: every batch must have its format."""
        reasons = []
        for (place, row), source in zip(sifted(numbered(ahead), self.formats), ahead, strict=True):
            if not isinstance(row, BadRow):
                return place, source
            reasons.append(str(row.error(place)))
        raise TunesmithError(
            f"{split} data: none of the first {len(ahead)} rows of the stream can be used: {reasons[0]}"
        )

    def _pack(self, dataset: Dataset) -> Dataset:
        assert self.args.max_length is not None
        dataset = _in_order(dataset)
        lengths = np.diff(_flat(dataset, "input_ids")[0])
        packs = pack(lengths, self.args.max_length, self.args.packing_strategy)
        starts = _flat(dataset, "input_ids")[0][packs.document] + packs.start
        sizes = packs.stop - packs.start
        tokens = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        token_offsets = np.concatenate([[0], np.cumsum(sizes)])[packs.offsets]
        columns = {
            name: _lists(token_offsets, _flat(dataset, name)[1][tokens])
            for name in ("input_ids", "labels", "weights")
            if name in dataset.column_names
        }
        if self.args.packing_strategy != "wrapped":  # which reads its documents as one text
            columns["seq_lengths"] = _lists(packs.offsets, sizes.astype(np.int32))
        return Dataset(InMemoryTable.from_pydict(columns))


def numbered(source: Dataset | Rows | Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """Rows with their places. A source that knows better (a file and its lines) gives pairs itself."""
    if isinstance(source, Dataset):
        rows: Iterable[Any] = (row for batch in source.iter(1000) for row in unbatched(batch))
    else:
        rows = source.each() if isinstance(source, Rows) else source
    for number, row in enumerate(rows):
        if (
            isinstance(row, tuple)
            and len(row) == 2
            and isinstance(row[0], str)
            and isinstance(row[1], Mapping | BadRow)
        ):
            yield row
        elif isinstance(row, Mapping):
            yield f"row {number}", row
        else:
            reason = f"is {_name(row)}, expected an object with named columns"
            yield f"row {number}", BadRow(reason=reason, content=row, joint=" ")


def unbatched(batch: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a batch of columns."""
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _through_arrow(source: Any) -> bool:
    """Whether rows passed through Arrow, which puts a null where a row lacks a key that another row has."""
    return isinstance(source, Dataset | IterableDataset)


def _in_order(dataset: Dataset) -> Dataset:
    """`dataset` with its rows as they are read: a shuffle or a mixture is otherwise a list of places in the table."""
    if dataset._indices is None:
        return dataset
    order = dataset._indices.column(0).to_numpy()
    return Dataset(InMemoryTable(dataset.data.table.take(pa.array(order))))


def _with_weights(dataset: Dataset) -> Dataset:
    """`dataset` with a weight of 1 for every token where it has none, to be joined with one that has."""
    if "weights" in dataset.column_names:
        return dataset
    offsets, ids = _flat(dataset, "input_ids")
    return dataset.add_column("weights", _lists(offsets, np.ones(len(ids), np.float32)))


def _name(value: Any) -> str:
    return type(value).__name__


def _flat(dataset: Dataset, column: str) -> tuple[Any, Any]:
    """A list column as offsets (N + 1,) and values, in the order of the data set."""
    array = dataset.data.column(column).combine_chunks()
    if array.null_count:  # examples without weights of their own among others that have them
        offsets, _ = _flat(dataset, "input_ids")
        return offsets, flat_weights(array, np.diff(offsets))
    offsets = array.offsets.to_numpy()
    return offsets - offsets[0], array.flatten().to_numpy()


def _lists(offsets: Any, values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def evened(dataset: Dataset, multiple: int) -> Dataset:
    """`dataset` with rows without labels at its end, up to a multiple of `multiple` rows.

    Each process must get as many batches as the others. Left to itself, `accelerate` gives some rows twice, whose loss
    would count twice.
    """
    lacking = -len(dataset) % multiple
    if not lacking:
        return dataset
    row = dataset.with_format(None)[0]
    blank = {name: [IGNORE_INDEX] if name == "labels" else values and values[:1] for name, values in row.items()}
    blank |= {"seq_lengths": [1]} if "seq_lengths" in row else {}
    longer = concatenate_datasets([dataset, Dataset.from_list([blank] * lacking, features=dataset.features)])
    longer.total_dataset_length = len(dataset)  # to which accelerate cuts what it gathers
    return longer
