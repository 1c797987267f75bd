"""Values from YAML or the command line to the type that a setting has."""

import re
import sys
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from tunesmith.errors import TunesmithError, nearest
from tunesmith.text import shorten

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_RANK = (NoneType, bool, int, float, Literal, Enum, dict, list, str)
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object {key: value}",
    list: "a list",
    str: "text",
    NoneType: "null",
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


LARGEST = 1_000_000
"""Values of a YAML document, each counted as often as it is named."""
MOST_WRITTEN = 50_000
"""Values of a recipe, each counted once. Reading so many takes seconds."""
DIGITS = 1000
"""Characters of a number. Reading one takes as long as the square of them."""


NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class FiniteLoader(yaml.SafeLoader):
    """Safe YAML whose values are no more than it seems: names of names (`&a`, `*a`) may make a few lines endless. All
    that is wrong with it is a YAMLError or a RecursionError."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """What makes a value of a type may fail as it likes where the type was written before it, as in `!!bool x`."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind, text = node.tag.rpartition(":")[2], shorten(str(node.value))
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} is no {kind}", node.start_mark) from error

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _count(node, {}) > LARGEST:
            raise yaml.constructor.ConstructorError(
                None, None, f"with all that its aliases stand for, it has more than {LARGEST:,} values", node.start_mark
            )
        return node


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """The values of a node. `counts` has those that are known, and None for those that are being counted."""
    key = id(node)
    if key not in counts:
        counts[key] = None
        if node.tag in NUMBER_TAGS and len(node.value) > DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of more than {DIGITS:,} characters", node.start_mark
            )
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        counts[key] = 1 + sum(_count(part, counts) for part in parts)
    if (count := counts[key]) is None:
        raise yaml.constructor.ConstructorError(None, None, "a value is part of itself", node.start_mark)
    return count


class UniqueKeyLoader(FiniteLoader):
    """Such YAML as a recipe: a key that is given twice is an error, not a quiet override, and so are too many
    values."""

    written = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.written += 1
        if self.written > MOST_WRITTEN:
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, f"it has more than {MOST_WRITTEN:,} values", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # `!!map` may stand before anything
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def coerce(value: Any, kind: Any) -> Any:
    """`value`, from YAML or the command line, as the type `kind`: a builtin, Literal, Enum (its value, as text), dict,
    list, or a union of them, of which the first that fits is taken, text last.

    `coerce("2e-5", float)` is 2e-5, `coerce("none", int | None)` is None, `coerce(False, SaveStrategy | str)` is "no"
    (YAML's reading of a bare `no`). Raises ValueError that says what was found and expected.
    """
    members = members_of(kind)
    for member in members:
        if isinstance(value, str) and str in members:  # may be meant as text: `report_to: none`, a name with a comma
            is_list = get_origin(member) is list and not value.lstrip().startswith("[")
            if is_list or (member is NoneType and value == "none"):
                continue
        try:
            return _as(value, member)
        except ValueError:
            continue
    quote = "; put it in quotes" if members[-1] is str and not isinstance(value, str | list | dict) else ""
    hint = nearest(value, _choices_of(kind)) if isinstance(value, str) else ""
    raise ValueError(f"is {described(value)}, expected {expected(kind)}{quote}{hint}")


def columns_of(text: str) -> dict[str, str]:
    """`--columns`, our names of columns to the data's: `ours=theirs,...`, or an object as in a recipe.

    Raises TunesmithError for what is neither.
    """
    try:
        return dict(coerce(text, dict[str, str]))
    except ValueError as error:
        raise TunesmithError(
            f"--columns {text}: write ours=yours,... such as instruction=question,output=answer, or an object "
            "{instruction: question, output: answer}"
        ) from error


