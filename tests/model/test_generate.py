"""Answers are those of the plain reference, whatever the batch, and end where the model ends them."""

import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.data.prompts import prompt_ids
from tunesmith.errors import TunesmithError
from tunesmith.model.generate import Sampling, answer_ids, generate, stop_ids, stream
from tunesmith.model.load import load_model, load_tokenizer

PROMPTS = [[{"role": "user", "content": "say " + "x" * length}] for length in (1, 30, 4, 12, 7)]


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    """Weights large enough that answers depend on the prompt."""
    model = load_model(str(tiny_model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model))


@torch.no_grad()
def reference(model: Any, tokenizer: Any, messages: list[dict[str, str]], count: int) -> str:
    """Token by token, without cache, batch or padding."""
    model.eval()
    ids = prompt_ids(tokenizer, messages)
    start = len(ids)
    for _ in range(count):
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop_ids(model, tokenizer):
            break
        ids.append(token)
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_greedy_answers_are_the_references_in_the_order_of_the_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    expected = [reference(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    done: list[int] = []
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size, progress=done.append)
    assert answers == expected
    assert len(set(answers)) == len(PROMPTS)
    assert done == [1, 2, 3, 4, 5]


def test_adapters_take_part(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4))
    answers = generate(adapted, tokenizer, PROMPTS, max_new_tokens=8)
    assert answers != plain
    assert answers == [reference(adapted, tokenizer, prompt, 8) for prompt in PROMPTS]
    with adapted.disable_adapter():
        assert generate(adapted, tokenizer, PROMPTS, max_new_tokens=8) == plain


def test_an_answer_ends_before_any_stop_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    whole = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    stop = next(i for i, token in enumerate(ids) if i > 2 and token not in ids[:i])
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, ids[stop]]
    assert generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12) == [tokenizer.decode(ids[:stop])]


