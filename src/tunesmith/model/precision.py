"""Which number format to compute in, measured on the device that will do it.

A default can't know: a product in bfloat16 takes nine times as long as in fp32 on a Zen 2 processor, half as long on
a Zen 4; a T4 only emulates it, and is fast in fp16. A short timed matrix product tells.
"""

import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from tunesmith.errors import TunesmithError
from tunesmith.model.threads import share_cores
from tunesmith.runs.checkpoints import Manifest, checkpoints

if TYPE_CHECKING:
    from tunesmith.settings.config import Config

PrecisionName = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[PrecisionName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GAIN = 1.2
"""A shorter format must be this much faster: it costs accuracy."""
NEARLY = 0.8
"""bfloat16 is preferred over fp16 from this share of its speed on: its range needs no loss scaling."""
HOPELESS = 8
"""A format that is so many times slower than another needs no closer look."""
ROUNDS = 6
SECONDS = 0.5
"""Of all products that are timed, about."""
SIZES = {"cpu": 768, "cuda": 4096, "mps": 2048}


def settle_precision(config: "Config") -> str:
    """Settle `precision: auto` for a run that starts, and return the line to print about it; empty where the config
    named a precision itself. A second call changes nothing and returns the same line.

    A run that is resumed goes on in the precision of its checkpoint; any other one takes what is fastest here.
    """
    share_cores()
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


def _recorded(config: "Config") -> tuple[PrecisionName, Path] | None:
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


def compute_dtype(config: "Config") -> torch.dtype:
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
    """GFLOP/s of a square matrix product in each format on the device; 0 where it has none. Half a second at most, but
    for a single product: a format that is hopelessly slow on small matrices is not tried on large ones, and no size
    is that would take too long.

    The formats take turns, so that another program's load meets all of them, and the best round of each counts. On a
    CPU, that is the speed of one thread: several wait for the one that another program keeps off its core.
    """
    threads = torch.get_num_threads()
    if device_type == "cpu":
        torch.set_num_threads(1)
    try:
        return _measured(device_type)
    finally:
        torch.set_num_threads(threads)


def _measured(device_type: str) -> dict[PrecisionName, float]:
    device, largest = torch.device(device_type), SIZES.get(device_type, 1024)
    formats = [name for name in DTYPES if not (name == "fp16" and device_type == "cpu")]  # never chosen there, and slow
    speeds: dict[PrecisionName, float] = dict.fromkeys(DTYPES, 0.0)
    left = SECONDS
    for size in (largest // 8, largest // 4, largest // 2, largest):
        flop = 2e-9 * size**3
        if any(flop / speeds[name] > left / 2 for name in formats if speeds[name]):
            break
        seconds: dict[PrecisionName, float] = {}
        for _ in range(ROUNDS if size == largest else 2):
            for name in [name for name in formats if left > 0]:
                started = time.perf_counter()
                taken = _seconds(device, DTYPES[name], size)
                left -= max(sum(taken), time.perf_counter() - started)
                if taken:
                    seconds[name] = min(*taken, seconds.get(name, taken[-1]))
        speeds |= {name: flop / taken for name, taken in seconds.items()}
        formats = [name for name in seconds if HOPELESS * speeds[name] > max(speeds.values())]
    return speeds


def describe(choice: PrecisionName, speeds: Mapping[PrecisionName, float], device_type: str) -> str:
    known = {name: speeds[name] for name in get_args(PrecisionName) if speeds.get(name)}
    figures = ", ".join(
        f"{name} {speed:,.0f}" if speed >= 10 else f"{name} {speed:.2g}" for name, speed in known.items()
    )
    where = "a core of this cpu" if device_type == "cpu" else f"this {device_type}"
    return f"precision {choice}: matrix products on {where} in GFLOP/s: {figures}"


def _seconds(device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, ...]:
    """The times of two products, of which the first also loads and tunes libraries; empty where the device has none in
    this format."""
    # Elsewhere, the clock of a thread ticks more slowly than a product takes.
    clock = time.thread_time if device.type == "cpu" and sys.platform == "linux" else time.perf_counter
    times = []
    try:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(2):
            started = clock()
            _ = a @ b
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(clock() - started)
    except (RuntimeError, TypeError):
        return ()
    return tuple(times)
