"""A trainer of rows as the user gave them: what it evaluates on is prepared like what it trains on."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, cast

from tunesmith.data.dataset import DataPreparer, Source
from tunesmith.train.trainer import BaseTrainer
from tunesmith.types import Row

Sources: TypeAlias = Source | Mapping[str, Source]


class RowsTrainer(BaseTrainer):
    """What trainers with a `DataPreparer` share."""

    data: DataPreparer

    def evaluate(
        self,
        eval_dataset: Sources | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in `transformers`; a data set given here is prepared like the one of the constructor."""
        if isinstance(eval_dataset, Mapping):
            metrics: dict[str, float] = {}
            for name, source in eval_dataset.items():
                metrics |= self.evaluate(source, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.data.evaluated(eval_dataset, by_row=self.compute_metrics is not None)
        return super().evaluate(cast(Any, eval_dataset), ignore_keys, metric_key_prefix)

    def first_rows(self) -> Iterator[Row]:
        """Some of the rows that were given, as they were understood; those held out first."""
        return self.data.first_rows()
