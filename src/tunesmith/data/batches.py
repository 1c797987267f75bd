"""Examples to tensors: flat rows without padding, and padded rows for models that can't take flat ones.

Shapes: B rows, T tokens a row. Labels stay unshifted here; `model.head.next_token_targets` shifts them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from tunesmith.data.prefix import shared
from tunesmith.types import IGNORE_INDEX

Rows = Sequence[dict[str, Any]]


def documents(rows: Rows) -> Iterator[tuple[list[int], list[int], list[float]]]:
    """Each document's ids, labels and weights. A packed row holds several, `seq_lengths` tokens each."""
    for row in rows:
        ids = _list(row["input_ids"])
        given = {name: row.get(name) for name in ("labels", "weights", "seq_lengths")}
        labels = ids if given["labels"] is None else _list(given["labels"])
        weights = [1.0] * len(ids) if given["weights"] is None else _list(given["weights"])
        stops = list(accumulate([len(ids)] if given["seq_lengths"] is None else _list(given["seq_lengths"])))
        for start, stop in zip([0, *stops[:-1]], stops, strict=True):
            # Nothing in its document predicts the first token; in a flat row its neighbour's last token would.
            yield ids[start:stop], [IGNORE_INDEX, *labels[start + 1 : stop]], weights[start:stop]


def _list(values: Any) -> list[Any]:
    """A list of numbers as it is, or that of a tensor or an array: the data set's format is the user's choice."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _weighted(rows: Rows) -> bool:
    return any(row.get("weights") is not None for row in rows)


def flat(rows: Rows, *, share_prefix: bool = False) -> dict[str, Any]:
    """One row (1, T) with all documents side by side.

    `lengths` are their token counts; positions start at 0 in each; `weights` (1, T) only where a row has weights. With
    `share_prefix`, and where that saves enough, documents that begin alike share their beginning (`data.prefix`): then
    `lengths` and `parents` tell the segments of the shorter `input_ids`, `labels` and `weights` stay those of all
    documents, and `places` (T,) says where in the row each of their tokens is.

    >>> batch = flat([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    >>> batch["labels"].tolist(), batch["position_ids"].tolist(), batch["lengths"]
    ([[-100, 6, 7, -100, 9]], [[0, 1, 2, 0, 1]], [3, 2])
    """
    parts = list(documents(rows))
    segments = shared([ids for ids, _, _ in parts]) if share_prefix else None
    batch: dict[str, Any] = {"labels": torch.tensor([[label for _, labels, _ in parts for label in labels]])}
    if segments is None:
        batch |= {
            "input_ids": torch.tensor([[token for ids, _, _ in parts for token in ids]]),
            "position_ids": torch.tensor([[position for ids, _, _ in parts for position in range(len(ids))]]),
            "lengths": [len(ids) for ids, _, _ in parts],
        }
    else:
        batch |= {
            "input_ids": torch.tensor([segments.tokens]),
            "position_ids": torch.tensor([segments.positions]),
            "lengths": segments.lengths,
            "parents": segments.parents,
            "places": torch.tensor([place for places in segments.places for place in places]),
        }
    if _weighted(rows):
        batch["weights"] = torch.tensor([[weight for _, _, weights in parts for weight in weights]])
    return batch


def padded(rows: Rows, pad_token_id: int = 0, multiple: int = 1) -> dict[str, torch.Tensor]:
    """One row per document (B, T), padded on the right to the longest, and on to a multiple of `multiple`.

    Padding is masked by its place, never by its id: a supervised end-of-sequence token stays supervised even where the
    same token pads.
    """
    parts = list(documents(rows))
    size = -(-max(len(ids) for ids, _, _ in parts) // multiple) * multiple

    def pad(values: Sequence[float], filler: float) -> list[float]:
        return [*values, *[filler] * (size - len(values))]

    batch = {
        "input_ids": torch.tensor([pad(ids, pad_token_id) for ids, _, _ in parts]),
        "labels": torch.tensor([pad(labels, IGNORE_INDEX) for _, labels, _ in parts]),
        "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _, _ in parts]),
        "position_ids": torch.tensor([pad(range(len(ids)), 0) for ids, _, _ in parts]),
    }
    if _weighted(rows):
        batch["weights"] = torch.tensor([pad(weights, 0.0) for _, _, weights in parts])
    return batch


def rows_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of a batch that `flat` or `padded` made, each a row again, with its labels and weights."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    weights = tensors.get("weights")
    if "attention_mask" in tensors:
        sizes = tensors["attention_mask"].sum(dim=1).tolist()
        ids, labels = tensors["input_ids"], tensors["labels"]
        parts = [
            (ids[i, :size], labels[i, :size], None if weights is None else weights[i, :size])
            for i, size in enumerate(sizes)
        ]
    else:
        places = tensors.get("places", slice(None))
        ids, positions = (tensors[name][0][places] for name in ("input_ids", "position_ids"))
        sizes = torch.diff((positions == 0).nonzero()[:, 0], append=positions.new_tensor([len(positions)])).tolist()
        scales = [None] * len(sizes) if weights is None else weights[0].split(sizes)
        parts = list(zip(ids.split(sizes), tensors["labels"][0].split(sizes), scales, strict=True))
    return [_row(*part) for part in parts]


def _row(ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> dict[str, Any]:
    row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
    return row if weights is None else row | {"weights": weights.tolist()}
