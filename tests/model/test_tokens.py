"""The tokens that a chat template brings, the rows of the model for them, and the adapters that train these."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import SecurityError
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AddedToken,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import tunesmith
from tests.model.token_models import BYTES, RENDERED, TALK, embeddings, head, llama, phi, small_tokenizer
from tunesmith import TunesmithError, clone_chat_template
from tunesmith.model.adapters import adapt
from tunesmith.model.tokens import extend_tokenizer, resize_for, train_new_tokens

# Sources


def test_a_built_in_brings_its_tokens_and_what_ends_a_text() -> None:
    tokenizer = small_tokenizer()
    added = extend_tokenizer(tokenizer, "chatml")
    assert added == [257, 258]
    assert tokenizer.convert_ids_to_tokens(added) == ["<|im_start|>", "<|im_end|>"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer("<|im_end|>")["input_ids"] == [258]
    assert tokenizer.decode([258], skip_special_tokens=True) == ""


def test_a_second_time_adds_nothing() -> None:
    tokenizer = small_tokenizer()
    extend_tokenizer(tokenizer, "chatml")
    assert extend_tokenizer(tokenizer, "chatml") == []
    assert len(tokenizer) == 259


@pytest.mark.parametrize("name", ["zephyr", "mistral", "alpaca", "plain"])
def test_templates_of_plain_text_bring_no_tokens(name: str) -> None:
    tokenizer = small_tokenizer()
    assert extend_tokenizer(tokenizer, name) == []
    assert (tokenizer.eos_token, len(tokenizer)) == ("<|endoftext|>", 257)


def test_a_template_that_ends_with_the_tokenizers_eos_needs_one() -> None:
    with pytest.raises(TunesmithError, match="ends answers with the tokenizer's eos_token, and it has none"):
        extend_tokenizer(small_tokenizer(eos_token=None), "plain")


def test_a_pad_token_that_is_there_stays() -> None:
    tokenizer = small_tokenizer(pad_token="A")
    extend_tokenizer(tokenizer, "chatml")
    assert tokenizer.pad_token == "A"


def test_a_token_that_was_a_piece_of_ordinary_text_keeps_its_id_and_is_no_longer_cut_up() -> None:
    vocabulary = {byte: i for i, byte in enumerate(BYTES)} | {"<|im_end|>": 256}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(tokenizer("<|im_end|>")["input_ids"]) == 10
    assert extend_tokenizer(tokenizer, "chatml") == [257]
    assert tokenizer("<|im_end|>")["input_ids"] == [256]


def test_a_jinja_file_is_a_template_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    model, tokenizer = llama(), small_tokenizer()
    _, _, added = clone_chat_template(model, tokenizer, tmp_path / "mine.jinja", resize_to_multiple_of=None)
    assert added == []
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "Be brief.<|im_end|>"
    assert (tokenizer.eos_token, len(tokenizer), embeddings(model).shape[0]) == ("<|endoftext|>", 257, 257)


def test_a_hostile_template_is_not_run_when_it_is_cloned_and_meets_the_sandbox_when_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "hostile.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    tokenizer = small_tokenizer()
    extend_tokenizer(tokenizer, tmp_path / "hostile.jinja")
    with pytest.raises(SecurityError, match=r"access to attribute '__class__' .* is unsafe"):
        tokenizer.apply_chat_template(TALK, tokenize=False)


def test_a_missing_jinja_file_is_named() -> None:
    with pytest.raises(TunesmithError, match=r"there is no file nowhere\.jinja"):
        extend_tokenizer(small_tokenizer(), "nowhere.jinja")


def test_a_folders_tokenizer_gives_template_special_tokens_and_roles(tmp_path: Path) -> None:
    """Of the tokens that aren't special only those that the template writes: runs of spaces would change other text."""
    source = small_tokenizer(pad_token="<pad>", eos_token="<end>")
    source.add_tokens([AddedToken("<think>", special=False), AddedToken("   "), AddedToken("unused")])
    source.add_tokens([AddedToken("<extra>", special=True)])
    source.chat_template = "{{ messages[0].content }}   <think><end>"
    source.save_pretrained(tmp_path)
    tokenizer = small_tokenizer()
    added = extend_tokenizer(tokenizer, str(tmp_path))
    assert set(tokenizer.convert_ids_to_tokens(added)) == {"<pad>", "<end>", "<think>", "<extra>"}
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<end>", "<pad>")
    assert tokenizer.chat_template == source.chat_template
    assert tokenizer("a   b")["input_ids"] == small_tokenizer()("a   b")["input_ids"]
    special = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert special == {"<|endoftext|>": True, "<pad>": True, "<end>": True, "<think>": False, "<extra>": True}


