"""A tokenizer, and what prepares data with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tunesmith import SFTConfig
from tunesmith.data.dataset import DataPreparer


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with the ChatML template: a character of ASCII is a token."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return tokenizer


@pytest.fixture
def preparer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., DataPreparer]:
    """Makes the preparer of a run with these settings."""

    def make(**settings: Any) -> DataPreparer:
        return DataPreparer(SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **settings), tokenizer, None)

    return make
