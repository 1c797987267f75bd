"""LoRA adapters: their settings, from a recipe or the command line."""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from tunesmith.coerce import coerce
from tunesmith.errors import TunesmithError, nearest

ALL_LINEAR = "all-linear"
KINDS = {"r": int, "alpha": float, "dropout": float, "target": str | list[str]}
EXAMPLE = f"r=16,alpha=32,dropout=0.05,target={ALL_LINEAR}"


def lora_config(spec: Mapping[str, Any] | str | bool) -> LoraConfig:
    """The `peft` settings that `spec` asks for: true, text like `r=16,alpha=32,dropout=0.05,target=q_proj,v_proj`, or
    the same as an object.

    Unset: rank `r` 16, `alpha` 32 (the update is scaled by alpha / r), `dropout` 0, `target` all-linear (every linear
    layer but the head). Raises TunesmithError for an unknown key and a value that is none.
    """
    values: dict[str, Any] = {"r": 16, "alpha": 32, "dropout": 0.0, "target": ALL_LINEAR}
    for name, value in _given(spec).items():
        if name not in KINDS:
            hint = nearest(name, KINDS) or f"; the keys are {', '.join(KINDS)}"
            raise TunesmithError(f"lora: there is no {name!r}{hint}")
        try:
            values[name] = coerce(value, KINDS[name])
        except ValueError as error:
            raise TunesmithError(f"lora: {name} {error}") from error
    _check(values)
    return LoraConfig(
        r=values["r"],
        lora_alpha=values["alpha"],
        lora_dropout=values["dropout"],
        target_modules=values["target"],
        task_type="CAUSAL_LM",
    )


def _given(spec: Mapping[str, Any] | str | bool) -> Mapping[str, Any]:
    if isinstance(spec, Mapping):
        return spec
    if spec is True:
        return {}
    if not isinstance(spec, str):
        raise TunesmithError(f"lora is {spec!r}; write true, or {EXAMPLE}")
    given: dict[str, Any] = {}
    for item in spec.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if equals and name in given:
            raise TunesmithError(f"lora: {name!r} is given twice in {spec!r}")
        if equals:
            given[name] = value
        elif name and list(given)[-1:] == ["target"]:  # one more name of the list
            before = given["target"]
            given["target"] = [*([before] if isinstance(before, str) else before), name]
        else:
            raise TunesmithError(f"lora is {spec!r}, in which {item!r} is no key=value; write for example {EXAMPLE}")
    return given


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
