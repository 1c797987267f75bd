# %% [markdown]
# # 4. Data: conversations, templates, masks, packing
#
# **You will learn**
#
# - the two shapes that training data has, instructions and conversations, and how to bring your own rows into one of
#   them;
# - what a chat template is, and what goes wrong without one;
# - what new tokens need, and what happens when they don't get it;
# - how a model learns to stop, seen with and without the end token;
# - which tokens are trained on (the *mask*), and how to look at it before you train;
# - what padding costs, and how packing saves it.
#
# A model learns what its data shows, and nothing else. Most of a fine-tuning project is spent here.

# %%
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import warnings
from copy import deepcopy
from itertools import groupby
from pathlib import Path

# What libraries tell each other when they are imported and used; nothing of it concerns us.
warnings.filterwarnings("ignore", message="IProgress not found|`is_gradient_checkpointing`")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from tunesmith import SFTConfig, SFTTrainer, TunesmithError, clone_chat_template, demo_model_path, generate, load_run

disable_progress_bar()

HUB = False  # True: models from the Hugging Face hub instead of the demo model
MODEL = "Qwen/Qwen2-0.5B" if HUB else "demo"
BASE = "EleutherAI/gpt-neo-125m" if HUB else str(demo_model_path())
FOLDER = Path("runs/guide/04")
FOLDER.mkdir(parents=True, exist_ok=True)

model, tokenizer = load_run(MODEL)

# %% [markdown]
# ## Two shapes of data
#
# An **instruction** row is one task and its answer. A **conversation** is a list of messages; each has a *role*
# (`system` sets the scene, `user` asks, `assistant` answers) and a content.

# %%
instruction = {"instruction": "Name the capital.", "input": "Japan", "output": "Tokyo"}
conversation = {
    "messages": [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "The capital of Japan?"},
        {"role": "assistant", "content": "Tokyo"},
        {"role": "user", "content": "And of Peru?"},
        {"role": "assistant", "content": "Lima"},
    ]
}

# %% [markdown]
# What becomes of such a row? The trainer turns it into **tokens**, the pieces of text that a model reads, each with a
# number. Beside them it keeps a **label** for each token: the token itself where the model is to learn it, and -100
# where it only reads. That is the *mask*. Let's make it visible: what is trained on stands between `⟦` and `⟧`.


# %%
def prepare(rows, formatting_func=None, **settings):
    """The rows as the trainer will see them."""
    config = SFTConfig(output_dir=str(FOLDER / "look"), max_steps=1, precision="fp32", report_to="none", **settings)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, formatting_func=formatting_func
    )
    return trainer.train_dataset


def show(example):
    """The text of an example, with what is trained on between marks."""
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != -100):
        text = tokenizer.decode([token for token, _ in run])
        print(f"⟦{text}⟧" if trained else text, end="")
    print()


show(prepare([instruction])[0])
print("-" * 40)
show(prepare([conversation], train_on="assistant")[0])

# %% [markdown]
# Of the instruction, only the output is trained on. Of the conversation, `train_on="assistant"` trains on both answers.
# In both, the token that *ends* the answer is inside the marks. Remember it; we come back to it.
#
# ## Your own rows: `formatting_func`
#
# Your rows have other columns? Write a function that takes a row and returns a list of messages, a text, or a pair
# `(prompt, completion)`. Here are questions and answers in Chinese.

# %%
questions = [
    {"question": "台灣最高的山是哪一座？", "answer": "玉山。"},
    {"question": "水的化學式是什麼？", "answer": "H₂O。"},
    {"question": "一年有幾個月？", "answer": "十二個月。"},
]


def as_pair(row):
    return f"問題：{row['question']}\n回答：", row["answer"]


for example in prepare(questions, formatting_func=as_pair):
    show(example)
    print(len(example["input_ids"]), "tokens,", sum(label != -100 for label in example["labels"]), "trained on")

# %% [markdown]
# The pair says what is prompt and what is completion, so only the completion is trained on. Had the function returned
# one text, everything would be. Look at the number of tokens, too: it is large for so few characters, because the demo
# model's tokenizer was made for English and often splits a Chinese character into its bytes. Number 3 of *Try it
# yourself* counts it.
#
# ## Why chat templates?
#
# A model reads one long row of tokens. It knows nothing of roles or turns unless they are *written into* that row. The
# **chat template** does it: a small program, stored with the tokenizer, that turns messages into text.

