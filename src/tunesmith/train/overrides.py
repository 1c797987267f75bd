"""Subclasses that override a step's hooks of `transformers`, as scripts for its `Trainer` do, for a loss of their own.

Such code expects what a plain `Trainer` hands out: a dictionary of padded tensors (B, T), with unshifted `labels`, to
pop from and to unpack into the model. It gets that, and may have an older signature. What the overridden hook would
have noted is noted for it.
"""

import dis
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from tunesmith.data.batches import Batch, PaddedCollator
from tunesmith.errors import TunesmithError
from tunesmith.settings.config import Config
from tunesmith.train.meter import Meter

HOOKS = ("compute_loss", "training_step", "prediction_step")
SHOWN = ("input_ids", "attention_mask", "labels")
"""What a plain batch has of a `Batch`, as TRL's has: positions follow from the mask."""
ITEMS = "num_items_in_batch"
_LOSS = "Override compute_loss, or batch_loss for batches without padding"
_DRAWN = "Give generator=, a function of prompts that returns answers (tunesmith.train.generator)"
OF_TRL = {
    "_prepare_dataset": (
        "Give rows as they are to be read, formatting_func=, or dataset_kwargs={'skip_prepare_dataset': True}"
    ),
    **dict.fromkeys(("_compute_loss", "get_batch_loss_metrics", "concatenated_forward", "dpo_loss", "kto_loss"), _LOSS),
    "_get_per_token_logps_and_entropies": _LOSS,
    "_calculate_rewards": "Give reward_funcs=, functions that get the answers and all columns",
    **dict.fromkeys(("_generate", "_generate_single_turn", "_generate_and_score_completions"), _DRAWN),
}
"""Methods of TRL's trainers that subclasses there override, and the way to the same here."""


