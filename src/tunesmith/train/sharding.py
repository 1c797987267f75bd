"""Weights that several processes share out, so that a model fits that none of them could hold alone.

With `shard`, PyTorch's `fully_shard` deals the rows of each weight out: a process keeps its part of weights, gradients
and the optimizer's state, and all gather the whole of a layer for as long as it computes. What is computed is what one
process would compute. The decoder layers are gathered one at a time; embeddings, head and the last norm together, once
in each forward pass.

Between forward passes nothing is gathered: a forward pass without gradients lets go of all weights at its end, as a
backward pass does. Weights that were changed meanwhile are therefore never those of an earlier step.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model, base_model, has_experts
from tunesmith.model.quantize import bits_of
from tunesmith.runs.parts import files_of, opened, write_index, write_part
from tunesmith.settings.config import Config

T = TypeVar("T")
BY_VALUE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Optimizers that change each value by its own gradient and state, wherever it is."""


def check_can_share_out(model: Model, args: Config, optimizers: tuple[Any, Any]) -> None:
    """Raises TunesmithError for what can't be trained with weights that are shared out."""
    name = str(getattr(args.optim, "value", args.optim))
    if bits_of(base_model(model)):
        raise TunesmithError(
            f"shard is {args.shard}, and the base model is quantized: 8-bit and 4-bit weights can't be cut into rows. "
            "Leave shard out, so that each process has them all, or quantize out"
        )
    if optimizers[0] is not None:
        raise TunesmithError(
            f"shard is {args.shard}, and an optimizer is given, which holds the weights before they are shared out; "
            "give optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': 1e-4}) instead"
        )
    if name not in BY_VALUE:
        raise TunesmithError(
            f"shard is {args.shard}, and optim is {name}, whose state is not one of each value, so it can't be shared "
            f"out; take {' | '.join(BY_VALUE)}"
        )
    if args.async_save:
        raise TunesmithError(
            f"shard is {args.shard}, and async_save is True: the parts of all processes are written together, while "
            "training waits; leave async_save out"
        )


def is_shared_out(model: Any) -> bool:
    """Whether the weights of `model` are shared out over processes."""
    return isinstance(model, FSDPModule)


def check_gathered_head(model: Model, args: Config) -> None:
    """Raises TunesmithError where DeepSpeed's third stage lets go of the head's weight before its gradient is made."""
    head, embeddings = base_model(model).get_output_embeddings(), base_model(model).get_input_embeddings()
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None or not config.is_zero3() or head is None or not head.weight.requires_grad:
        return
    if head.weight is not embeddings.weight:
        raise TunesmithError(
            "deepspeed: stage 3 does not keep the weight of this model's output layer, which is not that of its "
            "embeddings, until its gradient is computed; write stage 2, or shard: full in place of deepspeed"
        )


def share_out(model: Model, args: Config) -> None:
    """Share the weights of `model` out over all processes, in place: each process has its part on its device then.

    Whoever holds a parameter from before holds one that is no longer the model's. Every process must call this.
    """
    device = args.device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    offload = CPUOffloadPolicy() if args.cpu_offload else OffloadPolicy()
    # Autocast would keep a copy of all weights in low precision until the backward pass: they are gathered so instead.
    # Adapters are too small to matter, and frozen weights are in this precision already.
    low = {"bf16": torch.bfloat16}.get(str(args.precision))
    wanted = low is not None and not isinstance(model, PeftModel)
    lowered = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    own_name = type(model).__name__
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=args.shard == "full",
            mp_policy=lowered if wanted else MixedPrecisionPolicy(),
            offload_policy=offload,
        )
    fully_shard(model, mesh=mesh, offload_policy=offload)
    type(model).__name__ = own_name  # what records, files and messages call it, of a class that was made for it
    root = cast(Any, model)
    if has_experts(model):
        root.set_reduce_scatter_unused_params(True)  # of an expert to which only other processes sent tokens
    if device.type == "cpu":
        root.set_force_sum_reduction_for_comms(True)  # gloo takes no means
    root.within_forward = MethodType(_within, model)
    register_fsdp_forward_method(model, "within_forward")
    model.register_forward_hook(_let_go)
    # The tensors that weights are gathered into are made now: those made in inference mode could not be trained on.
    for module in _parts(model):
        module.unshard()
        module.reshard()


