"""Rows that only ask: prompts, to which a model draws its own answers, and columns for whoever judges these.

{"prompt": "2 + 2 =", "answer": 4}                              a text to go on with
{"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": 4}  a conversation, answered through the template
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from tunesmith.data.messages import TurnOptions, names_in, read_turns
from tunesmith.data.mixture import DataSource, split_rows
from tunesmith.data.preflight import Preflight
from tunesmith.data.prompts import TrainedForm, prompt_ids, text_ids
from tunesmith.data.read import with_places
from tunesmith.data.skipped import SKIPPED, BadRow, SkippedRows
from tunesmith.data.values import shown
from tunesmith.errors import TunesmithError, nearest
from tunesmith.text import counted
from tunesmith.types import Conversation, Message, Row, Text


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt, a text or messages, with its tokens, the row that it is in, and the place of that."""

    prompt: str | list[dict[str, Any]]
    ids: list[int]
    row: Mapping[str, Any]
    place: str


class Questions:
    """Reads the prompts of each split of a run with the same tokenizer and settings; stands where a trainer of rows has
    a `DataPreparer`.

    A prepared split is a data set with the number of each question in `every`, its tokens (`prompt_ids`), and a digest
    of its row; the rows themselves stay what the user gave. `columns` are those of the rows, by split. `tools` are the
    schemas of functions that each prompt tells the model of.
    """

    def __init__(self, args: Any, tokenizer: Any, tools: Sequence[Any] = ()) -> None:
        self._args, self._tokenizer = args, tokenizer
        self._shown = {**(args.chat_template_kwargs or {})} | ({"tools": [*tools]} if tools else {})
        self._turns = TurnOptions(known_roles=names_in(tokenizer.chat_template), merge_turns=args.merge_turns)
        self.every: list[Question] = []
        self.columns: dict[str, set[str]] = {}
        self.examples: dict[str, Dataset] = {}  # of supervised examples there are none
        self._splits: dict[str, tuple[int, int]] = {}
        self._skipped: dict[str, SkippedRows] = {}
        self._notes: list[str] = []
        if unknown := {*(args.columns or {})} - {"prompt"}:
            raise TunesmithError(f"columns: {min(unknown)!r} is not read here; write `columns: {{prompt: ...}}`")

    def __call__(self, source: Any, split: str) -> Dataset:
        """The questions of a source, ready for a sampler. Raises TunesmithError for rows without a prompt."""
        if isinstance(source, DatasetDict | IterableDatasetDict):
            raise TunesmithError(f"{split} data has the splits {', '.join(source)}; give one: data[{min(source)!r}]")
        first, columns, skipped = len(self.every), set[str](), SkippedRows()
        bad_rows = 0
        for place, row in with_places(source):
            try:
                if isinstance(row, BadRow):
                    raise row.error(place)
                question = self._question(place, row)
            except TunesmithError as error:
                if self._args.on_bad_row != "skip":
                    raise TunesmithError(f"{split} data: {error}") from error
                bad = row if isinstance(row, BadRow) else BadRow(reason=str(error), content=dict(row))
                skipped.add([(place, bad)])
                bad_rows += 1
                continue
            columns.update(row)
            self.every.append(question)
        found = self.every[first:]
        if not found:
            raise TunesmithError(f"{split} data has no rows with a prompt")
        self.columns[split], self._splits[split] = columns, (first, len(self.every))
        lengths = [len(question.ids) for question in found]
        left_out = f"; {counted(bad_rows, 'row')} left out" if bad_rows else ""
        self._notes.append(
            f"{split}: {counted(len(found), 'prompt')} of {min(lengths):,} to {max(lengths):,} tokens{left_out}"
        )
        if bad_rows:
            self._skipped[split] = skipped
        return Dataset.from_dict(
            {
                "number": [*range(first, len(self.every))],
                "prompt_ids": [question.ids for question in found],
                "digest": [_digest(question.row) for question in found],
            }
        )

    def everything(self, train: Any, evaluated: Any, *, by_row: bool = False) -> tuple[Any, Any]:
        """What is trained on, and what is evaluated on: nothing, one data set, or several by name. Of a stream to train
        on, as many prompts are read as the run asks; one to evaluate on is read to its end."""
        if isinstance(train, IterableDataset):
            train = train.take(self._args.prompts_per_run)
        if not isinstance(train, Mapping) or isinstance(train, DatasetDict | IterableDatasetDict):
            return self(train, "train"), self.evaluated(evaluated, by_row=by_row)
        rows, held_out = [], {}
        for name, source in train.items():
            source = source if isinstance(source, DataSource) else DataSource(rows=source)
            for option in ("weight", "count", "columns", "text_field"):
                if getattr(source, option) is not None:
                    raise TunesmithError(f"data: {option} of source {name!r} is not for prompts; leave it out")
            used, kept = split_rows(name, with_places(source.rows), source.held_out, self._args.seed)
            rows += used
            if kept:
                held_out[name] = kept
        if held_out and evaluated is not None:
            raise TunesmithError("eval_dataset is given, and sources hold rows out; keep one of them")
        return self(rows, "train"), self.evaluated(held_out or evaluated, by_row=by_row)

    def evaluated(self, source: Any, *, by_row: bool = False) -> Any:
        """One data set to evaluate on, or several by name."""
        if isinstance(source, Mapping):
            return {name: self(rows, name) for name, rows in source.items()}
        return None if source is None else self(source, "eval")

    def save_skipped(self) -> None:
        """Write the rows that are left out to `skipped_rows.jsonl` in the output folder."""
        file = Path(str(self._args.output_dir)) / SKIPPED
        for split, skipped in self._skipped.items():
            skipped.copy_to(file, split)

    @property
    def stops(self) -> set[int]:
        """Of prompts, no token ends an answer."""
        return set()

    @property
    def form(self) -> TrainedForm:
        return TrainedForm(arguments=dict(self._args.chat_template_kwargs or {}))

    def _question(self, place: str, row: Mapping[str, Any]) -> Question:
        column = (self._args.columns or {}).get("prompt", "prompt")
        prompt = row.get(column)
        try:
            if prompt is None:
                raise TunesmithError(
                    f"no {column!r}{nearest(column, row)}; the row has {', '.join(map(str, row)) or 'nothing'}. Write "
                    "`columns: {prompt: ...}` with the column of the prompt"
                )
            if isinstance(prompt, str):
                if "tools" in self._shown:
                    raise TunesmithError(
                        f"{column!r} is a text, and tools are told of by the chat template; write it as messages: "
                        '[{"role": "user", "content": ...}]'
                    )
                return Question(prompt=prompt, ids=text_ids(self._tokenizer, prompt), row=row, place=place)
            if not isinstance(prompt, list | tuple | dict):
                raise TunesmithError(f"{column!r} is {shown(prompt)}, expected a text or a list of messages")
            turns = read_turns([prompt] if isinstance(prompt, dict) else [*prompt], column, self._turns)
            messages = [message.fields for message in turns.messages]
            if messages[-1]["role"] == "assistant":
                raise TunesmithError(f"the last message of {column!r} is the assistant's, who is to answer")
            ids = prompt_ids(self._tokenizer, messages, self._shown)
        except TunesmithError as error:
            raise TunesmithError(f"{place}: {error}") from error
        return Question(prompt=messages, ids=ids, row=row, place=place)

    # What others ask of the data

    def preflight(self) -> Preflight:
        return Preflight(splits={}, problems=[], notes=[*self._notes])

    def rows(self, trained_on: bool) -> Iterator[Row]:
        """The questions that are trained on, or the others, as rows without an answer."""
        for split, (start, stop) in self._splits.items():
            if (split == "train") == trained_on:
                for question in self.every[start:stop]:
                    if isinstance(question.prompt, str):
                        yield Text(text=question.prompt, prompt=question.prompt)
                    else:
                        turns = tuple(Message(fields=fields) for fields in question.prompt)
                        yield Conversation(messages=turns, prompt_length=len(turns))

    def first_rows(self) -> Iterator[Row]:
        yield from self.rows(trained_on=False)
        yield from self.rows(trained_on=True)


def _digest(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, sort_keys=True, default=repr, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
