"""Chat templates are programs of others: they run in the sandbox of `transformers`, for a time, and write so much.

The sandbox keeps a template from the files and objects of the machine, and from endless ranges. What is added here
keeps it from what never ends or fills the memory.

- Loops end after a time, and when the process has grown too much: `time_limit`. It takes effect between two operations.
- So no single operation may take long or make much. Most cost as much as what they are given, counted as it would be
  written: a list that holds another one twice counts it twice. `_weigh` refuses what is too much.
- Operations that cost more have a rule of their own: `RULES` for methods and filters, `_refuse_operator` for operators.
- Nothing is computed while a template is compiled.
"""

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import contextmanager, suppress
from functools import lru_cache, partial, wraps
from itertools import count
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError

SECONDS = 2.0
"""Of a core, for all renderings of a conversation, which take a few milliseconds."""
CHARACTERS = 20_000_000
"""Of one rendered conversation, and of any text that an operation makes."""
ITEMS = 1_000_000
"""Of a list that an operation makes."""
EACH = CHARACTERS // ITEMS
"""Characters that an item counts as."""
STEPS = 1_000_000_000
"""Of an operation whose time grows with the product of two sizes."""
LINES = 1_000_000
"""Characters of a text that is cut into words, tags or lines by regular expressions."""
LINKS = 10_000
"""Characters of a text in which links are looked for, by one that backtracks; fields of a format."""
BITS = 4096
"""Of a number."""
DIGITS = 400
"""Places to which a number is rounded."""
MEMORY = 300_000_000
"""Bytes that the process may grow by while a template runs."""
WATCHED = 0.02
"""Seconds between two looks at the memory."""
AGAIN = 0.5
"""Seconds until a thread is stopped again that went on, because the first stop came where exceptions are dropped."""
DEEPEST = 100
"""Spaces by which JSON is indented."""
OPERATORS = frozenset(("+", "-", "*", "/", "//", "%", "**"))
VARIABLES = ("_loop_vars", "_block_vars")
"""What Jinja passes to calls in loops and blocks besides their arguments: the variables of these."""
SHALLOW = {"attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random"}
SHALLOW |= {"reject", "rejectattr", "reverse", "select", "selectattr", "slice"}
"""Filters that look at no more than the items of what they are given."""
KINDS = {"boolean", "callable", "defined", "escaped", "false", "filter", "float", "integer", "iterable", "mapping"}
KINDS |= {"none", "number", "sameas", "sequence", "string", "test", "true", "undefined"}
"""Tests that look at no more than what a value is."""
PERCENT_WIDTHS = re.compile(r"[%)][-+ #0]*(\d*)(?:\.(\d+))?")
BRACED = re.compile(r"\{[^{}:]*:([^{}]*)")
NUMBERS = re.compile(r"\d+")
GIVEN_WIDTH = re.compile(r"[%)][-+ #0]*(?:\d*\.)?\*|\{[^{}]*:[^{}]*\{")
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
        TunesmithError: the template goes beyond these, or fails otherwise. It says of which model it is.
    """
    from transformers.utils.chat_template_utils import _alias_reasoning_fields, _plain_template_data

    turns = _alias_reasoning_fields(_plain_template_data([dict(message) for message in messages]))
    variables = {"documents": None, "add_generation_prompt": False, **tokenizer.special_tokens_map}
    variables |= _plain_template_data(arguments)
    source = tokenizer.get_chat_template(tools=tools)
    name = getattr(tokenizer, "name_or_path", "")
    template = f"the chat template{f' of {name}' if name else ''}"
    try:
        with time_limit():
            pieces = _program(source).generate(messages=turns, tools=_plain_template_data(tools), **variables)
            return "".join(refuse_long(pieces))
    except (TooLong, OverflowError, MemoryError, RecursionError) as error:
        raise TunesmithError(
            f"{template} can't be rendered: {str(error) or 'out of memory'}. Take a tokenizer with another one, or "
            "train with another chat_template_path"
        ) from error
    except Exception as error:  # a template is a program: whatever it raises, it refuses
        raise TunesmithError(f"{template} refuses the conversation: {str(error) or type(error).__name__}") from error


@lru_cache(maxsize=16)
def _program(source: str) -> Any:
    return compiled(source)


def _with_filters(tree: Any) -> Any:
    """The parsed template, in which what no sandbox can watch goes through a filter of ours."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Watched(NodeTransformer):
        def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
            self.generic_visit(node)
            return self._passed(nodes.List(node.nodes, lineno=node.lineno), "concatenated")

        def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
            self.generic_visit(node)
            compared: list[Any] = [node, *node.ops]
            open_ones = [each for each in compared if not isinstance(each.expr, nodes.Const)]
            if len(open_ones) > 1:  # of two, one that is written down is soon compared
                for each in open_ones:
                    each.expr = self._passed(each.expr, "weighed")
            return node

        def visit_Dict(self, node: nodes.Dict) -> nodes.Dict:
            self.generic_visit(node)
            for pair in node.items:
                if not isinstance(pair.key, nodes.Const):
                    pair.key = self._passed(pair.key, "weighed")
            return node

        def visit_For(self, node: nodes.For) -> nodes.For:
            self.generic_visit(node)
            node.iter = self._passed(node.iter, "iterated")
            return node

        def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
            call: Any = super().generic_visit(node, *args, **kwargs)
            if getattr(call, "dyn_args", None) is not None:
                call.dyn_args = self._passed(call.dyn_args, "iterated")
            return node

        def _passed(self, node: Any, name: str) -> nodes.Filter:
            return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    return Watched().visit(tree)


