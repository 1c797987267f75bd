"""What the user gave as data to what the trainer reads: prepared, mixed, shuffled and packed data sets.

`prepare` makes a data set of one source; here are the splits of a run, and what they have in common.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast
from weakref import WeakSet

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets

from tunesmith.data.arrow import list_lengths
from tunesmith.data.formats import ArrowRow, FormatOptions, Task, parse_each, parse_rows
from tunesmith.data.messages import TurnOptions, names_in
from tunesmith.data.mixture import DataSource, concatenated, epoch_examples, mixture_order, split_rows
from tunesmith.data.pack import pack_dataset
from tunesmith.data.preflight import Preflight, SplitReport, is_train, judge, shared_examples
from tunesmith.data.prepare import Preparation, prepare
from tunesmith.data.prompts import TrainedForm
from tunesmith.data.read import Rows, unbatched, with_places
from tunesmith.data.skipped import SKIPPED, BadRow, SkippedRows
from tunesmith.data.streams import resumable
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder
from tunesmith.errors import TunesmithError
from tunesmith.settings.config import Config
from tunesmith.text import counted
from tunesmith.types import Row

logger = logging.getLogger(__name__)

Prepared: TypeAlias = Dataset | IterableDataset
Source: TypeAlias = Prepared | Rows | Sequence[Mapping[str, Any]]
LOOKED_AT = 64
"""How many rows of a source are looked at before training."""
COLUMNS = ["input_ids", "labels", "weights", "scores", "reference", "seq_lengths", "parents"]


class DataPreparer:
    """Prepares each split of a run with the same tokenizer and settings, and keeps a report of each.

    By split: `examples` before they are mixed and packed, `counts` and `reports` of what became of the rows, and the
    rows that `on_bad_row: skip` left out in `skipped`. A stream has counts only.

    `shares`: the documents of a conversation are one row, which only our collators read; without it each is a row.
    `task`: what the rows are read as.
    """

    def __init__(
        self,
        args: Config,
        tokenizer: Any,
        formatting_func: Callable[..., Any] | None,
        *,
        shares: bool = True,
        task: Task = "supervised",
    ) -> None:
        if formatting_func is not None and args.resolved_train_on == "completion":
            raise TunesmithError(
                "formatting_func makes texts or conversations; with train_on: completion it must return "
                "(prompt, completion) pairs, for which completion is the default: leave train_on unset"
            )
        self.args, self.tokenizer, self._shares = args, tokenizer, shares
        self.formats = FormatOptions(
            text_field=args.text_column,
            columns=cast(dict[str, str], args.columns or {}),
            formatting_func=formatting_func,
            skip_bad=args.on_bad_row == "skip",
            turns=TurnOptions(known_roles=names_in(tokenizer.chat_template), merge_turns=args.merge_turns),
            task=task,
        )
        self.skipped: dict[str, SkippedRows] = {}
        self._saves_skipped = False
        self.counts: dict[str, Counts] = {}
        self.reports: dict[str, SplitReport] = {}
        self.examples: dict[str, Dataset] = {}
        self._prepared_here: WeakSet[Prepared] = WeakSet()
        self._mixture: dict[str, int] = {}
        self._looked: dict[str, Counts] = {}
        self._sources: dict[str, tuple[Source, FormatOptions]] = {}

    def __call__(self, source: Source, split: str, *, packing: bool) -> Prepared:
        """`source` ready for the collator. Rows that are tokenized already pass through the same checks. What was
        prepared here is returned as it is, so that `trainer.evaluate(trainer.train_dataset)` means what it says."""
        if isinstance(source, Prepared) and source in self._prepared_here:
            return source
        dataset = self._prepare(source, split, packing)
        self._prepared_here.add(dataset)
        return dataset

    def adopt(self, dataset: Prepared) -> None:
        """`dataset` was made of one that was prepared here, and is taken as it is from now on."""
        self._prepared_here.add(dataset)

    @property
    def packs_eval(self) -> bool:
        """Whether evaluation reads packs: as training does, unless `eval_packing` says otherwise."""
        return bool(self.args.packing if self.args.eval_packing is None else self.args.eval_packing)

    def everything(self, train: Any, evaluated: Any, *, by_row: bool = False) -> tuple[Any, Any]:
        """What is trained on, and what is evaluated on: nothing, one data set, or several by name. `by_row`: as
        `evaluated`."""
        if isinstance(train, DatasetDict | IterableDatasetDict):
            example = "train" if "train" in train else next(iter(train), "train")
            raise TunesmithError(
                f"the training data is a data set with the splits {', '.join(map(repr, train))}, which would all be "
                f"trained on; give one of them: `train_dataset=data[{example!r}]`"
            )
        prepared_eval = self.evaluated(evaluated, by_row=by_row)
        if not isinstance(train, Mapping):
            return self(train, "train", packing=self.args.packing), prepared_eval
        packs = self.packs_eval and not by_row
        prepared, held_out = self.mixture(train, packing=self.args.packing, eval_packing=packs)
        if held_out and prepared_eval is not None:
            raise TunesmithError("eval_dataset is given, and sources hold rows out; keep one of them")
        if len(train) == 1 and held_out:
            return prepared, next(iter(held_out.values()))
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
    ) -> tuple[Prepared, dict[str, Prepared]]:
        """Named sources as one training set, and what they hold out, by source. One source alone is no mixture: its
        splits are "train" and "eval"."""
        named = {
            name: source if isinstance(source, DataSource) else DataSource(rows=source)
            for name, source in sources.items()
        }
        train, held_out, alone = {}, {}, len(named) == 1
        for name, source in named.items():
            formats = replace(
                self.formats,
                columns=self.formats.columns if source.columns is None else source.columns,
                text_field=source.text_field or self.formats.text_field,
            )
            rows, held_out_rows = source.rows, None
            if source.held_out:
                rows, held_out_rows = split_rows(name, with_places(source.rows), source.held_out, self.args.seed)
            train[name] = self._prepare_examples(
                rows, "train" if alone else f"train/{name}", self._options(packing), formats
            )
            if held_out_rows:
                split = "eval" if alone else name
                examples = self._prepare_examples(held_out_rows, split, self._options(eval_packing), formats)
                held_out[name] = self._pack(examples) if eval_packing else examples
        sizes, seed = {name: len(examples) for name, examples in train.items()}, self.args.seed
        order = mixture_order(sizes, named, seed)
        used = {name: len(epoch_examples(name, named[name], size, seed)) for name, size in sizes.items()}
        self._mixture = {} if alone and used == sizes else used
        dataset = concatenated(train.values()).select(order)
        if packing:
            dataset = self._pack(dataset)
        self._prepared_here.update([dataset, *held_out.values()])
        return dataset, held_out

    def preflight(self) -> Preflight:
        """The problems and notes of all that was prepared so far."""
        ends = " ".join(sorted({str(self.tokenizer.eos_token)}))
        shared = shared_examples(self.examples)
        preflight = judge(
            self.reports,
            shared=shared,
            # What a stream holds is not known before it is read, nor what the user prepared.
            allow_no_eos=self.args.allow_no_eos or not any(is_train(split) for split in self.reports),
            end_tokens=ends,
            ranked=self.formats.task == "ranked",
        )
        if self._mixture:
            parts = ", ".join(f"{count:,} of {name}" for name, count in self._mixture.items())
            preflight.notes.insert(0, f"train: an epoch uses {parts}")
        return preflight

    def save_skipped(self) -> None:
        """Write the rows that are left out, now and later, to `skipped_rows.jsonl` in the output folder."""
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
        """The first rows of each source that is trained on, or of each that is not, as they were understood."""
        for split, (source, formats) in self._sources.items():
            if is_train(split) == trained_on:
                for _, row in islice(parse_rows(with_places(source), formats), LOOKED_AT):
                    yield row

    def first_rows(self) -> Iterator[Row]:
        """The first rows of each source; those that are not trained on come first."""
        return chain(self.rows(trained_on=False), self.rows(trained_on=True))

    @property
    def stops(self) -> set[int]:
        """The tokens at which generation is to stop: all that end a supervised turn or text."""
        return {token for counts in (*self.counts.values(), *self._looked.values()) for token in counts.stops}

    @property
    def form(self) -> TrainedForm:
        """How most of the conversations that are trained on are rendered."""
        turns: dict[str, int] = {}
        for split, counts in (*self.counts.items(), *self._looked.items()):
            for arguments, count in counts.arguments.items() if is_train(split) else ():
                turns[arguments] = turns.get(arguments, 0) + count
        switched = json.loads(max(turns, key=lambda arguments: turns[arguments])) if turns else {}
        own = cast(dict[str, Any], self.args.chat_template_kwargs or {})
        specials: Literal["keep", "text"] = "keep" if turns and self.args.specials_in_content == "keep" else "text"
        return TrainedForm(arguments={**own, **switched}, specials=specials)

    def _prepare(self, source: Source, split: str, packing: bool) -> Prepared:
        if cast(dict[str, Any], self.args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            if not isinstance(source, Prepared):
                kind = type(source).__name__
                raise TunesmithError(f"{split}: skip_prepare_dataset needs a datasets.Dataset, not {kind}")
            names = set(source.column_names or ())
            if (masks := sorted(names & {"assistant_masks", "completion_mask"})) and "labels" not in names:
                raise TunesmithError(
                    f"{split}: skip_prepare_dataset takes rows as they are, and {' and '.join(masks)} would be "
                    "ignored. Add a 'labels' column, -100 where nothing is supervised, or drop skip_prepare_dataset"
                )
            return resumable(source) if isinstance(source, IterableDataset) else source
        options = self._options(packing)
        if isinstance(source, IterableDataset):
            if packing:
                raise TunesmithError(f"{split}: packing needs all lengths; load the stream, or set packing: false")
            return self._stream(source, split, Encoder(self.tokenizer, options))
        dataset = self._prepare_examples(source, split, options, self.formats)
        if not (self._shares or self.args.remove_unused_columns or packing):
            dataset = self._with_columns(dataset, source, split)
        if self.args.shuffle_dataset:
            dataset = dataset.shuffle(seed=self.args.seed)
        return self._pack(dataset) if packing else dataset

    def _prepare_examples(self, source: Source, split: str, options: EncodeOptions, formats: FormatOptions) -> Dataset:
        preparation = Preparation(
            tokenizer=self.tokenizer, encode=options, formats=formats, processes=self.args.dataset_num_proc or 1
        )
        try:
            skipped = self._left_out(split)
            dataset, report = prepare(with_places(source), preparation, source=source, skipped=skipped)
        except TunesmithError as error:
            raise TunesmithError(f"{split} data: {error}") from error
        self.counts[split], self.reports[split], self.examples[split] = report.counts, report, dataset
        self._sources[split] = source, formats
        if self._saves_skipped:  # data for an evaluation in between
            self.save_skipped()
        return dataset

    def _with_columns(self, dataset: Dataset, source: Source, split: str) -> Dataset:
        """`dataset` with the other columns of its rows, which a collator of the user's may read. There are none where
        rows and examples are not the same ones."""
        if not isinstance(source, Dataset | Sequence):
            return dataset
        rows = [] if isinstance(source, Dataset) else [row for row in source if isinstance(row, Mapping)]
        known = source.column_names if isinstance(source, Dataset) else dict.fromkeys(chain.from_iterable(rows))
        names, counts = [name for name in known if name not in dataset.column_names], self.counts[split]
        if not names:
            return dataset
        if counts.dropped or not len(source) == counts.rows == len(dataset):
            logger.warning(
                "%s: remove_unused_columns is False, and the data_collator does not get %s: of %s, %s became examples, "
                "and the columns are of rows",
                split,
                ", ".join(names),
                counted(counts.rows, "row"),
                f"{len(dataset):,}",
            )
            return dataset
        if isinstance(source, Dataset):
            return concatenate_datasets([dataset, source.select_columns(names).with_format(None)], axis=1)
        for name in names:
            with suppress(pa.ArrowException, TypeError):  # values of several types, which no column holds
                dataset = concatenate_datasets(
                    [dataset, Dataset(pa.table({name: [row.get(name) for row in rows]}))], axis=1
                )
        return dataset

    def _options(self, packing: bool) -> EncodeOptions:
        cuts = packing and self.args.packing_strategy != "bfd"  # those strategies cut overlong examples themselves
        return EncodeOptions(
            train_on=self.args.resolved_train_on,
            turns=self.args.turns,
            prompt_mismatch=self.args.prompt_mismatch,
            marks=self.args.marks,
            drop_reasoning=self.args.drop_reasoning,
            specials_in_content=self.args.specials_in_content,
            share=self._shares and not cuts,
            ranked=self.formats.task == "ranked",
            max_length=None if cuts else self.args.max_length,
            overlong=self.args.overlong,
            truncate_prompt=self.args.cuts_prompt,
            template_kwargs=cast(dict[str, Any], self.args.chat_template_kwargs or {}),
            skip_bad=self.formats.skip_bad,
        )

    def _stream(self, source: IterableDataset, split: str, encoder: Encoder) -> IterableDataset:
        """A stream whose rows are prepared as they come. Its first rows are looked at now, in place of a preflight."""
        counts = self.counts[split] = Counts()
        ahead = [ArrowRow(row) for row in source.take(LOOKED_AT)]
        if not ahead:
            raise TunesmithError(f"{split} data: the stream is empty")
        first, skipped = self._first_usable(ahead, split), self._left_out(split)

        def parsed(batch: Iterable[Mapping[str, Any]], numbers: Iterable[int]) -> list[Any]:
            rows = ((f"row {i}", row) for i, row in zip(numbers, batch, strict=True))
            return list(islice(parse_each(chain([first], rows), self.formats), 1, None))

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            examples = encoder.encode(parsed(unbatched(batch), indices), counts)
            if skipped is not None:
                skipped.add(counts.take_bad())
            return {
                "input_ids": [example.input_ids for example in examples],
                "labels": [example.labels for example in examples],
                "weights": [example.weights for example in examples],
                "scores": [[example.score] * len(example.labels) if example.score else None for example in examples],
                "seq_lengths": [example.parts and example.parts[0] for example in examples],
                "parents": [example.parts and example.parts[1] for example in examples],
            }

        looked = Counts()
        encoder.encode(parsed(ahead, range(len(ahead))), looked)
        if is_train(split) and not (looked.stops or self.args.allow_no_eos or self.formats.task == "ranked"):
            raise TunesmithError(
                f"{split} data: no supervised token ends a text in the first {len(ahead)} rows of the stream, so the "
                "model would never learn to stop. Train on whole texts, raise max_length, or set allow_no_eos: true"
            )
        self._looked[split] = looked
        if skipped is not None:
            skipped.add(looked.take_bad())
        if self.args.shuffle_dataset:
            source = source.shuffle(seed=self.args.seed, buffer_size=self.args.shuffle_buffer_size)
        return resumable(source).map(encode, batched=True, with_indices=True, remove_columns=list(ahead[0]))

    def _first_usable(self, ahead: Sequence[Mapping[str, Any]], split: str) -> tuple[str, Mapping[str, Any]]:
        """The first row of a stream that can be read, with its place: every batch must have its format."""
        reasons = []
        for (place, row), source in zip(parse_each(with_places(ahead), self.formats), ahead, strict=True):
            if not isinstance(row, BadRow):
                return place, source
            reasons.append(str(row.error(place)))
        raise TunesmithError(
            f"{split} data: none of the first {len(ahead)} rows of the stream can be used: {reasons[0]}"
        )

    def _pack(self, dataset: Dataset) -> Dataset:
        limit = self.args.max_length
        assert limit is not None
        if self.formats.task in (
            "pairs",
            "ranked",
        ):  # max_length is that of each answer with its prompt, and a pair is never torn
            limit = max(limit, int(list_lengths(dataset.data.table, "input_ids").max(initial=0)))
        return pack_dataset(dataset, limit, self.args.packing_strategy)
