"""What is refused before weights are shared out; how they train is in `tests/distributed/test_sharded.py`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tunesmith import SFTConfig
from tunesmith.errors import TunesmithError
from tunesmith.train.sharding import check_can_share_out, in_forward, is_shared_out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adafactor"}, r"shard is full, and optim is adafactor, whose state .* take adamw_torch \|"),
        ({"optim": "adamw_bnb_8bit"}, "optim is adamw_bnb_8bit"),
        ({"async_save": True}, "async_save is True"),
    ],
)
def test_what_can_not_be_shared_out_is_refused_by_name(
    settings: dict[str, Any], message: str, model_of: Callable[..., Any], config: Callable[..., SFTConfig]
) -> None:
    model = model_of("llama")
    check_can_share_out(model, config(shard="full"), (None, None))
    with pytest.raises(TunesmithError, match=message):
        check_can_share_out(model, config(shard="full", **settings), (None, None))


def test_an_optimizer_of_whole_weights_is_refused(
    model_of: Callable[..., Any], config: Callable[..., SFTConfig]
) -> None:
    model = model_of("llama")
    with pytest.raises(TunesmithError, match="an optimizer is given, which holds the weights before"):
        check_can_share_out(model, config(shard="full"), (torch.optim.SGD(model.parameters()), None))


def test_a_whole_model_needs_nothing_around_its_parts(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    assert not is_shared_out(model)
    assert in_forward(model, lambda: 3) == 3
