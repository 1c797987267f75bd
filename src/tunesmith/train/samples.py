"""The same few prompts, answered again and again while a model trains."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.data.prompts import prompt_ids, text_ids
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model
from tunesmith.model.generate import Answer, Sampling, generate_from_ids, room_of
from tunesmith.model.head import in_evaluation
from tunesmith.runs.describe import prompts_of
from tunesmith.runs.record import Prompt, Sample
from tunesmith.runs.states import kept_random_states
from tunesmith.train.sharding import in_forward
from tunesmith.types import Row

LONGEST = 128
"""New tokens of an answer."""
LONGEST_PROMPT = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A prompt and its tokens."""

    prompt: Prompt
    ids: list[int]


def chosen(rows: Iterable[Row], count: int, model: Model, tokenizer: PreTrainedTokenizerBase) -> list[Asked]:
    """The first `count` different prompts of `rows` that leave room for an answer, as the run trains on them: messages
    through the chat template, texts as they are."""
    room = room_of(model)
    longest = LONGEST_PROMPT if room is None else min(LONGEST_PROMPT, room - 1)
    found: list[Asked] = []
    for prompt in prompts_of(rows, 4 * count):
        ids = _ids(prompt, tokenizer)
        if 0 < len(ids) <= longest and len(found) < count:
            found.append(Asked(prompt=prompt, ids=ids))
    return found


def _ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """No tokens for what the template refuses."""
    asked = prompt.prompt
    try:
        if isinstance(asked, str):
            return text_ids(tokenizer, asked)
        return prompt_ids(tokenizer, asked, keep_specials=True)
    except TunesmithError:
        return []


def answered(
    model: Model, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked], accelerator: Any
) -> list[Answer]:
    """The likeliest answers of the model as it is, in the precision that it trains in. Weights, random numbers and the
    mode of each module stay as they are. Where processes share the weights out, each must ask. Raises what
    `generate_from_ids` does, and when memory is out."""
    with kept_random_states(accelerator.device), in_evaluation(model), torch.no_grad(), accelerator.autocast():
        sampling = Sampling(max_new_tokens=LONGEST)
        ids = [item.ids for item in asked]
        return in_forward(model, lambda: generate_from_ids(model, tokenizer, ids, sampling))


def before_and_after(entries: Sequence[Mapping[str, Any]], last: int | None) -> tuple[Sample, ...]:
    """What lines of samples.jsonl say of the model before training (step 0) and at step `last`, or the last one that
    was asked; nothing where either is missing."""
    steps = {int(entry["step"]) for entry in entries}
    after = last if last in steps else max(steps, default=0)
    if 0 not in steps or not after:
        return ()
    return tuple(_pairs(entries, after))


def _pairs(entries: Sequence[Mapping[str, Any]], after: int) -> Iterator[Sample]:
    later = {_key(entry): str(entry["answer"]) for entry in entries if entry["step"] == after}
    for entry in entries:
        if entry["step"] == 0 and _key(entry) in later:
            asked, expected = entry["prompt"], entry.get("expected")
            prompt = Prompt(prompt=asked if isinstance(asked, str) else tuple(asked), expected=expected)
            yield Sample(prompt=prompt, before=str(entry["answer"]), after=later[_key(entry)])


def _key(entry: Mapping[str, Any]) -> str:
    asked = entry["prompt"]
    return repr(asked if isinstance(asked, str) else list(asked))


def refusal(error: Exception) -> str:
    return str(error) if isinstance(error, TunesmithError) else f"{type(error).__name__}: {error}".splitlines()[0]
