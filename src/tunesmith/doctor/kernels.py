"""What `tunesmith doctor` tries on the device: the libraries that are there for speed or to save memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from tunesmith.doctor.finding import Finding
from tunesmith.doctor.installed import installed_version

BITSANDBYTES = "bitsandbytes>=0.46.1,<1"


def bitsandbytes() -> Iterator[Finding]:
    """Whether models can be had in 8 and 4 bits: a small product in each is compared with the plain one."""
    name = "bitsandbytes"
    refused = "`quantize` and 8-bit optimizers don't work; everything else does."
    if find_spec(name) is None:
        install = f"pip install '{BITSANDBYTES}'"
        yield Finding(name=name, mark="note", found="not installed", means=refused, mend=install)
        return
    installed = installed_version(name)
    found, mend = _broken(installed)
    if found:
        yield Finding(name=name, mark="note", found=f"{installed}; {found}", means=refused, mend=mend)
        return
    yield Finding(
        name=name,
        mark="ok",
        found=f"{installed}, tried with a small product",
        means="`quantize` can load models in 8 and in 4 bits.",
    )


def _broken(installed: str) -> tuple[str, str]:
    """What is wrong with the `bitsandbytes` that is there, and how to mend it; nothing where it works."""
    from packaging.requirements import Requirement

    from tunesmith.errors import TunesmithError
    from tunesmith.model.devices import here
    from tunesmith.model.quantize import problem, refuse_missing

    wanted, device = Requirement(BITSANDBYTES).specifier, here().type
    if not wanted.contains(installed, prereleases=True):
        return f"{wanted} is needed", f"pip install '{BITSANDBYTES}'"
    with _heard("bitsandbytes"):  # it logs a page where its library does not load, and the product says the same
        try:
            refuse_missing("8-bit and 4-bit models", device)
        except TunesmithError as error:
            return str(error), "leave `quantize` out, or train on one of these devices"
        except Exception as error:  # of whatever it loads
            found = f"can't be imported: {_first_line(error)}"
        else:
            found = problem(device)
    return found, f"pip install --force-reinstall --no-deps '{BITSANDBYTES}'; python -m bitsandbytes says more"


def flash_attention() -> Iterator[Finding]:
    """Whether attention over documents takes one kernel, tried on a small example as training would."""
    import torch

    if not torch.cuda.is_available():
        version = installed_version("flash-attn")
        yield Finding(
            name="FlashAttention",
            mark="ok",
            found=f"flash-attn {version}" if version else "not installed",
            means="It is for NVIDIA GPUs; without one nothing is lost.",
        )
        return
    from tunesmith.model.attention_cuda import DEVICE, Call, pick

    q_NTH = torch.zeros(1, 2, 8, 64, device=DEVICE, dtype=torch.bfloat16)
    with _heard("tunesmith.model.attention_cuda") as warnings:  # why a kernel that is there is not taken
        kernel = pick(q_NTH, q_NTH, Call(scale=1.0))
    if kernel is not None:
        yield Finding(
            name="FlashAttention",
            mark="ok",
            found=f"torch {torch.__version__}; attention takes {kernel.name}",
            means="All documents of a batch take one kernel.",
        )
        return
    supported = torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)
    yield Finding(
        name="FlashAttention",
        mark="note",
        found="; ".join([f"torch {torch.__version__} has no kernel for this GPU", *warnings]),
        means="Attention goes document by document, which is slower with many short ones.",
        mend="pip install --upgrade torch, which brings the kernel"
        if supported
        else "nothing on this GPU: the kernels are for NVIDIA's from Ampere on (A10, RTX 30, L4, A100, H100)",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _heard(name: str) -> Iterator[list[str]]:
    """What the logger `name` and those below it warn of meanwhile, in place of printing it."""
    said: list[str] = []
    logger = logging.getLogger(name)
    handler = _Keeping(said)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class _Keeping(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())
