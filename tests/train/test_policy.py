"""GRPO and RLOO runs: gradients against a padded reference written here, what stays as it is, and exact resuming."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tests.forked import finished, start
from tests.models import gradient_error, gradients
from tests.train.runs import largest_difference, weights_of
from tunesmith import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TunesmithError
from tunesmith.data.batches import Batch
from tunesmith.model import ways
from tunesmith.train.generator import OwnDecoding
from tunesmith.train.meter import BatchLoss
from tunesmith.train.policy import Prompts
from tunesmith.train.rollouts import Trial, without_silent

PROMPTS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": f"{word}, {i}?"}], "letter": letter}
    for i, (word, letter) in enumerate([("One", "e"), ("Another", "a"), ("A third one", "t"), ("Last", "s")])
]


def letters(completions: list[Any], letter: list[str], **_: Any) -> list[float]:
    """How much of an answer is above the letter in the alphabet."""
    texts = [answer[0]["content"] for answer in completions]
    return [sum(c > one for c in text) / 8 for text, one in zip(texts, letter, strict=True)]


@pytest.fixture
def policy_of(model_of: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Makes a trainer on PROMPTS; what it does not know is a setting."""

    def make(kind: Any = GRPOTrainer, folder: str = "run", **given: Any) -> Any:
        own = {"model", "reward_funcs", "peft_config", "train_dataset", "eval_dataset", "ref_model", "generator"}
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
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "self_test": "off",
        }
        defaults = {"train_dataset": PROMPTS, "processing_class": tokenizer, "reward_funcs": letters}
        if "model" not in arguments:
            arguments["model"] = model_of("llama")
        config = GRPOConfig if kind is GRPOTrainer else RLOOConfig
        return kind(**defaults | arguments, args=config(**common | given))

    return make


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


