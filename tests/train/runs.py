"""Rows to train on, and what is measured of a run."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.data.styles import TEMPLATES
from tunesmith import SFTTrainer
from tunesmith.train.trainer import BaseTrainer

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


def watched(trainer: SFTTrainer) -> list[list[tuple[int, ...]]]:
    """The token ids of every document, by micro-batch, that the trainer will collate from now on."""
    found: list[list[tuple[int, ...]]] = []
    collate: Any = trainer.data_collator

    def noting(rows: list[dict[str, Any]]) -> Any:
        found.append([tuple(row["input_ids"]) for row in rows])
        return collate(rows)

    trainer.data_collator = noting
    return found