def compiled(source: str) -> Any:
    """The Jinja program of a chat template. Raises what Jinja does for a template that is none."""
    from jinja2 import pass_context
    from jinja2.runtime import Macro
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # The environment of an empty template: an own one, because it knows which blocks are being tracked.
    environment = _compile_jinja_template(f"{{# {next(_NUMBERS)} #}}").environment
    environment.intercepted_binops = OPERATORS
    compute, call, getitem = environment.call_binop, environment.call, environment.getitem

    def call_binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        # What most templates do most of the time.
        if operator == "+" and type(left) is type(right) is str and len(left) + len(right) <= CHARACTERS:
            return left + right
        _refuse_operator(operator, left, right)
        return compute(context, operator, left, right)

    def call_method(context: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(method, Macro):  # which takes its arguments as they are
            bound = getattr(method, "__wrapped__", method)  # `format` of the sandbox
            owner, name = getattr(bound, "__self__", None), getattr(bound, "__name__", "")
            if isinstance(owner, list | tuple):
                _weigh(owner)
            if name == "join" and args:
                args = (_listed(args[0]), *args[1:])
            named = {key: value for key, value in kwargs.items() if key not in VARIABLES} if kwargs else kwargs
            if args or named:
                _weigh(*args, *named.values())
            if rule := RULES.get(name):
                rule(owner, args, named)
        return call(context, method, *args, **kwargs)

    def get_item(value: Any, key: Any) -> Any:
        if isinstance(key, tuple):
            _weigh(key)
        return getitem(value, key)

    @pass_context  # so that nothing is written while it is compiled
    def shown(context: Any, value: Any) -> Any:
        return value if type(value) is str else _weighed(value)

    environment.call_binop, environment.call, environment.getitem = call_binop, call_method, get_item
    environment.optimized, environment.finalize = False, shown
    environment.concat = lambda pieces: "".join(refuse_long(iter(pieces)))
    for name, function in environment.filters.items():
        environment.filters[name] = _watched(name, function, shallow=name in SHALLOW)
    for name, function in environment.tests.items():
        if name not in KINDS:
            environment.tests[name] = _watched(name, function)
    environment.filters |= {"concatenated": _concatenated, "weighed": _weighed, "iterated": _iterated}
    return environment.from_string(_with_filters(environment.parse(source)))


def _watched(name: str, function: Any, *, shallow: bool = False) -> Any:
    """The filter or test `name`, which refuses what is too much for it, or what it would make too large."""
    rule = RULES.get(name)
    place = int(hasattr(function, "jinja_pass_arg"))  # such a function is passed an object of Jinja's first

    @wraps(function)  # with the mark of what it is passed first
    def watched(*args: Any, **kwargs: Any) -> Any:
        value, rest = args[place] if len(args) > place else None, args[place + 1 :]
        if name in ("join", "sum"):
            value = _listed(value)
            args = (*args[:place], value, *rest)
        _weigh(*(rest if shallow else args[place:]), *kwargs.values())
        if rule is not None:
            rule(value, rest, kwargs)
        return function(*args, **kwargs)

    return watched


def _concatenated(values: list[Any]) -> str:
    _weigh(values)
    return "".join(map(str, values))


def _weighed(value: Any) -> Any:
    if type(value) is not str:
        _weigh(value)
    return value


def _iterated(value: Any) -> Any:
    if isinstance(value, str) and len(value) > ITEMS:
        raise OverflowError(f"{len(value):,} characters are too many to be taken one by one")
    return value


def _listed(value: Any) -> Any:
    """What can be looked through once only, as a list."""
    return _iterated(value) if isinstance(value, str | bytes | Mapping | Sequence) else [*value]


def _weigh(*values: Any) -> int:
    """The characters and items of values as they would be written, or compared.

    Raises OverflowError where these are too many, for a number that is too large, and for a namespace, which is none.
    """
    weight, pending = 0, [*values]
    while pending:
        value = pending.pop()
        kind = type(value)
        if kind is str:
            weight += len(value)
        elif kind is list or kind is tuple:
            weight += EACH * len(value)
            pending += value
        elif isinstance(value, Mapping):
            weight += 2 * EACH * len(value)
            pending += value.keys()
            pending += value.values()
        elif isinstance(value, int):
            if value.bit_length() > BITS:
                raise OverflowError("a number is too large")
        elif isinstance(value, str | bytes):
            weight += len(value)
        elif isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            weight += EACH * len(value)
            pending += value
        elif value is not None and _is_namespace(value):
            raise OverflowError("a namespace can't be written or compared")
        if weight > CHARACTERS:
            raise OverflowError(f"more than {CHARACTERS:,} characters, or {ITEMS:,} items, are too many")
    return weight


def _is_namespace(value: Any) -> bool:
    from jinja2.utils import Namespace

    return isinstance(value, Namespace)


def _depth(value: Any) -> int:
    """How deep a value is nested that `_weigh` has let pass."""
    depth, level = 0, [value]
    while level:
        inner = [each.values() if isinstance(each, Mapping) else each for each in level]
        level = [
            item for each in inner if not isinstance(each, str | bytes) and hasattr(each, "__len__") for item in each
        ]
        depth += 1
    return depth


def _refuse_operator(operator: str, left: Any, right: Any) -> None:
    """Refuses an operation that would make too much, or take too long."""
    texts = str | bytes
    if operator == "%" and isinstance(left, texts):
        _weigh(right)
        _refuse_formatted(left, right if isinstance(right, tuple) else (right,), {})
        return
    for number in (left, right):
        if isinstance(number, int):
            _weigh(number)
    if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > BITS:
        raise OverflowError(f"a power of {right} is too large")
    if operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, texts | list | tuple) and isinstance(times, int) and len(text) * times > _most(text):
                raise OverflowError(f"{len(text)} characters or items {times} times are too many")
    if operator == "+":
        for kind in (str, bytes, list, tuple):
            if isinstance(left, kind) and isinstance(right, kind) and len(left) + len(right) > _most(left):
                raise OverflowError(f"{len(left) + len(right):,} characters or items are too many")


