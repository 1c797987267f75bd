"""Chat templates are programs of others: they run in the sandbox of `transformers`, for a time, and write so much.

The sandbox keeps a template from the files and objects of the machine, and from endless ranges. What is added here
keeps it from loops in loops, from multiplying texts, and from powers that never end.
"""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 60.0
"""For all renderings of a conversation, which take a few milliseconds."""
CHARACTERS = 50_000_000
"""Of one rendered conversation, and of any text that is made by multiplying."""
BITS = 4096
"""Of a power."""


class TooLong(Exception):
    """Raised in the thread whose template ran for too long."""

    def __str__(self) -> str:
        return f"it ran for more than {SECONDS:g} seconds"


def compiled(source: str) -> Any:
    """The Jinja program of a chat template. Raises what Jinja does for a template that is none."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # The environment of an empty template: compiling computes what is constant, before anything could be intercepted.
    # One of its own for each source, as there.
    environment = _compile_jinja_template(f"{{# {hash(source)} #}}").environment
    environment.intercepted_binops = frozenset(("*", "**"))
    plain = environment.call_binop

    def call_binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        _refuse_huge(operator, left, right)
        return plain(context, operator, left, right)

    environment.call_binop = call_binop
    return environment.from_string(source)


def _refuse_huge(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > BITS:
            raise OverflowError(f"a power of {right} is too large")
        return
    for text, times in ((left, right), (right, left)):
        if isinstance(text, str | list | tuple) and isinstance(times, int) and len(text) * times > CHARACTERS:
            raise OverflowError(f"{len(text)} characters or items {times} times are too many")


def refuse_long(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of a rendering, as long as they are not too much together. Raises OverflowError."""
    written = 0
    for piece in pieces:
        written += len(piece)
        if written > CHARACTERS:
            raise OverflowError(f"it writes more than {CHARACTERS:,} characters")
        yield piece


@contextmanager
def time_limit() -> Iterator[Callable[[], None]]:
    """Raise TooLong in this thread, wherever it is, when what is in the block takes too long.

    It gives a function that begins the time anew: of a batch, each row has all of it.
    """
    thread, lock, over = threading.get_ident(), threading.Condition(), False
    deadline = time.monotonic() + SECONDS

    def begin_anew() -> None:
        nonlocal deadline
        deadline = time.monotonic() + SECONDS

    def watch() -> None:
        with lock:
            while not over and (left := deadline - time.monotonic()) > 0:
                lock.wait(left)
            if not over:
                # The one way to end a loop in Python code from outside of it, in whichever thread it runs.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TooLong))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield begin_anew
    finally:
        with lock:
            over = True
            lock.notify()
