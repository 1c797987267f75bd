"""GRPO and RLOO runs: gradients against a padded reference written here, what stays as it is, and exact resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.models import gradient_error, gradients
from tests.train.runs import largest_difference, weights_of
from tunesmith import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TunesmithError
from tunesmith.model import ways
from tunesmith.objectives.policy import Drawn, policy_losses
from tunesmith.train.rollouts import Trial

PROMPTS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": f"{word}, {i}?"}], "letter": letter}
    for i, (word, letter) in enumerate([("One", "e"), ("Another", "a"), ("A third one", "t"), ("Last", "s")])
]


def letters(completions: list[Any], letter: list[str], **_: Any) -> list[float]:
    """How much of an answer is above the letter in the alphabet."""
    texts = [answer[0]["content"] for answer in completions]
    return [sum(c > one for c in text) / 8 for text, one in zip(texts, letter, strict=True)]


@pytest.fixture
def policy_of(model_of: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Makes a trainer on PROMPTS; what it does not know is a setting."""

    def make(kind: Any = GRPOTrainer, folder: str = "run", **given: Any) -> Any:
        own = {"model", "reward_funcs", "peft_config", "train_dataset", "eval_dataset", "ref_model", "generator"}
        arguments = {key: given.pop(key) for key in [*given] if key in own}
        common: dict[str, Any] = {
            "output_dir": str(tmp_path / folder),
            "report_to": "none",
            "use_cpu": True,
            "precision": "fp32",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "self_test": "off",
        }
        defaults = {"train_dataset": PROMPTS, "processing_class": tokenizer, "reward_funcs": letters}
        if "model" not in arguments:
            arguments["model"] = model_of("llama")
        config = GRPOConfig if kind is GRPOTrainer else RLOOConfig
        return kind(**defaults | arguments, args=config(**common | given))

    return make


def test_first(policy_of: Any) -> None:
    trainer = policy_of()
    trainer.train()
    for entry in trainer.state.log_history:
        print(entry)
    assert 0