def test_stop_tokens_are_those_of_tokenizer_generation_config_and_template(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config = GenerationConfig(eos_token_id=[7, 0])
    assert stop_ids(model, tokenizer) == [0, 7, 2]  # <|endoftext|>, the config's, <|im_end|> of the template
    tokenizer.chat_template = None
    assert stop_ids(model, tokenizer) == [0, 7]


def test_the_models_own_generation_config_is_neither_mixed_in_nor_changed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    own = GenerationConfig(do_sample=True, temperature=0.1, repetition_penalty=9.0, max_length=3, use_cache=False)
    model.generation_config = own
    before = own.to_dict()
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert model.generation_config is own
    assert own.to_dict() == before
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


def test_sampling_follows_torchs_seed_and_its_temperature(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    def sampled(seed: int, temperature: float, top_p: float = 1.0) -> list[str]:
        torch.manual_seed(seed)
        return generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=temperature, top_p=top_p)

    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert sampled(1, 5.0) == sampled(1, 5.0) != sampled(2, 5.0)
    assert sampled(1, 1e-4) == greedy
    assert sampled(1, 5.0, top_p=1e-6) == greedy


def test_draws_are_those_of_transformers_at_the_same_seed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = prompt_ids(tokenizer, PROMPTS[1])
    for settings in (
        *({"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 3.0, "top_p": 0.95}),
        *({"temperature": 2.0, "top_k": 5}, {"temperature": 2.0, "min_p": 0.3}),
        {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.7},
    ):
        sampling = Sampling(max_new_tokens=20, **cast(Any, settings))
        torch.manual_seed(4)
        [done] = answer_ids(model.eval(), tokenizer, [ids], sampling)
        drawn = GenerationConfig(**{"do_sample": True, "top_k": 0, "max_new_tokens": 20, "pad_token_id": 0} | settings)
        torch.manual_seed(4)
        output: Any = model.generate(torch.tensor([ids]), generation_config=drawn)  # type: ignore[operator]
        assert len(done.ids) > 3
        assert output[0, len(ids) : len(ids) + len(done.ids)].tolist() == done.ids


def test_what_is_drawn_has_the_log_probabilities_of_the_models_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among all tokens at the temperature, whatever is cut off; the token that ends the answer included."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", [*range(3, 23)])
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    sampling = Sampling(max_new_tokens=30, temperature=2.0, top_k=40)
    torch.manual_seed(3)
    answers = list(answer_ids(model.eval(), tokenizer, prompts, sampling, batch_size=2, scored=True))
    assert {done.ended for done in answers} == {True, False}
    for done in answers:
        ids = [*done.ids, done.stop] if done.stop is not None else done.ids
        asked = prompts[done.index]
        logits = model(torch.tensor([[*asked, *ids]])).logits[0, len(asked) - 1 : -1].float()
        expected = (logits / 2.0).log_softmax(dim=-1)[torch.arange(len(ids)), torch.tensor(ids)]
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, rtol=1e-4, atol=1e-5)


def test_an_answer_by_its_seed_does_not_depend_on_what_is_drawn_beside_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on how it is drawn, nor on the global generator, which it leaves alone."""
    ids, seeds = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS] * 3, [*range(3 * len(PROMPTS))]

    def drawn(numbers: list[int], more: int = 0) -> dict[int, list[int]]:
        sampling = Sampling(max_new_tokens=9, temperature=1.5, top_k=40, seeds=[seeds[i] + more for i in numbers])
        answers = answer_ids(model.eval(), tokenizer, [ids[i] for i in numbers], sampling, batch_size=4)
        return {numbers[done.index]: done.ids for done in answers}

    before = torch.get_rng_state()
    whole = drawn([*range(len(ids))])
    assert len({*map(tuple, whole.values())}) == len(ids)
    assert drawn([5, 1]) == {i: whole[i] for i in (1, 5)}
    assert drawn([5], more=100)[5] != whole[5]
    monkeypatch.setattr("tunesmith.model.generate.can_decode", lambda _: False)
    assert drawn([*range(len(ids))]) == whole
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_are_drawn_by_their_own_probabilities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS[:2]]
    with torch.no_grad():
        expected = [model.eval()(torch.tensor([one])).logits[0, -1].softmax(-1) for one in ids]
    torch.manual_seed(0)
    drawn = torch.zeros(2, len(expected[0]))
    for done in answer_ids(model, tokenizer, ids * 500, Sampling(max_new_tokens=1, temperature=1.0)):
        for token in done.ids:
            drawn[done.index % 2, token] += 1 / 500
    for row, probabilities in zip(drawn, expected, strict=True):
        likely = probabilities.topk(5).indices
        assert (row - probabilities)[likely].abs().max() < 0.07
    assert (expected[0] - expected[1])[likely].abs().max() > 0.14  # so that rows that were mixed up would be seen


def test_a_streamed_answer_is_the_same(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.eval()
    for prompt in PROMPTS:
        pieces: list[str] = []
        answer = stream(model, tokenizer, prompt, pieces.append, Sampling(max_new_tokens=30))
        assert answer == "".join(pieces) == generate(model, tokenizer, [prompt], max_new_tokens=30)[0]


def test_a_streamed_answer_comes_word_by_word_without_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer("one two three<|im_end|>", add_special_tokens=False)["input_ids"]

    def speak(input_ids: torch.Tensor, streamer: Any, **_: Any) -> torch.Tensor:
        for value in (input_ids[0], *torch.tensor(ids)[:, None]):
            streamer.put(value)
        streamer.end()
        return torch.cat([input_ids, torch.tensor([ids])], dim=1)

    monkeypatch.setattr("tunesmith.model.generate.can_decode", lambda _: False)
    monkeypatch.setattr(model, "generate", speak)
    pieces: list[str] = []
    assert stream(model, tokenizer, PROMPTS[0], pieces.append, Sampling()) == "one two three"
    assert [piece for piece in pieces if piece] == ["one ", "two ", "three"]


def test_the_training_mode_is_as_before_even_after_an_error(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    for training in (True, False):
        model.train(training)
        generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1)
        assert model.training is training
    model.train()
    with pytest.raises(TunesmithError):
        generate(model, tokenizer, [[{"role": "user", "content": "x" * 300}]])
    assert model.training


def test_a_prompt_must_leave_room_for_an_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    overhead = len(prompt_ids(tokenizer, [{"role": "user", "content": ""}]))
    tight = [{"role": "user", "content": "x" * (256 - overhead - 3)}]
    assert 0 < len(tokenizer(generate(model, tokenizer, [tight], max_new_tokens=99)[0])["input_ids"]) <= 3
    with pytest.raises(TunesmithError, match="the prompt has 256 tokens, but the model has room for 256"):
        generate(model, tokenizer, [[{"role": "user", "content": "x" * (256 - overhead)}]])


def test_the_room_of_an_answer_is_that_of_its_own_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model.generation_config = GenerationConfig()
    tokenizer.chat_template = tokenizer.eos_token = None  # so that nothing ends an answer
    lengths = [len(done.ids) for done in answer_ids(model.eval(), tokenizer, [[5] * 250, [6]], Sampling())]
    assert lengths == [6, 255]


def test_without_a_template_the_one_message_is_the_text_to_go_on_with(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = None
    message = {"role": "user", "content": "ab"}
    assert prompt_ids(tokenizer, [message]) == tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert generate(model, tokenizer, [[message]], max_new_tokens=4) == [reference(model, tokenizer, [message], 4)]
    with pytest.raises(TunesmithError, match="no chat template, so a prompt is one text; this one is 2 messages"):
        generate(model, tokenizer, [[message, message]])
    with pytest.raises(TunesmithError, match="the prompt is empty"):
        generate(model, tokenizer, [[{"role": "user", "content": ""}]])


def test_no_prompts_give_no_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert generate(model, tokenizer, []) == []


@pytest.mark.parametrize(
    "wrong",
    [
        *({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.1}),
        *({"top_k": -1}, {"min_p": 1.5}, {"repetition_penalty": 0.0}),
    ],
)
def test_an_impossible_setting_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TunesmithError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_all_answers_of_one_batch_are_independent(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    alone = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=8)
    for other in itertools.islice(PROMPTS, 1, None):
        assert generate(model, tokenizer, [PROMPTS[0], other], max_new_tokens=8)[:1] == alone
