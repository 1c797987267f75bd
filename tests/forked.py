"""Processes that are forked from a server which has imported everything, so that each starts at once."""

import fcntl
import os
import runpy
import select
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]


def start(target: Callable[..., None], *args: Any) -> Any:
    """A process that runs `target`."""
    context: Any = get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    child = context.Process(target=target, args=args)
    with chdir(REPO):  # from where the server finds what it is to import; the first test to ask may be anywhere
        child.start()
    return child


def event() -> Any:
    """An event that a process and this one share."""
    return get_context("forkserver").Event()


def finished(child: Any, timeout: float = 120) -> int:
    """The exit code of a process, negative for a signal."""
    child.join(timeout=timeout)
    if child.exitcode is None:
        child.kill()
        raise AssertionError("the process hangs")
    return int(child.exitcode)


# Several processes that train together

PORTS = iter(range(10_000 + os.getpid() * 997 % 20_000, 32_768))
"""For tests. The system gives those from 32,768 on to any process that asks for one, so that one of them may be taken
before a test opens it. Processes that run tests at the same time begin some 1,000 apart."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has, and no other test is given."""
    for port in PORTS:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def together(number: int, target: Callable[..., None], *args: Any, code: int = 0) -> None:
    """Run `target` in `number` processes that know of each other, as `torchrun` starts them. Each ends with `code`."""
    assert [finished(child, 200) for child in started(number, target, *args)] == [code] * number


def started(number: int, target: Callable[..., None], *args: Any) -> list[Any]:
    """The processes of `together`."""
    port = free_port()
    return [start(_ranked, rank, number, port, target, args) for rank in range(number)]


def _ranked(rank: int, number: int, port: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    target(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# The command line


class Command:
    """`tunesmith` with `arguments` in a process of its own, whose output goes to files in `folder`."""

    def __init__(self, folder: Path, *arguments: object, env: Mapping[str, str] | None = None, text: str = "") -> None:
        self._folder = folder
        folder.mkdir()
        (folder / "stdin").write_text(text)
        streams = [str(folder / name) for name in ("stdin", "stdout", "stderr")]
        words = [str(argument) for argument in arguments]
        self.process = start(_command, words, dict(env or os.environ), os.getcwd(), streams)

    @property
    def stdout(self) -> str:
        return self._said("stdout")

    @property
    def stderr(self) -> str:
        return self._said("stderr")

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def finish(self, timeout: float = 120) -> int:
        return finished(self.process, timeout)

    def until(self, happened: Callable[[], bool], timeout: float = 120) -> None:
        """Wait. Fails at the end of the command, and after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not happened():
            assert self.process.is_alive(), f"the command ended before:\n{self.stdout}{self.stderr}"
            assert time.monotonic() < deadline, f"the command hangs:\n{self.stdout}{self.stderr}"
            time.sleep(0.01)

    def _said(self, name: str) -> str:
        file = self._folder / name
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


class TerminalCommand:
    """`tunesmith` with `arguments` at a terminal: `master` is its other end, at whose end `read` raises EOFError."""

    def __init__(self, *arguments: object, rows: int, columns: int, env: Mapping[str, str], folder: Path) -> None:
        self.master, slave = os.openpty()
        self.resize(rows, columns)
        opened = event()
        terminal = [os.ttyname(slave)]
        words = [str(argument) for argument in arguments]
        self.process = start(_command, words, dict(env), str(folder), terminal, opened)
        assert opened.wait(120), "the command does not begin"
        os.close(slave)

    def read(self) -> bytes:
        with suppress(OSError):  # which Linux gives where the other end is closed
            if select.select([self.master], [], [], 60)[0] and (text := os.read(self.master, 65536)):
                return text
        raise EOFError

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def finish(self) -> int:
        code = finished(self.process)
        os.close(self.master)
        return code


def _command(arguments: list[str], env: dict[str, str], folder: str, streams: list[str], opened: Any = None) -> None:
    """`streams`: the files of stdin, stdout and stderr, or a terminal for all of them."""
    os.setsid()
    if len(streams) == 1:
        terminal = os.open(streams[0], os.O_RDWR)
        for descriptor in range(3):
            os.dup2(terminal, descriptor)
        opened.set()
    else:
        for descriptor, (name, flags) in enumerate(
            zip(streams, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_TRUNC] * 2), strict=True)
        ):
            os.dup2(os.open(name, flags), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(i, "w", encoding="utf-8", closefd=False, buffering=1) for i in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ |= env
    os.chdir(folder)
    sys.argv = ["tunesmith", *arguments]
    runpy.run_module("tunesmith", run_name="__main__", alter_sys=False)
