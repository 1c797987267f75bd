"""The parts of a run's record, from what the trainer has at hand."""

import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tunesmith import __version__
from tunesmith.data.preflight import Preflight, is_train
from tunesmith.runs.record import Method, Origin, Prompt, SourceCount
from tunesmith.secrets import without_secrets
from tunesmith.types import Conversation, Judged, Pair, Row, Text

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "peft", "safetensors", "bitsandbytes")
SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "num_train_epochs", "max_steps", "per_device_train_batch_size", "max_tokens_per_batch"),
    *("gradient_accumulation_steps", "max_length", "overlong", "packing", "packing_strategy", "precision"),
    *("train_on", "loss_type", "label_smoothing_factor", "neftune_noise_alpha", "gradient_checkpointing"),
    *("seed", "data_seed", "world_size"),
)
"""What a reader of the results wants to know, even if it is the default."""
LEFT_OUT = re.compile(
    "output_dir|run_name|project|report_to|(hub|trackio)_.*|push_to_hub|log_.*|disable_tqdm|resume_from_checkpoint"
    "|local_rank|deepspeed|accelerator_config|dataloader_pin_memory|bf16|fp16|completion_only_loss|assistant_only_loss"
    "|activation_checkpointing(_kwargs)?|do_.*|debug|use_cpu"
)
"""Paths of this machine, names of services, secrets, how a run shows itself, and what another setting says already."""
LEFT_OUT_OF_ADAPTERS = re.compile(
    "r|lora_alpha|lora_dropout|target_modules|peft_type|task_type|peft_version|auto_mapping|base_model_name_or_path"
    "|revision|inference_mode|runtime_config"
)
"""What `Method` has, and what does not change the training."""


def versions() -> dict[str, str]:
    """The versions of tunesmith, Python and the libraries that compute."""
    numbers = {"tunesmith": __version__, "python": platform.python_version()}
    return numbers | {name: number for name in LIBRARIES if (number := _installed(name)) is not None}


@cache
def _installed(name: str) -> str | None:
    """The version of a package, whose metadata are read once: each checkpoint says them."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def method_of(model: Any) -> Method:
    """What was trained of `model`: its adapters, or all of its weights."""
    bits = next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)
    config = _adapter_config(model)
    if config is None:
        return Method(bits=bits)
    targets = getattr(config, "target_modules", None) or ()
    # "all-linear" has become a list with a name for every layer by now; what differs is the last part.
    named = [targets] if isinstance(targets, str) else sorted({target.rsplit(".", 1)[-1] for target in targets})
    return Method(
        kind=_adapter_kind(config),
        rank=getattr(config, "r", None),
        alpha=getattr(config, "lora_alpha", None),
        dropout=getattr(config, "lora_dropout", None),
        targets=tuple(named),
        bits=bits,
    )


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of an `SFTConfig`: the hyperparameters that count, without those that are unset, `train_on` as it
    was resolved, and whatever else is not as it is by default."""
    values = {name: getattr(config, name, None) for name in SETTINGS}
    values["train_on"] = getattr(config, "resolved_train_on", None)
    if not values["packing"]:
        values["packing_strategy"] = None
    if values["max_tokens_per_batch"] is not None:
        values["per_device_train_batch_size"] = None
    if (values["max_steps"] or -1) > 0:
        values["num_train_epochs"] = None
    else:
        values["max_steps"] = None
    chosen = _not_as_by_default(config, LEFT_OUT)
    others = {name: value for name, value in chosen.items() if name not in SETTINGS}
    others |= {name: "none" for name, value in chosen.items() if value is None}
    return {name: _shown(value) for name, value in (values | others).items() if value is not None}


def adapter_settings_of(model: Any) -> dict[str, Any]:
    """The settings of the adapters of `model` that differ from `peft`'s defaults and are not in `method_of`, by names
    such as `lora.use_dora`."""
    config = _adapter_config(model)
    if config is None:
        return {}
    chosen = _not_as_by_default(config, LEFT_OUT_OF_ADAPTERS)
    return {f"{_adapter_kind(config)}.{name}": _shown(value) for name, value in chosen.items()}


def _adapter_config(model: Any) -> Any:
    """The settings of the first adapters, None if there are none."""
    return next(iter((getattr(model, "peft_config", None) or {}).values()), None)


def _adapter_kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def _not_as_by_default(config: Any, left_out: re.Pattern[str]) -> dict[str, Any]:
    """The fields of a dataclass whose values are not the defaults, except for those that are `left_out`."""
    chosen = {}
    for item in fields(config) if is_dataclass(config) else ():
        value = getattr(config, item.name, None)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        # Unset by default, and off or empty now, means the same.
        if value != default and (value or default) and not left_out.fullmatch(item.name):
            chosen[item.name] = value
    return chosen


def _shown(value: Any) -> Any:
    """A setting as it is recorded: without secrets, paths cut to their last part, sets sorted."""
    if isinstance(value, Mapping):
        return {str(key): _shown(item) for key, item in without_secrets(value).items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("file:")):
        return Path(value).name
    return getattr(value, "value", value)


def counts_of(preflight: Preflight, origins: Mapping[str, Origin]) -> tuple[SourceCount, ...]:
    """Every source of every split. `origins` are by split as the preflight names them ("train", "train/chat", "eval"),
    or by the source's name alone; what has none came from a program."""
    sources = {split: split.split("/", 1)[-1] for split in preflight.splits}
    return tuple(
        SourceCount(
            split="train" if is_train(split) else split,
            source=sources[split],
            origin=origins.get(split) or origins.get(sources[split]) or Origin.of_data(None),
            examples=report.counts.examples,
            tokens=report.counts.tokens,
            supervised_tokens=report.counts.supervised,
            dropped=sum(count for count, _ in report.counts.dropped.values()),
        )
        for split, report in preflight.splits.items()
    )


def prompts_of(rows: Iterable[Row], count: int) -> tuple[Prompt, ...]:
    """What the first rows ask, each with the answer in the data, where there is one: the messages before the last of
    the assistant, or the prompt of a text; of a pair, the better answer. Rows without a question, or with more than
    text in it, are passed over."""
    prompts: dict[str, Prompt] = {}
    for row in rows:
        if (prompt := _prompt(row)) is not None:
            prompts.setdefault(repr(prompt.prompt), prompt)
        if len(prompts) == count:
            break
    return tuple(prompts.values())


def _prompt(row: Row) -> Prompt | None:
    if isinstance(row, Pair | Judged):
        return _prompt(row.chosen if isinstance(row, Pair) else row.answer)
    if isinstance(row, Text):
        expected = row.text[len(row.prompt or "") :].strip()
        return None if not row.prompt else Prompt(prompt=row.prompt, expected=expected or None)
    if not isinstance(row, Conversation) or row.tools:
        return None
    if row.prompt_length == len(row.messages):  # a question without an answer
        fields_of_all = [message.fields for message in row.messages]
        if not all(isinstance(message.get("content"), str) for message in fields_of_all):
            return None
        return Prompt(prompt=tuple({"role": one["role"], "content": one["content"]} for one in fields_of_all))
    last = max((i for i, message in enumerate(row.messages) if message.role == "assistant"), default=0)
    messages = [message.fields for message in row.messages[: last + 1]]
    if not last or not all(isinstance(message.get("content"), str) for message in messages):
        return None
    asked = tuple({"role": message["role"], "content": message["content"]} for message in messages[:-1])
    return Prompt(prompt=asked, expected=messages[-1]["content"])
