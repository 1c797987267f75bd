"""What judges answers: functions of the user's, built-in checks, and models that score a text.

A function has TRL's signature: it is called once with lists, of which each has an item for each answer.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

None means that the reward does not apply to an answer. A function that is `async` runs beside the others that are.
"""

import asyncio
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from tunesmith.errors import TunesmithError, nearest
from tunesmith.objectives.checks import CHECKS, Completion, text_of
from tunesmith.text import shorten

RewardFunction: TypeAlias = Callable[..., Any]
Given: TypeAlias = str | nn.Module | RewardFunction
ROWS = 16
"""Texts at a time for a model that scores them."""
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What a function gets besides the columns of the rows."""
SHOWN = 200
"""Characters of an answer in an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """N answers that are to be judged: of each the `places` of its row, its prompt, what was answered, the answer's
    tokens, and the row."""

    places: Sequence[str]
    prompts: Sequence[Completion]
    completions: Sequence[Completion]
    ids: Sequence[Sequence[int]]
    rows: Sequence[Mapping[str, Any]]

    def part(self, index: int) -> "Asked":
        one = slice(index, index + 1)
        return Asked(
            places=self.places[one],
            prompts=self.prompts[one],
            completions=self.completions[one],
            ids=self.ids[one],
            rows=self.rows[one],
        )


