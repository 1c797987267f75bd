"""The weights that a base model has after its adapters are merged into it, piece by piece.

Shapes: R rows of the embeddings, H hidden size.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.errors import TunesmithError
from tunesmith.ship.merge_base import Adapted
from tunesmith.ship.shards import Piece, Weights


class Merged:
    """What to write: `pieces`, in the base model's order, and by `tensors` what each holds.

    `shared` are the names that share one weight in the base model, and `growing` those that have a row for each token
    and may have fewer in the base model's files. Weights that adapters made different are written under each of their
    names, and `untied` says so. `dtype` None keeps the format of each tensor in the base model's files.

    Merging is done in fp32. Raises TunesmithError for weights that are not there or don't fit.
    """

    def __init__(
        self,
        adapted: Adapted,
        weights: Weights,
        *,
        dtype: torch.dtype | None,
        shared: Sequence[tuple[str, ...]],
        growing: Iterable[str],
    ) -> None:
        self._adapted, self._weights, self._dtype = adapted, weights, dtype
        self._growing = set(growing)
        self._there = set(weights.names())
        self._source = {name: self._alias(name, shared) for name in adapted.shapes}
        self._dropped: set[str] = set()
        self.untied = False
        for group in shared:
            self._decide(group)
        self.pieces = self._pieces()

    def tensors(self, piece: Piece) -> dict[str, Tensor]:
        """The tensors of a piece, contiguous, in the format that they are written in."""
        layer = self._adapted.layer_of(piece.names[0])
        if layer is None:
            found = {name: self._unadapted(name) for name in piece.names}
        else:
            merged = self._adapted.merged(layer, self._read)
            found = {name: merged[name] for name in piece.names}
        return {name: self._cast(name, tensor) for name, tensor in found.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The format that the tensor `name` is written in."""
        stored = self._weights.dtype(self._source[name])
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def _alias(self, name: str, shared: Sequence[tuple[str, ...]]) -> str:
        """`name`, or the name under which the base model's files have its weight."""
        group: tuple[str, ...] = next((group for group in shared if name in group), ())
        return next((other for other in (name, *group) if other in self._there), name)

    def _decide(self, group: tuple[str, ...]) -> None:
        """Whether the weight of `group` is still one. Where the names' layers are merged apart, the numbers say it."""
        touched = any(self._adapted.layer_of(name) is not None or name in self._adapted.own for name in group)
        apart = sum(name in self._there for name in group) > 1
        if touched or apart:
            first, *others = (self.tensors(Piece(names=(name,), size=0))[name] for name in group)
            if not all(torch.equal(first, other) for other in others):
                if not self._growing.issuperset(group):
                    raise TunesmithError(
                        f"the adapters make {' and '.join(group)} different, which are one weight in the base model"
                    )
                self.untied = True
                return
        self._dropped.update(group[1:])

    def _pieces(self) -> list[Piece]:
        names: dict[str, list[str]] = {}
        for name in self._adapted.shapes:
            if name not in self._dropped:
                names.setdefault(self._adapted.layer_of(name) or name, []).append(name)
        return [Piece(names=tuple(own), size=sum(map(self._size, own))) for own in names.values() if own]

    def _size(self, name: str) -> int:
        return self._adapted.shapes[name].numel() * self.dtype(name).itemsize

    def _unadapted(self, name: str) -> Tensor:
        own = self._adapted.own.get(name)
        return own if own is not None else self._stored(name, self._adapted.shapes[name])

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        tensor = self._stored(name, shape)
        return tensor.float() if tensor.is_floating_point() else tensor

    def _stored(self, name: str, shape: torch.Size) -> Tensor:
        tensor = self._weights.tensor(self._source[name])
        if name in self._growing:
            tensor = with_rows(tensor, shape[0])
        if tensor.shape != shape:
            raise TunesmithError(
                f"{name} has the shape {list(tensor.shape)} in the base model, and the adapters are for "
                f"{list(shape)}: they were trained on another model"
            )
        return tensor

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        cast = tensor.to(self.dtype(name)).contiguous()
        if cast.dtype == torch.float16 and not cast.isfinite().all() and tensor.isfinite().all():
            raise TunesmithError(f"{name} has values up to {tensor.abs().max():.3g}, too large for fp16; take bf16")
        # Of its own: a view of a larger tensor would be written whole, or refused.
        return cast if cast.untyped_storage().nbytes() == cast.nbytes else cast.clone()


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` (R, ...) with as many rows, or as it is where it has them. New rows are the mean of the others, as where
    training adds tokens: https://nlp.stanford.edu/~johnhew/vocab-expansion.html."""
    missing = rows - tensor.shape[0]
    if missing <= 0:
        return tensor
    mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(missing, *tensor.shape[1:])])


def growing_names(model: PreTrainedModel) -> list[str]:
    """The names of the weights that have a row for each token: the input embeddings', and the head's with its bias."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if module in layers
        for name, _ in module.named_parameters(recurse=False)
    ]


def grow(model: PreTrainedModel, rows: int) -> None:
    """Gives `model` embeddings with as many rows, those of new ones as `with_rows` has them."""
    before: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for name in growing_names(model):
            parameter = model.get_parameter(name)
            if not parameter.is_meta:
                parameter.copy_(with_rows(parameter[:before].clone(), rows))
