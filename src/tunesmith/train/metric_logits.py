"""What `compute_metrics` gets: the logits of all rows of an evaluation at once, unless something makes less of them."""

from collections.abc import Mapping
from typing import Any, cast

from datasets import Dataset
from transformers import Trainer

from tunesmith.data.samplers import lengths_of
from tunesmith.errors import TunesmithError
from tunesmith.model.devices import available

SHARE = 0.5
"""Of the main memory that is free, so much may be filled with logits: metrics make copies."""
FLOAT = 4
"""Bytes of a logit: `transformers` keeps them as float32."""


def check_logits(trainer: Trainer, evaluated: Any) -> None:
    """Whether evaluating on `evaluated` (none, one data set, or several by name) holds few enough logits.

    Raises:
        TunesmithError: rows x longest row x vocabulary x 4 bytes are over `SHARE` of the memory that is free.
    """
    args = trainer.args
    reduced = trainer.preprocess_logits_for_metrics is not None or args.batch_eval_metrics
    if trainer.compute_metrics is None or reduced or args.prediction_loss_only:
        return
    vocabulary = int(cast(Any, trainer.model).config.get_text_config().vocab_size)
    for name, dataset in (evaluated if isinstance(evaluated, Mapping) else {"eval": evaluated}).items():
        # How long a stream is, nobody knows.
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names and len(dataset):
            _check_one(name, len(dataset), int(lengths_of(dataset).max()), vocabulary)


def _check_one(name: str, rows: int, longest: int, vocabulary: int) -> None:
    held, free = rows * longest * vocabulary * FLOAT, available()
    if held <= SHARE * free:
        return
    raise TunesmithError(
        f"{name} data: compute_metrics would hold {held:,} bytes of logits ({rows:,} rows x {longest:,} tokens x "
        f"{vocabulary:,} words x {FLOAT} bytes), and {free:,} are free. Write "
        "preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1), which leaves a token's id of each "
        "row of logits; or set batch_eval_metrics: true and take compute_result in compute_metrics, which then gets a "
        "batch at a time"
    )
