# %% [markdown]
# # 5. Efficient methods: LoRA, fewer bits, no padding
#
# **You will learn**
#
# - the idea of LoRA, each of its settings, and how to choose them with a small sweep;
# - how to find the names of a model's layers;
# - how to fine-tune on conversations with LoRA, and how to save, load and merge the result;
# - what 8 and 4 bits save;
# - attention without padding, and FlashAttention;
# - how to share your model on a hub, load it from there, and hand it to other programs.
#
# Fine-tuning every weight of a model needs memory for the weight, for its *gradient* (the direction in which to
# change it) and for two numbers that the optimizer keeps: four numbers for each weight. This chapter is about
# spending less.

# %%
from pathlib import Path

from tunesmith import practice_hub

HUB = False  # True: a model from the Hugging Face hub, and a push to your own account there
MODEL = "Qwen/Qwen2-0.5B" if HUB else "demo"
FOLDER = Path("runs/guide/05")
if not HUB:
    # A hub on this machine, to practise on. It comes first: the hub's client reads on import where its hub is.
    practice_hub(FOLDER / "hub")

# %%
import json
import logging
import random
import shutil
import statistics
import subprocess
import sys
import warnings
from collections import Counter

# What libraries tell each other when they are imported and used; nothing of it concerns us.
warnings.filterwarnings("ignore", message="IProgress not found|`is_gradient_checkpointing`")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from tunesmith import SFTConfig, SFTTrainer, TunesmithError, demo_model_path, generate, load_run

WEIGHTS = "Qwen/Qwen2-0.5B" if HUB else str(demo_model_path())  # the same model, as transformers wants it named

disable_progress_bar()

# %% [markdown]
# ## The idea of LoRA
#
# A layer of a model multiplies its input with a matrix of weights $W$. Fine-tuning adds a change to it: $W + \Delta
# W$. LoRA ([Hu et al., 2021](https://arxiv.org/abs/2106.09685)) leaves $W$ as it is and learns the change as a
# product of two thin matrices, $\Delta W = \frac{\alpha}{r} B A$. Their thin side $r$ is the **rank**.

# %%
torch.manual_seed(0)
size, r, alpha = 576, 8, 16
W = torch.randn(size, size)
A = torch.randn(r, size) / size**0.5  # starts random
B = torch.zeros(size, r)  # starts at zero, so that the model starts unchanged
x = torch.randn(size)
print("unchanged at the start:", torch.equal(W @ x + alpha / r * (B @ (A @ x)), W @ x))
print(f"numbers to train: {W.numel():,} in W, {A.numel() + B.numel():,} in A and B")
B = torch.randn(size, r)
print("rank of the change:", int(torch.linalg.matrix_rank(B @ A)))

# %% [markdown]
# ## Which layers are there?
#
# LoRA sits beside certain layers, `target_modules`, and you name them. So first look at the names. On the *meta*
# device a model has shapes and no memory, which is enough to count.


# %%
CONFIG = AutoConfig.from_pretrained(WEIGHTS)


def skeleton(config=CONFIG):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_layers(model):
    return Counter(
        (name.rsplit(".", 1)[-1], tuple(module.weight.shape))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    )


linear = linear_layers(skeleton())
for (name, shape), count in linear.items():
    print(f"{count:3} x {name:10} {shape}")

print("\nThe names in other families:")
for family, published in (("opt", "facebook/opt-350m"), ("gpt_neo", "EleutherAI/gpt-neo-125m")):
    config = (
        AutoConfig.from_pretrained(published) if HUB else AutoConfig.for_model(family)
    )  # of the size that the class has in mind
    print(f"{family:8}", ", ".join(sorted({name for name, _ in linear_layers(skeleton(config))})))

# %% [markdown]
# `q_proj`, `k_proj`, `v_proj` and `o_proj` belong to attention, where a token looks at those before it; `gate_proj`,
# `up_proj` and `down_proj` to the feed-forward part, which works on each token alone. `lm_head` turns the result into
# a score for every token of the vocabulary. `"all-linear"` means all but the head.
#
# The names belong to the family. OPT and GPT-Neo write `out_proj` where the demo model has `o_proj`, and their
# feed-forward parts are `fc1` and `fc2`, or `c_fc` and `c_proj`. `"all-linear"` saves you from knowing them.
#
# What is trained with which settings?