def _most(value: Any) -> int:
    return CHARACTERS if isinstance(value, str | bytes) else ITEMS


# Rules of methods and filters, which are given the value, and what is passed with it


def _sizes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """The largest number that is passed, and the length of the longest text."""
    passed = (*args, *kwargs.values())
    widest = max((abs(each) for each in passed if isinstance(each, int)), default=0)
    return widest, max((len(each) for each in passed if isinstance(each, str | bytes)), default=0)


def _refuse(grows: bool, what: str) -> None:
    if grows:
        raise OverflowError(what)


def _refuse_padded(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    text = value if isinstance(value, str) else value.decode("latin-1") if isinstance(value, bytes) else ""
    parts = 1 + text.count("\n") + text.count("\t")
    _refuse(max(_sizes(args, kwargs)) * parts > CHARACTERS, "it is padded with too much")


def _refuse_rows(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    _refuse(_sizes(args, kwargs)[0] > ITEMS, "it is padded with too much")
    _iterated(value)


def _refuse_formatted(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    passed = [*args, *kwargs.values()]
    fields = text.count("%") + text.count("{")
    _refuse(fields > LINKS, "a format has too many fields")
    runs = [run for found in PERCENT_WIDTHS.findall(text) for run in found]
    runs += [run for spec in BRACED.findall(text) for run in NUMBERS.findall(spec)]
    if GIVEN_WIDTH.search(text.replace("{{", "")):
        _refuse(any(isinstance(each, Mapping | list | tuple) for each in passed), "a width is in a list of values")
        given = [run for each in passed if isinstance(each, int | str) for run in NUMBERS.findall(str(each))]
        runs += NUMBERS.findall(text) + given * fields
    width = sum(int(run) if len(run) < 10 else CHARACTERS for run in runs if run)
    _refuse(width + fields * (_weigh(passed) + 1) > CHARACTERS, "a format makes too much of a text")


def _refuse_replaced(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    text, passed = value if isinstance(value, bytes) else str(value), [*args, *kwargs.values()]
    if len(passed) > 1:
        old = passed[0] if isinstance(passed[0], bytes) else str(passed[0])
        _refuse(text.count(old) * _weigh(passed[1]) > CHARACTERS, "replace makes too much of a text")  # type: ignore[arg-type]


def _refuse_translated(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    table = args[0] if args else {}
    longest = max(map(_weigh, table.values()), default=0) if isinstance(table, Mapping) else 1
    _refuse(isinstance(value, str) and len(value) * longest > CHARACTERS, "translate makes too much of a text")


def _refuse_joined(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Of the filter and of the method: the values are what has items, what is between them the other one."""
    between, values = (args[0], value) if args else (kwargs.get("d", ""), value)
    if isinstance(value, str | bytes) and args and not isinstance(args[0], str | bytes):
        between, values = value, args[0]
    size = len(values) if hasattr(values, "__len__") else 0
    _refuse(_weigh(values) + size * _weigh(between) > CHARACTERS, "join makes too much of a text")


def _refuse_summed(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    start = [each for each in (*args, *kwargs.values()) if isinstance(each, list | tuple)]
    _refuse(bool(start) and len(value) * (_weigh(value) + _weigh(start)) > STEPS, "it adds up too many lists")


def _refuse_json(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    widest, longest = _sizes(args, kwargs)
    indent, items = max(widest, longest), _weigh(value) // EACH + 1
    pairs = [len(str(each)) for each in (*args, *kwargs.values()) if isinstance(each, list | tuple)]
    _refuse(indent > DEEPEST or items * sum(pairs) > CHARACTERS, "tojson makes too much of a value")
    _refuse(indent > 0 and items * indent * _depth(value) > CHARACTERS, "tojson makes too much of a value")


def _refuse_pieces(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if isinstance(value, str | bytes):
        mark = next((each for each in (*args, *kwargs.values()) if isinstance(each, str | bytes)), None)
        pieces = value.count(mark) if mark else len(value) // 2  # type: ignore[arg-type]
        _refuse(pieces > ITEMS, "it is split into too many parts")


def _refuse_searched(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """From the end, each place is compared with all that is looked for."""
    if isinstance(value, str | bytes):
        _refuse(len(value) * _sizes(args, kwargs)[1] > STEPS, "the text that is looked for is too long")
        _refuse_pieces(value, args, kwargs)


def _refuse_stripped(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    size = len(value) if isinstance(value, str | bytes) and (args or kwargs) else 0
    _refuse(bool(size) and size * _sizes(args, kwargs)[1] > STEPS, "the characters that are stripped are too many")


def _refuse_rounded(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    _refuse(_sizes(args, kwargs)[0] > DIGITS, f"a number can be rounded to {DIGITS} places at most")


def _refuse_lines(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    _refuse(_weigh(value) > LINES, f"a text of more than {LINES:,} characters is too long for this filter")


def _refuse_links(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    _refuse(_weigh(value) > LINKS, f"a text of more than {LINKS:,} characters is too long for this filter")


def _refuse_spread(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for each in (value, *args):
        _iterated(each)


def _refuse_dates(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    _refuse(_sizes(args, kwargs)[1] > LINKS, "a format of dates is too long")


Rule = Callable[[Any, Sequence[Any], Mapping[str, Any]], None]
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "truncate", "to_bytes"), _refuse_padded
    ),
    **dict.fromkeys(("batch", "slice"), _refuse_rows),
    **dict.fromkeys(("format", "format_map"), _refuse_formatted),
    **dict.fromkeys(("split", "splitlines"), _refuse_pieces),
    **dict.fromkeys(("rfind", "rindex", "rsplit", "rpartition"), _refuse_searched),
    **dict.fromkeys(("strip", "lstrip", "rstrip", "trim"), _refuse_stripped),
    **dict.fromkeys(
        ("decode", "encode", "pprint", "striptags", "title", "unescape", "wordwrap", "xmlattr"), _refuse_lines
    ),
    **dict.fromkeys(("list", "sort", "unique", "min", "max", "groupby", "fromkeys", "random"), _refuse_spread),
    "join": _refuse_joined,
    "replace": _refuse_replaced,
    "round": _refuse_rounded,
    "strftime_now": _refuse_dates,
    "sum": _refuse_summed,
    "tojson": _refuse_json,
    "translate": _refuse_translated,
    "urlize": _refuse_links,
}
"""What else is refused of a method or a filter, besides too much that it is given."""


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
    taken = _taken_by(thread)
    deadline, most = taken() + SECONDS, _resident() + MEMORY

    def begin_anew() -> None:
        nonlocal deadline, most
        deadline, most = taken() + SECONDS, _resident() + MEMORY

    def stop(error: Any) -> None:
        # The one way to end a loop in Python code from outside of it, in whichever thread it runs.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)

    def watch() -> None:
        with lock:
            while not over and (left := deadline - taken()) > 0 and _resident() <= most:
                lock.wait(min(left, WATCHED))
            while not over:
                stop(ctypes.py_object(TooLong))
                lock.wait(AGAIN)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield begin_anew
    finally:
        while not over:
            with suppress(TooLong), lock:
                over = True
                stop(None)  # one that is still to come would come to what follows
                lock.notify()


def _taken_by(thread: int) -> Callable[[], float]:
    """Seconds that a thread was on a core: not those in which it was stopped, or others had its core. Where nobody says
    (macOS, Windows), those that have passed."""
    clock_of = getattr(time, "pthread_getcpuclockid", None)
    return partial(time.clock_gettime, clock_of(thread)) if clock_of is not None else time.monotonic


def _resident() -> int:
    """Bytes of this process in main memory; 0 where nobody says."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
