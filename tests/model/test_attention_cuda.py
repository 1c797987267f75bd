"""Attention over documents in one kernel; the kernels are stand-ins."""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model.kernels import Kernels, by_document
from tunesmith.model import attention_cuda as varlen
from tunesmith.model.attention import attend_documents, document_map
from tunesmith.model.attention_cuda import Backend, Call, attend, pick, plain

LENGTHS = [7, 1, 12, 5]
HEAD = 16
BF16 = torch.bfloat16


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """No kernel is installed, and the CPU passes for an H100."""
    for module in ("flash_attn", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(varlen, "DEVICE", "cpu")
    capable(monkeypatch, 9, 0)
    varlen._kernel_for.cache_clear()
    yield Kernels(monkeypatch)
    varlen._kernel_for.cache_clear()


def capable(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))


def inputs(head: int = HEAD, dtype: torch.dtype = BF16, lengths: list[int] = LENGTHS) -> list[Tensor]:
    """`q` with four heads, `k` and `v` with two, in the layout that layers hand over: a transposed view."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, sum(lengths), heads, head, generator=generator).to(dtype).requires_grad_().transpose(1, 2)
        for heads in (4, 2, 2)
    ]


def name_of(**need: Any) -> str | None:
    q, _, v = inputs(need.pop("head", HEAD), need.pop("dtype", BF16))
    backend = pick(q, v, Call(scale=0.25, **need))
    return None if backend is None else backend.name


OWN, F2 = varlen.PYTORCH, varlen.FLASH_2
ONLY_F2: dict[str, Any] = {"dropout": 0.1}
"""A need that PyTorch's kernel does not meet."""


def installed(kernels: Kernels, name: str, **need: Any) -> Backend:
    """The kernel `name`, picked for `need` where it alone is installed."""
    if name == F2:
        kernels.flash2()
        need |= ONLY_F2
    else:
        kernels.torch()
    q, _, v = inputs()
    backend = pick(q, v, Call(scale=0.25, **need))
    assert backend is not None
    assert backend.name == name
    return backend


CALLS = [Call(scale=0.25), Call(scale=0.6), Call(scale=0.25, window=3), Call(scale=0.25, softcap=1.5)]


