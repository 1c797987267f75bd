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
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tunesmith.data.sandbox import rendered
from tunesmith.errors import TunesmithError, nearest
from tunesmith.model.load import (
    holds_adapters,
    is_classifier,
    load_adapted,
    load_classifier,
    load_config,
    load_tokenizer,
    resolve_model,
    run_folder,
)
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
    """Judges answers with several rewards, in order; `names` are theirs, `weights` (R,) what each counts, `tokenizers`
    what was given for each.

    Raises TunesmithError for a name that nothing has, and for weights of another number.
    """

    def __init__(
        self,
        given: Given | Sequence[Given] | Mapping[str, Mapping[str, Any] | None],
        *,
        weights: Sequence[float] | None = None,
        tokenizers: Any = None,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        trusted = _Trusted(trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        parts = [_resolved(*one, trusted) for one in _listed(given)]
        if not parts:
            raise TunesmithError("reward_funcs is empty; name at least one, such as exact_match")
        scores = [isinstance(part, nn.Module | _Classifier) for part in parts]
        if tokenizers is not None and not isinstance(tokenizers, list | tuple):
            if sum(scores) > 1:
                raise TunesmithError(
                    f"reward_processing_classes is one tokenizer, and {sum(scores)} models score answers; their "
                    "numbers must match: write a list with the tokenizer of each of reward_funcs, None for a function"
                )
            tokenizers = [tokenizers if scored else None for scored in scores]
        self.tokenizers: list[Any] = [None] * len(parts) if tokenizers is None else [*tokenizers]
        if len(self.tokenizers) != len(parts):
            raise TunesmithError(
                f"reward_processing_classes has {len(self.tokenizers)} items, and reward_funcs {len(parts)}; their "
                "numbers must match: write None for a function"
            )
        self._functions = [
            _Scorer(part, tokenizer, device, trusted) if isinstance(part, nn.Module | _Classifier) else part
            for part, tokenizer in zip(parts, self.tokenizers, strict=True)
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


def _resolved(
    given: Any, arguments: Mapping[str, Any], trusted: "_Trusted"
) -> "RewardFunction | nn.Module | _Classifier":
    """The function, the `nn.Module` or the `_Classifier` that a name stands for."""
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
        function = imported(given, "reward_funcs")
        return cast(RewardFunction, function(**arguments) if arguments else function)
    if arguments:
        raise TunesmithError(f"reward_funcs: {given!r} is a model, which takes no arguments; leave them out")
    if Path(given).is_dir() or "/" in given:
        return _classifier(given, trusted)
    raise TunesmithError(
        f"reward_funcs: no reward is called {given!r}{nearest(given, CHECKS)}; there are {', '.join(CHECKS)}; a "
        "function is `module:function` or `file.py:function`, a model a folder or a name on the hub"
    )


def imported(path: str, setting: str) -> Any:
    """The function at `module:name` or `file.py:name`. Raises TunesmithError, by the name of the `setting`."""
    source, _, name = path.rpartition(":")
    if not source:
        raise TunesmithError(f"{setting}: {path!r} is no function; write `module:function` or `file.py:function`")
    try:
        if source.endswith(".py"):
            file = Path(source)
            if not file.is_file():
                raise TunesmithError(f"{setting}: no file {source}")
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except ImportError as error:
        raise TunesmithError(f"{setting}: {source} can't be imported: {error}") from error
    if not callable(function := getattr(module, name, None)):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise TunesmithError(f"{setting}: {source} has no function {name!r}{nearest(name, names)}")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trusted:
    """What may come with a model."""

    trust_remote_code: bool
    allow_pickle: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Classifier:
    """A model that was named, and where it and its tokenizer are."""

    model: Any
    place: str


def _classifier(name: str, trusted: _Trusted) -> _Classifier:
    """The sequence classifier `name`, with its adapters where it has some.

    Raises TunesmithError for a model that has no score to give, which a head of random numbers would invent.
    """
    place, code = str(run_folder(Path(resolve_model(name)))), trusted.trust_remote_code
    if holds_adapters(place):
        model: Any = load_adapted(place, classifier=True, trust_remote_code=code, allow_pickle=trusted.allow_pickle)
    elif is_classifier(load_config(place, trust_remote_code=code)):
        model = load_classifier(place, trust_remote_code=code, allow_pickle=trusted.allow_pickle)
    else:
        raise TunesmithError(
            f"reward_funcs: {name} is no sequence classifier, so it has no score to give; train one from it with "
            "`tunesmith reward`, and name that"
        )
    return _Classifier(model=model, place=place)


class _Scorer:
    """The first logit of a sequence classifier for prompt and answer together."""

    def __init__(
        self,
        given: nn.Module | _Classifier,
        tokenizer: PreTrainedTokenizerBase | None,
        device: torch.device | str,
        trusted: _Trusted,
    ) -> None:
        model: Any = given.model if isinstance(given, _Classifier) else given
        place = given.place if isinstance(given, _Classifier) else str(getattr(model.config, "name_or_path", ""))
        self.__name__ = Path(place).name or type(model).__name__
        if tokenizer is None:
            tokenizer = load_tokenizer(place, trust_remote_code=trusted.trust_remote_code)
        self._model = model.to(device).eval().requires_grad_(False)
        self._tokenizer = deepcopy(tokenizer)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.pad_token_id = self._tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        texts = [
            prompt + answer if isinstance(prompt, str) else rendered(self._tokenizer, [*prompt, *answer])
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
