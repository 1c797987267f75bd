"""Reward models against a padded reference written here and against plain `transformers`, and what a run on pairs does:
heads, adapters, resume, memory."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.forked import finished, start
from tests.models import gradient_error, gradients, tiny
from tests.train.runs import largest_difference, weights_of
from tunesmith import RewardConfig, RewardTrainer, TunesmithError
from tunesmith.data.batches import Batch
from tunesmith.model import ways
from tunesmith.train.meter import BatchLoss

_WORDS = ["yes", "no", "maybe so", "it is", "not at all, no", "of course", "why"]
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"Is it {word}, or " + "very " * (i % 3) + "so?"}],
        "chosen": [{"role": "assistant", "content": word}],
        "rejected": [{"role": "assistant", "content": _WORDS[i - 1] + "!" * (i % 4)}],
    }
    for i, word in enumerate(_WORDS)
]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture
def classifier_of(tokenizer: Any) -> Callable[..., Any]:
    """Makes a sequence classifier of the named architecture for the vocabulary of `tokenizer`."""

    def make(name: str = "llama", **settings: Any) -> Any:
        common = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
        return tiny(name, len(tokenizer), auto=AutoModelForSequenceClassification, **common | settings)

    return make


@pytest.fixture
def reward_of(classifier_of: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., RewardTrainer]:
    """Makes a trainer on PAIRS; what it does not know is a setting."""

    def make(name: str = "llama", folder: str = "run", **given: Any) -> RewardTrainer:
        own = {"model", "peft_config", "train_dataset", "eval_dataset", "quantization_config"}
        arguments = {key: given.pop(key) for key in [*given] if key in own}
        common: dict[str, Any] = {
            "output_dir": str(tmp_path / folder),
            "report_to": "none",
            "use_cpu": True,
            "precision": "fp32",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 4,
        }
        defaults = {"train_dataset": PAIRS, "processing_class": tokenizer}
        if "model" not in arguments:
            arguments["model"] = classifier_of(name)
        return RewardTrainer(**defaults | arguments, args=RewardConfig(**common | given))

    return make


def whole_texts(tokenizer: Any, rows: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each conversation, the chosen and the rejected one of each row in turn, as anyone would ask."""
    return [
        tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"]
        for row in rows
        for side in ("chosen", "rejected")
    ]


def plain_scores(model: Any, texts: list[list[int]]) -> Tensor:
    """What the model's own forward says of texts in one padded batch."""
    ids = [torch.tensor(text) for text in texts]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    padded = pad_sequence(ids, batch_first=True, padding_value=model.config.pad_token_id)
    scores: Tensor = model(input_ids=padded, attention_mask=mask).logits[:, 0]
    return scores


BATCHES: dict[str, dict[str, Any]] = {
    "flat": {"share_prefix": "off"},
    "shared": {"train_dataset": [*PAIRS, PAIRS[2] | {"rejected": PAIRS[3]["rejected"]}]},
    "packed": {"packing": True, "max_length": 120},
    "padded": {"padding_free": False},
}


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3"])
def test_values_and_gradients_are_those_of_padded_rows(
    name: str, batches: str, reward_of: Any, classifier_of: Any, tokenizer: Any
) -> None:
    rows = BATCHES[batches].get("train_dataset", PAIRS)
    rows = [row | {"margin": 0.25 * (i % 3), "weight": 1.0 + i % 2} for i, row in enumerate(rows)]
    settings = BATCHES[batches] | {"train_dataset": rows}
    trainer = reward_of(name, center_rewards_coefficient=0.1, shuffle_dataset=False, **settings)
    dataset: Any = trainer.train_dataset
    batch = trainer.data_collator(list(dataset))
    assert (batch.lengths is None) == (batches == "padded")
    assert float(trainer.batch_weight(batch)) == sum(row["weight"] for row in rows)
    ours = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    ours.backward()
    plain = classifier_of(name)
    scores = plain_scores(plain, whole_texts(tokenizer, rows))
    chosen, rejected = scores[::2], scores[1::2]
    margin, weight = (torch.tensor([row[key] for row in rows]) for key in ("margin", "weight"))
    theirs = (weight * (-logsigmoid(chosen - rejected - margin) + 0.1 * (chosen + rejected) ** 2)).sum()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert gradient_error(gradients(trainer.model), gradients(plain)) < 2e-5


