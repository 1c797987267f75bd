"""Whether a GGUF file is the model that it was written from: it is read back through `transformers`, and compared.

`transformers` leaves a few things out as it reads. They are read here from the file itself and put in their place; what
was treated so is said.

Shapes: T tokens of a prompt and its continuation, V rows of the vocabulary.
"""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig

from tunesmith.errors import TunesmithError
from tunesmith.model.demo_model import quiet
from tunesmith.model.generate import prompt_ids
from tunesmith.model.load import load_model, load_tokenizer
from tunesmith.ship.gguf_tokenizer import Vocabulary
from tunesmith.ship.gguf_weights import ROPE_FACTORS, head_size, plan, read, read_config, rope_factors

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Count from 1 to 10.",
    "Explain in one sentence why the sky is blue.",
)
NEW_TOKENS = 16
TEXTS = (
    *PROMPTS,
    "I've told you: it's 1234567 or 3.14, isn't it?\n\n\tNo!  two  spaces   three\r\n",
    "Ünïcödé, 日本語, Привет, 🙂👍🏽, ﬁ, \u00a0 x\u200dy",
    "def f(x):\n    return x ** 2  # comment\n",
    " leading and trailing ",
)
ROUNDING = {Kind.F32: 0.0, Kind.F16: 2**-11, Kind.Q8_0: 0.57 / 127}
"""How far a value may be from the model's, relative to the largest of its tensor: half a step, and for Q8_0, whose step
is an f16 itself, what that adds to 127 of them."""
LARGEST_DIFFERENCE = {"f32": 1e-4, "f16": 5e-2, "q8_0": float("inf")}
"""Of a logit, relative to the model's largest."""
TIE = {"f32": 1e-4, "f16": 1e-2}
"""How much likelier the model's own token may be to it, in the same measure, when the file prefers another."""
SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
)
UNREAD = ("head_dim", "attention_bias", "mlp_bias")
"""What `transformers` may not read, depending on the architecture."""
SCALING = "the scaling of positions"


def check_gguf(file: Path, folder: Path, quant: str, tokens: Vocabulary) -> list[str]:
    """Compares `file`, written as `quant`, with the model and the tokenizer in `folder`; says what was found.

    Raises TunesmithError where settings, tokens or tensors differ, those by more than rounding to `quant`; for f32 and
    f16, where logits do, or greedy tokens other than by a tie. What q8_0 does to an answer is told.
    """
    tokenizer = load_tokenizer(str(folder))
    with quiet():
        said = [_compare_tokens(file, tokenizer, tokens)]
        config, unread = _config(file, AutoConfig.from_pretrained(str(folder)))
        sequences, expected = _of_model(load_model(str(folder)), tokenizer)
        gc.collect()
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(
            **place, config=config, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ).eval()
        said.append(_compare_tensors(model.state_dict(), folder, quant))
        found = [_logits(model, sequence) for sequence in sequences]
    said.append(_compare_logits(expected, found, quant))
    if unread:
        said.append(f"transformers doesn't read {', '.join(unread)}; compared in the file itself")
    return said


def _of_model(model: Any, tokenizer: Any) -> tuple[list[list[int]], list[Tensor]]:
    """Prompts with the model's greedy continuations, and its logits (T, V) for each."""
    model.eval()
    sequences = [_continued(model, _prompt(model, tokenizer, text)) for text in PROMPTS]
    return sequences, [_logits(model, sequence) for sequence in sequences]


def _prompt(model: Any, tokenizer: Any, text: str) -> list[int]:
    room = model.config.max_position_embeddings - NEW_TOKENS
    return prompt_ids(tokenizer, [{"role": "user", "content": text}])[-room:]


@torch.inference_mode()
def _continued(model: Any, ids: list[int]) -> list[int]:
    cache, step = None, ids
    for _ in range(NEW_TOKENS):
        output = model(input_ids=torch.tensor([step]), past_key_values=cache, use_cache=True)
        cache, step = output.past_key_values, [int(output.logits[0, -1].argmax())]
        ids = [*ids, *step]
    return ids


@torch.inference_mode()
def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def _compare_tensors(found: Mapping[str, Tensor], folder: Path, quant: str) -> str:
    """Compares every tensor with the model's files."""
    weights = plan(folder, *read_config(folder), quant)
    for weight, values in read(weights):
        exact, back = values.to(torch.float32), found[weight.source]
        largest, worst = float(exact.abs().max()), float((exact - back).abs().max())
        if not worst <= ROUNDING[weight.kind] * largest:
            raise TunesmithError(
                f"{weight.name} in the file does not hold {weight.source}: they differ by up to {worst:.1e}, where the "
                f"largest value is {largest:.1e}. Nothing was written"
            )
    return f"tensors equal but for rounding: {len(weights)} of {len(weights)}"


