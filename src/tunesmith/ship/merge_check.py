"""Whether two models say the same: the logits of both on real prompts, and the tokens that follow from them.

Shapes: T tokens of a prompt and its answer, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import TunesmithError
from tunesmith.model.devices import here
from tunesmith.model.generate import prompt_ids, stop_ids
from tunesmith.model.load import load_model
from tunesmith.ship.merge_base import explained
from tunesmith.ship.merge_weights import grow

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short e-mail that thanks a customer for an order.",
)
TOKENS = 32
"""The longest answer to a prompt."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest difference of logits, relative to the largest logit, that rounding the merged weights may make."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How far a model is from the one that it should be like.

    `absolute` is the largest difference of any logit, `relative` the same over the largest logit; `equal` of `tokens`
    likeliest next tokens are the same, in the answers that the other model gives.
    """

    absolute: float
    relative: float
    tolerance: float
    equal: int
    tokens: int

    @property
    def within(self) -> bool:
        return self.relative <= self.tolerance  # not so for NaN

    def __str__(self) -> str:
        return (
            f"largest difference of logits {self.absolute:.3g} ({self.relative:.2g} of the largest logit, tolerance "
            f"{self.tolerance:.2g}), {self.equal} of {self.tokens} greedy tokens equal"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What a model says to a prompt: the tokens of both (T), where the answer begins, and the logits (T, V)."""

    ids: tuple[int, ...]
    start: int
    logits: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the model with its adapters beside it comes from. `rows` are those of its embeddings."""

    base: str
    revision: dict[str, Any]
    adapters: Path
    rows: int
    trust_remote_code: bool


def compute_in(dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """The device to compare on, and the format to compute in for weights in `dtype`: on a CPU fp32, which every one
    computes in natively."""
    device = here()
    return device, torch.float32 if device.type == "cpu" else dtype


def load_with_adapters(source: Source, dtype: torch.dtype) -> PeftModel:
    """The base model and the adapters beside it, in evaluation mode. Raises TunesmithError."""
    model = load_model(
        source.base, dtype=dtype, trust_remote_code=source.trust_remote_code, **source.revision
    ).requires_grad_(False)
    grow(model, source.rows)
    with explained(f"the adapters in {source.adapters} could not be loaded"):
        return PeftModel.from_pretrained(model, str(source.adapters)).eval()


@torch.inference_mode()
def traces(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[Trace]:
    """What `model` answers to each of `prompts`, greedily, and its logits. Raises TunesmithError for a prompt that has
    no tokens, or too many."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    stops = stop_ids(model, tokenizer)
    base.generation_config = GenerationConfig()  # or generate takes a repetition penalty, say, from it
    room = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    found = []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
        new = TOKENS if room is None else min(TOKENS, room - len(ids))
        if new < 1:
            raise TunesmithError(f"a prompt to compare with has {len(ids)} tokens, and the model has room for {room}")
        ids_BT = torch.tensor([ids], device=base.device)
        settings = GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=stops or None, pad_token_id=(stops or [0])[0]
        )
        output = base.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings)
        whole = tuple(output[0].tolist())
        found.append(Trace(ids=whole, start=len(ids), logits=_logits(model, whole)))
    return found


def drift(model: PreTrainedModel, expected: Sequence[Trace], tolerance: float) -> Drift:
    """How far `model` is from the one that `expected` was taken of."""
    absolute = largest = 0.0
    equal = tokens = 0
    for trace in expected:
        logits = _logits(model, trace.ids)
        width = min(logits.shape[-1], trace.logits.shape[-1])
        difference = (logits[:, :width] - trace.logits[:, :width]).abs().max()
        absolute = float("nan") if difference.isnan() else max(absolute, difference.item())
        largest = max(largest, trace.logits.abs().max().item())
        answer = slice(trace.start - 1, len(trace.ids) - 1)  # each from the position before it
        equal += int((logits[answer].argmax(-1) == trace.logits[answer].argmax(-1)).sum())
        tokens += len(trace.ids) - trace.start
    return Drift(
        absolute=absolute, relative=absolute / max(largest, 1e-30), tolerance=tolerance, equal=equal, tokens=tokens
    )


@torch.inference_mode()
def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    """(T, V), in fp32 and main memory."""
    ids_BT = torch.tensor([ids], device=model.device)
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits[0].float().cpu()
    return logits
