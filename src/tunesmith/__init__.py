"""Supervised fine-tuning of language models that is right, fast on the hardware you have, and shows its work.

The public names are imported when they are first used, so `import tunesmith` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.data.mixture import DataSource
    from tunesmith.errors import TunesmithError
    from tunesmith.model.tokens import clone_chat_template
    from tunesmith.settings.config import SFTConfig
    from tunesmith.settings.policy import GRPOConfig, RLOOConfig
    from tunesmith.settings.preference import DPOConfig, KTOConfig
    from tunesmith.trainers import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

__version__ = "0.1.0"

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DataSource",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "TunesmithError",
    "__version__",
    "clone_chat_template",
]

_DEFINED_IN = {
    "DPOConfig": "tunesmith.settings.preference",
    "DPOTrainer": "tunesmith.trainers",
    "KTOConfig": "tunesmith.settings.preference",
    "KTOTrainer": "tunesmith.trainers",
    "GRPOConfig": "tunesmith.settings.policy",
    "GRPOTrainer": "tunesmith.trainers",
    "RLOOConfig": "tunesmith.settings.policy",
    "RLOOTrainer": "tunesmith.trainers",
    "DataSource": "tunesmith.data.mixture",
    "SFTConfig": "tunesmith.settings.config",
    "SFTTrainer": "tunesmith.trainers",
    "TunesmithError": "tunesmith.errors",
    "clone_chat_template": "tunesmith.model.tokens",
}

_COMMAND_LINE = "it is TRL's own command line: import it from trl, beside SFTConfig and SFTTrainer from tunesmith"
_IN_TRL = {
    **dict.fromkeys(("ModelConfig", "ScriptArguments", "TrlParser", "DatasetMixtureConfig"), _COMMAND_LINE),
    **dict.fromkeys(("get_dataset", "get_peft_config", "get_quantization_config"), _COMMAND_LINE),
    "get_kbit_device_map": _COMMAND_LINE,
    "DataCollatorForCompletionOnlyLM": "write SFTConfig(assistant_only_loss=True), and no data_collator",
    "DataCollatorForLanguageModeling": "leave data_collator out: batches are made without padding",
    "ConstantLengthDataset": "write SFTConfig(packing=True)",
    "setup_chat_format": 'write SFTConfig(chat_template_path="chatml"), or call clone_chat_template',
    **dict.fromkeys(
        ("RewardTrainer", "RewardConfig"),
        "it is not there: import it from trl, which loads what was tuned here",
    ),
}
"""What scripts import from TRL beside the trainer, and what to write here."""


def __getattr__(name: str) -> object:
    """The public name `name`, imported from the module that defines it; raises AttributeError for any other, and
    ImportError with the way on for what TRL has."""
    if name in _IN_TRL:
        raise ImportError(f"tunesmith has no {name}; {_IN_TRL[name]}")
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_DEFINED_IN[name]), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