def moved(model: nn.Module) -> None:
    """Another model than the one that has drawn."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


def first_log(trainer: Any) -> dict[str, Any]:
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


# Every objective against one that pads


def padded_loss(model: Any, trials: list[Trial], **wanted: Any) -> Tensor:
    """The loss of a step of all trials in one padded batch (B, T) with a mask, written down once more."""
    ids = pad_sequence([torch.tensor(trial.input_ids) for trial in trials], batch_first=True)
    seen = pad_sequence([torch.ones(len(trial.input_ids), dtype=torch.long) for trial in trials], True)
    mask = pad_sequence([torch.tensor(trial.labels) != -100 for trial in trials], True)[:, 1:].float()
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits.float() / wanted["temperature"]
    logps = logits[:, :-1].log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]

    def spread_out(name: str) -> Tensor:
        values = torch.zeros_like(mask)
        for row, trial in zip(values, trials, strict=True):
            row[[i - 1 for i, label in enumerate(trial.labels) if label != -100]] = getattr(trial, name)
        return values

    old = spread_out("before")
    advantages = torch.tensor([trial.advantage for trial in trials])[:, None]
    log_ratio, lengths = (logps - old) * mask, mask.sum(dim=1, keepdim=True)
    loss_type = wanted["loss_type"]
    if wanted["level"] == "sequence":
        ratio = (log_ratio.sum(dim=1, keepdim=True) / lengths).exp().expand_as(logps)
    else:
        ratio = log_ratio.exp()
    if loss_type == "cispo":
        losses = -ratio.detach().clamp(max=wanted["high"]) * advantages * logps
    elif loss_type == "sapo":
        heat = torch.where(advantages > 0, 1.0, 1.05)
        losses = -(4 / heat * torch.sigmoid(heat * (ratio - 1))) * advantages
    elif loss_type == "vespo":
        log_w = log_ratio.detach().sum(dim=1, keepdim=True)
        k, rate = torch.where(advantages >= 0, 2.0, 3.0), torch.where(advantages >= 0, 3.0, 2.0)
        losses = -(rate + k * log_w - rate * log_w.exp()).exp() * advantages * logps
    else:
        losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1 + wanted["high"]) * advantages)
    if wanted["beta"]:
        apart = spread_out("by_reference") - logps
        losses = losses + wanted["beta"] * (apart.exp() - apart - 1) * ratio
    losses = losses * mask
    if loss_type in ("grpo", "sapo"):
        return (losses.sum(dim=1) / lengths[:, 0]).mean()
    if loss_type == "bnpo":
        return losses.sum() / mask.sum()
    if loss_type == "dr_grpo":
        return losses.sum() / (len(trials) * wanted["longest"])
    return losses.sum(dim=1).mean() if loss_type == "luspo" else losses.sum() / mask.sum()


OBJECTIVES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "sapo", "vespo")},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "with a reference": {"loss_type": "dapo", "beta": 0.3, "temperature": 0.7},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_padded_rows(name: str, policy_of: Any) -> None:
    settings = OBJECTIVES[name]
    trainer = policy_of(num_iterations=2, **settings)
    trainer.model.train()
    trials = trainer._generation(Prompts(numbers=(0, 1)))
    moved(trainer.model)
    batch = trainer._batch(trials)
    assert batch.computed_tokens < sum(len(trial.input_ids) for trial in trials)  # prompts are there once
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    ours = gradients(trainer.model)
    expected = padded_loss(
        trainer.model,
        trials,
        loss_type=settings["loss_type"],
        level=settings.get("importance_sampling_level", "token"),
        high=settings.get("epsilon_high", 0.2),
        beta=settings.get("beta", 0.0),
        temperature=settings.get("temperature", 1.0),
        longest=8,
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert gradient_error(ours, gradients(trainer.model)) < 1e-4


def test_the_gradient_of_rloo_is_that_of_whole_answers(policy_of: Any) -> None:
    trainer = policy_of(RLOOTrainer, num_iterations=2, beta=0.0)
    trainer.model.train()
    trials = trainer._generation(Prompts(numbers=(0, 1)))
    moved(trainer.model)
    loss = trainer.compute_loss(trainer.model, trainer._batch(trials))
    loss.backward()
    ours = gradients(trainer.model)
    total = torch.tensor(0.0)
    for trial in trials:
        ids, first = torch.tensor([trial.input_ids]), sum(label == -100 for label in trial.labels)
        logps = trainer.model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(dim=-1)
        own = logps[torch.arange(len(logps)), ids[0, 1:]][first - 1 :].sum()
        ratio = (own - trial.before.sum()).exp()
        total = total - torch.min(ratio * trial.advantage, ratio.clamp(0.8, 1.2) * trial.advantage)
    (total / len(trials)).backward()
    assert gradient_error(ours, gradients(trainer.model)) < 1e-4


# A run


def test_before_any_step_ratios_are_1_and_the_reference_is_the_model(policy_of: Any) -> None:
    """Also where each step has a generation of several."""
    logged = first_log(policy_of(beta=0.1, num_iterations=2, peft_config=LORA))
    assert logged["kl"] == pytest.approx(0.0, abs=1e-6)
    assert logged["clip_ratio/region_mean"] == 0.0
    assert logged["sampling/sampling_logp_difference/mean"] < 1e-5
    assert logged["rewards/letters/mean"] == logged["reward"] > 0


def test_rloo_says_how_far_it_is_from_the_reference(policy_of: Any) -> None:
    trainer = policy_of(RLOOTrainer, peft_config=LORA, beta=0.1)
    trainer.train()
    first, second = (entry["kl"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(0.0, abs=1e-6)
    assert abs(second) > 1e-6


def test_answers_of_another_model_stop_the_run(policy_of: Any, model_of: Any, tokenizer: Any) -> None:
    other = model_of("llama")
    moved(other)
    trainer = policy_of(generator=OwnDecoding(other, tokenizer))
    with pytest.raises(TunesmithError, match="the model and its generator differ by"):
        trainer.train()


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])
def test_a_reward_that_is_the_same_for_all_changes_no_bit(kind: Any, policy_of: Any) -> None:
    def same(completions: list[Any], **_: Any) -> list[float]:
        return [0.1] * len(completions)

    trainer = policy_of(kind, reward_funcs=same, beta=0.0, max_steps=3, num_generations=8)
    before = weights_of(trainer)
    logged = first_log(trainer)
    assert logged["frac_reward_zero_std"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])
def test_rewards_rise(kind: Any, policy_of: Any) -> None:
    def plain(completions: list[Any], **_: Any) -> list[float]:
        return [sum(c.isascii() and c.isalpha() for c in answer[0]["content"]) / 8 for answer in completions]

    settings = {"learning_rate": 3e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 16}
    trainer = policy_of(kind, reward_funcs=plain, beta=0.0, max_steps=12, num_generations=8, **settings)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3


def test_padded_batches_and_flat_ones_learn_the_same(policy_of: Any) -> None:
    flat, padded = policy_of(folder="flat"), policy_of(folder="padded", padding_free=False)
    flat.train()
    padded.train()
    assert largest_difference(weights_of(flat), weights_of(padded)) < 1e-5


def test_out_of_memory_divides_a_group_with_the_same_gradients(policy_of: Any) -> None:
    whole, split = policy_of(folder="whole"), policy_of(folder="split")
    sizes: list[int] = []
    right = split.batch_loss

    def small(model: nn.Module, batch: Batch, **arguments: Any) -> BatchLoss:
        if len(batch.documents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch.documents))
        return right(model, batch, **arguments)

    split.batch_loss = small
    whole.train()
    split.train()
    assert sizes
    assert max(sizes) <= 2
    assert largest_difference(weights_of(split), weights_of(whole)) < 1e-5


def test_answers_that_teach_nothing_are_not_computed_and_count_all_the_same(policy_of: Any) -> None:
    def of_one_prompt(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        asked = [prompt[0]["content"] for prompt in prompts]
        first = [ids[0] for ids in completion_ids]
        return [float(token) if text.startswith("One") else 0.5 for token, text in zip(first, asked, strict=True)]

    trainer = policy_of(reward_funcs=of_one_prompt)
    trainer.model.train()
    trials = trainer._generation(Prompts(numbers=(0, 1)))
    whole, part = trainer._batch(trials), trainer._batch(without_silent(trials))
    assert len(part.documents) <= 4 < len(whole.documents)
    assert trainer.batch_weight(part) == pytest.approx(float(trainer.batch_weight(whole)))
    found = []
    for batch in (whole, part):
        trainer.compute_loss(trainer.model, batch).backward()
        found.append(gradients(trainer.model))
    assert gradient_error(found[1], found[0]) < 1e-5
    sums = [trainer.batch_loss(trainer.model, batch).sums for batch in (whole, part)]
    assert sums[0]["reward"] == pytest.approx(float(sums[1]["reward"]))
    assert sums[0]["frac_reward_zero_std"] == sums[1]["frac_reward_zero_std"] >= 4


def test_a_generation_is_used_by_all_its_steps_and_iterations(policy_of: Any) -> None:
    trainer = policy_of(per_device_train_batch_size=4, steps_per_generation=2, num_iterations=2, max_steps=5)
    drawn: list[int] = []
    draw = trainer.judge.generator

    def counting(prompts: Any, sampling: Any) -> Any:
        drawn.append(trainer.state.global_step)
        return draw(prompts, sampling)

    trainer.judge.generator = counting
    trainer.train()
    assert drawn == [0, 4]


def test_evaluation_draws_answers_to_held_out_prompts(policy_of: Any) -> None:
    trainer = policy_of(eval_dataset=PROMPTS[:3], num_generations_eval=2, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_reward"] <= 1
    assert metrics["eval_rewards/letters/mean"] == pytest.approx(metrics["eval_reward"])
    assert trainer.evaluate(PROMPTS[:1])["eval_completions/mean_length"] <= 8


def test_answers_that_were_cut_off_teach_nothing_where_they_are_masked(policy_of: Any) -> None:
    trainer = policy_of(mask_truncated_completions=True, max_completion_length=1)
    before = weights_of(trainer)
    trials = trainer._generation(Prompts(numbers=(0, 1)))
    assert {trial.target_count for trial in trials if trial.cut} == {0}
    assert largest_difference(weights_of(trainer), before) == 0.0


def test_what_is_drawn_is_written_down(policy_of: Any, tmp_path: Path) -> None:
    policy_of().train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["prompt"][0]["content"] in [row["prompt"][0]["content"] for row in PROMPTS]
    assert lines[0]["best"]["reward"] >= lines[0]["worst"]["reward"]
    assert lines[0]["best"]["rewards"] == {"letters": lines[0]["best"]["reward"]}
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["reward"] > 0 for step in steps if "loss" in step] == [True, True]


# Resuming


def _train(folder: str, model: str, kill_at: int) -> None:
    torch.set_num_threads(1)
    ways.force(False)  # as in the process that goes on
    trainer = _resumable(folder, model)

    def kill(line: Any) -> None:
        if line.get("step") == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.listeners.append(kill)
    trainer.train()


def _resumable(folder: str, model: str) -> Any:
    """A generation is used in four steps, so a checkpoint is within one."""
    args = GRPOConfig(
        output_dir=folder,
        report_to="none",
        use_cpu=True,
        precision="fp32",
        disable_tqdm=True,
        max_steps=6,
        save_steps=3,
        logging_steps=3,
        learning_rate=1e-2,
        beta=0.1,
        per_device_train_batch_size=4,
        steps_per_generation=2,
        num_iterations=2,
        num_generations=4,
        max_completion_length=8,
        self_test="off",
    )
    return GRPOTrainer(model, letters, args, train_dataset=PROMPTS)


def test_killed_within_a_generation_and_resumed_it_ends_with_the_same_bits(tiny_model: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        unbroken = _resumable(str(tmp_path / "unbroken"), str(tiny_model))
        unbroken.train()
        assert finished(start(_train, str(tmp_path / "killed"), str(tiny_model), 5)) == -signal.SIGKILL
        resumed = _resumable(str(tmp_path / "killed"), str(tiny_model))
        resumed.train(resume_from_checkpoint=True)
    finally:
        torch.set_num_threads(threads)
    assert resumed.state.global_step == 6
    assert largest_difference(weights_of(resumed), weights_of(unbroken)) == 0.0
    assert resumed.state.log_history[-2] == unbroken.state.log_history[-2]


# What is refused


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_generations": 1}, "num_generations is 1"),
        ({"num_generations": 3}, "no multiple of num_generations, 3"),
        ({"generation_batch_size": 12}, "write a multiple of per_device_train_batch_size, 8"),
        ({"temperature": 0.0}, "all answers to a prompt would be the same"),
        ({"packing": True, "max_length": 64}, "share a row already"),
        ({"max_length": 64}, "max_completion_length"),
        ({"entropy_coef": 0.1}, "the entropy has no gradient"),
        ({"use_vllm": True}, "vllm_mode: server"),
        ({"generation_batch_size": 64, "num_generations": 4}, "there are 4 prompts, and a generation has 16"),
        ({"ref_model": "demo"}, "beta is 0, which compares with none"),
        ({"reward_funcs": "exact_match"}, "reads the column 'answer', which the rows lack"),
        ({"reward_funcs": "exact_mach"}, "did you mean 'exact_match'"),
        ({"train_dataset": [{"question": "Hi"}]}, "row 0: no 'prompt'"),
        (
            {"train_dataset": [{"prompt": "x" * 300, "letter": "a"}] * 4},
            "the prompt has 300 tokens",
        ),
    ],
)
def test_what_is_provably_wrong_is_refused(settings: dict[str, Any], problem: str, policy_of: Any) -> None:
    with pytest.raises(TunesmithError, match=problem):
        policy_of(**settings)
