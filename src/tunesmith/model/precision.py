"""Which number format to compute in, measured on the device that will do it.

A default can't know: a product in bfloat16 takes nine times as long as in fp32 on a Zen 2 processor, half as long on
a Zen 4; a T4 only emulates it, and is fast in fp16. A short timed matrix product tells.
"""

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from tunesmith.errors import TunesmithError
from tunesmith.runs.checkpoints import Manifest, checkpoints

if TYPE_CHECKING:
    from tunesmith.settings.config import SFTConfig

PrecisionName = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[PrecisionName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GAIN = 1.2
"""A shorter format must be this much faster: it costs accuracy."""
NEARLY = 0.8
"""bfloat16 is preferred over fp16 from this share of its speed on: its range needs no loss scaling."""
ROUNDS = 8
SIZES = {"cpu": 768, "cuda": 4096, "mps": 2048}


def settle_precision(config: "SFTConfig") -> str:
    """Settle `precision: auto` for a run that starts, and return the line to print about it; empty where the config
    named a precision itself. A second call changes nothing and returns the same line.

    A run that is resumed goes on in the precision of its checkpoint; any other one takes what is fastest here.
    """
    if config.precision == "auto":
        checkpoint = _recorded(config)
        if checkpoint is not None:
            choice, folder = checkpoint
            note = f"precision {choice}: as in {folder}, from which the run goes on"
        else:
            speeds = measure(config.device.type)
            choice = decide(speeds, config.device.type)
            note = describe(choice, speeds, config.device.type)
        if config.world_size > 1:  # each has measured, and all take what the first found
            agreed: list[Any] = [choice, note]
            torch.distributed.broadcast_object_list(agreed, src=0)
            choice, note = agreed
        config.precision, config.precision_note = choice, note
        config.__post_init__()  # `transformers` derives other settings from the flags of a precision
    return config.precision_note


def _recorded(config: "SFTConfig") -> tuple[PrecisionName, Path] | None:
    """The precision of the checkpoint that the run goes on from, and its folder; None where there is none to follow."""
    resume: str | bool | None = config.resume_from_checkpoint
    if not resume:
        return None
    for folder in [Path(resume)] if isinstance(resume, str) else reversed(checkpoints(Path(str(config.output_dir)))):
        try:
            name = Manifest.read(folder).precision
        except TunesmithError:  # written by another tool, or damaged: resuming says so
            continue
        for known in get_args(PrecisionName):
            if name == known:
                return known, folder
    return None


def compute_dtype(config: "SFTConfig") -> torch.dtype:
    """What a run computes in, and its frozen weights are kept in. The precision must be settled."""
    assert config.precision != "auto"
    return DTYPES[config.precision]


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


def _seconds(device: torch.device, dtype: torch.dtype, size: int) -> float | None:
    """The time of one product, None where the device has none in this format."""
    if dtype == torch.float16 and device.type == "cpu":
        return None  # never chosen there, and slow enough to matter
    try:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(2):  # the first product also loads and tunes libraries
            started = time.perf_counter()
            _ = a @ b
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
    except (RuntimeError, TypeError):
        return None
    return time.perf_counter() - started