# %%
messages = [{"role": "user", "content": "What is the capital of France?"}]
print(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

# %% [markdown]
# Three things are in it:
#
# - **roles**: who says what;
# - **structure**: where a turn begins and ends, with *special tokens* that never occur in ordinary text;
# - **stopping**: the same token ends each turn, so whoever writes the answer knows how to end it.
#
# The last line, `<|im_start|>assistant`, is the *generation prompt*: "now the assistant speaks". Without all of this,
# what happens?


# %%
def complete(model, tokenizer, ids, most=24):
    """What the model writes behind these tokens, `most` tokens at the most, and whether it stopped by itself."""
    ids = torch.tensor([ids], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = output[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), new[-1] == tokenizer.eos_token_id


question = messages[0]["content"]
bare = tokenizer(question)["input_ids"]
templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
said = [complete(model, tokenizer, ids)[0] for ids in (bare, templated)]
print("without the template:", repr(said[0]))
print("with the template:   ", repr(said[1]))

# %% tags=["claim"]
if not HUB:
    assert "Paris" in said[1] and "Paris" not in said[0]

# %% [markdown]
# The same weights, the same question. Without the template the demo model gives no answer at all: it was trained on
# templated conversations, and bare text is not one.
#
# One question proves little. So let's train on a task with template A, the model's own, and ask with template B,
# another way to write the same conversations; and the other way round. Two seeds each, eight new questions. We count
# the right answers, and we measure the loss: how much the right answers surprise the model.

# %%
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
TASKS = ["call Anna", "buy milk", "pay the rent", "feed the cat", "book a table", "wash the car", "fix the bike"]
NEW_TASKS = ["visit grandma", "pack the suitcase", "charge the camera", "order new chairs"]
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
dice = random.Random(0)


def todo(tasks):
    task, day = dice.choice(tasks), dice.choice(DAYS)
    request = {"role": "user", "content": f"Please note: {task} on {day}."}
    return {"messages": [request, {"role": "assistant", "content": f"[ ] {task} @{day[:3].lower()}"}]}


def train(rows, name, model=MODEL, **settings):
    """Train adapters on `rows`; returns the trainer."""
    peft_config = settings.pop("peft_config", LORA)
    processing_class = settings.pop("processing_class", None)
    config = SFTConfig(
        **{
            "output_dir": str(FOLDER / name),
            "learning_rate": 1e-3,  # by the rule of chapter 3
            "train_on": "assistant",
            "precision": "fp32",
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "self_test": "off",
        }
        | settings
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=processing_class,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)  # its numbers are not our subject here
    trainer.train()
    return trainer


todo_rows, new_rows = [todo(TASKS) for _ in range(64)], [todo(NEW_TASKS) for _ in range(8)]
asked = [row["messages"][:1] for row in new_rows]
expected = [row["messages"][1]["content"] for row in new_rows]
TEMPLATES = {"A": {}, "B": {"chat_template_path": "alpaca"}}


@torch.no_grad()
def loss_of(model, tokenizer, row):
    """The loss of the right answer, behind its prompt as the tokenizer's template writes it."""
    ids = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
    said = tokenizer(row["messages"][1]["content"], add_special_tokens=False)["input_ids"]
    logits = model.eval()(torch.tensor([ids + said], device=model.device)).logits[0, len(ids) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(said, device=model.device)).item()


right, surprise = {}, {}
for seed in (1, 2):
    trainers = {
        name: train(todo_rows, f"template_{name}", max_steps=24, per_device_train_batch_size=4, seed=seed, **settings)
        for name, settings in TEMPLATES.items()
    }
    for learned, trainer in trainers.items():
        for used, other in trainers.items():
            answers = generate(trainer.model, other.processing_class, asked, max_new_tokens=16)
            count = sum(answer.strip() == wanted for answer, wanted in zip(answers, expected, strict=True))
            right.setdefault((learned, used), []).append(count)
            loss = statistics.mean(loss_of(trainer.model, other.processing_class, row) for row in new_rows)
            surprise.setdefault((learned, used), []).append(loss)
for (learned, used), (one, two) in right.items():
    low, high = sorted(surprise[learned, used])
    print(f"trained with {learned}, asked with {used}: {one} and {two} of 8 right, loss {low:.2f} to {high:.2f}")

# %% tags=["claim"]
if not HUB:
    for learned, other in (("A", "B"), ("B", "A")):
        assert max(surprise[learned, learned]) < min(surprise[learned, other]), surprise
        assert sum(right[learned, learned]) > sum(right[learned, other]), right

# %% [markdown]
# The same rows, the same 24 steps. Asked in the form that it was trained in, the model finds the right answers
# likelier, in every run, and more of its answers are right. How many depends on the task and on how long one trains.
# Another template gains nothing, and nobody will warn you. So use the template later that you train with;
# `save_model()` keeps it in the model's folder.
#
# What if a tokenizer has no template? Then a conversation can't be made into text, and you are told before any
# training.

# %%
base_tokenizer = AutoTokenizer.from_pretrained(BASE)
base_tokenizer.chat_template = None  # base models often come like this
base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
config = SFTConfig(output_dir=str(FOLDER / "look"), max_steps=1, precision="fp32", report_to="none")
try:
    SFTTrainer(model=base, args=config, train_dataset=[conversation], processing_class=base_tokenizer)
except TunesmithError as error:
    print(error)
else:
    raise AssertionError("this should have been refused")

# %% [markdown]
# ## Give a base model a template: `clone_chat_template`
#
# A **base model** has only been *pretrained*: it goes on with text. It may lack both the template and the special
# tokens. `clone_chat_template` copies them from a built-in template (here `llama3`) or from another model. New tokens
# need new rows in the *embedding*, the table with one row of numbers for each token.

# %%
before = base.get_input_embeddings().weight.shape[0]
base, base_tokenizer, added = clone_chat_template(base, base_tokenizer, "llama3")
rows = base.get_input_embeddings().weight.detach()
print("added:", base_tokenizer.convert_ids_to_tokens(added))
print("rows of the embedding:", before, "->", rows.shape[0])
print("now ends a turn:", base_tokenizer.eos_token)
print("new row - mean of the old:", float((rows[added[0]] - rows[:before].mean(0)).abs().max()))
print(base_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

# %% [markdown]
# The table grew to a multiple of 64, which processors like, and each new row starts as the mean of the old ones: an
# average word, until training teaches it better. It must be taught, though: all new rows are the same, so as long as
# they stay as they are, no layer of the model can tell `<|eot_id|>`, which ends a turn, from any other new token.
#
# LoRA trains matrices *beside* the layers, and not the embedding. So we train twice: once with the new rows, which
# `SFTTrainer` adds to the adapter by itself (`trainable_token_indices`), and once without. For the second, the model is
# saved first and loaded as one that has always had these tokens; then nobody knows that they are new.

# %%
CAPITALS = {
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Italy": "Rome",
    "Egypt": "Cairo",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Greece": "Athens",
}
NEW_LANDS = ["France", "Spain", "Poland", "Chile", "Turkey", "Sweden", "Ireland", "Portugal"]


def ask_capital(land):
    return {"role": "user", "content": f"The capital of {land}?"}


talks = [{"messages": [ask_capital(land), {"role": "assistant", "content": city}]} for land, city in CAPITALS.items()]
base.save_pretrained(FOLDER / "cloned")
base_tokenizer.save_pretrained(FOLDER / "cloned")
END = base_tokenizer.eos_token_id
lands_tokens = [
    base_tokenizer.apply_chat_template([ask_capital(land)], add_generation_prompt=True)["input_ids"]
    for land in NEW_LANDS
]
asked_before = talks[0]["messages"][:1]
trained_question = base_tokenizer.apply_chat_template(asked_before, add_generation_prompt=True)["input_ids"]
STEPS = {"max_steps": 30, "per_device_train_batch_size": 8}
with_rows = train(talks, "new_rows", model=base, processing_class=base_tokenizer, **STEPS)
without_rows = train(talks, "no_new_rows", model=str(FOLDER / "cloned"), **STEPS)


@torch.no_grad()
def chance_of_end(model, ids, answer):
    """The probability of the end token behind an answer."""
    said = base_tokenizer(answer, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([ids + said], device=model.device)).logits[0, -1]
    return logits.float().softmax(-1)[END].item()


ends, stopped = {}, {}
for name, trainer in (("new rows trained", with_rows), ("left as they were", without_rows)):
    ends[name] = chance_of_end(trainer.model.eval(), trained_question, "Tokyo")
    stopped[name] = sum(complete(trainer.model, base_tokenizer, ids)[1] for ids in lands_tokens)
    print(f"{name}: probability of the end token behind an answer {ends[name]:.0%};", end=" ")
    print(f"{stopped[name]} of {len(NEW_LANDS)} answers to new questions stop")

# %% tags=["claim"]
if not HUB:
    assert stopped["new rows trained"] >= 5 and stopped["left as they were"] == 0, stopped
    assert ends["new rows trained"] > 1 / 64 + 1e-6 >= ends["left as they were"], ends

# %% [markdown]
# With the new rows, the model learns to stop after most answers. After so few steps the end token is still unlikely
# behind "Tokyo", but its probability is already above a sixty-fourth. Without the new rows, the probability is shared
# by all 64 of them, which look alike, so it is never more than a sixty-fourth. With adapters that you make yourself,
# before the trainer sees them, the new rows would be left out in the same way. That is no run that you want, so it is
# refused:

# %%
cloned, cloned_tokenizer, _ = clone_chat_template(
    AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), AutoTokenizer.from_pretrained(BASE), "llama3"
)
try:
    train(
        talks, "look", model=get_peft_model(cloned, deepcopy(LORA)), processing_class=cloned_tokenizer, peft_config=None
    )
except TunesmithError as error:
    print(str(error).replace(BASE, "the base model"))
else:
    raise AssertionError("this should have been refused")

# %% [markdown]
# In a run from a recipe, `chat_template_path: chatml` does all of this: template, tokens and their rows.
#
# ## Learning to stop
#
# A model stops when it writes its *end token* (`eos_token`, end of sequence). It writes that only if training showed
# it. Let's fine-tune twice on the same answers: once with the end token, once without.

# %%
with_end = [{"prompt": f"Q: The capital of {land}?\nA:", "completion": f" {city}"} for land, city in CAPITALS.items()]
without_end = []
for row in with_end:
    prompt, answer = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "completion"))
    without_end.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})

