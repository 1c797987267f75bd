"""Attention in blocks against PyTorch's: values and gradients, whatever the lengths, the groups and the format."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.models import flat, gradient_error, gradients, supervised, tiny, token_rows
from tunesmith.model import attention_cpu as blockwise
from tunesmith.model import ways
from tunesmith.model.attention import _causal
from tunesmith.train.setup import ready_for_batches

SCALE = 0.3


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a CPU where oneDNN is faster, with blocks of 8 queries."""
    monkeypatch.setattr("tunesmith.model.ways._forced", True)
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    monkeypatch.setattr(blockwise, "SHORTEST", dict.fromkeys(blockwise.SHORTEST, 4))
    blockwise._later.cache_clear()
    yield
    blockwise._later.cache_clear()


def inputs(queries: int, keys: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value as a model has them, views of (1, T, heads, size), and a gradient for the output."""
    torch.manual_seed(queries)
    shapes = [(queries, heads * groups), (keys, heads), (keys, heads), (queries, heads * groups)]
    return [torch.randn(1, length, count, 16).to(dtype).transpose(1, 2) for length, count in shapes]


def outcome(attend: Any, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = _causal(q.shape[2], k.shape[2], None, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)


def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return blockwise.attend(q, k, v, SCALE)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("queries", "before"), [(4, 0), (8, 0), (9, 0), (29, 0), (5, 3), (12, 21)])
def test_values_and_gradients_are_those_of_pytorch(queries: int, before: int, groups: int) -> None:
    given = inputs(queries, before + queries, 2, groups, torch.float64)
    expected = outcome(plain, *given)
    found = outcome(in_blocks, *(x.float() for x in given))
    assert len(found) == len(expected) == 4
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scale", [0.25, 96**-0.5], ids=["a power of two", "another"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("queries", "before"), [(4, 0), (29, 0), (5, 3), (12, 21)])
def test_gradients_in_bfloat16_are_as_exact_as_those_of_pytorch(
    queries: int, before: int, groups: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores lie far apart: rounded to bfloat16 before the softmax, as in `eager`, they give errors of some percent."""
    monkeypatch.setitem(globals(), "SCALE", scale)
    q, k, v, grad = inputs(queries, before + queries, 2, groups, torch.bfloat16)
    given = [q * 3, k * 3, v, grad]
    exact = outcome(plain, *(x.double() for x in given))
    found, theirs = outcome(in_blocks, *given), outcome(plain, *given)
    assert [x.dtype for x in found] == [torch.bfloat16] * 4
    torch.testing.assert_close(found[0], theirs[0])
    for mine, other, wanted in zip(found[1:], theirs[1:], exact[1:], strict=True):
        assert error(mine, wanted) < 1.5 * error(other, wanted) + 2**-8


def test_keys_that_a_query_does_not_see_may_have_any_score_in_bfloat16() -> None:
    """Their exponential is no number of any format, and has to leave no trace."""
    q, k, v, grad = inputs(20, 20, 1, 1, torch.bfloat16)
    k[:, :, -1] = 300 * q[:, :, 0]
    given = [q, k, v, grad]
    found, exact = outcome(in_blocks, *given), outcome(plain, *(x.double() for x in given))
    for mine, wanted in zip(found, exact, strict=True):
        assert error(mine, wanted) < 2e-2


def test_scores_far_apart_lose_nothing() -> None:
    q, k, v, grad = inputs(20, 20, 1, 1, torch.float64)
    given = [q * 100, k, v, grad]
    found = outcome(in_blocks, *(x.float() for x in given))
    expected = outcome(plain, *given)
    assert all(map(math.isfinite, (x.abs().max().item() for x in found)))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_short_rows_and_other_libraries_keep_pytorchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = inputs(4, 4, 1, 1, torch.float32)
    longer = inputs(8, 8, 1, 1, torch.float32)
    assert blockwise.pays(q, k, v)
    assert blockwise.pays(q[:, :, :2], *longer[1:3])  # they continue others
    assert not blockwise.pays(q[:, :, :3], k, v)
    assert not blockwise.pays(q, k, v[..., :8])  # values of another size
    assert not blockwise.pays(q.double(), k.double(), v.double())
    half = [x.bfloat16() for x in (q, k, v)]
    assert not blockwise.pays(*half)  # no backward
    assert not blockwise.pays(q, k, half[2])
    assert blockwise.pays(half[0].requires_grad_(), *half[1:])
    assert not blockwise.pays(q.to("meta"), k, v)
    with FakeTensorMode() as fakes:  # as a plan of memory does
        assert not blockwise.pays(*map(fakes.from_tensor, (q, k, v)))
    monkeypatch.setattr("tunesmith.model.ways._forced", False)
    assert not blockwise.pays(q, k, v)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "mistral"])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "sharing a beginning"])