def test_a_source_without_a_template_is_refused(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(TunesmithError, match="has no chat template; the built-in ones: chatml, llama3"):
        extend_tokenizer(small_tokenizer(), str(tmp_path))


def test_a_misspelt_built_in_is_recognised() -> None:
    with pytest.raises(TunesmithError, match="did you mean 'chatml'"):
        extend_tokenizer(small_tokenizer(), "chatlm")


# Rows


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_ones_and_the_old_stay(tied: bool) -> None:
    model, tokenizer = llama(tied=tied), small_tokenizer()
    before, before_head = embeddings(model), head(model).weight.detach().clone()
    returned, returned_tokenizer, added = clone_chat_template(model, tokenizer, "chatml")
    assert returned is model
    assert returned_tokenizer is tokenizer
    assert added == [257, 258]
    for now, then in ((embeddings(model), before), (head(model).weight.detach(), before_head)):
        assert now.shape == (320, 32)
        assert torch.equal(now[:257], then)
        torch.testing.assert_close(now[257:], then.mean(0).expand(63, 32), rtol=0, atol=1e-7)
    assert (head(model).weight is model.get_input_embeddings().weight) == tied
    assert model.config.vocab_size == 320
    assert model(torch.tensor([[257, 258]])).logits.shape[-1] == 320


def test_the_heads_bias_gets_the_mean_too() -> None:
    model = phi()
    before = head(model).bias.detach().clone()
    clone_chat_template(model, small_tokenizer(), "chatml", resize_to_multiple_of=None)
    assert torch.equal(head(model).bias[:257], before)
    torch.testing.assert_close(head(model).bias[257:], before.mean().expand(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("multiple", "rows"), [(None, 259), (1, 259), (7, 259), (64, 320), (100, 300)])
def test_rows_are_padded_to_the_multiple_and_padding_is_no_token(multiple: int | None, rows: int) -> None:
    model, tokenizer = llama(), small_tokenizer()
    clone_chat_template(model, tokenizer, "chatml", resize_to_multiple_of=multiple)
    assert (embeddings(model).shape[0], model.config.vocab_size, len(tokenizer)) == (rows, rows, 259)


def test_tokens_go_into_spare_rows_and_none_is_taken_away() -> None:
    """Many models have more rows than tokens. The mean is that of the tokens' rows."""
    model = llama(rows=384)
    before = embeddings(model)
    clone_chat_template(model, small_tokenizer(), "chatml")
    assert embeddings(model).shape == before.shape
    torch.testing.assert_close(embeddings(model)[257:259], before[:257].mean(0).expand(2, 32), rtol=0, atol=1e-7)
    assert torch.equal(embeddings(model)[259:], before[259:])


def test_bfloat16_rows_are_the_mean_taken_in_float32() -> None:
    model = llama().bfloat16()
    before = embeddings(model)
    clone_chat_template(model, small_tokenizer(), "chatml")
    assert torch.equal(embeddings(model)[257], before.float().mean(0).bfloat16())


def test_tokenizer_config_and_generation_config_agree_also_when_loaded_again(tmp_path: Path) -> None:
    model, tokenizer, _ = clone_chat_template(llama(), small_tokenizer(), "chatml")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for config in (model.config, model.generation_config, loaded.config, loaded.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (258, 256)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (258, 256)
    assert theirs.apply_chat_template(TALK, tokenize=False) == RENDERED["chatml"]
    assert torch.equal(embeddings(loaded), embeddings(model))


def test_a_model_with_adapters_is_refused() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TunesmithError, match="clone the chat template before"):
        clone_chat_template(model, small_tokenizer(), "chatml")  # type: ignore[arg-type]


def test_clone_chat_template_is_public_and_importing_the_package_stays_light() -> None:
    assert "clone_chat_template" in tunesmith.__all__
    program = "import sys, tunesmith; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Adapters


def adapted(model: PreTrainedModel, **kwargs: Any) -> Any:
    """`model` with LoRA on q_proj, or as `kwargs` say, that trains the two tokens of chatml: ids 257 and 258."""
    tokenizer = small_tokenizer()
    added = extend_tokenizer(tokenizer, "chatml")
    resize_for(model, tokenizer, added, None)
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]} | kwargs
    return get_peft_model(model, train_new_tokens(LoraConfig(**settings), model, added))


def trained(model: PeftModel) -> dict[str, tuple[int, ...]]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora" not in name
    }


def test_tied_embeddings_train_the_new_rows_once() -> None:
    model = adapted(llama())
    assert trained(model) == {"model.embed_tokens.token_adapter.trainable_tokens_delta.default": (2, 32)}
    with torch.no_grad():
        dict(model.named_parameters())[
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
        ].fill_(3.0)
    assert torch.equal(model.get_base_model().lm_head.weight[257:], torch.full((2, 32), 3.0))


