"""A small product tells a `bitsandbytes` that computes from one that only imports."""

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.nn import modules
from torch import Tensor

from tunesmith.model.quantize import problem


def without_numbers(y: Tensor) -> Tensor:
    """The same output, with a gradient that is NaN."""
    same = y.clone()
    same.register_hook(lambda gradient: gradient * float("nan"))
    return same


def test_both_products_are_right_here_and_move_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert problem("cpu") == ""
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("layer", "bits"), [("Linear8bitLt", "8bit"), ("Linear4bit", "4bit")])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: 1.3 * y,
        lambda y: y.roll(1, 0),
        lambda y: y.detach() + 0 * y,
        without_numbers,
    ],
    ids=["a scale", "another row", "no gradient", "a gradient without numbers"],
)
def test_a_product_or_a_gradient_that_is_off_is_told(
    layer: str, bits: str, spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = getattr(modules, layer)
    right = chosen.forward
    monkeypatch.setattr(chosen, "forward", lambda self, x: spoil(right(self, x)))
    assert problem("cpu").startswith(f"a small {bits} product on cpu and its gradient are ")


def test_what_a_kernel_raises_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> None:
        raise RuntimeError("\nno kernel image\nand a page more")

    monkeypatch.setattr(modules.Linear8bitLt, "forward", forward)
    assert problem("cpu") == "a small 8bit product fails on cpu: no kernel image"
