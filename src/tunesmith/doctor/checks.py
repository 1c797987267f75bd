"""What `tunesmith doctor` looks at: what is installed, the machine, libraries tried on the device, and the hub.

Each check stands alone and yields what it found, what follows from it for training, and how to fix what is not right.
"""

import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.errors import TunesmithError
from tunesmith.text import size

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LEADING = ("transformers", "peft", "datasets")
"""The libraries whose versions explain most; the others are counted, and listed in the JSON."""
CPUINFO = Path("/proc/cpuinfo")
LITTLE_MEMORY, TOO_LITTLE_MEMORY = 4e9, 1e9
"""Bytes: what LoRA on the demo model takes and some more, and what does not even hold the libraries and a model."""
LITTLE_DISK, TOO_LITTLE_DISK = 5e9, 2e8
BITSANDBYTES = "bitsandbytes>=0.46.1,<1"
TIMEOUT = 3.0
"""Seconds for each request to the hub."""
LOGIN = "hf auth login, or set HF_TOKEN"

Mark = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found. `means` says what follows from it for training, `mend` how to fix it where it is not ok. A
    `problem` keeps training from working."""

    name: str
    mark: Mark
    found: str
    means: str
    mend: str = ""

    def __post_init__(self) -> None:
        assert self.name
        assert self.found
        assert self.means
        assert bool(self.mend) == (self.mark != "ok")

    @classmethod
    def ok(cls, name: str, found: str, *, means: str) -> "Finding":
        return cls(name=name, mark="ok", found=found, means=means)

    @classmethod
    def note(cls, name: str, found: str, *, means: str, mend: str) -> "Finding":
        return cls(name=name, mark="note", found=found, means=means, mend=mend)

    @classmethod
    def problem(cls, name: str, found: str, *, means: str, mend: str) -> "Finding":
        return cls(name=name, mark="problem", found=found, means=means, mend=mend)


Check = Callable[[], Iterable[Finding]]


def examined(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """What each check found. One that fails is a finding itself, and the others go on."""
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # of whatever library or system the check asks
            missing = isinstance(error, ImportError)  # most often torch, which has a line of its own
            yield Finding.note(
                name,
                scrubbed(f"could not be looked at: {type(error).__name__}: {error}"),
                means="Nothing is known about it.",
                mend="fix what can't be imported, and look again"
                if missing
                else "look again; if it stays, this line is what to ask about",
            )


# What is installed


def python() -> Iterator[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding(
        name="Python",
        mark="ok" if supported else "problem",
        found=f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        means="tunesmith runs on 3.11 to 3.13.",
        mend="" if supported else "install one of these, and tunesmith with it",
    )


def torch_build() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding.problem(
            "torch",
            f"can't be imported: {error}",
            means="Nothing can be trained without it.",
            mend="pip install --force-reinstall torch",
        )
        return
    from tunesmith.model.devices import here

    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "no GPU of NVIDIA or AMD"
    build = f"{torch.__version__}, built for {build}"
    has_nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if has_nvidia and not torch.cuda.is_available():
        install = "install the CUDA build of torch, as pytorch.org/get-started says"
        yield Finding.note(
            "torch",
            build,
            means="There is an NVIDIA GPU that torch can't use: training runs on the CPU, many times slower.",
            mend="update the NVIDIA driver" if cuda else install,
        )
        return
    kind = here().type
    device = {"cpu": "the CPU", "cuda": "the GPU"}.get(kind, kind)
    yield Finding.ok("torch", build, means=f"Training runs on {device}.")


def libraries() -> Iterator[Finding]:
    """The versions of what tunesmith imports, against the ranges that it asks for."""
    fitting = []
    for requirement in _requirements():
        name, wanted = requirement.name, requirement.specifier
        installed = installed_version(name)
        if installed and wanted.contains(installed, prereleases=True):
            fitting.append(name)
            continue
        yield Finding.problem(
            name,
            f"{installed or 'not installed'}; {wanted} is needed",
            means="tunesmith was not tested with it." if installed else "tunesmith does not run without it.",
            mend=f"pip install '{name}{wanted}'",
        )
    if fitting:
        named = [name for name in LEADING if name in fitting] or fitting[:1]
        more = f" and {len(fitting) - len(named)} more" if len(fitting) > len(named) else ""
        listed = ", ".join(f"{name} {installed_version(name)}" for name in named)
        yield Finding.ok("libraries", listed + more, means="These are versions that tunesmith asks for.")


def versions() -> dict[str, str]:
    """Those of all libraries that tunesmith imports and that are installed."""
    installed = {requirement.name: installed_version(requirement.name) for requirement in _requirements()}
    return {name: number for name, number in installed.items() if number}


def _requirements() -> "list[Requirement]":
    from packaging.requirements import Requirement

    listed = [Requirement(text) for text in requires("tunesmith") or ()]
    return [item for item in listed if item.marker is None or item.marker.evaluate({"extra": ""})]


def installed_version(package: str) -> str:
    """Nothing where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def demo_model() -> Iterator[Finding]:
    from tunesmith.home import home
    from tunesmith.model.demo_model import GGUF_NAME, GGUF_SIZE, INSTALL, PACKAGE, REINSTALL, converted_folder

    spec = find_spec(PACKAGE)
    files = [Path(place) / GGUF_NAME for place in (spec and spec.submodule_search_locations) or ()]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    if GGUF_SIZE in sizes or converted_folder(home()).is_dir():
        means = "`tunesmith demo` and `--model demo` work without the network."
        yield Finding.ok("demo model", "SmolLM2-135M-Instruct", means=means)
        return
    yield Finding.note(
        "demo model",
        "damaged" if sizes else "not installed",
        means="`tunesmith demo` and `--model demo` don't work; your own models do.",
        mend=REINSTALL if sizes else INSTALL,
    )


