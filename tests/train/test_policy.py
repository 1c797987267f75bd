"""GRPO and RLOO runs: gradients against a padded reference written here, what stays as it is, and exact resuming."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tests.forked import finished, start
from tests.models import gradient_error, gradients
from tests.train.runs import largest_difference, weights_of
from tunesmith import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TunesmithError
from tunesmith.data.batches import Batch
from tunesmith.model import ways
from tunesmith.objectives.policy import Drawn, PolicyOptions, policy_losses
from tunesmith.train.generator import Generated, Generator, OwnDecoding
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


def moved(model: nn.Module, seed: int = 7) -> None:
    """Another model than it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


def first_log(trainer: Any) -> dict[str, Any]:
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


# Every objective against one that pads


LENGTHS = (8, 3, 5, 1, 2, 8, 6, 4)
"""Tokens of the answers of a generation: of its two micro-batches, which are a prompt each, 17 and 20. Those of 8 are
cut off."""


def uneven(decoding: OwnDecoding) -> Generator:
    """Answers of LENGTHS."""

    def draw(prompts: Any, sampling: Any) -> list[Generated]:
        drawn = zip(decoding(prompts, sampling), LENGTHS, strict=True)
        return [
            Generated(
                ids=one.ids[:size], finish="length" if size == 8 else "stop", logprobs=(one.logprobs or [])[:size]
            )
            for one, size in drawn
        ]

    return draw


def padded_logprobs(model: Any, trials: list[Trial], temperature: float) -> Tensor:
    """(B, T - 1) Of each token but the first, given those before it, in one batch with an attention mask."""
    ids = pad_sequence([torch.tensor(trial.input_ids) for trial in trials], batch_first=True)
    seen = pad_sequence([torch.ones(len(trial.input_ids), dtype=torch.long) for trial in trials], batch_first=True)
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1] / temperature
    return logits.log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]


