# %% [markdown]
# # 4. Data: conversations, templates, masks, packing
#
# **You will learn**
#
# - the two shapes that training data has, instructions and conversations, and how to bring your own rows into one of
#   them;
# - what a chat template is, and what goes wrong without one;
# - how a model learns to stop, seen with and without the end token;
# - which tokens are trained on (the *mask*), and how to look at it before you train;
# - what padding costs, and how packing saves it.
#
# A model learns what its data shows, and nothing else. Most of a fine-tuning project is spent here.

# %%
import json
import logging
import os
import subprocess
import sys
import warnings
from itertools import groupby
from pathlib import Path

# What libraries tell each other when they are imported and used; nothing of it concerns us.
warnings.filterwarnings("ignore", message="IProgress not found|`is_gradient_checkpointing`")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import numpy as np
from peft import LoraConfig
from transformers.trainer_callback import PrinterCallback

from tunesmith import SFTConfig, SFTTrainer, TunesmithError, clone_chat_template
from tunesmith.data.prompts import prompt_ids, text_ids
from tunesmith.demo.orders import training_rows
from tunesmith.model.generate import Sampling, generate_from_ids
from tunesmith.model.load import load_model, load_run, load_tokenizer

HUB = False  # True: models from the Hugging Face hub instead of the demo model
MODEL = "Qwen/Qwen2-0.5B" if HUB else "demo"
BASE = "EleutherAI/gpt-neo-125m" if HUB else "demo"
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
brief = Sampling(max_new_tokens=24)
question = messages[0]["content"]
bare, templated = generate_from_ids(
    model, tokenizer, [text_ids(tokenizer, question), prompt_ids(tokenizer, messages)], brief
)
print("without the template:", repr(bare.text))
print("with the template:   ", repr(templated.text))

# %% [markdown]
# The same weights, the same question. Without the template the demo model gives no answer at all: it was trained on
# templated conversations, and bare text is not one. In training it is the same: use another shape there than later in
# use, and the model meets a stranger every time.
#
# What if a tokenizer has no template? Then a conversation can't be made into text, and you are told before any
# training.

# %%
base_tokenizer = load_tokenizer(BASE)
base_tokenizer.chat_template = None  # base models often come like this
base = load_model(BASE)
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
# average word, until training teaches it better. In a training run, `SFTConfig(chat_template_path="chatml")` does all
# of this, and with LoRA (chapter 5) trains just the new rows.
#
# ## Learning to stop
#
# A model stops when it writes its *end token* (`eos_token`, end of sequence). It writes that only if training showed
# it. Let's fine-tune twice on the same answers: once with the end token, once without.

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
def fine_tune(rows, name, **settings):
    config = SFTConfig(
        output_dir=str(FOLDER / name),
        max_steps=10,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        precision="fp32",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(model=MODEL, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.remove_callback(PrinterCallback)  # its numbers are not our subject here
    trainer.train()
    return trainer.model


asked = text_ids(tokenizer, "Q: The capital of France?\nA:")
answers = {}
for name, rows, settings in (("with end", with_end, {}), ("without end", without_end, {"allow_no_eos": True})):
    tuned = fine_tune(rows, name.replace(" ", "_"), **settings)
    answers[name] = generate_from_ids(tuned, tokenizer, [asked], brief)[0]
for name, answer in answers.items():
    print(f"{name}: stopped by itself: {answer.ended}, {answer.text!r}")

# %% [markdown]
# With the end token the model answers and stops. Without it the answer goes on until the limit of 24 tokens cuts it
# off. A model that rambles has usually been trained like the second one: look for the end token in the data first.
#
# Which token ends a text is the tokenizer's `eos_token`; `SFTConfig(eos_token=...)` chooses another of the vocabulary.
# Whatever you choose, whoever generates must stop at the same one. A trained model's folder says which it is.
#
# ## Look at the masks
#
# `tunesmith inspect` shows the tokens of the actual batch, without loading weights. In a terminal it uses colours; here
# it uses the marks that you know.

# %%
orders = training_rows(40)
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
mixed = [row for pair in zip(orders, with_end * 5, strict=True) for row in pair]
as_messages = [
    row
    if "messages" in row
    else {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"].strip()},
        ]
    }
    for row in mixed
]
lengths = [len(example["input_ids"]) for example in prepare(as_messages)]
packs = [example["seq_lengths"] for example in prepare(as_messages, packing=True, max_length=512)]

real = sum(lengths)
batches = [lengths[start : start + 8] for start in range(0, len(lengths), 8)]
padded = sum(8 * max(batch) for batch in batches)
print(f"{len(lengths)} examples, {real:,} tokens")
print(f"in padded batches of 8: {padded:,} tokens computed, {1 - real / padded:.0%} of them padding")
print(f"packed: {len(packs)} rows of at most 512 tokens, filled to {real / (512 * len(packs)):.0%}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4))
for axis, title, rows in ((axes[0], "padded", [[length] for length in lengths[:24]]), (axes[1], "packed", packs)):
    width = max(lengths[:24]) if title == "padded" else 512
    picture = np.full((len(rows), width), np.nan)
    for at, row in enumerate(rows):
        stops = np.cumsum(row)
        for number, (stop, length) in enumerate(zip(stops, row, strict=True)):
            picture[at, stop - length : stop] = number % 2 + at % 2 * 0.2
    axis.imshow(picture, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set(title=f"{title}: white is wasted", xlabel="position", ylabel="row")
plt.show()

# %% [markdown]
# tunesmith computes no padding even without packing: the examples of a batch lie side by side anyway. What packing adds
# is batches of one and the same size, so that a GPU's memory can be filled just right.
#
# ## Try it yourself
#
# 1. Train on the *last* answer of `conversation` only. Which setting is it? Show the mask.
# 2. Write a `formatting_func` for `questions` that returns messages, with a system message that asks for short answers.
# 3. How many tokens does a character need, in Chinese and in English?
# 4. How full are the packs with `max_length` 192, 256 and 1024? Which is worst, and why?
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
for limit in (192, 256, 1024):
    rows = [example["seq_lengths"] for example in prepare(as_messages, packing=True, max_length=limit)]
    filled = sum(map(sum, rows)) / (limit * len(rows))
    fewest = -(-real // limit)  # rounded up
    print(f"max_length {limit}: {len(rows)} packs, filled to {filled:.0%}; {fewest} would be the fewest possible")
# In 192 tokens, what an order leaves free is often too little for anything else. Of 1024, all but the last are full.

# %% [markdown]
# ## What you have learned
#
# - Rows become tokens and labels; -100 marks what is read but not learned.
# - A chat template writes roles, structure and stopping into the text. Train with the one that is used later.
# - A base model gets a template, and the tokens for it, from `clone_chat_template`.
# - A model stops only if training showed it the end token.
# - Packing fills rows with whole examples instead of padding. And: look at the masks before you train.
#
# Next: [chapter 5](05_efficient_methods.ipynb), fine-tuning with a fraction of the memory.