def test_untied_embeddings_train_the_new_rows_of_both() -> None:
    model = adapted(llama(tied=False))
    assert trained(model) == {
        "model.embed_tokens.token_adapter.trainable_tokens_delta.default": (2, 32),
        "lm_head.token_adapter.trainable_tokens_delta.default": (2, 32),
    }


def test_a_head_with_a_bias_is_trained_whole_and_keeps_it() -> None:
    assert trained(adapted(phi())) == {
        "model.embed_tokens.token_adapter.trainable_tokens_delta.default": (2, 32),
        "lm_head.modules_to_save.default.weight": (259, 32),
        "lm_head.modules_to_save.default.bias": (259,),
    }


def test_adapters_change_nothing_before_the_first_step() -> None:
    for make in (llama, lambda: llama(tied=False), phi):
        model, tokenizer = make(), small_tokenizer()
        resize_for(model, tokenizer, extend_tokenizer(tokenizer, "chatml"), None)
        ids = torch.tensor([[65, 257, 66, 258]])
        with torch.no_grad():
            before = model.eval()(ids).logits
            after = adapted(make()).eval()(ids).logits
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_the_new_rows_of_a_half_precision_model_are_trained_in_float32() -> None:
    model = adapted(llama(tied=False).bfloat16())
    rows = [parameter for name, parameter in model.named_parameters() if "trainable_tokens_delta" in name]
    assert [row.dtype for row in rows] == [torch.float32, torch.float32]
    model(torch.tensor([[257, 65]])).logits.float().logsumexp(-1).sum().backward()
    assert all(row.grad is not None and row.grad.abs().sum() > 0 for row in rows)


def test_rows_that_the_user_trains_are_joined_by_the_new_ones() -> None:
    listed = adapted(llama(), trainable_token_indices=[5])
    named = adapted(llama(), trainable_token_indices={"embed_tokens": [5]})
    for model in (listed, named):
        assert model.peft_config["default"].trainable_token_indices == {"model.embed_tokens": [5, 257, 258]}
        assert trained(model) == {"model.embed_tokens.token_adapter.trainable_tokens_delta.default": (3, 32)}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": r".*\.(q_proj|embed_tokens)|lm_head"},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["listed", "pattern", "modules_to_save"],
)
def test_embeddings_that_the_user_trains_otherwise_stay_so(kwargs: dict[str, Any]) -> None:
    model = adapted(llama(tied=False), **kwargs)
    assert model.peft_config["default"].trainable_token_indices is None


@pytest.mark.parametrize(
    "kwargs",
    [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["whole", "lora"],
)
def test_the_head_gets_new_rows_of_its_own_where_tied_embeddings_are_trained_by_themselves(
    kwargs: dict[str, Any],
) -> None:
    model = adapted(llama(), **kwargs)
    assert model.peft_config["default"].trainable_token_indices == {"lm_head": [257, 258]}
    assert trained(model)["lm_head.token_adapter.trainable_tokens_delta.default"] == (2, 32)


@pytest.mark.parametrize("field", ["modules_to_save", "target_modules"])
def test_what_is_trained_of_embeddings_and_head_as_one_needs_no_other_rows(field: str) -> None:
    model = adapted(llama(), **{field: ["embed_tokens"]}, ensure_weight_tying=True)
    assert model.peft_config["default"].trainable_token_indices is None


@pytest.mark.parametrize("field", ["modules_to_save", "target_modules"])
def test_a_tied_head_that_is_trained_by_itself_beside_new_rows_is_refused(field: str) -> None:
    model = llama()
    settings: dict[str, Any] = {"target_modules": ["q_proj"]} | {field: ["lm_head"]}
    config = train_new_tokens(LoraConfig(**settings), model, [255])
    with pytest.raises(TunesmithError, match=rf"peft can't do both. Name model.embed_tokens in {field}, too, or take"):
        adapt(model, config)
    adapt(llama(tied=False), config)


def test_the_users_config_is_not_changed() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    changed: Any = train_new_tokens(config, llama(), [255])
    assert config.trainable_token_indices is None
    assert changed.trainable_token_indices == {"model.embed_tokens": [255]}


def test_adapters_that_cannot_train_rows_are_refused() -> None:
    with pytest.raises(
        TunesmithError, match=r"there are 1 new tokens, and adapters can't train single rows here \(IA3Config"
    ):
        train_new_tokens(IA3Config(target_modules=["q_proj"], feedforward_modules=[]), llama(), [255])


def test_the_embedding_is_found_under_another_name() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=257, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    )
    assert list(trained(adapted(OPTForCausalLM(config)))) == [
        "model.decoder.embed_tokens.token_adapter.trainable_tokens_delta.default"
    ]
