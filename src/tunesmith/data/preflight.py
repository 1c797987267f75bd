"""What would go wrong in training, counted on the prepared examples before any weight is loaded.

A problem stops the run; a note is odd but legal and is only listed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tunesmith.data.arrow import list_column
from tunesmith.data.tokenize import Counts
from tunesmith.errors import TunesmithError
from tunesmith.text import counted, verb
from tunesmith.types import IGNORE_INDEX

BUCKETS = 8
NAMED_EXAMPLES = 5
LOW_SUPERVISION = 0.02
HIGH_LOSS = 0.1
LENGTH_BIAS = 1.25
"""Chosen answers that are so many times as long as rejected ones are worth a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitReport:
    """One split, in numbers. `lengths` is a histogram: (first length, last length, examples)."""

    counts: Counts
    longest: int
    lengths: list[tuple[int, int, int]]
    duplicates: int
    without_end: int
    double_bos: int
    weightless: int

    @property
    def supervised_share(self) -> float:
        return self.counts.supervised / max(1, self.counts.tokens)

    def as_json(self) -> dict[str, Any]:
        values = asdict(self) | {"supervised_share": self.supervised_share}
        del values["counts"]["bad"]  # which are kept elsewhere
        return values

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> "SplitReport":
        """What `as_json` gave, after a way through JSON."""
        values = {name: value for name, value in report.items() if name != "supervised_share"}
        lengths = [(low, high, count) for low, high, count in values["lengths"]]
        return cls(**values | {"counts": Counts.from_json(values["counts"]), "lengths": lengths})


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """All splits of a run, the problems that stop it, and notes that do not."""

    splits: Mapping[str, SplitReport]
    problems: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        splits = {name: report.as_json() for name, report in self.splits.items()}
        return {"splits": splits, "problems": self.problems, "notes": self.notes}

    def stop_on_problems(self) -> None:
        """Raises TunesmithError when training on this data would be wrong."""
        if self.problems:
            raise TunesmithError("\n".join(self.problems))


def examine(dataset: Any, counts: Counts, bos_token_id: int | None, *, ranked: bool = False) -> SplitReport:
    """Count over prepared examples (before packing). Those that are `ranked` teach no end, and lack none."""
    lengths: list[Any] = []
    double = weightless = 0
    for batch in _record_batches(dataset):
        offsets, ids = list_column(batch, "input_ids")
        lengths.append(np.diff(offsets))
        starts = offsets[:-1][lengths[-1] > 1]
        double += int(((ids[starts] == bos_token_id) & (ids[starts + 1] == bos_token_id)).sum())
        if "weights" in batch.schema.names and (column := batch.column("weights")).null_count < len(column):
            supervised = list_column(batch, "labels")[1] != IGNORE_INDEX
            totals = np.add.reduceat(np.where(supervised, list_column(batch, "weights")[1], 0), offsets[:-1])
            weightless += int((totals == 0).sum())
    sizes = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    return SplitReport(
        counts=counts,
        longest=int(sizes.max(initial=0)),
        lengths=histogram(sizes),
        duplicates=len(sizes) - len(digests(dataset)),
        without_end=0 if ranked else counts.examples - sum(counts.ends.values()),
        double_bos=double if bos_token_id is not None else 0,
        weightless=weightless,
    )


def digests(dataset: Any) -> Any:
    """One 64-bit digest of its token ids for each different example, sorted (uint64)."""
    joined = bytearray()
    for batch in _record_batches(dataset):
        offsets, ids = list_column(batch, "input_ids")
        raw, places = memoryview(ids.tobytes()), (offsets * ids.dtype.itemsize).tolist()
        for start, stop in pairwise(places):
            joined += hashlib.blake2b(raw[start:stop], digest_size=8).digest()
    return np.unique(np.frombuffer(joined, np.uint64))


def supervised_counts(dataset: Any) -> Any:
    """How many tokens of each example are supervised (N,)."""
    counts = [np.zeros(0, np.int64)]
    for batch in _record_batches(dataset):
        offsets, labels = list_column(batch, "labels")
        before = np.concatenate([[0], np.cumsum(labels != IGNORE_INDEX)])
        counts.append(np.diff(before[offsets]))
    return np.concatenate(counts)


def _record_batches(dataset: Any) -> list[Any]:
    """The data set as it lies on the disk, a part at a time: by arrays, a million rows take seconds, and memory for
    their lengths and digests only."""
    batches: list[Any] = dataset.data.table.to_batches()
    return batches


def shared_examples(datasets: Mapping[str, Any]) -> dict[str, int]:
    """How many distinct examples of each other split are in the training data too."""
    train = [digests(dataset) for name, dataset in datasets.items() if is_train(name)]
    if not train or len(train) == len(datasets):
        return {}
    known = np.concatenate(train)
    return {
        name: len(np.intersect1d(known, digests(dataset))) for name, dataset in datasets.items() if not is_train(name)
    }


def is_train(split: str) -> bool:
    """Whether a split is trained on: "train", and "train/NAME" for a source of a mixture."""
    return split.split("/")[0] == "train"