print("with:    ", end="")
show(prepare(with_end)[0])
try:
    prepare(without_end)
except TunesmithError as error:
    print(error)
else:
    raise AssertionError("this should have been refused")

# %% [markdown]
# Prompt and completion get the end token by themselves. Rows that you tokenize yourself are taken as they are, and the
# preflight, the check before training, refuses data in which nothing ever ends. To see why, we overrule it with
# `allow_no_eos=True`.


# %%
STEPS = {"max_steps": 10, "per_device_train_batch_size": 8, "train_on": None}
tuned = {
    "with end": train(with_end, "with_end", processing_class=tokenizer, **STEPS),
    "without end": train(without_end, "without_end", processing_class=tokenizer, allow_no_eos=True, **STEPS),
}
stops = {}
for name, trainer in tuned.items():
    answers = [
        complete(trainer.model, tokenizer, tokenizer(f"Q: The capital of {land}?\nA:")["input_ids"])
        for land in NEW_LANDS
    ]
    stops[name] = sum(ended for _, ended in answers)
    print(f"{name}: {stops[name]} of {len(NEW_LANDS)} answers stop by themselves, such as {answers[0][0]!r}")

# %% tags=["claim"]
if not HUB:
    assert stops["with end"] == 8 and stops["without end"] <= 4, stops

