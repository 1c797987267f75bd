"""Processes that work on parts of the data.

They are plain processes that talk over pipes. `multiprocessing` would run the user's script again in each of them,
which only a script with `if __name__ == "__main__"` survives; a fork of a process whose libraries have started threads
can hang. A worker imports what it is sent and nothing of the script's, and ends with its pipe, however this process
ends.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import LifoQueue
from typing import IO, Any

from tunesmith.errors import TunesmithError

START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from tunesmith.data.workers import serve; serve()"
ONE_PROCESS = "leave dataset_num_proc out: one process does the same"


class Workers:
    """`count` processes, each with what `make(*arguments)` returns there: a function of one argument.

    All are ended with the block, also in the middle of their work.
    """

    def __init__(self, count: int, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        try:
            task = pickle.dumps((make, arguments))
        except Exception as error:  # whatever the object of a user raises
            raise TunesmithError(f"the tokenizer can't be sent to another process ({error}); {ONE_PROCESS}") from error
        self._workers = [_Worker(task) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count)
        self._free: LifoQueue[_Worker] = LifoQueue()  # those that have started come first
        for worker in self._workers:
            self._free.put(worker)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def submit(self, part: Any) -> "Future[Any]":
        """What the function returns for `part`, or raises. The next process that is free works on it."""
        return self._threads.submit(self._ask, part)

    def _ask(self, part: Any) -> Any:
        worker = self._free.get()
        try:
            return worker.ask(part)
        finally:
            self._free.put(worker)


class _Worker:
    """One process, seen from here. It is sent its task, and imports what that needs, when it is first asked."""

    def __init__(self, task: bytes) -> None:
        self._task: bytes | None = task
        path = json.dumps([place for place in sys.path if isinstance(place, str)])
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout

    def ask(self, part: Any) -> Any:
        try:
            if self._task is not None:
                _send(self._to, self._task)
                self._task = None
            _send(self._to, pickle.dumps(part))
            succeeded, answer = pickle.loads(_received(self._from))
        except (OSError, EOFError) as error:
            raise TunesmithError(
                f"a process that prepares data ended with code {self._process.wait()}, perhaps for want of memory; "
                f"set a smaller dataset_num_proc, or {ONE_PROCESS}"
            ) from error
        if not succeeded:
            raise answer
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Close the pipes, once nobody uses them."""
        for pipe in (self._to, self._from):
            with suppress(OSError):  # nobody reads any more what was still to be written
                pipe.close()


def serve() -> None:
    """What a worker does: the function is made of the first message, and answers all others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the first one ends the others
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not get between answers
    with suppress(EOFError, OSError):  # the other process has ended
        task = _received(requests)
        try:
            make, arguments = pickle.loads(task)
            function = make(*arguments)
        except Exception as error:
            problem = f"the tokenizer can't be made in another process ({type(error).__name__}: {error})"
            function = _refusal(TunesmithError(f"{problem}; {ONE_PROCESS}"))
        while True:
            part = _received(requests)
            try:
                answer = pickle.dumps((True, function(pickle.loads(part))))
            except Exception as error:
                answer = _failure(error)
            _send(answers, answer)


def _refusal(error: Exception) -> Callable[[Any], Any]:
    def refuse(part: Any) -> Any:
        raise error

    return refuse


def _failure(error: Exception) -> bytes:
    """An exception, with its traceback where it is no mistake in the data, as an answer."""
    if not isinstance(error, TunesmithError):
        error.add_note(f"In a process that prepares data:\n{traceback.format_exc()}")
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:  # of a class that can't be made again of its arguments
        return pickle.dumps((False, RuntimeError("".join(traceback.format_exception(error)))))
    return answer


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(8, "little") + message)
    pipe.flush()


def _received(pipe: IO[bytes]) -> bytes:
    size = int.from_bytes(_exactly(pipe, 8), "little")
    return _exactly(pipe, size)


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content
