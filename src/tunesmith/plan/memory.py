"""The memory that a training run will need, from the model's config alone: no weights, no data.

Weights, adapters, gradients and optimizer states are counted on the meta device; activations and the loss are those of
one step on fake tensors (`footprint`). What the allocator and the process add is measured on a CPU
(`benchmarks/plan.py`) and an allowance on GPUs.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import adapt
from tunesmith.model.attention import supports_documents, use_documents
from tunesmith.model.devices import Device, device
from tunesmith.model.linear import speed_up
from tunesmith.model.load import base_of, holds_adapters, load_config, resolve_model
from tunesmith.model.precision import DTYPES, PrecisionName, settle_precision
from tunesmith.model.quantize import Bits
from tunesmith.objectives.logprobs import CHUNK_BYTES
from tunesmith.objectives.preference import PreferenceOptions
from tunesmith.plan import footprint
from tunesmith.plan.footprint import MOST, Bytes, Scaling, Shape, Subject, Timeline, scaling, timeline
from tunesmith.settings.config import Config
from tunesmith.settings.distillation import DistillationConfig
from tunesmith.settings.lora import lora_config
from tunesmith.settings.recipe import Recipe
from tunesmith.text import size

Method = Literal["full", "lora", "8bit", "4bit"]
METHODS: tuple[Method, ...] = get_args(Method)
Shard = Literal["none", "grad", "full"]
SHARDS: tuple[Shard, ...] = get_args(Shard)

STATES: dict[str, float] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"), 8),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2.1),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), 8),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "paged_lion", "adagrad"), 4),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1.05),
    **dict.fromkeys(("rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit"), 4),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), 12),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3.15),
    "sgd": 0,
    "adafactor": 4,  # of vectors; matrices take far less
}
"""Bytes of an optimizer's state for each trained number, which is in fp32."""
UNKNOWN_STATES = 8.0
FP32 = 4
"""Bytes of a number, as gradients are summed over processes."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configs call the number of experts of a layer."""

LIBRARIES_ALONE = 550_000_000
"""Bytes of a process that has imported torch, transformers, peft and datasets."""
LIBRARIES = LIBRARIES_ALONE + 60_000_000
"""The same, with what they go on to import, and to make, in training."""
PREPARED = 500_000_000
"""Bytes of what oneDNN prepares for shapes in half precision, and keeps, once a run has met many."""
HOLES = 0.25
"""What glibc leaves empty between kept blocks, of the bytes of activations (`benchmarks/plan.py`)."""
SCATTERED_LAYERS, SCATTERED_LOSS = 7.5, 0.3
"""The same with gradient checkpointing, where little is kept and much is dropped around it: of the bytes of a layer's
backward, and of the loss. Measured, and no better than a seventh: runs alike differ by as much."""
CONTEXT = 500_000_000
ROUNDING = 0.06
"""What a CUDA context takes, and what PyTorch's allocator adds by rounding and by holes: allowances, not measured."""

