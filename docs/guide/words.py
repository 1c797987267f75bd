"""The words within the guide's code: comments, printed lines and labels of plots, in the language of the learner.

Only words change. The table `docs/guide/zh-TW/words.txt` has the source text of a string or a comment, its translation
in the next line, and an empty line after both; `=` for one that stays as it is. Docstrings have one line therefore.

    f"{right} of {count} right"
    f"{count} 題裡答對 {right} 題"
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SAME = "="
PLOTTED = {"label", "title", "xlabel", "ylabel"}
WORD = re.compile(r"[A-Za-z]{3,}")
WORDS = re.compile(r"[A-Za-z]{2,}[,.:;]? +[A-Za-z]{2,}")
NAME = re.compile(r"\"\w+\"")
FIELD = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Literal:
    """A string, prefix and quotes included, or a comment; characters `start` to `stop` of the code."""

    text: str
    start: int
    stop: int
    comment: bool = False


def read_table(path: Path) -> dict[str, str]:
    """Translations by what they translate. Raises ValueError for a block that isn't two lines, and for a second one of
    the same text."""
    table: dict[str, str] = {}
    for block in path.read_text(encoding="utf-8").strip("\n").split("\n\n"):
        lines = block.strip("\n").split("\n")
        if len(lines) != 2:
            raise ValueError(f"{path.name}: expected a text and its translation, found {len(lines)} lines: {block!r}")
        if lines[0] in table:
            raise ValueError(f"{path.name} has this twice: {lines[0]}")
        table[lines[0]] = lines[0] if lines[1] == SAME else lines[1]
    return table


def literals(code: str) -> list[Literal]:
    """Strings and comments of `code`, in order. A string within a field of an f-string is a part of that f-string."""
    starts = [0]
    for line in code.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found, depth, opened = [], 0, 0
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        start, stop = (starts[row - 1] + column for row, column in (token.start, token.end))
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_START":  # from Python 3.12 on, an f-string comes in pieces
            opened = opened if depth else start
            depth += 1
        elif name == "FSTRING_END":
            depth -= 1
        if depth == 0 and name in ("STRING", "FSTRING_END", "COMMENT"):
            begin = opened if name == "FSTRING_END" else start
            found.append(Literal(text=code[begin:stop], start=begin, stop=stop, comment=name == "COMMENT"))
    return found


def localized(code: str, table: Mapping[str, str]) -> str:
    """`code` with the words of `table`. A single word, which may be a key of something, is translated only where it is
    read."""
    pieces, at = [], 0
    for literal in translatable(code):
        pieces += [code[at : literal.start], table.get(literal.text, literal.text)]
        at = literal.stop
    return "".join([*pieces, code[at:]])


def translatable(code: str) -> list[Literal]:
    """The literals that `localized` looks up: all but single words that may be a key of something."""
    read = {literal.start for literal in _read(code)}
    return [literal for literal in literals(code) if literal.start in read or not NAME.fullmatch(literal.text)]


def shown(code: str) -> list[str]:
    """The literals that a learner reads: comments, docstrings, and what is printed or written into a plot."""
    return list(dict.fromkeys(literal.text for literal in _read(code)))


def _read(code: str) -> Iterator[Literal]:
    spans = list(_spans_of_words(code))
    for literal in literals(code):
        bare = FIELD.sub("", literal.text)
        inside = [single for start, stop, single in spans if start <= literal.start and literal.stop <= stop]
        if literal.comment:
            if WORD.search(bare):
                yield literal
        elif inside and (WORD if any(inside) or literal.text.startswith("f") else WORDS).search(bare):
            yield literal


def _spans_of_words(code: str) -> Iterator[tuple[int, int, bool]]:
    """Where `code` has what is read: from, to, and whether a single word there is one to translate."""
    lines = code.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def offset(row: int, column: int) -> int:
        return starts[row - 1] + len(lines[row - 1].encode()[:column].decode())

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        return offset(node.lineno, node.col_offset), offset(int(node.end_lineno or 0), int(node.end_col_offset or 0))

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield (*span(node), False)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in PLOTTED:
                    yield (*span(keyword.value), True)
        elif isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            yield (*span(node.body[0]), True)


def shape(code: str) -> str:
    """What `code` does but for its words: two codes of one shape differ in strings and comments only, and f-strings in
    the order and the format of their fields."""
    return ast.dump(_Wordless().visit(ast.parse(code)))


class _Wordless(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.JoinedStr:
        fields = [self.visit(value) for value in node.values if isinstance(value, ast.FormattedValue)]
        return ast.JoinedStr(sorted(fields, key=ast.dump))

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.FormattedValue:
        return ast.FormattedValue(self.visit(node.value), node.conversion)  # a width is of the words beside it