def expected(kind: Any) -> str:
    """What a value of the type `kind` looks like, in words."""
    choices = _choices_of(kind)
    words = [" | ".join(map(str, choices))] if choices else []
    origins: list[Any] = [get_origin(member) or member for member in members_of(kind)]
    words += [_NAMES[origin] for origin in _NAMES if origin in origins]
    return " or ".join(words) or "nothing: it is for scripts only"


def members_of(kind: Any) -> list[Any]:
    """The types of a union in the order in which they are tried. Text beside an Enum means the Enum's values."""
    members = list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]
    if any(_is_enum(member) for member in members):
        members = [member for member in members if member is not str]
    origins = {member: Enum if _is_enum(member) else get_origin(member) or member for member in members}
    ranks = {member: _RANK.index(origin) if origin in _RANK else len(_RANK) for member, origin in origins.items()}
    return sorted(members, key=ranks.__getitem__)


def _is_enum(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, Enum)


def _choices_of(kind: Any) -> list[Any]:
    choices: list[Any] = []
    for member in members_of(kind):
        choices += [item.value for item in member] if _is_enum(member) else []
        choices += get_args(member) if get_origin(member) is Literal else []
    return choices


def _as(value: Any, member: Any) -> Any:
    """`value` as one type that is no union; raises ValueError when it isn't one."""
    origin = get_origin(member) or member
    if _is_enum(member) or origin is Literal:
        choices = _choices_of(member)
        value = "no" if value is False and "no" in choices else value
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
    elif origin is NoneType:
        if value is None or (isinstance(value, str) and value.lower() in ("null", "none", "~")):
            return None
    elif origin is bool:
        if isinstance(value, bool) or (isinstance(value, str) and value.lower() in BOOLEANS):
            return value if isinstance(value, bool) else BOOLEANS[value.lower()]
    elif origin in (int, float):
        return _number(value, whole=origin is int)
    elif origin in (dict, list):
        return _collection(value, origin, get_args(member))
    elif origin is str and isinstance(value, str):
        return value
    raise ValueError


def _number(value: Any, *, whole: bool) -> int | float:
    """A number or its text; whole numbers stay int where a float is wanted: `save_steps` 500, not 500.0."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError
    if not whole and isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError
    if not whole or isinstance(value, int):
        return value
    if not value.is_integer():
        raise ValueError
    return int(value)


def _collection(value: Any, origin: type, kinds: tuple[Any, ...]) -> Any:
    """A dict or a list with members of `kinds`, or the same as YAML in text; `a,b` is a list, too, and `a=b,c=d` a dict
    of texts."""
    if isinstance(value, str):
        opening = "{" if origin is dict else "["
        if value.lstrip().startswith(opening):
            try:
                value = yaml.load(value, UniqueKeyLoader)
            except (yaml.YAMLError, RecursionError) as error:
                raise ValueError from error
        elif origin is list:
            value = [item.strip() for item in value.split(",")]
        elif kinds == (str, str):
            parts = [[text.strip() for text in item.split("=", 1)] for item in value.split(",")]
            if all(len(part) == 2 and all(part) for part in parts) and len({part[0] for part in parts}) == len(parts):
                value = dict(parts)
    if not isinstance(value, dict | list) or type(value) is not origin:
        raise ValueError
    if not kinds or kinds[-1] is Any:
        return value
    if isinstance(value, list):
        return [coerce(item, kinds[0]) for item in value]
    return {coerce(key, kinds[0]): coerce(item, kinds[1]) for key, item in value.items()}


def described(value: Any) -> str:
    """A value as it was written, shortened, with its type in words."""
    kind = "an object" if isinstance(value, dict) else _NAMES.get(type(value), f"a {type(value).__name__}")
    return "null" if value is None else f"{shorten(repr(value))} ({kind})"


def byte_count(text: str) -> int:
    """Bytes of a size such as "2GB" (10^9), "1.5 GiB" (2^30) or "500MB". Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    count = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if count < 1:
        raise ValueError(f"is {text!r}; write for example 2GB or 500MB")
    return count