def test_a_model_learns_the_same(name: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = token_rows(3, 9, 30, 14)
    if shared:
        beginning = list(range(40, 58))
        rows = [{"input_ids": beginning + row["input_ids"]} for row in rows]
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    calls: list[torch.Size] = []
    attend = blockwise.attend

    def record(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        calls.append(q.shape)
        return attend(q, k, v, scale)

    monkeypatch.setattr(blockwise, "attend", record)
    for shortest in (4, 1000):
        monkeypatch.setattr(blockwise, "SHORTEST", dict.fromkeys(blockwise.SHORTEST, shortest))
        model: Any = tiny(name).train()
        ready_for_batches(model, flat=True)
        batch = flat(rows, share_prefix=shared)
        assert (batch.parents is not None) == shared
        result = supervised(model, batch)
        result.loss.backward()
        results.append((result.nll, gradients(model)))
    # Gemma 2 caps its scores, and Mistral's window is shorter than most of the documents.
    assert bool(calls) == (name != "gemma2")
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert gradient_error(results[0][1], results[1][1]) < 1e-5


def test_a_length_that_is_met_late_goes_the_way_of_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ways.state()
    monkeypatch.setattr(ways, "_forced", None)
    monkeypatch.setattr(ways, "_tried", lambda *_: True)
    ways.restore({})
    ways.begin_anew()
    assert blockwise.pays(*inputs(9, 9, 1, 1, torch.float32)[:3])
    ways.settle()
    monkeypatch.setattr(ways, "_tried", lambda *_: pytest.fail("tried after the first step"))
    assert blockwise.pays(*inputs(40, 40, 1, 1, torch.float32)[:3])
    assert not blockwise.pays(*inputs(40, 50, 1, 1, torch.float32)[:3])  # continues another: nothing like it was tried
    ways.restore(kept)


def test_weights_in_fp32_and_a_run_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings make queries and keys fp32 there; values stay bfloat16. To PyTorch's own all is bfloat16."""
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    formats: list[torch.dtype] = []
    attend = blockwise.attend

    def record(*given: Any) -> Tensor:
        formats.extend(x.dtype for x in given[:3])
        return attend(*given)

    monkeypatch.setattr(blockwise, "attend", record)
    for shortest, half in ((4, True), (1000, True), (1000, False)):
        monkeypatch.setattr(blockwise, "SHORTEST", dict.fromkeys(blockwise.SHORTEST, shortest))
        model: Any = tiny("llama").train()
        ready_for_batches(model, flat=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            result = supervised(model, flat(token_rows(3, 9, 30, 14)))
        result.loss.backward()
        results.append((result.nll, gradients(model)))
    assert set(formats) == {torch.bfloat16}
    assert torch.equal(results[0][0], results[1][0])  # the forward is PyTorch's
    mine, theirs = (gradient_error(results[i][1], results[2][1]) for i in (0, 1))
    assert theirs / 2 < mine < 1.5 * theirs


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_trial_within_a_layer_that_is_checkpointed_changes_nothing(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is computed again in the backward, without the trial, and must save as many tensors as before."""
    kept, results, tried = ways.state(), list[tuple[Tensor, dict[str, Tensor]]](), list[object]()
    trial = ways.attempt

    def record(way: Any, *inputs: Any) -> Any:
        tried.append(way)
        return trial(way, *inputs)

    monkeypatch.setattr(ways, "attempt", record)
    for competes in (False, True):
        monkeypatch.setattr(ways, "_forced", None if competes else False)
        ways.restore({})
        ways.begin_anew()
        model: Any = tiny("llama").train()
        ready_for_batches(model, flat=True)
        if competes:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        result = supervised(model, flat(token_rows(30, 14)))
        result.loss.backward()
        results.append((result.nll, gradients(model)))
    ways.restore(kept)
    assert tried
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    assert gradient_error(results[1][1], results[0][1]) < 1e-5
