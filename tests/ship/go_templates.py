"""As much of Go's text/template as a Modelfile of ours has, to see what Ollama would make of it."""

import re
from dataclasses import dataclass
from typing import Any

Turns = list[dict[str, str]]
ACTION = re.compile(r"\{\{(.*?)\}\}(?!\})", re.DOTALL)
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+')
FUNCTIONS: dict[str, Any] = {
    "not": lambda value: not value,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "len": len,
    "slice": lambda values, start: values[start:],
}


@dataclass
class Block:
    """Pieces are texts, actions and blocks, in order; a branch begins a block's alternative."""

    head: str
    pieces: list[Any]


def ollama(template: str, turns: Turns) -> str:
    """What Ollama's `Execute` gives the model for a chat: consecutive turns of one role are joined before."""
    joined: Turns = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            joined[-1] = {"role": turn["role"], "content": f"{joined[-1]['content']}\n\n{turn['content']}"}
        else:
            joined.append(dict(turn))
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    root = {"System": system, "Messages": joined, "Response": ""}
    return _run(_parse(template), {"$": root, ".": root})


def _parse(template: str) -> list[Any]:
    stack: list[Block] = [Block("", [])]
    for number, piece in enumerate(ACTION.split(template)):
        action = piece.strip()
        if number % 2 == 0:
            stack[-1].pieces.append(("text", piece))
        elif action == "end":
            while stack[-1].head.startswith("else"):
                stack.pop()
            stack.pop()
        elif action.split()[0] in ("if", "range", "else"):
            block = Block(action, [])
            stack[-1].pieces.append(block)
            stack.append(block)
        else:
            stack[-1].pieces.append(("action", action))
    assert len(stack) == 1, f"{stack[-1].head} is not ended"
    return stack[0].pieces


def _run(pieces: list[Any], names: dict[str, Any]) -> str:
    text = ""
    for piece in pieces:
        if isinstance(piece, Block):
            text += _block(piece, names)
        elif piece[0] == "text":
            text += piece[1]
        elif assigned := re.match(r"(\$\w+) :?= (.*)", piece[1]):
            names[assigned[1]] = _value(assigned[2], names)
        else:
            text += str(_value(piece[1], names))
    return text


def _block(block: Block, names: dict[str, Any]) -> str:
    otherwise = [piece for piece in block.pieces if isinstance(piece, Block) and piece.head.startswith("else")]
    if loop := re.fullmatch(r"range (\$\w+), (\$\w+) := (.*)", block.head):
        text = ""
        before = names["."]
        for number, item in enumerate(_value(loop[3], names)):
            names |= {loop[1]: number, loop[2]: item, ".": item}
            text += _run(block.pieces, names)
        names["."] = before
        return text
    condition = block.head.removeprefix("else").strip().removeprefix("if").strip()
    if not condition or _value(condition, names):
        return _run([piece for piece in block.pieces if piece not in otherwise], names)
    return _block(otherwise[0], names) if otherwise else ""


def _value(expression: str, names: dict[str, Any]) -> Any:
    values: list[list[Any]] = [[]]
    for word in WORD.findall(expression):
        if word == "(":
            values.append([])
        elif word == ")":
            inner = _call(values.pop())
            values[-1].append(inner)
        else:
            values[-1].append(_atom(word, names))
    return _call(values[0])


def _call(values: list[Any]) -> Any:
    return values[0](*values[1:]) if callable(values[0]) else values[0]


def _atom(word: str, names: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return word[1:-1]
    if word in ("true", "false"):
        return word == "true"
    if word.isdigit():
        return int(word)
    if word in FUNCTIONS:
        return FUNCTIONS[word]
    start, *fields = word.split(".")
    value = names[start or "."]
    for field in fields:
        value = value[field] if field in value else value[field.lower()]
    return value
