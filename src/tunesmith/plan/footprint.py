"""The memory of one training step, counted without computing it.

The model's own forward and backward run on fake tensors, which have a shape, a dtype and no memory, and every tensor
that they make is counted while it lives. What is run is the same code as in training: attention over documents, the
linear layers with their adapters, the loss in chunks, gradient checkpointing, autocast. So this follows what they do.

To be quick with deep models, only the first few layers are run. Each of the others repeats one of them: its forward
adds as many bytes, and its backward takes as many away.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import PreTrainedModel

from tunesmith.data.batches import Targets
from tunesmith.model.attention import document_map
from tunesmith.model.head import Predictions, from_hidden, from_logits, plain_head
from tunesmith.objectives.logprobs import token_logprobs
from tunesmith.objectives.supervised import supervised_loss

ACTIVATIONS, LOSS, GRADIENTS = "activations", "loss", "gradients"

Bytes = Counter[str]
"""Bytes of each kind: ACTIVATIONS, LOSS and GRADIENTS. May be negative in a difference."""
Polynomial = tuple[float, float, float]
"""The `a`, `b` and `c` of a + rows * (b * length + c * length^2)."""

LEAST, MOST = 1024, 4096
"""The longest of the three lengths: below, the loss takes less than a whole chunk; above, counting takes long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """`rows` documents of `length` tokens, of which all but the first are supervised: side by side in one row, or
    padded rows (`flat` False). `accumulated`: gradients of earlier micro-batches are there already."""

    rows: int
    length: int
    flat: bool = True
    accumulated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A part of the step: how many more bytes there are at its peak, and at its end, than at its start."""

    peak: Bytes
    change: Bytes


@dataclass(kw_only=True, slots=True)
class Subject:
    """A model whose step is counted, `wrapped` in its adapters where it has some. `autocast`: the precision of
    products where that is not the weights' own. `loss`: what is computed of its predictions. `layers` are those that
    are run, and `repeats[i]` is the number of the one that stands for layer `i`; both are empty where the layers were
    not found, and the whole model is run."""

    base: PreTrainedModel
    wrapped: nn.Module
    autocast: torch.dtype | None
    loss: Callable[[Predictions], Tensor]
    layers: Sequence[nn.Module]
    repeats: Sequence[int]
    fakes: FakeTensorMode = field(default_factory=FakeTensorMode)


def supervised(predictions: Predictions) -> Tensor:
    """The loss of supervised runs, whose gradient is ready when the forward ends."""
    return supervised_loss(predictions).loss


def scored(predictions: Predictions) -> Tensor:
    """What every loss of preferences is a function of; the backward makes the logits again."""
    return token_logprobs(predictions).logprobs.sum()


def subject(
    base: PreTrainedModel,
    wrapped: nn.Module,
    autocast: torch.dtype | None,
    loss: Callable[[Predictions], Tensor] = supervised,
) -> Subject:
    """Makes the parameters of a model on the meta device fake ones of the CPU, whose kernels are then chosen, and
    leaves it the layers that the others repeat."""
    layers = decoder_layers(base)
    repeats = _repeats(layers, getattr(base.config.get_text_config(), "layer_types", None))
    if repeats:
        del layers[max(repeats) + 1 :]
    fake = Subject(base=base, wrapped=wrapped, autocast=autocast, loss=loss, layers=list(layers), repeats=repeats)
    with fake.fakes:
        _make_fake(wrapped)
    wrapped.train()
    return fake


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What is alive at the peak of each part of a step, in their order: embeddings, layers, head and loss, and the
    layers' backwards. `layer`: what the backward of one layer makes at most, gradients excepted."""

    moments: Sequence[Bytes]
    layer: float

    @property
    def peak(self) -> Bytes:
        return max(self.moments, key=Bytes.total)


def timeline(subject: Subject, shape: Shape) -> Timeline:
    """The bytes of forward, loss and backward, beside those of weights and of optimizer states.

    Accumulated gradients are not counted. Raises what the model's forward raises, where it asks for the values of
    tensors, such as which expert a token goes to.
    """
    count = _run(subject, shape)
    segments = count.segments
    order = ["embeddings", *(f"forward {i}" for i in subject.repeats), "head"]
    order += [f"backward {i}" for i in reversed(subject.repeats)]
    parts = [segments[name] for name in order]
    for i in subject.repeats[len(subject.layers) :]:  # layers that were not run
        head = parts[len(subject.repeats) + 1]
        parts[len(subject.repeats) + 1] = replace(head, change=_less(head.change, count.released(i)))
    starts = accumulate((part.change for part in parts), _sum, initial=Bytes())
    # The first one's makes the gradient of the embeddings, too.
    layers = (segments[f"backward {i}"].peak for i in set(subject.repeats) - {0})
    return Timeline(
        moments=[_sum(start, part.peak) for start, part in zip(starts, parts, strict=False)],
        layer=max((part.total() - part[GRADIENTS] for part in layers), default=0),
    )


