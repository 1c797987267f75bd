"""Supervised fine-tuning of language models that is right, fast on the hardware you have, and shows its work.

The public names are imported when they are first used, so `import tunesmith` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.data.mixture import DataSource
    from tunesmith.errors import TunesmithError
    from tunesmith.model.demo_model import demo_model_path
    from tunesmith.model.generate import generate
    from tunesmith.model.load import load_run
    from tunesmith.model.tokens import clone_chat_template
    from tunesmith.practice.hub_server import practice_hub
    from tunesmith.settings.config import SFTConfig
    from tunesmith.settings.distillation import DistillationConfig, GKDConfig
    from tunesmith.settings.policy import GRPOConfig, RLOOConfig
    from tunesmith.settings.preference import DPOConfig, KTOConfig, RewardConfig
    from tunesmith.trainers import (
        DistillationTrainer,
        DPOTrainer,
        GKDTrainer,
        GRPOTrainer,
        KTOTrainer,
        RewardTrainer,
        RLOOTrainer,
        SFTTrainer,
    )

__version__ = "0.2.0"

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DataSource",
    "DistillationConfig",
    "DistillationTrainer",
    "GKDConfig",
    "GKDTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "TunesmithError",
    "__version__",
    "clone_chat_template",
    "demo_model_path",
    "generate",
    "load_run",
    "practice_hub",
]

_DEFINED_IN = {
    "DPOConfig": "tunesmith.settings.preference",
    "DPOTrainer": "tunesmith.trainers",
    "DistillationConfig": "tunesmith.settings.distillation",
    "DistillationTrainer": "tunesmith.trainers",
    "GKDConfig": "tunesmith.settings.distillation",
    "GKDTrainer": "tunesmith.trainers",
    "KTOConfig": "tunesmith.settings.preference",
    "KTOTrainer": "tunesmith.trainers",
    "RewardConfig": "tunesmith.settings.preference",
    "RewardTrainer": "tunesmith.trainers",
    "GRPOConfig": "tunesmith.settings.policy",
    "GRPOTrainer": "tunesmith.trainers",
    "RLOOConfig": "tunesmith.settings.policy",
    "RLOOTrainer": "tunesmith.trainers",
    "DataSource": "tunesmith.data.mixture",
    "SFTConfig": "tunesmith.settings.config",
    "SFTTrainer": "tunesmith.trainers",
    "TunesmithError": "tunesmith.errors",
    "clone_chat_template": "tunesmith.model.tokens",
    "demo_model_path": "tunesmith.model.demo_model",
    "generate": "tunesmith.model.generate",
    "load_run": "tunesmith.model.load",
    "practice_hub": "tunesmith.practice.hub_server",
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
