# %% [markdown]
# # 6. Where next: preferences, reward models, RLHF, DPO
#
# **You will learn**
#
# - what supervised fine-tuning gives, and what it can't;
# - what a *preference* is, and how a reward model learns from many of them;
# - what RLHF does with the reward, and why it must be held back;
# - how DPO gets there without a reward model;
# - when to use which.
#
# You see each method twice: on toy numbers, and on a real model with `RewardTrainer`, `GRPOTrainer` and `DPOTrainer`.
#
# ## What supervised fine-tuning gives
#
# SFT shows the model good answers, and it learns to write answers like them. With this alone you get the format, the
# tone and the task. What it never sees is a *bad* answer: nothing in the data says "rather this than that". Often
# people can't write the perfect answer, but can easily say which of two is better. The methods of this chapter learn
# from that.

# %%
import logging
import warnings

# What libraries tell each other when they are imported and used; nothing of it concerns us.
warnings.filterwarnings("ignore", message="IProgress not found|`is_gradient_checkpointing`")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import PrinterCallback

from tunesmith import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    generate,
)

torch.manual_seed(0)

HUB = False  # True: a model from the Hugging Face hub instead of the demo model
MODEL = "Qwen/Qwen2-0.5B" if HUB else "demo"

# %% [markdown]
# ## Reward models: from "which is better" to a number
#
# A **preference** is a prompt with two answers, the *chosen* and the *rejected*. A **reward model** gives each answer a
# score $r$, such that the chosen one has the higher. Its loss (Bradley and Terry, 1952) is
# $-\log \sigma(r_\text{chosen} - r_\text{rejected})$, where $\sigma$ squeezes a number between 0 and 1.
#
# Let our toy answers have three properties. People here like correct and polite ones, and dislike long ones, but the
# model is told none of that: it sees only who won. People are not quite consistent, either.

# %%
PROPERTIES = ["correct", "polite", "long"]
likes = torch.tensor([3.0, 1.0, -1.5])  # hidden from the model


def pairs(count):
    """Properties of two answers each, (count, 2, 3), the chosen first."""
    answers = torch.rand(count, 2, 3)
    gap = (answers[:, 0] - answers[:, 1]) @ likes
    first_wins = torch.rand(count) < torch.sigmoid(gap)  # people err where the gap is small
    return torch.where(first_wins[:, None, None], answers, answers.flip(1))