def padded_loss(args: Any, trials: list[Trial], now: Tensor, old: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a step of all trials, written down once more: of log-probabilities (B, T - 1) by the model, by the
    one that has drawn, and by the reference. Also (2,), how many tokens the clip takes the gradient of, below and
    above."""
    rloo = isinstance(args, RLOOConfig)
    mask = torch.zeros_like(now)  # of the answers' tokens
    for row, trial, size in zip(mask, trials, LENGTHS, strict=True):
        if not (args.mask_truncated_completions and size == 8):
            row[len(trial.input_ids) - size - 1 : len(trial.input_ids) - 1] = 1.0
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    rewards = torch.tensor([trial.reward for trial in trials])
    if rloo:
        rewards = (rewards - args.beta * ((old - near) * mask).sum(dim=1)).view(2, 4)
        advantages = rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / 3
    else:
        rewards = rewards.view(2, 4)
        advantages = rewards - rewards.mean(dim=1, keepdim=True)
        if args.scale_rewards != "none":
            advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    advantages = advantages.view(8, 1)

    loss_type, level = ("grpo", "product") if rloo else (args.loss_type, args.importance_sampling_level)
    log_ratio = (now - old) * mask
    whole = log_ratio.sum(dim=1, keepdim=True)
    ratio = {"token": log_ratio, "sequence": whole / lengths, "product": whole}[level].exp().expand_as(mask)
    least, most = 1 - args.epsilon, 1 + (args.epsilon_high or args.epsilon)
    clips = torch.stack([(ratio < least) & (advantages < 0), (ratio > most) & (advantages > 0)]) * mask
    if loss_type == "cispo":
        losses = -ratio.detach().clamp(max=args.epsilon_high) * advantages * now
    elif loss_type == "sapo":
        heat = torch.where(advantages > 0, 1.0, 1.05)
        losses = -(4 / heat * torch.sigmoid(heat * (ratio - 1))) * advantages
    elif loss_type == "vespo":
        log_w = whole.detach()
        k, rate = torch.where(advantages >= 0, 2.0, 3.0), torch.where(advantages >= 0, 3.0, 2.0)
        losses = -(rate + k * log_w - rate * log_w.exp()).exp() * advantages * now
    else:
        free = ratio if rloo or args.delta is None else ratio.clamp(max=args.delta)
        losses = -torch.min(free * advantages, ratio.clamp(least, most) * advantages)
    if args.beta and not rloo:
        kl = (near - now).exp() - (near - now) - 1
        losses = losses + args.beta * kl * (ratio if args.use_bias_correction_kl else 1.0)

    losses = losses * mask
    if loss_type in ("grpo", "sapo"):
        loss = (losses.sum(dim=1, keepdim=True) / lengths).mean()
    elif loss_type == "bnpo":
        loss = (losses[:4].sum() / mask[:4].sum() + losses[4:].sum() / mask[4:].sum()) / 2
    elif loss_type == "dr_grpo":
        loss = losses.sum() / (8 * args.max_completion_length)
    else:
        loss = losses.sum(dim=1).mean() if loss_type == "luspo" else losses.sum() / mask.sum()
    return loss, clips.sum(dim=(1, 2))


GSPO = {"importance_sampling_level": "sequence", "epsilon": 0.02}
OBJECTIVES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "sapo", "vespo")},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.22},
    "gspo": {"loss_type": "grpo", **GSPO},
    "luspo": {"loss_type": "luspo", **GSPO},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "rloo": {"kind": RLOOTrainer, "beta": 0.0},
    "delta": {"loss_type": "grpo", "delta": 1.3},
    **{
        f"{name}, cut answers left out": {"loss_type": name, "mask_truncated_completions": True}
        for name in ("grpo", "dapo")
    },
    "grpo with a reference": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    "dapo with a reference": {"loss_type": "dapo", "beta": 0.3, "temperature": 0.7},
    "gspo with a reference": {"loss_type": "grpo", "beta": 0.3, **GSPO},
    "cispo with a reference": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.3},
    "rloo with a reference": {"kind": RLOOTrainer, "beta": 0.3},
}
CLIPS_BOTH = OBJECTIVES.keys() - {"sapo", "vespo", "cispo", "cispo with a reference"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_padded_rows(name: str, policy_of: Any) -> None:
    """To 1e-5 of the largest gradient of each parameter, in fp32, whose rounding makes some 1e-6 of it. Three models
    differ: the reference, the one that has drawn, and the one that learns."""
    trainer = policy_of(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, num_iterations=2, **OBJECTIVES[name]
    )
    model, args = trainer.model.train(), trainer.args
    trainer.judge.generator, trainer._checked = uneven(trainer.decoding), True  # whose start is no reference
    reference = deepcopy(model)
    moved(model, seed=6)
    trials = trainer._generation(Prompts(numbers=(0, 1)))
    with torch.no_grad():
        old, near = (padded_logprobs(one, trials, args.temperature) for one in (model, reference))
    moved(model, seed=11)
    batches = [trainer._batch(trials[:4]), trainer._batch(trials[4:])]
    assert sum(batch.computed_tokens for batch in batches) < sum(len(trial.input_ids) for trial in trials)  # prompts
    weight = trainer._get_num_items_in_batch(batches, args.device)
    loss = sum(trainer.compute_loss(model, batch, num_items_in_batch=weight) for batch in batches)
    loss.backward()
    ours = gradients(model)
    expected, clips = padded_loss(args, trials, padded_logprobs(model, trials, args.temperature), old, near)
    expected.backward()
    if name in CLIPS_BOTH:
        assert clips.all()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert gradient_error(ours, gradients(model)) < 1e-5


# A run


@pytest.mark.parametrize("adapters", [None, LORA])
@pytest.mark.parametrize(
    "settings", [{"num_iterations": 2}, {"steps_per_generation": 2, "gradient_accumulation_steps": 1}]
)
def test_before_any_step_ratios_are_1_and_the_reference_is_the_model(
    settings: dict[str, Any], adapters: Any, policy_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, where each step has a part of a generation, or all of it several times."""
    first: list[Drawn] = []

    def recorded(drawn: Drawn, options: PolicyOptions) -> Any:
        first.append(drawn)
        return policy_losses(drawn, options)

    monkeypatch.setattr("tunesmith.train.policy.policy_losses", recorded)
    logged = first_log(policy_of(beta=0.1, peft_config=adapters, **settings))
    drawn = first[0]
    assert drawn.reference is not None
    assert torch.equal(drawn.before, drawn.logprobs)
    assert torch.equal(drawn.reference, drawn.logprobs)
    assert logged["kl"] == logged["clip_ratio/region_mean"] == 0.0
    assert logged["sampling/sampling_logp_difference/mean"] < 1e-5
    assert logged["rewards/letters/mean"] == logged["reward"] > 0


@pytest.mark.parametrize("adapters", [None, LORA])
def test_a_generation_that_is_used_again_has_ratios_to_the_model_that_drew_it(
    adapters: Any, policy_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the first one of a run, before whose first step a model that was loaded is in evaluation mode."""
    ratios: list[float] = []

    def recorded(drawn: Drawn, options: PolicyOptions) -> Any:
        ratios.append(float((drawn.logprobs - drawn.before).detach().abs().max()))
        return policy_losses(drawn, options)

    monkeypatch.setattr("tunesmith.train.policy.policy_losses", recorded)
    policy_of(num_iterations=2, max_steps=4, peft_config=adapters).train()
    assert [ratio > 1e-3 for ratio in ratios] == [False, True, False, True]


def test_rewards_and_lengths_are_measured_over_a_generation(policy_of: Any) -> None:
    """By TRL's names."""
    given: list[float] = []

    def noted(completions: list[Any], letter: list[str], **_: Any) -> list[float]:
        given.extend(letters(completions, letter))
        return given

    trainer = policy_of(reward_funcs=[noted, letters], reward_weights=[1.0, 2.0], max_steps=1)
    trainer.judge.generator = uneven(trainer.decoding)
    logged, rewards = first_log(trainer), torch.tensor(given)
    assert logged["rewards/noted/mean"] == pytest.approx(float(rewards.mean()))
    assert logged["rewards/noted/std"] == logged["rewards/letters/std"] == pytest.approx(float(rewards.std()))
    assert logged["reward_std"] == pytest.approx(3 * float(rewards.std()))
    assert logged["reward_spread"] == pytest.approx(3 * float(rewards.view(2, 4).std(dim=1).mean()))
    lengths = {name: logged[f"completions/{name}"] for name in ("min_length", "max_length", "clipped_ratio")}
    assert lengths == {"min_length": 1, "max_length": 8, "clipped_ratio": 0.25}
    ended = [logged[f"completions/{kind}_terminated_length"] for kind in ("min", "mean", "max")]
    assert ended == [1, 3.5, 6]


def test_what_no_answer_has_is_not_logged(policy_of: Any) -> None:
    trainer = policy_of(max_steps=1)
    trainer.judge.generator = lambda prompts, sampling: [Generated(ids=[5, 6], finish="length") for _ in prompts]
    logged = first_log(trainer)
    assert logged["completions/max_length"] == 2
    assert [name for name in logged if "terminated" in name] == []


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


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")),
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"kind": RLOOTrainer},
        {"kind": RLOOTrainer, "normalize_advantages": True},
    ],
    ids=str,
)
def test_a_reward_that_is_the_same_for_all_changes_no_bit(settings: dict[str, Any], policy_of: Any) -> None:
    """The mean of 0.3 seven times is not 0.3 in fp32, and what it is above would be divided by next to nothing."""

    def same(completions: list[Any], **_: Any) -> list[float]:
        return [0.3] * len(completions)

    sizes = {"num_generations": 7, "per_device_train_batch_size": 7}
    trainer = policy_of(reward_funcs=same, **{"beta": 0.0, "max_steps": 3, **sizes} | settings)
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


