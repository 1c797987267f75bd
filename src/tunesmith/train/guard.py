"""Numbers that go wrong: steps without a finite loss and gradient are left out, and said to be. A weight that is to be
trained and gets no gradient stops the run."""

import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from accelerate import DistributedType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from tunesmith.data.batches import Batch
from tunesmith.errors import TunesmithError
from tunesmith.model.load import newest_checkpoint
from tunesmith.settings.config import Config
from tunesmith.text import listing

BAD_BATCHES = "bad_batches.jsonl"
REMEMBERED = 20
"""Logged losses that a new one is compared with."""
NAMED = 3
"""Weights that a message names."""
SPIKE = 2.0
"""A loss is a spike from so many times the median of those before it on, if that is also one nat more."""


class Losses:
    """The last logged losses of a run; `judge` says what is odd about a new one."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=REMEMBERED)

    def judge(self, loss: float) -> str | None:
        """What is odd about `loss`, which is remembered; None for nothing."""
        usual = median(self._last) if len(self._last) == REMEMBERED else None
        if math.isfinite(loss):
            self._last.append(loss)
        if loss == 0.0:
            return "the loss is exactly 0: no token of the step is supervised, or none is left to learn"
        if usual is not None and loss > max(SPIKE * usual, usual + 1.0):
            return f"the loss is {loss:.3f}, after a median of {usual:.3f} in the {REMEMBERED} entries before"
        return None


class FirstGradients:
    """Whether the first step reaches every weight of `model` that is to be trained.

    A weight may have no gradient for one reason: its layer did not run. An expert to which no token was sent is such a
    layer, and so is the image encoder while texts are trained on. Where the layer ran, and autograd recorded it, its
    output went on without the weight, and would in every step.

    An adapter belongs to the layer that it sits on: `peft` calls that one, and not always what is inside of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[str, nn.Module] = {}
        self._ran: set[nn.Module] = set()
        for path, module in model.named_modules():  # those outside come first
            for name, parameter in module.named_parameters(prefix=path, recurse=isinstance(module, BaseTunerLayer)):
                if parameter.requires_grad:
                    self._layers.setdefault(name, module)
        self._hooks = [layer.register_forward_pre_hook(self._note) for layer in set(self._layers.values())]

    def _note(self, layer: nn.Module, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._ran.add(layer)

    def forget(self) -> None:
        """The step begins again, or its gradients were not those of a step."""
        self._ran.clear()

    def end(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def judge(self, model: nn.Module) -> str | None:
        """What to say of weights whose layer did not run; None for nothing. Raises TunesmithError for those whose layer
        ran. `model` has the gradients of the step."""
        weights = dict(model.named_parameters())
        without = [name for name in self._layers if name in weights and weights[name].grad is None]
        if len(without) == len(self._layers):  # an optimizer that works within the backward has used them up
            return None
        lost = [name for name in without if self._layers[name] in self._ran]
        if lost:
            raise TunesmithError(
                f"{len(lost)} of {len(self._layers)} weights that are to be trained got no gradient in the first step, "
                f"although their layers ran, and would stay as they are: {listing(lost, NAMED)}. Freeze them with "
                "requires_grad_(False) if that is meant; else the model's code cuts them off (detach, no_grad)"
            )
        if without:
            return (
                f"{len(without)} of {len(self._layers)} weights that are to be trained got no gradient, because their "
                f"layers did not run: {listing(without, NAMED)}"
            )
        return None


class Guard:
    """A step whose gradient is not finite changes nothing: not the weights, not the optimizer. Its rows are written to
    `bad_batches.jsonl`; `max_bad_steps` of them in a row stop the run. So does a single one, if the weights themselves
    are not finite. `tell` hears of each, with the step."""

    def __init__(self, trainer: Trainer, tell: Callable[[int, str], None]) -> None:
        self._trainer, self._tell = trainer, tell
        self.bad_steps = self._in_a_row = 0
        self._losses = Losses()
        self._batches: list[tuple[Mapping[str, Any] | Batch, Tensor]] = []
        self._first: FirstGradients | None = None

    def begin(self) -> None:
        """A run begins: what an earlier one left of a step it did not finish is not its."""
        self._in_a_row, self._batches = 0, []
        self.end()
        trainer = self._trainer
        # DeepSpeed keeps gradients elsewhere, and hooks would have compiled layers compiled once more.
        if not trainer.is_deepspeed_enabled and not trainer.args.torch_compile:
            self._first = FirstGradients(cast(nn.Module, trainer.model))

    def end(self) -> None:
        """The run is over."""
        if self._first is not None:
            self._first.end()
            self._first = None

    def check_result(self) -> None:
        """When a run has come to its end: raises TunesmithError where it has made nothing that is of use."""
        self._check_weights()
        done = self._trainer.state.global_step
        if self._in_a_row >= done > 0:
            args = cast(Config, self._trainer.args)
            raise TunesmithError(
                f"no step of the run had a finite gradient, so nothing was learned; the model is not saved. Look at "
                f"the rows in {Path(str(args.output_dir)) / BAD_BATCHES}, lower learning_rate, or set precision: fp32"
            )

    def _check_weights(self) -> None:
        """Raises TunesmithError, on every process, where a weight that is trained is not finite: no step mends it."""
        trainer = self._trainer
        trained = [value.detach() for value in cast(nn.Module, trainer.model).parameters() if value.requires_grad]
        parts = [value.to_local() if isinstance(value, DTensor) else value for value in trained]
        bad = torch.tensor(sum(not part.isfinite().all() for part in parts), device=trainer.args.device)
        if trainer.args.world_size > 1:
            bad = trainer.accelerator.reduce(bad, reduction="sum")
        if bad:
            raise TunesmithError(
                f"weights of the model are not finite after step {trainer.state.global_step}, so that no step can "
                f"train them any more; lower learning_rate, which is {trainer.args.learning_rate:g}"
            )

    def forget_step(self) -> None:
        """The step begins again."""
        if self._first is not None:
            self._first.forget()

    def state(self) -> dict[str, int]:
        return {"bad_steps": self.bad_steps, "in_a_row": self._in_a_row}

    def restore(self, state: Mapping[str, int]) -> None:
        self.bad_steps, self._in_a_row = state["bad_steps"], state["in_a_row"]

    def note(self, batch: Mapping[str, Any] | Batch, loss: Tensor) -> None:
        """A micro-batch of the step, and its loss."""
        self._batches.append((batch, loss))

    def check(self, model: nn.Module, norm: Any) -> None:
        """When the gradients of a step are whole and not yet used; `norm` is their norm, before clipping."""
        batches, self._batches = self._batches, []
        # Every process has the same gradients, so all decide alike; a loss is its own process's, unless it is summed.
        scaled = (
            self._trainer.accelerator.scaler is not None
        )  # fp16's scaler leaves out steps of its own, to find its scale
        bad = (~torch.stack([loss.float() for _, loss in batches]).isfinite()).sum()
        if scaled and self._trainer.args.world_size > 1:
            bad = self._trainer.accelerator.reduce(bad, reduction="sum")
        if not bad if scaled else math.isfinite(float(norm)):
            self._in_a_row = 0
            self._check_first()
            return
        self.forget_step()
        if not scaled:
            for parameter in model.parameters():
                parameter.grad = None
        self._note_bad(batches, float(norm))

    def _check_first(self) -> None:
        if self._first is None:
            return
        first, self._first = self._first, None
        first.end()
        missing = first.judge(cast(nn.Module, self._trainer.model))
        handler = self._trainer.accelerator.ddp_handler
        wrapped = isinstance(self._trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        kind, args = self._trainer.accelerator.distributed_type, cast(Config, self._trainer.args)
        several = args.world_size > 1 and kind in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if several and not wrapped and args.shard == "none":
            raise TunesmithError(
                "the model is not wrapped for several processes, and each would train by itself; this is a fault of "
                "tunesmith with this version of accelerate: please report it, and train with one process until then"
            )
        if missing is not None and wrapped and not (handler and handler.find_unused_parameters):
            raise TunesmithError(
                f"{missing}. Processes wait for these, and have not summed the gradients of others: freeze them with "
                "requires_grad_(False), or set ddp_find_unused_parameters: true"
            )
        if missing is not None:
            self._tell(self._trainer.state.global_step + 1, missing)

    def judge(self, loss: float) -> None:
        """A loss that is logged."""
        if self._in_a_row:  # of a step that was left out, the log has a 0
            return
        odd = self._losses.judge(loss)
        if odd is not None:
            self._tell(self._trainer.state.global_step, odd)

    def _note_bad(self, batches: list[tuple[Mapping[str, Any] | Batch, Tensor]], norm: float) -> None:
        self.bad_steps += 1
        self._in_a_row += 1
        args = cast(Config, self._trainer.args)
        step, folder = self._trainer.state.global_step + 1, Path(str(args.output_dir))
        losses = [float(loss) for _, loss in batches]
        suspects = [i for i, loss in enumerate(losses) if not math.isfinite(loss)] or list(range(len(batches)))
        where = f"its rows are in {folder / BAD_BATCHES}"
        if args.process_index == 0:
            lines = [json.dumps(self._described(step, batches[i][0], losses[i], norm)) for i in suspects]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / BAD_BATCHES).open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
            except OSError as error:  # a disk that is full costs the lines, not the run
                where = f"its rows can't be written down: {error}"
        what = f"loss {losses[suspects[0]]}" if not all(map(math.isfinite, losses)) else f"gradient norm {norm}"
        self._tell(step, f"{what}: the step was left out, {where}")
        self._check_weights()
        most = args.max_bad_steps
        if self._in_a_row >= most:
            good = newest_checkpoint(folder)
            last = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise TunesmithError(
                f"{most} steps in a row had no finite gradient, up to step {step}; {last}. Look at the rows in "
                f"{folder / BAD_BATCHES}, lower learning_rate, or set precision: fp32"
            )

    def _described(self, step: int, batch: Mapping[str, Any] | Batch, loss: float, norm: float) -> dict[str, Any]:
        decode = getattr(self._trainer.processing_class, "decode", None)
        if isinstance(batch, Batch):
            documents = [example.input_ids for example in batch.documents]
        else:  # of a collator of the user's
            ids, mask = batch.get("input_ids", ()), batch.get("attention_mask")
            documents = [row.tolist() if mask is None else row[mask[i] != 0].tolist() for i, row in enumerate(ids)]
        rows = [{"input_ids": ids} | ({"text": decode(ids)} if decode else {}) for ids in documents]
        return {"step": step, "loss": str(loss), "grad_norm": str(norm), "rows": rows}