class Rewards:
    """Judges answers with several rewards, in order; `names` are theirs, `weights` (R,) what each counts.

    Raises TunesmithError for a name that nothing has, and for weights of another number.
    """

    def __init__(
        self,
        given: Given | Sequence[Given] | Mapping[str, Mapping[str, Any] | None],
        *,
        weights: Sequence[float] | None = None,
        tokenizers: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:
        parts = [_resolved(*one) for one in _listed(given)]
        if not parts:
            raise TunesmithError("reward_funcs is empty; name at least one, such as exact_match")
        found = [*tokenizers] if isinstance(tokenizers, list | tuple) else [tokenizers] * len(parts)
        if len(found) != len(parts):
            raise TunesmithError(f"reward_processing_classes has {len(found)} items, and reward_funcs {len(parts)}")
        self._functions = [
            _Scorer(part, tokenizer, device) if isinstance(part, nn.Module) else part
            for part, tokenizer in zip(parts, found, strict=True)
        ]
        self.names = _distinct([_name(function) for function in self._functions])
        if weights is not None and len(weights) != len(parts):
            raise TunesmithError(
                f"reward_weights has {len(weights)} numbers, and reward_funcs {len(parts)} items; write one for each"
            )
        self.weights = torch.tensor([1.0] * len(parts) if weights is None else [*weights])

    def check(self, columns: Sequence[str]) -> None:
        """Raises TunesmithError where a reward reads a column that rows don't have."""
        for name, function in zip(self.names, self._functions, strict=True):
            wanted = [*getattr(function, "columns", ()), *_required(function)]
            for column in wanted:
                if column not in columns and column not in PASSED:
                    raise TunesmithError(
                        f"the reward {name} reads the column {column!r}, which the rows lack: they have "
                        f"{', '.join(sorted(columns))}{nearest(column, columns)}"
                    )

    def __call__(self, asked: Asked, **context: Any) -> Tensor:
        """(N, R) What each reward gives each answer, NaN where it does not apply.

        `context` are further arguments of the functions. Raises TunesmithError that names the row and the answer for
        what fails, and for what is no number.
        """
        later = [i for i, function in enumerate(self._functions) if inspect.iscoroutinefunction(_called(function))]
        answers: list[Any] = [None] * len(self._functions)
        for i, function in enumerate(self._functions):
            if i not in later:
                answers[i] = self._guarded(i, asked, context, partial(_call, function, asked, context))
        if later:
            with ThreadPoolExecutor(1) as pool:  # a notebook's thread has a loop that runs already
                outcomes = pool.submit(asyncio.run, _together([self._functions[i] for i in later], asked, context))
                for i, outcome in zip(later, outcomes.result(), strict=True):
                    answers[i] = self._guarded(i, asked, context, partial(_unwrapped, outcome))
        return torch.stack([self._column(i, values, asked) for i, values in enumerate(answers)], dim=1)

    def _guarded(self, i: int, asked: Asked, context: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            place = self._culprit(i, asked, context)
            kind = "" if isinstance(error, TunesmithError) else f"{type(error).__name__}: "
            raise TunesmithError(f"the reward {self.names[i]} failed{place}: {kind}{error}") from error

    def _culprit(self, i: int, asked: Asked, context: Mapping[str, Any]) -> str:
        """Which answer alone makes a reward fail, in words."""
        function = self._functions[i]
        for index in range(len(asked.places)):
            one = asked.part(index)
            try:
                outcome = _call(function, one, context)
                if inspect.iscoroutine(outcome):
                    with ThreadPoolExecutor(1) as pool:
                        pool.submit(asyncio.run, outcome).result()
            except Exception:
                return f" on {_described(one)}"
        return f" on {len(asked.places)} answers together, and on none of them alone"

    def _column(self, i: int, values: Any, asked: Asked) -> Tensor:
        values = values.tolist() if hasattr(values, "tolist") else [*values]
        if len(values) != len(asked.places):
            raise TunesmithError(
                f"the reward {self.names[i]} returned {len(values)} numbers for {len(asked.places)} answers; return a "
                "list with one for each"
            )
        column = []
        for index, value in enumerate(values):
            try:
                number = torch.nan if value is None else float(value)
            except (TypeError, ValueError):
                number = torch.inf
            if value is not None and not abs(number) < torch.inf:
                raise TunesmithError(
                    f"the reward {self.names[i]} is {value!r} for {_described(asked.part(index))}; return a number, or "
                    "None where it does not apply"
                )
            column.append(number)
        return torch.tensor(column, dtype=torch.float32)


def _described(one: Asked) -> str:
    return f"{one.places[0]}, answer {shorten(repr(text_of(one.completions[0])), SHOWN)}"


# Names to functions


def _listed(given: Any) -> list[tuple[Any, Mapping[str, Any]]]:
    if isinstance(given, Mapping):
        return [(name, arguments or {}) for name, arguments in given.items()]
    return [(one, {}) for one in (given if isinstance(given, list | tuple) else [given])]


def _resolved(given: Any, arguments: Mapping[str, Any]) -> RewardFunction | nn.Module:
    """The function, or the model, that a name stands for."""
    if not isinstance(given, str):
        if not callable(given):
            raise TunesmithError(f"reward_funcs has {given!r}; give a function, a model, or a name")
        return cast(RewardFunction, given)
    if not isinstance(arguments, Mapping):
        raise TunesmithError(f"reward_funcs: {given} has {arguments!r}; write its arguments as {{name: value}}")
    if given in CHECKS:
        try:
            return CHECKS[given](**arguments)
        except TypeError as error:
            takes = ", ".join(inspect.signature(CHECKS[given]).parameters) or "nothing"
            raise TunesmithError(f"reward_funcs: {error}; {given} takes {takes}") from error
    if ":" in given:
        function = _imported(given)
        return cast(RewardFunction, function(**arguments) if arguments else function)
    if arguments:
        raise TunesmithError(f"reward_funcs: {given!r} is a model, which takes no arguments; leave them out")
    if Path(given).is_dir() or "/" in given:
        return AutoModelForSequenceClassification.from_pretrained(given, num_labels=1)
    raise TunesmithError(
        f"reward_funcs: no reward is called {given!r}{nearest(given, CHECKS)}; there are {', '.join(CHECKS)}; a "
        "function is `module:function` or `file.py:function`, a model a folder or a name on the hub"
    )


def _imported(path: str) -> Any:
    """The object at `module:name` or `file.py:name`."""
    source, _, name = path.rpartition(":")
    try:
        if source.endswith(".py"):
            file = Path(source)
            if not file.is_file():
                raise TunesmithError(f"reward_funcs: no file {source}")
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except ImportError as error:
        raise TunesmithError(f"reward_funcs: {source} can't be imported: {error}") from error
    if not callable(function := getattr(module, name, None)):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise TunesmithError(f"reward_funcs: {source} has no function {name!r}{nearest(name, names)}")
    return function


def _called(function: Any) -> Any:
    return function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004


def _name(function: Any) -> str:
    inner = getattr(function, "func", function)  # of functools.partial
    return str(getattr(inner, "__name__", None) or type(inner).__name__)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names under which numbers are logged: a second one of a name is counted."""
    return [
        name if names[:i].count(name) == 0 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)
    ]


def _required(function: Any) -> list[str]:
    """The arguments that a function can't be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of what is no Python function
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.kind in named and one.default is one.empty]


def _call(function: Any, asked: Asked, context: Mapping[str, Any]) -> Any:
    """With lists for all that the function takes."""
    columns = {
        name: [row.get(name) for row in asked.rows] for name in dict.fromkeys(k for row in asked.rows for k in row)
    }
    own = {"prompts": asked.prompts, "completions": asked.completions, "completion_ids": asked.ids}
    values = {**columns, **context, **{name: [*value] for name, value in own.items()}}
    for name in ("prompt", "completion"):
        values.pop(name, None)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function(**values)
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return function(**values)
    return function(**{one.name: values[one.name] for one in parameters if one.name in values})


async def _together(functions: Sequence[Any], asked: Asked, context: Mapping[str, Any]) -> list[Any]:
    calls = [_call(function, asked, context) for function in functions]
    return list(await asyncio.gather(*calls, return_exceptions=True))


def _unwrapped(outcome: Any) -> Any:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


# Models


class _Scorer:
    """The first logit of a sequence classifier for prompt and answer together."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase | None, device: torch.device | str) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
        self.__name__ = Path(name).name
        self._tokenizer = AutoTokenizer.from_pretrained(name) if tokenizer is None else tokenizer
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.pad_token_id = self._tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        texts = [
            prompt + answer
            if isinstance(prompt, str)
            else str(self._tokenizer.apply_chat_template([*prompt, *answer], tokenize=False))
            for prompt, answer in zip(prompts, completions, strict=True)
        ]
        scores: list[float] = []
        for start in range(0, len(texts), ROWS):
            part = texts[start : start + ROWS]
            inputs = self._tokenizer(
                part, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
            )
            scores += self._model(**inputs.to(self._model.device)).logits[:, 0].float().tolist()
        return scores
