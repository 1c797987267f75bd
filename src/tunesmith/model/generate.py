"""Answers of a model: batched for measuring, streamed for chatting.

Shapes: B prompts, T tokens of the longest one.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import GENERATION_CONFIG_NAME

from tunesmith.data.prompts import prompt_ids
from tunesmith.data.sandbox import rendered
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model as Model
from tunesmith.model.adapters import base_model, has_virtual_tokens
from tunesmith.model.decoding import ROWS as ROWS
from tunesmith.model.decoding import Done, Pick, Request, can_decode, decode

Messages = Sequence[Mapping[str, Any]]
PROBE = "Xprobe answerX"
PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are drawn. `temperature` 0 takes the likeliest token; above, `torch`'s global generator draws among
    the likeliest tokens: those that have the probability `top_p` together, at most `top_k` (0: all), each at least
    `min_p` times as likely as the likeliest. `repetition_penalty` above 1 makes tokens less likely that a row has
    already.

    With `seeds`, one for each prompt, an answer is drawn by random numbers of its own in place of the global generator,
    so that it does not depend on what else is drawn beside it."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seeds: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise TunesmithError(f"max_new_tokens is {self.max_new_tokens}; an answer has at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise TunesmithError(
                f"temperature is {self.temperature}; write 0 for the likeliest answer, or a number above"
            )
        if not 0 < self.top_p <= 1:
            raise TunesmithError(f"top_p is {self.top_p}, a share above 0 and up to 1")
        if self.top_k < 0:
            raise TunesmithError(f"top_k is {self.top_k}; write 0 for all tokens, or how many")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise TunesmithError(f"min_p is {self.min_p}, a share from 0 to 1")
        if not self.repetition_penalty > 0:
            raise TunesmithError(f"repetition_penalty is {self.repetition_penalty}; write 1 for none, or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """`ended`: the model ended it. Otherwise it was cut off, at `max_new_tokens` or where the model's room ends."""

    text: str
    ended: bool


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One answer for each of `prompts`, in their order, without special tokens. See `Sampling` for the arguments.

    `batch_size` is how many are under way at a time: 16 if unset, and on a CPU up to 64, as far as their keys and
    values fit in 1 GiB. `progress` is told how many answers are finished. The model's training mode is restored.

    Raises TunesmithError for a prompt without tokens, or one that leaves the model no room to answer.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    encoded = [prompt_ids(tokenizer, messages) for messages in prompts]
    answers = generate_from_ids(model, tokenizer, encoded, sampling, batch_size=batch_size, progress=progress)
    return [answer.text for answer in answers]


def generate_from_ids(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """`generate` for prompts that are token ids already, in their order; says of each answer how it came to an end."""
    answers = [Answer(text="", ended=False)] * len(encoded)
    training = model.training
    model.eval()
    try:
        finished = answer_ids(model, tokenizer, encoded, sampling, batch_size=batch_size)
        for count, done in enumerate(finished, start=1):
            answers[done.index] = Answer(text=str(tokenizer.decode(done.ids, **PLAIN)), ended=done.ended)
            if progress is not None:
                progress(count)
    finally:
        model.train(training)
    return answers


def stream(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    write: Callable[[str], None],
    sampling: Sampling,
    *,
    keep_specials: bool = False,
) -> str:
    """The answer to one prompt, which `write` gets piece by piece as it comes; raises as `generate` does.
    `keep_specials`: as for `prompt_ids`.

    The model must be in evaluation mode.
    """
    streamer = _Streamer(tokenizer, write)
    ids = prompt_ids(tokenizer, messages, keep_specials=keep_specials)
    for _ in answer_ids(model, tokenizer, [ids], sampling, streamer=streamer):
        pass
    return "".join(streamer.pieces)


def room_of(model: Model) -> int | None:
    """How many tokens a prompt and its answer may have together; None where the model sets no limit."""
    room = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    if room and has_virtual_tokens(model):
        room -= model.active_peft_config.num_virtual_tokens  # type: ignore[union-attr]
    return room or None


class AsRead(GenerationConfig):
    """Settings that are written as they were read. Some that are published have a temperature and no sampling, which
    `transformers` reads, and refuses to write: when a run saves its first checkpoint, or at its end."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        values = json.dumps(self.to_diff_dict(), indent=2, sort_keys=True)
        (Path(save_directory) / GENERATION_CONFIG_NAME).write_text(values + "\n", encoding="utf-8")


def writable(settings: GenerationConfig) -> GenerationConfig:
    """`settings`, or what is written as they are where `transformers` refuses to write them."""
    try:
        settings.validate(strict=True)
    except ValueError:
        as_read = AsRead()
        vars(as_read).update(vars(settings))
        return as_read
    return settings


def stop_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which an answer ends: the tokenizer's and the generation config's end of sequence, and the special
    token that the chat template puts behind an answer, which may be another one."""
    own = base_model(model).generation_config
    of_model = own.eos_token_id if own is not None else None
    ids = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model]), _end_of_turn(tokenizer)]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}]
    text = rendered(tokenizer, turns)
    after = text.rpartition(PROBE)[2].lstrip()
    added = tokenizer.added_tokens_decoder.items()
    return next((i for i, token in added if token.special and after.startswith(token.content)), None)


