# %% [markdown]
# # 7. Several processes and machines
#
# One graphics card is soon too slow, or too small. Then several train together. This chapter needs none: it starts
# processes that share the processor of this machine, which is enough to see what they do and whether it is right.
#
# You will learn
#
# - what several processes share out, and what each of them keeps,
# - why two processes must train the same as one, and what goes wrong where they don't,
# - how to start a run in several processes and on several machines,
# - how to share out the weights of a model that is too large for one card (FSDP),
# - how to go on with another number of processes, and what all this costs.

# %%
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

# What libraries tell each other when they are imported and used; nothing of it concerns us.
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

FOLDER = Path("runs/guide/07")
shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir(parents=True)

# %% [markdown]
# ## Two ways to share the work
#
# In **data parallel** training (DDP in PyTorch), every process has the whole model and takes a part of the rows of each
# step. Each computes the gradient of its rows. Then they add their gradients up, so that all change their weights in
# the same way, and stay alike. It makes training faster, and saves no memory.
#
# In **fully sharded** training (FSDP), every process keeps only a part of the weights, of the gradients and of the
# optimizer's numbers. Before a layer computes, the processes send each other their parts of it, and forget those of
# others afterwards. It saves memory, and costs messages. The rows are shared out as before. `--shard full` does this.
# `--shard grad` is in between: gradients and optimizer numbers are shared out, and each process has all weights while
# a step computes.
#
# ## A mean of means is not the mean
#
# The loss of a step is the mean over its trained tokens. Let two processes have one row each, of which one has ten
# times as many tokens. If each takes the mean of its own tokens, and the two means are averaged, what comes out?

# %%
losses = [torch.full((100,), 1.0), torch.full((10,), 3.0)]  # of each token, in two processes
means = torch.stack([each.mean() for each in losses])
print(f"mean of the two means: {means.mean():.3f}")
print(f"mean of all tokens:    {torch.cat(losses).mean():.3f}")

# %% [markdown]
# The tokens of the short row count ten times as much as those of the long one. One process with both rows would have
# trained otherwise, and whoever adds a second card gets another model without having changed a setting. Libraries had
# this mistake for years. tunesmith divides by the trained tokens of all processes, and deals out each row exactly
# once. So here two processes train what one does, and we can check it.
#
# ## The same run, in one process and in two
#
# Twelve rows of arithmetic, and a **recipe**: a file with the settings of a run, for `tunesmith train`. The optimizer
# is `sgd`, because we want to compare. AdamW divides each gradient by its own size: where a gradient is nearly 0, even
# a difference by rounding becomes a whole step.

# %%
rows = [
    {
        "messages": [
            {"role": "user", "content": f"What is {a} + {b}?"},
            {"role": "assistant", "content": f"{a} + {b} = {a + b}." + " I counted it twice." * (a % 3)},
        ]
    }
    for a in range(1, 5)
    for b in range(3)
]
data = FOLDER / "rows.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

RECIPE = f"""\
model: demo
data: {data}
lora: r=8
optim: sgd
learning_rate: 0.5
max_steps: 4
save_steps: 2
per_device_train_batch_size: 6
precision: fp32
report_to: none
logging_steps: 1
"""
recipe = FOLDER / "recipe.yaml"
recipe.write_text(RECIPE, encoding="utf-8")