# %% [markdown]
# With the end token the model stops after every answer. Without it most answers go on until the limit of 24 tokens cuts
# them off, and those that stop do so because the model learned to before. A model that rambles has usually been trained
# like the second one: look for the end token in the data first.
#
# ### The trap: padding with the end token
#
# The most common way to lose the end token is not in the data at all. Many models have no padding token, so scripts set
# `tokenizer.pad_token = tokenizer.eos_token`, and then mask padding in the labels *by its number*:

# %%
trapped = deepcopy(tokenizer)
trapped.pad_token = trapped.eos_token
end = trapped.eos_token
batch = trapped(
    [f"Tokyo{end}", f"The city of Buenos Aires{end}"], padding=True, padding_side="right", return_tensors="pt"
)

by_number = batch["input_ids"].clone()
by_number[by_number == trapped.pad_token_id] = -100  # the trap: end tokens have the same number
by_place = batch["input_ids"].clone()
by_place[batch["attention_mask"] == 0] = -100
for name, labels in (("by its number", by_number), ("by its place", by_place)):
    left = int((labels == trapped.eos_token_id).sum())
    print(f"padding masked {name}: {left} of 2 end tokens are left to learn")

print("tunesmith, with the end token for padding: ", end="")
show(prepare(with_end, pad_token=tokenizer.eos_token)[0])