# The machine


def processor() -> Iterator[Finding]:
    import torch

    info = CPUINFO.read_text(encoding="utf-8") if sys.platform == "linux" else ""
    lines = [line.partition(":") for line in info.splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in reversed(lines)}  # those of the first core win
    flags = {*fields.get("flags", fields.get("Features", "")).split()}
    known = {
        "AVX2": "avx2" in flags,
        "AVX-512": "avx512f" in flags,
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "AMX": "amx_tile" in flags,
        "SVE": "sve" in flags,
    }
    sets = ", ".join(name for name, there in known.items() if there) or torch.backends.cpu.get_cpu_capability()
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count()
    slow = bool(flags) and platform.machine() in ("x86_64", "AMD64") and not known["AVX2"]
    yield Finding(
        name="processor",
        mark="note" if slow else "ok",
        found=f"{fields.get('model name') or platform.processor() or platform.machine()}, {usable} of "
        f"{os.cpu_count()} cores usable, {torch.get_num_threads()} threads; {sets}",
        means="Without AVX2 matrix products are several times slower."
        if slow
        else "On the CPU, products use these threads and instructions.",
        mend="take a processor since 2015, or a GPU; a virtual machine must be told to pass AVX2 on" if slow else "",
    )


def accelerators() -> Iterator[Finding]:
    import torch

    from tunesmith.model.devices import CPU, here

    if torch.cuda.is_available():
        yield from map(_gpu, range(torch.cuda.device_count()))
    elif here().type == CPU:
        means = "Small models train on the CPU; from about a billion parameters on, take a GPU."
        yield Finding.ok("GPU", "none that torch can use", means=means)
    else:
        count = torch.accelerator.device_count()
        yield Finding.ok(f"device {here().type}", f"{count} of them", means="Training can use it.")


def _gpu(i: int) -> Finding:
    import torch

    about = torch.cuda.get_device_properties(i)
    free, total = map(size, torch.cuda.mem_get_info(i))
    found = f"{about.name}, compute capability {about.major}.{about.minor}, {total} of memory, {free} free"
    if _is_built_for(about.major, about.minor):
        return Finding.ok(f"GPU {i}", found, means="Training can use it.")
    return Finding.problem(
        f"GPU {i}",
        found,
        means=f"This torch is built for {', '.join(torch.cuda.get_arch_list())}, and not for this GPU.",
        mend="install a torch that is built for it, see pytorch.org/get-started",
    )


