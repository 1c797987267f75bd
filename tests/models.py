"""Small random models of many architectures, and rows for them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tunesmith.data.batches import Batch, FlatCollator, PaddedCollator
from tunesmith.objectives.supervised import LossOptions, Supervised, supervised_loss

VOCABULARY = 97
WINDOW = 4
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

# What each adds to the common causal transformer is the reason why it is here.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt": {  # learned positions from 2 on, an embedding narrower than the layers
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "dropout": 0.0,
    },
    "gpt_neo": {  # no attention interface, local attention in a buffer
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },  # Conv1D
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": WINDOW},
    "qwen2": _LLAMA | _MIXED | {"use_sliding_window": True},
    "qwen3": _LLAMA | {"head_dim": 8},
    "gemma2": _LLAMA | _MIXED | {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
    "gemma3_text": _LLAMA | _MIXED | {"head_dim": 8},
    "phi3": _LLAMA,  # fused projections
    "cohere": _LLAMA,  # scales its logits
    "granite": _LLAMA | {"logits_scaling": 3.0},
    "gpt_oss": _LLAMA | _MIXED | {"head_dim": 8, "num_local_experts": 4, "rope_parameters": _ROPE},  # experts, sinks
    "smollm3": _LLAMA | {"no_rope_layers": [1, 0]},  # a layer without positions
}
PADDED = {"gpt_neo"}
"""Those that can't take flat batches."""
FLAT = sorted(ARCHITECTURES.keys() - PADDED)


def tiny(name: str, vocab_size: int = VOCABULARY, auto: Any = AutoModelForCausalLM, **settings: Any) -> PreTrainedModel:
    """A model of the architecture `name` in evaluation mode, of an `auto` class of `transformers`. The same name and
    settings give the same weights.

    Every parameter is random: at their usual start, biases and norms would hide what is done with them.
    """
    common = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128}
    config = AutoConfig.for_model(name, vocab_size=vocab_size, **common | ARCHITECTURES.get(name, {}) | settings)
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.eval()


def token_rows(*lengths: int, seed: int = 1, vocab_size: int = VOCABULARY) -> list[dict[str, Any]]:
    """Tokenized rows of `lengths`, of which the first two tokens have no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradients of `model`, which are taken away from it."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference in any parameter, relative to that parameter's gradient.

    A gradient that is zero but for rounding, such as that of a key's bias, is measured against the largest of all.
    """
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    return max(
        float((found[name] - gradient).abs().max() / torch.maximum(gradient.abs().max(), 1e-3 * largest))
        for name, gradient in expected.items()
    )


def flat(rows: list[dict[str, Any]], share_prefix: bool = False) -> Batch:
    return FlatCollator(share_prefix=share_prefix)(rows)


def padded(rows: list[dict[str, Any]], pad_token_id: int = 0, multiple: int = 1) -> Batch:
    return PaddedCollator(pad_token_id=pad_token_id, multiple=multiple)(rows)


def supervised(model: Any, batch: Batch, options: LossOptions | None = None) -> Supervised:
    """What a model that answers objectives makes of a batch."""
    objective = partial(supervised_loss, options=options)
    result: Supervised = model(**batch.inputs(), targets=batch.targets(), objective=objective).outcome
    return result
