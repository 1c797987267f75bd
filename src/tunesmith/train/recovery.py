"""Out of memory: noticed in the first minute by a rehearsal, and answered by smaller micro-batches.

A micro-batch that does not fit is split, and the whole step done again from the random numbers that it began with: the
loss is a sum divided by what the whole step has, so the gradient is the same. Documents of one group are never
separated. When one group alone does not fit, gradient checkpointing is turned on. Only then the run stops.

Of several processes, each takes all micro-batches of a step by itself, and may do them again by itself. Their gradients
meet behind the last one, where the others wait for a process that had to do more.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from tunesmith.data.batches import Batch, Collator
from tunesmith.data.samplers import lengths_of
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model, base_model
from tunesmith.settings.coerce import byte_count
from tunesmith.settings.config import Config
from tunesmith.train.limits import MemoryLimit, give_back, is_out_of_memory, limit_memory
from tunesmith.train.loaders import Loaders
from tunesmith.train.meter import Meter
from tunesmith.train.together import Waiting, average_gradients

logger = logging.getLogger(__name__)
WORTH_IT = 50
"""Steps from which on a run rehearses of itself."""
PROBE = 8192
"""Values of the parameter on which the size of an optimizer's state is found out; 8-bit ones need at least 4,096."""

PlainStep = Callable[[nn.Module, Any, Any], Tensor]
"""(model, batch, items of the step) to the loss, when its gradients are there: the step of `transformers`."""


