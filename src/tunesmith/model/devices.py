"""What the devices have that a run may be planned for: memory, and what their makers state of their speed."""

import os
from dataclasses import dataclass

import torch

from tunesmith.errors import TunesmithError, nearest
from tunesmith.model.precision import PrecisionName

CPU = "cpu"
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What is stated of a device. `flops`: floating point operations a second in 16-bit matrix products with fp32 sums,
    without sparsity. `link` and `network`: bytes a second that one GPU can send to another of its machine, and to
    another machine while all GPUs of its machine send; `together`: how many GPUs a machine has."""

    flops: float
    link: float
    network: float
    together: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """`memory` is what programs can have of it, in bytes; `precision` what a run with `precision: auto` is expected to
    settle on there; `one_kernel` whether attention takes one kernel for all documents in that precision; `speed` is
    None where nobody states one."""

    name: str
    memory: int
    precision: PrecisionName
    one_kernel: bool
    speed: Speed | None = None

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU


def _gpu(name: str, gib: float, speed: Speed | None = None, *, ampere: bool = True) -> Device:
    precision: PrecisionName = "bf16" if ampere else "fp16"
    return Device(name=name, memory=int(gib * GIB), precision=precision, one_kernel=ampere, speed=speed)


def _stated(tera: float, link: float, network: float, together: int = 8) -> Speed:
    """From teraflops, and bytes in 1e9 a second."""
    return Speed(flops=tera * 1e12, link=link * 1e9, network=network * 1e9, together=together)


# Memory is what `torch.cuda.get_device_properties(0).total_memory` says, less than what the name of the card says.
# Speed is what NVIDIA's data sheets of these products state, of the 3090 and 4090 the white papers of the GA102 and Ada
# architectures: dense, with fp32 sums. Links are half of what is stated for both directions: NVLink of the SXM modules,
# PCI Express of all others. The network is that of DGX A100 (8 x 200 Gb/s), H100, H200 and B200 (8 x 400), of the AWS
# instances g4dn.12xlarge (4 T4, 50 Gb/s), g5.48xlarge and g6.48xlarge (8 A10G or L4, 100), and 10 Gb/s for a
# desktop of two cards.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("t4", 14.6, _stated(65, 16, 50 / 8 / 4, 4), ampere=False),
        _gpu("a10g", 22.0, _stated(70, 32, 100 / 8 / 8)),
        _gpu("l4", 22.0, _stated(121, 32, 100 / 8 / 8)),
        _gpu("3090", 23.6, _stated(71, 32, 10 / 8 / 2, 2)),
        _gpu("4090", 23.6, _stated(165.2, 32, 10 / 8 / 2, 2)),
        _gpu("a100", 39.4, _stated(312, 300, 25)),
        _gpu("a100-80gb", 79.1, _stated(312, 300, 25)),
        _gpu("h100", 79.1, _stated(989.4, 450, 50)),
        _gpu("h200", 139.8, _stated(989.4, 450, 50)),
        _gpu("b200", 178.3, _stated(2250, 900, 50)),
    )
}


def device(name: str | None, precision: PrecisionName) -> Device:
    """The device `name`, or None for the one that a run here would take. `precision` is what this machine's CPU would
    compute in. Raises TunesmithError for an unknown name."""
    if name is None:
        return _this_gpu() or device(CPU, precision)
    key = name.lower().replace("rtx", "").strip(" -_")
    if key == CPU:
        return Device(name=CPU, memory=available(), precision=precision, one_kernel=False)
    if key not in GPUS:
        raise TunesmithError(f"--gpu {name}: choose {' | '.join([*GPUS, CPU])}{nearest(key, [*GPUS, CPU])}")
    return GPUS[key]


def _this_gpu() -> Device | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    ampere = torch.cuda.get_device_capability(0) >= (8, 0)
    return _gpu(properties.name, properties.total_memory / GIB, ampere=ampere)


def here() -> torch.device:
    """What a run here computes on. A torch that is built for CUDA may name it where there is no GPU, unless asked
    whether there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device(CPU)


def available() -> int:
    """Bytes of main memory that a new program can have without swapping, on this machine and in this container."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # all there is: macOS does not say what is free
    return min([free, *_container()])


def _container() -> list[int]:
    """What a Linux control group leaves."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as most:
            limit = int(most.read())
        with (
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
            open("/sys/fs/cgroup/memory.stat") as stat,
        ):
            cached = next(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
            return [max(0, limit - int(used.read()) + cached)]
    except (OSError, ValueError, StopIteration):  # no control group, or one without a limit ("max")
        return []