@pytest.mark.parametrize(
    ("kernel", "call"),
    [(OWN, call) for call in CALLS if call.softcap is None] + [(F2, call) for call in CALLS],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_plain_attention(kernels: Kernels, kernel: str, call: Call) -> None:
    backend = installed(kernels, kernel, window=call.window, softcap=call.softcap)
    q, k, v = inputs()
    output = attend(backend, q, k, v, document_map(LENGTHS), call)
    assert output.shape == (1, sum(LENGTHS), 4, HEAD)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = plain(exact[0], exact[1], exact[2], LENGTHS, call)
    towards = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(output, (q, k, v), towards.to(BF16))
    for mine, right in zip((output, *found), (expected, *torch.autograd.grad(expected, exact, towards)), strict=True):
        assert mine.dtype == BF16
        assert (mine.float() - right).abs().max() <= 2e-2 * right.abs().max()


def test_the_plain_computation_is_that_of_each_document_alone() -> None:
    q, k, v = inputs(dtype=torch.float32)
    for window in (None, 3):
        call = Call(scale=0.3, window=window)
        found = plain(q, k, v, LENGTHS, call)
        alone = [
            plain(one_q, one_k, one_v, [one_q.shape[2]], call)
            for one_q, one_k, one_v in zip(*(x.split(LENGTHS, dim=2) for x in (q, k, v)), strict=True)
        ]
        torch.testing.assert_close(found, torch.cat(alone, dim=1))


@pytest.mark.parametrize("kernel", [OWN, F2])
def test_the_kernel_gets_what_its_signature_says(kernels: Kernels, kernel: str) -> None:
    backend = installed(kernels, kernel, window=4)
    q, k, v = inputs()
    attend(backend, q, k, v, document_map(LENGTHS), Call(scale=0.25, window=4))
    found = kernels.calls[-1]
    longest = max(LENGTHS)
    if kernel == OWN:
        assert (found["max_q"], found["max_k"], found["scale"], found["enable_gqa"]) == (longest, longest, 0.25, True)
        cu = found["cu_seq_q"]
    else:
        assert (found["max_seqlen_q"], found["max_seqlen_k"], found["softmax_scale"]) == (longest, longest, 0.25)
        assert found["causal"] is True
        cu = found["cu_seqlens_q"]
    assert found["window_size"] == (3, 0)  # the three before a token, and itself
    assert cu.tolist() == [0, 7, 8, 20, 25]
    assert cu.dtype == torch.int32
    first = found["query" if kernel == OWN else "q"]
    assert first.shape == (25, 4, HEAD)
    assert first.data_ptr() == q.data_ptr()  # no copy of what layers hand over


def test_a_window_that_all_documents_fit_in_is_none(kernels: Kernels) -> None:
    """Plain causal kernels are faster, and PyTorch's knows causal attention by these numbers."""
    backend = installed(kernels, OWN, window=12)
    q, k, v = inputs()
    for window, expected in ((12, (-1, 0)), (11, (10, 0)), (None, (-1, 0))):
        attend(backend, q, k, v, document_map(LENGTHS), Call(scale=0.25, window=window))
        assert kernels.calls[-1]["window_size"] == expected


def test_dropout_reaches_the_kernel_that_has_it(kernels: Kernels) -> None:
    backend = installed(kernels, F2)
    q, k, v = inputs()
    attend(backend, q, k, v, document_map(LENGTHS), Call(scale=0.25, dropout=0.1))
    assert kernels.calls[-1]["package"] == "flash_attn"
    assert kernels.calls[-1]["dropout_p"] == 0.1


def test_deterministic_runs_ask_for_the_deterministic_backward(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = installed(kernels, F2)
    q, k, v = inputs()
    for wanted in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda wanted=wanted: wanted)
        attend(backend, q, k, v, document_map(LENGTHS), Call(scale=0.25))
        assert kernels.calls[-1]["deterministic"] is wanted


@pytest.mark.parametrize(
    ("capability", "need", "expected"),
    [
        ((8, 0), {}, OWN),
        ((8, 9), {}, OWN),
        ((9, 0), {}, OWN),
        ((10, 0), {}, OWN),
        ((7, 5), {}, None),
        ((9, 0), {"dtype": torch.float16}, OWN),
        ((9, 0), {"dtype": torch.float32}, None),
        ((9, 0), {"window": 4}, OWN),
        ((9, 0), {"softcap": 2.0}, F2),
        ((9, 0), {"dropout": 0.1}, F2),
        ((9, 0), {"sinks": torch.zeros(4)}, None),
        ((9, 0), {"head": 12}, F2),  # which pads heads to a multiple of 8
        ((9, 0), {"head": 256}, OWN),
        ((9, 0), {"head": 264}, None),
        ((8, 0), {"head": 224}, OWN),
        ((8, 6), {"head": 224}, None),
        ((8, 6), {"head": 256}, OWN),
        ((8, 6), {"head": 256, "dropout": 0.1}, None),
        ((12, 0), {"head": 200}, None),
    ],
    ids=str,
)
def test_each_capability_and_need_has_one_kernel(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    need: dict[str, Any],
    expected: str | None,
) -> None:
    capable(monkeypatch, *capability)
    kernels.torch()
    kernels.flash2()
    assert name_of(**need) == expected
    varlen._kernel_for.cache_clear()
    if expected is not None:
        package = {F2: "flash_attn", OWN: "torch.nn.attention.varlen"}[expected]
        monkeypatch.setitem(sys.modules, package, None)
        assert name_of(**need) is None


def test_nothing_is_picked_on_other_devices(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.torch()
    monkeypatch.setattr(varlen, "DEVICE", "cuda")
    assert name_of() is None


def test_nothing_is_picked_on_amd_gpus(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.torch()
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert name_of() is None


def test_nothing_is_picked_where_values_have_another_size_than_keys(kernels: Kernels) -> None:
    kernels.torch()
    q, _, v = inputs()
    assert pick(q, v[..., :8], Call(scale=0.25)) is None


def test_pytorchs_kernel_is_left_alone_where_pytorch_was_built_without_it(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.torch()
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert name_of() is None


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("flash_attn_func", print),  # FlashAttention 4 has FlashAttention 2's name
        ("flash_attn_varlen_func", lambda q, k, v, window_size: None),  # before 2.6: no softcap
    ],
)
def test_a_package_without_the_function_or_its_arguments_is_passed_over(
    kernels: Kernels, name: str, function: Callable[..., Any]
) -> None:
    kernels.add("flash_attn", name, function)
    assert name_of(**ONLY_F2) is None


def test_a_package_that_is_built_for_another_torch_is_passed_over_and_named(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(module: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c105Error")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert name_of(**ONLY_F2) is None
    assert "flash_attn is installed and can't be imported: undefined symbol" in caplog.text


WRONG: dict[str, Callable[..., Tensor]] = {
    "all documents as one": lambda q, k, v, cu, *rest: by_document(q, k, v, cu[[0, -1]], *rest),
    "another scale": lambda q, k, v, cu, scale, *rest: by_document(q, k, v, cu, scale * 2, *rest),
    "a key too many": lambda q, k, v, cu, scale, left, cap: by_document(q, k, v, cu, scale, left + 1, cap),
    "a key too few": lambda q, k, v, cu, scale, left, cap: by_document(q, k, v, cu, scale, left - 1, cap),
    "no softcap": lambda q, k, v, cu, scale, left, _cap: by_document(q, k, v, cu, scale, left, 0.0),
    "heads in another order": lambda q, k, v, *rest: by_document(q.flip(1), k, v, *rest),
    "not a number": lambda q, k, v, *rest: by_document(q, k, v, *rest) * float("nan"),
    "no gradient of the keys": lambda q, k, v, *rest: by_document(q, k.detach() + 0 * k, v, *rest),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_with_wrong_results_is_not_used(kernels: Kernels, caplog: pytest.LogCaptureFixture, name: str) -> None:
    kernels.flash2()
    kernels.compute = WRONG[name]
    need = {"softcap": 2.0} if name == "no softcap" else {"window": 4} if "a key" in name else {}
    assert name_of(head=64, **(ONLY_F2 | need)) is None
    assert "FlashAttention 2 is not used for attention: on a small example its outputs" in caplog.text


def test_a_kernel_that_fails_gives_way_to_attention_document_by_document(
    kernels: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image is available")

    kernels.torch()
    kernels.compute = fail
    assert name_of() is None
    assert f"{OWN} is not used for attention: it failed on a small example (CUDA error" in caplog.text


def test_a_kernel_is_tried_once_for_all_layers_and_without_touching_random_numbers(kernels: Kernels) -> None:
    kernels.torch()
    state = torch.get_rng_state()
    with torch.no_grad():
        assert [name_of() for _ in range(3)] == [OWN] * 3
    assert len(kernels.calls) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_under_autocast_the_kernel_gets_16_bit_floats(kernels: Kernels) -> None:
    kernels.torch()
    q, k, v = inputs(dtype=torch.float32)
    assert pick(q, v, Call(scale=0.25)) is None
    with torch.autocast("cpu", dtype=BF16):
        backend = pick(q, v, Call(scale=0.25))
        assert backend is not None
        output = attend(backend, q, k, v.to(BF16), document_map(LENGTHS), Call(scale=0.25))
    assert {kernels.calls[-1][name].dtype for name in ("query", "key", "value")} == {BF16}
    assert output.dtype == BF16
    output.float().sum().backward()


def test_the_map_is_copied_to_the_device_once_for_all_layers_and_forgotten_with_the_batch(kernels: Kernels) -> None:
    kernels.torch()
    q, k, v = inputs()
    backend = pick(q, v, Call(scale=0.25))
    assert backend is not None
    documents = document_map(LENGTHS)
    for _ in range(2):
        attend(backend, q, k, v, documents, Call(scale=0.25))
    assert kernels.calls[-1]["cu_seq_q"] is kernels.calls[-2]["cu_seq_q"]
    attend(backend, q, k, v, document_map([25]), Call(scale=0.25))
    assert kernels.calls[-1]["cu_seq_q"].tolist() == [0, 25]
    kernels.calls.clear()
    del documents
    gc.collect()
    assert len(varlen._ON_DEVICE) == 0


def test_attention_over_documents_goes_through_the_kernel_where_there_is_one(kernels: Kernels) -> None:
    layer = nn.Module()
    q, k, v = inputs()
    expected = attend_documents(layer, q.float(), k.float(), v.float(), document_map(LENGTHS), scaling=0.25)
    assert not kernels.calls  # fp32 is not for them
    kernels.torch()
    found = attend_documents(layer, q, k, v, document_map(LENGTHS), scaling=0.25)
    assert kernels.calls
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
