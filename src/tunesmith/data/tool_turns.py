"""Turns with tool calls: how they are found in the text of an answer, and what the chat template writes behind them.

    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>     the model's turn
    \\n<|im_start|>user\\n<tool_response>1</tool_response><|im_end|>\\n<|im_start|>assistant\\n    what follows it

Calls are found where the template settles how they are written: as a JSON object between `<tool_call>` and
`</tool_call>`, the format of Hermes and Qwen.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.prompts import shown_ids, shown_text
from tunesmith.data.sandbox import rendered
from tunesmith.data.template import PROBES, ChatTemplate, reasoning_fields
from tunesmith.errors import TunesmithError
from tunesmith.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """`arguments` is JSON text, as OpenAI's interface has it."""

    name: str
    arguments: str

    @property
    def message(self) -> dict[str, Any]:
        """The call as messages have it, with its arguments as an object."""
        return {"type": "function", "function": {"name": self.name, "arguments": json.loads(self.arguments)}}


def writes_blocks(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template writes a call as a JSON object between `<tool_call>` and `</tool_call>`, and the
    tokenizer gives these back when it decodes."""
    turns: list[Any] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": PROBE}]},
    ]
    try:
        text = rendered(tokenizer, turns, tools=[TOOL])
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    except Exception:  # a template may fail in any way on what it was not made for
        return False
    calls = [_call(match[1], {PROBE["name"]}) for match in BLOCK.finditer(text)]
    return any(call is not None and json.loads(call.arguments) == PROBE["arguments"] for call in calls)


def reads_tools(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template tells the model of the tools that it is given."""
    turns = [{"role": "user", "content": "Hello"}]
    tool: list[Any] = [TOOL]
    try:
        texts = [rendered(tokenizer, turns, tools=tools) for tools in (None, tool)]
    except Exception:  # as above
        return False
    return texts[0] != texts[1]


def split_calls(text: str, names: Collection[str] | None = None) -> tuple[str, list[Call]]:
    """The text before the calls, and the calls. Where anything is not as it must be, a name that is none of `names`
    or text behind a call, all is text. Without `names`, any name is one."""
    start = text.find(OPENING)
    if start < 0 or BLOCK.sub("", text[start:]).strip():
        return text, []
    calls = [_call(match[1], names) for match in BLOCK.finditer(text, start)]
    certain = [call for call in calls if call is not None]
    if len(certain) < len(calls):
        return text, []
    return text[:start], certain


def _call(source: str, names: Collection[str] | None) -> Call | None:
    try:
        value = json.loads(source)
        json.dumps(value, ensure_ascii=False).encode()  # halves of characters can't be written
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        return None
    name, arguments = value["name"], value["arguments"]
    if not isinstance(arguments, dict) or not isinstance(name, str) or (names is not None and name not in names):
        return None
    return Call(name=name, arguments=json.dumps(arguments, ensure_ascii=False))


class ToolTurns:
    """Reads the calls in answers, and writes the tokens that follow them, by the chat template of a tokenizer.

    `stops` are the tokens that end an answer, `arguments` those of the template. Raises TunesmithError, which names the
    template, where it has no place for tools, writes calls in another form, or does not render a conversation as the
    beginning of a longer one.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[int], arguments: Mapping[str, Any] | None = None
    ) -> None:
        check_tool_template(tokenizer)
        self._tokenizer, self._arguments = tokenizer, dict(arguments or {})
        texts = [str(tokenizer.convert_ids_to_tokens(stop)) for stop in stops]
        self._stop = re.compile("|".join(map(re.escape, texts)))
        self._style = ChatTemplate(tokenizer, arguments).call_style
        probes = [Call(name=PROBE["name"], arguments="{}")] * 2
        self._reasoning: Mapping[str, Any] = {}
        try:
            self.behind(probes[:1], [PROBES[1]])
        except TunesmithError:
            # Qwen 3 and others write an empty block of reasoning into a last turn only.
            self._reasoning = reasoning_fields("...")
            self.behind(probes[:1], [PROBES[1]])
        try:
            self.behind(probes, [PROBES[1]] * 2)
        except TunesmithError:
            self._most = 1
        else:
            self._most = 0

    def split(self, text: str) -> tuple[str, list[Call]]:
        """The text before the calls of a turn, and the calls. More than the template can show are text."""
        before, calls = split_calls(text)
        return (text, []) if self._most and len(calls) > self._most else (before, calls)

    def behind(self, calls: Sequence[Call], results: Sequence[str]) -> list[int]:
        """The tokens between the end of a turn with `calls` and the next answer: their results, and the generation
        prompt. Text of a result that reads as a control token is ordinary text.

        They are those by which the rendering of a small conversation with such a turn grows.
        """
        # The argument is looked for in the text: it must be there nowhere else.
        shown = self._style.calls([call.message | {"function": _probed(call)} for call in calls])
        asked = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": self._style.content, **self._reasoning, "tool_calls": shown},
        ]
        answered = [
            self._style.result({"role": "tool", "name": call.name, "content": result}, one)
            for call, result, one in zip(calls, results, shown, strict=True)
        ]
        try:
            before = shown_text(self._tokenizer, asked, self._arguments, ask=False)
            whole = shown_text(self._tokenizer, [*asked, *answered], self._arguments)
        except Exception as error:  # a template is a program: whatever it raises, it refuses
            raise TunesmithError(
                f"{_template(self._tokenizer)} refuses {counted(len(calls), 'call')} and what is returned: {error}; "
                "take another one (chat_template_path)"
            ) from error
        said = before.rfind(PROBES[0])
        end = self._stop.search(before, said)
        # As in GLM, where the header of the next message is what ends this one.
        end = end or (self._stop.match(whole, len(before)) if whole.startswith(before) else None)
        ids = shown_ids(self._tokenizer, whole)
        start = [] if end is None else shown_ids(self._tokenizer, whole[: end.end()])
        kept = end is not None and whole.startswith(before[: end.end()]) and ids[: len(start)] == start
        if said < 0 or not kept:
            raise TunesmithError(
                f"{_template(self._tokenizer)} renders a turn with a call in another form once its result follows, so "
                "that the tokens between them can't be told; take one that renders both alike (chat_template_path)"
            )
        return ids[len(start) :]


def _probed(call: Call) -> dict[str, Any]:
    return {"name": call.name, "arguments": {"key": PROBES[0]}}


def check_tool_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises TunesmithError where the chat template has no place for tools, or calls can't be found in answers."""
    if not reads_tools(tokenizer):
        raise TunesmithError(
            f"tools are given, and {_template(tokenizer)} has no place for them; set chat_template_path to one that "
            "shows tools, or take a model that was trained with them"
        )
    if not writes_blocks(tokenizer):
        raise TunesmithError(
            f"tools are given, and {_template(tokenizer)} does not write a call as a JSON object between <tool_call> "
            "and </tool_call>, so that calls can't be found in answers; set chat_template_path to one that does, as "
            "those of Hermes and Qwen 2.5 and 3"
        )


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return "the chat template" + (f" of {name}" if name else "")