def start(name, *options):
    """Start `tunesmith train` as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "train", str(recipe), "--output", str(FOLDER / name), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def train(name, *options):
    """Run it to its end, and return the folder of the run."""
    run = start(name, *options)
    said, _ = run.communicate()
    if run.returncode:
        raise RuntimeError(said)
    return FOLDER / name


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def difference(one, other):
    """The largest difference between two adapters, and the largest number in them."""
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a), max(t.abs().max().item() for t in a.values())


one = train("one")
two = train("two", "--processes", "2", "--per-device-train-batch-size", "3")
apart, largest = difference(one, two)
print(f"largest difference of a weight: {apart:.0e}; the largest weight is {largest:.2f}")

# %% tags=["claim"]
assert apart < 1e-4 * largest, (apart, largest)

# %% [markdown]
# The same adapter, but for rounding: sums in another order differ in the last digits. Two processes with three rows
# each make steps of six rows, like one process with six. That is what must stay the same when you change the number of
# processes: `per_device_train_batch_size` x `gradient_accumulation_steps` x processes. If it grows, a step is another
# step, and the learning rate wants another look.
#
# What did each process do? The first one writes the files of a run, and also what the others did.

# %%
for line in (two / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
    entry = json.loads(line)
    if "processes" in entry:
        for number, process in enumerate(entry["processes"]):
            speed, waited, memory = process["tokens_per_second"], process["waited"], process["memory_mb"]
            print(f"process {number}: {speed:.0f} tokens a second, waited {waited:.0%} of the time, {memory:,.0f} MB")
        break

# %% [markdown]
# This is the first step, in which the first process also measures which ways to compute are the faster ones here, and
# the other waits for it. Later, a process that waits has less to do than the other, or a faster machine. So tunesmith
# deals rows out by their tokens, not only by their number.
#
# ## Share out the weights
#
# With `--shard full`, each of the two processes keeps half of the model.

# %%
sharded = train("sharded", "--processes", "2", "--per-device-train-batch-size", "3", "--shard", "full")
apart, largest = difference(one, sharded)
print(f"largest difference from one process: {apart:.0e}; the largest weight is {largest:.2f}")

# %% tags=["claim"]
assert apart < 1e-4 * largest, (apart, largest)

# %% [markdown]
# Again the same. The adapter was gathered from both and saved as a whole: whoever loads it doesn't see how many
# processes have made it.
#
# ## Go on with another number of processes
#
# A checkpoint belongs to the run, not to its processes. We go on from step 2 of the run of one process, in two.

# %%
shutil.copytree(one / "checkpoint-2", FOLDER / "continued" / "checkpoint-2")
shutil.copy(one / "run.json", FOLDER / "continued")
checkpoint = str(FOLDER / "continued" / "checkpoint-2")
continued = train(
    "continued", "--processes", "2", "--per-device-train-batch-size", "3", "--resume-from-checkpoint", checkpoint
)
apart, largest = difference(one, continued)
print(f"largest difference from the run that never stopped: {apart:.0e}; the largest weight is {largest:.2f}")

# %% tags=["claim"]
assert apart < 1e-4 * largest, (apart, largest)

# %% [markdown]
# ## Two machines
#
# On two machines you start the same command on each, with its number and the address of the first. Here both are this
# machine, one process each, and the address is `127.0.0.1`: that is how to try it before you rent anything.

# %%
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"

several = ("--nodes", "2", "--rendezvous", address, "--processes", "1", "--per-device-train-batch-size", "3")
machines = [start("machines", "--node-rank", str(number), *several) for number in range(2)]
for machine in machines:
    machine.communicate()
print("exit codes:", [machine.returncode for machine in machines])
apart, largest = difference(one, FOLDER / "machines")
print(f"largest difference from one process: {apart:.0e}; the largest weight is {largest:.2f}")

# %% tags=["claim"]
assert apart < 1e-4 * largest, (apart, largest)

# %% [markdown]
# Real machines need the same versions of the libraries and the same data. With `--shard`, they also need a disk that
# both can write to. If a process fails, the run ends on all machines within a minute, with its error. A machine that
# loses its power or network is noticed when a connection times out, after up to 30 minutes. On one machine,
# `--max-restarts 3` starts the processes again from the newest checkpoint.
#
# ## Before the bill
#
# Will a model of 8 billion weights fit on eight cards with 80 GB each? `tunesmith plan` reads the description of the
# model, and loads nothing. We write down that of an 8B Llama.

# %%
LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
).save_pretrained(FOLDER / "llama-8b")


def asked(shard):
    """Start `tunesmith plan`."""
    options = ("--method", "full", "--gpu", "h100", "--processes", "8", "--shard", shard, "--gradient-checkpointing")
    command = [sys.executable, "-m", "tunesmith", "plan", "--json", "--model", str(FOLDER / "llama-8b"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answered(plan):
    """GB of each process, and GB that each sends in a step, by number of processes."""
    scales = json.loads(plan.communicate()[0])["processes"]["scales"]
    return {scale["processes"]: (scale["memory"] / 1e9, sum(scale["sent"].values()) / 1e9) for scale in scales}


asked_plans = {shard: asked(shard) for shard in ("none", "grad", "full")}  # all three at once
plans = {shard: answered(plan) for shard, plan in asked_plans.items()}
for shard, scales in plans.items():
    for processes, (memory, sent) in scales.items():
        too_large = "" if memory < 80 else ", too large"
        print(
            f"shard {shard:4} {processes:3} processes: each sends {sent:2.0f} GB a step, has {memory:.0f} GB{too_large}"
        )

figure, axis = plt.subplots(figsize=(8, 3.5))
for number, (shard, scales) in enumerate(plans.items()):
    places = [place + 0.25 * number for place in range(len(scales))]
    axis.bar(places, [memory for memory, _ in scales.values()], width=0.25, label=f"shard: {shard}")
axis.axhline(80, color="black", linestyle="--", label="80 GB")
axis.set_xticks([place + 0.25 for place in range(len(plans["full"]))], list(plans["full"]))
axis.set(xlabel="processes", ylabel="GB each")
axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=4)
plt.show()

# %% tags=["claim"]
assert plans["none"][8][0] > 80 > plans["full"][8][0], plans
assert abs(plans["none"][8][0] - plans["none"][512][0]) < 1, plans

# %% [markdown]
# Without sharding, each card needs all of it, however many there are: 8 or 512 of them don't make the model fit. With
# `grad` or `full`, eight cards are enough; `full` takes less on each. These sizes are computed, not measured. So far,
# the project has run several processes on CPUs only. Before you rent a cluster, run ten steps on two cards.
#
# ## Which one to take
#
# | the model | take |
# | --- | --- |
# | fits on one card, and that is fast enough | one process: nothing is simpler |
# | fits on one card, but takes too long | `--processes N` |
# | does not fit with its optimizer | LoRA first; else `--shard full` |
# | does not fit even with LoRA | `--shard full` with LoRA, or fewer bits on one card |
#
# ## Try it yourself
#
# 1. Two processes with two rows each, and `gradient_accumulation_steps: 3`: how many rows has a step? Which setting of
#    one process trains the same?
# 2. How much does each card send in a step at 64 processes, with `none`, `grad` and `full`? Why is it as much with
#    `full`, which sends weights, as with `none`, which sends none?
# 3. In the example with the two means: how must they be weighted, so that their mean is that of all tokens?

# %%
# 1
print("rows of a step:", 2 * 3 * 2)
print("one process: per_device_train_batch_size 4, gradient_accumulation_steps 3, or 12 and 1")

# %%
# 2
for shard, scales in plans.items():
    print(f"{shard}: {scales[64][1]:.0f} GB")

# %% tags=["claim"]
assert plans["grad"][64][1] < plans["none"][64][1]
assert abs(plans["full"][64][1] - plans["none"][64][1]) < 0.05 * plans["none"][64][1], plans

# %% [markdown]
# With `none`, gradients are sent twice, in 32 bits: to add them up, and to hand the sum to all. With `grad` and `full`
# they are sent once, because each process needs the sum of its own part only. The weights, in 16 bits, are sent once
# with `grad`, and twice with `full`: for the forward pass and for the backward pass. Together that is as much.

# %%
# 3
tokens = torch.tensor([len(each) for each in losses], dtype=torch.float32)
print(f"weighted by their tokens: {(means * tokens).sum() / tokens.sum():.3f}")

# %% [markdown]
# ## What you have learned
#
# - Data parallel training shares out rows, sharded training also the model.
# - Several processes must train what one does. Keep the rows of a step, and check it with a few steps.
# - One machine takes `--processes` and `--shard`; several also take `--nodes`, `--node-rank` and `--rendezvous`. A
#   checkpoint goes on with any number of processes.
# - `tunesmith plan` says what fits before anything is rented.
#
# You have reached the end of the guide. Take your own data, look at it, and begin.
