"""Functions that the model may call while it answers: it draws a turn, they are called, and it draws on.

    prompt | a turn with calls | results, generation prompt | a turn with calls | results ... | the last turn
             ~~~~~~~~~~~~~~~~~                                ~~~~~~~~~~~~~~~~~                 ~~~~~~~~~~~~~

What is underlined is the model's, and is trained. Tokens stay as they were drawn: what stands between two turns is
added behind them, and nothing is tokenized anew.
"""

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.utils.chat_template_utils import get_json_schema

from tunesmith.data.call_syntax import Call
from tunesmith.data.tool_turns import ToolTurns
from tunesmith.errors import TunesmithError
from tunesmith.model.generate import Sampling
from tunesmith.runs.record import prompt_text
from tunesmith.train.generator import Finish, Generated, Generator, draw, seed_of, text_of
from tunesmith.train.rewards import imported


class Tools:
    """Functions by name, and their JSON schemas, which type hints and docstrings say.

    Raises TunesmithError for what is no function, for one without hints or a docstring, and for two of one name.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}
        self.schemas: list[dict[str, Any]] = []
        if not isinstance(given, list | tuple):
            raise TunesmithError(f"tools is {given!r}; write a list of functions")
        for one in given:
            function = imported(one, "tools") if isinstance(one, str) else one
            if not callable(function):
                raise TunesmithError(f"tools has {function!r}; give functions, or `module:function` in a recipe")
            try:
                schema = get_json_schema(function)
            except Exception as error:
                name = getattr(function, "__name__", function)
                raise TunesmithError(
                    f"tools: {name} can't be shown to the model: {error}. Write type hints, and a docstring with what "
                    "it does and, below `Args:`, a line for each argument"
                ) from error
            name = schema["function"]["name"]
            if name in self.functions:
                raise TunesmithError(f"tools has two functions called {name!r}; rename one of them")
            self.functions[name] = function
            self.schemas.append(schema)

    def run(self, calls: Sequence[Call]) -> list["Outcome"]:
        """What the calls return, in their order; those of `async` functions are under way together. What fails has the
        text of the error in its place."""
        values = [self._value(call) for call in calls]
        later = [i for i, value in enumerate(values) if inspect.isawaitable(value)]
        if later:
            with ThreadPoolExecutor(1) as pool:  # a notebook's thread has a loop that runs already
                outcomes = pool.submit(asyncio.run, _together([values[i] for i in later])).result()
            for i, value in zip(later, outcomes, strict=True):
                values[i] = value
        return [_outcome(value) for value in values]

    def _value(self, call: Call) -> Any:
        try:
            if call.name not in self.functions:
                raise ValueError(f"Tool {call.name} not found.")
            return self.functions[call.name](**json.loads(call.arguments))
        except Exception as error:
            return error


def tools_of(args: Any, given: Any = None) -> Tools:
    """The functions that a trainer is given, or those of its config; there may be none.

    Raises TunesmithError as `Tools` does, and for settings that don't go with them.
    """
    tools = Tools(given if given is not None else args.tools or [])
    most = args.max_tool_calling_iterations
    if not tools.functions and most is not None:
        raise TunesmithError(
            f"max_tool_calling_iterations is {most}, and there are no tools; give some, or leave it out"
        )
    if tools.functions and args.use_vllm:
        raise TunesmithError(
            "use_vllm is True, and tools are given: each answer has another number of tokens left behind its results, "
            "and a request to the server has one limit for all; leave use_vllm out"
        )
    return tools


async def _together(values: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*values, return_exceptions=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The text of a result, or of the error where the call `failed`."""

    text: str
    failed: bool


