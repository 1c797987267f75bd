"""Pairs that were not trained on, scored by a reward model: how often the better answer has the higher reward, and
whether the probabilities that its margins stand for are true."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.formats import FormatOptions, parse_rows
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder
from tunesmith.errors import TunesmithError
from tunesmith.evaluate.evaluation import Settings, Source
from tunesmith.evaluate.scores import bootstrap, wilson
from tunesmith.runs.calibration import Bin, PairScores
from tunesmith.runs.record import Origin
from tunesmith.terminal.output import note as say

if TYPE_CHECKING:
    from tunesmith.data.batches import Group

EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the bins of probabilities."""
PAIRS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardEvaluation:
    """What was scored: the places of the pairs with the rewards (P, 2) of the chosen and the rejected answer."""

    scores: PairScores
    places: Sequence[str]
    rewards: Sequence[tuple[float, float]]
    counts: Counts

    def as_json(self) -> dict[str, Any]:
        left_out = {why: {"rows": count, "places": at} for why, (count, at) in self.counts.dropped.items()}
        return asdict(self.scores) | {"calibration_error": self.scores.error, "left_out": left_out}

    def lines(self) -> Iterable[str]:
        """A line of JSON for each pair."""
        for place, (chosen, rejected) in zip(self.places, self.rewards, strict=True):
            yield json.dumps({"place": place, "chosen": chosen, "rejected": rejected}, ensure_ascii=False) + "\n"


def scores_texts(run: str, trust_remote_code: bool = False) -> bool:
    """Whether a run, or a model by name, is a sequence classifier, which scores texts and writes none."""
    from tunesmith.model.load import (
        adapters_score,
        holds_adapters,
        is_classifier,
        load_config,
        resolve_model,
        run_folder,
    )

    folder = str(run_folder(Path(resolve_model(run, say))))
    if holds_adapters(folder):
        return adapters_score(folder)
    return is_classifier(load_config(folder, trust_remote_code=trust_remote_code))


def evaluate_pairs(settings: Settings, source: Source) -> RewardEvaluation:
    """Scores the pairs of `source`, and writes what came of it beside the run, where that is a folder here.

    Raises TunesmithError for what can't be read, and where no pair is left.
    """
    from tunesmith.model.generate import room_of
    from tunesmith.model.load import load_run, resolve_model, run_folder

    counts = Counts()
    model, tokenizer = load_run(
        settings.run, trust_remote_code=settings.trust_remote_code, progress=say, classifier=True
    )
    rows = parse_rows(source.read(), FormatOptions(columns=source.columns, task="ranked"))
    encoder = Encoder(tokenizer, EncodeOptions(ranked=True, max_length=room_of(model), overlong="drop"))
    places, pairs = _pairs(encoder, rows, counts)
    if not pairs:
        reasons = "; ".join(f"{reason}: {count}" for reason, (count, _) in counts.dropped.items())
        raise TunesmithError(f"{source.data} has no pair to score ({reasons or 'it is empty'})")
    if settings.limit is not None and settings.limit < len(pairs):
        drawn = sorted(np.random.default_rng(settings.seed).permutation(len(pairs))[: settings.limit].tolist())
        places, pairs = [places[i] for i in drawn], [pairs[i] for i in drawn]
    rewards = _rewards(model, pairs, settings.batch_size or PAIRS_AT_ONCE)
    scores = pair_scores(Origin.of_data(source.data).name, rewards, settings.seed)
    folder = run_folder(Path(resolve_model(settings.run)))
    if folder.is_dir():
        scores.write(folder)
    return RewardEvaluation(scores=scores, places=places, rewards=rewards, counts=counts)


def _pairs(encoder: Encoder, rows: Iterable[tuple[str, Any]], counts: Counts) -> "tuple[list[str], list[Group]]":
    from tunesmith.data.batches import pairs_of

    places, pairs = list[str](), list["Group"]()
    for place, row in rows:
        for example in encoder.encode([(place, row)], counts):
            lengths, parents = example.parts or ([len(example.input_ids)], [-1])
            prepared = {
                "input_ids": example.input_ids,
                "labels": example.labels,
                "seq_lengths": lengths,
                "parents": parents,
            }
            places.append(str(place))
            pairs += pairs_of(prepared)
    return places, pairs


def _rewards(model: Any, pairs: "Sequence[Group]", size: int) -> list[tuple[float, float]]:
    """The rewards of both answers of each pair, `size` pairs at a time."""
    import torch

    from tunesmith.data.batches import FlatCollator, PaddedCollator
    from tunesmith.model.adapters import base_model
    from tunesmith.model.scores import answer_scores, check_classifier, scores_of, why_padded

    check_classifier(model)
    base = base_model(model)
    flat = not why_padded(base)
    if flat:
        answer_scores(base)
    pad = base.config.get_text_config().pad_token_id or 0
    collator = FlatCollator(share_prefix=True) if flat else PaddedCollator(pad_token_id=pad)
    found: list[tuple[float, float]] = []
    for start in range(0, len(pairs), size):
        batch = collator.batch(pairs[start : start + size]).to(base.device)
        with torch.inference_mode():
            scores = scores_of(model, batch).tolist()
        found += zip(scores[::2], scores[1::2], strict=True)
    return found


def pair_scores(data: str, rewards: Sequence[tuple[float, float]], seed: int) -> PairScores:
    """What the rewards of chosen and rejected answers come to. Equal rewards are no preference for the chosen one."""
    margins = np.array([chosen - rejected for chosen, rejected in rewards], dtype=float)
    right = margins > 0
    predicted = 1 / (1 + np.exp(-np.abs(margins)))
    numbers = np.minimum(np.digitize(predicted, EDGES[1:-1]), len(EDGES) - 2)
    bins = [
        Bin(
            low=EDGES[i],
            high=EDGES[i + 1],
            pairs=int((numbers == i).sum()),
            predicted=float(predicted[numbers == i].mean()),
            observed=float(right[numbers == i].mean()),
        )
        for i in sorted({*numbers.tolist()})
    ]
    accuracy, margin = wilson(int(right.sum()), len(right)), bootstrap(margins, seed)
    return PairScores(
        data=data,
        pairs=len(right),
        accuracy=(accuracy.value, accuracy.low, accuracy.high),
        margin=(margin.value, margin.low, margin.high),
        bins=tuple(bins),
    )
