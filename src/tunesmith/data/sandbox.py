"""Chat templates are programs of others: they run in the sandbox of `transformers`, for a time, and write so much.

The sandbox keeps a template from the files and objects of the machine, and from endless ranges. What is added here
keeps it from loops in loops, and from single operations that never end or fill the memory: powers, and texts that are
multiplied, joined or padded. These are not computed while a template is compiled either.
"""

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from itertools import count
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError

SECONDS = 8.0
"""For all renderings of a conversation, which take a few milliseconds."""
CHARACTERS = 50_000_000
"""Of one rendered conversation, and of any text that an operation makes."""
ITEMS = 4_000_000
"""Of a list that an operation makes."""
BITS = 4096
"""Of a number."""
MEMORY = 600_000_000
"""Bytes that the process may grow by while a template runs."""
WATCHED = 0.02
"""Seconds between two looks at the memory."""
DEEPEST = 100
"""Spaces by which JSON is indented."""
OPERATORS = ("*", "**", "+", "%")
PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent"}
FORMATTING = {"format", "format_map"}
WIDTH = re.compile(r"\d{8}")
"""Of a field, in a text with places to fill in."""
GIVEN_WIDTH = re.compile(r"%[-+ #0]*\*|:[^{}]*\{")
"""The width of a field is one of the values."""
_NUMBERS = count()


class TooLong(Exception):
    """Raised in the thread whose template ran for too long, or took too much memory."""

    def __str__(self) -> str:
        return f"it ran for more than {SECONDS:g} seconds, or took more than {MEMORY // 10**6} MB"


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, **arguments: Any) -> str:
    """As `tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **arguments)`, within the limits of this
    module.

    Raises:
        TunesmithError: the template goes beyond these.
    """
    from transformers.utils.chat_template_utils import _alias_reasoning_fields, _plain_template_data

    turns = _alias_reasoning_fields(_plain_template_data([dict(message) for message in messages]))
    variables = {"documents": None, "add_generation_prompt": False, **tokenizer.special_tokens_map}
    variables |= _plain_template_data(arguments)
    source = tokenizer.get_chat_template(tools=tools)
    try:
        with time_limit():
            pieces = _program(source).generate(messages=turns, tools=_plain_template_data(tools), **variables)
            return "".join(refuse_long(pieces))
    except (TooLong, OverflowError, MemoryError) as error:
        name = getattr(tokenizer, "name_or_path", "")
        raise TunesmithError(
            f"the chat template{f' of {name}' if name else ''} can't be rendered: {error}. Take a tokenizer with "
            "another one, or train with another chat_template_path"
        ) from error


@lru_cache(maxsize=16)
def _program(source: str) -> Any:
    return compiled(source)