def _outcome(value: Any) -> Outcome:
    failed = isinstance(value, BaseException)
    try:
        text = str({"error": str(value)} if failed else value)
    except Exception as error:
        text, failed = str({"error": str(error)}), True
    return Outcome(text=text.encode("utf-8", "replace").decode(), failed=failed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk(Generated):
    """An answer of several turns: `ids` are theirs and what stands between them, of which `own` says whether the model
    drew it. `messages` are the assistant's and the tools', `text` is all of them. `calls` were made, of which
    `failures` failed."""

    own: list[bool]
    messages: list[dict[str, Any]]
    text: str
    calls: int
    failures: int


@dataclass(kw_only=True, slots=True)
class _Open:
    """An answer that is being drawn, its turns by seeds that `seed` makes. `wanted` are the calls of its last turn."""

    prompt: list[int]
    seed: int | None
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish = "length"
    messages: list[dict[str, Any]] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)
    wanted: list[Call] = field(default_factory=list)
    calls: int = 0
    failures: int = 0

    def add(self, ids: Sequence[int], logprobs: Sequence[float] | None, *, own: bool) -> None:
        self.ids += ids
        self.own += [own] * len(ids)
        self.logprobs += [torch.nan] * len(ids) if logprobs is None else logprobs

    @property
    def closed(self) -> Talk:
        return Talk(
            ids=self.ids,
            finish=self.finish,
            logprobs=self.logprobs,
            own=self.own,
            messages=self.messages,
            text=prompt_text(tuple(self.shown)) if len(self.shown) > 1 else self.shown[0]["content"],
            calls=self.calls,
            failures=self.failures,
        )


class Conversing:
    """Draws answers with a generator, turn by turn, and calls `tools` in between: until a turn has no call, functions
    were called `most` times one after another, or there is no room for their results and a further token.

    `room` is how many tokens prompt and answer may have together, None where there is no limit.
    """

    def __init__(self, tools: Tools, turns: ToolTurns, tokenizer: Any, *, most: int | None, room: int | None) -> None:
        self._tools, self._turns, self._tokenizer, self._most, self._room = tools, turns, tokenizer, most, room

    def __call__(self, generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Talk]:
        """An answer to each prompt, in their order, of at most `sampling.max_new_tokens` with all that is between its
        turns."""
        longest, rounds = sampling.max_new_tokens, 0
        seeds: Sequence[int | None] = sampling.seeds or [None] * len(prompts)
        talks = [_Open(prompt=[*ids], seed=seed) for ids, seed in zip(prompts, seeds, strict=True)]
        drawing = talks
        while drawing:
            most = max(longest - len(talk.ids) for talk in drawing)
            asked = [talk.prompt + talk.ids for talk in drawing]
            own = [seed_of(talk.seed, rounds) for talk in drawing] if sampling.seeds else None
            turns = draw(generator, asked, replace(sampling, max_new_tokens=most, seeds=own))
            for talk, turn in zip(drawing, turns, strict=True):
                self._take(talk, turn, longest - len(talk.ids))
            if rounds == self._most:
                break
            drawing = self._call([talk for talk in drawing if talk.wanted], longest)
            rounds += 1
        return [talk.closed for talk in talks]

    def _take(self, talk: _Open, turn: Generated, left: int) -> None:
        """Adds what was drawn; what is more than is `left` is cut off."""
        if len(turn.ids) > left:
            logprobs = None if turn.logprobs is None else turn.logprobs[:left]
            turn = Generated(ids=turn.ids[:left], finish="length", logprobs=logprobs)
        text = text_of(self._tokenizer, turn)
        content, talk.wanted = self._turns.split(turn.ids[:-1]) if turn.finish == "stop" else (text, [])
        talk.add(turn.ids, turn.logprobs, own=True)
        talk.finish = turn.finish
        called = {"tool_calls": [call.message for call in talk.wanted]} if talk.wanted else {}
        talk.messages.append({"role": "assistant", "content": content, **called})
        talk.shown.append({"role": "assistant", "content": text})

    def _call(self, talks: Sequence[_Open], longest: int) -> list[_Open]:
        """Makes the calls of the last turns and adds their results, where there is room; gives the answers that go
        on."""
        outcomes = iter(self._tools.run([call for talk in talks for call in talk.wanted]))
        going = []
        for talk in talks:
            results = [next(outcomes) for _ in talk.wanted]
            talk.calls += len(results)
            talk.failures += sum(result.failed for result in results)
            between = self._turns.behind(talk.wanted, [result.text for result in results])
            size = len(talk.ids) + len(between)
            if size >= longest or (self._room is not None and len(talk.prompt) + size >= self._room):
                continue
            talk.add(between, None, own=False)
            told = [
                {"role": "tool", "name": call.name, "content": result.text}
                for call, result in zip(talk.wanted, results, strict=True)
            ]
            talk.messages += told
            talk.shown += told
            going.append(talk)
        return going
