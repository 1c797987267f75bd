"""The weights that a base model has after its adapters are merged into it, layer by layer.

    names in the base model's state dict -> MergedWeights.pieces -> AdaptedModel.merge, a layer at a time -> tensors

The base model is on the meta device: it has layers and shapes, and no weights. `peft` builds its layers around it, and
merges them with its own code, one at a time: a layer's base weights are read, merged, handed out, and dropped.

Shapes: R rows of the embeddings, H hidden size.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from tunesmith.errors import TunesmithError
from tunesmith.model.load import ADAPTER_WEIGHTS, ADAPTERS, refuse_lost_start
from tunesmith.ship.shards import Piece, Weights

NAME = "default"
"""What `peft` calls the adapters here, however they were called in training."""
REPEATED = ("pissa", "olora")
"""Ways to start adapters that take their start away from the base weights, and do it again whenever they are loaded."""

ENDS = (".weight", ".base_layer.weight", ".token_adapter.base_layer.weight")
"""What follows the name of an adapted embedding where its weights were saved whole."""

Read = Callable[[str, torch.Size], Tensor]
"""The base model's weight of that name in fp32, and of that shape."""


def adapter_settings(folder: Path) -> PeftConfig:
    """The settings of the adapters in `folder`. Raises TunesmithError for adapters that can't be merged."""
    for file in (ADAPTERS, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise TunesmithError(f"{folder} has no {file}: the folder of a run that trained adapters is needed")
    with explained(f"the adapters in {folder} can't be read"):
        refuse_lost_start(str(folder))
        settings = PeftConfig.from_pretrained(str(folder))
    kind = PeftType(settings.peft_type).value
    if settings.is_prompt_learning or settings.is_adaption_prompt:
        raise TunesmithError(
            f"{folder} holds {kind} adapters, which add to the prompt or to attention and change no weight: there is "
            "nothing to merge; load them with peft"
        )
    return settings


def rows_in_adapters(folder: Path, base: PreTrainedModel) -> int:
    """The rows (R) of the embeddings that the adapters in `folder` were trained with; 0 if they don't tell."""
    paths = _token_layers(base)
    rows = 0
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            path = name.removeprefix("base_model.model.")
            shape = file.get_slice(name).get_shape()
            if path in {f"{own}{end}" for own in paths for end in ENDS}:
                rows = max(rows, shape[0])
            elif path in {f"{own}.lora_embedding_A" for own in paths}:
                rows = max(rows, shape[1])
    return rows


def _token_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that have a row for each token: the input embeddings, and the head."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {path: module for path, module in model.named_modules() if module in layers}


def empty_model(
    config: PreTrainedConfig, *, classifier: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model of `config` on the meta device, or the `classifier`: its layers and their shapes, and
    no weights."""
    auto: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with torch.device("meta"), explained("the base model can't be built"):
        model = auto.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    assert isinstance(model, PreTrainedModel)
    return model


class AdaptedModel:
    """The adapters in `folder` around `base`, a model on the meta device, which is changed.

    `shapes` has the shape of every tensor in the base model's state dict by its name there, `own` those tensors that
    came with the adapters (trained biases, whole embeddings), and `layers` every outermost layer that `peft` put in
    the place of the base model's, by its name. Raises TunesmithError where adapters and base don't fit.
    """

    def __init__(self, base: PreTrainedModel, folder: Path, settings: PeftConfig) -> None:
        self.settings = settings
        plain = copy.deepcopy(settings)
        plain.inference_mode = True
        if isinstance(getattr(plain, "init_lora_weights", None), str):
            plain.init_lora_weights = True  # type: ignore[attr-defined]  # the weights are loaded, not started
        with explained(f"the adapters in {folder} don't fit their base model"):
            model = get_peft_model(base, plain, adapter_name=NAME, low_cpu_mem_usage=True)
            _load(model, folder)
        self.layers: dict[str, nn.Module] = {}
        for name, module in base.named_modules():  # those outside come first
            if _replaces(module) and self.layer_of(f"{name}.") is None:
                self.layers[name] = module
        tensors = get_base_model_state_dict(model)
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.own = {
            name: tensor for name, tensor in tensors.items() if not tensor.is_meta and self.layer_of(name) is None
        }
        if not self.layers:
            raise TunesmithError(f"the adapters in {folder} adapt no layer of {type(base).__name__}")

    def layer_of(self, name: str) -> str | None:
        """The adapted layer that the base model's tensor `name` belongs to, or None."""
        parts = name.split(".")[:-1]
        paths = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        return next((path for path in paths if path in self.layers), None)

    def merge(self, path: str, read: Read) -> dict[str, Tensor]:
        """The tensors of the layer `path` after merging, in fp32, by the base model's names.

        `read` gives the base model's. Raises TunesmithError where `peft` can't merge the layer.
        """
        layer: Any = self.layers[path]
        base = _base_layer(layer, path)
        with torch.no_grad(), explained(f"the adapters of {path} can't be merged"):
            before = base.state_dict() if base is not None else {}
            if base is not None:
                needed = {
                    name: read(f"{path}.{name}", tensor.shape) if tensor.is_meta else tensor.float()
                    for name, tensor in before.items()
                }
                base.load_state_dict(needed, assign=True)
            _repeat_start(layer, self.settings)
            if hasattr(layer, "unload_and_optionally_merge_module"):  # as in peft's merge_and_unload
                module = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            else:
                layer.merge(safe_merge=True)
                module = layer.get_base_layer()
            tensors = {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
        lacking = [name for name, tensor in tensors.items() if tensor.is_meta]
        if lacking:
            raise TunesmithError(f"the adapters hold no weights for {lacking[0]}; were they saved whole?")
        if base is not None:  # the layer can be merged again
            base.load_state_dict(before, assign=True)
            for module in layer.modules():
                if isinstance(module, BaseTunerLayer):
                    module.merged_adapters.clear()
        return tensors


def _load(model: PeftModel, folder: Path) -> None:
    """Gives the adapter layers their weights, while the base model stays on the meta device. `peft` copies into what is
    there, which is nothing, so the names that it translated them to are noted, and each is put in its place."""
    noted: dict[str, Tensor] = {}

    def note(module: nn.Module, tensors: Mapping[str, Tensor], *_: Any) -> None:
        noted.update(tensors)

    handle = model.register_load_state_dict_pre_hook(note)
    try:
        mapping = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None)
        result = model.load_adapter(str(folder), NAME, torch_device="cpu", key_mapping=mapping)
    finally:
        handle.remove()
    # What was trained of embeddings that have grown is saved once more, by names that nothing has.
    strange = [name for name in result.unexpected_keys if not re.search(r"\.(modules_to_save|token_adapter)\.", name)]
    for problem, bad in (("lack", result.missing_keys), ("hold what the model has no place for:", strange)):
        if bad:
            raise TunesmithError(f"the adapters in {folder} {problem} {bad[0]} ({len(bad)} in all)")
    whole = {name: tensor if ".modules_to_save." in name else tensor.float() for name, tensor in noted.items()}
    model.load_state_dict(whole, strict=False, assign=True)
    _tie_again(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and f".{NAME}" in name and "trainable_tokens_original" not in name:
            kind = PeftType(model.peft_config[NAME].peft_type).value
            raise TunesmithError(
                f"{kind} adapters keep {name} outside of their file, and can't be merged layer by layer; merge them "
                "with peft: PeftModel.from_pretrained(...).merge_and_unload()"
            )


def _tie_again(model: PeftModel) -> None:
    """A head that is trained as one with the embeddings has their weights again, as in training."""
    names = getattr(model.peft_config[NAME], "modules_to_tie", None) or ()
    embeddings: Any = model.get_base_model().get_input_embeddings()  # type: ignore[operator]
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(path == n or path.endswith(f".{n}") for n in names):
            module.modules_to_save[NAME].weight = embeddings.modules_to_save[NAME].weight


def _replaces(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _base_layer(layer: Any, path: str) -> nn.Module | None:
    """The base model's layer inside of `layer`; None where all of it was trained anew."""
    if isinstance(layer, ModulesToSaveWrapper):
        return None
    if isinstance(layer, TrainableTokensWrapper):
        layer = layer.token_adapter
        if isinstance(layer.base_layer, BaseTunerLayer):
            raise TunesmithError(
                f"{path} has both adapters and trainable_token_indices, which peft can't merge together"
            )
    base: nn.Module = layer.get_base_layer()
    inner = next((name for name, module in base.named_modules() if _replaces(module)), None)
    if inner is not None:
        raise TunesmithError(f"{path} has adapters, and so has {inner} inside of it, which can't be merged")
    return base


def _repeat_start(layer: Any, settings: PeftConfig) -> None:
    """Takes away from the base weights what the adapters started with, as `peft` does when it loads such adapters."""
    start = getattr(settings, "init_lora_weights", True)
    if start not in REPEATED or not isinstance(layer, LoraLayer) or NAME not in layer.lora_A:
        return
    trained = [layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data]
    if start == "pissa":
        layer.pissa_init(NAME, start)
    else:
        layer.olora_init(NAME)
    layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data = trained


class MergedWeights:
    """What to write: `pieces`, in the base model's order, and by `tensors` what each holds.

    `shared` are the names that share one weight in the base model, and `growing` those that have a row for each token
    and may have fewer in the base model's files. Weights that adapters made different are written under each of their
    names, and `untied` says so. `dtype` None keeps the format of each tensor in the base model's files.

    Merging is done in fp32. Raises TunesmithError for weights that are not there or don't fit.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        weights: Weights,
        *,
        dtype: torch.dtype | None,
        shared: Sequence[tuple[str, ...]],
        growing: Iterable[str],
    ) -> None:
        self._adapted, self._weights, self._dtype = adapted, weights, dtype
        self._growing = list(growing)
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
        if layer is not None:
            tensors = self._adapted.merge(layer, self._read)
        else:
            own, shapes = self._adapted.own, self._adapted.shapes
            tensors = {name: own[name] if name in own else self._stored(name, shapes[name]) for name in piece.names}
        return {name: self._cast(name, tensors[name]) for name in piece.names}

    def dtype(self, name: str) -> torch.dtype:
        """The format that the tensor `name` is written in. What came with the adapters alone, such as the head of a
        classifier, has that of the embeddings."""
        source = self._source[name]
        stored = self._weights.dtype(source if source in self._there else self._source[self._growing[0]])
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def _alias(self, name: str, shared: Sequence[tuple[str, ...]]) -> str:
        """`name`, or the name under which the base model's files have its weight."""
        group: tuple[str, ...] = next((group for group in shared if name in group), ())
        return next((other for other in (name, *group) if other in self._there), name)

    def _decide(self, group: tuple[str, ...]) -> None:
        """Finds out whether the names of `group` still share one weight. Where their layers are merged separately, the
        values are compared."""
        touched = any(self._adapted.layer_of(name) is not None or name in self._adapted.own for name in group)
        apart = sum(name in self._there for name in group) > 1
        if touched or apart:
            first, *others = (self.tensors(Piece(names=(name,), size=0))[name] for name in group)
            if not all(torch.equal(first, other) for other in others):
                if not {*group} <= {*self._growing}:
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
        sizes = {name: shape.numel() * self.dtype(name).itemsize for name, shape in self._adapted.shapes.items()}
        return [Piece(names=tuple(own), size=sum(sizes[name] for name in own)) for own in names.values()]

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
    """`tensor` (R, ...) with `rows` rows, unless it has more. New rows are the mean of the others, as in training with
    new tokens: https://nlp.stanford.edu/~johnhew/vocab-expansion.html."""
    missing = rows - tensor.shape[0]
    if missing <= 0:
        return tensor
    mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(missing, *tensor.shape[1:])])


def growing_names(model: PreTrainedModel) -> list[str]:
    """The names of the weights that have a row for each token: the input embeddings', and the head's with its bias."""
    layers = _token_layers(model).items()
    return [f"{path}.{name}" for path, module in layers for name, _ in module.named_parameters(recurse=False)]


def grow(model: PreTrainedModel, rows: int) -> None:
    """Gives the embeddings of `model` as many `rows`, as `with_rows` does."""
    before: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for name in growing_names(model):
            parameter = model.get_parameter(name)
            if not parameter.is_meta:
                parameter.copy_(with_rows(parameter[:before].clone(), rows))


@contextmanager
def explained(problem: str) -> Iterator[None]:
    """What `peft` and `transformers` raise for what can't be done, as TunesmithError; and without their warnings on
    merging, which are about what is taken care of here."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"peft\.")
            warnings.filterwarnings("ignore", ".* copying from a non-meta parameter")
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    except TunesmithError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, ImportError) as error:
        first, *more = str(error).splitlines() or [type(error).__name__]  # one for every layer, sometimes
        cause = " ".join([first, *(line.strip() for line in more[:1])]) + (" ..." if more[1:] else "")
        raise TunesmithError(f"{problem}: {cause}") from error
