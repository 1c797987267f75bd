"""A generation: answers to some prompts, judged, and made into the micro-batches that learn from them.

    prompts -> answers (`train.generator`, `train.tools`) -> rewards (`train.rewards`) -> advantages
            -> Trial, an Example -> micro-batches, each used once an iteration

An answer is a document of its own: the loss is a sum over answers, so a micro-batch that does not fit can be divided
anywhere. Answers to one prompt are neighbours in a micro-batch, which computes their prompt once.

Of several processes, each draws the answers that it trains on, and has them judged (`Deal`). Their rewards and lengths
are exchanged, so that advantages and divisors are those of the whole generation.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from tunesmith.data.questions import Question
from tunesmith.model.generate import Sampling
from tunesmith.objectives.checks import Completion
from tunesmith.objectives.policy import deviation
from tunesmith.train.generator import Generated, Generator, draw, text_of
from tunesmith.train.rewards import Asked, Rewards
from tunesmith.train.together import in_order
from tunesmith.train.tools import Conversing, Talk
from tunesmith.types import IGNORE_INDEX, Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial(Example):
    """An answer that was drawn, with its prompt, as an example, and what the loss takes of it.

    `advantage`; `scale` and `share` of its divisor (`objectives.policy`). Of its trained tokens, each (S,): `before`,
    by the model that drew, where that may be another one by then; `by_reference`; `sampled`, by the generator. `cut`:
    it was cut off. Its rewards (NaN where one does not apply), their `reward` together (NaN where none does), and the
    `spread` of that in its group; the `deviations` of `reward` and of each of its rewards over the whole generation.
    `size` is the number of tokens that the model drew, trained or not; it has `calls` of functions, of which `failures`
    failed. `silent` are others of its micro-batch that teach nothing, and are not computed.
    """

    advantage: float = 0.0
    scale: float = 1.0
    share: float = 1.0
    before: Tensor | None = None
    by_reference: Tensor | None = None
    sampled: Tensor | None = None
    cut: bool = False
    rewards: tuple[float, ...] = ()
    reward: float = 0.0
    spread: float = 0.0
    deviations: tuple[float, ...] = ()
    size: int = 0
    calls: int = 0
    failures: int = 0
    silent: tuple["Trial", ...] = ()

    @property
    def every(self) -> tuple["Trial", ...]:
        """It, and those that are not computed."""
        return (self, *self.silent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deal:
    """Which answers of a generation are those of process `rank`. Each process takes `stretch` answers in turn, those of
    one stretch of all processes are in one step, and a stretch of whole groups keeps these on one process.

    With 2 processes, 2 answers a micro-batch, 2 micro-batches a step and two steps a generation, stretches of 4:

        answers    0 1 2 3    4 5 6 7    8 9 10 11    12 13 14 15
        process    0          1          0            1
    """

    rank: int = 0
    processes: int = 1
    stretch: int = 1

    def numbers(self, total: int) -> list[int]:
        """Of `total` answers."""
        return [number for number in range(total) if number // self.stretch % self.processes == self.rank]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """D answers of a generation, those to one prompt one after another, `group` to each, and their judgement: rewards
    (D, R), NaN where one does not apply, and what they count together (D,), NaN where none applies.

    This process has drawn those with these `numbers`: what was `generated`, its `texts`, and in `extra` what functions
    had to say of each besides.
    """

    questions: Sequence[Question]
    group: int
    numbers: Sequence[int]
    generated: Sequence[Generated]
    texts: Sequence[str]
    rewards: Tensor
    totals: Tensor
    extra: Mapping[str, Sequence[Any]]

    @property
    def totals_PG(self) -> Tensor:
        return self.totals.view(-1, self.group)

    @property
    def spreads(self) -> Tensor:
        """(D,) The deviation of rewards in the group of each answer."""
        return deviation(self.totals_PG).repeat_interleave(self.group)

    def best_and_worst(self, names: Sequence[str]) -> dict[str, Any]:
        """The first group with the widest spread: its prompt, its best and its worst answer, as JSON. Every process
        must ask."""
        number = int(deviation(self.totals_PG).argmax())
        totals = self.totals_PG[number]
        places = {
            "best": int(totals.nan_to_num(nan=-torch.inf).argmax()),
            "worst": int(totals.nan_to_num(nan=torch.inf).argmin()),
        }
        chosen = {name: number * self.group + place for name, place in places.items()}
        own = {name: self._entry(answer, names) for name, answer in chosen.items() if answer in self.numbers}
        entries = {name: entry for part in gather_object([own]) for name, entry in part.items()}
        return {"prompt": self.questions[number].prompt} | {name: entries[name] for name in places}

    def _entry(self, answer: int, names: Sequence[str]) -> dict[str, Any]:
        own = self.numbers.index(answer)
        return {
            "text": self.texts[own],
            "reward": _plain(float(self.totals[answer])),
            "rewards": dict(zip(names, map(_plain, self.rewards[answer].tolist()), strict=True)),
            "tokens": sum(own_tokens(self.generated[own])),
            "ended": self.generated[own].finish == "stop",
            **{key: _as_json(values[own]) for key, values in self.extra.items()},
        }


def _as_json(value: Any) -> Any:
    """What a reward function had to say, as JSON can hold it."""
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def _plain(value: float) -> float | None:
    return None if value != value else value


class Judge:
    """Draws answers with a `generator`, turn by turn with a `conversing`, and judges them with `rewards`, of which
    `total` makes one number each: (D, R) to (D,). Drawing is done within `ready()`; both within `guard()`, which no
    process leaves well where another fails."""

    def __init__(
        self,
        generator: Generator,
        rewards: Rewards,
        tokenizer: Any,
        sampling: Sampling,
        total: Callable[[Tensor], Tensor],
        conversing: Conversing | None = None,
        ready: Callable[[], AbstractContextManager[None]] = nullcontext,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.generator, self.rewards, self._tokenizer = generator, rewards, tokenizer
        self._sampling, self._total, self._conversing = sampling, total, conversing
        self._ready, self._guard = ready, guard

    def __call__(
        self, questions: Sequence[Question], group: int, numbers: Sequence[int], seeds: Sequence[int], **context: Any
    ) -> Answered:
        """`group` answers to each question, of which this process draws those with these `numbers`, each by its seed,
        and judges them. `context` are further arguments of reward functions. Every process must call it.

        Raises TunesmithError for what the generator or a reward can't do.
        """
        asked, extra = [questions[number // group] for number in numbers], dict[str, Sequence[Any]]()
        with self._guard():
            with self._ready():
                generated = self._drawn(asked, seeds)
            texts = [one.text if isinstance(one, Talk) else text_of(self._tokenizer, one) for one in generated]
            own = self._judged(asked, generated, texts, extra, context) if asked else []
        rewards = torch.tensor(in_order(numbers, own))
        return Answered(
            questions=questions,
            group=group,
            numbers=numbers,
            generated=generated,
            texts=texts,
            rewards=rewards,
            totals=self._total(rewards),
            extra=extra,
        )

    def _drawn(self, asked: Sequence[Question], seeds: Sequence[int]) -> Sequence[Generated]:
        if not asked:
            return []
        drawing = draw if self._conversing is None else self._conversing
        return drawing(self.generator, [question.ids for question in asked], replace(self._sampling, seeds=seeds))

    def _judged(
        self,
        asked: Sequence[Question],
        generated: Sequence[Generated],
        texts: Sequence[str],
        extra: dict[str, Sequence[Any]],
        context: Mapping[str, Any],
    ) -> list[list[float]]:
        """The rewards of each answer; `extra` is filled with what functions had to say besides."""
        completions = [
            _completion(question, answer, text) for question, answer, text in zip(asked, generated, texts, strict=True)
        ]

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) == len(asked):
                extra[column] = [*values]

        rewards = self.rewards(
            Asked(
                places=[question.place for question in asked],
                prompts=[question.prompt for question in asked],
                completions=completions,
                ids=[answer.ids for answer in generated],
                rows=[question.row for question in asked],
            ),
            log_extra=log_extra,
            **context,
        )
        return [list(map(float, row)) for row in rewards.tolist()]


def _completion(question: Question, answer: Generated, text: str) -> Completion:
    """An answer as rewards see it: a text behind a text, messages behind messages."""
    if isinstance(answer, Talk):
        return answer.messages
    return text if isinstance(question.prompt, str) else [{"role": "assistant", "content": text}]


def own_tokens(answer: Generated) -> list[bool]:
    """Of each token of an answer, whether the model drew it."""
    return answer.own if isinstance(answer, Talk) else [True] * len(answer.ids)


def trials_of(answered: Answered, *, masks_cut: bool) -> list[Trial]:
    """The answers of this process as examples, whose tokens are trained as far as the model drew them, but for those
    that were cut off with `masks_cut`. They have no advantages yet."""
    spreads = answered.spreads.tolist()
    deviations = tuple(deviation(torch.cat([answered.totals[None], answered.rewards.T])).tolist())
    trials = []
    for i, answer in zip(answered.numbers, answered.generated, strict=True):
        prompt, own = answered.questions[i // answered.group].ids, own_tokens(answer)
        cut = answer.finish == "length"
        masked = not answer.ids or (cut and masks_cut)
        labels = [token if mine and not masked else IGNORE_INDEX for token, mine in zip(answer.ids, own, strict=True)]
        sampled = None if masked or answer.logprobs is None else torch.tensor(answer.logprobs)
        trials.append(
            Trial(
                input_ids=[*prompt, *answer.ids],
                labels=[IGNORE_INDEX] * len(prompt) + labels,
                sampled=None if sampled is None else sampled[torch.tensor(own)],
                cut=cut,
                rewards=tuple(answered.rewards[i].tolist()),
                reward=float(answered.totals[i]),
                spread=spreads[i],
                deviations=deviations,
                size=sum(own),
                calls=answer.calls if isinstance(answer, Talk) else 0,
                failures=answer.failures if isinstance(answer, Talk) else 0,
            )
        )
    return trials


def without_silent(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that teach something, of which the first one has the others with it. Those have no advantage, or no
    token that is trained: their loss and its gradient are exactly 0, as long as nothing keeps near to a reference."""
    teaching = [trial for trial in trials if trial.advantage and trial.target_count] or [*trials[:1]]
    silent = tuple(trial for trial in trials if not any(trial is one for one in teaching))
    return [replace(teaching[0], silent=silent), *teaching[1:]]


