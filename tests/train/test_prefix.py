"""Sharing prefixes changes nothing but the time: the same loss and gradients on every architecture."""

from typing import Any

import pytest
import torch

from tests.models import FLAT, flat, gradient_error, gradients, supervised, tiny, token_rows
from tunesmith.model.attention import use_documents
from tunesmith.model.head import answer_objectives

PREFIX = token_rows(7, seed=5)[0]["input_ids"]
OTHER = token_rows(5, seed=6)[0]["input_ids"]


def rows(train_on_prefix: bool) -> list[dict[str, Any]]:
    made = []
    for front, row in zip((PREFIX, OTHER, PREFIX, PREFIX, OTHER), token_rows(4, 6, 3, 1, 2, seed=7), strict=True):
        labels = [*(front if train_on_prefix else [-100] * len(front)), *row["input_ids"]]
        made.append({"input_ids": [*front, *row["input_ids"]], "labels": labels})
    weights = [0.5 + i for i in range(len(made[0]["labels"]))]
    made[0]["weights"] = weights
    return [*made, *token_rows(5, seed=8)]


@pytest.mark.parametrize("train_on_prefix", [True, False], ids=["all", "completion"])
@pytest.mark.parametrize("name", FLAT)
def test_loss_and_gradients_are_those_without_sharing(name: str, train_on_prefix: bool) -> None:
    model = tiny(name)  # some have windows shorter than the prefix
    answer_objectives(model)
    use_documents(model)
    outcomes = []
    for share in (False, True):
        batch = flat(rows(train_on_prefix), share_prefix=share)
        assert (batch.parents is not None) is share
        result = supervised(model, batch)
        result.loss.backward()
        outcomes.append((result, gradients(model)))
    (apart, expected), (together, found) = outcomes
    torch.testing.assert_close(together.loss, apart.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.nll, apart.nll, rtol=1e-4, atol=1e-5)
    assert gradient_error(found, expected) < 1e-4
