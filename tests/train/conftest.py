"""A tokenizer, small models with it, and short runs on the CPU."""

import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.models import tiny
from tests.train.runs import PAIR_ROWS
from tunesmith import SFTConfig, SFTTrainer


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """A run collects garbage when it starts, which takes half a second where it looks through all of `transformers`."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with the ChatML template: a character of ASCII is a token. The trainer may change it."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return tokenizer


@pytest.fixture
def model_of(tokenizer: PreTrainedTokenizerBase) -> Callable[..., PreTrainedModel]:
    """Makes a model of the named architecture for the vocabulary of `tokenizer`."""

    def make(name: str = "llama", **settings: Any) -> PreTrainedModel:
        return tiny(name, len(tokenizer), **settings)

    return make


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., SFTConfig]:
    """Makes the settings of a run of one step in fp32 on the CPU, that reports to nobody and saves nothing.

    Gradients are not clipped, which would hide a loss of the wrong size.
    """

    def make(**settings: Any) -> SFTConfig:
        common: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 8,
        }
        return SFTConfig(**common | settings)

    return make


@pytest.fixture
def trainer_of(
    model_of: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    config: Callable[..., SFTConfig],
) -> Callable[..., SFTTrainer]:
    """Makes a trainer on PAIR_ROWS; arguments that the trainer doesn't have are settings of the run."""
    own = inspect.signature(SFTTrainer.__init__).parameters

    def make(name: str = "llama", **arguments: Any) -> SFTTrainer:
        settings = {key: arguments.pop(key) for key in list(arguments) if key not in own}
        defaults = {"model": None, "args": None, "train_dataset": PAIR_ROWS, "processing_class": tokenizer}
        arguments = defaults | arguments
        arguments["model"] = arguments["model"] or model_of(name)
        arguments["args"] = arguments["args"] or config(**settings)
        return SFTTrainer(**arguments)

    return make