# %% tags=["claim"]
if not HUB:
    assert (by_number == trapped.eos_token_id).sum() == 0 and (by_place == trapped.eos_token_id).sum() == 2
    assert prepare(with_end, pad_token=tokenizer.eos_token)[0]["labels"][-1] == tokenizer.eos_token_id

# %% [markdown]
# Masked by its number, every end token is gone, and the model rambles although the data was right. Padding has to be
# masked by its *place*. tunesmith does, and mostly it has no padding to mask.
#
# Which token ends a text is the tokenizer's `eos_token`; `SFTConfig(eos_token=...)` chooses another of the vocabulary.
# Whatever you choose, whoever generates must stop at the same one. A trained model's folder says which it is.
#
# ## Look at the masks
#
# `tunesmith inspect` shows the tokens of the actual batch, without loading weights. In a terminal it uses colours; here
# it uses the marks that you know.

# %%
THINGS = ["mugs", "lamps", "chairs", "books", "pens", "clocks", "towels", "plates", "boxes", "rugs"]


def order():
    """A letter that orders one thing or many, and what it orders, as JSON."""
    items = {thing: dice.randint(2, 9) for thing in dice.sample(THINGS, dice.randint(1, len(THINGS)))}
    lines = "\n".join(f"- {count} {thing}, well wrapped, to the back door" for thing, count in items.items())
    letter = {"role": "user", "content": f"Hello, please send us the following:\n{lines}"}
    return {"messages": [letter, {"role": "assistant", "content": json.dumps(items)}]}


orders = [order() for _ in range(24)]
data = FOLDER / "rows.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in orders), encoding="utf-8")
command = ["inspect", "--model", MODEL, "--data", str(data), "--train-on", "assistant", "--row", "1"]
command = [sys.executable, "-m", "tunesmith", *command]
no_colours = os.environ | {"TERM": "dumb"}
result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=no_colours)
print(result.stdout)

# %% [markdown]
# Read it like a proofreader: is the whole answer marked, with its end token, and nothing of the question?
#
# ## Padding and packing
#
# The rows of a batch have different lengths, and a rectangle of numbers has one. So short rows are commonly filled up
# with a meaningless *padding token*, which is computed like all others and thrown away. **Packing** puts several
# examples side by side into rows of `max_length` tokens instead; attention stays within each example, so that they
# don't see each other.

# %%
mixed = [row for pair in zip(orders, todo_rows[:24], strict=True) for row in pair]
lengths = [len(example["input_ids"]) for example in prepare(mixed)]
packs = [example["seq_lengths"] for example in prepare(mixed, packing=True, max_length=512)]