def test_where_the_end_pads_the_token_before_it_is_scored_as_in_transformers(
    reward_of: Any, classifier_of: Any, tokenizer: Any
) -> None:
    rows = [{"prompt": f"{word}? ", "chosen": word, "rejected": _WORDS[i - 1] + "!"} for i, word in enumerate(_WORDS)]
    trainer = reward_of(train_dataset=rows, pad_token=tokenizer.eos_token)
    batch = trainer.data_collator(list(trainer.train_dataset))
    first = [example.input_ids for example in batch.documents[:6]]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in first)
    scored = [[i for i, label in enumerate(example.labels) if label != -100] for example in batch.documents[:6]]
    assert scored == [[len(ids) - 2] for ids in first]
    found = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    plain = classifier_of(pad_token_id=tokenizer.eos_token_id)
    scores = plain_scores(plain, [tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]
                                  for row in rows for side in ("chosen", "rejected")])  # fmt: skip
    torch.testing.assert_close(found, -logsigmoid(scores[::2] - scores[1::2]).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt_neo", "bert"])
def test_a_model_that_takes_no_flat_batches_is_padded(
    name: str, reward_of: Any, classifier_of: Any, tokenizer: Any
) -> None:
    """One whose attention keeps no documents apart, and an encoder, which has another head."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings: dict[str, Any] = sizes | without_dropout if name == "bert" else {}
    trainer = reward_of(name, model=classifier_of(name, **settings))
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch.lengths is None
    found = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    scores = plain_scores(classifier_of(name, **settings), whole_texts(tokenizer, PAIRS))
    torch.testing.assert_close(found, -logsigmoid(scores[::2] - scores[1::2]).sum(), rtol=1e-5, atol=1e-5)
    trainer.train()


# Models


def test_a_language_model_gets_a_head_by_the_seed_and_learns(
    tiny_model: Path, tokenizer: Any, reward_of: Any, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"model": str(tiny_model), "max_steps": 12, "per_device_train_batch_size": 7}
    first, again, other = (reward_of(seed=seed, folder=str(i), **common) for i, seed in enumerate((1, 1, 2)))
    head = first.model.score.weight.detach().clone()
    assert head.shape == (1, 32)
    assert torch.equal(head, again.model.score.weight)
    assert not torch.equal(head, other.model.score.weight)
    first.train()
    logged = [entry for entry in first.state.log_history if "loss" in entry]
    assert logged[0]["loss"] == pytest.approx(0.6931, abs=0.05)
    assert logged[-1]["loss"] < 0.5
    assert logged[-1]["margin"] > 0.3
    assert logged[-1]["min_reward"] < logged[-1]["mean_reward"] < logged[-1]["max_reward"]
    # What is saved is a plain classifier with the same scores, whatever padding is beside a text.
    first.save_model(str(tmp_path / "saved"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert saved.config.architectures == ["LlamaForSequenceClassification"]
    with torch.no_grad():
        scores = plain_scores(saved.eval(), whole_texts(AutoTokenizer.from_pretrained(tmp_path / "saved"), PAIRS))
    measured = first.evaluate(PAIRS)
    assert measured["eval_margin"] == pytest.approx(float((scores[::2] - scores[1::2]).mean()), abs=1e-5)
    assert measured["eval_mean_reward"] == pytest.approx(float(scores.mean()), abs=1e-5)
    assert measured["eval_max_reward"] == pytest.approx(float(scores.max()), abs=1e-5)
    assert measured["eval_min_reward"] == pytest.approx(float(scores.min()), abs=1e-5)
    # It is trained further from there, with the head that it has.
    further = reward_of(model=str(tmp_path / "saved"), folder="further")
    assert torch.equal(further.model.score.weight.detach(), saved.score.weight)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "SEQ_CLS"])
def test_adapters_train_the_head_whole(task: Any, tiny_model: Path, tokenizer: Any, reward_of: Any) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type=task)
    trainer = reward_of(model=str(tiny_model), peft_config=lora, max_steps=10, per_device_train_batch_size=7)
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert sum("score" in name for name in trained) == 1
    assert any("q_proj" in name and ".lora_A" in name for name in trained)
    trainer.train()
    assert [entry for entry in trainer.state.log_history if "loss" in entry][-1]["accuracy"] == 1.0
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    saved = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    with torch.no_grad():
        scores = plain_scores(saved.eval(), whole_texts(tokenizer, PAIRS))
    margin = float((scores[::2] - scores[1::2]).mean())
    assert trainer.evaluate(PAIRS)["eval_margin"] == pytest.approx(margin, abs=1e-5)
    further = reward_of(model=str(folder), folder="further")
    assert further.evaluate(PAIRS)["eval_margin"] == pytest.approx(margin, abs=1e-5)


def test_beside_bf16_weights_the_head_is_trained_in_fp32(tiny_model: Path, reward_of: Any) -> None:
    trainer = reward_of(model=str(tiny_model), peft_config=LORA, precision="bf16", max_steps=3)
    head = trainer.model.get_base_model().score.modules_to_save["default"].weight
    assert head.dtype == torch.float32
    assert trainer.model.get_base_model().model.layers[0].self_attn.k_proj.weight.dtype == torch.bfloat16
    before = head.detach().clone()
    trainer.train()
    assert not torch.equal(head, before)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_beside_quantized_weights(bits: Any, tiny_model: Path, reward_of: Any) -> None:
    from tunesmith.model.quantize import quantization

    trainer = reward_of(
        model=str(tiny_model),
        peft_config=LORA,
        quantization_config=quantization(bits, torch.float32),
        max_steps=6,
        per_device_train_batch_size=7,
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0]


# Rows


def test_texts_without_a_prompt_and_conversations_that_share_nothing(reward_of: Any, tokenizer: Any) -> None:
    def documents(rows: list[dict[str, Any]]) -> list[str]:
        trainer = reward_of(train_dataset=rows)
        batch = trainer.data_collator(list(trainer.train_dataset))
        return [tokenizer.decode(example.input_ids) for example in batch.documents]

    assert documents([{"chosen": "It is so.", "rejected": "It is"}]) == ["It is so.<|im_end|>", "It is<|im_end|>"]
    assert documents([{"prompt": "It ", "chosen": "is", "rejected": "was<|im_end|>"}]) == [
        "It is<|im_end|>",
        "It was<|im_end|>",
    ]
    ask = [{"role": "user", "content": "Hi"}]
    other = [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "No"}]
    assert documents([{"chosen": [*ask, {"role": "assistant", "content": "Yes"}], "rejected": other}]) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n",
        "<|im_start|>user\nHo<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n",
    ]


def test_pairs_that_are_too_long_are_dropped_or_lose_the_front_of_their_prompt(reward_of: Any) -> None:
    rows = [
        {"prompt": "abcdefgh", "chosen": "yes", "rejected": "no"},
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
    ]
    assert len(reward_of(train_dataset=rows, max_length=8).train_dataset) == 1
    trainer = reward_of(train_dataset=rows, max_length=8, overlong="truncate")
    batch = trainer.data_collator(list(trainer.train_dataset))
    decode = trainer.processing_class.decode
    assert [decode(example.input_ids) for example in batch.documents[:2]] == ["efghyes<|im_end|>", "efghno<|im_end|>"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1.*leave it out"),
        ({"overlong": "split"}, "a pair can't be split"),
        ({"center_rewards_coefficient": -1.0}, "write a weight from 0 on"),
        ({"sample_prompts": 2}, "a reward model writes no answers"),
        ({"router_aux_loss_coef": 0.1}, "no loss for the balance of experts"),
        ({"turns": "each"}, "scored as one text"),
        ({"beta": 0.1}, "RewardConfig has no setting 'beta'"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], problem: str, reward_of: Any) -> None:
    with pytest.raises(TunesmithError, match=problem):
        reward_of(**settings)


def test_models_that_give_no_reward_are_refused(
    reward_of: Any, classifier_of: Any, model_of: Any, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(TunesmithError, match="a reward is the one output of a sequence classifier"):
        reward_of(model=model_of())
    with pytest.raises(TunesmithError, match=r"has 3 outputs \(num_labels\)"):
        reward_of(model=classifier_of(num_labels=3))
    classifier_of(num_labels=3).save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    with pytest.raises(TunesmithError, match="is a classifier with 3 outputs"):
        reward_of(model=str(tmp_path / "three"))
    message = [{"role": "assistant", "content": "Yes", "weight": 0.5}]
    with pytest.raises(TunesmithError, match="a message has a weight of its own"):
        reward_of(train_dataset=[PAIRS[0] | {"chosen": message}])


# A run


@pytest.mark.parametrize("adapters", [None, LORA], ids=["all weights", "lora"])
def test_accumulated_micro_batches_are_one_batch(adapters: Any, reward_of: Any) -> None:
    rows = [row | {"weight": 1.0 + i % 3} for i, row in enumerate(PAIRS)]
    common = {"peft_config": adapters, "train_dataset": rows, "max_steps": 1, "optim": "sgd"}
    whole = reward_of(folder="whole", per_device_train_batch_size=6, **common)
    parts = reward_of(folder="parts", per_device_train_batch_size=2, gradient_accumulation_steps=3, **common)
    whole.train()
    parts.train()
    assert largest_difference(weights_of(whole), weights_of(parts)) < 1e-6
    names = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")
    logs = [next(entry for entry in each.state.log_history if "loss" in entry) for each in (whole, parts)]
    assert [logs[0][name] for name in names] == pytest.approx([logs[1][name] for name in names], abs=1e-5)


def test_out_of_memory_divides_between_pairs(reward_of: Any) -> None:
    whole, split = reward_of(folder="whole"), reward_of(folder="split")
    right = split.batch_loss

    def small(model: nn.Module, batch: Batch, **arguments: Any) -> BatchLoss:
        if len(batch.documents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(model, batch, **arguments)

    split.batch_loss = small
    whole.train()
    split.train()
    assert largest_difference(weights_of(split), weights_of(whole)) < 1e-5


def test_a_model_whose_own_forward_says_something_else_is_not_trained(reward_of: Any) -> None:
    trainer = reward_of()
    model: Any = trainer.model
    own = model.model.forward
    # Numbers that depend on how the batch is laid out.
    model.model.forward = lambda *args, **kwargs: _shifted(own(*args, **kwargs))
    with pytest.raises(TunesmithError, match="gives other scores in this run's batches"):
        trainer.train()


def _shifted(outputs: Any) -> Any:
    outputs.last_hidden_state = outputs.last_hidden_state + outputs.last_hidden_state.shape[1]
    return outputs


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens_per_batch": 300, "per_device_train_batch_size": 8},
        {"packing": True, "max_length": 200},
        {"gradient_checkpointing": True, "peft_config": LORA},
        {"train_dataset": Dataset.from_list(PAIRS).to_iterable_dataset()},
    ],
    ids=["by tokens", "packed", "recomputed", "stream"],
)
def test_batches_of_every_kind_train(settings: dict[str, Any], reward_of: Any) -> None:
    trainer = reward_of(**settings | {"max_steps": 3})
    trainer.train()
    assert trainer.state.global_step == 3


def _resumable(folder: str, model: str, **settings: Any) -> RewardTrainer:
    args = RewardConfig(
        output_dir=folder,
        report_to="none",
        use_cpu=True,
        precision="fp32",
        disable_tqdm=True,
        max_steps=6,
        save_steps=2,
        logging_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=3,
        **settings,
    )
    return RewardTrainer(model, args=args, train_dataset=PAIRS, peft_config=LORA)


def _train(folder: str, model: str, kill_at: int) -> None:
    torch.set_num_threads(1)
    ways.force(False)  # as in the process that goes on
    trainer = _resumable(folder, model)

    def kill(line: Any) -> None:
        if line.get("step") == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.listeners.append(kill)
    trainer.train()


def test_a_killed_run_goes_on_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    assert finished(start(_train, str(tmp_path / "run"), str(tiny_model), 3)) == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ways.force(False)
    try:
        unbroken = _resumable(str(tmp_path / "unbroken"), str(tiny_model))
        unbroken.train()
        resumed = _resumable(str(tmp_path / "run"), str(tiny_model))
        resumed.train(resume_from_checkpoint=True)
    finally:
        ways.force(None)
        torch.set_num_threads(threads)
    assert resumed.state.global_step == 6
    assert largest_difference(weights_of(resumed), weights_of(unbroken)) == 0.0
    # The mean and the extremes of four steps, of which two were before the kill.
    assert resumed.state.log_history[0] == unbroken.state.log_history[0]
