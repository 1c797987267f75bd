"""A file layer that fails on purpose: the calls that write below a folder are counted, and one of them does harm."""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

REMOVING = ("unlink", "rmdir")
"""Kinds of calls that a broken disk does not refuse here: else nothing could be tidied up."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The `number`-th call, from 1 on. `half` does a part of it, where there is a part: some of the bytes."""

    number: int
    kind: str
    path: str
    half: Callable[[], None] | None = None

    @property
    def of_a_save(self) -> bool:
        """Whether a checkpoint was being written, or an old one removed."""
        return "checkpoint-" in self.path


Act = Callable[[Call], None]


class Layer:
    """Tells `act` each call that makes, opens, writes, flushes, renames or removes something below `root`, before it is
    done. What libraries in other languages do is seen where Python calls them."""

    def __init__(self, root: Path, act: Act) -> None:
        self._root, self._act = str(root), act
        self.calls: list[Call] = []
        self._kept: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        for kind in ("mkdir", "unlink", "rmdir"):
            self._replace(os, kind, self._on_a_path(kind, getattr(os, kind)))
        for name in ("rename", "replace"):
            self._replace(os, name, self._renaming(getattr(os, name)))
        self._replace(os, "fsync", self._flushing(os.fsync))
        self._replace(os, "open", self._opening_a_number(os.open))
        for module in (io, builtins):
            self._replace(module, "open", self._opening(io.open))
        tensors: Any = import_module("safetensors.torch")
        self._replace(tensors, "serialize_file", self._serializing(tensors.serialize_file))

    def remove(self) -> None:
        for module, name, original in reversed(self._kept):
            setattr(module, name, original)
        self._kept = []

    def _replace(self, module: Any, name: str, function: Any) -> None:
        self._kept.append((module, name, getattr(module, name)))
        setattr(module, name, function)

    def _note(self, kind: str, path: Any, half: Callable[[], None] | None = None) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if text == self._root or text.startswith(self._root + os.sep):
            call = Call(number=len(self.calls) + 1, kind=kind, path=text, half=half)
            self.calls.append(call)
            self._act(call)

    def _on_a_path(self, kind: str, original: Any) -> Any:
        def call(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> Any:
            self._note(kind, path if dir_fd is None else os.path.join(_path_of(dir_fd), os.fsdecode(path)))
            return original(path, *args, dir_fd=dir_fd, **kwargs)

        return call

    def _renaming(self, original: Any) -> Any:
        def call(source: Any, target: Any, **kwargs: Any) -> Any:
            self._note("rename", target)
            return original(source, target, **kwargs)

        return call

    def _flushing(self, original: Any) -> Any:
        def call(file: Any) -> None:
            self._note("fsync", _path_of(file if isinstance(file, int) else file.fileno()))
            original(file)

        return call

    def _opening_a_number(self, original: Any) -> Any:
        def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
            if flags & WRITING:
                self._note("open", path)
            return original(path, flags, *args, **kwargs)

        return call

    def _opening(self, original: Any) -> Any:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = isinstance(file, str | bytes | os.PathLike) and any(letter in mode for letter in "wax+")
            if not writes or not os.fsdecode(file).startswith(self._root + os.sep):
                return original(file, mode, *args, **kwargs)
            self._note("open", file)
            return _File(original(file, mode, *args, **kwargs), lambda half: self._note("write", file, half))

        return call

    def _serializing(self, original: Any) -> Any:
        def call(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            def half() -> None:
                original(tensors, path, *args, **kwargs)
                os.truncate(path, os.path.getsize(path) // 2)

            try:
                self._note("serialize", path, half)
            except OSError as error:  # as the library says it
                text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise SafetensorError(text) from None
            return original(tensors, path, *args, **kwargs)

        return call


class _File:
    """A file whose writes are told before they are done."""

    def __init__(self, inner: Any, note: Callable[[Callable[[], None]], None]) -> None:
        self._inner, self._note = inner, note

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._inner.write(data[: len(data) // 2])
            self._inner.flush()

        self._note(half)
        return self._inner.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __iter__(self) -> Any:
        return iter(self._inner)

    def __enter__(self) -> "_File":
        self._inner.__enter__()
        return self

    def __exit__(self, *args: Any) -> Any:
        return self._inner.__exit__(*args)


def _path_of(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


# What a call may do


def kill(number: int, before: Callable[[Call], None] = lambda call: None) -> Act:
    """The process kills itself in the call `number`, half of which is done."""

    def act(call: Call) -> None:
        if call.number == number:
            before(call)
            if call.half is not None:
                call.half()
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def fail(number: int, code: int, *, once: bool) -> Act:
    """The call `number` fails with the error `code`; unless `once`, so do all that write after it."""

    def act(call: Call) -> None:
        if call.number < number or (once and call.number > number):
            return
        if call.kind in REMOVING and not once:
            return
        if call.half is not None:
            with suppress(OSError, ValueError):
                call.half()
        raise OSError(code, os.strerror(code), call.path)

    return act


def do(number: int, harm: Callable[[], None]) -> Act:
    """`harm` is done once, before the call `number`."""

    def act(call: Call) -> None:
        if call.number == number:
            harm()

    return act


ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