def _compare_logits(expected: Sequence[Tensor], found: Sequence[Tensor], quant: str) -> str:
    """What the two say of the same sequences, as a sentence."""
    scale = max(float(logits.abs().max()) for logits in expected)
    worst = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) / scale
    equal = ties = total = 0
    for a, b in zip(expected, found, strict=True):
        a, b = a[-NEW_TOKENS - 1 : -1], b[-NEW_TOKENS - 1 : -1]  # each says the next token
        own, other = a.argmax(-1), b.argmax(-1)
        gap = (a.gather(1, own[:, None]) - a.gather(1, other[:, None]))[:, 0] / scale
        total += len(own)
        equal += int((own == other).sum())
        ties += int(((own != other) & (gap <= TIE.get(quant, 0.0))).sum())
    said = f"greedy tokens equal: {equal} of {total}; largest difference of logits: {worst:.1e} of the largest"
    if not worst <= LARGEST_DIFFERENCE[quant] or (quant in TIE and equal + ties < total):
        raise TunesmithError(f"the {quant} file does not do what the model does: {said}. Nothing was written")
    return f"{said} ({ties} tied)" if ties else said


def _config(file: Path, source: PreTrainedConfig) -> tuple[PreTrainedConfig, list[str]]:
    """The settings as `transformers` reads them from the file, completed, and the names of what it doesn't read."""
    found: Any = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    differing = [name for name in SETTINGS if getattr(found, name) != getattr(source, name)]
    exact = _exact(found)
    differing += [name for name, value in _exact(source).items() if not np.isclose(value, exact[name], rtol=1e-6)]
    unread = [name for name in UNREAD if getattr(found, name, None) != getattr(source, name, None)]
    for name in unread:
        setattr(found, name, getattr(source, name))
    if source.rope_parameters["rope_type"] != found.rope_parameters["rope_type"]:
        unread.append(SCALING)
        found.rope_parameters = source.rope_parameters
    if unread:
        differing += _differing_in_file(gguf.GGUFReader(file), source, unread)
    if differing:
        raise TunesmithError(f"the file says something else than the model about {', '.join(differing)}")
    return found, unread


def _differing_in_file(reader: gguf.GGUFReader, source: PreTrainedConfig, names: Sequence[str]) -> list[str]:
    """Those of `names` that the file itself has otherwise. Biases are tensors: without them, logits differ."""
    differing = []
    size = reader.get_field(f"{source.model_type}.attention.key_length")
    if "head_dim" in names and (size is None or size.contents() != head_size(source)):
        differing.append("head_dim")
    factors = [tensor.data for tensor in reader.tensors if tensor.name == ROPE_FACTORS]
    wanted = rope_factors(source)
    if SCALING in names and (wanted is None or not factors or not np.array_equal(factors[0], wanted)):
        differing.append(SCALING)
    return differing


def _exact(config: Any) -> dict[str, float]:
    return {"rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_parameters["rope_theta"]}


def _compare_tokens(file: Path, tokenizer: Any, tokens: Vocabulary) -> str:
    """Encodes texts with the tokenizer and with that of the file, and renders a chat with both."""
    other: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    left_out = _complete(other, tokenizer, tokens)
    texts = list(TEXTS)
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[2]}]
        texts.append(str(tokenizer.apply_chat_template(chat, tokenize=False)))
        rendered = str(other.apply_chat_template(chat, tokenize=False))
        if rendered != texts[-1]:
            raise TunesmithError(f"the chat template of the file renders {rendered!r}, not {texts[-1]!r}")
    compared = 0
    for text in texts:
        text = _normal(tokenizer, text)
        own, read = (each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, other))
        if own != read:
            raise TunesmithError(f"the tokenizer of the file makes {read} of {text!r}, not {own}")
        compared += len(own)
    said = f"tokens equal: {compared} of {compared}"
    return (
        f"{said} (with {' and '.join(left_out)}, which transformers doesn't read, taken from the model)"
        * bool(left_out)
        or said
    )


def _complete(other: Any, tokenizer: Any, tokens: Vocabulary) -> list[str]:
    """Puts in place what `transformers` doesn't read of a tokenizer; returns what that was."""
    own, read = tokenizer.backend_tokenizer, other.backend_tokenizer
    left_out = []
    if str(read.pre_tokenizer) != str(own.pre_tokenizer) or str(read.normalizer) != str(own.normalizer):
        left_out.append(f"the rule {tokens.pre}")
        read.pre_tokenizer, read.normalizer = own.pre_tokenizer, own.normalizer
    if getattr(own.model, "ignore_merges", False):
        read.model.ignore_merges = True
    return left_out


def _normal(tokenizer: Any, text: str) -> str:
    """The text as the tokenizer's own normalization leaves it, where that is one that GGUF doesn't hold."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    is_composing = normalizer is not None and type(normalizer).__name__ == "NFC"
    return str(normalizer.normalize_str(text)) if is_composing else text
