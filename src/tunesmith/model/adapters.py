"""Adapters of `peft` on a model: which kinds, onto which layers, and how much is trained.

Kinds that change each token by itself, and those that put virtual tokens in front of a row, are trained and tested; the
others are refused by name.
"""

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from tunesmith.errors import TunesmithError, nearest
from tunesmith.model.quantize import Bits, bits_of
from tunesmith.text import size

Model = PreTrainedModel | PeftModel

logger = logging.getLogger(__name__)
CHANGE_THE_BASE = ("olora", "pissa", "corda", "lora_ga")
"""Initializations that move a part of the base weights into the adapters."""
READ_BY_KERNELS = ("out_proj", "x_proj", "dt_proj")
"""Linear layers of a state-space layer whose weights go into its kernel."""
SIDE = re.compile(r"\.lora_(?:embedding_)?([AB])(\.|$)")
"""In the name of a weight of LoRA: which of the two factors it is."""
BY_TOKEN = {
    *("LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "VERA", "RANDLORA", "FOURIERFT", "WAVEFT", "SHIRA"),
    *("VBLORA", "C3A", "ROAD", "DELORA", "LN_TUNING", "TRAINABLE_TOKENS"),
}
ROUTERS = ("num_local_experts", "num_experts", "n_routed_experts")
"""In the settings of a model, how many experts it has."""
WORTH_TELLING = 0.01
"""The share of the layers' weights from which on it is said that all-linear leaves them out."""
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
    _refuse(config, bits_of(model))
    config = copy.deepcopy(config)  # peft writes the names that "all-linear" means for this model into it
    _settle_task(config, model)
    _check_names(config, model)
    everything, given = all_linear(config), copy.copy(config)
    if everything:
        _leave_out_mixers(config, model)
    _tie(config, model)
    patterns = {field: list(getattr(config, field, None) or ()) for field in ("rank_pattern", "alpha_pattern")}
    matrices = _matrices(model)
    try:
        with warnings.catch_warnings():
            # `_check_names`, `_check_patterns` and `_tie` say in our words: names that match nothing, tied embeddings.
            warnings.simplefilter("error", RuntimeWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
            adapted = get_peft_model(model, config)
    except (ValueError, RuntimeWarning) as error:
        raise TunesmithError(f"peft_config does not fit the model: {error}{_way_on(error, everything)}") from error
    except ImportError as error:
        raise TunesmithError(
            f"peft can't make adapters with the libraries that are installed: {error}. Install or update the one that "
            "it names; one that is too old and that nothing needs can be uninstalled instead: pip uninstall NAME"
        ) from error
    except (TypeError, AttributeError, LookupError, RuntimeError, AssertionError) as error:
        kind = type(error).__name__
        raise TunesmithError(
            f"peft can't make these adapters for {type(model).__name__} ({kind}: {error}); take another peft_config, "
            "such as LoraConfig(target_modules='all-linear')"
        ) from error
    assert isinstance(adapted, PeftModel)
    for field, keys in patterns.items():
        _check_patterns(field, keys, adapted)
    if everything:
        _tell_left_out(matrices, adapted, given)
    return adapted


def _settle_task(config: PeftConfig, model: PreTrainedModel) -> None:
    """What the model is for, which `peft` wants to know: of a sequence classifier, it trains and saves the head whole.
    A recipe's LoRA says CAUSAL_LM, whatever is trained."""
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    wanted, known = ("SEQ_CLS", "a sequence classifier") if classifies else ("CAUSAL_LM", "a language model")
    if config.task_type not in (None, "CAUSAL_LM", wanted):
        raise TunesmithError(f"peft_config: task_type is {config.task_type}; for {known} it is {wanted}")
    config.task_type = wanted


def base_model(model: Model) -> PreTrainedModel:
    """The model of `transformers` inside the adapters, or `model` itself."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether an adapter puts tokens of its own in front of each row."""
    if not isinstance(model, PeftModel) or model._adapters_disabled:
        return False
    return bool(model.active_peft_config.is_prompt_learning)


def has_experts(model: Model) -> bool:
    """Whether tokens of `model` are sent to some of several experts."""
    config = base_model(model).config.get_text_config()
    return any(getattr(config, name, None) for name in ROUTERS)


def _refuse(config: PeftConfig, bits: Bits | None) -> None:
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind == "LORA":
        _refuse_lora(config, bits)
    if kind in BY_TOKEN | VIRTUAL_TOKENS:
        return
    reason = REASONS.get(kind, "it was never tried with flat batches")
    known = ", ".join(sorted(BY_TOKEN | VIRTUAL_TOKENS))
    raise TunesmithError(f"peft_config: {kind} can't be trained here: {reason}. Take LoraConfig; these work: {known}")


def _refuse_lora(config: Any, bits: Bits | None) -> None:
    """`bits` are those of the base model's weights, if they are quantized."""
    start = config.init_lora_weights
    if config.layer_replication:
        raise TunesmithError("peft_config: layer_replication makes another model; replicate its layers before")
    if config.alora_invocation_tokens:
        raise TunesmithError(
            "peft_config: alora_invocation_tokens switches the adapters on in the middle of a row, which batches here "
            "don't do; leave it out (plain LoRA), or train aLoRA with peft alone"
        )
    if start == "loftq":
        raise TunesmithError(
            "peft_config: init_lora_weights='loftq' rounds the base weights, and whoever loads the adapters would have "
            "to round them alike; quantize the base model (quantize: 4bit) with init_lora_weights=True, or take "
            "'pissa' without quantization"
        )
    if bits is not None and isinstance(start, str) and start.startswith((*CHANGE_THE_BASE, "orthogonal")):
        raise TunesmithError(
            f"peft_config: init_lora_weights={start!r} can't start on {bits} weights: what it leaves of them would be "
            "rounded once more. Leave init_lora_weights out, or don't quantize the base model"
        )
    if bits == "8bit" and config.use_dora:
        raise TunesmithError(
            "peft_config: use_dora needs the weights' norms, which peft can't take of 8-bit layers; quantize to 4 bits "
            "(quantize: 4bit), or leave use_dora out"
        )


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
        fused = _fused(config, model) if field == "target_modules" else ()
        for name in names:
            if name not in fused and not any(is_named(module, name) for module in modules):
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


def all_linear(config: PeftConfig) -> bool:
    """Whether `config` asks for every linear layer of the decoder."""
    targets = getattr(config, "target_modules", None)
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _fused(config: PeftConfig, model: nn.Module) -> Collection[str]:
    """The names in `target_modules` that `peft` takes for parts of fused experts: `gate_proj` of Qwen3-MoE, which has
    one matrix `gate_up_proj` of all experts."""
    names = getattr(config, "target_modules", None) or ()
    if isinstance(names, str) or not names:
        return ()
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, model, None)
    except ValueError:  # one of two that are fused together; `peft` says so when the adapters are made
        return names
    return set(names) - set(converted.target_modules or ())  # type: ignore[attr-defined]


def _check_patterns(field: str, keys: Collection[str], adapted: PeftModel) -> None:
    """Raises for a pattern of ranks or alphas that nothing adapted has. `peft` looks for layers, and not for the
    parameters that are adapted; it matches names as here."""
    tuner: Any = adapted.base_model
    names = [*tuner.targeted_module_names, *tuner.targeted_parameter_names] if keys else []
    for key in keys:
        if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            raise TunesmithError(f"peft_config: {field} has {key!r}, which matches nothing that is adapted")


def _way_on(error: Exception, everything: bool) -> str:
    if "ParamWrapper does not work with" not in str(error):
        return ""
    hint = ", or list layers in target_modules instead of all-linear" if everything else ""
    return f". These are the experts' matrices; drop this setting{hint}"


# What all-linear leaves out


def _leave_out_mixers(config: Any, model: nn.Module) -> None:
    """State-space layers (Mamba) hand the weights of these layers to a kernel, which would pass over their adapters."""
    names = [
        f"{path}.{layer}"
        for path, module in model.named_modules()
        if {"A_log", "D"} <= {name for name, _ in module.named_parameters(recurse=False)}
        for layer in READ_BY_KERNELS
        if hasattr(module, layer)
    ]
    if not names:
        return
    short = {".".join(name.split(".")[-2:]) for name in names}
    others = [name for name, _ in model.named_modules() if name not in names]
    if not any(is_named(other, name) for other in others for name in short):
        names = sorted(short)
    given = getattr(config, "exclude_modules", None)
    if isinstance(given, str):
        config.exclude_modules = "|".join([f"(?:{given})", *(rf"(?:.*\.)?{re.escape(name)}" for name in names)])
    else:
        config.exclude_modules = [*(given or ()), *names]


def _matrices(model: PreTrainedModel) -> dict[str, int]:
    """How many values the weights of the model's layers have, by name: matrices, and stacks of them. Embeddings and the
    head are none."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        f"{path}.{name}": _count(parameter)
        for path, module in model.named_modules()
        if module not in ends and not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and not name.endswith("bias")
    }


def _tell_left_out(matrices: Mapping[str, int], adapted: PeftModel, given: PeftConfig) -> None:
    """Says which weights of the layers have no adapters, although all-linear was asked for: the experts that a model
    has in one stack, for example. What the config as it was `given` excludes is meant."""
    tuner: Any = adapted.base_model
    with_adapters = {*(f"{name}.weight" for name in tuner.targeted_module_names), *tuner.targeted_parameter_names}
    meant = [getattr(given, field, None) or () for field in ("exclude_modules", "modules_to_save")]
    kinds: dict[str, int] = {}
    for name, count in matrices.items():
        layer = name.rpartition(".")[0]
        if name not in with_adapters and not any(_is_listed(layer, names) for names in meant):
            kind = re.sub(r"^.*\.\d+\.", "", name)
            kinds[kind] = kinds.get(kind, 0) + count
    share = sum(kinds.values()) / max(1, sum(matrices.values()))
    if share < WORTH_TELLING:
        return
    largest = sorted(kinds, key=lambda kind: -kinds[kind])
    experts = [kind for kind in largest if "experts." in kind and not kind.endswith(".weight")]
    hint = f" To train the experts too, add target_parameters: [{', '.join(experts)}]." if experts else ""
    logger.warning(
        "all-linear leaves out %.0f%% of the layers' weights, which get no adapters: %s.%s",
        100 * share,
        ", ".join(largest),
        hint,
    )


def _is_listed(name: str, names: Any) -> bool:
    return bool(re.fullmatch(names, name)) if isinstance(names, str) else any(is_named(name, one) for one in names)


def is_named(name: str, ending: str) -> bool:
    """Whether `ending` names the module `name` as `peft` reads it: in full, or by its last parts."""
    return name == ending or name.endswith(f".{ending}")


def trains_layer(config: PeftConfig, name: str) -> bool:
    """Whether the adapters of `config` train the layer `name`, an end of the model: whole, or by adapters on it. The
    word all-linear means the decoder's layers alone."""
    targets = getattr(config, "target_modules", None) or ()
    whole = getattr(config, "modules_to_save", None) or ()
    if isinstance(targets, str):
        if targets != "all-linear" and re.fullmatch(targets, name):
            return True
        targets = ()
    return any(is_named(name, other) for other in [*targets, *whole])


def _known(names: Collection[str], name: str) -> str:
    return f"which the model does not have{nearest(name, names)}; it has {', '.join(sorted(names))}"


def _tie(config: PeftConfig, model: PreTrainedModel) -> None:
    """Where both ends of tied embeddings are trained whole, they stay one matrix; where one is, it becomes its own."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    whole = getattr(config, "modules_to_save", None) or ()
    names = [name for name, module in model.named_modules() if module in (embeddings, head)]
    _check_rows(config, *sorted(names, key=lambda name: model.get_submodule(name) is head))
    trained = [name for name in names if any(is_named(name, other) for other in whole)]
    if len(trained) == 2 and hasattr(config, "ensure_weight_tying"):
        config.ensure_weight_tying = True
    elif trained and not getattr(config, "ensure_weight_tying", False):
        logger.info("%s is trained as a matrix of its own: the embeddings are no longer tied.", trained[0])


def _check_rows(config: PeftConfig, embeddings: str, head: str) -> None:
    """Raises where `config` trains a tied head by itself, and rows of the embeddings: `peft` would train these rows in
    the head, too, and pass over what it has there."""
    rows = getattr(config, "trainable_token_indices", None) or ()
    in_embeddings = any(is_named(embeddings, key) for key in rows) if isinstance(rows, dict) else bool(rows)
    if in_embeddings and trains_layer(config, head):
        field = (
            "modules_to_save" if _is_listed(head, getattr(config, "modules_to_save", None) or ()) else "target_modules"
        )
        raise TunesmithError(
            f"peft_config: {field} trains {head}, and rows of {embeddings}, which is tied to it, are trained for new "
            f"tokens or by trainable_token_indices; peft can't do both. Name {embeddings} in {field}, too, or take "
            f"{head} out of it"
        )


class StartingPoint:
    """Adapters of `model` at their start, where that took a part of the base weights with it (PiSSA, OLoRA).

    What is saved must fit onto the base model as it was, for everybody who loads it. `model.save_pretrained` therefore
    writes what was learned, less the start: plain LoRA of twice the rank. Only within `as_they_are` it writes the
    adapters themselves, for a run that goes on with them.

    With the start A0 (R, I) and B0 (O, R) taken from the base weights, B A - B0 A0 is one product, [B, -B0] [A; A0].
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        name = self._name = str(model.active_adapter)
        saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        self._weights = {key: value.detach().clone() for key, value in saved.items() if SIDE.search(key)}
        self._plain: Callable[..., None] = model.save_pretrained
        self._converts = True
        model.save_pretrained = self._save  # type: ignore[method-assign,assignment]

    @contextmanager
    def as_they_are(self) -> Iterator[None]:
        self._converts = False
        try:
            yield
        finally:
            self._converts = True

    def _save(self, save_directory: str, safe_serialization: bool = True, **settings: Any) -> None:
        if not safe_serialization:
            raise TunesmithError(
                "adapters that moved base weights are saved as safetensors; leave safe_serialization on"
            )
        self._plain(save_directory, **settings)
        wanted = settings.get("selected_adapters") or [self._name]
        done = settings.get("path_initial_model_for_weight_conversion") or not settings.get("is_main_process", True)
        if self._converts and self._name in wanted and not done:
            folder = Path(save_directory)
            self._convert(folder if self._name == "default" else folder / self._name)

    def _convert(self, folder: Path) -> None:
        """Make plain LoRA of the adapters in `folder`; what else was trained beside them stays as it is."""
        weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        for key, start in self._weights.items():
            side = SIDE.search(key)
            assert side is not None
            first, now = side[1] == "A", weights[key]
            before = start.to(now.device, now.dtype)
            weights[key] = torch.cat([now, before if first else -before], dim=0 if first else 1).contiguous()
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        file = folder / CONFIG_NAME
        config = json.loads(file.read_text(encoding="utf-8"))
        # The scale is alpha / r, or with rslora alpha / sqrt(r): it must stay what it was.
        factor = 2**0.5 if config["use_rslora"] else 2
        config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"]}
        config["rank_pattern"] = {key: 2 * value for key, value in (config["rank_pattern"] or {}).items()}
        config["alpha_pattern"] = {key: factor * value for key, value in (config["alpha_pattern"] or {}).items()}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def starting_point(model: nn.Module) -> StartingPoint | None:
    """The adapters of `model` as they are now, if they changed the base weights; else None."""
    if not isinstance(model, PeftModel):
        return None
    init = getattr(model.active_peft_config, "init_lora_weights", None)
    return StartingPoint(model) if isinstance(init, str) and init.startswith(CHANGE_THE_BASE) else None


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
        count = _count(parameter)
        every += count
        if parameter.requires_grad:
            trained += count
            trained_bytes += count * parameter.element_size()
    return Trainable(parameters=every, trained=trained, trained_bytes=trained_bytes)


def _count(parameter: nn.Parameter) -> int:
    """How many values it has, whether it is packed or shared out over processes."""
    count = int(getattr(parameter, "ds_numel", None) or parameter.numel())
    packed = type(parameter).__name__ == "Params4bit" and parameter.dtype in (torch.uint8, torch.int8)
    return 2 * count if packed else count