class PlainBatch(dict[str, Any]):
    """A padded batch as a dictionary of tensors (B, T), which its reader may change; `batch` is what it was made of."""

    batch: Batch | None = None

    @classmethod
    def of(cls, batch: Batch) -> "PlainBatch":
        plain = cls({name: batch[name] for name in SHOWN})
        plain.batch = batch
        return plain

    def as_blank(self) -> "PlainBatch":
        assert self.batch is not None
        return PlainBatch.of(self.batch.as_blank())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PlainBatch":
        """A new one, on `device`."""
        return self._moved(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PlainBatch":
        return self._moved(lambda value: value.pin_memory())

    def _moved(self, move: Callable[[Any], Any]) -> "PlainBatch":
        if self._is_as_it_was():
            return PlainBatch.of(move(self.batch))
        plain = PlainBatch({name: move(value) if isinstance(value, Tensor) else value for name, value in self.items()})
        plain.batch = None if self.batch is None else move(self.batch)
        return plain

    def as_batch(self) -> Batch:
        """What it was made of, or where its reader changed it, what it is now, with the weights of the rows.

        Raises:
            TunesmithError: the labels are gone.
        """
        if self._is_as_it_was():
            assert self.batch is not None
            return self.batch
        if "labels" not in self:
            raise TunesmithError(
                "the inputs have no labels any more, which the loss of tunesmith is taken of; take a copy before you "
                'pop them (inputs = dict(inputs)), or read inputs["labels"]'
            )
        batch = Batch.of(self)
        if self.batch is not None and self.batch.labels.shape == batch.labels.shape:
            return replace(batch, weights=self.batch.weights)
        return batch

    def _is_as_it_was(self) -> bool:
        return self.batch is not None and len(self) == len(SHOWN) and all(self.get(x) is self.batch[x] for x in SHOWN)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainCollator:
    """Makes a `PlainBatch` of rows, each document a row of its own: packs are taken apart."""

    padded: PaddedCollator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PlainBatch:
        return PlainBatch.of(self.padded(rows))


def as_batch(inputs: Any) -> Batch:
    """What a collator made, ours or a user's."""
    if isinstance(inputs, PlainBatch):
        return inputs.as_batch()
    return inputs if isinstance(inputs, Batch) else Batch.of(inputs)


def overridden(trainer: type, base: type) -> tuple[str, ...]:
    """The hooks that `trainer`, which extends `base`, has in other words."""
    return tuple(name for name in HOOKS if getattr(trainer, name) is not getattr(base, name))


class Overrides:
    """Calls the hooks that the class of `trainer` overrides, in place of `transformers`, with the arguments that they
    take.

    `base` is the class whose own hooks call `reach`; `note_batch` is told of each micro-batch and its loss that a
    `training_step` of others has trained on.
    """

    def __init__(
        self, trainer: Trainer, base: type, meters: Mapping[str, Meter], note_batch: Callable[[Any, Tensor], None]
    ) -> None:
        self._trainer, self._base, self._meters, self._note_batch = trainer, base, meters, note_batch
        _check_all_are_called(type(trainer), base)
        self.names = overridden(type(trainer), base)
        self._own = {name: getattr(trainer, name) for name in self.names}
        self._reached: set[str] = set()
        if "compute_loss" in self.names:
            trainer.compute_loss = self.compute_loss  # type: ignore[method-assign]
            if not any("loss_is_scaled_for_ga" in vars(cls) for cls in _above(type(trainer), base)):
                trainer.loss_is_scaled_for_ga = _reads_items(self._own["compute_loss"])
        if "training_step" in self.names:
            trainer.training_step = self.training_step  # type: ignore[method-assign]

    def reach(self, name: str) -> None:
        """The hook `name` of tunesmith was called."""
        self._reached.add(name)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As the overridden one, which may take fewer arguments."""
        own = self._own["compute_loss"]
        # A collator of the user's may have made something else for it.
        batch = as_batch(inputs) if {"input_ids", "labels"} <= {*inputs.keys()} else None
        if batch is not None and batch.blank:  # a mean over no tokens is no number
            return cast(Any, self._base).compute_loss(
                self._trainer, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        arguments: dict[str, Any] = {ITEMS: num_items_in_batch} if _takes(own, ITEMS) else {}
        if return_outputs:
            if not _takes(own, "return_outputs"):
                raise TunesmithError(
                    f"compute_metrics needs logits, and compute_loss of {self._name} can't return them; give it the "
                    "argument return_outputs, and let it return (loss, outputs) then"
                )
            arguments["return_outputs"] = True
        self._reached.discard("compute_loss")
        training = cast(nn.Module, self._trainer.model).training
        meter = self._meters["train" if training else "eval"]
        before = meter.snapshot()
        result = own(model, inputs, **arguments)
        if batch is not None and "compute_loss" not in self._reached:
            self._check_nothing_is_lost(batch)
            meter.read(batch)
        elif batch is not None and not training:  # the eval loss is what became of ours
            loss = result[0] if isinstance(result, tuple) else result
            meter.take_loss(before, loss, self._weight(batch, arguments.get(ITEMS)))
        return result

    def _weight(self, batch: Batch, items: Any) -> Any:
        """What the loss that this process computed counts in the mean over all batches and processes."""
        if items is None:
            return cast(Any, self._trainer).batch_weight(batch)
        return items / self._trainer.accelerator.num_processes

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As the overridden one, which may take fewer arguments."""
        own = self._own["training_step"]
        seen = PlainBatch(inputs) if isinstance(inputs, PlainBatch) else inputs  # which it may take apart
        self._reached.discard("training_step")
        loss: Tensor = own(model, inputs, *((num_items_in_batch,) if _takes(own, ITEMS) else ()))
        if "training_step" not in self._reached:
            self._note_batch(seen, loss)
        return loss

    @property
    def _name(self) -> str:
        return type(self._trainer).__name__

    def _check_nothing_is_lost(self, batch: Batch) -> None:
        """Raises TunesmithError for what only the loss of tunesmith would have heeded."""
        args = cast(Config, self._trainer.args)
        lost = {
            "the rows have weights": batch.weights is not None,
            "loss_type is dft": getattr(args, "loss_type", None) == "dft",
            "activation_offloading is on": args.activation_offloading,
        }
        for what, is_lost in lost.items():
            if is_lost:
                raise TunesmithError(
                    f"{what}, but compute_loss of {self._name} does not call super().compute_loss, which alone heeds "
                    "that; call it, or drop the setting"
                )


def _above(trainer: type, base: type) -> list[type]:
    """The classes of users, which come before `base` and are not ours."""
    order = trainer.__mro__
    return [cls for cls in order[: order.index(base)] if cls.__module__.partition(".")[0] != "tunesmith"]


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a bound method takes an argument of this name."""
    parameters = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _reads_items(function: Callable[..., Any]) -> bool:
    """Whether a `compute_loss` looks at the number of items of the whole step. If not, its loss is a mean over the
    micro-batch, and the means of a step are still to be divided by their number."""
    if not _takes(function, ITEMS):
        return False
    plain = inspect.unwrap(getattr(function, "__func__", function))
    plain = plain.func if isinstance(plain, functools.partial) else plain
    if not hasattr(plain, "__code__"):
        return True
    parameters = inspect.signature(plain).parameters.values()
    name = next((each.name for each in parameters if each.name == ITEMS or each.kind is each.VAR_KEYWORD), None)
    loads = (step for step in dis.get_instructions(plain) if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")))
    return any(step.argval == name or (isinstance(step.argval, tuple) and name in step.argval) for step in loads)


def _check_all_are_called(trainer: type, base: type) -> None:
    """Raises TunesmithError for a method that TRL's trainer calls, and nobody here: neither this trainer nor any other
    method of the class that has it."""
    methods = [(name, value) for cls in _above(trainer, base) for name, value in vars(cls).items()]
    for name, _ in methods:
        if name in OF_TRL and not any(_names(value, name) for other, value in methods if other != name):
            raise TunesmithError(
                f"{trainer.__name__} overrides {name}, which TRL's trainer calls, and this one does not: the run would "
                f"go on without it. {OF_TRL[name]}"
            )


def _names(function: Any, name: str) -> bool:
    """Whether a function, or one within it, reads an attribute of this name."""
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    codes = [] if code is None else [code]
    for code in codes:
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return any(name in code.co_names for code in codes)
