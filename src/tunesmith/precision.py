"""Which number format to compute in, measured on the device that will do it.

A default can't know: a product in bfloat16 takes nine times as long as in fp32 on a Zen 2 processor, half as long on
a Zen 4; a T4 only emulates it, and is fast in fp16. A short timed matrix product tells.
"""

import json
import re
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

PrecisionName = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[PrecisionName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GAIN = 1.2
"""A shorter format must be this much faster: it costs accuracy."""
NEARLY = 0.8
"""bfloat16 is preferred over fp16 from this share of its speed on: its range needs no loss scaling."""
ROUNDS = 8
SIZES = {"cpu": 768, "cuda": 4096, "mps": 2048}


def decide(speeds: Mapping[PrecisionName, float], device_type: str) -> PrecisionName:
    """The format for these GFLOP/s. fp16 needs a gradient scaler, which only CUDA has, so it is chosen only there."""
    half: PrecisionName = "bf16"
    bf16, fp16 = speeds.get("bf16", 0.0), speeds.get("fp16", 0.0)
    if device_type == "cuda" and bf16 < NEARLY * fp16:
        half = "fp16"
    return half if speeds.get(half, 0.0) >= GAIN * speeds["fp32"] else "fp32"


@cache
def measure(device_type: str) -> dict[PrecisionName, float]:
    """GFLOP/s of a square matrix product in each format on the device; 0 where it has none. About half a second.

    The formats take turns, so that another program's load meets all of them, and the best round of each counts.
    """
    device, size = torch.device(device_type), SIZES.get(device_type, 1024)
    seconds: dict[PrecisionName, float] = {}
    for _ in range(ROUNDS):
        for name, dtype in DTYPES.items():
            taken = _seconds(device, dtype, size)
            if taken is not None:
                seconds[name] = min(taken, seconds.get(name, taken))
    return {name: 2 * size**3 / seconds[name] / 1e9 if name in seconds else 0.0 for name in DTYPES}


def describe(choice: PrecisionName, speeds: Mapping[PrecisionName, float], device_type: str) -> str:
    figures = ", ".join(f"{name} {speeds[name]:,.0f}" for name in get_args(PrecisionName) if speeds.get(name))
    return f"precision {choice}: matrix products on this {device_type} in GFLOP/s: {figures}"


def recorded(output: str | None, resume: Any) -> tuple[PrecisionName, Path] | None:
    """The precision that a run was trained in so far, and the checkpoint that says so: the folder `resume`, or if that
    is True the newest in `output` with a manifest. A run that goes on must not measure again, and choose another."""
    if not resume:
        return None
    folders = [Path(resume)] if isinstance(resume, str) else list(Path(output or ".").glob("checkpoint-*"))
    steps = {folder: re.search(r"checkpoint-(\d+)$", folder.name) for folder in folders}
    for folder in sorted(folders, key=lambda item: int(found[1]) if (found := steps[item]) else -1, reverse=True):
        try:
            name = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["precision"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if name in get_args(PrecisionName):
            return name, folder
    return None


def _seconds(device: torch.device, dtype: torch.dtype, size: int) -> float | None:
    """The time of one product, None where the device has none in this format."""
    if dtype == torch.float16 and device.type == "cpu":
        return None  # never chosen there, and slow enough to matter
    try:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        _product(a, b)  # the first one also loads and tunes libraries
        started = time.perf_counter()
        _product(a, b)
    except (RuntimeError, TypeError):
        return None
    return time.perf_counter() - started


def _product(a: torch.Tensor, b: torch.Tensor) -> None:
    _ = a @ b
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