# %%
choices = {
    "r=2, q_proj v_proj": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "r=16, q_proj v_proj": LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "r=2, all-linear": LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "r=16, all-linear": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    "r=16, all-linear, lora_alpha=8": LoraConfig(
        r=16, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "r=16, all-linear, lora_dropout=0.1": LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "r=16, all-linear, and the norms": LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["input_layernorm"], task_type="CAUSAL_LM"
    ),
    "r=16, all-linear, and the embedding": LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,  # the head of this model is its embedding, and shall stay so
        task_type="CAUSAL_LM",
    ),
}
trained = {}
for name, lora in choices.items():
    trained[name], total = get_peft_model(skeleton(), lora).get_nb_trainable_parameters()
    print(f"{trained[name]:10,} of {total:,} ({trained[name] / total:.2%})  {name}")

# %% [markdown]
# | setting | what it says | to start with |
# | --- | --- | --- |
# | `r` | the rank: how much the change can express | 8 to 32 |
# | `lora_alpha` | the scale: the change is multiplied by `lora_alpha / r` | `r` or `2 r` |
# | `lora_dropout` | the share of inputs left out at random while training, against learning by heart | 0 to 0.1 |
# | `target_modules` | which layers get A and B | `"all-linear"` |
# | `modules_to_save` | layers that are trained whole, and saved with the adapter | none |
# | `bias` | which biases are trained, too: `"none"`, `"lora_only"`, `"all"` | `"none"` |
# | `task_type` | what kind of model it is; a causal language model writes one token after the other | `"CAUSAL_LM"` |
#
# `modules_to_save` is expensive where it names the embedding: all of its numbers are trained. For a few new tokens
# there is a cheaper way, which trains their rows alone (`trainable_token_indices`, chapter 4). `bias` matters for
# families whose layers have biases, such as OPT; the demo model has none, and with anything but `"none"` switching the
# adapter off no longer gives back the model that you started from.
#
# A wrong name does not pass silently:

# %%
example = [{"prompt": "2 + 2 =", "completion": " 4"}]
config = SFTConfig(output_dir=str(FOLDER / "look"), max_steps=1, precision="fp32", report_to="none")
try:
    SFTTrainer(MODEL, config, train_dataset=example, peft_config=LoraConfig(target_modules=["query"]))
except TunesmithError as error:
    print(error)
else:
    raise AssertionError("this should have been refused")

# %% [markdown]
# ## A small sweep
#
# A *sweep* trains with several settings and compares. Our task: a short request in, JSON out. The rows for evaluation
# have other names and things than those for training, so that learning by heart doesn't help. Each setting is trained
# with three seeds: a difference that is smaller than what chance makes is none.

# %%
WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}
dice = random.Random(0)


def requests(count, names, things):
    for _ in range(count):
        name, thing, number = dice.choice(names), dice.choice(things), dice.choice(list(WORDS))
        ask = dice.choice(["{who} needs {number} {what}.", "Please send {number} {what} to {who}."])
        answer = json.dumps({"to": name, "item": thing, "count": number}, separators=(",", ":"))
        yield {
            "messages": [
                {"role": "system", "content": "Answer in JSON."},
                {"role": "user", "content": ask.format(who=name, what=thing, number=WORDS[number])},
                {"role": "assistant", "content": answer},
            ]
        }


NAMES = ["Anna", "Tom", "Mei", "Omar", "Lena", "Yuki", "Paul", "Rosa", "Finn", "Ines"]
THINGS = ["mugs", "lamps", "chairs", "books", "pens", "boxes", "rugs", "forks", "shirts", "bags", "hats", "bells"]
train = list(requests(128, NAMES, THINGS))
test = list(requests(8, ["Hugo", "Wei", "Sara"], ["plates", "towels", "clocks"]))
print(test[0]["messages"])