class Window:
    """The generation that is trained on: this process's micro-batches of trials, and how many are still to come.

    With one iteration and a step that takes a whole generation, it is empty behind each step, and a checkpoint holds
    nothing of it but the number of `generations` so far.
    """

    def __init__(self, parts: int, iterations: int, deal: Deal) -> None:
        self._parts, self._iterations, self._deal = parts, iterations, deal
        self.begin()

    def begin(self) -> None:
        """A run begins."""
        self._trials: list[Trial] = []
        self._left = self.generations = 0

    @property
    def is_over(self) -> bool:
        return not self._left

    def fill(self, trials: Sequence[Trial]) -> None:
        """Begin with the micro-batches of these trials."""
        self._trials, self._left = [*trials], self._parts * self._iterations
        self.generations += 1

    def take(self) -> list[Trial]:
        """The trials of the next micro-batch."""
        assert self._left, "a generation is drawn before it is trained on"
        number, size = -self._left % self._parts, len(self._trials) // self._parts
        self._left -= 1
        taken = self._trials[number * size : (number + 1) * size]
        if not self._left:
            self._trials = []
        return taken

    def state(self) -> Mapping[str, Any]:
        """Of all processes, which all must call this: all trials of the generation, and how many are still to come."""
        own = [asdict(trial) for trial in self._trials]
        numbers = self._deal.numbers(len(own) * self._deal.processes)
        trials = in_order(numbers, own)
        return {"generations": self.generations, "left": self._left * len(trials) // self._parts, "trials": trials}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Also that of another number of processes, whose steps take as many trials."""
        every = state["trials"]
        self.generations = state["generations"]
        self._left = state["left"] * self._parts // max(1, len(every))
        own = [every[number] for number in self._deal.numbers(len(every))]
        self._trials = [
            Trial(**{**trial, **{name: tuple(trial[name]) for name in ("rewards", "deviations")}, "silent": ()})
            for trial in own
        ]