real = sum(lengths)
batches = [lengths[start : start + 8] for start in range(0, len(lengths), 8)]
padded = sum(8 * max(batch) for batch in batches)
print(f"{len(lengths)} examples, {real:,} tokens")
print(f"in padded batches of 8: {padded:,} tokens computed, {1 - real / padded:.0%} of them padding")
print(f"packed: {len(packs)} rows of at most 512 tokens, filled to {real / (512 * len(packs)):.0%}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4))
for axis, title, rows in (
    (axes[0], "with padding", [[length] for length in lengths[:24]]),
    (axes[1], "in packs", packs),
):
    width = max(lengths[:24]) if title == "with padding" else 512
    picture = np.full((len(rows), width), np.nan)
    for at, row in enumerate(rows):
        stops = np.cumsum(row)
        for number, (stop, length) in enumerate(zip(stops, row, strict=True)):
            picture[at, stop - length : stop] = number % 2 + at % 2 * 0.2
    axis.imshow(picture, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set(title=f"{title}: white is wasted", xlabel="position", ylabel="row")
plt.show()

# %% [markdown]
# What does it save, and does the model learn the same? One epoch of 8 of these rows in three ways, each twice, in
# turns (a computer has better and worse minutes), and the loss on rows that were not trained on.

# %%
WAYS = {
    "with padding": {"padding_free": False, "per_device_train_batch_size": 4},
    "without padding": {"per_device_train_batch_size": 4},
    "in packs": {"packing": True, "max_length": 512, "per_device_train_batch_size": 2},
}
held_out = [order() for _ in range(4)] + new_rows[:4]
seconds, held_out_loss = {name: [] for name in WAYS}, {}
for _ in range(2):
    for name, settings in WAYS.items():
        trainer = train(mixed[:8], name.replace(" ", "_"), num_train_epochs=1, **settings)
        seconds[name].append(trainer.state.log_history[-1]["train_runtime"])
        held_out_loss[name] = trainer.evaluate(held_out)["eval_loss"]
for name, times in seconds.items():
    rate = sum(lengths[:8]) / statistics.mean(times)
    print(f"{name}: {min(times):.1f} and {max(times):.1f} s, {rate:.0f} tokens a second;", end=" ")
    print(f"loss on held-out rows {held_out_loss[name]:.2f}")

# %% [markdown]
# tunesmith computes no padding even without packing: the examples of a batch lie side by side anyway, so the second way
# is already fast. What packing adds is batches of one and the same size, so that a GPU's memory can be filled just
# right. A batch of two packs holds other rows than a batch of four did, so the steps are different ones. The loss ends
# elsewhere, not higher or lower by rule.
#
# ## Try it yourself
#
# 1. Train on the *last* answer of `conversation` only. Which setting is it? Show the mask.
# 2. Write a `formatting_func` for `questions` that returns messages, with a system message that asks for short answers.
# 3. How many tokens does a character need, in Chinese and in English?
# 4. How full are the packs with `max_length` 256, 512 and 1024? Which is worst, and why?
#
# Try them before you read on.

# %%
# 1
show(prepare([conversation], train_on="last_assistant")[0])


# %%
# 2
def as_chat(row):
    return [
        {"role": "system", "content": "請簡短回答。"},
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]


show(prepare(questions, formatting_func=as_chat, train_on="assistant")[0])

# %%
# 3
for text in ("台灣最高的山是哪一座？", "Which is the highest mountain of Taiwan?"):
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    print(f"{count / len(text):.2f} tokens a character, {count} tokens: {text}")

# %%
# 4
for limit in (256, 512, 1024):
    rows = [example["seq_lengths"] for example in prepare(mixed, packing=True, max_length=limit)]
    filled = sum(map(sum, rows)) / (limit * len(rows))
    fewest = -(-real // limit)  # rounded up
    print(f"max_length {limit}: {len(rows)} packs, filled to {filled:.0%}; {fewest} would be the fewest possible")
# Of 1024, the last pack is far from full, and there are few others. In 256, a long order often leaves too little room.

# %% [markdown]
# ## What you have learned
#
# - Rows become tokens and labels; -100 marks what is read but not learned.
# - A chat template writes roles, structure and stopping into the text. Train with the one that is used later.
# - A base model gets a template, and the tokens for it, from `clone_chat_template`; the rows of new tokens must be
#   trained.
# - A model stops only if training showed it the end token. Mask padding by its place, never by its number.
# - Packing fills rows with whole examples instead of padding. And: look at the masks before you train.
#
# Next: [chapter 5](05_efficient_methods.ipynb), fine-tuning with a fraction of the memory.
