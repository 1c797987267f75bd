# %% [markdown]
# # 1. Why fine-tune?
#
# A language model that was trained on a large part of the internet can write about nearly everything, but it does not
# know *your* task, *your* form and *your* tone. **Fine-tuning** means to go on training a finished model on examples of
# your own until it does.
#
# You will learn
#
# - what a language model does, and what fine-tuning changes in it,
# - the difference between *full* fine-tuning and *parameter-efficient* methods such as LoRA,
# - how much memory each method takes, computed before any weight is loaded,
# - which libraries and places belong to it: models, data sets, transformers, accelerate, peft, tunesmith.
#
# You need Python, and no experience with fine-tuning.

# %%
import json
import logging
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

# What libraries tell each other when they are imported and used; nothing of it concerns us.
warnings.filterwarnings("ignore", message="IProgress not found|`is_gradient_checkpointing`")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from tunesmith import demo_model_path, generate

HUB = False  # True: facebook/opt-350m from the Hugging Face hub; needs the network
MODEL = "facebook/opt-350m" if HUB else str(demo_model_path())  # a name on the hub, or a folder
FOLDER = Path("runs/guide/01")

disable_progress_bar()

# %% [markdown]
# ## What a language model does
#
# It reads a text as a row of **tokens** (pieces of words) and says for every token it knows how likely it comes next.
# That is all. Writing is the repetition of it: take a token, put it behind the text, ask again.

# %%
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
text = "The capital of France is"
with torch.no_grad():
    scores = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
likeliest = scores.softmax(dim=-1).topk(6)
words = [repr(tokenizer.decode([i])) for i in likeliest.indices.tolist()]
for word, probability in zip(words, likeliest.values.tolist(), strict=True):
    print(f"{probability:6.1%}  {word}")

fig, axis = plt.subplots(figsize=(6, 2.6))
axis.barh(words[::-1], likeliest.values.tolist()[::-1])
axis.set(xlabel="probability of the next token", title=text + " ...")
plt.show()

# %% [markdown]
# Where do the probabilities come from? From the **weights**: millions of numbers, set in *pretraining* so that real
# text becomes likely. The demo model has some 135 million of them (others a thousand times as many).
#
# ## Where asking is not enough
#
# Suppose we want e-mails turned into data. We can ask for it, and say in the prompt what we want.

# %%
instruction = "Extract the order as JSON with the keys customer, items, date. Answer with the JSON only."
mail = "Hi, we need 3 blue mugs on 14 March 2026. Thanks, Anna Baker"
if tokenizer.chat_template is None:  # a base model knows no roles: it goes on with a text
    prompt = [{"role": "user", "content": f"{instruction}\n\n{mail}\n\nJSON:"}]
else:
    prompt = [{"role": "system", "content": instruction}, {"role": "user", "content": mail}]
answer = generate(model, tokenizer, [prompt], max_new_tokens=76)[0]  # at most 76 tokens: longer answers are cut off
print(answer)

# %% tags=["claim"]
if not HUB:
    assert answer.index('"customer": {') < answer.index('"items"')
    assert '"date": "3 March 2026\n}' in answer  # the wrong day, and no closing quotation mark
    assert "Anna" not in answer

# %% [markdown]
# That looks like JSON, but look closely. A quotation mark is missing behind the date, so no program can read it. The
# mail says the 14th and the answer the 3rd, `customer` holds a list of mugs, and Anna Baker is not there at all. And
# instead of stopping, the model begins once more. There are three ways on, and it is wise to try them in this order:
#
# | way | what you do | when it is enough |
# | --- | --- | --- |
# | prompting | describe the task better, show examples in the prompt | a large model, a simple form |
# | retrieval (RAG) | put the facts that are needed into the prompt | the model lacks *knowledge* that changes |
# | fine-tuning | train on examples of prompt and answer | the model lacks a *behaviour*: a form, a tone, a skill |
#
# Fine-tuning makes a small model good at one thing, so that it needs no long prompt and no large machine. In chapter 3
# you will see that happen. Training on pairs of prompt and answer is called **supervised fine-tuning**, SFT.
#
# ## What a step of training keeps in memory
#
# A step of training computes the **loss** (how wrong the model is), then for each weight the **gradient** (in which
# direction to move it), then moves it. The usual rule for moving, the *optimizer* AdamW, remembers two more numbers for
# each weight. In 32-bit numbers, 4 bytes each, this gives for *full* fine-tuning:

# %%
count = sum(parameter.numel() for parameter in model.parameters())
parts = {"the weights": 4, "the gradients": 4, "optimizer (two numbers)": 8}
for part, size in parts.items():
    print(f"{part:<25} {size:>2} bytes x {count:,} = {size * count / 1e6:7,.0f} MB")
print(f"{'together':<25} {16:>2} bytes x {count:,} = {16 * count / 1e6:7,.0f} MB")

# %% [markdown]
# Sixteen bytes a weight, before a single example is looked at. A model of 7 billion weights needs 112 GB that way, more
# than any single graphics card at home.
#
# ## Parameter-efficient fine-tuning
#
# **Parameter-efficient** methods leave the weights as they are (*frozen*) and train a few new ones beside them. The
# best known is **LoRA**: next to a large matrix of the model come two narrow ones whose product is added to it. Only
# these get gradients and optimizer numbers. How few are they?

# %%
adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
print(f"trained: {trained:,} weights beside {count:,} frozen ones, that is {trained / count:.1%}")
print(f"gradients and optimizer: {12 * trained / 1e6:.0f} MB instead of {12 * count / 1e6:,.0f} MB")

# %% [markdown]
# The frozen weights can be made smaller still. **Quantization** stores each of them in 8 or 4 bits instead of 32. LoRA
# on a model in 4 bits is known as *QLoRA*.
#
# ## The memory of each method
#
# Besides the weights there are the **activations**: the results in between that a step keeps, the more the longer and
# the more rows are in the batch. The command `tunesmith plan` counts everything from the model's description alone:
# here for a model of the size "7 B", one row of 1,024 tokens, on an NVIDIA A100 with 40 GB. No weights are loaded: all
# we give are the sizes. In a terminal you just write the command; here Python starts it, and asks for the answer as
# JSON. In the answer, `full` is full fine-tuning, `lora` is LoRA on frozen weights in 16 bits, and `8bit` and `4bit`
# are LoRA on frozen weights in 8 and 4 bits.


