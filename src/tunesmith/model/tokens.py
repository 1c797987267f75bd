"""Chat templates and the tokens they need: from a source to a tokenizer, and from there to a model and its adapters.

A source is a built-in template, a `.jinja` file, a folder, or a name on the hub. Templates are never run here: the
tokenizer runs them, in `transformers`' sandbox.

Shapes: V rows of the embeddings, H hidden size.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import TunesmithError, nearest
from tunesmith.model.adapters import is_named, trains_layer
from tunesmith.model.load import load_tokenizer

FILES = (".jinja", ".j2")
TEMPLATES = files("tunesmith") / "data" / "templates"


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltIn:
    """A template of the package, the special tokens that it writes, and the one that ends a text.

    `eos` None: the tokenizer's own.
    """

    name: str
    tokens: tuple[str, ...] = ()
    eos: str | None = None

    @property
    def text(self) -> str:
        """The template, without the beginning-of-sequence token, which the tokenizer decides on."""
        return (TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")


BUILT_IN = {
    "chatml": BuiltIn(name="chatml", tokens=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
    "llama3": BuiltIn(
        name="llama3", tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), eos="<|eot_id|>"
    ),
    "zephyr": BuiltIn(name="zephyr"),
    "mistral": BuiltIn(name="mistral"),
    "gemma": BuiltIn(name="gemma", tokens=("<start_of_turn>", "<end_of_turn>"), eos="<end_of_turn>"),
    "alpaca": BuiltIn(name="alpaca"),
    "plain": BuiltIn(name="plain"),
}


def clone_chat_template(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer_path: str | Path,
    resize_to_multiple_of: int | None = 64,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """Give `model` and `tokenizer` the chat template of a source, and the tokens that it needs. Both are changed.

    `source_tokenizer_path` is a folder or a name on the hub (template, special tokens, end and padding token are its
    tokenizer's), a `.jinja` file (a template alone), or chatml | llama3 | zephyr | mistral | gemma | alpaca | plain; a
    folder of such a name is written "./chatml". The embeddings grow to a multiple of `resize_to_multiple_of` rows, and
    never shrink; the rows of new tokens, and those above the last token, are the mean of the others.

    Returns the model, the tokenizer, and the ids of the tokens that were added. A trainer that is given a `peft_config`
    trains their rows; adapters that are made elsewhere need `trainable_token_indices={"embed_tokens": ids, "lm_head":
    ids}`. For `peft` alone, saved adapters fit onto the base model only where the rows are as many as the tokens: then
    pass `resize_to_multiple_of=None`. `SFTConfig.chat_template_path` takes care of both.

    Raises TunesmithError for a source that can't be used and a model that has adapters already.
    """
    if isinstance(model, PeftModel):
        raise TunesmithError("the model has adapters; clone the chat template before they are added")
    added = extend_tokenizer(tokenizer, source_tokenizer_path)
    resize_for(model, tokenizer, added, resize_to_multiple_of)
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None:
            config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model, tokenizer, added


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, source: str | Path, *, trust_remote_code: bool = False
) -> list[int]:
    """Give `tokenizer` the template, the end and the padding token of `source`; missing tokens are added. Returns their
    ids. See `clone_chat_template` for the sources.

    A tokenizer without a padding token takes what ended a text so far. Raises TunesmithError.
    """
    before = tokenizer.eos_token
    if Path(source).suffix in FILES:
        if not Path(source).is_file():
            raise TunesmithError(f"chat template: there is no file {source}")
        tokenizer.chat_template = Path(source).read_text(encoding="utf-8")
        added: list[int] = []
    elif str(source) in BUILT_IN:
        added = _take_built_in(tokenizer, BUILT_IN[str(source)])
    else:
        added = _take(tokenizer, str(source), trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = before or tokenizer.eos_token
    return added


def _take_built_in(tokenizer: PreTrainedTokenizerBase, template: BuiltIn) -> list[int]:
    if template.eos is None and tokenizer.eos_token is None:
        raise TunesmithError(
            f"the chat template {template.name} ends answers with the tokenizer's eos_token, and it has none; "
            "set eos_token, or take chatml, which brings one"
        )
    added = _add(tokenizer, [_special(token) for token in template.tokens])
    if template.eos is not None:
        tokenizer.eos_token = template.eos
    # The model was pretrained on texts that begin as its tokenizer begins them.
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{- bos_token }}" if begins else "") + template.text
    return added


def _take(tokenizer: PreTrainedTokenizerBase, source: str, trust_remote_code: bool) -> list[int]:
    try:
        other = load_tokenizer(source, trust_remote_code=trust_remote_code)
    except TunesmithError as error:
        raise TunesmithError(
            f"{error}\nBuilt-in chat templates: {', '.join(BUILT_IN)}{nearest(source, BUILT_IN)}"
        ) from error
    if other.chat_template is None:
        raise TunesmithError(
            f"the tokenizer of {source} has no chat template; the built-in ones: {', '.join(BUILT_IN)}"
        )
    template, roles = str(other.chat_template), (other.eos_token, other.pad_token)
    # Of the tokens that aren't special, those that the template writes, such as <think>. Others, runs of spaces say,
    # would change how ordinary text is cut up.
    shared = [
        token
        for token in other.added_tokens_decoder.values()
        if token.special or (token.content.strip() and token.content in template)
    ]
    added = _add(tokenizer, [*shared, *(_special(token) for token in roles if token is not None)])
    tokenizer.chat_template = other.chat_template
    if other.eos_token is not None:
        tokenizer.eos_token = other.eos_token
    if other.pad_token is not None:
        tokenizer.pad_token = other.pad_token
    return added


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[AddedToken]) -> list[int]:
    """The ids of those of `tokens` that were not in the vocabulary before. One that was, as a piece of ordinary text,
    keeps its id and is no longer cut up."""
    vocabulary, whole = tokenizer.get_vocab(), tokenizer.added_tokens_encoder
    wanted = {token.content: token for token in tokens if token.content not in whole}
    tokenizer.add_tokens(list(wanted.values()))
    return sorted(i for token, i in tokenizer.get_vocab().items() if token in wanted and token not in vocabulary)


def resize_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: Sequence[int], multiple: int | None
) -> None:
    """Give each token a row in the input and output embeddings, and the number of rows (V) a common `multiple`.

    The rows of the `added` tokens and all new ones are the mean of the rows below them (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html), the head's bias too. Rows are never taken away.
    """
    embeddings: Any = model.get_input_embeddings()
    before = embeddings.num_embeddings
    # `len(tokenizer)` is less than the highest id where the ids have gaps.
    rows = max(before, max(tokenizer.get_vocab().values()) + 1)
    model.resize_token_embeddings(rows, pad_to_multiple_of=multiple, mean_resizing=False)
    embeddings = model.get_input_embeddings()
    new = sorted({*added, *range(before, embeddings.num_embeddings)})
    if not new:
        return
    head = model.get_output_embeddings()
    parameters = {id(p): p for p in (embeddings.weight, *(() if head is None else head.parameters()))}  # tied: once
    with torch.no_grad():
        for parameter in parameters.values():
            with gather_params_ctx([parameter]):  # whole on every process, where DeepSpeed has cut it up
                parameter[new] = parameter[: new[0]].mean(0, dtype=torch.float32).to(parameter.dtype)


def tokens_lacking_in(base: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool) -> set[int]:
    """The ids of tokens that were added to `tokenizer`, and that the tokenizer of the model `base` does not have: the
    model never saw them. Empty where that tokenizer can't be loaded."""
    try:
        known = load_tokenizer(base, trust_remote_code=trust_remote_code).get_vocab()
    except TunesmithError:
        return set()
    return {i for token, i in tokenizer.get_added_vocab().items() if known.get(token) != i}


def trains_rows(model: PeftModel) -> bool:
    """Whether the adapters of `model` train rows of the input embeddings."""
    embeddings = model.get_base_model().get_input_embeddings()  # type: ignore[operator]
    return any(parameter.requires_grad for parameter in embeddings.parameters())


def train_new_tokens(config: PeftConfig, model: PreTrainedModel, added: Sequence[int]) -> PeftConfig:
    """A copy of `config` whose adapters train the rows of the `added` tokens too, in the input embeddings and the head.

    What `config` trains of the two already, by modules_to_save or target_modules, stays as it is. Where it trains one
    end of tied embeddings by itself, the other keeps the base model's matrix, and gets its own rows. A head with a bias
    is trained whole, since `peft` loses the bias where it trains single rows. Raises TunesmithError when the adapters
    can't train rows.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    biased = head is not None and getattr(head, "bias", None) is not None
    layers = {name: module for name, module in model.named_modules() if module in (embeddings, head)}
    trained = {name for name in layers if trains_layer(config, name)}
    if tied and (not trained or getattr(config, "ensure_weight_tying", False)):  # what is done to one is done to both
        layers = {name: module for name, module in layers.items() if module is embeddings and not trained}
    names = [name for name in layers if name not in trained]
    if not names:
        return config
    if not hasattr(config, "trainable_token_indices") or (tied and biased):
        reason = "a tied head with a bias" if tied and biased else type(config).__name__
        raise TunesmithError(
            f"there are {len(added)} new tokens, and adapters can't train single rows here ({reason}). Take a chat "
            "template whose tokens the vocabulary has, such as plain, or train without adapters"
        )
    whole = [name for name in names if biased and layers[name] is head]
    changed: Any = copy.copy(config)
    indices = changed.trainable_token_indices or {}
    if not isinstance(indices, dict):
        indices = {next(name for name, module in layers.items() if module is embeddings): indices}
    for name in (name for name in names if name not in whole):  # in order: so the optimizer counts its parameters
        theirs = [key for key in indices if is_named(name, key)]
        rows = sorted({*added, *(row for key in theirs for row in indices[key])})
        indices = {key: value for key, value in indices.items() if key not in theirs} | {name: rows}
    changed.trainable_token_indices = indices
    if whole:
        changed.modules_to_save = [*(changed.modules_to_save or ()), *whole]
    return cast(PeftConfig, changed)


def save_rows_only(model: PeftModel) -> None:
    """Let `model.save_pretrained` write adapters and the rows they train, not the whole embeddings, as `peft` does once
    these have grown: the other rows are those of the base model. Where adapters of low rank sit on the embeddings, the
    rows that they add to are needed, and nothing changes."""
    base: Any = model.get_base_model()
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    if all(isinstance(layer, AuxiliaryTrainingWrapper) for layer in layers):
        model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]