# Data


def test_of_a_stream_as_many_prompts_are_read_as_the_run_asks(policy_of: Any) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield from PROMPTS

    stream = IterableDataset.from_generator(endless)
    trainer = policy_of(train_dataset=stream, gradient_accumulation_steps=3, num_iterations=2, max_steps=3)
    assert len(trainer.train_dataset) == 12  # two generations of 6 prompts
    listed = policy_of(folder="listed", train_dataset=PROMPTS * 3, gradient_accumulation_steps=3, num_iterations=2)
    trainer.train()
    listed.args.max_steps = 3
    listed.train()
    assert largest_difference(weights_of(trainer), weights_of(listed)) == 0.0


def test_held_out_prompts_may_be_a_stream_and_have_names(policy_of: Any) -> None:
    trainer, rows = policy_of(per_device_eval_batch_size=4), Dataset.from_list(PROMPTS[:2])
    reward = trainer.evaluate(rows)["eval_reward"]
    assert trainer.evaluate(rows.to_iterable_dataset())["eval_reward"] == reward
    named = trainer.evaluate(DatasetDict({"one": rows, "two": rows}))
    assert (named["eval_one_reward"], named["eval_two_reward"]) == (reward, reward)


def test_no_process_is_started_to_read_ahead(policy_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = policy_of(dataloader_num_workers=2, dataloader_prefetch_factor=2, dataloader_persistent_workers=True)
    assert "dataloader_num_workers is 2, and there is nothing to read ahead" in caplog.text
    assert trainer.get_train_dataloader().num_workers == 0


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


# What is said, and what is refused


def test_answers_without_any_reward_are_named_once(policy_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    def none(completions: list[Any], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    policy_of(reward_funcs=none).train()
    [said] = [record.getMessage() for record in caplog.records if "no reward applies" in record.getMessage()]
    assert re.match(r"row \d: no reward applies to 8 of 8 answers of a generation", said)


@pytest.mark.parametrize(("loss_type", "said"), [("dapo", True), ("bnpo", True), ("grpo", False), ("luspo", False)])
def test_a_ratio_of_answers_in_a_sum_over_tokens_is_named(
    loss_type: str, said: bool, policy_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policy_of(loss_type=loss_type, importance_sampling_level="sequence")
    assert ("GSPO is loss_type: grpo" in caplog.text) == said


def test_the_head_computes_in_fp32_where_all_does(policy_of: Any) -> None:
    assert policy_of(cast_lm_head_to_fp32=True).args.cast_lm_head_to_fp32
    with pytest.raises(TunesmithError, match="leave it out, or write precision: fp32"):
        policy_of(cast_lm_head_to_fp32=True, precision="bf16")


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
        ({"ref_model": nn.Linear(2, 2), "beta": 0.1}, "ref_model is Linear; give a name"),
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