def _is_built_for(major: int, minor: int) -> bool:
    """Whether this torch has code for the compute capability. A binary for 8.0 runs on 8.6, and the portable "compute"
    code on everything later."""
    import torch

    built = [name.partition("_") for name in torch.cuda.get_arch_list()]
    numbers = [(kind, int(digits.rstrip("af"))) for kind, _, digits in built if digits.rstrip("af").isdigit()]
    fits = any(
        number <= 10 * major + minor and (kind == "compute" or number // 10 == major) for kind, number in numbers
    )
    return fits or not numbers or getattr(torch.version, "hip", None) is not None


def precision() -> Iterator[Finding]:
    from tunesmith.model.devices import here
    from tunesmith.model.precision import decide, describe, measure

    kind = here().type
    speeds = measure(kind)
    if not speeds["fp32"]:
        yield Finding.problem(
            "precision",
            f"no matrix product works on {kind}",
            means="Nothing can be trained on it.",
            mend="fix what is said of torch and the GPU; `use_cpu: true` trains on the CPU meanwhile",
        )
        return
    choice = decide(speeds, kind)
    yield Finding.ok(
        "precision",
        describe(choice, speeds, kind).removeprefix("precision "),
        means="Training takes fp32: no shorter format is faster here."
        if choice == "fp32"
        else f"Training takes {choice}, {speeds[choice] / speeds['fp32']:.1f} times as fast as fp32.",
    )


def memory() -> Iterator[Finding]:
    from tunesmith.model.devices import available

    free, total = available(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mark: Mark = "problem" if free < TOO_LITTLE_MEMORY else "note" if free < LITTLE_MEMORY else "ok"
    yield Finding(
        name="memory",
        mark=mark,
        found=f"{size(total)}, {size(free)} available",
        means="LoRA on 135 million parameters takes about 3 GB; `tunesmith plan` tells what a run takes.",
        mend="" if mark == "ok" else "end other programs, or take a machine with more",
    )


def disks() -> Iterator[Finding]:
    from tunesmith.home import home

    for name, folder in (("cache folder", home()), ("this folder", Path.cwd())):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        writable = there.is_dir() and os.access(there, os.W_OK)
        unusable = free < TOO_LITTLE_DISK or not writable
        is_cache = name == "cache folder"
        # Runs can be written elsewhere; the cache is where TUNESMITH_HOME says.
        mark: Mark = "problem" if unusable and is_cache else "note" if unusable or free < LITTLE_DISK else "ok"
        wanted = "prepared data and the demo model" if is_cache else "runs, by default"
        move = "set TUNESMITH_HOME to another folder" if is_cache else "work in another folder"
        yield Finding(
            name=name,
            mark=mark,
            found=f"{folder}: {size(free)} free" + ("" if writable else ", not writable"),
            means=f"It is for {wanted}" + ("." if mark == "ok" else "; a checkpoint of a large model takes many GB."),
            mend="" if mark == "ok" else move if not writable else f"free some, or {move}",
        )


# Libraries tried on the device


def bitsandbytes() -> Iterator[Finding]:
    """Whether models can be loaded in 8 and 4 bits: a small product in each is compared with the plain one."""
    name = "bitsandbytes"
    means = "`quantize` and 8-bit optimizers don't work; everything else does."
    if find_spec(name) is None:
        yield Finding.note(name, "not installed", means=means, mend=f"pip install '{BITSANDBYTES}'")
        return
    installed = installed_version(name)
    fault, mend = _bitsandbytes_fault(installed)
    if fault:
        yield Finding.note(name, f"{installed}; {fault}", means=means, mend=mend)
        return
    means = "`quantize` can load models in 8 and in 4 bits."
    yield Finding.ok(name, f"{installed}, tried with a small product", means=means)


def _bitsandbytes_fault(installed: str) -> tuple[str, str]:
    """What is wrong with the `bitsandbytes` that is there, and how to fix it; nothing where it works."""
    from packaging.requirements import Requirement

    from tunesmith.model.devices import here
    from tunesmith.model.quantize import problem, refuse_missing

    wanted, device = Requirement(BITSANDBYTES).specifier, here().type
    if not wanted.contains(installed, prereleases=True):
        return f"{wanted} is needed", f"pip install '{BITSANDBYTES}'"
    with _captured("bitsandbytes"):  # it logs a page where its library does not load, and the product says the same
        try:
            refuse_missing("8-bit and 4-bit models", device)
        except TunesmithError as error:
            return str(error), "leave `quantize` out, or train on one of these devices"
        except Exception as error:  # of whatever it loads
            fault = f"can't be imported: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        else:
            fault = problem(device)
    return fault, f"pip install --force-reinstall --no-deps '{BITSANDBYTES}'; python -m bitsandbytes says more"


def flash_attention() -> Iterator[Finding]:
    """Whether attention over documents takes one kernel, tried on a small example as training would."""
    import torch

    if not torch.cuda.is_available():
        number = installed_version("flash-attn")
        installed = f"flash-attn {number}" if number else "not installed"
        yield Finding.ok("FlashAttention", installed, means="It is for NVIDIA GPUs; without one nothing is lost.")
        return
    from tunesmith.model.attention_cuda import DEVICE, Call, pick

    q_NTH = torch.zeros(1, 2, 8, 64, device=DEVICE, dtype=torch.bfloat16)
    with _captured("tunesmith.model.attention_cuda") as reasons:  # why a kernel that is there is not taken
        kernel = pick(q_NTH, q_NTH, Call(scale=1.0))
    build = f"torch {torch.__version__}"
    if kernel is not None:
        means = "All documents of a batch take one kernel."
        yield Finding.ok("FlashAttention", f"{build}; attention takes {kernel.name}", means=means)
        return
    supported = torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)
    yield Finding.note(
        "FlashAttention",
        "; ".join([f"{build} has no kernel for this GPU", *reasons]),
        means="Attention goes document by document, which is slower with many short ones.",
        mend="pip install --upgrade torch, which brings the kernel"
        if supported
        else "nothing on this GPU: the kernels are for NVIDIA's from Ampere on (A10, RTX 30, L4, A100, H100)",
    )


@contextmanager
def _captured(name: str) -> Iterator[list[str]]:
    """The warnings of the logger `name` and those below it, which are not printed meanwhile."""
    messages: list[str] = []
    logger, handler = logging.getLogger(name), logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


# The hub


def hub() -> Iterator[Finding]:
    """Whether the Hugging Face hub answers, and as whom it knows us."""
    from huggingface_hub import constants, get_token

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        yield Finding.note(
            "hub",
            "HF_HUB_OFFLINE is set: nothing is asked of it",
            means="Names on the hub work only where their files are in its cache already.",
            mend="unset HF_HUB_OFFLINE to download and to push",
        )
        return
    status, _ = _answer("HEAD", endpoint)
    if not isinstance(status, int) or status >= 500:
        yield Finding.note(
            "hub",
            scrubbed(f"{endpoint} does not answer: {status}"),
            means="Models and data on it can't be downloaded, nor runs pushed; folders and files here work.",
            mend="look at the connection and HTTPS_PROXY; HF_ENDPOINT names a mirror",
        )
        return
    yield Finding.ok("hub", f"{endpoint} answers", means="Models and data can come from it.")
    yield _account(endpoint, get_token())


def _account(endpoint: str, token: str | None) -> Finding:
    name = "hub token"
    if token is None:
        means = "Public models and data work; gated and private ones don't, nor does `tunesmith push`."
        return Finding.note(name, "none", means=means, mend=LOGIN)
    status, body = _answer("GET", f"{endpoint}/api/whoami-v2", token)
    if status == 200:
        owner = scrubbed(str(body.get("name")), token)
        means = "Gated and private names of this account work, and `tunesmith push` if the token may write."
        return Finding.ok(name, f"of {owner}", means=means)
    if status in (401, 403):
        means = "With a token that is refused even public names may fail."
        return Finding.note(name, "the hub does not accept it", means=means, mend=f"{LOGIN} to another one")
    return Finding.note(
        name,
        scrubbed(f"whose it is can't be asked: {status}", token),
        means="Whether gated and private names and `tunesmith push` work is not known.",
        mend="ask again later: the hub answers, but not to this",
    )


def _answer(method: str, url: str, token: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The status and the JSON of an answer; in place of the status why there is none. In a thread of its own, for
    looking up a name has no time limit."""
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    answers: list[tuple[Any, dict[str, Any]]] = []

    def ask() -> None:
        try:
            headers = build_hf_headers(token=token or False)
            answer = get_session().request(method, url, headers=headers, timeout=TIMEOUT, follow_redirects=True)
            body = answer.json() if method == "GET" and answer.status_code == 200 else {}
            answers.append((answer.status_code, body if isinstance(body, dict) else {}))
        except Exception as error:  # of the client's own kinds, and of its versions
            answers.append((f"{type(error).__name__}: {error}", {}))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * TIMEOUT)
    return answers[0] if answers else (f"nothing came within {2 * TIMEOUT:g} seconds", {})


def scrubbed(text: str, *secrets: str) -> str:
    """`text` without tokens."""
    from tunesmith.secrets import known_secrets, scrub

    return scrub(text, [*secrets, *known_secrets()])


CHECKS: dict[str, Check] = {
    "Python": python,
    "torch": torch_build,
    "libraries": libraries,
    "processor": processor,
    "GPU": accelerators,
    "precision": precision,
    "memory": memory,
    "disk": disks,
    "bitsandbytes": bitsandbytes,
    "FlashAttention": flash_attention,
    "demo model": demo_model,
    "hub": hub,
}