# %%
def fine_tune(lora, steps=6, **settings):
    how = {
        "output_dir": str(FOLDER / "run"),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,  # by the rule of chapter 3
        "train_on": "assistant",
        "precision": "fp32",
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "self_test": "off",
    }
    quantization = settings.pop("quantization_config", None)
    trainer = SFTTrainer(
        MODEL,
        SFTConfig(**how | settings),
        train_dataset=train,
        eval_dataset=test,
        peft_config=lora,
        quantization_config=quantization,
    )
    trainer.remove_callback(PrinterCallback)  # we draw curves; this would print each step, too
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measured(lora, **settings):
    """The held-out loss after some steps, and the losses of these steps."""
    trainer = fine_tune(lora, **settings)
    return trainer.evaluate()["eval_loss"], losses(trainer)


SEEDS = (1, 2, 3)
figure, axis = plt.subplots(figsize=(7, 4))
sweep = ["r=2, q_proj v_proj", "r=16, q_proj v_proj"]
sweep += ["r=16, all-linear", "r=16, all-linear, lora_alpha=8", "r=16, all-linear, lora_dropout=0.1"]
held_out = {}
for name in sweep:
    runs = [measured(choices[name], seed=seed) for seed in SEEDS]
    held_out[name] = [end for end, _ in runs]
    mean, low, high = statistics.mean(held_out[name]), min(held_out[name]), max(held_out[name])
    print(f"{name:34} {trained[name]:10,} trained, held-out loss {mean:.3f} (from {low:.3f} to {high:.3f})")
    curves = [curve for _, curve in runs]
    axis.plot([statistics.mean(step) for step in zip(*curves, strict=True)], label=f"{name} ({trained[name]:,})")
axis.set(xlabel="step", ylabel="loss, mean of three seeds", title="the same 6 steps")
axis.legend(fontsize="small")
plt.show()

# %% tags=["claim"]
if not HUB:
    few, more, all_layers, quiet, dropout = (held_out[name] for name in sweep)
    assert max(all_layers) < min(more) and max(all_layers) < min(quiet), held_out
    assert statistics.mean(more) < statistics.mean(few), held_out
    assert min(dropout) < max(all_layers) and min(all_layers) < max(dropout), held_out

# %% [markdown]
# The **loss** says how surprised the model is by the right answer; lower is better. With every seed, all layers learn
# faster here than two of each block, and a smaller `lora_alpha`, which turns the change down, leads less far in the
# same steps. More layers and a higher rank cost more memory and time; a larger `lora_alpha` costs nothing. On little
# data, a large change can learn the rows by heart. The ranges of dropout and of no dropout overlap: so short a run
# can't tell them apart. It is meant for long ones that learn by heart. Whatever you try, the held-out loss decides,
# and six steps only show how fast a setting begins.
#
# ## LoRA on conversations
#
# Our rows *are* conversations, and `train_on="assistant"` trains on the answers. Now a few more steps with the best
# settings, and a look at the answers, before and after; spaces don't count.

# %%
prompts = [row["messages"][:-1] for row in test]
expected = [row["messages"][-1]["content"] for row in test]


def right(model, tokenizer):
    answers = generate(model, tokenizer, prompts, max_new_tokens=32)
    return answers, sum(answer.replace(" ", "") == wanted for answer, wanted in zip(answers, expected, strict=True))


def load_base(**how):
    return AutoModelForCausalLM.from_pretrained(WEIGHTS, **{"dtype": torch.float32, "device_map": "auto"} | how)


tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
before, count = right(load_base(), tokenizer)
print(f"before: {count} of {len(test)} right, such as {before[0]!r}")
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
orders_trainer = trainer = fine_tune(lora, steps=32, output_dir=str(FOLDER / "orders-lora"))
after, count = right(trainer.model, tokenizer)
print(f"after:  {count} of {len(test)} right, such as {after[0]!r}")

# %% tags=["claim"]
if not HUB:
    assert all(answer.startswith('{"to":"') and answer.endswith("}") for answer in after), after

