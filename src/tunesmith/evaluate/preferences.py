"""Pairs of answers that were not trained on: whether a run tells the better one from the worse one.

Nothing is generated. An answer's reward is beta times how much likelier it is to the run than to its base model, in
nats (Rafailov et al. 2023, arXiv:2305.18290), and the margin of a pair is that of the chosen answer less that of the
rejected one.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.formats import task_of
from tunesmith.data.tokenize import Counts
from tunesmith.errors import TunesmithError
from tunesmith.evaluate.evaluation import Settings, Source, base_model_of, record_of
from tunesmith.evaluate.scores import Metric, Result, bootstrap, paired, wilson
from tunesmith.terminal.output import note as say
from tunesmith.terminal.output import progress_console

if TYPE_CHECKING:
    import numpy as np

    from tunesmith.runs.record import RunRecord

BETA = 0.1
ROWS = 4
"""Pairs at a time."""
DATA_SETTINGS = ("max_length", "chat_template_kwargs", "specials_in_content")
"""Of a run: what decides about the tokens of its rows."""


def _unused(_answer: str, _expected: str) -> float | None:
    raise AssertionError("pairs are not scored by their texts")


REWARDS = Metric(name="reward accuracy", score=_unused)
MARGIN = Metric(name="reward margin", score=_unused, is_share=False)
LIKELIER = Metric(name="chosen is likelier", score=_unused)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preferences:
    """What the pairs came to. `tuned` and `base`, where there is a base model, are (rows, 2): the log-probability of
    the chosen and of the rejected answer in nats. `results`: the share of pairs whose chosen answer has the higher
    reward, the mean margin, and the share whose chosen answer is the likelier one."""

    beta: float
    tuned: "np.ndarray[Any, Any]"
    base: "np.ndarray[Any, Any] | None"
    results: list[Result]
    counts: Counts
    notes: list[str]

    def lines(self) -> Iterable[str]:
        """A line of JSON for each pair, in the order of the data."""
        for i, (chosen, rejected) in enumerate(self.tuned):
            line = {"pair": i, "tuned": {"chosen": float(chosen), "rejected": float(rejected)}}
            if self.base is not None:
                line["base"] = {"chosen": float(self.base[i, 0]), "rejected": float(self.base[i, 1])}
            yield json.dumps(line) + "\n"


def holds_pairs(source: Source) -> bool:
    """Whether the first row of `source` is a pair of answers."""
    _, first = next(iter(source.read()), ("", {}))
    return task_of(first, source.columns) == "pairs"


def compare(settings: Settings, source: Source) -> Preferences:
    """The log-probabilities of the answers of `source` by a run and by its base model, and what they come to.

    Raises TunesmithError for what can't be read, and where no pair is left.
    """
    import numpy as np
    from peft import PeftModel

    from tunesmith.model.load import load_run

    record = record_of(settings)
    model, tokenizer = load_run(settings.run, trust_remote_code=settings.trust_remote_code, progress=say)
    rows, counts = _prepared(source, tokenizer, record)
    if settings.limit is not None and settings.limit < len(rows):
        order = np.random.default_rng(settings.seed).permutation(len(rows))[: settings.limit]
        rows = rows.select(sorted(map(int, order)))
    size = settings.batch_size or ROWS
    tuned, base, notes = _log_probabilities("tuned", model, rows, size), None, list[str]()
    if settings.with_base and isinstance(model, PeftModel):
        with model.disable_adapter():
            base = _log_probabilities("base", model, rows, size)
    elif settings.with_base:
        del model  # two may not fit
        other, missing = base_model_of(record, max(map(max, rows["input_ids"])), settings)
        notes += [missing] if missing else []
        base = None if other is None else _log_probabilities("base", other, rows, size)
    for text in notes:
        say(f"note: {text}")
    beta = float((record.settings if record is not None else {}).get("beta", BETA))
    results = _results(tuned, base, beta, settings.seed)
    return Preferences(beta=beta, tuned=tuned, base=base, results=results, counts=counts, notes=notes)


def _results(tuned: Any, base: Any, beta: float, seed: int) -> list[Result]:
    likelier = (tuned[:, 0] > tuned[:, 1]).astype(float)
    count = len(tuned)
    own = wilson(int(likelier.sum()), count)
    if base is None:
        return [Result(metric=LIKELIER, count=count, tuned=own)]
    theirs = (base[:, 0] > base[:, 1]).astype(float)
    rewards = beta * (tuned - base)
    margins = rewards[:, 0] - rewards[:, 1]
    return [
        Result(metric=REWARDS, count=count, tuned=wilson(int((margins > 0).sum()), count)),
        Result(metric=MARGIN, count=count, tuned=bootstrap(margins, seed)),
        Result(
            metric=LIKELIER,
            count=count,
            tuned=own,
            base=wilson(int(theirs.sum()), count),
            difference=paired(likelier, theirs),
        ),
    ]


def _prepared(source: Source, tokenizer: Any, record: "RunRecord | None") -> tuple[Any, Counts]:
    """The pairs as trees of tokens, in the form in which the run was trained, and what became of the rows."""
    from tunesmith.data.dataset import DataPreparer
    from tunesmith.settings.preference import DPOConfig

    known: Mapping[str, Any] = record.settings if record is not None else {}
    given: dict[str, Any] = {name: known[name] for name in DATA_SETTINGS if name in known}
    if given.get("max_length") == "none":
        given["max_length"] = None
    config = DPOConfig(
        output_dir="unused", use_cpu=True, precision="fp32", report_to="none", columns=dict(source.columns), **given
    )
    preparer = DataPreparer(config, tokenizer, None, task="pairs")
    rows: Any = preparer(source.read(), "eval", packing=False)
    counts = preparer.counts["eval"]
    if not len(rows):
        reason, (count, places) = next(iter(counts.dropped.items()))
        raise TunesmithError(f"{source.data} has no pair left: {count:,} with {reason} ({', '.join(places)})")
    return rows.with_format(None), counts


def _log_probabilities(name: str, model: Any, rows: Any, size: int) -> Any:
    """(rows, 2) The log-probabilities of both answers, with a line on stderr that says how many are there."""
    import numpy as np
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tunesmith.data.batches import FlatCollator, PaddedCollator, pairs_of
    from tunesmith.objectives.logprobs import token_logprobs
    from tunesmith.train.setup import ready_for_batches

    device = next(model.parameters()).device
    flat = ready_for_batches(model, flat=True)
    collate = FlatCollator(read=pairs_of) if flat else PaddedCollator(read=pairs_of, pad_token_id=0)
    shown = (TextColumn("pairs, {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    found: list[list[float]] = []
    with Progress(*shown, console=progress_console(stderr=True)) as progress, torch.no_grad():
        task = progress.add_task(name, total=len(rows))
        for start in range(0, len(rows), size):
            part = [rows[i] for i in range(start, min(start + size, len(rows)))]
            batch = collate(part).to(device)
            answer = model(**batch.inputs(), targets=batch.targets(), objective=token_logprobs)
            sums = [float(values.sum()) for values in batch.by_document(answer.outcome.logprobs)]
            found += [[chosen, rejected] for chosen, rejected in zip(sums[::2], sums[1::2], strict=True)]
            progress.update(task, completed=len(found))
    return np.array(found)
