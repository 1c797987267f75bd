"""A generation: answers to some prompts, judged, and made into the micro-batches that learn from them.

    prompts -> answers (`train.generator`, `train.tools`) -> rewards (`train.rewards`) -> advantages
            -> Trial, an Example -> micro-batches, each used once an iteration

An answer is a document of its own: the loss is a sum over answers, so a micro-batch that does not fit can be divided
anywhere. Answers to one prompt are neighbours in a micro-batch, which computes their prompt once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.questions import Question
from tunesmith.model.generate import Sampling
from tunesmith.objectives.checks import Completion
from tunesmith.objectives.policy import deviation
from tunesmith.train.generator import Generated, Generator, draw, text_of
from tunesmith.train.rewards import Asked, Rewards
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
class Answered:
    """D answers of a generation, those to one prompt one after another, `group` to each, and their judgement: rewards
    (D, R), NaN where one does not apply, and what they count together (D,), NaN where none applies. `extra` has what
    functions had to say of each answer besides."""

    questions: Sequence[Question]
    group: int
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
        """The first group with the widest spread: its prompt, its best and its worst answer, as JSON."""
        number = int(deviation(self.totals_PG).argmax())
        totals = self.totals_PG[number]
        places = {
            "best": int(totals.nan_to_num(nan=-torch.inf).argmax()),
            "worst": int(totals.nan_to_num(nan=torch.inf).argmin()),
        }
        entry: dict[str, Any] = {"prompt": self.questions[number].prompt}
        for name, place in places.items():
            answer = number * self.group + place
            rewards = dict(zip(names, map(_plain, self.rewards[answer].tolist()), strict=True))
            entry[name] = {
                "text": self.texts[answer],
                "reward": _plain(float(self.totals[answer])),
                "rewards": rewards,
                "tokens": sum(own_tokens(self.generated[answer])),
                "ended": self.generated[answer].finish == "stop",
                **{key: _as_json(values[answer]) for key, values in self.extra.items()},
            }
        return entry


def _as_json(value: Any) -> Any:
    """What a reward function had to say, as JSON can hold it."""
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def _plain(value: float) -> float | None:
    return None if value != value else value


class Judge:
    """Draws answers with a `generator`, turn by turn with a `conversing`, and judges them with `rewards`, of which
    `total` makes one number each: (D, R) to (D,)."""

    def __init__(
        self,
        generator: Generator,
        rewards: Rewards,
        tokenizer: Any,
        sampling: Sampling,
        total: Callable[[Tensor], Tensor],
        conversing: Conversing | None = None,
    ) -> None:
        self.generator, self.rewards, self._tokenizer = generator, rewards, tokenizer
        self._sampling, self._total, self._conversing = sampling, total, conversing

    def __call__(self, questions: Sequence[Question], group: int, **context: Any) -> Answered:
        """`group` answers to each question. `context` are further arguments of reward functions.

        Raises TunesmithError for what the generator or a reward can't do.
        """
        asked = [question for question in questions for _ in range(group)]
        prompts = [question.ids for question in asked]
        drawing = draw if self._conversing is None else self._conversing
        generated = drawing(self.generator, prompts, self._sampling)
        texts = [answer.text if isinstance(answer, Talk) else text_of(self._tokenizer, answer) for answer in generated]
        completions = [
            _completion(question, answer, text) for question, answer, text in zip(asked, generated, texts, strict=True)
        ]
        extra: dict[str, Sequence[Any]] = {}

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
        return Answered(
            questions=questions,
            group=group,
            generated=generated,
            texts=texts,
            rewards=rewards,
            totals=self._total(rewards),
            extra=extra,
        )


def _completion(question: Question, answer: Generated, text: str) -> Completion:
    """An answer as rewards see it: a text behind a text, messages behind messages."""
    if isinstance(answer, Talk):
        return answer.messages
    return text if isinstance(question.prompt, str) else [{"role": "assistant", "content": text}]


def own_tokens(answer: Generated) -> list[bool]:
    """Of each token of an answer, whether the model drew it."""
    return answer.own if isinstance(answer, Talk) else [True] * len(answer.ids)


def trials_of(answered: Answered, *, masks_cut: bool) -> list[Trial]:
    """The answers as examples, whose tokens are trained as far as the model drew them, but for those that were cut off
    with `masks_cut`. They have no advantages yet."""
    spreads = answered.spreads.tolist()
    deviations = tuple(deviation(torch.cat([answered.totals[None], answered.rewards.T])).tolist())
    trials = []
    for i, answer in enumerate(answered.generated):
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
    """The generation that is trained on: its micro-batches of trials, and how many are still to come.

    With one iteration and a step that takes a whole generation, it is empty behind each step, and a checkpoint holds
    nothing of it.
    """

    def __init__(self, parts: int, iterations: int) -> None:
        self._parts, self._iterations = parts, iterations
        self.begin()

    def begin(self) -> None:
        """A run begins."""
        self._trials: list[Trial] = []
        self._left = 0

    @property
    def is_over(self) -> bool:
        return not self._left

    def fill(self, trials: Sequence[Trial]) -> None:
        """Begin with the micro-batches of these trials."""
        self._trials, self._left = [*trials], self._parts * self._iterations

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
        return {"left": self._left, "trials": [asdict(trial) for trial in self._trials]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._left = state["left"]
        self._trials = [
            Trial(**{**trial, **{name: tuple(trial[name]) for name in ("rewards", "deviations")}, "silent": ()})
            for trial in state["trials"]
        ]