def _sum(a: Bytes, b: Bytes) -> Bytes:
    return Bytes({kind: a[kind] + b[kind] for kind in a.keys() | b.keys()})


# The model


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers; an empty list where they are not found."""
    depth = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    return next(lists, nn.ModuleList())


def _repeats(layers: nn.ModuleList, kinds: Sequence[str] | None) -> list[int]:
    """For each layer the one that stands for it: of the same parameters and kind. The first stands for itself alone:
    where embeddings are frozen, less of it is needed in the backward."""
    first: dict[Any, int] = {}
    repeats = []
    for i, layer in enumerate(layers):
        shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        kind = kinds[i] if kinds is not None and len(kinds) == len(layers) else None
        signature = (shapes, kind, getattr(layer, "gradient_checkpointing", False), i == 0)
        repeats.append(first.setdefault(signature, i))
    return repeats


def _make_fake(model: nn.Module) -> None:
    fakes: dict[int, Tensor] = {}  # tied weights stay one
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, value in owned.items():
                if value is None:
                    continue
                if id(value) not in fakes:
                    fake = torch.empty(value.shape, dtype=value.dtype)
                    trained = value.requires_grad
                    fakes[id(value)] = nn.Parameter(fake, trained) if isinstance(value, nn.Parameter) else fake
                owned[name] = fakes[id(value)]  # type: ignore[assignment]


# The step


class Count(TorchDispatchMode):
    """Counts the storages that are alive, by what made them. Those of `existing` are known, and not counted."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.kind = ACTIVATIONS
        self.segments: dict[str, Segment] = {}
        self._sizes: dict[int, tuple[str, int, int]] = {}
        self._released: dict[tuple[int, int], Bytes] = {}
        self._references: dict[int, Any] = {}
        self._live = Bytes()
        self._total = self._highest = 0
        self._start, self._peak = Bytes(), Bytes()
        for tensor in existing:
            self._add(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # which is asked for more often than all else together
        if args and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            with _disable_current_modes():  # the document map, whose numbers are read
                return func(*args, **(kwargs or {}))
        return self.counted(func(*args, **(kwargs or {})))

    def counted(self, output: Any) -> Any:
        """Count the tensors of `output`, which is returned."""
        for value in output if isinstance(output, list | tuple) else (output,):
            if isinstance(value, Tensor):
                self._add(value, counted=True)
        return output

    def _add(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._references:
            return
        self._references[key] = weakref.ref(storage, lambda _: self._drop(key))
        size = storage.nbytes() if counted else 0
        self._sizes[key] = self.kind, size, len(self.segments)
        self._change(self.kind, size)

    def _drop(self, key: int) -> None:
        kind, size, segment = self._sizes.pop(key)
        del self._references[key]
        self._released.setdefault((segment, len(self.segments)), Bytes())[kind] += size
        self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        self._live[kind] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self._peak = self._total, self._live.copy()

    def rename(self, tensor: Tensor, kind: str) -> None:
        """Count the storage of `tensor` as of another kind from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._sizes:
            before, size, segment = self._sizes[key]
            self._sizes[key] = kind, size, segment
            self._live[before] -= size
            self._live[kind] += size

    def released(self, layer: int) -> Bytes:
        """What the forward of `layer` has made, and the head has dropped: autocast's copies of its weights."""
        names = list(self.segments)
        return self._released.get((names.index(f"forward {layer}"), names.index("head")), Bytes())

    def end(self, name: str) -> None:
        """What was counted since the last call was the segment `name`."""
        self.segments[name] = Segment(peak=_less(self._peak, self._start), change=_less(self._live, self._start))
        self._start, self._peak, self._highest = self._live.copy(), self._live.copy(), self._total


def _less(a: Bytes, b: Bytes) -> Bytes:
    return Bytes({kind: a[kind] - b[kind] for kind in a.keys() | b.keys()})


def _run(subject: Subject, shape: Shape) -> Count:
    parameters = list(subject.wrapped.parameters())
    documents = document_map([shape.length] * shape.rows) if shape.flat else None
    with subject.fakes:
        size = (1, shape.rows * shape.length) if shape.flat else (shape.rows, shape.length)
        inputs = {name: torch.empty(size, dtype=torch.int64) for name in ("input_ids", "position_ids")}
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if shape.accumulated and parameter.requires_grad else None
        existing = [*parameters, *subject.wrapped.buffers(), *inputs.values()]
        count = Count([*existing, *(p.grad for p in parameters if p.grad is not None)])
        mask = torch.ones(shape.rows, 1, shape.length, shape.length, dtype=torch.bool) if documents is None else None
        with _marks(subject, count), count:
            loss = _loss(subject, inputs, documents if mask is None else mask, count)
            count.kind = ACTIVATIONS
            torch.autograd.backward(loss)
            count.end("backward 0" if subject.layers else "head")
        for parameter in parameters:
            parameter.grad = None
    count.segments.setdefault("embeddings", Segment(peak=Bytes(), change=Bytes()))
    return count


def _loss(subject: Subject, inputs: dict[str, Tensor], mask: Tensor | None, count: Count) -> Tensor:
    base, dtype = subject.base, subject.autocast
    tokens = inputs["input_ids"].numel()
    positions = torch.empty(tokens - inputs["input_ids"].shape[0], dtype=torch.int64)
    targets = Targets(positions=positions, tokens=torch.empty_like(positions))
    given = {**inputs, "attention_mask": mask, "use_cache": False}
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        if plain_head(base) is None or base.base_model is base:
            predictions = from_logits(base(**given).logits, targets)
        else:
            predictions = from_hidden(base, given, targets)
        count.kind = LOSS
        return subject.loss(predictions)


@contextmanager
def _marks(subject: Subject, count: Count) -> Iterator[None]:
    """Ends a segment where a layer begins, and where its backward does; and tells gradients from what else a backward
    makes."""
    last, backward = len(subject.layers) - 1, set[int]()

    def begins(i: int, _layer: nn.Module, _args: Any) -> None:
        if not backward:  # not where gradient checkpointing runs a layer again
            count.end("embeddings" if i == 0 else f"forward {i - 1}")

    def ends(i: int, _layer: nn.Module, _args: Any, output: Any) -> None:
        if backward:
            return
        if i == last:
            count.end(f"forward {i}")
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda _: starts_backward(i))

    def starts_backward(i: int) -> None:
        count.end("head" if not backward else f"backward {i + 1}")
        backward.add(i)

    handles: list[Any] = []
    for i, layer in enumerate(subject.layers):
        handles.append(layer.register_forward_pre_hook(partial(begins, i)))
        handles.append(layer.register_forward_hook(partial(ends, i)))
    for parameter in subject.wrapped.parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p: count.rename(p.grad, GRADIENTS)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Other batches


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How the memory of a step depends on the rows of a batch and their length: the polynomials of each kind of bytes
    at each moment, and of a layer's backward."""

    moments: Sequence[dict[str, Polynomial]]
    layer: Polynomial

    def at(self, rows: int, length: int) -> Timeline:
        moments = [
            Bytes({kind: int(_at(polynomial, rows, length)) for kind, polynomial in kinds.items()})
            for kinds in self.moments
        ]
        return Timeline(moments=moments, layer=_at(self.layer, rows, length))


def scaling(counted: Callable[[int, int], Timeline], rows: int, length: int) -> Scaling:
    """The memory of other batches than those of `rows` and `length`, from three steps that `counted` counts.

    Every tensor of a step has a size that does not depend on the batch, or is in proportion to its tokens, or, where
    attention makes its scores, to the square of the length. So what is alive at each moment is
    a + rows * (b * length + c * length^2), and the peak is the largest of these.
    """
    rows = min(rows, 2)  # more documents go the way of two
    longest = min(max(length, LEAST), MOST)
    lengths = (longest // 4, longest // 2, longest)
    steps = [counted(rows, length) for length in lengths]
    moments = []
    for moment in zip(*(step.moments for step in steps), strict=True):
        kinds = {kind for kinds in moment for kind in kinds}
        moments.append({kind: _through([kinds[kind] for kinds in moment], rows, lengths) for kind in kinds})
    return Scaling(moments=moments, layer=_through([step.layer for step in steps], rows, lengths))


def _at(polynomial: Polynomial, rows: int, length: int) -> float:
    a, b, c = polynomial
    return max(0.0, a + rows * (b * length + c * length**2))


def _through(sizes: Sequence[float], rows: int, lengths: Sequence[int]) -> Polynomial:
    """The polynomial through three points."""
    (x, y, z), (u, v, w) = lengths, sizes
    first, second = (v - u) / (y - x), (w - v) / (z - y)
    c = (second - first) / (z - x)
    if abs(c) * z < 0.02 * abs(second):  # from sizes that are rounded to blocks, and chunks of the loss
        c = 0.0
        first = (w - v) / (z - y)
    b = first - c * (x + y)
    return w - b * z - c * z**2, b / rows, c / rows