def histogram(lengths: Any) -> list[tuple[int, int, int]]:
    """Lengths in up to eight buckets whose bounds double, the shortest first."""
    if not len(lengths):
        return []
    bounds = [int(lengths.max())]
    while len(bounds) < BUCKETS and bounds[-1] > max(16, int(lengths.min())):
        bounds.append(bounds[-1] // 2)
    bounds = [0, *reversed(bounds)]
    if bounds[1] < int(lengths.min()):
        bounds[0] = bounds[1]
    buckets = [(low + 1, high, int(((lengths > low) & (lengths <= high)).sum())) for low, high in pairwise(bounds)]
    return [bucket for bucket in buckets if bucket[2]]


def judge(
    splits: Mapping[str, SplitReport],
    *,
    shared: Mapping[str, int],
    allow_no_eos: bool,
    end_tokens: str,
    ranked: bool = False,
) -> Preflight:
    """The problems that stop the run, and the notes.

    `shared` is what `shared_examples` gives; `end_tokens` names the tokens that would end a text. Of `ranked` rows one
    token is scored, and none is learned.
    """
    allow_no_eos = allow_no_eos or ranked
    problems: list[str] = []
    notes: list[str] = []
    if not allow_no_eos and not any(report.counts.stops for name, report in splits.items() if is_train(name)):
        problems.append(
            f"train data: no supervised token ends a text ({end_tokens}), so the model would never learn to stop. "
            "Train on whole turns or texts, raise max_length if all are cut, or set allow_no_eos: true"
        )
    for name, report in splits.items():
        if report.without_end and not problems:
            endless = f"{counted(report.without_end, 'example')} {verb(report.without_end, 'does', 'do')}"
            notes.append(f"{name}: {endless} not end with an end token (cut, or meant so)")
        if report.double_bos:
            begin = f"{counted(report.double_bos, 'example')} {verb(report.double_bos, 'begins', 'begin')}"
            problems.append(
                f"{name} data: {begin} with two BOS tokens; take the BOS text out of the rows, or out of the template"
            )
        notes += _notes(name, report, ranked=ranked)
    notes += [
        f"{name}: {counted(count, 'example')} {verb(count, 'is', 'are')} in the training data too; its loss will look "
        "too good"
        for name, count in shared.items()
        if count
    ]
    return Preflight(splits=splits, problems=problems, notes=notes)


def _answer_notes(name: str, counts: Counts, *, ranked: bool) -> list[str]:
    """What is known of answers that are compared or judged."""
    notes = []
    if counts.pairs:
        better, worse = (tokens / counts.pairs for tokens in counts.answer_tokens)
        shares = [f"{100 * longer / counts.pairs:.0f}%" for longer in counts.longer]
        notes.append(
            f"{name}: of {counted(counts.pairs, 'pair')}, chosen answers have {better:.0f} tokens on average and "
            f"rejected ones {worse:.0f}; chosen is longer in {shares[0]}, rejected in {shares[1]}"
        )
        if better > LENGTH_BIAS * worse:
            notes.append(
                f"{name}: chosen answers are much longer than rejected ones, so the model may learn to "
                + (
                    "prefer what is long"
                    if ranked
                    else "be long; ld_alpha, or a loss that divides by the length (loss_type: sigmoid_norm), counts "
                    "against it"
                )
            )
    if sum(counts.judged):
        good, bad = counts.judged
        notes.append(f"{name}: {good:,} good answers and {bad:,} bad ones")
    return notes


def _notes(name: str, report: SplitReport, *, ranked: bool) -> list[str]:
    counts, notes = report.counts, []
    if counts.skipped:
        notes.append(
            f"{name}: {counts.skipped:,} of {counted(counts.rows, 'row')} can't be used and "
            f"{verb(counts.skipped, 'is', 'are')} left out (on_bad_row: skip)"
        )
    for reason, (count, places) in counts.dropped.items():
        notes.append(
            f"{name}: {counted(count, 'row')} dropped, {reason}: {', '.join(places)}"
            f"{', ...' if count > len(places) else ''}"
        )
    for note, (count, places) in counts.notes.items():
        notes.append(
            f"{name}: {counted(count, 'row')} {note}: {', '.join(places)}{', ...' if count > len(places) else ''}"
        )
    if {*counts.arguments} - {"{}"}:
        ways = {"as it is" if key == "{}" else key: count for key, count in counts.arguments.items()}
        listed = ", ".join(f"{count:,} with the template {key}" for key, count in ways.items())
        notes.append(f"{name}: answers follow the prompt that fits their reasoning: {listed}")
    notes += _answer_notes(name, counts, ranked=ranked)
    if counts.truncated:
        share = counts.lost_tokens / (counts.tokens + counts.lost_tokens)
        more = "; raise max_length" if share > HIGH_LOSS else ""
        notes.append(f"{name}: {counted(counts.truncated, 'example')} truncated, {share:.1%} of the tokens lost{more}")
    if report.duplicates:
        copies = verb(report.duplicates, "is an exact copy", "are exact copies")
        notes.append(f"{name}: {counted(report.duplicates, 'example')} {copies} of another")
    if report.supervised_share < LOW_SUPERVISION and not ranked:
        notes.append(f"{name}: only {report.supervised_share:.2%} of the tokens are supervised")
    if report.weightless:
        have = verb(report.weightless, "has", "have")
        notes.append(f"{name}: {counted(report.weightless, 'example')} {have} weight 0 throughout")
    return notes