# %% [markdown]
# ## Save, load, merge
#
# What is saved is the **adapter**: A and B, and the name of the model that they belong to.

# %%
trainer.save_model()
run = Path(trainer.args.output_dir)
for path in sorted(run.glob("adapter*")):
    print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")

loaded, tokenizer = load_run(str(run))
loaded_the_same = right(loaded, tokenizer)[0] == after
print("the loaded model answers the same:", loaded_the_same)

# %% tags=["claim"]
if not HUB:
    assert loaded_the_same

# %% [markdown]
# **Merging** adds $\frac{\alpha}{r} B A$ to the weights. The result is an ordinary model, which needs no LoRA to run,
# and is as large as the base model. There are two ways to it:
#
# - `merge_and_unload()` of `peft` merges the model that is in memory, and you save it.
# - `trainer.merge_and_save(folder)`, on the command line `tunesmith merge RUN --output DIR`, reads the base model's
#   files one at a time, so that it needs little memory; loads what it wrote; and compares it with the adapter. Use it
#   for what you pass on.

# %%
by_peft = AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32).merge_and_unload()
merged_the_same = right(by_peft, tokenizer)[0] == after
print("merged in memory, it answers the same:", merged_the_same)

shutil.rmtree(FOLDER / "merged", ignore_errors=True)  # of an earlier run
report = trainer.merge_and_save(FOLDER / "merged")
print(f"{report.layers} layers merged, {report.size / 1e6:,.0f} MB")
print(report.drift)
on_disk = AutoModelForCausalLM.from_pretrained(FOLDER / "merged", dtype=torch.float32)
difference = max(
    float((one - other).detach().abs().max())
    for one, other in zip(by_peft.parameters(), on_disk.parameters(), strict=True)
)
print(f"largest difference of a weight between the two ways: {difference:.1e}")

# %% tags=["claim"]
if not HUB:
    assert difference < 1e-5 and merged_the_same

# %% [markdown]
# Merge at the end, and keep the adapter: it is small, can be trained further and switched off.

# %% [markdown]
# ## Fewer bits
#
# The base model's weights don't change in LoRA. So they may be kept *quantized*: rounded to 8 or 4 bits each, instead
# of 32. With the adapters in full precision beside them, this is the way to tune a model that is large for your
# memory ([QLoRA](https://arxiv.org/abs/2305.14314) does it with 4 bits).

# %%
# It would say at each product on a CPU that inputs are rounded to 16 bits.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

EIGHT = BitsAndBytesConfig(load_in_8bit=True)  # old notebooks write from_pretrained(..., load_in_8bit=True) instead
FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
memory = {
    "32 bits": load_base().get_memory_footprint(),
    "16 bits": load_base(dtype=torch.bfloat16).get_memory_footprint(),
}
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
learned = {"32 bits": held_out["r=16, all-linear"][:2]}  # from the sweep
for name, bits in (("8 bits", EIGHT), ("4 bits", FOUR)):
    ends = []
    for seed in SEEDS[:2]:
        trainer = fine_tune(lora, steps=6, seed=seed, quantization_config=bits)
        ends.append(trainer.evaluate()["eval_loss"])
    learned[name] = ends
    memory[name] = trainer.model.unload().get_memory_footprint()
for name, ends in learned.items():
    print(f"{name}: held-out loss after 6 steps {ends[0]:.2f} and {ends[1]:.2f}")
start, _ = measured(lora, steps=1, learning_rate=1e-12)
print(f"before: {start:.2f}")

plt.figure(figsize=(6, 3))
plt.barh(list(memory), [size / 1e6 for size in memory.values()])
plt.xlabel("weights of the base model, MB")
plt.show()
for name, size in memory.items():
    print(f"{name}: {size / 1e6:,.0f} MB")

# %% tags=["claim"]
if not HUB:
    assert all(max(ends) < 0.7 * start for ends in learned.values()), (start, learned)
    assert memory["4 bits"] > memory["32 bits"] / 8 * 1.5, memory

