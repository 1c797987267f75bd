"""Out of memory: found out in the first minute by a rehearsal, and mended by smaller micro-batches.

A micro-batch that does not fit is split, and the whole step done again from the random numbers that it began with: the
loss is a sum over tokens divided by what the step has, so the gradient is the same. When one document alone does not
fit, gradient checkpointing is turned on. Only then the run stops.
"""

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from tunesmith.data.batches import rows_of
from tunesmith.data.samplers import lengths_of
from tunesmith.errors import TunesmithError
from tunesmith.settings.coerce import byte_count
from tunesmith.settings.config import SFTConfig
from tunesmith.train.memory import MemoryLimit, give_back, is_out_of_memory, limit_memory
from tunesmith.train.meter import Meter
from tunesmith.train.publishing import PublishingTrainer
from tunesmith.train.setup import Model, base_model

logger = logging.getLogger(__name__)
WORTH_IT = 50
"""Steps from which on a run rehearses of itself."""
PROBE = 8192
"""Values of the parameter on which the size of an optimizer's state is found out; 8-bit ones need at least 4,096."""


class RecoveringTrainer(PublishingTrainer):
    """Whoever extends it sets `_meters` before its constructor, and tells what is odd with `_event`."""

    _meters: dict[str, Meter]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._most_tokens: int | None = None
        self._step = -1
        self._rehearsed = False
        super().__init__(*args, **kwargs)
        rehearsable = self._recovers() and isinstance(self.train_dataset, Dataset)
        if cast(SFTConfig, self.args).rehearse == "always" and not rehearsable:
            raise TunesmithError(
                "rehearse is 'always', but what the largest micro-batch is can't be told of a stream, of a "
                "data_collator of yours, or over several processes; set rehearse: auto"
            )
        limit = cast(SFTConfig, self.args).memory_limit
        if limit is not None:
            limit_memory(base_model(cast(Model, self.model)), byte_count(limit))

    def _event(self, step: int, text: str) -> None:
        raise NotImplementedError

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if not self._recovers():
            return super().training_step(model, inputs, num_items_in_batch)
        if not self._rehearsed:
            self._rehearse(model)
        if self._step != self.state.global_step:
            self._step, self._begin, self._micro = self.state.global_step, self._snapshot(), []
        self._micro.append(inputs)
        return self._fitting(model, self._micro, num_items_in_batch, again=[inputs])

    def _recovers(self) -> bool:
        """Whether a step can be done again: processes that wait for each other's gradients would wait for ever."""
        return self.args.world_size == 1 and not self._custom_collator and not self.is_deepspeed_enabled

    def _fitting(
        self, model: nn.Module, step: Sequence[dict[str, Any]], items: Any, *, again: Sequence[dict[str, Any]]
    ) -> Tensor:
        """The loss of the last of `again`, after the gradients of all of them; when memory is out, after those of all
        micro-batches of the `step` so far, in smaller parts."""
        while True:
            try:
                for inputs in again:
                    loss = self._in_parts(model, inputs, items)
                return loss
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = error if isinstance(error, MemoryLimit) else None
            # Behind the handler: its traceback holds on to what the step had made.
            model.zero_grad(set_to_none=True)
            give_back()
            self._restore(self._begin)
            self._shrink(again[-1], reason)
            again = step

    def _in_parts(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> Tensor:
        losses = [super(RecoveringTrainer, self).training_step(model, part, items) for part in self._split(inputs)]
        return torch.stack(losses).sum()

    def _split(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        if self._most_tokens is None or _tokens(inputs) <= self._most_tokens:
            return [inputs]
        collate, parts = self._collate(), [[]]  # type: ignore[var-annotated]
        for row in rows_of(inputs):
            candidate = [*parts[-1], row]
            if parts[-1] and _cost(candidate, padded=not self._flat) > self._most_tokens:
                parts.append([row])
            else:
                parts[-1] = candidate
        return [collate(part) for part in parts]

    def _collate(self) -> Any:
        return self.data_collator

    def _shrink(self, inputs: dict[str, Any], reason: MemoryLimit | None) -> None:
        """Make room for the largest part of `inputs`, which did not fit."""
        parts = self._split(inputs)
        largest = max(parts, key=_tokens)
        tokens, step = _tokens(largest), self.state.global_step + 1
        said = f"out of memory in a micro-batch of {tokens:,} tokens" + (f" ({reason})" if reason else "")
        documents = rows_of(largest)
        if len(documents) > 1:
            longest = max(len(row["input_ids"]) for row in documents)
            self._most_tokens = max(longest, tokens // 2)
            self._event(step, f"{said}: larger ones than {self._most_tokens:,} are split from now on, same gradients")
        elif not self.args.gradient_checkpointing and not self.args.torch_compile:
            self.args.gradient_checkpointing = True
            base_model(cast(Model, self.model)).gradient_checkpointing_enable({"use_reentrant": False})
            self._event(step, f"{said}, which is one example: gradient checkpointing is on from now on")
        else:
            raise TunesmithError(
                f"{said}, which is one example, with gradient checkpointing on. Lower max_length, train with lora, or "
                "quantize the base model (`tunesmith plan` says what fits)"
            )

    # What a step begins with

    def _snapshot(self) -> Any:
        return torch.get_rng_state(), _device_rng(self.args.device), deepcopy(self._meters["train"])

    def _restore(self, begin: Any) -> None:
        cpu, device, meter = begin
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device, self.args.device)
        self._meters["train"] = deepcopy(meter)

    # Rehearsal

    def _rehearse(self, model: nn.Module) -> None:
        """Send the largest micro-batch that the run can have through forward and backward, make room for the
        optimizer's state, and forget all of it: neither weights nor random numbers change."""
        self._rehearsed = True
        args = cast(SFTConfig, self.args)
        wanted = args.rehearse == "always" or (
            args.rehearse == "auto" and (self.state.max_steps >= WORTH_IT or args.memory_limit is not None)
        )
        batch = self._largest_batch() if wanted and isinstance(self.train_dataset, Dataset) else None
        if batch is None:
            return
        self._begin = self._snapshot()
        self._fitting(model, [batch], torch.tensor(1), again=[batch])
        with _room_for_state(self.optimizer):
            pass
        model.zero_grad(set_to_none=True)
        self._restore(self._begin)
        logger.info("Rehearsed with a micro-batch of %s tokens.", f"{_tokens(batch):,}")

    def _largest_batch(self) -> dict[str, Any] | None:
        """As many of the longest rows as a micro-batch may hold."""
        dataset, args = cast(Dataset, self.train_dataset), cast(SFTConfig, self.args)
        if "input_ids" not in dataset.column_names or not len(dataset):
            return None
        lengths = lengths_of(dataset)
        if args.max_tokens_per_batch is None:
            chosen = np.argsort(-lengths, kind="stable")[: self._train_batch_size].tolist()
        else:
            chosen = max(self._token_batches(dataset, training=True), key=lambda rows: int(lengths[rows].sum()))
        columns = [name for name in dataset.column_names if name in ("input_ids", "labels", "weights", "seq_lengths")]
        return dict(self._collate()(list(dataset.select(chosen).select_columns(columns))))


def _tokens(batch: Mapping[str, Any]) -> int:
    """Those that are computed: padding is, and what documents share is once."""
    return int(batch["input_ids"].numel())


def _cost(rows: Sequence[Mapping[str, Any]], *, padded: bool) -> int:
    lengths = [len(row["input_ids"]) for row in rows]
    return len(lengths) * max(lengths) if padded else sum(lengths)


def _device_rng(device: torch.device) -> Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _room_for_state(optimizer: Any) -> Iterator[None]:
    """Memory as large as the state that `optimizer` will make in its first step, written to."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner.state:  # a resumed run has it
        yield
        return
    per_value = _state_bytes(type(inner), inner.defaults)
    parameters = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
    held = [torch.ones(int(p.numel() * per_value), dtype=torch.uint8, device=p.device) for p in parameters]
    yield
    del held
    gc.collect()


def _state_bytes(kind: type[torch.optim.Optimizer], defaults: Mapping[str, Any]) -> float:
    """Bytes of state for each value of a parameter, found out on a small one; 8 where that can't be done."""
    parameter = nn.Parameter(torch.zeros(PROBE))
    try:
        optimizer = kind([parameter], lr=float(defaults.get("lr") or 1e-3))  # type: ignore[call-arg]
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except Exception:  # whatever an optimizer of others wants to be made with
        return 8.0
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in tensors if value.numel() > 1) / PROBE