def _within(model: nn.Module, work: Callable[[], T]) -> T:
    return work()


def in_forward(model: nn.Module, work: Callable[[], T]) -> T:
    """What `work` returns, done as if it were a forward pass of `model`: it may call parts of it. Every process must do
    the same work."""
    if not is_shared_out(model):
        return work()
    try:
        return cast(T, cast(Any, model).within_forward(work))
    finally:
        _let_go(model)


@contextmanager
def whole_weights(model: nn.Module, args: Config) -> Iterator[None]:
    """Within, each process has all weights of `model`, and computes as often as it likes without the others, such as
    answers, of which each has its own. Every process must enter and leave."""
    if not is_shared_out(model):
        yield
        return
    in_forward(model, lambda: None)  # what `fully_shard` sets up with the first forward pass, it sets up for `model`
    root, parts = cast(Any, model), _parts(model)
    root.stays_whole = True
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        root.stays_whole = False
        for module in parts:
            module.set_reshard_after_forward(args.shard == "full" and module is not root, recurse=False)
            module.reshard()


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _let_go(model: nn.Module, *_: Any) -> None:
    if not torch.is_grad_enabled() and not getattr(model, "stays_whole", False):
        for module in _parts(model):
            module.reshard()


def exchange(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Let weights of `model` and `values`, by name, change places, between two forward passes. Whole values of weights
    that are shared out become the rows of this process."""
    for module in _parts(model):  # what is gathered would stay what it was
        module.reshard()
    for name, weight in model.named_parameters():
        if name not in values:
            continue
        if not isinstance(weight, DTensor):
            values[name], weight.data = weight.data, values[name].to(weight.device)
            continue
        own, given = weight.to_local(), values[name]
        rows = given[rows_of(weight)] if given.shape == weight.shape and given.shape != own.shape else given
        values[name] = own.detach().clone()
        own.detach().copy_(rows)


@contextmanager
def gradients_stay(model: nn.Module, *, weights_stay: bool) -> Iterator[None]:
    """A backward pass within that is not the last of its step: the gradients of adapters, which are small, are summed
    over processes with those of the last. A whole model's are summed at once, since a process would have to hold all of
    them. Weights stay gathered for the next forward pass: embeddings and head, and all others if `weights_stay`."""
    root = cast(FSDPModule, model)
    kept = _parts(model) if weights_stay else [root]
    if isinstance(model, PeftModel):
        root.set_requires_gradient_sync(False)
    for module in kept:
        module.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)
        for module in kept:
            module.set_reshard_after_backward(True, recurse=False)


def whole_norm(norm: Any) -> Any:
    """The norm of all gradients, of which each process may have a part."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# Whole values, and parts of them


def whole(tensor: Tensor) -> Tensor:
    """All values of `tensor`, on its process's device; every process must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    on_device = tensor.detach().to(tensor.device_mesh.device_type)  # where processes can exchange it
    return cast(DTensor, on_device).full_tensor()


def rows_of(like: DTensor) -> slice:
    """The rows of a weight (N, ...) that this process has: N / processes of them, rounded up, and what is left."""
    count, rank = like.device_mesh.size(), like.device_mesh.get_local_rank()
    each = math.ceil(like.shape[0] / count)
    return slice(min(rank * each, like.shape[0]), min((rank + 1) * each, like.shape[0]))


def shared_like(rows: Tensor, like: DTensor) -> DTensor:
    """The `rows` of this process as a tensor that is shared out as `like` is."""
    local = rows.to(like.to_local().device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


# Files


def tensors_of(model: Model) -> dict[str, Tensor]:
    """The weights of `model` by the names that `state_dict` has for them, of tied ones the first; of a model with
    adapters, those that are saved with them."""
    every: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel):
        picked = {id(value) for name in model.peft_config for value in _saved(model, name, every).values()}
        every = {name: value for name, value in every.items() if id(value) in picked or value.requires_grad}
    first: dict[int, str] = {}
    return {name: value for name, value in every.items() if first.setdefault(id(value), name) == name}


def _saved(model: PeftModel, adapter: str, every: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is saved of an adapter, by the names in its file."""
    return cast(dict[str, Tensor], get_peft_model_state_dict(model, state_dict=every, adapter_name=adapter))


def gathered(model: Model, *, kept: bool) -> dict[str, Tensor]:
    """The values of `tensors_of`, one gathered after the other, in the main memory of the processes that are to have
    them `kept`. Every process must ask."""
    values: dict[str, Tensor] = {}
    for name, tensor in tensors_of(model).items():
        value = whole(tensor)
        if kept:
            values[name] = value.detach().cpu()
    return values


def save_parts(trainer: Trainer, folder: Path) -> None:
    """Save the whole model in `folder`, which is there: each process writes a part of the weights, the first the rest.
    Every process must call it."""
    args, model = trainer.args, cast(Any, trainer.model)
    tensors = tensors_of(model)
    files = write_part(tensors, folder, "model", rank=args.process_index, processes=args.world_size, whole=whole)
    if args.process_index:
        return
    write_index(files, folder, "model", sum(value.numel() * value.element_size() for value in tensors.values()))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    for part in (model.generation_config, trainer.processing_class):
        if part is not None:
            part.save_pretrained(folder)


def save_whole(trainer: Trainer, folder: Path, save: Callable[..., None]) -> None:
    """Let the first process `save(folder, state_dict)` all values, which are gathered one after the other. Every
    process must call it.

    Raises TunesmithError where the file of adapters that was written does not have all of them.
    """
    first = trainer.args.process_index == 0
    values = gathered(cast(Model, trainer.model), kept=first)
    if first:
        save(str(folder), state_dict=values)
        if isinstance(trainer.model, PeftModel):
            _check_adapters(trainer.model, folder)


def _check_adapters(model: PeftModel, folder: Path) -> None:
    every: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for adapter in model.peft_config:
        place, wanted = folder if adapter == "default" else folder / adapter, _saved(model, adapter, every)
        found = {name for file in files_of(place, "adapter_model") for name in opened(file).keys()}  # noqa: SIM118
        if missing := sorted(set(wanted) - found):
            raise TunesmithError(
                f"{place}: {len(missing)} of {len(wanted)} tensors of the adapters were not saved, such as {missing[0]}"
            )


@torch.no_grad()
def read_weights(model: Model, folder: Path) -> None:
    """Give `model` the weights that were saved in `folder`, as files of a whole model or of adapters: each process
    reads its rows.

    Raises TunesmithError where a weight is missing there, or has another shape.
    """
    every: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel):
        for adapter in model.peft_config:
            place = folder if adapter == "default" else folder / adapter
            _fill(_saved(model, adapter, every), place, "adapter_model")
    else:
        _fill(tensors_of(model), folder, "model")