# %% [markdown]
# With both, the loss falls as it does with 32 bits, with both seeds. The memory is not an eighth at 4 bits: the
# embedding and the head are not quantized, and in a small model they are a large part. In a model of 7 billion weights
# they are a few percent. And on a CPU quantization costs time; its home is a GPU.
#
# In notebooks of some years ago you find `from_pretrained(..., load_in_8bit=True)`. `transformers` takes this no
# longer: write `quantization_config=BitsAndBytesConfig(load_in_8bit=True)` there, or `quantize: 8bit` in a recipe.
#
# `tunesmith plan` says how much memory a whole run takes, with activations, gradients and libraries (chapter 1).
#
# ## Attention without padding
#
# In attention each token looks at those before it, and the cost grows with the *square* of the length. Padding wastes
# it. tunesmith puts the examples of a batch side by side and keeps attention inside each. `padding_free=False` pads,
# for comparison:

# %%
long_row = {"messages": [*train[0]["messages"][:1], *(m for row in train[:6] for m in row["messages"][1:])]}
long_and_short = [row for short in train[:4] for row in (long_row, short)]
EVALUATED = {"with padding": False, "without padding": True}
loss, seconds = {}, {name: [] for name in EVALUATED}
evaluators = {}
for name, padding_free in EVALUATED.items():
    config = SFTConfig(
        output_dir=str(FOLDER / "look"),
        precision="fp32",
        report_to="none",
        padding_free=padding_free,
        share_prefix="off",  # else the long rows, which begin alike, would be computed together
        disable_tqdm=True,
    )
    evaluators[name] = SFTTrainer(MODEL, config, train_dataset=train, eval_dataset=long_and_short)
    evaluators[name].remove_callback(PrinterCallback)
for turn in range(6):
    for name in list(EVALUATED) if turn % 2 else reversed(EVALUATED):  # each is first as often as the other
        result = evaluators[name].evaluate()
        loss[name] = result["eval_loss"]
        if turn:  # the first turn warms up
            seconds[name].append(result["eval_runtime"])
for name, times in seconds.items():
    middle = statistics.median(times)
    print(f"{name:16} loss {loss[name]:.5f}, {middle:.2f} s (from {min(times):.2f} to {max(times):.2f})")
ratios = [one / other for one, other in zip(seconds["with padding"], seconds["without padding"], strict=True)]
print(f"padding takes {statistics.median(ratios):.1f} times as long (from {min(ratios):.1f} to {max(ratios):.1f})")

# %% tags=["claim"]
if not HUB:
    assert abs(loss["with padding"] - loss["without padding"]) < 1e-4, loss

# %% [markdown]
# The same loss, in less time: five measurements each, in turns, so that a slow minute of the machine hits both. The
# middle one counts; on a busy machine a single one may say otherwise.
#
# On GPUs, **FlashAttention** is often named for this. What it is at heart is *tiling*: attention computed in small
# blocks that stay in the GPU's fast memory, so that the square table of scores is never written. Rows of various
# lengths in one row, without padding, are a feature that its kernels also have. tunesmith needs neither it nor a GPU to
# leave out the padding: it uses PyTorch's own attention. Where FlashAttention is installed,
# `model_init_kwargs={"attn_implementation": "flash_attention_2"}` chooses it.
#
# ## Share it: push to the hub
#
# A *hub* keeps models under `owner/name`. Without the internet, this notebook talks to a hub on your own machine,
# through the very same client. With `HUB = True` it goes to your own account (`hf auth login` first), into a *private*
# repository that nobody else sees. Only what a stranger needs is sent, with a *model card* that says what it is.

# %%
pushed = orders_trainer.push_to_hub(private=HUB)  # its name is that of the output folder
api = HfApi()
REPO = f"{api.whoami()['name']}/orders-lora"
print("pushed to", REPO)
for item in pushed.plan.items:
    print(f"{item.size:12,} bytes  {item.path}")

# %% [markdown]
# For everything else on the hub there is `HfApi`: list files, upload one more, make a repository public or delete it.

