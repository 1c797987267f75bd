"""Rows to train on, and what is measured of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.data.styles import TEMPLATES
from tunesmith import SFTTrainer
from tunesmith.train.preference import PreferenceTrainer
from tunesmith.train.trainer import BaseTrainer

T = TypeVar("T", bound=PreferenceTrainer)
TEXTS = ["a", "on", "the mat", "sat there, it seems", "cat", "A longer line of text.", "of", "it is so, and so on"]
TEXT_ROWS = [{"text": text} for text in TEXTS]
PAIR_ROWS = [{"prompt": text[:-1] or "?", "completion": text[-1:] * (i + 1)} for i, text in enumerate(TEXTS)]
_ALPHABET = "the quick brown fox jumps over the lazy dog, again and again"
UNEVEN_ROWS = [{"prompt": _ALPHABET[: 1 + i * 7 % 23], "completion": _ALPHABET[: 1 + i * 5 % 17]} for i in range(24)]
"""24 rows of 3 to 40 tokens."""
TALKS: list[dict[str, Any]] = [
    {
        "messages": [
            message
            for turn in range(3)
            for message in (
                {"role": "user", "content": f"{word} {turn}?"},
                {"role": "assistant", "content": f"{word}{turn}", "reasoning_content": "so so"[: 2 + turn]},
            )
        ]
    }
    for word in ("a", "bc", "def", "gh")
]
"""Conversations of which the template REASONING makes three documents each: it leaves earlier reasoning out."""
REASONING = (TEMPLATES / "qwen3.jinja").read_text()
END = 2
"""The id of <|im_end|>."""

Weights = dict[str, Tensor]


def weights_of(trainer: BaseTrainer) -> Weights:
    model: Any = trainer.model
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def trained(trainer: SFTTrainer, **arguments: Any) -> Weights:
    trainer.train(**arguments)
    return weights_of(trainer)


def largest_difference(first: Weights, second: Weights) -> float:
    assert first.keys() == second.keys()
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def token_losses(model: Any, dataset: Any, smoothing: float = 0.0) -> list[Tensor]:
    """The losses of each row's supervised tokens, row by row, by PyTorch."""
    found = []
    model.eval()
    for row in dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses = cross_entropy(logits, labels[1:], reduction="none", label_smoothing=smoothing)
        found.append(losses[labels[1:] != -100])
    return found


def maker(
    trainer: type[T],
    rows: list[dict[str, Any]],
    place: Path,
    tokenizer: Any,
    model_of: Callable[..., Any],
    **usual: Any,
) -> Callable[..., T]:
    """A function that makes a trainer of preferences on `rows`; what that does not know is a setting, and `usual`
    settings may be set anew. It writes into a folder in `place`."""

    def make(name: str = "llama", folder: str = "run", **given: Any) -> T:
        own = {"model", "ref_model", "peft_config", "train_dataset", "eval_dataset"}
        arguments = {key: given.pop(key) for key in [*given] if key in own}
        if "model" not in arguments:
            arguments["model"] = model_of(name)
        settings: dict[str, Any] = {
            "output_dir": str(place / folder),
            "report_to": "none",
            "use_cpu": True,
            "precision": "fp32",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "self_test": "off",
        }
        arguments = {"train_dataset": rows, "processing_class": tokenizer} | arguments
        return trainer(**arguments, args=trainer.config(**settings | usual | given))

    return make


def watched(trainer: SFTTrainer) -> list[list[tuple[int, ...]]]:
    """The token ids of every document, by micro-batch, that the trainer will collate from now on."""
    found: list[list[tuple[int, ...]]] = []
    collate: Any = trainer.data_collator

    def noting(rows: list[dict[str, Any]]) -> Any:
        found.append([tuple(row["input_ids"]) for row in rows])
        return collate(rows)

    trainer.data_collator = noting
    return found
