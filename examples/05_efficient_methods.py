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
# - how to share your model on a hub, and load it from there.
#
# Fine-tuning every weight of a model needs memory for the weight, for its *gradient* (the direction in which to
# change it) and for two numbers that the optimizer keeps: four numbers for each weight. This chapter is about
# spending less.

# %%
import os
import sys
from contextlib import ExitStack
from pathlib import Path

HUB = False  # True: a model from the Hugging Face hub, and a push to your own account there
MODEL = "Qwen/Qwen2-0.5B" if HUB else "demo"
FOLDER = Path("runs/guide/05")
if not HUB:
    # A hub on this machine, from the project's tests. The hub's client reads where it is when it is imported.
    sys.path.insert(0, str(Path.cwd()))
    from tests.ship.hub_server import hub_server

    at_the_end = ExitStack()
    server = at_the_end.enter_context(hub_server(token="hf_onlyforthisnotebook", owners=("learner",)))
    os.environ |= {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_onlyforthisnotebook", "HF_HUB_OFFLINE": "0"}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ |= {"HF_HOME": str((FOLDER / "hub").absolute())}

# %%
import json
import logging
import random
import shutil
import warnings
from collections import Counter

# What libraries tell each other when they are imported and used; nothing of it concerns us.
warnings.filterwarnings("ignore", message="IProgress not found|`is_gradient_checkpointing`")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.trainer_callback import PrinterCallback

from tunesmith import SFTConfig, SFTTrainer, TunesmithError
from tunesmith.demo.orders import training_rows
from tunesmith.model.devices import GPUS
from tunesmith.model.generate import generate
from tunesmith.model.load import load_config, load_model, load_run, load_tokenizer
from tunesmith.plan.memory import METHODS, Run, plan
from tunesmith.settings.lora import lora_config
from tunesmith.ship.hub import PushOptions, in_full, push
from tunesmith.ship.merge import merge

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
CONFIG = load_config(MODEL)


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
    config = load_config(published) if HUB else AutoConfig.for_model(family)  # of the size that the class has in mind
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
# | `task_type` | what kind of model it is; a causal language model writes one token after the other | `"CAUSAL_LM"` |
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
# have other names and things than those for training, so that learning by heart doesn't help.

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


train = list(requests(96, ["Anna", "Tom", "Mei", "Omar", "Lena"], ["mugs", "lamps", "chairs", "books", "pens"]))
test = list(requests(8, ["Hugo", "Wei", "Sara"], ["plates", "towels", "clocks"]))
print(test[0]["messages"])


# %%
def fine_tune(lora, steps=6, **settings):
    config = SFTConfig(
        output_dir=str(FOLDER / "run"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        train_on="assistant",
        precision="fp32",
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(MODEL, config, train_dataset=train, eval_dataset=test, peft_config=lora, **settings)
    trainer.remove_callback(PrinterCallback)  # we draw curves; this would print each step, too
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


figure, axis = plt.subplots(figsize=(7, 4))
sweep = ["r=2, q_proj v_proj", "r=16, q_proj v_proj"]
sweep += ["r=16, all-linear", "r=16, all-linear, lora_alpha=8", "r=16, all-linear, lora_dropout=0.1"]
for name in sweep:
    trainer = fine_tune(choices[name])
    held_out = trainer.evaluate()["eval_loss"]
    print(f"{name:34} {trained[name]:10,} trained, loss on held-out rows {held_out:.3f}")
    axis.plot(losses(trainer), label=f"{name} ({trained[name]:,})")
axis.set(xlabel="step", ylabel="loss", title="the same 6 steps")
axis.legend()
plt.show()

# %% [markdown]
# The **loss** says how surprised the model is by the right answer; lower is better. More layers and more rank learn
# faster here. They also cost more, and on little data a large change can learn it by heart. A smaller `lora_alpha`
# turns the change down, so the same steps lead less far. Dropout changes little in so short a run; it is meant for long
# ones that learn by heart. Whatever you try, the held-out loss decides.
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


tokenizer = load_tokenizer(MODEL)
before, count = right(load_model(MODEL, device_map="auto"), tokenizer)
print(f"before: {count} of {len(test)} right, such as {before[0]!r}")
trainer = fine_tune(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"), steps=20)
after, count = right(trainer.model, tokenizer)
print(f"after:  {count} of {len(test)} right, such as {after[0]!r}")

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
print("the loaded model answers the same:", right(loaded, tokenizer)[0] == after)

# %% [markdown]
# **Merging** adds $\frac{\alpha}{r} B A$ to the weights. The result is an ordinary model, which needs no LoRA to run,
# and is as large as the base model. tunesmith loads both afterwards and compares them. On the command line this is
# `tunesmith merge RUN --output DIR`.

# %%
shutil.rmtree(FOLDER / "merged", ignore_errors=True)  # of an earlier run
report = merge(run, FOLDER / "merged")
print(f"{report.layers} layers merged, {report.size / 1e6:,.0f} MB")
print(report.drift)

# %% [markdown]
# ## Fewer bits
#
# The base model's weights don't change in LoRA. So they may be kept *quantized*: rounded to 8 or 4 bits each, instead
# of 32. With the adapters in full precision beside them, this is the way to tune a model that is large for your
# memory ([QLoRA](https://arxiv.org/abs/2305.14314) does it with 4 bits).

# %%
# It would say at each product on a CPU that inputs are rounded to 16 bits.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

EIGHT = BitsAndBytesConfig(load_in_8bit=True)
FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
memory = {
    "32 bits": load_model(MODEL).get_memory_footprint(),
    "16 bits": load_model(MODEL, dtype=torch.bfloat16).get_memory_footprint(),
}
for name, bits in (("8 bits", EIGHT), ("4 bits", FOUR)):
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    quantized = fine_tune(lora, steps=2, quantization_config=bits)
    memory[name] = quantized.model.unload().get_memory_footprint()
    print(f"{name}: the loss of 2 steps with LoRA: {', '.join(f'{loss:.2f}' for loss in losses(quantized))}")

plt.figure(figsize=(6, 3))
plt.barh(list(memory), [size / 1e6 for size in memory.values()])
plt.xlabel("weights of the base model, MB")
plt.show()
for name, size in memory.items():
    print(f"{name}: {size / 1e6:,.0f} MB")

print("A whole run, as planned for 4 rows of 256 tokens on a T4:")
planned = Run(config=CONFIG, lora=lora_config("r=16,alpha=32"), device=GPUS["t4"], precision="fp16", rows=4, length=256)
for method in METHODS:
    print(f"{method:>5}: {plan(planned, method).memory.total / 1e9:.2f} GB")

# %% [markdown]
# It learns with both. The memory is not an eighth at 4 bits: the embedding and the head are not quantized, and in a
# small model they are a large part. In a model of 7 billion weights they are a few percent. And on a CPU quantization
# costs time; its home is a GPU.
#
# The last lines are what `tunesmith plan` expects of whole runs: activations, gradients and the libraries come on top
# of the weights.
#
# ## Attention without padding
#
# In attention each token looks at those before it, and the cost grows with the *square* of the length. Padding wastes
# it. tunesmith puts the examples of a batch side by side and keeps attention inside each. `padding_free=False` pads,
# for comparison:

# %%
long_and_short = [row for pair in zip(training_rows(8), train[:8], strict=True) for row in pair]
for name, padding_free in (("padded", False), ("without padding", True)):
    config = SFTConfig(
        output_dir=str(FOLDER / "look"),
        precision="fp32",
        report_to="none",
        padding_free=padding_free,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(MODEL, config, train_dataset=train, eval_dataset=long_and_short)
    trainer.remove_callback(PrinterCallback)
    found = trainer.evaluate()
    print(f"{name:16} loss {found['eval_loss']:.5f}, {found['eval_runtime']:.2f} s")

# %% [markdown]
# The same loss, in less time. On GPUs the same idea is known from **FlashAttention**, which computes attention in
# small blocks that stay in the GPU's fast memory, never writes the square of scores, and takes several examples in
# one row. Where it is installed, `model_init_kwargs={"attn_implementation": "flash_attention_2"}` chooses it;
# tunesmith needs neither it nor a GPU to leave out the padding, because it reaches the same through PyTorch's own
# attention.
#
# ## Share it: push to the hub
#
# A *hub* keeps models under `owner/name`. Without the internet, this notebook talks to a hub on your own machine,
# through the very same client. With `HUB = True` it goes to your own account (`hf auth login` first), into a *private*
# repository that nobody else sees. Only what a stranger needs is sent, with a *model card* that says what it is.

# %%
REPO = in_full("orders-lora")  # under the name of the account that is logged in
pushed = push(run, REPO, PushOptions(private=HUB, samples=False))
print("pushed to", pushed.url)
for item in pushed.plan.items:
    print(f"{item.size:12,} bytes  {item.path}")

# %% [markdown]
# And somebody else loads it: the base model, then the adapter by its name on the hub.

# %%
downloaded = PeftModel.from_pretrained(load_model(MODEL, device_map="auto"), REPO).eval()
print("the downloaded model answers the same:", right(downloaded, tokenizer)[0] == after)

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

# %%
if not HUB:
    at_the_end.close()  # the hub on this machine

# %% [markdown]
# ## What you have learned
#
# - LoRA trains two thin matrices beside a frozen one; `r` is what they can say, `lora_alpha / r` how loud.
# - Names come from `named_modules()`, and a wrong one is an error.
# - An adapter is a small file; merging makes it part of the model.
# - 8 and 4 bits shrink the frozen weights; the embeddings stay.
# - Padding is work for nothing, and attention can do without.
# - A push sends what a stranger needs, and the card says what it is.
#
# Next: [chapter 6](06_where_next.ipynb), what comes after fine-tuning.