# %%
api.upload_file(path_or_fileobj=b"How the rows were made: see chapter 5.\n", path_in_repo="NOTES.md", repo_id=REPO)
print(", ".join(sorted(api.list_repo_files(REPO))))

# %% [markdown]
# And somebody else loads it: the base model, then the adapter by its name on the hub.

# %%
downloaded = PeftModel.from_pretrained(load_base(), REPO).eval()
downloaded_the_same = right(downloaded, tokenizer)[0] == after
print("the downloaded model answers the same:", downloaded_the_same)

# %% tags=["claim"]
if not HUB:
    assert downloaded_the_same
    assert "NOTES.md" in api.list_repo_files(REPO)

# %% [markdown]
# ## Hand it over: vLLM, Ollama
#
# The merged folder is a model like any other, so programs that serve models take it as it is. **vLLM** is for many
# users on a GPU:
#
# ```console
# $ vllm serve runs/guide/05/merged
# $ vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --lora-modules orders=runs/guide/05/orders-lora
# ```
#
# The second form keeps one base model in memory for many adapters. **Ollama** and llama.cpp, for a single laptop, read
# *GGUF*, one file with weights and tokenizer. `tunesmith export` writes it, with a *Modelfile* that tells Ollama the
# chat template and where to stop:

# %%
shutil.rmtree(FOLDER / "gguf", ignore_errors=True)  # of an earlier run
command = ["export", str(FOLDER / "merged"), "--output", str(FOLDER / "gguf"), "--quant", "q8_0", "--quiet"]
subprocess.run([sys.executable, "-m", "tunesmith", *command], check=True)
for path in sorted((FOLDER / "gguf").iterdir()):
    print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")
print((FOLDER / "gguf" / "Modelfile").read_text(encoding="utf-8")[:600])

# %% [markdown]
# Where Ollama is installed, this makes a model of the folder, and talks to it:
#
# ```console
# $ cd runs/guide/05/gguf && ollama create orders -f Modelfile && ollama run orders
# ```

# %% [markdown]
# ## Try it yourself
#
# 1. How many numbers are in A and B together with r=64 on all linear layers? Compute it from the shapes, then check
#    with `get_nb_trainable_parameters`.
# 2. `lora_alpha` doubles, `r` stays. What does the change get multiplied with? Show that doubling B does the same.
# 3. How many MB does the adapter have with r=4 in fp32, without training it?
# 4. Which share of the model is its embedding? What would 4 bits save if it were a tenth of that share?

# %%
# 1
counted = sum(64 * sum(shape) * count for (name, shape), count in linear.items() if name != "lm_head")
lora = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
print(f"{counted:,} and {get_peft_model(skeleton(), lora).get_nb_trainable_parameters()[0]:,}")

# %%
# 2
print(f"multiplied with {2 * alpha / r:g} instead of {alpha / r:g}; the same as B doubled:", end=" ")
print(torch.allclose(2 * alpha / r * (B @ A), alpha / r * (2 * B @ A)))

# %%
# 3
lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
print(f"{get_peft_model(skeleton(), lora).get_nb_trainable_parameters()[0] * 4 / 1e6:.1f} MB")  # 4 bytes a number

# %%
# 4
body = skeleton()
embedding, total = body.get_input_embeddings().weight.numel(), body.num_parameters()
for share in (embedding / total, embedding / total / 10):
    left = share + (1 - share) * 4 / 32
    print(f"embedding {share:.1%}: with the rest in 4 bits, {left:.0%} of the 32-bit memory is left")

# %% [markdown]
# ## What you have learned
#
# - LoRA trains two thin matrices beside a frozen one; `r` is what they can say, `lora_alpha / r` how loud.
# - Names come from `named_modules()`, and a wrong one is an error.
# - An adapter is a small file; merging makes it part of the model.
# - 8 and 4 bits shrink the frozen weights; the embeddings stay.
# - Padding is work for nothing, and attention can do without.
# - A push sends what a stranger needs, and the card says what it is. Merged, or as GGUF, other programs take it.
#
# Next: [chapter 6](06_where_next.ipynb), what comes after fine-tuning.