BLOCK, OUTER_BLOCK = 64, 256
"""Numbers that share a scale in NF4, and such scales that share one with double quantization (arXiv:2305.14314)."""
NO_NEED: dict[str, Any] = {"output_dir": "unused", "use_cpu": True, "tf32": None, "activation_offloading": False}
"""Settings of a recipe that don't decide about memory here, or need the device itself."""
MOST_TOKENS, MOST_ROWS = 2**20, 4096
MOST_ROWS_COUNTED = 16
"""The memory of larger batches follows from that of smaller ones (`scaling`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What decides about memory. `rows` of `documents` documents of `length` tokens are a micro-batch; `flat` False
    pads them. `checkpoint_every`: gradient checkpointing of every n-th layer; 0 for none.

    `processes` train together, and `shard` is what they share out: nothing, gradients and the optimizer's state, or
    weights, too.

    `scores`: log-probabilities are what is learned from, as in all runs on preferences. `passes`: how often a step also
    goes forward without gradients. `has_reference`: one is asked in training. It is the model without new adapters, or
    else a second copy of what is trained; `adapted` says that the model has adapters already. `teacher`: the config of
    a model that is in memory beside it."""

    config: PreTrainedConfig
    lora: LoraConfig
    device: Device
    precision: PrecisionName
    rows: int
    length: int
    flat: bool = True
    checkpoint_every: int = 0
    accumulation: int = 1
    optimizer: str = "adamw_torch_fused"
    trust_remote_code: bool = False
    teacher: PreTrainedConfig | None = None
    processes: int = 1
    shard: Shard = "none"
    documents: int = 1
    scores: bool = False
    passes: int = 0
    has_reference: bool = False
    adapted: bool = False

    @property
    def shares(self) -> int:
        """The number of processes that a model is shared out to."""
        return 1 if self.shard == "none" else self.processes


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes by part, at the moment of a step when the sum is largest. `reference`: a second copy of trained weights.
    `exchanged`: what processes gather, and gradients on their way. `overhead`: what the libraries, the allocator and,
    on a GPU, the driver's context add."""

    weights: int
    adapters: int
    reference: int
    gradients: int
    optimizer: int
    exchanged: int
    activations: int
    loss: int
    overhead: int
    teacher: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodPlan:
    """One way to train: its memory, and the most that fits beside it. `longest`: of the given rows, with `max_length`
    beyond what the model's positions allow left out; `most_rows`: of the given length. 0 where nothing fits."""

    method: Method
    memory: Memory
    fits: bool
    longest: int
    most_rows: int
    notes: tuple[str, ...] = ()


def run_of(recipe: Recipe, gpu: str | None, shard: Shard | None = None) -> Run:
    """What of `recipe` decides about its memory on the device `gpu`, shared out as `shard` or the recipe says. Raises
    TunesmithError for an unknown device and a model whose config can't be had."""
    config: Any = recipe.config
    measured_here = settle_precision(config) != ""
    target = device(gpu, config.precision)
    name, settings = recipe.model, dict(config.model_init_kwargs or {})
    revision = {"revision": settings["revision"]} if settings.get("revision") else {}
    if adapted := holds_adapters(name):
        name, revision = base_of(resolve_model(name))
    documents = 2 if recipe.trainer == "dpo" else 1
    rows, length = _batch(recipe, documents)
    more: dict[str, Any] = config.activation_checkpointing_kwargs or {}
    compares = _compares(recipe)
    asked = compares and not config.precompute_ref_log_probs
    estimates = (
        recipe.trainer == "kto" and config.loss_type == "kto"
    )  # how far it is from its reference, on other answers
    return Run(
        config=load_config(name, trust_remote_code=config.trust_remote_code, **revision),
        lora=lora_config(recipe.lora if recipe.lora not in (None, False) else True),
        device=target,
        precision=target.precision if measured_here else config.precision,
        rows=rows,
        length=length,
        flat=config.padding_free,
        checkpoint_every=int(more.get("every_n_layers", 1)) if config.activation_checkpointing else 0,
        accumulation=config.gradient_accumulation_steps,
        optimizer=str(getattr(config.optim, "value", config.optim)),
        trust_remote_code=config.trust_remote_code,
        processes=recipe.processes,
        shard=config.shard if shard is None else shard,
        documents=documents,
        scores=recipe.trainer in ("dpo", "kto"),
        passes=int(asked) + 2 * estimates,
        has_reference=asked,
        adapted=adapted,
        teacher=_teacher(config),
    )


def _compares(recipe: Recipe) -> bool:
    """Whether a run compares the model with its reference."""
    config: Any = recipe.config
    if recipe.trainer != "dpo":
        return recipe.trainer == "kto"
    return PreferenceOptions(losses=config.losses, reference_free=config.reference_free).needs_reference


def _teacher(config: Config) -> PreTrainedConfig | None:
    """That of a distillation which asks it in every step."""
    if not isinstance(config, DistillationConfig) or config.teacher_top_k is not None:
        return None
    if (name := config.teacher_model_name_or_path) is None:
        raise TunesmithError("no teacher: write teacher_model_name_or_path, a larger model of the student's family")
    revision = {"revision": config.teacher_model_revision} if config.teacher_model_revision else {}
    if holds_adapters(name):
        name, revision = base_of(resolve_model(name))
    return load_config(name, trust_remote_code=config.trust_remote_code, **revision)


