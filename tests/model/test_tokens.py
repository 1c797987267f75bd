"""Built-in chat templates, the tokens they bring, the rows of the model for them, and the adapters that train these."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import SecurityError, TemplateError
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AddedToken,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import tunesmith
from tunesmith import TunesmithError, clone_chat_template
from tunesmith.data.chat import ChatTemplate, render
from tunesmith.model.tokens import BUILT_IN, TEMPLATES, extend_tokenizer, resize_for, train_new_tokens
from tunesmith.types import Conversation, Message

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


# The built-in templates

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
END = {name: template.eos or "<|endoftext|>" for name, template in BUILT_IN.items()}
SPACE = {name: " " if name in ("mistral", "plain") else "" for name in BUILT_IN}  # before an answer
each_template = pytest.mark.parametrize("name", BUILT_IN)


def with_template(name: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    tokenizer = small_tokenizer(**kwargs)
    extend_tokenizer(tokenizer, name)
    return tokenizer


def shown(name: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return str(with_template(name).apply_chat_template(messages, tokenize=False, **kwargs))


def test_the_package_has_the_templates_that_the_specification_names() -> None:
    assert set(BUILT_IN) == {"chatml", "llama3", "zephyr", "mistral", "gemma", "alpaca", "plain"} == set(RENDERED)
    assert {file.name for file in TEMPLATES.iterdir()} == {f"{name}.jinja" for name in BUILT_IN}


@each_template
def test_a_conversation_with_a_system_message_and_two_turns_is_rendered_as_written_here(name: str) -> None:
    assert shown(name, TALK) == RENDERED[name]


@each_template
@pytest.mark.parametrize("length", [2, 4])
def test_what_inference_renders_is_the_beginning_of_the_conversation_up_to_the_answer(name: str, length: int) -> None:
    prompt = shown(name, TALK[:length], add_generation_prompt=True)
    answer = SPACE[name] + TALK[length]["content"] + END[name]
    assert RENDERED[name].startswith(prompt + answer)


@each_template
def test_a_conversation_without_a_system_message_has_the_same_turns(name: str) -> None:
    turns = RENDERED[name].replace("Be brief.\n\n", "", 1) if name in ("mistral", "gemma") else RENDERED[name]
    turns = turns[turns.index({"alpaca": "\n\n###", "plain": "User", "chatml": "<|im_start|>user", "zephyr": "<|user|>",
                               "llama3": "<|start_header_id|>user"}.get(name, turns[:1])) :]  # fmt: skip
    introduction = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert shown(name, TALK[1:]) == (introduction if name == "alpaca" else "") + turns


@each_template
@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "completion"])
def test_the_trained_spans_are_the_answers_with_their_end_token(name: str, train_on: Any) -> None:
    """`render` compares its spans with the {% generation %} blocks, and refuses where they differ."""
    messages = tuple(Message(fields=message) for message in TALK)
    conversation = Conversation(messages=messages, prompt_length=4 if train_on == "completion" else None)
    rendered = render(conversation, ChatTemplate(with_template(name)), train_on)
    answers = [SPACE[name] + text + END[name] for text in ("Hello", "See you")]
    spans = [rendered.text[span.start : span.stop] for span in rendered.spans]
    assert spans == (answers if train_on == "assistant" else answers[1:])


@each_template
def test_the_generation_blocks_cover_an_answer_from_behind_the_prompt_through_its_end_token(name: str) -> None:
    tokenizer = with_template(name)
    encoded: Any = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "".join(SPACE[name] + text + END[name] for text in ("Hello", "See you"))


@each_template
@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([{"role": "tool", "content": "4"}], None),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], None),
        ([TALK[1], {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}], None),
        (TALK, [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    ],
    ids=["tool message", "content of parts", "tool call", "tools"],
)
def test_what_a_template_has_no_place_for_is_refused(name: str, messages: Any, tools: Any) -> None:
    with pytest.raises(TemplateError, match=rf"The {name} template (takes|has no place)"):
        shown(name, messages, tools=tools)


@pytest.mark.parametrize("name", ["mistral", "gemma"])
@pytest.mark.parametrize(
    "roles", ["user user", "assistant", "user assistant assistant", "user system", "system system"]
)
def test_templates_of_strict_turns_refuse_another_order(name: str, roles: str) -> None:
    with pytest.raises(TemplateError, match=f"The {name} template takes user and assistant messages in turn"):
        shown(name, [{"role": role, "content": "Hi"} for role in roles.split()])


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_system_message_that_could_not_be_put_anywhere_is_refused(name: str) -> None:
    with pytest.raises(TemplateError, match="needs a user message behind a system message"):
        shown(name, TALK[:1], add_generation_prompt=True)


@each_template
def test_texts_begin_as_the_tokenizer_begins_them(name: str) -> None:
    plain = with_template(name, bos="<s>").apply_chat_template(TALK, tokenize=False)
    assert plain == "<s>" + RENDERED[name]


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


def test_the_users_config_is_not_changed() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    changed: Any = train_new_tokens(config, llama(), [255])
    assert config.trainable_token_indices is None
    assert changed.trainable_token_indices == {"model.embed_tokens": [255]}


def test_adapters_that_cannot_train_rows_are_refused() -> None:
    with pytest.raises(
        TunesmithError, match=r"brings 1 new tokens, and adapters can't train single rows here \(IA3Config"
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
