"""A tokenizer of bytes, and small models for it."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AddedToken,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS = len(BYTES)


def small_tokenizer(bos: str | None = None, **roles: Any) -> PreTrainedTokenizerFast:
    """A token for each byte, and <|endoftext|> with id 256; with `bos`, one more token, which begins each text."""
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(BYTES)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<|endoftext|>", bos) if token]
    )
    if bos is not None:
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, EOS + 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, **({"eos_token": "<|endoftext|>"} | roles))


def llama(rows: int = EOS + 1, *, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def phi(rows: int = EOS + 1) -> PreTrainedModel:
    """Its head has a bias."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    model = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def embeddings(model: PreTrainedModel) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.detach().clone()


def head(model: PreTrainedModel) -> Any:
    return model.get_output_embeddings()


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you<|im_end|>\n"
    ),
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSee you<|eot_id|>"
    ),
    "zephyr": (
        "<|system|>\nBe brief.<|endoftext|>\n<|user|>\nHi<|endoftext|>\n<|assistant|>\nHello<|endoftext|>\n"
        "<|user|>\nBye<|endoftext|>\n<|assistant|>\nSee you<|endoftext|>\n"
    ),
    "mistral": "[INST] Be brief.\n\nHi [/INST] Hello<|endoftext|>[INST] Bye [/INST] See you<|endoftext|>",
    "gemma": (
        "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSee you<end_of_turn>\n"
    ),
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello<|endoftext|>"
        "\n\n### Instruction:\nBye\n\n### Response:\nSee you<|endoftext|>"
    ),
    "plain": (
        "System: Be brief.\nUser: Hi\nAssistant: Hello<|endoftext|>\nUser: Bye\nAssistant: See you<|endoftext|>\n"
    ),
}