def _batch(recipe: Recipe, documents: int) -> tuple[int, int]:
    """Rows of a micro-batch at its largest, each of so many documents, and the tokens of a document."""
    config = recipe.config
    tokens = config.max_tokens_per_batch
    if config.max_length is None and tokens is None:
        raise TunesmithError("max_length is None, so any batch may come; write the length to plan for, --max-length N")
    if tokens is None:
        return config.per_device_train_batch_size, int(config.max_length or 0)
    length = min(config.max_length or tokens, tokens // documents)
    return max(1, tokens // (documents * length)), length


def plan(run: Run, method: Method) -> MethodPlan:
    """The memory of `run` by `method`, and the longest and the most rows that fit.

    Raises TunesmithError for a model that is no causal language model.
    """
    counted = count(run, method)
    memory = counted.memory(run.rows, run.length)
    capacity = run.device.memory
    most = getattr(run.config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS
    return MethodPlan(
        method=method,
        memory=memory,
        fits=memory.total <= capacity,
        longest=largest(lambda x: counted.memory(run.rows, x).total, capacity, run.length, most),
        most_rows=largest(lambda x: counted.memory(x, run.length).total, capacity, run.rows, MOST_ROWS),
        notes=counted.notes,
    )


def largest(total: Callable[[int], int], capacity: int, start: int, most: int) -> int:
    """The largest number up to `most`, to a hundredth, for which `total` is within `capacity`; 0 where there is none.

    `total` must not fall. It is nearly a straight line in what is asked here, so the next guess is where the line
    through two known points meets the capacity.
    """
    known = {x: total(x) for x in (1, max(2, min(start, most)))}
    if known[1] > capacity:
        return 0
    for _ in range(12):
        low = max(x for x, need in known.items() if need <= capacity)
        high = min((x for x, need in known.items() if need > capacity), default=most + 1)
        if low >= most or high - low <= max(1, low // 100):
            break
        guess = _meets(known, capacity, low, high)
        known[guess] = total(guess)
    return min(low, most)


def _meets(known: Mapping[int, int], capacity: int, low: int, high: int) -> int:
    """A number between `low` and `high`, both excluded, that should just fit."""
    other = high if high in known else max((x for x in known if x < low), default=low)
    slope = (known[other] - known[low]) / (other - low) if other != low else 0
    if slope <= 0:
        return min(2 * low, high - 1)
    straight = low + int((capacity - known[low]) / slope)
    far = min(high - 1, 16 * low)  # a line through small numbers does not tell of large ones
    return min(max(straight, low + 1), far)


def advice(run: Run, method: Method, plans: Mapping[Method, MethodPlan]) -> list[str]:
    """Settings that would make `method` fit, or another one, with the memory that each takes."""
    hints, best = [], plans[method]
    if not run.checkpoint_every:
        other = plan(replace(run, checkpoint_every=1), method)
        hints.append(f"gradient_checkpointing: true   {_judged(other)}")
        best = other if not best.most_rows and not best.longest else best
    tail = "" if best is plans[method] else " with it"
    if 0 < best.longest < run.length:
        hints.append(f"max_length: {best.longest}   the most that fits{tail}, with {run.rows} rows")
    if 0 < best.most_rows < run.rows:
        steps = -(-run.rows * run.accumulation // best.most_rows)
        hints.append(
            f"per_device_train_batch_size: {best.most_rows}, gradient_accumulation_steps: {steps}   "
            f"fits{tail}, in steps of as many rows"
        )
    settings = {"lora": "lora: true", "8bit": "lora: true, quantize: 8bit", "4bit": "lora: true, quantize: 4bit"}
    for name, text in settings.items():
        if name in plans and name != method:
            other = plans[name]  # type: ignore[index]
            hints.append(f"{text}   {_judged(other)}")
    if not hints or not any("fits" in hint for hint in hints):
        hints.append(f"a smaller model, or more memory than {run.device.name} has")
    return hints


def _judged(plan: MethodPlan) -> str:
    return f"{size(plan.memory.total)}, {'fits' if plan.fits else 'still too much'}"


# A model


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """What of a model processes gather and exchange at a time: a decoder layer, and all else together, the root.

    `root` and `layers` are the bytes of each as it is computed with. `trained_root` and `trained_layer` count the
    numbers of them that are trained, of the largest layer. `products` counts the weights that a token is multiplied
    with, and `attention` the numbers of its queries in all layers.
    """

    root: int
    layers: tuple[int, ...]
    trained_root: int
    trained_layer: int
    products: int
    attention: int


@dataclass(kw_only=True)
class Counted:
    """A model by one method. `static` are the bytes of weights, adapters, and, of what is trained, gradients, optimizer
    states and the reference's copy, all of them of a whole model."""

    run: Run
    static: dict[str, int]
    units: Units
    subject: Subject
    notes: tuple[str, ...] = ()
    is_estimate: bool = False
    _scaling: Scaling | None = None

    @property
    def is_adapted(self) -> bool:
        """Whether adapters are trained, and the rest is frozen."""
        return self.static["adapters"] > 0

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return self.static["gradients"] // FP32

    def memory(self, rows: int, length: int) -> Memory:
        """Of micro-batches of `rows` rows, whose documents have `length` tokens."""
        step = self._step(rows * self.run.documents, length)
        before_backward = len(step.moments) // 2 + 1
        moments = [
            self._memory(alive, step.layer if i < before_backward else 0.0) for i, alive in enumerate(step.moments)
        ]
        updated = self._memory(Bytes({footprint.GRADIENTS: self.static["gradients"]}), 0.0)  # the optimizer's step
        return max([*moments, updated], key=lambda memory: memory.total)

    def _memory(self, alive: Bytes, layer: float) -> Memory:
        """At a moment when `alive` is; the backward of a layer, which is to come, has `layer` bytes."""
        shares = self.run.shares
        parts = {name: -(-self.static[name] // shares) for name in ("weights", "adapters", "reference", "optimizer")}
        parts["teacher"] = self.static["teacher"]
        parts |= {name: alive[name] for name in (footprint.ACTIVATIONS, footprint.LOSS, footprint.GRADIENTS)}
        if self.run.accumulation > 1 or shares > 1:
            parts["gradients"] = -(-self.static["gradients"] // shares)
        parts["exchanged"] = self._exchanged()
        if not self.run.device.is_cpu:
            moving = sum(parts[name] for name in ("gradients", "activations", "loss"))
            return Memory(**parts, overhead=CONTEXT + int(ROUNDING * moving))
        holes = HOLES * parts["activations"]
        if self.run.checkpoint_every and layer:
            holes += SCATTERED_LAYERS * layer + SCATTERED_LOSS * parts["loss"]
        prepared = 0 if self.run.precision == "fp32" else PREPARED
        return Memory(**parts, overhead=LIBRARIES + prepared + int(holes))

    def _exchanged(self) -> int:
        """Of several processes: without sharing, the buckets in which all gradients are summed. With it, what is
        gathered (all weights, or all but those of layers, of which there are two: the next one is on its way while one
        computes), the whole gradients of the root, and those of the largest unit as they are sent."""
        units = self.run.shares > 1 and self.units
        if not units:
            return self.static["gradients"] if self.run.processes > 1 else 0
        gathered = sum(units.layers) if self.run.shard == "grad" else 2 * max(units.layers, default=0)
        sent = units.trained_root + max(units.trained_root, units.trained_layer)
        return units.root + gathered + FP32 * sent

    def _step(self, rows: int, length: int) -> Timeline:
        if self.run.flat and self.run.device.one_kernel and self.run.precision != "fp32":
            rows, length = 1, rows * length  # one kernel makes no copies of each document's part
        if (
            (rows, length) == (self.run.rows * self.run.documents, self.run.length)
            and rows <= MOST_ROWS_COUNTED
            and rows * length <= MOST
        ):
            return self._counted(rows, length)
        if self._scaling is None:
            self._scaling = scaling(self._counted, rows, length)
        return self._scaling.at(rows, length)

    def _counted(self, rows: int, length: int) -> Timeline:
        shape = Shape(rows=rows, length=length, flat=self.run.flat, accumulated=self.run.accumulation > 1)
        if not self.is_estimate:
            try:
                return timeline(self.subject, shape)
            except Exception as error:  # whatever a model's own code raises
                self.is_estimate = True
                kind = type(self.subject.base).__name__
                self.notes += (
                    f"activations are an estimate from the config's sizes: a step of {kind} can't be counted without "
                    f"weights ({type(error).__name__})",
                )
        return estimate(self.run, rows * length, 0 if shape.accumulated else self.static["gradients"])


def estimate(run: Run, tokens: int, gradients: int) -> Timeline:
    """The bytes of a step of `tokens` from the sizes in a config: those of a Llama's layers, and half as much again."""
    config = run.config.get_text_config()
    sizes = {name: int(getattr(config, name, None) or 0) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    hidden, layers, vocabulary = sizes.values()
    inner = int(
        getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * hidden
    )
    inner *= int(getattr(config, "num_experts_per_tok", None) or 1)
    number = 4 if run.precision == "fp32" else 2
    layer = tokens * number * (12 * hidden + 6 * inner)
    stored = layers if not run.checkpoint_every else -(-layers * (run.checkpoint_every - 1) // run.checkpoint_every) + 1
    activations = layer * stored + tokens * number * hidden * (layers if run.checkpoint_every else 0)
    loss = 4 * min(CHUNK_BYTES, 4 * tokens * vocabulary)  # logits, their logarithms, exponentials and gradient
    alive = {footprint.ACTIVATIONS: activations, footprint.LOSS: loss, footprint.GRADIENTS: gradients}
    return Timeline(moments=[Bytes(alive)], layer=layer)


def count(run: Run, method: Method) -> Counted:
    """The model of `run` by `method`, on fake tensors. Raises TunesmithError for one that is no causal language
    model, and for adapters that don't fit it."""
    base = _base(run, run.config, DTYPES["fp32" if method == "full" else run.precision])
    products, attention = _per_token(base)
    if method in ("8bit", "4bit"):
        as_if_quantized(base, method)
    notes = _notes(run, base)
    documents = run.flat and not supports_documents(base)
    if documents:
        use_documents(base)
    with warnings.catch_warnings():  # of calls that this version of `transformers` and `peft` still needs
        warnings.simplefilter("ignore")
        wrapped: nn.Module = base if method == "full" else adapt(base, run.lora)
        if run.checkpoint_every:
            _checkpoint(base, run.checkpoint_every)
            if method != "full":
                base.enable_input_require_grads()
    speed_up(wrapped)
    static = _static(wrapped, run.optimizer, adapted=method != "full") | {"teacher": 0}
    if run.teacher is not None:
        teacher = _base(run, run.teacher, DTYPES[run.precision])
        static["teacher"] = sum(tensor.nbytes for tensor in (*teacher.parameters(), *teacher.buffers()))
    copied = run.has_reference and (method == "full" or run.adapted)
    static["reference"] = static["gradients"] if copied else 0
    autocast = None if run.precision == "fp32" else DTYPES[run.precision]
    if run.shares > 1 and method == "full" and run.precision == "bf16":
        for layer in footprint.decoder_layers(base):  # which are gathered so, where autocast would copy them
            layer.to(DTYPES["bf16"])
    units = _units(base, wrapped, products, attention)
    subject = footprint.subject(base, wrapped, autocast, footprint.scored if run.scores else footprint.supervised)
    return Counted(run=replace(run, flat=documents), static=static, units=units, subject=subject, notes=notes)


def _per_token(base: PreTrainedModel) -> tuple[int, int]:
    """How many weights a token is multiplied with, and how many numbers its queries have in all layers: of a mixture of
    experts, the weights of those that it goes to."""
    config: Any = base.config.get_text_config()
    experts = next((getattr(config, name) for name in EXPERTS if getattr(config, name, None)), 1)
    part = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    looked_up, head = base.get_input_embeddings(), base.get_output_embeddings()
    skipped = set() if head is not None and head.weight is looked_up.weight else {looked_up.weight}
    products = 0.0
    for name, weight in base.named_parameters():
        if weight.dim() > 1 and weight not in skipped:
            products += weight.numel() * (part if ".experts." in name else 1)
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    width = int(getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    return int(products), heads * width * int(getattr(config, "num_hidden_layers", None) or 0)


def _units(base: PreTrainedModel, wrapped: nn.Module, products: int, attention: int) -> Units:
    layers = list(footprint.decoder_layers(base))
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    root = [parameter for parameter in wrapped.parameters() if parameter not in inside]
    adapters = sum(p.numel() for p in wrapped.parameters() if p.requires_grad) if wrapped is not base else 0
    return Units(
        root=sum(parameter.nbytes for parameter in root),
        layers=tuple(sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers),
        trained_root=sum(parameter.numel() for parameter in root if parameter.requires_grad),
        trained_layer=max(
            (sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers), default=0
        ),
        products=products + adapters,
        attention=attention,
    )


def _base(run: Run, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=run.trust_remote_code
            )
    except Exception as error:  # a config of others may be anything
        name = config.name_or_path or config.model_type
        raise TunesmithError(f"model {name} can't be planned for: {error}") from error
    return model


def _checkpoint(base: PreTrainedModel, every: int) -> None:
    try:
        # The state of the random numbers takes hardly any memory, and fake tensors have none.
        base.activation_checkpointing_enable(
            {"use_reentrant": False, "preserve_rng_state": False}, every_n_layers=every
        )
    except ValueError as error:
        raise TunesmithError(f"gradient_checkpointing is true, and {error} Drop it for this model") from error


def _static(model: nn.Module, optimizer: str, *, adapted: bool) -> dict[str, int]:
    """Bytes of all weights, apart from adapters, and of the gradients and optimizer states of what is trained."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    frozen = sum(parameter.nbytes for parameter in parameters) + sum(buffer.nbytes for buffer in model.buffers())
    return {
        "weights": frozen - trained_bytes * adapted,
        "adapters": trained_bytes * adapted,
        "gradients": trained_bytes,
        "optimizer": sum(_states(parameter, optimizer) for parameter in trained),
    }


def _states(parameter: Tensor, optimizer: str) -> int:
    if optimizer == "adafactor" and parameter.dim() > 1:  # a row and a column of it stand for all
        return 4 * (parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2])
    return int(STATES.get(optimizer, UNKNOWN_STATES) * parameter.numel())


def _notes(run: Run, base: PreTrainedModel) -> tuple[str, ...]:
    notes = []
    if getattr(run.config, "quantization_config", None) is not None:
        notes.append("the checkpoint is quantized already; planned as if it were not")
    if run.optimizer not in STATES:
        notes.append(f"optim {run.optimizer}: its state is estimated as that of AdamW, 8 bytes a trained number")
    if run.flat and (reason := supports_documents(base)):
        notes.append(f"batches are padded: {reason}")
    return tuple(notes)


# Quantized layers


class _QuantizedLinear(nn.Linear):
    """Takes the memory of an 8-bit or 4-bit linear layer, whose kernels of `bitsandbytes` need real weights. As there,
    the weight is a buffer of bytes with its scales, here uint8 of shape (bytes,), every product makes it anew in the
    precision of its input, forward and backward, and an 8-bit layer keeps its input."""

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None, bits: Bits) -> None:
        with torch.device("meta"):
            super().__init__(inputs, outputs, bias=False)
        count = _bytes(inputs, outputs, bits)
        self.weight = nn.Parameter(torch.empty(count, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        self.bits = bits

    def forward(self, input: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        output: Tensor = _Product.apply(input, self.weight, shape, self.bits == "8bit")
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """x (..., I), the bytes of a weight (O, I) -> (..., O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: tuple[int, int], keeps_input: bool) -> Tensor:
        ctx.save_for_backward(weight, *((x,) if keeps_input else ()))
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy @ dy.new_empty(ctx.shape), None, None, None


def _bytes(inputs: int, outputs: int, bits: Bits) -> int:
    numbers = inputs * outputs
    if bits == "8bit":
        return numbers + 4 * outputs  # a scale a row
    scales = -(-numbers // BLOCK)
    return numbers // 2 + scales + 4 * -(-scales // OUTER_BLOCK)


def as_if_quantized(model: PreTrainedModel, bits: Bits) -> None:
    """Puts layers of `bits` in the place of the linear ones of a model on the meta device, its head excepted, and
    freezes it."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is head or not isinstance(child, nn.Linear | Conv1D):
                continue
            outputs, inputs = child.weight.shape if isinstance(child, nn.Linear) else reversed(child.weight.shape)
            setattr(module, name, _QuantizedLinear(inputs, outputs, child.bias, bits))
