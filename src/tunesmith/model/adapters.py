"""Adapters of `peft` on a model: which kinds, onto which layers, and how much is trained.

Kinds that change each token by itself, and those that put virtual tokens in front of a row, are trained and tested; the
others are refused by name.
"""

import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import TunesmithError, nearest
from tunesmith.text import size

Model = PreTrainedModel | PeftModel

logger = logging.getLogger(__name__)
CHANGE_THE_BASE = ("olora", "pissa")
"""Initializations that move a part of the base weights into the adapters."""
BY_TOKEN = {
    *("LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "VERA", "RANDLORA", "FOURIERFT", "WAVEFT", "SHIRA"),
    *("VBLORA", "C3A", "ROAD", "DELORA", "LN_TUNING", "TRAINABLE_TOKENS"),
}
VIRTUAL_TOKENS = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
REASONS = {
    "ADALORA": "it moves ranks between layers by a step of its own, which this trainer does not call",
    "XLORA": "it mixes adapters that are trained already",
    "POLY": "it needs a task id with every row",
    "MULTITASK_PROMPT_TUNING": "it needs a task id with every row",
    "CPT": "its prompt is built from whole examples",
    "CARTRIDGE": "it is distilled from the model's own answers",
    "ADAPTION_PROMPT": "it replaces the attention modules, which documents side by side go through",
}


def adapt(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """`model` with new adapters as `config` says, in fp32; a config of ours is not changed.

    Raises TunesmithError for a kind that can't be trained here, and for names that the model does not have.
    """
    if not isinstance(config, PeftConfig):
        raise TunesmithError(f"peft_config is {type(config).__name__}; expected a peft config such as LoraConfig")
    _refuse(config)
    config = copy.deepcopy(config)  # peft writes the names that "all-linear" means for this model into it
    config.task_type = config.task_type or "CAUSAL_LM"
    if config.task_type != "CAUSAL_LM":
        raise TunesmithError(f"peft_config: task_type is {config.task_type}; for a language model it is CAUSAL_LM")
    _check_names(config, model)
    _tie(config, model)
    try:
        with warnings.catch_warnings():
            # `_check_names` and `_tie` say both in our words: names that match nothing, and tied embeddings.
            warnings.simplefilter("error", RuntimeWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
            adapted = get_peft_model(model, config)
    except (ValueError, RuntimeWarning) as error:
        raise TunesmithError(f"peft_config does not fit the model: {error}") from error
    assert isinstance(adapted, PeftModel)
    return adapted


def base_model(model: Model) -> PreTrainedModel:
    """The causal language model inside the adapters, or `model` itself."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether an adapter puts tokens of its own in front of each row."""
    if not isinstance(model, PeftModel) or model._adapters_disabled:
        return False
    return bool(model.active_peft_config.is_prompt_learning)


def _refuse(config: PeftConfig) -> None:
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind in BY_TOKEN | VIRTUAL_TOKENS:
        if kind == "LORA" and getattr(config, "layer_replication", None):
            raise TunesmithError("peft_config: layer_replication makes another model; replicate its layers before")
        return
    reason = REASONS.get(kind, "it was never tried with flat batches")
    known = ", ".join(sorted(BY_TOKEN | VIRTUAL_TOKENS))
    raise TunesmithError(f"peft_config: {kind} can't be trained here: {reason}. Take LoraConfig; these work: {known}")


def _check_names(config: PeftConfig, model: nn.Module) -> None:
    """Raises for a name in `config` that nothing in `model` has; `peft` passes over it where another one matches."""
    modules = [name for name, _ in model.named_modules() if name]
    endings = {
        name.rpartition(".")[2] for name, module in model.named_modules() if getattr(module, "weight", None) is not None
    }
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        names = getattr(config, field, None) or ()
        if isinstance(names, str):
            if names != "all-linear" and not any(re.fullmatch(names, name) for name in modules):
                raise TunesmithError(
                    f"peft_config: {field} {names!r} matches the full name of no module, such as {modules[-1]}"
                )
            continue
        for name in names:
            if not any(is_named(module, name) for module in modules):
                raise TunesmithError(f"peft_config: {field} has {name!r}, {_known(endings, name)}")
    parameters = [name for name, _ in model.named_parameters()]
    for name in getattr(config, "target_parameters", None) or ():
        if not any(is_named(parameter, name) for parameter in parameters):
            theirs = {".".join(parameter.split(".")[-2:]) for parameter in parameters}
            raise TunesmithError(f"peft_config: target_parameters has {name!r}, {_known(theirs, name)}")
    wanted = getattr(config, "layers_to_transform", None)
    numbers = {int(match[1]) for name in modules if (match := re.search(r"\.(\d+)\.", name + "."))}
    for index in [wanted] if isinstance(wanted, int) else wanted or ():
        if numbers and index not in numbers:
            raise TunesmithError(
                f"peft_config: layers_to_transform has {index}; the model's layers are 0 to {max(numbers)}"
            )


def is_named(name: str, ending: str) -> bool:
    """Whether `ending` names the module `name` as `peft` reads it: in full, or by its last parts."""
    return name == ending or name.endswith(f".{ending}")


def _known(names: Collection[str], name: str) -> str:
    return f"which the model does not have{nearest(name, names)}; it has {', '.join(sorted(names))}"


def _tie(config: PeftConfig, model: PreTrainedModel) -> None:
    """Where both ends of tied embeddings are trained whole, they stay one matrix; where one is, it becomes its own."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    whole = getattr(config, "modules_to_save", None) or ()
    names = [name for name, module in model.named_modules() if module in (embeddings, head)]
    trained = [name for name in names if any(is_named(name, other) for other in whole)]
    if len(trained) == 2 and hasattr(config, "ensure_weight_tying"):
        config.ensure_weight_tying = True
    elif trained and not getattr(config, "ensure_weight_tying", False):
        logger.info("%s is trained as a matrix of its own: the embeddings are no longer tied.", trained[0])


class StartingPoint:
    """Adapters of `model` at their start, where that took a part of the base weights with it (PiSSA, OLoRA).

    What is saved must fit onto the base model as it was, for everybody who loads it. `model.save_pretrained` therefore
    writes what was learned, less the start: plain LoRA of twice the rank. Only within `as_they_are` it writes the
    adapters themselves, for a run that goes on with them.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._weights = {name: value.clone() for name, value in _adapter_weights(model).items()}
        self._plain: Callable[..., None] = model.save_pretrained
        self._converts = True
        model.save_pretrained = self._save  # type: ignore[method-assign]

    @contextmanager
    def as_they_are(self) -> Iterator[None]:
        self._converts = False
        try:
            yield
        finally:
            self._converts = True

    def _save(self, save_directory: str, **settings: Any) -> None:
        self._plain(save_directory, **settings)
        main = settings.get("is_main_process", True)
        if not (self._converts and main) or settings.get("path_initial_model_for_weight_conversion"):
            return
        model, name = self._model, self._model.active_adapter
        if name not in (settings.get("selected_adapters") or [name]):
            return
        settings |= {"selected_adapters": [name], "state_dict": None}
        now = {key: value.clone() for key, value in _adapter_weights(model).items()}
        config = copy.deepcopy(model.active_peft_config)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                _copy_into(model, self._weights)
                self._plain(scratch, **settings)
                _copy_into(model, now)
                start = scratch if name == "default" else str(Path(scratch) / name)
                self._plain(save_directory, **settings | {"path_initial_model_for_weight_conversion": start})
            finally:
                _copy_into(model, now)
                model.peft_config[name] = config  # peft has doubled its rank


def starting_point(model: nn.Module) -> StartingPoint | None:
    """The adapters of `model` as they are now, if they changed the base weights; else None."""
    if not isinstance(model, PeftModel):
        return None
    init = getattr(model.active_peft_config, "init_lora_weights", None)
    return StartingPoint(model) if isinstance(init, str) and init.startswith(CHANGE_THE_BASE) else None


def _adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if ".lora_" in name}


def _copy_into(model: PeftModel, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in _adapter_weights(model).items():
            value.copy_(weights[name])


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainable:
    """How many parameters a model has, how many are trained, and the bytes of these."""

    parameters: int
    trained: int
    trained_bytes: int

    def __str__(self) -> str:
        share = self.trained / self.parameters if self.parameters else 0.0
        return (
            f"trains {self.trained:,} of {self.parameters:,} parameters ({share:.2%}), "
            f"{size(self.trained_bytes)} of weights"
        )


def trainable(model: nn.Module) -> Trainable:
    """What of `model` is trained. Weights of 4 bits are two to a byte, and counted so."""
    every = trained = trained_bytes = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", None) or parameter.numel()
        if type(parameter).__name__ == "Params4bit" and parameter.dtype in (torch.uint8, torch.int8):
            count *= 2
        every += count
        if parameter.requires_grad:
            trained += count
            trained_bytes += count * parameter.element_size()
    return Trainable(parameters=every, trained=trained, trained_bytes=trained_bytes)
