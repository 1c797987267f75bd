"""The parts of a run's record, from what the trainer has at hand."""

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tunesmith import __version__
from tunesmith.data.preflight import Preflight, is_train
from tunesmith.ship.record import Method, Origin, Prompt, SourceCount
from tunesmith.types import Conversation, Row, Text

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "peft", "safetensors")
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "max_tokens_per_batch",
    "gradient_accumulation_steps",
    "max_length",
    "overlong",
    "packing",
    "packing_strategy",
    "precision",
    "train_on",
    "loss_type",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "gradient_checkpointing",
    "seed",
    "data_seed",
    "world_size",
)
"""What a reader of the results wants to know. No path and no name of a service is among them."""


def versions() -> dict[str, str]:
    """Of tunesmith, Python and the libraries that compute."""
    found = {"tunesmith": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def method_of(model: Any) -> Method:
    """What of `model`, as it was trained, was trained: its adapters, or everything."""
    bits = next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    if not configs:
        return Method(bits=bits)
    config = next(iter(configs.values()))
    kind = getattr(config.peft_type, "value", config.peft_type)
    targets = getattr(config, "target_modules", None) or ()
    # "all-linear" has become a list with a name for every layer by now; what differs is the last part.
    named = [targets] if isinstance(targets, str) else sorted({target.rsplit(".", 1)[-1] for target in targets})
    return Method(
        kind=str(kind).lower(),
        rank=getattr(config, "r", None),
        alpha=getattr(config, "lora_alpha", None),
        dropout=getattr(config, "lora_dropout", None),
        targets=tuple(named),
        bits=bits,
    )


def settings_of(config: Any) -> dict[str, Any]:
    """The hyperparameters of an `SFTConfig`, without those that are unset, and `train_on` as it was resolved."""
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
    return {name: getattr(value, "value", value) for name, value in values.items() if value is not None}


def counts_of(preflight: Preflight, origins: Mapping[str, Origin]) -> tuple[SourceCount, ...]:
    """Every source of every split. `origins` are by split as the preflight names them ("train", "train/chat", "eval"),
    or by the source's name alone; what has none came from a program."""
    found = []
    for split, report in preflight.splits.items():
        source = split.split("/", 1)[-1]
        counts = report.counts
        found.append(
            SourceCount(
                split="train" if is_train(split) else split,
                source=source,
                origin=origins.get(split) or origins.get(source) or Origin.of_data(None),
                examples=counts.examples,
                tokens=counts.tokens,
                supervised_tokens=counts.supervised,
                dropped=sum(count for count, _ in counts.dropped.values()),
            )
        )
    return tuple(found)


def prompts_of(rows: Iterable[Row], count: int) -> tuple[Prompt, ...]:
    """What the first rows ask, each with the answer in the data: the messages before the last of the assistant, or the
    prompt of a text. Rows without a question, or with more than text in it, are passed over."""
    found: dict[str, Prompt] = {}
    for row in rows:
        made = _prompt(row)
        if made is not None:
            found.setdefault(repr(made.prompt), made)
        if len(found) == count:
            break
    return tuple(found.values())


def _prompt(row: Row) -> Prompt | None:
    if isinstance(row, Text):
        return None if not row.prompt else Prompt(prompt=row.prompt, expected=row.text[len(row.prompt) :].strip())
    if not isinstance(row, Conversation) or row.tools:
        return None
    last = max((i for i, message in enumerate(row.messages) if message.role == "assistant"), default=0)
    messages = [message.fields for message in row.messages[: last + 1]]
    if not last or not all(isinstance(message.get("content"), str) for message in messages):
        return None
    asked = tuple({"role": message["role"], "content": message["content"]} for message in messages[:-1])
    return Prompt(prompt=asked, expected=messages[-1]["content"])
