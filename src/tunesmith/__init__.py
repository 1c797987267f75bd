"""Supervised fine-tuning of language models that is right, fast on the hardware you have, and shows its work.

The public names are imported when they are first used, so `import tunesmith` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.config import SFTConfig
    from tunesmith.data.sources import DataSource
    from tunesmith.errors import TunesmithError
    from tunesmith.model.tokens import clone_chat_template
    from tunesmith.train.trainer import SFTTrainer

__version__ = "0.1.0"

__all__ = ["DataSource", "SFTConfig", "SFTTrainer", "TunesmithError", "__version__", "clone_chat_template"]

_DEFINED_IN = {
    "DataSource": "tunesmith.data.sources",
    "SFTConfig": "tunesmith.config",
    "SFTTrainer": "tunesmith.train.trainer",
    "TunesmithError": "tunesmith.errors",
    "clone_chat_template": "tunesmith.model.tokens",
}


def __getattr__(name: str) -> object:
    """The public name `name`, imported from the module that defines it; raises AttributeError for any other."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_DEFINED_IN[name]), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
