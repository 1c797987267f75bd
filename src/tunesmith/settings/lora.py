"""LoRA's settings, from a recipe or the command line."""

import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from tunesmith.errors import TunesmithError, nearest
from tunesmith.settings.coerce import coerce

ALL_LINEAR = "all-linear"
KEYS: dict[str, Any] = {
    "r": int,
    "alpha": float,
    "dropout": float,
    "target": str | list[str],
    "dora": bool,
    "rslora": bool,
    "init": str,
    "bias": str,
    "layers_to_transform": list[int],
    "rank_pattern": dict[str, int],
    "alpha_pattern": dict[str, float],
    "modules_to_save": list[str],
    "target_parameters": list[str],
    "exclude_modules": list[str],
    "ensure_weight_tying": bool,
}
"""What may be said of LoRA, and its type."""
PEFT_NAMES = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target": "target_modules",
    "dora": "use_dora",
    "rslora": "use_rslora",
    "init": "init_lora_weights",
}
"""Our short names of what `peft` calls otherwise. Its own names are taken, too."""
INITS = ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_16")
EXAMPLE = f"r=16,alpha=32,dropout=0.05,target={ALL_LINEAR}"


def lora_config(spec: Mapping[str, Any] | str | bool) -> LoraConfig:
    """The `peft` settings that `spec` asks for: true, text like `r=16,alpha=32,dropout=0.05,target=q_proj,v_proj`, or
    an object with the keys of `KEYS`.

    Unset: rank `r` 16, `alpha` 32 (the update is scaled by alpha / r; by alpha / sqrt(r) with `rslora`), `dropout` 0,
    `target` all-linear (every linear layer but the head). Raises TunesmithError for an unknown key and a value that is
    none.
    """
    values: dict[str, Any] = {"r": 16, "alpha": 32, "dropout": 0.0, "target": ALL_LINEAR}
    short = {theirs: ours for ours, theirs in PEFT_NAMES.items()}
    for written, value in _parsed(spec).items():
        name = short.get(written, written)
        if name not in KEYS:
            hint = nearest(name, KEYS) or f"; the keys are {', '.join(KEYS)}"
            raise TunesmithError(f"lora: there is no {name!r}{hint}")
        try:
            values[name] = coerce(value, KEYS[name])
        except ValueError as error:
            raise TunesmithError(f"lora: {name} {error}") from error
    _check(values)
    settings = {PEFT_NAMES.get(name, name): value for name, value in values.items()}
    try:
        return LoraConfig(task_type="CAUSAL_LM", **settings)
    except ValueError as error:  # settings that contradict each other
        raise TunesmithError(f"lora: {error}") from error


def _parsed(spec: Mapping[str, Any] | str | bool) -> Mapping[str, Any]:
    """`r=16,target=q_proj,v_proj` to `{"r": "16", "target": ["q_proj", "v_proj"]}`: an item without a key belongs to
    the list before it."""
    if isinstance(spec, Mapping):
        return spec
    if spec is True:
        return {}
    if not isinstance(spec, str):
        raise TunesmithError(f"lora is {spec!r}; write true, or {EXAMPLE}")
    values: dict[str, Any] = {}
    for item in spec.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if equals and name in values:
            raise TunesmithError(f"lora: {name!r} is given twice in {spec!r}")
        if equals:
            values[name] = value
        elif name and values and _takes_list(last := list(values)[-1]):
            before = values[last]
            values[last] = [*([before] if isinstance(before, str) else before), name]
        else:
            raise TunesmithError(f"lora is {spec!r}, in which {item!r} is no key=value; write for example {EXAMPLE}")
    return values


def _takes_list(name: str) -> bool:
    name = next((ours for ours, theirs in PEFT_NAMES.items() if theirs == name), name)
    return "list" in str(KEYS.get(name))


def _check(values: Mapping[str, Any]) -> None:
    r, alpha, dropout, target = values["r"], values["alpha"], values["dropout"], values["target"]
    if r < 1:
        raise TunesmithError(f"lora: r is {r}; the rank of an adapter is at least 1")
    if not 0 < alpha < float("inf"):
        raise TunesmithError(f"lora: alpha is {alpha}; it must be above 0, or the adapters would have no effect")
    if not 0 <= dropout < 1:
        raise TunesmithError(f"lora: dropout is {dropout}, a share from 0 up to, but not including, 1")
    if not target or not all(target):
        raise TunesmithError(f"lora: target is {target!r}; name layers, such as q_proj,v_proj, or write {ALL_LINEAR}")
    init, bias = values.get("init", INITS[0]), values.get("bias", "none")
    if init not in INITS and not re.fullmatch(r"pissa_niter_\d+", init):
        raise TunesmithError(f"lora: init is {init!r}; choose {' | '.join(INITS)}{nearest(init, INITS)}")
    if bias not in ("none", "all", "lora_only"):
        raise TunesmithError(f"lora: bias is {bias!r}; choose none | all | lora_only")
