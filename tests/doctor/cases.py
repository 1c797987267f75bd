"""Machines for `tunesmith doctor` to look at: each case fakes one condition that a check tells apart."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from tests.model.kernels import Kernels, by_document
from tunesmith.doctor import checks
from tunesmith.doctor.checks import Check, Finding, examined
from tunesmith.model import attention_cuda as varlen
from tunesmith.model import quantize

Patch = pytest.MonkeyPatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """`marks` are those of what `check` finds after `fake`."""

    check: Check
    marks: Sequence[str]
    fake: Callable[[Patch], object] = lambda patch: None


def gpu(patch: Patch, major: int = 8, minor: int = 6, built: Sequence[str] = ("sm_80",)) -> None:
    """A GPU for torch to tell of. Tensors for it are made on the CPU, which passes for it in attention, too."""
    properties = SimpleNamespace(name="NVIDIA A10G", major=major, minor=minor)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))
    patch.setattr(torch.cuda, "mem_get_info", lambda _: (20_000_000_000, 23_600_000_000))
    patch.setattr(torch.cuda, "get_arch_list", lambda: list(built))
    patch.setattr(varlen, "DEVICE", "cpu")
    for module in ("flash_attn", "torch.nn.attention.varlen"):
        patch.setitem(sys.modules, module, None)
    patch.setattr(varlen, "_kernel_for", varlen._kernel_for.__wrapped__)  # no case may see the answer of another one


def other_device(patch: Patch) -> None:
    patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    patch.setattr(torch.accelerator, "device_count", lambda: 1)


# What is installed


def old_python(patch: Patch) -> None:
    patch.setattr("tunesmith.doctor.checks.sys.version_info", (3, 10, 1))


def no_torch(patch: Patch) -> None:
    patch.setitem(sys.modules, "torch", None)


def unused_gpu(patch: Patch, cuda: str | None = None) -> None:
    patch.setattr("tunesmith.doctor.checks.shutil.which", lambda name: f"/bin/{name}")
    patch.setattr(torch.version, "cuda", cuda)


def odd_libraries(patch: Patch) -> None:
    wanted = ["numpy>=1", "torch<1", "no-such-package>=2", "neither-this; extra == 'dev'"]
    patch.setattr(checks, "requires", lambda _: wanted)


def no_package(patch: Patch) -> None:
    not_converted(patch)
    for module in (checks, quantize):
        patch.setattr(module, "find_spec", lambda _: None)


def damaged_demo(patch: Patch) -> None:
    not_converted(patch)
    patch.setattr("tunesmith.model.demo_model.GGUF_SIZE", 1)


def not_converted(patch: Patch) -> None:
    patch.setenv("TUNESMITH_HOME", str(Path(__file__)))  # where no folder is


# The machine


def cpuinfo(flags: str) -> Callable[[Patch], None]:
    def fake(patch: Patch) -> None:
        text = f"model name\t: Old Processor\nflags\t\t: {flags}\n"
        patch.setattr(checks, "CPUINFO", SimpleNamespace(read_text=lambda encoding: text))
        patch.setattr("tunesmith.doctor.checks.sys.platform", "linux")
        patch.setattr("tunesmith.doctor.checks.platform.machine", lambda: "x86_64")

    return fake


def speeds(fp32: float, bf16: float) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(
        "tunesmith.model.precision.measure", lambda _: {"fp32": fp32, "bf16": bf16, "fp16": 0.0}
    )


def memory(free: float) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr("tunesmith.model.devices.available", lambda: int(free))


def disk(free: float, *, writable: bool = True) -> Callable[[Patch], None]:
    def fake(patch: Patch) -> None:
        patch.setattr("tunesmith.doctor.checks.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
        patch.setattr("tunesmith.doctor.checks.os.access", lambda *_: writable)

    return fake


# Kernels


def old_bitsandbytes(patch: Patch) -> None:
    patch.setattr(checks, "installed_version", lambda _: "0.45.0")


def unimportable_bitsandbytes(patch: Patch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("libbitsandbytes.so: cannot open shared object file\nand a page more")

    patch.setattr(quantize, "refuse_missing", refuse)


def bitsandbytes_without_this_device(patch: Patch) -> None:
    import bitsandbytes

    patch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})


def broken_product(patch: Patch, layer: str = "Linear4bit") -> None:
    import bitsandbytes

    def forward(*_: Any) -> None:
        raise RuntimeError("Native code method attempted to call: lib.cquantize()")

    patch.setattr(getattr(bitsandbytes.nn, layer), "forward", forward)


def wrong_product(patch: Patch, layer: str = "Linear8bitLt") -> None:
    import bitsandbytes

    chosen = getattr(bitsandbytes.nn, layer)
    right = chosen.forward
    patch.setattr(chosen, "forward", lambda self, x: right(self, x.roll(1, -1)))


def gpu_with_kernel(patch: Patch) -> None:
    gpu(patch)
    Kernels(patch).torch()


def gpu_with_wrong_kernel(patch: Patch) -> None:
    gpu(patch)
    kernels = Kernels(patch)
    kernels.torch()
    kernels.compute = lambda *tensors: 2 * by_document(*tensors)


# The hub


def answers(*status: Any, token: str | None = "secret") -> Callable[[Patch], None]:
    def fake(patch: Patch) -> None:
        each = iter(status)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.get_token", lambda: token)
        patch.setattr(checks, "_answer", lambda *_: (next(each), {"name": "me"}))

    return fake


def offline(patch: Patch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def failing(error: Exception) -> Check:
    def check() -> Iterator[Finding]:
        raise error
        yield

    return lambda: examined({"one": check})


CASES: dict[str, Case] = {
    "python": Case(check=checks.python, marks=["ok"]),
    "old python": Case(check=checks.python, marks=["problem"], fake=old_python),
    "torch": Case(check=checks.torch_build, marks=["ok"]),
    "torch with a gpu": Case(check=checks.torch_build, marks=["ok"], fake=gpu),
    "torch on another device": Case(check=checks.torch_build, marks=["ok"], fake=other_device),
    "no torch": Case(check=checks.torch_build, marks=["problem"], fake=no_torch),
    "cpu build": Case(check=checks.torch_build, marks=["note"], fake=unused_gpu),
    "old driver": Case(check=checks.torch_build, marks=["note"], fake=lambda patch: unused_gpu(patch, "13.0")),
    "libraries": Case(check=checks.libraries, marks=["ok"]),
    "odd libraries": Case(check=checks.libraries, marks=["problem", "problem", "ok"], fake=odd_libraries),
    "demo": Case(check=checks.demo_model, marks=["ok"]),
    "no demo": Case(check=checks.demo_model, marks=["note"], fake=no_package),
    "damaged demo": Case(check=checks.demo_model, marks=["note"], fake=damaged_demo),
    "processor": Case(check=checks.processor, marks=["ok"], fake=cpuinfo("avx2 avx512f amx_bf16")),
    "old processor": Case(check=checks.processor, marks=["note"], fake=cpuinfo("sse4_2 avx")),
    "no gpu": Case(check=checks.accelerators, marks=["ok"]),
    "gpu": Case(check=checks.accelerators, marks=["ok"], fake=gpu),
    "gpu of another build": Case(
        check=checks.accelerators, marks=["problem"], fake=lambda patch: gpu(patch, built=["sm_90"])
    ),
    "other device": Case(check=checks.accelerators, marks=["ok"], fake=other_device),
    "fast bf16": Case(check=checks.precision, marks=["ok"], fake=speeds(100, 300)),
    "slow bf16": Case(check=checks.precision, marks=["ok"], fake=speeds(100, 20)),
    "no product": Case(check=checks.precision, marks=["problem"], fake=speeds(0, 0)),
    "memory": Case(check=checks.memory, marks=["ok"], fake=memory(6e9)),
    "little memory": Case(check=checks.memory, marks=["note"], fake=memory(3e9)),
    "too little memory": Case(check=checks.memory, marks=["problem"], fake=memory(5e8)),
    "disks": Case(check=checks.disks, marks=["ok", "ok"], fake=disk(1e11)),
    "little disk": Case(check=checks.disks, marks=["note", "note"], fake=disk(1e9)),
    "full disk": Case(check=checks.disks, marks=["problem", "note"], fake=disk(1e8)),
    "read-only disk": Case(check=checks.disks, marks=["problem", "note"], fake=disk(1e11, writable=False)),
    "bitsandbytes": Case(check=checks.bitsandbytes, marks=["ok"]),
    "no bitsandbytes": Case(check=checks.bitsandbytes, marks=["note"], fake=no_package),
    "old bitsandbytes": Case(check=checks.bitsandbytes, marks=["note"], fake=old_bitsandbytes),
    "unimportable bitsandbytes": Case(check=checks.bitsandbytes, marks=["note"], fake=unimportable_bitsandbytes),
    "bitsandbytes of other devices": Case(
        check=checks.bitsandbytes, marks=["note"], fake=bitsandbytes_without_this_device
    ),
    "failing product": Case(check=checks.bitsandbytes, marks=["note"], fake=broken_product),
    "wrong product": Case(check=checks.bitsandbytes, marks=["note"], fake=wrong_product),
    "attention without a gpu": Case(check=checks.flash_attention, marks=["ok"]),
    "attention in one kernel": Case(check=checks.flash_attention, marks=["ok"], fake=gpu_with_kernel),
    "attention without a kernel": Case(check=checks.flash_attention, marks=["note"], fake=gpu),
    "attention on an old gpu": Case(check=checks.flash_attention, marks=["note"], fake=lambda patch: gpu(patch, 7, 5)),
    "attention with a wrong kernel": Case(check=checks.flash_attention, marks=["note"], fake=gpu_with_wrong_kernel),
    "offline": Case(check=checks.hub, marks=["note"], fake=offline),
    "no network": Case(check=checks.hub, marks=["note"], fake=answers("ConnectError: no route")),
    "ill hub": Case(check=checks.hub, marks=["note"], fake=answers(503)),
    "token": Case(check=checks.hub, marks=["ok", "ok"], fake=answers(200, 200)),
    "no token": Case(check=checks.hub, marks=["ok", "note"], fake=answers(200, token=None)),
    "refused token": Case(check=checks.hub, marks=["ok", "note"], fake=answers(200, 401)),
    "unknown token": Case(check=checks.hub, marks=["ok", "note"], fake=answers(200, "ReadTimeout: slow")),
    "failing check": Case(check=failing(OSError("no such thing")), marks=["note"]),
    "check without a library": Case(check=failing(ImportError("no module torch")), marks=["note"]),
}
