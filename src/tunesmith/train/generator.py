"""What draws answers: prompts in; tokens, log-probabilities, and how each answer came to an end, out.

The trainer's own decoding is the default. Whatever else draws (`train.vllm_server`) goes through the same interface,
and the trainer computes the log-probabilities that it learns from itself.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model
from tunesmith.model.generate import PLAIN, Sampling, answer_ids
from tunesmith.model.head import in_evaluation

Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """An answer: its tokens, the one that ended it included (`finish` "stop"), or cut off ("length"). `logprobs` are
    those of its tokens, in nats, by the generator, among all tokens at the temperature they were drawn at; None where
    it does not tell."""

    ids: list[int]
    finish: Finish
    logprobs: list[float] | None = None


class Generator(Protocol):
    """Draws an answer to each prompt, in their order. `sampling.seeds` has a seed for each: what draws by them gives
    the same answers however many processes draw, and in a run that goes on from a checkpoint."""

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generated]: ...


def draw(generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generated]:
    """An answer to each prompt. Raises TunesmithError for a generator that gives fewer, or more."""
    answers = generator(prompts, sampling)
    if len(answers) != len(prompts):
        raise TunesmithError(f"the generator answered {len(answers)} of {len(prompts)} prompts")
    return answers


def text_of(tokenizer: PreTrainedTokenizerBase, answer: Generated) -> str:
    """What an answer says: its tokens without the one that ended it, and without special ones."""
    ids = answer.ids[:-1] if answer.finish == "stop" else answer.ids
    return str(tokenizer.decode(ids, **PLAIN))


class OwnDecoding:
    """Answers of the `model` that is trained, as it is: without dropout, in the precision within `precision()`. What
    prompts begin with in common is computed once, and rows that have ended make room for others.

    The random numbers of an answer are those of its seed in `sampling.seeds`: whatever a reward draws, and whatever is
    drawn beside an answer, does not change it.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        *,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model, self._tokenizer, self._precision = model, tokenizer, precision

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generated]:
        answers: dict[int, Generated] = {}
        with in_evaluation(self._model), torch.no_grad(), self._precision():
            for done in answer_ids(self._model, self._tokenizer, prompts, sampling, scored=True):
                ids = done.ids if done.stop is None else [*done.ids, done.stop]
                finish: Finish = "stop" if done.ended else "length"
                answers[done.index] = Generated(ids=ids, finish=finish, logprobs=done.logprobs)
        return [answers[i] for i in range(len(prompts))]


def seed_of(*key: object) -> int:
    """A seed that is another one for each key."""
    return Random(" ".join(map(str, key))).getrandbits(63)