def _fill(tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    missing = set(tensors)
    for file in files_of(folder, name):
        with opened(file) as weights:
            for key in weights.keys():  # noqa: SIM118 (no mapping)
                if key not in tensors:
                    continue
                target, piece = tensors[key], weights.get_slice(key)
                if list(piece.get_shape()) != list(target.shape):
                    raise TunesmithError(
                        f"{file}: {key} is {piece.get_shape()}, and the model has {list(target.shape)}; it is another "
                        "model's"
                    )
                if isinstance(target, DTensor):
                    target.to_local().copy_(piece[rows_of(target)])
                else:
                    target.copy_(weights.get_tensor(key))
                missing.discard(key)
    if missing:
        raise TunesmithError(f"{folder} lacks {len(missing)} of {len(tensors)} weights, such as {min(missing)}")


def reads_own_rows(optimizer: torch.optim.Optimizer) -> Callable[[str, Any], Tensor]:
    """How a process reads the tensors of an optimizer's state (`runs.states.read_state`): of those that have a value
    for each of a weight, its rows."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def read(name: str, piece: Any) -> Tensor:
        _, _, number, *_ = name.split(".")  # optimizer.state.3.exp_avg
        like, shape = weights[int(number)], tuple(piece.get_shape())
        if isinstance(like, DTensor) and shape and shape == tuple(like.shape):
            return shared_like(piece[rows_of(like)].clone(), like)
        return cast(Tensor, piece[...]).clone()

    return read