def answer_ids(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int | None = None,
    streamer: BaseStreamer | None = None,
    scored: bool = False,
) -> Iterator[Done]:
    """The answers as they finish, by the index of their prompt. `streamer` gets the tokens of a single one. `scored`:
    answers have the log-probabilities of their tokens at the temperature they are drawn at, or at 1 where that is 0, of
    all tokens of the vocabulary; those of a model whose rows can't leave a batch (`can_decode`) have none.

    The model must be in evaluation mode. Raises TunesmithError for a prompt that leaves no room.
    """
    room = room_of(model)
    for ids in sorted(prompts, key=len, reverse=True)[:1]:
        if room is not None and len(ids) >= room:
            raise TunesmithError(
                f"the prompt has {len(ids)} tokens, but the model has room for {room}, answer included"
            )
    most = sampling.max_new_tokens
    limits = [most if room is None else min(most, room - len(ids)) for ids in prompts]
    requests = [
        Request(index=i, ids=ids, limit=limit) for i, (ids, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    stops = stop_ids(model, tokenizer)
    pick = _picker(sampling)
    if not has_virtual_tokens(model) and can_decode(base_model(model)):
        scored_at = (sampling.temperature or 1.0) if scored else None
        model = base_model(model)
        yield from decode(model, requests, stops, pick, rows=batch_size, streamer=streamer, scored_at=scored_at)
        return
    # Padding would come between virtual tokens and the prompt.
    size = 1 if has_virtual_tokens(model) else batch_size or ROWS
    requests.sort(key=lambda request: -len(request.ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    for start in range(0, len(requests), size):
        yield from _by_transformers(model, requests[start : start + size], stops, pad, sampling, pick, streamer)


def _picker(sampling: Sampling) -> Pick:
    """The tokens (B,) that are taken at fp32 logits (B, V)."""
    warpers: list[LogitsProcessor] = []
    if sampling.temperature > 0:
        warpers += [TemperatureLogitsWarper(sampling.temperature)]
        warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []

    streams = None if sampling.seeds is None else [Random(seed) for seed in sampling.seeds]

    def pick(logits_BV: Tensor, rows: Sequence[Sequence[int]], numbers: Sequence[int]) -> Tensor:
        if sampling.repetition_penalty != 1:
            logits_BV = _penalized(logits_BV, rows, sampling.repetition_penalty)
        for warper in warpers:
            logits_BV = warper(None, logits_BV)
        if sampling.temperature == 0:
            return logits_BV.argmax(dim=-1)
        probabilities_BV = logits_BV.softmax(dim=-1)
        if streams is None:
            return torch.multinomial(probabilities_BV, num_samples=1)[:, 0]
        return _tokens_at(probabilities_BV, [streams[number].random() for number in numbers])

    return pick


def _tokens_at(probabilities_BV: Tensor, places: Sequence[float]) -> Tensor:
    """The token (B,) of each row at a place in [0, 1), where the row's tokens take as much of it as they are probable,
    one after another."""
    exact = torch.float32 if probabilities_BV.device.type == "mps" else torch.float64
    ends_BV = probabilities_BV.cumsum(dim=-1, dtype=exact)
    whole_B1 = ends_BV[:, -1:]
    wanted_B1 = torch.tensor(places, dtype=exact, device=ends_BV.device)[:, None] * whole_B1
    wanted_B1 = wanted_B1.minimum(whole_B1.nextafter(torch.zeros_like(whole_B1)))  # to which it may have been rounded
    return torch.searchsorted(ends_BV, wanted_B1, right=True)[:, 0]


def _penalized(logits_BV: Tensor, rows: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits in which tokens of a row that are there already are divided by the penalty, or times it below 0
    (CTRL, arXiv:1909.05858)."""
    logits_BV = logits_BV.clone()
    for logits, ids in zip(logits_BV, rows, strict=True):
        there = torch.tensor([*{*ids}], device=logits.device)
        own = logits[there]
        logits[there] = torch.where(own < 0, own * penalty, own / penalty)
    return logits_BV


@torch.inference_mode()
def _by_transformers(
    model: Model,
    requests: Sequence[Request],
    stops: list[int],
    pad: int,
    sampling: Sampling,
    pick: Pick,
    streamer: BaseStreamer | None,
) -> list[Done]:
    """Answers of a model whose rows can't leave a batch (`can_decode`), through its own `generate`. Padding is on the
    left, so that all answers begin in one column."""
    base = base_model(model)
    longest = max(len(request.ids) for request in requests)
    by_seeds = sampling.seeds is not None
    settings = GenerationConfig(
        do_sample=sampling.temperature > 0 and not by_seeds,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=True,
        max_new_tokens=min(request.limit for request in requests),
    )
    if settings.do_sample:
        settings.temperature, settings.top_p, settings.top_k = sampling.temperature, sampling.top_p, sampling.top_k
        settings.min_p = sampling.min_p
    picks = [_Picks(pick, [request.index for request in requests])] if by_seeds else []
    settings.repetition_penalty = 1.0 if by_seeds else sampling.repetition_penalty
    ids_BT = [[pad] * (longest - len(request.ids)) + [*request.ids] for request in requests]
    mask_BT = [[0] * (longest - len(request.ids)) + [1] * len(request.ids) for request in requests]
    inputs: dict[str, Any] = {"input_ids": torch.tensor(ids_BT), "attention_mask": torch.tensor(mask_BT)}
    inputs = {name: value.to(base.device) for name, value in inputs.items()}
    if has_virtual_tokens(model):
        inputs |= _in_front(cast(PeftModel, model), inputs["input_ids"])
    before = 0 if "inputs_embeds" in inputs else inputs["input_ids"].shape[1]
    with _defaults_only(base):
        output: Any = base.generate(  # type: ignore[operator]
            **inputs, generation_config=settings, streamer=streamer, logits_processor=LogitsProcessorList(picks)
        )
    answers = []
    for request, ids in zip(requests, output[:, before:].tolist(), strict=True):
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        stop = None if end is None else ids[end]
        answers.append(Done(index=request.index, ids=ids[:end], ended=end is not None, stop=stop))
    return answers


class _Picks(LogitsProcessor):
    """Leaves of each row the token that `pick` takes; `numbers` are the indices of the rows' requests."""

    def __init__(self, pick: Pick, numbers: Sequence[int]) -> None:
        self._pick, self._numbers = pick, numbers

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        tokens = self._pick(scores.float(), input_ids.tolist(), self._numbers)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _in_front(model: PeftModel, ids_BT: Tensor) -> dict[str, Any]:
    """What `generate` takes in place of rows without padding, for virtual tokens in front of each: embeddings, or keys
    and values, for which tokens stand that are never read."""
    count = int(model.active_peft_config.num_virtual_tokens)
    prompt: Any = model.get_prompt(batch_size=len(ids_BT))
    mask = torch.ones(len(ids_BT), count + ids_BT.shape[1], dtype=torch.long, device=ids_BT.device)
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        unread = torch.zeros_like(mask[:, :count])
        return {"input_ids": torch.cat([unread, ids_BT], dim=1), "past_key_values": prompt, "attention_mask": mask}
    embeddings = base_model(model).get_input_embeddings()(ids_BT)
    whole = torch.cat([prompt.to(embeddings.dtype), embeddings], dim=1)
    return {"input_ids": None, "inputs_embeds": whole, "attention_mask": mask}


@contextmanager
def _defaults_only(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's own generation config, of which `transformers` takes what the caller left unset: a greedy
    answer would have its repetition penalty, and a warning about its temperature."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, **PLAIN)
        self.pieces: list[str] = []
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self._write(text)
