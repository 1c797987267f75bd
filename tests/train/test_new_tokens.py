"""Training with a chat template that brings tokens: rows, what ends a text, and saved runs that load anywhere."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.model.token_models import EOS, llama, phi, small_tokenizer
from tunesmith import SFTConfig, SFTTrainer, TunesmithError, clone_chat_template
from tunesmith.model.load import load_run
from tunesmith.ship.merge import MergeOptions, merge

ROWS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in (("ab", "xy"), ("cd", "zw"))
]
PROMPT = [{"role": "user", "content": "ab"}]


def save_base(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def trainer(
    model: Any, output: Path, *, lora: bool | dict[str, Any] = False, tokenizer: Any = None, **settings: Any
) -> Any:
    defaults: dict[str, Any] = {
        "chat_template_path": "chatml",
        "train_on": "assistant",
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    adapters: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return SFTTrainer(
        model,
        args=SFTConfig(output_dir=str(output), **(defaults | settings)),
        train_dataset=ROWS,
        processing_class=tokenizer,
        peft_config=LoraConfig(**adapters | (lora if isinstance(lora, dict) else {})) if lora else None,
    )


def untied() -> PreTrainedModel:
    return llama(tied=False)


each_head = pytest.mark.parametrize("make", [llama, untied, phi], ids=["tied", "untied", "head with a bias"])


def test_full_training_grows_the_rows_to_a_multiple_and_everything_saved_agrees_on_the_end(tmp_path: Path) -> None:
    run = trainer(save_base(llama(), tmp_path / "base"), tmp_path / "run")
    run.train()
    run.save_model()
    model, tokenizer = load(tmp_path / "run")
    assert (model.config.vocab_size, len(tokenizer)) == (320, 259)
    assert tokenizer.eos_token_id == model.config.eos_token_id == 258
    assert model.generation_config.eos_token_id[0] == 258
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id == EOS
    assert tokenizer.apply_chat_template(PROMPT, tokenize=False) == "<|im_start|>user\nab<|im_end|>\n"


def test_a_saved_model_that_learned_to_end_stops_there_with_its_own_generation_config(tmp_path: Path) -> None:
    run = trainer(
        save_base(llama(), tmp_path / "base"),
        tmp_path / "run",
        max_steps=60,
        learning_rate=2e-2,
        lr_scheduler_type="linear",
    )
    run.train()
    run.save_model()
    model, tokenizer = load(tmp_path / "run")
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "xy<|im_end|>"


def test_generation_stops_at_the_eos_token_of_the_config(tmp_path: Path) -> None:
    """The saved model is made to emit <|stop|>, whatever it reads."""
    tokenizer = small_tokenizer()
    tokenizer.add_tokens("<|stop|>", special_tokens=True)
    run = trainer(llama(rows=258), tmp_path, tokenizer=tokenizer, chat_template_path="plain", eos_token="<|stop|>")
    run.save_model()
    model, saved = load(tmp_path)
    assert saved.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id[0] == 257
    model.lm_head = torch.nn.Linear(32, 258)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.arange(258) == 257)
    generated = model.generate(torch.tensor([[65, 66]]), max_new_tokens=20, do_sample=False)
    assert generated[0, 2:].tolist() == [257]


def test_an_eos_token_that_is_not_in_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match=r"eos_token is '<\|im_end>'.*did you mean '<\|im_end\|>'"):
        trainer(llama(), tmp_path, tokenizer=small_tokenizer(), eos_token="<|im_end>")


def test_the_eos_token_of_the_config_may_be_one_that_the_template_brings(tmp_path: Path) -> None:
    run = trainer(llama(), tmp_path, tokenizer=small_tokenizer(), eos_token="<|im_start|>")
    assert run.processing_class.eos_token_id == 257


@each_head
def test_adapters_with_new_rows_load_with_plain_peft_and_give_the_same_logits(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    run = trainer(save_base(make(), tmp_path / "base"), tmp_path / "run", lora=True)
    run.train()
    run.save_model()
    loaded: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    ids = torch.tensor([[257, 65, 66, 258, 10, 257]])
    with torch.no_grad():
        expected = run.model.eval()(input_ids=ids).logits
        found = loaded.eval()(input_ids=ids).logits
        merged = loaded.merge_and_unload()(input_ids=ids).logits
    assert expected.shape[-1] == 259
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "lora",
    [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["whole", "lora"],
)
def test_new_tokens_are_told_apart_by_a_head_that_is_no_longer_tied(lora: dict[str, Any], tmp_path: Path) -> None:
    """The rows of new tokens begin alike: untrained, the head would give <|im_start|> and <|im_end|> the same logit."""
    run = trainer(save_base(llama(), tmp_path / "base"), tmp_path / "run", lora=lora)
    run.train()
    run.save_model()
    ids = torch.tensor([[257, 65, 66, 258, 10, 257]])
    with torch.no_grad():
        expected = run.model.eval()(input_ids=ids).logits
    assert (expected[..., 258] - expected[..., 257]).abs().min() > 1e-3
    report = merge(tmp_path / "run", tmp_path / "merged", MergeOptions(check=False))
    merged, _ = load(tmp_path / "merged")
    loaded: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    with torch.no_grad():
        for model in (merged, loaded):
            torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert report.untied


@each_head
def test_load_run_gives_the_base_model_rows_for_the_adapters(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    run = trainer(save_base(make(), tmp_path / "base"), tmp_path / "run", lora=True)
    run.train()
    run.save_model()
    model, tokenizer = load_run(str(tmp_path / "run"))
    ids = torch.tensor([[257, 65, 66, 258, 10, 257]])
    with torch.no_grad():
        expected = run.model.eval()(input_ids=ids).logits
        found = model(input_ids=ids.to(model.device)).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (tokenizer.eos_token_id, len(tokenizer)) == (258, 259)


@each_head
def test_the_new_rows_are_trained_and_no_others(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    base: Any = make()
    before = {
        "embeddings": base.get_input_embeddings().weight.detach().clone(),
        "head": base.get_output_embeddings().weight.detach().clone(),
    }
    run = trainer(save_base(base, tmp_path / "base"), tmp_path / "run", lora=True)
    run.train()
    merged = run.model.merge_and_unload()
    after = {"embeddings": merged.get_input_embeddings().weight, "head": merged.get_output_embeddings().weight}
    for name, rows in before.items():
        moved = (after[name][257:] - rows.mean(0)).abs().amax(dim=1)
        assert (moved > 1e-3).all(), f"{name}: rows moved by {moved.tolist()}"
        if make is not phi or name != "head":
            assert torch.equal(after[name][:257], rows)


@pytest.mark.parametrize("make", [llama, untied], ids=["tied", "untied"])
def test_saved_adapters_hold_the_new_rows_and_not_the_embeddings(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    run = trainer(
        save_base(make(), tmp_path / "base"), tmp_path / "run", lora=True, save_strategy="steps", save_steps=3
    )
    run.train()
    saved = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    rows = {name: tuple(tensor.shape) for name, tensor in saved.items() if "lora" not in name}
    delta = "token_adapter.trainable_tokens_delta"
    assert rows == {
        f"base_model.model.{layer}.{delta}": (2, 32)
        for layer in ("model.embed_tokens", *(() if make is llama else ("lm_head",)))
    }


def test_a_run_with_new_rows_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    base = save_base(untied(), tmp_path / "base")
    settings: dict[str, Any] = {"lora": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(base, tmp_path / "whole", **settings)
    whole.train()
    first = trainer(base, tmp_path / "parts", **settings)
    first.train()
    second = trainer(base, tmp_path / "parts", **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    theirs = dict(second.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, rtol=0, atol=1e-6)


def test_a_jinja_file_sets_the_template_and_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}")
    run = trainer(llama(), tmp_path, tokenizer=small_tokenizer(), chat_template_path=str(template), train_on="all")
    assert run.model.config.vocab_size == 257
    assert run.processing_class.chat_template == template.read_text()


def test_a_folder_brings_its_tokens_with_its_template(tmp_path: Path) -> None:
    source = small_tokenizer(eos_token="<end>")
    source.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>{% endfor %}"
    source.save_pretrained(tmp_path / "source")
    run = trainer(
        llama(), tmp_path, tokenizer=small_tokenizer(), chat_template_path=str(tmp_path / "source"), train_on="all"
    )
    assert run.model.config.vocab_size == 320
    assert run.model.config.eos_token_id == 257


def test_a_second_run_with_the_tokenizer_of_the_first_gets_its_rows_too(tmp_path: Path) -> None:
    base, tokenizer = save_base(llama(), tmp_path / "base"), small_tokenizer()
    for _ in range(2):
        run = trainer(base, tmp_path / "run", tokenizer=tokenizer, lora=True)
        indices = run.model.peft_config["default"].trainable_token_indices
        assert indices == {"model.embed_tokens": [257, 258]}


def test_the_tokenizer_of_another_model_is_not_a_reason_to_grow(tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match="it is the tokenizer of another model"):
        trainer(llama(rows=100), tmp_path, tokenizer=small_tokenizer())


def test_new_tokens_for_a_model_that_has_adapters_are_refused(tmp_path: Path) -> None:
    model = trainer(llama(), tmp_path, tokenizer=small_tokenizer(), chat_template_path="plain", lora=True).model
    with pytest.raises(TunesmithError, match="the model has adapters already; call clone_chat_template"):
        trainer(model, tmp_path, tokenizer=small_tokenizer())


# Tokens that were added before a trainer saw them


WITH_TOKEN = [{"prompt": "ab", "completion": "<x>y<z>"}]


def by_hand(base: str, *, resize: bool = True, tokens: list[str] | None = None) -> tuple[Any, Any]:
    model, tokenizer = load(Path(base))
    tokenizer.add_tokens(tokens or ["<x>", "<z>", "<unused>"])
    if resize:
        model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def on_tokens(model: Any, tokenizer: Any, output: Path, **arguments: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    args = SFTConfig(output_dir=str(output), disable_tqdm=True, **settings)
    given: dict[str, Any] = {"train_dataset": WITH_TOKEN, "processing_class": tokenizer}
    return SFTTrainer(model, args=args, **given | arguments)


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@each_head
def test_the_rows_of_tokens_that_were_added_by_hand_are_trained_from_where_they_are(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model, tokenizer = by_hand(save_base(make(), tmp_path / "base"))
    before = model.get_input_embeddings().weight.detach().clone()
    run = on_tokens(model, tokenizer, tmp_path / "run", peft_config=LORA)
    embeddings = run.model.get_base_model().get_input_embeddings()
    assert run.model.peft_config["default"].trainable_token_indices["model.embed_tokens"] == [257, 258]
    torch.testing.assert_close(embeddings(torch.arange(260)), before, rtol=0, atol=0)
    run.train()
    moved = (embeddings(torch.arange(260)) - before).abs().amax(dim=1)
    assert (moved[[257, 258]] > 1e-3).all()
    assert not moved[:257].any()
    run.save_model()
    saved, _ = load_run(str(tmp_path / "run"))
    ids = torch.tensor([[65, 257, 66, 258]])
    with torch.no_grad():
        found, expected = (each.cpu().eval()(input_ids=ids).logits for each in (saved, run.model))
    torch.testing.assert_close(found[..., :259], expected[..., :259], rtol=0, atol=1e-6)


def test_the_rows_of_a_cloned_chat_template_are_trained(tmp_path: Path) -> None:
    model, tokenizer = load(Path(save_base(untied(), tmp_path / "base")))
    model, tokenizer, added = clone_chat_template(model, tokenizer, source_tokenizer_path="chatml")
    run = on_tokens(model, tokenizer, tmp_path / "run", peft_config=LORA, train_dataset=ROWS)
    assert run.model.peft_config["default"].trainable_token_indices == {"model.embed_tokens": added, "lm_head": added}
    run.train()
    run.save_model()
    saved, _ = load_run(str(tmp_path / "run"))
    ids = torch.tensor([[257, 65, 66, 258]])
    with torch.no_grad():
        found, expected = (each.cpu().eval()(input_ids=ids).logits for each in (saved, run.model))
    torch.testing.assert_close(found[..., :259], expected[..., :259], rtol=0, atol=1e-6)


def test_adapters_that_leave_new_rows_alone_are_refused_and_those_that_train_them_are_not(tmp_path: Path) -> None:
    model, tokenizer = by_hand(save_base(llama(), tmp_path / "base"))
    with pytest.raises(
        TunesmithError, match=r"never saw \(257 '<x>', 258 '<z>'\).*trainable_token_indices=\[257, 258\]"
    ):
        on_tokens(get_peft_model(model, copy.deepcopy(LORA)), tokenizer, tmp_path / "run")
    model, tokenizer = by_hand(str(tmp_path / "base"))
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[257, 258], task_type="CAUSAL_LM")
    assert on_tokens(get_peft_model(model, config), tokenizer, tmp_path / "run").trainable.trained
    model, tokenizer = by_hand(str(tmp_path / "base"))
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    run = on_tokens(model, tokenizer, tmp_path / "run", peft_config=config)
    assert run.model.peft_config["default"].trainable_token_indices is None


def test_a_token_without_a_row_is_named_where_the_data_has_it(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    for config in (None, LORA):
        model, tokenizer = by_hand(base, resize=False)
        with pytest.raises(
            TunesmithError, match=r"lacks \(257 '<x>', 258 '<z>'\): its embeddings have 257 rows.*resize"
        ):
            on_tokens(model, tokenizer, tmp_path / "run", peft_config=config)
    held_out: dict[str, Any] = {"train_dataset": [{"text": "ab"}], "eval_dataset": {"held out": WITH_TOKEN}}
    with pytest.raises(TunesmithError, match=r"the model lacks \(257 '<x>', 258 '<z>'\)"):
        on_tokens(model, tokenizer, tmp_path / "run", **held_out)
    model, tokenizer = by_hand(base, resize=False, tokens=["<unused>"])
    on_tokens(model, tokenizer, tmp_path / "run")


def test_rows_beyond_the_tokens_are_fine(tmp_path: Path) -> None:
    base = save_base(llama(rows=300), tmp_path / "base")
    model, tokenizer = load(Path(base))
    run = on_tokens(model, tokenizer, tmp_path / "run", peft_config=LORA)
    assert run.model.peft_config["default"].trainable_token_indices is None
    model, tokenizer = by_hand(base, resize=False)
    run = on_tokens(model, tokenizer, tmp_path / "run", peft_config=LORA)
    assert run.model.peft_config["default"].trainable_token_indices == {"model.embed_tokens": [257, 258]}
