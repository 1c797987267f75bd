"""What prepares data with the small tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tunesmith import SFTConfig
from tunesmith.data.dataset import DataPreparer


@pytest.fixture
def preparer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., DataPreparer]:
    """Makes the preparer of a run with these settings."""

    def make(**settings: Any) -> DataPreparer:
        return DataPreparer(SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **settings), tokenizer, None)

    return make
