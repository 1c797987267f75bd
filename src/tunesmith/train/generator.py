"""What draws answers: prompts in; tokens, log-probabilities, and how each answer came to an end, out.

The trainer's own decoding is the default. Whatever else draws (`train.vllm_server`) goes through the same interface,
and the trainer computes the log-probabilities that it learns from itself.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.model.adapters import Model
from tunesmith.model.generate import Sampling, answer_ids
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
    """Draws an answer to each prompt, in their order."""

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generated]: ...


class OwnDecoding:
    """Answers of the `model` that is trained, as it is: without dropout, in the precision within `precision()`. What
    prompts begin with in common is computed once, and rows that have ended make room for others. Draws from `torch`'s
    global random numbers."""

    def __init__(
        self, model: Model, tokenizer: PreTrainedTokenizerBase, precision: Callable[[], AbstractContextManager[None]]
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