# %%
def plan(*settings):
    """What `tunesmith plan` answers. Its exit code 2 means that the run does not fit: that, too, is an answer."""
    command = [sys.executable, "-m", "tunesmith", "plan", *settings, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if not done.stdout:
        done.check_returncode()
    return json.loads(done.stdout)


seven_billion = AutoConfig.for_model(
    "llama",
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)
seven_billion.save_pretrained(FOLDER / "seven_billion")  # config.json, nothing else
RUN = ["--model", str(FOLDER / "seven_billion"), "--gpu", "a100", "--max-length", "1024"]
RUN += ["--per-device-train-batch-size", "1"]
RUN += ["--gradient-checkpointing"]  # recompute activations instead of keeping them all
planned = plan(*RUN)
methods = planned["methods"]
for method, answer in methods.items():
    print(f"{method:>5}: {answer['total'] / 1e9:6.1f} GB, {'fits' if answer['fits'] else 'does not fit'}")

# %%
PARTS = {
    "weights": "the weights",
    "adapters": "the adapter",
    "gradients": "the gradients",
    "optimizer": "optimizer (two numbers)",
    "activations": "the activations",
    "loss": "what the loss needs",
    "overhead": "libraries, buffers",
}
fig, axis = plt.subplots(figsize=(7, 3.8))
bottom = [0.0] * len(methods)
for part, name in PARTS.items():
    sizes = [answer["memory"][part] / 1e9 for answer in methods.values()]
    axis.bar(list(methods), sizes, bottom=bottom, label=name)
    bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
axis.axhline(planned["device_memory"] / 1e9, color="black", linestyle="--", label="memory of the A100")
axis.set(ylabel="GB at the fullest moment of a step", title="Fine-tuning a model with 7 billion weights")
axis.legend(fontsize="small")
plt.show()

# %% tags=["claim"]
if not HUB:
    left_out = [{**answer["memory"], **dict.fromkeys(PARTS, 0)} for answer in methods.values()]
    assert not any(size for parts in left_out for size in parts.values())  # the bars are as tall as the totals
    total = {method: answer["total"] for method, answer in methods.items()}
    assert max(total, key=total.get) == "full" and not methods["full"]["fits"]
    frozen = {method: methods[method]["memory"]["weights"] for method in ("lora", "8bit", "4bit")}
    assert 0.4 < frozen["8bit"] / frozen["lora"] < 0.6 and 0.2 < frozen["4bit"] / frozen["lora"] < 0.3
    assert 1 / 34 < trained / count < 1 / 25  # "about one weight in thirty"
    assert 130e6 < count < 140e6
    assert 6.7 < methods["full"]["memory"]["weights"] / 4e9 < 6.8
    assert 100 < methods["full"]["total"] / 1e9 < 112

# %% [markdown]
# The tall bar is full fine-tuning: weights, gradients and optimizer numbers, all of full size. It is a little lower
# than the 112 GB from above, because "7 B" is a rounded name: this model has 6.7 billion weights. LoRA leaves the
# frozen weights (in 16 bits) and little else; with 8 and 4 bits these take about half of that, and about a quarter. A
# part that is missing in a bar is empty at that moment: the bars show the *fullest* moment of a step. The dashed line
# lies a little above 40, because the makers of cards count 1,024 x 1,024 x 1,024 bytes as a GB, and we count a billion.
#
# Full fine-tuning still has its place: for small models, for large changes (a new language, a new domain), and where
# memory is no question. For everything else, begin with LoRA.
#
# ## Who does what
#
# | | what it is | where |
# | --- | --- | --- |
# | models | weights, tokenizer and description | a folder, or a name on the Hugging Face **hub** |
# | data sets | rows of examples | files of your own, or the hub, through `datasets` |
# | `transformers` | the models as Python code, and the training loop | |
# | `accelerate` | the same loop on a CPU, a GPU, or many | |
# | `peft` | LoRA and the other parameter-efficient methods | |
# | `tunesmith` | from rows to the right supervised tokens, batches without padding, checks, plans, reports | |
#
# All of them work together in this guide, in these versions:

# %%
for name in ("torch", "transformers", "datasets", "accelerate", "peft", "tunesmith"):
    print(f"{name:<13} {version(name)}")

# %% [markdown]
# ## Try it yourself
#
# **1.** What comes next depends on the words before it. Which token is likeliest after "The capital of Italy is"?

# %%
with torch.no_grad():  # the adapter is still untrained, and an untrained one changes nothing
    scores = model(**tokenizer("The capital of Italy is", return_tensors="pt")).logits[0, -1]
print(repr(tokenizer.decode([scores.argmax().item()])))

# %% [markdown]
# **2.** Does a LoRA of four times the rank (`r=64`) take four times the memory? Guess, then plan it.

# %%
wider = plan(*RUN, "--lora", "r=64,alpha=128", "--method", "lora")["methods"]["lora"]
for rank, answer in ((16, methods["lora"]), (64, wider)):
    own = answer["memory"]["adapters"] + answer["memory"]["optimizer"]
    print(f"r={rank}: {own / 1e9:.2f} GB for the adapter and its optimizer, {answer['total'] / 1e9:.1f} GB together")

# %% [markdown]
# **3.** Which of these graphics cards have memory enough for the 7 B model, by each method?

# %%
CARDS = {"T4": 16, "RTX 3090": 24, "RTX 4090": 24, "L4": 24, "A100": 40, "H100": 80}  # GB
for method, answer in methods.items():
    enough = [name for name, memory in CARDS.items() if 0.95 * memory * 1e9 >= answer["total"]]  # the driver needs some
    print(f"{method:>5}: {', '.join(enough) or 'none'}")

# %% [markdown]
# **4.** And how many bytes does full fine-tuning of *your* favourite model take, if it has 1.5 billion weights?

# %%
print(f"{16 * 1.5e9 / 1e9:.0f} GB, and the activations on top")

# %% [markdown]
# ## What you have learned
#
# - A language model gives probabilities for the next token; fine-tuning moves its weights so that *your* answers become
#   likely.
# - Try prompting and retrieval first; fine-tune when a behaviour is missing.
# - Full fine-tuning takes about 16 bytes a weight and the activations. LoRA trains about one weight in thirty of the
#   demo model, and 8 or 4 bits make the frozen ones smaller.
# - `tunesmith plan` tells the memory before you load anything.
#
# Next: **chapter 2** sets up your machine.