def compiled(source: str) -> Any:
    """The Jinja program of a chat template. Raises what Jinja does for a template that is none."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer
    from transformers.utils.chat_template_utils import _compile_jinja_template

    class Operators(NodeTransformer):
        """`a ~ b`, which no sandbox can watch, becomes a filter."""

        def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
            self.generic_visit(node)
            texts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(texts, "concatenated", [], [], None, None, lineno=node.lineno)

    # The environment of an empty template: compiling computes what is constant, before anything could be intercepted.
    # One of its own for each program: it knows which blocks are being tracked.
    environment = _compile_jinja_template(f"{{# {next(_NUMBERS)} #}}").environment
    environment.intercepted_binops = frozenset(OPERATORS)
    compute, call = environment.call_binop, environment.call

    def call_binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        # What most templates do most of the time.
        if operator == "+" and type(left) is type(right) is str and len(left) + len(right) <= CHARACTERS:
            return left + right
        _refuse_huge(operator, left, right)
        return compute(context, operator, left, right)

    def call_method(context: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name == "join" and args:
                args = ([*args[0]], *args[1:])
                _refuse_joined(args[0], owner)
            _refuse_grown(name, owner, *args, **kwargs)
        return call(context, method, *args, **kwargs)

    environment.call_binop, environment.call = call_binop, call_method
    for name in (PADDING | FORMATTING | {"replace", "tojson"}) & environment.filters.keys():
        environment.filters[name] = _watched(name, environment.filters[name])
    join = environment.filters["join"]

    @wraps(join)
    def joined(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        value = [*value]
        _refuse_joined(value, d)
        return join(context, value, d, attribute)

    environment.filters["join"] = joined
    environment.filters["concatenated"] = _concatenated
    return environment.from_string(Operators().visit(environment.parse(source)))


def _watched(name: str, function: Any) -> Any:
    """The filter `name`, which refuses what it would make too large."""

    @wraps(function)  # with the mark of what it is passed first
    def watched(*args: Any, **kwargs: Any) -> Any:
        passed = [arg for arg in args if type(arg).__module__.partition(".")[0] != "jinja2"]
        _refuse_grown(name, *passed, **kwargs)
        return function(*args, **kwargs)

    return watched


def _concatenated(values: list[Any]) -> str:
    _refuse_joined(values, "")
    return "".join(map(str, values))


def _refuse_huge(operator: str, left: Any, right: Any) -> None:
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and numbers and left.bit_length() * right > BITS:
        raise OverflowError(f"a power of {right} is too large")
    if operator == "*" and numbers and left.bit_length() + right.bit_length() > BITS:
        raise OverflowError("a product is too large")
    if operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(times, int) and len(text) * times > _most(text):
                raise OverflowError(f"{len(text)} characters or items {times} times are too many")
    if operator == "+":
        for kind in (str, list, tuple):
            if isinstance(left, kind) and isinstance(right, kind) and len(left) + len(right) > _most(left):
                raise OverflowError(f"{len(left) + len(right):,} characters or items are too many")
    if operator == "%" and isinstance(left, str):
        _refuse_grown("format", left, *(right if isinstance(right, tuple) else (right,)))


def _most(value: Any) -> int:
    return CHARACTERS if isinstance(value, str) else ITEMS


def _refuse_grown(name: str, value: Any = "", *args: Any, **kwargs: Any) -> None:
    """Refuses a method or a filter that makes more of a text than it may."""
    text = value if isinstance(value, str) else ""
    widths = [abs(each) for each in (*args, *kwargs.values()) if isinstance(each, int)]
    widest, parts = max(widths, default=0), 1 + text.count("\n") + text.count("\t")
    texts = [each for each in (*args, *kwargs.values()) if isinstance(each, str)]
    if (
        (name in PADDING and widest * parts > CHARACTERS)
        or (name in FORMATTING and ((widest > CHARACTERS and GIVEN_WIDTH.search(text)) or WIDTH.search(text)))
        or (name == "tojson" and widest > DEEPEST)
        or (name == "replace" and len(texts) == 2 and text.count(texts[0]) * len(texts[1]) > CHARACTERS)
    ):
        raise OverflowError(f"{name} makes too much of a text")


def _refuse_joined(values: Sequence[Any], between: Any) -> None:
    size = sum(len(value) for value in values if isinstance(value, str)) + len(str(between)) * len(values)
    if size > CHARACTERS:
        raise OverflowError(f"{size:,} characters are too many")


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
    """Raise TooLong in this thread, wherever it is, when what is in the block takes too long, or too much memory.

    It gives a function that begins both anew: of a batch, each row has all of it, and what rows before it have left in
    memory is not its.
    """
    thread, lock, over = threading.get_ident(), threading.Condition(), False
    deadline, most = time.monotonic() + SECONDS, _resident() + MEMORY

    def begin_anew() -> None:
        nonlocal deadline, most
        deadline, most = time.monotonic() + SECONDS, _resident() + MEMORY

    def watch() -> None:
        with lock:
            while not over and (left := deadline - time.monotonic()) > 0 and _resident() <= most:
                lock.wait(min(left, WATCHED))
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


def _resident() -> int:
    """Bytes of this process in main memory; 0 where nobody says."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