class Recovery:
    """Takes micro-batches through a step, in smaller parts where memory asks for that.

    `loaders` says how batches are made, `meter` what a step that begins again must count anew; `forget` is called then,
    for what else has noted the step, and `tell` hears what was changed. `waiting` counts what others take.
    """

    def __init__(
        self,
        trainer: Trainer,
        loaders: Loaders,
        meter: Meter,
        waiting: Waiting,
        *,
        forget: Callable[[], None],
        tell: Callable[[int, str], None],
    ) -> None:
        self._trainer, self._loaders, self._meter, self._waiting = trainer, loaders, meter, waiting
        self._forget, self._tell = forget, tell
        self._most_tokens: int | None = None
        self._rehearsed = False
        self.begin()
        args = self._args
        if args.rehearse == "always" and not (self.enabled and isinstance(trainer.train_dataset, Dataset)):
            raise TunesmithError(
                "rehearse is 'always', but what the largest micro-batch is can't be told of a stream, of a "
                "data_collator or a compute_loss of yours, or of sharded weights; set rehearse: auto"
            )
        self.watch(cast(Model, trainer.model))

    def watch(self, model: Model) -> None:
        """`model` is what is trained from now on."""
        if self._args.memory_limit is not None:
            limit_memory(base_model(model), byte_count(self._args.memory_limit))

    def begin(self) -> None:
        """A run begins: a step that an earlier one did not finish is not gone on with."""
        self._step = -1
        self._batches: list[Batch] = []

    def state(self) -> dict[str, list[int | None]]:
        """Of all processes, which all must call this."""
        own = [self._most_tokens]
        return {"most_tokens": own if self._args.world_size == 1 else gather_object(own)}

    def restore(self, state: Mapping[str, list[int | None] | int | None]) -> None:
        limits = state["most_tokens"]
        limits = limits if isinstance(limits, list) else [limits]  # of a version that had one
        if len(limits) == self._args.world_size:
            self._most_tokens = limits[self._args.process_index]
        else:
            self._most_tokens = min((limit for limit in limits if limit is not None), default=None)

    @property
    def _args(self) -> Config:
        return cast(Config, self._trainer.args)

    @property
    def enabled(self) -> bool:
        """Whether a step can be done again: processes that hold parts of the weights only would wait for each other."""
        ours, trainer = isinstance(self._loaders.batching.collator, Collator), self._trainer
        sharded = trainer.is_deepspeed_enabled or (self._args.world_size > 1 and self._args.shard != "none")
        # Which mixes the micro-batches of a step with the gradients of others.
        mixed = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return ours and not sharded and not mixed

    def step(self, plain: PlainStep, model: nn.Module, batch: Any, items: Any) -> Tensor:
        """The loss of a micro-batch, when its gradients are there, by the `plain` step."""
        # A static graph is made of what the first backward reduces.
        shared = isinstance(model, DistributedDataParallel) and not model.static_graph
        if not self.enabled or not isinstance(batch, Batch) or (self._args.world_size > 1 and not shared):
            return plain(model, batch, items)
        last = shared and model.require_backward_grad_sync
        with _by_itself(model) if isinstance(model, DistributedDataParallel) else nullcontext():
            if not self._rehearsed:
                self._rehearse(plain, model)
            if self._step != self._trainer.state.global_step:
                self._step, self._begin, self._batches = self._trainer.state.global_step, self._snapshot(), []
            self._batches.append(batch)
            loss = self._fitting(plain, model, self._batches, items, again=[batch])
        if last:
            with self._waiting.counted(self._args.device):
                average_gradients(cast(DistributedDataParallel, model))
        return loss

    def _fitting(
        self, plain: PlainStep, model: nn.Module, step: Sequence[Batch], items: Any, *, again: Sequence[Batch]
    ) -> Tensor:
        """The loss of the last of `again`, after the gradients of all of them; when memory is out, after those of all
        micro-batches of the `step` so far, in smaller parts."""
        while True:
            try:
                for batch in again:
                    losses = [plain(model, part, items) for part in self._parts(batch)]
                return torch.stack(losses).sum()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = error if isinstance(error, MemoryLimit) else None
            # Behind the handler: its traceback holds on to what the step had made.
            model.zero_grad(set_to_none=True)
            give_back()
            self._rewind()
            self._shrink(again[-1], reason)
            again = step

    def _parts(self, batch: Batch) -> list[Batch]:
        if self._most_tokens is None:
            return [batch]
        return cast(Collator, self._loaders.batching.collator).split(batch, self._most_tokens)

    def _shrink(self, batch: Batch, reason: MemoryLimit | None) -> None:
        """Make room for the largest part of `batch`, which did not fit."""
        largest = max(self._parts(batch), key=lambda part: part.computed_tokens)
        tokens, step = largest.computed_tokens, self._trainer.state.global_step + 1
        problem = f"out of memory in a micro-batch of {tokens:,} tokens" + (f" ({reason})" if reason else "")
        args = self._args
        collator = cast(Collator, self._loaders.batching.collator)
        longest = max(collator.cost([group]) for group in largest.groups)
        if longest < tokens:  # copies of an example, computed once, are no larger together than one alone
            self._most_tokens = max(longest, tokens // 2)
            self._tell(step, f"{problem}: larger ones than {self._most_tokens:,} are split from now on, same gradients")
        elif not args.gradient_checkpointing and not args.torch_compile:
            args.gradient_checkpointing = True
            base_model(cast(Model, self._trainer.model)).gradient_checkpointing_enable({"use_reentrant": False})
            self._tell(step, f"{problem}, which is one example: gradient checkpointing is on from now on")
        else:
            raise TunesmithError(
                f"{problem}, which is one example, with gradient checkpointing on. Lower max_length, train with lora, "
                "or quantize the base model (`tunesmith plan` says what fits)"
            )

    # What a step begins with

    def _snapshot(self) -> Any:
        device = self._args.device
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return torch.get_rng_state(), on_device, self._meter.snapshot()

    def _rewind(self) -> None:
        cpu, on_device, meter = self._begin
        torch.set_rng_state(cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self._args.device)
        self._meter.rewind(meter)
        self._forget()

    # Rehearsal

    def _rehearse(self, plain: PlainStep, model: nn.Module) -> None:
        """Send the largest micro-batch that the run can have through forward and backward, make room for the
        optimizer's state, and forget all of it: neither weights nor random numbers change."""
        self._rehearsed = True
        args, trainer = self._args, self._trainer
        wanted = args.rehearse == "always" or (
            args.rehearse == "auto" and (trainer.state.max_steps >= WORTH_IT or args.memory_limit is not None)
        )
        batch = self._largest_batch() if wanted and isinstance(trainer.train_dataset, Dataset) else None
        if batch is None:
            return
        self._begin = self._snapshot()
        self._fitting(plain, model, [batch], torch.tensor(1), again=[batch])
        with _room_for_state(trainer.optimizer):
            pass
        model.zero_grad(set_to_none=True)
        self._rewind()
        logger.info("Rehearsed with a micro-batch of %s tokens.", f"{batch.computed_tokens:,}")

    def _largest_batch(self) -> Batch | None:
        """As many of the longest rows as a micro-batch may hold."""
        dataset = cast(Dataset, self._trainer.train_dataset)
        if "input_ids" not in dataset.column_names or not len(dataset):
            return None
        lengths = lengths_of(dataset, padded=self._loaders.batching.padded)
        if self._args.max_tokens_per_batch is None:
            chosen = np.argsort(-lengths, kind="stable")[: self._loaders.rows_per_batch].tolist()
        else:
            batches = self._loaders.token_batches(dataset, training=True)
            chosen = max(batches, key=lambda rows: int(lengths[rows].sum()))
        columns = [name for name in dataset.column_names if name in self._loaders.batching.columns]
        return cast(Collator, self._loaders.batching.collator)(list(dataset.select(chosen).select_columns(columns)))


@contextmanager
def _by_itself(model: DistributedDataParallel) -> Iterator[None]:
    """A forward and backward within hear nothing of other processes, and wait for none."""
    with model.no_sync():
        model.require_forward_param_sync = False  # of buffers, which a forward that is done again would await twice
        yield


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
