"""Answers of a model: batched for measuring, streamed for chatting.

Shapes: B prompts, T tokens of the longest one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from tunesmith.data.prompts import prompt_ids
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model as Model
from tunesmith.model.adapters import base_model, has_virtual_tokens

Messages = Sequence[Mapping[str, Any]]
PROBE = "Xprobe answerX"
PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are drawn. `temperature` 0 takes the likeliest token; above, `torch`'s global generator draws among
    the likeliest tokens that have the probability `top_p` together."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise TunesmithError(f"max_new_tokens is {self.max_new_tokens}; an answer has at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise TunesmithError(
                f"temperature is {self.temperature}; write 0 for the likeliest answer, or a number above"
            )
        if not 0 < self.top_p <= 1:
            raise TunesmithError(f"top_p is {self.top_p}, a share above 0 and up to 1")


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
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One answer for each of `prompts`, in their order, without special tokens. See `Sampling` for the arguments.

    `progress` is told how many answers are finished. The model's training mode is restored.

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
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """`generate` for prompts that are token ids already, in their order; says of each answer how it came to an end."""
    # The longest first: like lengths pad least, and what doesn't fit in memory fails at once.
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    answers = [Answer(text="", ended=False)] * len(encoded)
    if has_virtual_tokens(model):
        batch_size = 1  # padding would come between them and the prompt
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            outputs = answer_ids(model, tokenizer, [encoded[i] for i in chosen], sampling)
            for i, (ids, ended) in zip(chosen, outputs, strict=True):
                answers[i] = Answer(text=str(tokenizer.decode(ids, **PLAIN)), ended=ended)
            if progress is not None:
                progress(start + len(chosen))
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
    answer_ids(model, tokenizer, [ids], sampling, streamer)
    return "".join(streamer.pieces)


def room_of(model: Model) -> int | None:
    """How many tokens a prompt and its answer may have together; None where the model sets no limit."""
    room = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    if room and has_virtual_tokens(model):
        room -= model.active_peft_config.num_virtual_tokens  # type: ignore[union-attr]
    return room or None


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
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    after = text.rpartition(PROBE)[2].lstrip()
    added = tokenizer.added_tokens_decoder.items()
    return next((i for i, token in added if token.special and after.startswith(token.content)), None)


@torch.inference_mode()
def answer_ids(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> list[tuple[list[int], bool]]:
    """The new tokens of each prompt, up to its end, and whether they had one. Padding is on the left, so that all
    answers begin in one column."""
    base = base_model(model)
    longest = max(map(len, prompts))
    room = room_of(model) or longest + sampling.max_new_tokens
    if longest >= room:
        raise TunesmithError(f"the prompt has {longest} tokens, but the model has room for {room}, answer included")
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    settings = GenerationConfig(
        do_sample=sampling.temperature > 0,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=True,
        max_new_tokens=min(sampling.max_new_tokens, room - longest),
    )
    if settings.do_sample:
        settings.temperature, settings.top_p, settings.top_k = sampling.temperature, sampling.top_p, 0
    padding = [longest - len(ids) for ids in prompts]
    ids_BT = [[pad] * left + list(ids) for left, ids in zip(padding, prompts, strict=True)]
    mask_BT = [[0] * left + [1] * (longest - left) for left in padding]
    inputs: dict[str, Any] = {"input_ids": torch.tensor(ids_BT), "attention_mask": torch.tensor(mask_BT)}
    inputs = {name: value.to(base.device) for name, value in inputs.items()}
    if has_virtual_tokens(model):
        inputs |= _in_front(cast(PeftModel, model), inputs["input_ids"])
    before = 0 if "inputs_embeds" in inputs else inputs["input_ids"].shape[1]
    with _defaults_only(base):
        output: Any = base.generate(  # type: ignore[operator]
            **inputs, generation_config=settings, streamer=streamer
        )
    answers = []
    for ids in output[:, before:].tolist():
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        answers.append((ids[:end], end is not None))
    return answers


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
