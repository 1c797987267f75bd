"""Turns with tool calls: which calls an answer has, and what the chat template writes behind them.

    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>     the model's turn
    \\n<|im_start|>user\\n<tool_response>1</tool_response><|im_end|>\\n<|im_start|>assistant\\n    what follows it

What follows a turn is written, not drawn.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.data.call_syntax import TOOLS, Call, CallSyntax, syntax_of
from tunesmith.data.prompts import shown_ids, shown_text
from tunesmith.data.sandbox import rendered
from tunesmith.data.template import PROBES, ChatTemplate, reasoning_fields
from tunesmith.errors import TunesmithError
from tunesmith.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOOL = TOOLS[0]


def reads_tools(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template tells the model of the tools that it is given."""
    turns = [{"role": "user", "content": "Hello"}]
    tool: list[Any] = [TOOL]
    try:
        texts = [rendered(tokenizer, turns, tools=tools) for tools in (None, tool)]
    except Exception:  # as above
        return False
    return texts[0] != texts[1]


class ToolTurns:
    """Reads the calls in answers, and writes the tokens that follow them, by the chat template of a tokenizer.

    `stops` are the tokens that end an answer, `tools` the schemas of the functions, `arguments` those of the template.
    Raises TunesmithError, which names the template, where it has no place for tools, writes calls in a form that can't
    be read back, or does not render a conversation as the beginning of a longer one.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stops: Sequence[int],
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        check_tool_template(tokenizer)
        self._tokenizer, self._arguments = tokenizer, dict(arguments or {})
        texts = [str(tokenizer.convert_ids_to_tokens(stop)) for stop in stops]
        self._stop = re.compile("|".join(map(re.escape, texts)))
        self._syntax = _syntax(tokenizer, texts, arguments)
        template = ChatTemplate(tokenizer, arguments)
        self._style, self._special = template.call_style, template.special
        self._types = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in tools}
        probes = [Call(name=TOOL["function"]["name"], arguments="{}")] * 2
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

    def split(self, ids: Sequence[int]) -> tuple[str, list[Call]]:
        """The text before the calls of a turn without its end, and the calls. None is certain where there are more
        than the template can show."""
        text = str(self._tokenizer.decode([*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        before, calls = self._syntax.split(text, self._types)
        if self._most and len(calls) > self._most:
            before, calls = text, []
        return self._special.sub("", before), calls

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
    """Raises TunesmithError where the chat template has no place for tools."""
    if not reads_tools(tokenizer):
        raise TunesmithError(
            f"tools are given, and {_template(tokenizer)} has no place for them; set chat_template_path to one that "
            "shows tools, or take a model that was trained with them"
        )


def _syntax(
    tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str], arguments: Mapping[str, Any] | None
) -> CallSyntax:
    found = syntax_of(tokenizer, stops, arguments, specials=True)
    if found is None:
        raise TunesmithError(
            f"tools are given, and {_template(tokenizer)} does not write calls in a form that can be read back: a JSON "
            "object with name and arguments, a name and an object, or a name and marked arguments; set "
            "chat_template_path to one that does, as those of Qwen, Llama 3, Mistral, GLM"
        )
    return found


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return "the chat template" + (f" of {name}" if name else "")