train, test = pairs(2000), pairs(500)
weights = torch.zeros(3, requires_grad=True)
optimizer = torch.optim.Adam([weights], lr=0.1)
for _ in range(200):
    reward = train @ weights
    loss = -F.logsigmoid(reward[:, 0] - reward[:, 1]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

weights = weights.detach()
for name, learned, hidden in zip(PROPERTIES, weights, likes, strict=True):
    print(f"{name:8} learned {learned:+.2f}, hidden {hidden:+.2f}")
scores = test @ weights
print(f"the chosen answer has the higher reward in {(scores[:, 0] > scores[:, 1]).float().mean():.0%} of new pairs")
best = (test[:, 0] - test[:, 1]) @ likes > 0
print(f"with the hidden numbers themselves it would be {best.float().mean():.0%}: people are not consistent")

# %% [markdown]
# The reward model found out what people like, from nothing but who won. A real one is a language model with one
# number as its output instead of the next token. We train one, with LoRA, on people who prefer short answers. A row has
# a `prompt`, the `chosen` and the `rejected` answer.

# %%
PREFERENCES = [
    ("What is the capital of Italy?", "Rome.", "The capital of Italy is the beautiful city of Rome."),
    ("What is 2 + 3?", "5.", "The sum of 2 and 3 is, of course, equal to 5."),
    ("Which color is the sky?", "Blue.", "The sky is generally perceived as having a blue color."),
    ("How many legs has a spider?", "Eight.", "A spider is an animal that has a total of eight legs."),
]
HELD_OUT = ("What is the capital of Egypt?", "Cairo.", "The capital of Egypt is the great city of Cairo.")


def question(text):
    return [{"role": "user", "content": text}]


def row(text, chosen, rejected):
    return {
        "prompt": question(text),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def adapter(task):
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task)


ALIKE = {  # in all three trainers
    "lr_scheduler_type": "constant",
    "precision": "fp32",
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
rows = [row(*preference) for preference in PREFERENCES]

trainer = RewardTrainer(
    model=MODEL,
    args=RewardConfig(
        output_dir="runs/guide/06-reward",
        learning_rate=5e-4,
        max_steps=5,
        per_device_train_batch_size=len(rows),
        **ALIKE,
    ),
    train_dataset=rows,
    eval_dataset=[row(*HELD_OUT)],
    peft_config=adapter("SEQ_CLS"),
)
trainer.remove_callback(PrinterCallback)  # what we want to see of the log, we print below

margin_before = trainer.evaluate()["eval_margin"]
trainer.train()
margin_after = trainer.evaluate()["eval_margin"]

for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']}: loss {entry['loss']:.3f}, {entry['accuracy']:.0%} of the pairs right")
print(f"a new pair: the chosen answer has {margin_before:+.2f} more reward before, {margin_after:+.2f} after")
reward_model, tokenizer = trainer.model, trainer.processing_class

# %% tags=["claim"]
if not HUB:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 0.5, losses  # about log 2
    assert losses[-1] < 0.4, losses
    assert margin_after > max(0.5, margin_before), (margin_before, margin_after)

# %% [markdown]
# The new head starts from random numbers, so the first loss is about $\log 2 \approx 0.69$, that of guessing. After
# five steps it is right about a question that it never saw. On the command line it is `tunesmith reward --model demo
# --data pairs.jsonl --lora --output runs/reward`.
#
# ## RLHF: more reward, but stay close
#
# **RLHF**, reinforcement learning from human feedback, lets the model write, scores what it wrote with the reward
# model, and makes answers with a high reward likelier. The model that writes is called the *policy* $\pi$. With
# reward alone it would find the one answer that the reward model likes best, however odd, and say nothing else. So it
# is held to the model that it started from, the *reference*: it maximises
#
# $$\mathbb{E}_\pi[r] - \beta \, \mathrm{KL}(\pi \,\|\, \pi_\text{ref})$$
#
# KL measures how far two distributions are apart, and $\beta$ says how much that costs. Our toy policy chooses among
# five answers.

# %%
ANSWERS = ["rude", "wrong", "fine", "good", "odd trick"]
reference = torch.tensor([0.20, 0.30, 0.35, 0.14, 0.01])
reward = torch.tensor([-1.0, -2.0, 1.0, 2.0, 4.0])  # the reward model is fooled by the odd trick


def rlhf(beta):
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        policy = logits.softmax(0)
        divergence = (policy * (policy.log() - reference.log())).sum()
        loss = -((policy * reward).sum() - beta * divergence)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(0)


figure, axis = plt.subplots(figsize=(8, 3.5))
policies = {"reference": reference} | {f"beta {beta}": rlhf(beta) for beta in (0.1, 1.0, 5.0)}
for number, (name, policy) in enumerate(policies.items()):
    axis.bar(torch.arange(5) + 0.2 * number, policy, width=0.2, label=name)
    print(f"{name:10}", " ".join(f"{answer} {share:.2f} " for answer, share in zip(ANSWERS, policy, strict=True)))
axis.set_xticks(torch.arange(5) + 0.3, ANSWERS)
axis.set(ylabel="probability")
axis.legend()
plt.show()

# %% [markdown]
# With a small $\beta$ the policy says nothing but the odd trick: that is *reward hacking*. With a large one it hardly
# leaves the reference. In between, good answers win. There is even a formula for where this ends:
# $\pi^* \propto \pi_\text{ref} \exp(r / \beta)$.

# %%
formula = (reference * (reward / 1.0).exp()) / (reference * (reward / 1.0).exp()).sum()
print("largest difference between the formula and the training:", f"{(formula - policies['beta 1.0']).abs().max():.4f}")

# %% [markdown]
# ### With a real model: GRPO
#
# How do we make answers with a high reward likelier, when there are more answers than can be listed? **GRPO**, group
# relative policy optimization ([Shao et al., 2024](https://arxiv.org/abs/2402.03300)), lets the policy draw several
# answers to each question. An answer with more reward than the mean of its group becomes likelier, one with less
# becomes less likely. The rewards come from the model that we have just trained. The rows are questions: nobody writes
# an answer.

# %%
trainer = GRPOTrainer(
    model=MODEL,
    reward_funcs=reward_model,
    reward_processing_classes=tokenizer,
    args=GRPOConfig(
        output_dir="runs/guide/06-grpo",
        beta=0.02,
        learning_rate=1e-3,
        max_steps=12,
        num_generations=8,
        per_device_train_batch_size=16,  # answers: 8 to each of two questions
        max_completion_length=24,
        **ALIKE,
    ),
    train_dataset=[{"prompt": question(text)} for text, _, _ in PREFERENCES],
    peft_config=adapter("CAUSAL_LM"),
)
trainer.remove_callback(PrinterCallback)

asked = [text for text, _, _ in [*PREFERENCES, HELD_OUT]]
answers_before = generate(trainer.model, tokenizer, [question(text) for text in asked], max_new_tokens=24)
trainer.train()
answers_after = generate(trainer.model, tokenizer, [question(text) for text in asked], max_new_tokens=24)

history = [entry for entry in trainer.state.log_history if "reward" in entry]
for entry in history[::3] + history[-1:]:
    print(f"step {entry['step']:2}: reward {entry['reward']:+.2f}, KL {entry['kl']:.2f} a token")
for text, before, after in zip(asked, answers_before, answers_after, strict=True):
    print(f"{text}\n  before: {before!r}\n  after:  {after!r}")

# %% tags=["claim"]
if not HUB:
    rewards = [entry["reward"] for entry in history]
    assert sum(rewards[-3:]) > sum(rewards[:3]), rewards
    # Which answers it finds depends on the draws; that they are unlike the reference's does not.
    distances = [entry["kl"] for entry in history]
    assert min(distances[-3:]) > 5 * max(distances[:3]), distances

# %% [markdown]
# The reward rises, and so does the KL: the policy leaves the reference. Look at what the reward bought: answers that
# nobody would prefer, some wrong, some in no language at all. (Answers are drawn at random, so yours may be others.)
# The reward model has seen eight answers, all of them right, so it knows nothing of truth. It also scores texts that
# are like none of them, and the policy found some that it scores high. This is reward hacking again, in a real model.
# What helps: a larger $\beta$, fewer steps, many more pairs, also such in which a wrong short answer loses, or a second
# reward that checks the answer.
#
# A reward can also be a plain function, such as a test that the answer passes: `reward_funcs=my_function`. On the
# command line, one that is built in has a name: `tunesmith grpo --model demo --data questions.jsonl --reward-funcs
# exact_match --lora --output runs/grpo`.
#
# ## DPO: the same goal without a reward model
#
# **Direct preference optimization** ([Rafailov et al., 2023](https://arxiv.org/abs/2305.18290)) turns the formula of
# the best policy, $\pi^* \propto \pi_\text{ref} \exp(r / \beta)$, around: if the policy were already the best one,
# its reward could be read off it, as $r = \beta \log(\pi / \pi_\text{ref})$ plus something that is the same for both
# answers. Put that into the loss of the reward model, and no reward model is left:
#
# $$-\log \sigma\Big(\beta \log\frac{\pi(\text{chosen})}{\pi_\text{ref}(\text{chosen})} - \beta
# \log\frac{\pi(\text{rejected})}{\pi_\text{ref}(\text{rejected})}\Big)$$


# %%
def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """From log probabilities of whole answers."""
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -F.logsigmoid(beta * margin).mean()


# Each answer against each other, as often as people with these rewards would choose it.
first, second = torch.tensor([(i, j) for i in range(5) for j in range(5) if i != j]).T
wins = torch.sigmoid(reward[first] - reward[second])
logits = reference.log().clone().requires_grad_()
optimizer = torch.optim.Adam([logits], lr=0.1)
for _ in range(400):
    policy, fixed = logits.log_softmax(0), reference.log()
    margin = (policy[first] - fixed[first]) - (policy[second] - fixed[second])
    loss = -(wins * F.logsigmoid(1.0 * margin)).mean()  # beta 1
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
dpo = logits.detach().softmax(0)
print("RLHF:", [f"{share:.3f}" for share in policies["beta 1.0"]])
print("DPO: ", [f"{share:.3f}" for share in dpo])

# %% [markdown]
# The same policy, from preferences alone. Now with a real model and the four pairs from above. The probability of an
# answer is the product of those of its tokens, so its logarithm is a sum. LoRA gives us the reference for free: it is
# the same model with its adapter switched off.

# %%
trainer = DPOTrainer(
    model=MODEL,
    args=DPOConfig(
        output_dir="runs/guide/06-dpo",
        beta=0.1,
        learning_rate=5e-4,
        max_steps=4,
        per_device_train_batch_size=len(rows),
        **ALIKE,
    ),
    train_dataset=rows,
    eval_dataset=[row(*HELD_OUT)],
    peft_config=adapter("CAUSAL_LM"),
)
trainer.remove_callback(PrinterCallback)

start = trainer.evaluate()
trainer.train()
end = trainer.evaluate()

for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']}: loss {entry['loss']:.3f}, margin {entry['rewards/margins']:.3f}")
for name, measured in (("before training", start), ("after training", end)):
    short, long = measured["eval_logps/chosen"], measured["eval_logps/rejected"]
    print(f"{name}: a new question, log probability short {short:.1f}, long {long:.1f}: gap {short - long:+.1f}")
answers = generate(trainer.model, tokenizer, [question(text) for text in asked], max_new_tokens=24)
for text, answer in zip(asked, answers, strict=True):
    print(f"{text} {answer!r}")

# %% tags=["claim"]
if not HUB:
    assert sum(map(len, answers)) < 0.8 * sum(map(len, answers_before)), answers
    gaps = [measured["eval_logps/chosen"] - measured["eval_logps/rejected"] for measured in (start, end)]
    assert gaps[1] > gaps[0] + 2, gaps

# %% [markdown]
# The first loss is $\log 2 \approx 0.693$: at the start policy and reference are one, so the margin is 0. Then it
# falls, and on a question that was not in the data the short answer gains on the long one. Compare the answers with
# those before GRPO and after it: they became shorter, and are still answers to the question. `DPOTrainer` computes the
# prompt of a pair once for both answers. On the command line it is `tunesmith dpo --model demo --data pairs.jsonl
# --lora --output runs/dpo`. Afterwards `report.html` in its folder shows how the rewards went, and which pairs the
# model still has the wrong way around.
#
# Where do pairs come from? Let the model of chapter 3 answer, keep what is wrong, and put the right answer beside it:
# `tunesmith demo --preferences` does that and counts before and after.
#
# ## When to use which
#
# | you have | use | because |
# | --- | --- | --- |
# | good answers | SFT | simple, stable, and the base of everything below |
# | pairs of a better and a worse answer | SFT, then DPO | no reward model, and nothing is generated while training |
# | single answers, each judged good or bad | SFT, then KTO (`KTOTrainer`) | a thumb up or down is all it needs |
# | a reward that can be computed, as by tests | reinforcement learning (`GRPOTrainer`) | finds ways nobody wrote down |
# | many preferences, a budget | a reward model (`RewardTrainer`), then RLHF | it judges new answers, however many |
# | facts that change daily | none: search, and put what is found into the prompt | training is too slow for that |
#
# A model that has not had SFT first hardly ever writes an answer worth preferring. So you have already done the first
# step. For what tunesmith has no trainer for, there is [TRL](https://huggingface.co/docs/trl), which loads the models
# that tunesmith saves.
#
# ## Try it yourself
#
# 1. What is the DPO loss where the policy is the reference? Compute it with `dpo_loss`.
# 2. At which $\beta$ of 0.5, 1, 2, 3 does the odd trick fall below 10%? Use `rlhf`.
# 3. Train the reward model on 20 pairs only. How far are its numbers from the hidden ones?
# 4. Why is SFT on the chosen answers not enough? Show that it tells nothing about the rejected one: compute the
#    gradient of `-log p(chosen)` and of the DPO loss for the toy policy.

# %%
# 1
same = torch.tensor([-3.0])
print(f"{dpo_loss(same, same - 1, same, same - 1, beta=0.1):.4f}")

# %%
# 2
for beta in (0.5, 1.0, 2.0, 3.0):
    print(f"beta {beta}: odd trick {rlhf(beta)[4]:.1%}")

# %%
# 3
few = pairs(20)
weights = torch.zeros(3, requires_grad=True)
optimizer = torch.optim.Adam([weights], lr=0.1)
for _ in range(200):
    rewards = few @ weights
    loss = -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
for name, learned, hidden in zip(PROPERTIES, weights.detach(), likes, strict=True):
    print(f"{name:8} learned {learned:+.2f}, hidden {hidden:+.2f}")

# %%
# 4: the chosen answer is "good", the rejected one "rude"
logits = reference.log().clone().requires_grad_()
(by_sft,) = torch.autograd.grad(-logits.log_softmax(0)[3], logits)
policy, fixed = logits.log_softmax(0), reference.log()
(by_dpo,) = torch.autograd.grad(dpo_loss(policy[3], policy[0], fixed[3], fixed[0], beta=1.0), logits)
for name, gradient in (("SFT", by_sft), ("DPO", by_dpo)):
    pushes = zip(ANSWERS, -gradient, strict=True)
    print(f"{name} pushes:", ", ".join(f"{answer} {push:+.2f}" for answer, push in pushes))

# %% [markdown]
# SFT pushes all other answers down according to how likely they are, right or wrong; DPO pushes down just the one
# that was rejected.
#
# ## What you have learned
#
# - SFT imitates; preferences say what is better.
# - A reward model turns preferences into a number, with $-\log \sigma(r_\text{chosen} - r_\text{rejected})$.
# - RLHF maximises the reward and pays for leaving the reference; too little of that price, and the reward is hacked.
# - DPO reaches the same without a reward model, from log probabilities.
# - As a rule they begin with a model that SFT has made.
#
# Next: [chapter 7](07_many_processes.ipynb), training in several processes and on several machines.
