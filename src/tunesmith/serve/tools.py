"""Tool calls in the text of an answer, where the chat template settles how they are written."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunesmith.data.sandbox import time_limit
from tunesmith.model.generate import PLAIN

OPENING = "<tool_call>"
BLOCK = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
PROBE: dict[str, Any] = {"name": "probe_the_weather", "arguments": {"city": "Lima"}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": PROBE["name"],
        "description": "The weather of today.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """`arguments` is JSON text, as the interface has it."""

    name: str
    arguments: str


def writes_blocks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a call as a JSON object between `<tool_call>` and `</tool_call>`, the format of
    Hermes and Qwen, and the tokenizer gives these back when it decodes."""
    turns: list[Any] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": PROBE}]},
    ]
    try:
        with time_limit():
            text = tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception:  # a template may fail in any way on what it was not made for
        return False
    found = [_call(match[1], {PROBE["name"]}) for match in BLOCK.finditer(str(tokenizer.decode(ids, **PLAIN)))]
    return any(call is not None and json.loads(call.arguments) == PROBE["arguments"] for call in found)


def split_calls(text: str, names: Collection[str]) -> tuple[str, list[Call]]:
    """The text before the calls, and the calls. Where anything is not as it must be, a name that is none of `names`
    or text behind a call, all is text."""
    start = text.find(OPENING)
    if start < 0 or BLOCK.sub("", text[start:]).strip():
        return text, []
    calls = [_call(match[1], names) for match in BLOCK.finditer(text, start)]
    certain = [call for call in calls if call is not None]
    if len(certain) < len(calls):
        return text, []
    return text[:start], certain


def _call(source: str, names: Collection[str]) -> Call | None:
    try:
        value = json.loads(source)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        return None
    if not isinstance(value["arguments"], dict) or not isinstance(value["name"], str) or value["name"] not in names:
        return None
    return Call(name=value["name"], arguments=json.dumps(value["arguments"], ensure_ascii=False))


def reads_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template tells the model of the tools that it is given."""
    turns = [{"role": "user", "content": "Hello"}]
    tool: list[Any] = [TOOL]
    try:
        with time_limit():
            texts = [tokenizer.apply_chat_template(turns, tools=tools, tokenize=False) for tools in (None, tool)]
    except Exception:  # as above
        return False
    return texts[0] != texts[1]
