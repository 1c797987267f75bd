# %% [markdown]
# # 3. Your first SFT
#
# **SFT** is short for *supervised fine-tuning*: you show a model prompts together with the answers you want, and it
# learns to answer that way. In this chapter you do it once from beginning to end, with a small real model.
#
# You will learn
#
# - how to look at the data before training on it,
# - how to load a model and its tokenizer, and what `dtype`, `device_map` and the padding token are about,
# - what the most important settings of `SFTConfig` do, each seen in a small experiment,
# - how to train, read the curves, free the memory, save, load, and compare the answers before and after,
# - how to train all weights instead of an adapter, and how to go on with a run that was interrupted.

# %%
import gc
import logging
import random
import shutil
import warnings
from pathlib import Path

# What libraries tell each other when they are imported and used; nothing of it concerns us.
warnings.filterwarnings("ignore", message="IProgress not found|`is_gradient_checkpointing`")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # that the imaginary GPUs below are none

import matplotlib.pyplot as plt
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from tunesmith import SFTConfig, SFTTrainer, TunesmithError, demo_model_path

HUB = False  # True: models and data from the Hugging Face hub, named below; needs the network, better a GPU
MODEL = "Qwen/Qwen2-0.5B" if HUB else str(demo_model_path())  # a name on the hub, or a folder
OUTPUT = "runs/guide/03_first_sft"

disable_progress_bar()

# %% [markdown]
# ## The data
#
# Our task: a sentence in, one line of a to-do list out. The line has a strict form, `[ ] task @day`, so we can count
# how many answers are exactly right. Each row is a conversation with three *roles*: `system` says what the job is,
# `user` asks, and `assistant` gives the answer that we want.
#
# We keep some rows apart for testing. Their tasks never occur in training: a model that gets them right has learned
# the form, and not the sentences by heart.

# %%
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SENTENCES = [
    "Please remind me to {task} on {day}.",
    "On {day} I have to {task}.",
    "I must not forget to {task} on {day}!",
    "Could you note that I should {task} on {day}?",
]
TRAINING_TASKS = ["call Anna", "buy milk", "water the plants", "pay the rent", "feed the cat", "book a table"]
TRAINING_TASKS += ["print the tickets", "clean the oven", "send the report", "fix the bike", "wash the car"]
TEST_TASKS = ["visit grandma", "pack the suitcase", "charge the camera", "order new chairs"]


def conversation(sentence, answer=None):
    messages = [{"role": "system", "content": "Write a to-do line."}, {"role": "user", "content": sentence}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def make_rows(tasks, count, seed):
    dice, rows = random.Random(seed), []
    for _ in range(count):
        task, day, sentence = dice.choice(tasks), dice.choice(DAYS), dice.choice(SENTENCES)
        answer = f"[ ] {task} @{day[:3].lower()}"
        rows.append({"messages": conversation(sentence.format(task=task, day=day), answer)})
    return rows


train_rows, test_rows = make_rows(TRAINING_TASKS, 64, seed=0), make_rows(TEST_TASKS, 8, seed=1)
print(f"{len(train_rows)} rows to train on, {len(test_rows)} to test with. The first one:")
for message in train_rows[0]["messages"]:
    print(f"{message['role']:>10}: {message['content']}")

# %% [markdown]
# ## The tokenizer
#
# A model does not read letters. A **tokenizer** cuts text into pieces, the **tokens**, and gives each a number. Before
# that, a **chat template** writes the conversation as one text in which special tokens mark who speaks, and where a
# turn ends. Here is our first row after both steps.

# %%
tokenizer = AutoTokenizer.from_pretrained(MODEL)
text = tokenizer.apply_chat_template(train_rows[0]["messages"], tokenize=False)
ids = tokenizer(text, add_special_tokens=False)["input_ids"]
print(text)
print(len(ids), "tokens, the last ones:", [tokenizer.decode([i]) for i in ids[-12:]])

# %% [markdown]
# Rows of one batch can differ in length. To put them into one rectangular table, short rows are filled up with a
# **padding token**, and the *attention mask* says with 0 which places to ignore. tunesmith trains without padding, but
# generating several answers at once still uses it, so a tokenizer should have one. Some models come without; then the
# end token is the usual choice, and `SFTTrainer` makes that choice for you.

# %%
print("end token:", tokenizer.eos_token, "  padding token:", tokenizer.pad_token)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
batch = tokenizer(["Buy milk.", "Please water the plants on Sunday."], padding=True, return_tensors="pt")
print(batch["input_ids"])
print(batch["attention_mask"])

# %% [markdown]
# ## The model
#
# `dtype` is the number format of the weights: `float32` takes 4 bytes a weight, `bfloat16` only 2. We load in
# `float32`, which is safe everywhere. The format that training *computes* in is a setting of `SFTConfig`; by default,
# the trainer measures which one is faster on the machine. `device_map="auto"` puts the model on the GPU where there
# is one, and on the processor where there is none.


# %%
def load_base():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, device_map="auto")


model = load_base()
count = sum(parameter.numel() for parameter in model.parameters())
print(f"{count:,} weights in {model.dtype} on {model.device}: {4 * count / 1e6:,.0f} MB")
print(f"in bfloat16 it would be {2 * count / 1e6:,.0f} MB")

# %% [markdown]
# A model that is too large for one GPU is spread over several, layer by layer. `device_map="auto"` gives each GPU about
# the same share, `"sequential"` fills one after the other, and both put what is left into the processor's memory.
# `model.hf_device_map` says what went where. You can try it without any GPU, on a model without weights: how would ours
# fill two imaginary GPUs with room for 300 and 150 MB, one after the other?

# %%
with init_empty_weights():
    empty = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
empty.tie_weights()
spread = infer_auto_device_map(
    empty,
    max_memory={0: "300MB", 1: "150MB", "cpu": "8GB"},
    no_split_module_classes=[type(empty.model.layers[0]).__name__],  # a layer stays whole
)
for device in dict.fromkeys(spread.values()):
    parts = [name for name, place in spread.items() if place == device]
    print(f"{device}: {len(parts)} parts, from {parts[0]} to {parts[-1]}")

# %% tags=["claim"]
if not HUB:
    assert set(spread.values()) >= {0, 1, "cpu"}

# %% [markdown]
# That makes room, not speed: the data goes through the layers in order, so only one GPU works at a time. To train
# faster on several GPUs, each holds the whole model and takes its share of the rows (`tunesmith train --processes 2`).

# %% [markdown]
# ## Before training
#
# `pipeline` is the shortest way to use a model. We ask it the test sentences and count exact answers. `do_sample=False`
# always takes the likeliest token, so that the answers on one machine are the same each time. `eos_token_id` says at
# which tokens to stop: `<|im_end|>` ends a turn in our template, and a base model may have another end token besides.

# %%
END = tokenizer.convert_tokens_to_ids("<|im_end|>")
SHORT = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [END, tokenizer.eos_token_id]}


def answers(model_or_folder):
    generator = pipeline("text-generation", model=model_or_folder, tokenizer=tokenizer)
    prompts = [row["messages"][:-1] for row in test_rows]
    outputs = [generator(prompt, **SHORT) for prompt in prompts]
    return [output[0]["generated_text"][-1]["content"] for output in outputs]


def exact(found):
    return sum(answer == row["messages"][-1]["content"] for answer, row in zip(found, test_rows, strict=True))


before = answers(model)
print(f"{exact(before)} of {len(before)} exactly right. Two of the answers:")
for answer in before[:2]:
    print(" ", repr(answer))

# %% [markdown]
# What does `pipeline` do? Four things that you can do by hand: write the conversation as a text that ends where the
# assistant's turn begins (`add_generation_prompt`), make tokens of it, let the model go on (`generate`), and make text
# of the new tokens.

# %%
prompt = tokenizer.apply_chat_template(
    test_rows[0]["messages"][:-1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**prompt, **SHORT)
new = output[0, prompt["input_ids"].shape[1] :]  # what was there before is returned, too
print("the same answer:", tokenizer.decode(new, skip_special_tokens=True) == before[0])

# %% tags=["claim"]
if not HUB:
    assert tokenizer.decode(new, skip_special_tokens=True) == before[0]
    assert exact(before) == 0

# %% [markdown]
# The model is fluent, but it does not know our form. Nobody has told it.
#
# ## Settings, one experiment each
#
# `SFTConfig` holds the settings of a run, and `SFTTrainer` carries the run out. To keep the experiments quick we train
# with **LoRA**: the weights of the model stay as they are, and small extra matrices beside them, the *adapter*, learn.
# Chapter 5 explains it.
#
# The number to watch is the **loss**: how surprised the model is by the right answer. It is 0 when each token of the
# answer was certain, and large when the model would have written something else. `train_on="assistant"` means that
# only the tokens of the answer count.
#
# Three settings we leave as they are: the warm-up (`warmup_steps`, in which the learning rate grows; 0), the schedule
# (`lr_scheduler_type`, how it falls afterwards; in a straight line) and the `seed` (it makes a run repeatable; 42).

# %%
COMMON = {
    "output_dir": OUTPUT,  # the folder that the run may write into
    "train_on": "assistant",  # the tokens of the answers count
    "max_length": 256,  # the most tokens of a row
    "learning_rate": 1e-3,  # how far one step goes
    "num_train_epochs": 1,  # how often each row is seen
    "per_device_train_batch_size": 4,  # rows in memory together
    "logging_steps": 1,  # keep the loss of each step, for our curves
    "save_strategy": "no",  # no checkpoints on the way: the runs are short
    "report_to": "none",  # tell no tracking service, such as TensorBoard or W&B
    "disable_tqdm": True,  # no progress bar
    "self_test": "off",  # saves some seconds in each experiment; in a real run leave it on
}


LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def make_trainer(rows, adapter=LORA, **settings):
    trainer = SFTTrainer(
        model=load_base(),
        args=SFTConfig(**COMMON | settings),
        train_dataset=rows,
        eval_dataset=test_rows,
        processing_class=tokenizer,
        peft_config=adapter,  # None: all weights are trained
    )
    trainer.remove_callback(PrinterCallback)  # we draw curves; this would print each step, too
    return trainer


def losses(trainer, name="loss"):
    """The steps at which a loss was logged, and the losses."""
    logged = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
    return [step for step, _ in logged], [loss for _, loss in logged]


# %% [markdown]
# ### `max_length`
#
# `max_length` is the most tokens that a row may have. More tokens take more memory and time; what is longer is cut off
# at the end, and the end is where the answer stands. So look at the lengths first.

# %%
lengths = [len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in train_rows]
print(f"tokens in a row: from {min(lengths)} to {max(lengths)}")
for limit in (24, 38, 42, 64, 256):
    print(f"max_length={limit:<4} cuts {sum(length > limit for length in lengths):>2} of {len(lengths)} rows")

try:
    make_trainer(train_rows, max_length=24)
except TunesmithError as error:
    print("\nmax_length=24 is refused:", error)
else:
    raise AssertionError("this should have been refused")

# Conversations of twelve turns each, four steps at two lengths:
turns = [row["messages"][1:] for row in train_rows]
long_rows = [{"messages": [message for turn in turns[at : at + 12] for message in turn]} for at in range(4)]
print()
for limit in (64, 256):
    trainer = make_trainer(long_rows, max_length=limit, per_device_train_batch_size=1)
    seconds = trainer.train().metrics["train_runtime"]
    learned = sum(label != -100 for label in trainer.train_dataset[0]["labels"])
    print(f"max_length={limit:<4} 4 steps in {seconds:.1f} s; {learned} tokens of answers are left in the first row")

# %% [markdown]
# With 24 tokens the questions alone fill the rows, no answer is left to learn from, and tunesmith stops before it has
# trained anything. With long conversations a larger `max_length` takes more seconds, and keeps more answers to learn
# from. So make it as large as your rows need, and no larger.
#
# ### `learning_rate`
#
# After each batch, the weights take a small step in the direction that lowers the loss. The **learning rate** is the
# size of the step. Three rates, four steps each. One run proves little: chance decides how the adapter begins and in
# which order the rows come. So each run is made three times, with other seeds.

# %%
RATES = (1e-5, 1e-3, 5e-2)
results = {}
fig, axis = plt.subplots(figsize=(6, 3.2))
for rate in RATES:
    ends = []
    for seed in (1, 2, 3):
        trainer = make_trainer(train_rows[:16], learning_rate=rate, seed=seed)
        trainer.train()
        ends.append(trainer.evaluate()["eval_loss"])
    steps, values = losses(trainer)
    axis.plot(steps, values, marker="o", label=f"learning_rate={rate:g}")
    results[rate] = ends
    print(f"learning_rate={rate:<6g} test loss {sum(ends) / 3:.2f} (from {min(ends):.2f} to {max(ends):.2f})")
axis.set(xlabel="step", ylabel="loss (log scale)", yscale="log", title="Too small, right, too large")
axis.legend()
plt.show()

# %% tags=["claim"]
if not HUB:
    small, middle, large = results.values()
    assert max(middle) < min(small + large), results

# %% [markdown]
# The smallest rate hardly moves; its curve only wobbles, for each step sees other rows. The middle one brings the loss
# down. The largest jumps over the goal. With every seed, the middle one ends lowest.
#
# As a rule, to begin with:
#
# | model | LoRA | all weights |
# | --- | --- | --- |
# | fewer than 500 million weights | 1e-3 | 3e-4 |
# | more | 2e-4 | 2e-5 |
#
# The 1e-3 is what you have just seen; its neighbour was measured in the same way (`benchmarks/learning_rates.py`). The
# second line is for models that don't fit on two cores: 2e-4 is what
# [QLoRA](https://arxiv.org/abs/2305.14314) used for 7 and 13 billion weights (and 1e-4 for 33 and 65 billion).
# `tunesmith init` writes these rates into its recipes. Whatever the rule says, the loss on the test rows decides.
#
# ### Batch size and accumulation
#
# A **batch** is the set of rows that one step looks at. `per_device_train_batch_size` rows are in memory together.
# `gradient_accumulation_steps` adds up the *gradients* (the directions) of several such batches before the weights
# move. So 4 x 1 and 2 x 2 are the same step of four rows, and the second needs memory for two rows only.

# %%
accumulated = []
for size, accumulation in ((4, 1), (2, 2)):
    trainer = make_trainer(train_rows[:12], per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    trainer.train()
    accumulated.append(losses(trainer)[1])
    values = ", ".join(f"{loss:.2f}" for loss in accumulated[-1])
    print(f"batch of {size} x {accumulation} accumulated: {trainer.state.global_step} steps, losses {values}")

print()
by_size = {}
for size in (1, 8):
    trainer = make_trainer(train_rows[:16], per_device_train_batch_size=size)
    trainer.train()
    by_size[size] = trainer.evaluate()["eval_loss"]
    print(f"batch of {size}: {trainer.state.global_step} steps, test loss {by_size[size]:.2f}")

# %% tags=["claim"]
if not HUB:
    rounding = 0.05 if trainer.args.bf16 or trainer.args.fp16 else 1e-3
    assert max(abs(one - other) for one, other in zip(*accumulated, strict=True)) < rounding, accumulated
    assert by_size[1] < by_size[8] - 0.2

# %% [markdown]
# The losses of the first two runs agree but for rounding. When memory is short, halve the batch size and double the
# accumulation: you learn the same.
#
# The last two runs saw the same 16 rows. A small batch makes many steps of them, and each follows the whims of its one
# row; a large batch makes few steps, in steadier directions. With so few rows the number of steps decides.
#
# ### Epochs
#
# One **epoch** means that every row was seen once. `num_train_epochs` says how many there are. With few rows, more
# epochs soon teach the rows themselves instead of the task. We train on 8 rows only, 8 times, and after each epoch
# measure the loss on test rows that the model never trains on.

# %%
trainer = make_trainer(train_rows[:8], num_train_epochs=8, eval_strategy="epoch")
trainer.train()
steps, values = losses(trainer)
test_steps, test_values = losses(trainer, "eval_loss")
fig, axis = plt.subplots(figsize=(6, 3.2))
axis.plot(steps, values, marker="o", label="8 training rows")
axis.plot(test_steps, test_values, marker="s", label="test rows")
axis.set(xlabel="step", ylabel="loss", title="Eight epochs of 8 rows")
axis.legend()
plt.show()
print(f"at the end: {values[-1]:.3f} on the training rows, {test_values[-1]:.3f} on the test rows")

# %% tags=["claim"]
if not HUB:
    assert values[-1] < 0.15 and test_values[-1] > 2 * values[-1], (values, test_values)

# %% [markdown]
# The loss of the training rows goes to nearly nothing, that of the test rows stays well above it. The gap between the
# two is what the model has learned by heart. More *different* rows close it, more epochs don't.
#
# ## The real run
#
# Now all 64 rows, once, with the settings that the experiments have shown to be good. Every 4 steps the loss on the
# test rows is measured.

# %%
trainer = make_trainer(train_rows, eval_strategy="steps", eval_steps=4, self_test="auto")
trainer.train()
steps, values = losses(trainer)
test_steps, test_values = losses(trainer, "eval_loss")
fig, axis = plt.subplots(figsize=(6, 3.2))
axis.plot(steps, values, marker="o", label="training rows")
axis.plot(test_steps, test_values, marker="s", label="test rows")
axis.set(xlabel="step", ylabel="loss", title="One epoch of 64 rows")
axis.legend()
plt.show()
print(f"at the end: {values[-1]:.3f} on the training rows, {test_values[-1]:.3f} on the test rows")

# %% tags=["claim"]
if not HUB:
    assert values[-1] < values[0] / 5 and test_values[-1] < test_values[0] / 2, (values, test_values)

# %% [markdown]
# Both curves fall, and they fall together: what the model learns from the training rows holds for new ones, too.
#
# ## Save, and free the memory
#
# `save_model()` writes a folder with the adapter, the tokenizer and all that is needed to load them. Afterwards we let
# go of everything that holds weights. `gc.collect()` is needed because trainer and model refer to each other; on a GPU,
# `torch.cuda.empty_cache()` gives the memory back to other programs.

# %%
trainer.save_model()


def tensor_megabytes():
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = {id(item): item.nbytes for item in gc.get_objects() if type(item) in kinds}
    return sum(tensors.values()) / 1e6


print(f"before: {tensor_megabytes():,.0f} MB of tensors are held")
del trainer, model
gc.collect()
if torch.cuda.is_available():
    torch.cuda.empty_cache()
print(f"after:  {tensor_megabytes():,.0f} MB")

# %% tags=["claim"]
if not HUB:
    kinds = (torch.Tensor, torch.nn.Parameter)
    held = {id(item): item.nbytes for item in gc.get_objects() if type(item) in kinds and item.device.type != "meta"}
    assert sum(held.values()) < 50e6

# %% [markdown]
# What is still counted is the empty model that we spread over imaginary GPUs: it has shapes, and takes no memory.
#
# ## Load, and compare
#
# The saved folder works like any model: `pipeline` finds the adapter in it, and loads the base model that belongs to
# it. The same test sentences as before:

# %%
after = answers(OUTPUT)
print(f"exactly right: {exact(before)} of {len(before)} before, {exact(after)} of {len(after)} after\n")
for row, old, new in list(zip(test_rows, before, after, strict=True))[:4]:
    print("prompt:", row["messages"][-2]["content"][:200])
    print("before:", repr(old))
    print("after: ", repr(new), "\n")

# %% tags=["claim"]
if not HUB:
    assert exact(after) >= 5, after

# %% [markdown]
# That is supervised fine-tuning: 64 examples, 16 steps, and a model that does what it could not do before. Look at the
# answers that are still wrong, too: is it the form, or the content? More rows, or a second epoch, is what to try next.
#
# ## All weights: full fine-tuning
#
# So far an adapter learned and the model stayed as it was. With `peft_config=None` all weights are trained. The rule
# above gives the learning rate, 3e-4. What else changes is the price: gradients and the optimizer's numbers for each
# weight, and a whole model on the disk.

# %%
FULL = f"{OUTPUT}_full"
trainer = make_trainer(train_rows, adapter=None, learning_rate=3e-4, output_dir=FULL)
trainer.train()
full_loss = trainer.evaluate()["eval_loss"]
count = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
print(f"{count:,} weights trained, test loss {full_loss:.3f}; the adapter reached {test_values[-1]:.3f}")
trainer.save_model()
del trainer
gc.collect()

for folder in (OUTPUT, FULL):
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    print(f"{size / 1e6:6.1f} MB of weights in {folder}")
print(f"exactly right: {exact(answers(FULL))} of {len(test_rows)}")

# %% tags=["claim"]
if not HUB:
    assert full_loss < 0.5, full_loss

# %% [markdown]
# On a task as small as this, both learn the form. In the same steps, all weights get further than the adapter. Train
# all weights where there is memory enough and the change is large: a new language, a new field, very much data.
#
# ## Checkpoints: going on after an interruption
#
# A run that takes hours should survive a power cut. `save_steps` says after how many steps a **checkpoint** is written:
# weights, optimizer, schedule, position in the data, random numbers. `save_total_limit` says how many are kept; older
# ones are deleted. `resume_from_checkpoint=True` goes on from the newest one, or from the one that you name.

# %%
SAVING = {"output_dir": f"{OUTPUT}_resume", "per_device_train_batch_size": 2, "precision": "fp32"}
SAVING |= {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
shutil.rmtree(SAVING["output_dir"], ignore_errors=True)  # of an earlier run
whole = make_trainer(train_rows[:24], **SAVING)
whole.train()
kept = sorted(path.name for path in Path(SAVING["output_dir"]).glob("checkpoint-*"))
print("12 steps, a checkpoint every 4, and these are kept:", ", ".join(kept))

resumed = make_trainer(train_rows[:24], **SAVING | {"output_dir": f"{OUTPUT}_resumed"})
resumed.train(resume_from_checkpoint=f"{SAVING['output_dir']}/checkpoint-8")
for name, trainer in (("in one go", whole), ("resumed  ", resumed)):
    print(f"{name}: losses of the last four steps", ", ".join(f"{loss:.6f}" for loss in losses(trainer)[1][-4:]))
pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
same = all(torch.equal(one, other) for one, other in pairs)
print("the weights are equal in every bit:", same)

# %% tags=["claim"]
if not HUB:
    assert kept == ["checkpoint-12", "checkpoint-8"] and losses(whole)[1][-4:] == losses(resumed)[1][-4:]
    assert same

# %% [markdown]
# The resumed run saw the rows that were left, with the optimizer as it was, and on a processor in `float32` it ends
# with the very same weights.
#
# ## Longer conversations
#
# A conversation may have many turns. With `train_on="assistant"` the model learns from *each* answer in it, and reads
# all that was said before. Data sets of such conversations are on the hub, such as Capybara; with `HUB = False` we put
# two of our rows together.

# %%
if HUB:
    talks = load_dataset("trl-lib/Capybara", split="train[:16]").to_list()
else:
    pairs = zip(train_rows[:16], train_rows[16:32], strict=True)
    talks = [{"messages": first["messages"] + second["messages"][1:]} for first, second in pairs]
print("roles:", ", ".join(message["role"] for message in talks[0]["messages"]))

trainer = make_trainer(talks, max_length=1024)
trainer.train()
print("losses:", ", ".join(f"{loss:.2f}" for loss in losses(trainer)[1]))

# %% [markdown]
# ## Plain text
#
# Rows need not be conversations. A row with nothing but a `text` is learned from its first token to its last: the model
# gets used to a kind of text, such as film reviews. There are no roles, so no chat template is needed, and a model that
# never had one will do. If the column has another name, `dataset_text_field` says which. Other columns, such as the
# `label` of a review, are left out: `remove_unused_columns=True`, the default, hands the model only what it takes.

# %%
if HUB:
    text_model = "facebook/opt-350m"
    texts = load_dataset("stanfordnlp/imdb", split="train").shuffle(seed=0).select(range(32)).to_list()
else:
    text_model = MODEL
    contents = [[message["content"] for message in row["messages"]] for row in train_rows[:32]]
    texts = [{"review": f"{sentence}\n{line}", "label": 1} for _, sentence, line in contents]
field = "text" if HUB else "review"
print("columns:", ", ".join(texts[0]), "  the first text begins:", repr(texts[0][field][:60]))

trainer = SFTTrainer(
    model=text_model,
    args=SFTConfig(
        **COMMON
        | {
            "train_on": "all",
            "dataset_text_field": field,
            "max_steps": 4,
            "allow_pickle": HUB,  # OPT's weights are .bin files
        }
    ),
    train_dataset=texts,
    peft_config=LORA,
)
trainer.remove_callback(PrinterCallback)
trainer.train()
print("columns of the prepared rows:", ", ".join(trainer.train_dataset.column_names))
print("losses:", ", ".join(f"{loss:.2f}" for loss in losses(trainer)[1]))

# %% [markdown]
# ## Try it yourself
#
# **1.** Between which two runs of the learning-rate experiment does `learning_rate=2e-4` end, by its loss on the
# test rows? Guess first, then run the same four steps.

# %%
trainer = make_trainer(train_rows[:16], learning_rate=2e-4)
trainer.train()
print(f"learning_rate=2e-4: afterwards, loss on the test rows: {trainer.evaluate()['eval_loss']:.2f}")

# %% [markdown]
# **2.** How many steps do 8 rows make with a batch size of 2, an accumulation of 2 and 2 epochs? Calculate it, then let
# the trainer count.

# %%
trainer = make_trainer(train_rows[:8], per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2)
trainer.train()
print("calculated:", 8 // (2 * 2) * 2, "  counted by the trainer:", trainer.state.global_step)

# %% [markdown]
# **3.** Which tokens count for the loss with `train_on="assistant"`, and which with `train_on="all"`? The trainer keeps
# the prepared rows in `train_dataset`; a label of -100 means "does not count".

# %%
for choice in ("assistant", "all"):
    row = make_trainer(train_rows[:4], train_on=choice).train_dataset[0]
    counted = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    print(f"{choice}: {len(counted)} of {len(row['labels'])} tokens\n  {tokenizer.decode(counted)!r}")

# %% [markdown]
# **4.** Ask the saved model a sentence of your own, in a form that no training sentence has.

# %%
generator = pipeline("text-generation", model=OUTPUT, tokenizer=tokenizer)
output = generator(conversation("Tuesday is when I need to paint the fence."), **SHORT)
print(output[0]["generated_text"][-1]["content"])

# %% [markdown]
# ## What you have learned
#
# - Look at rows, lengths and the rendered text before you train. `max_length` cuts at the end, where the answer stands.
# - The learning rate decides most: too small learns nothing, too large destroys. Begin with the rule, try three rates,
#   and more than one seed.
# - Batch size times accumulation is the size of a step; accumulation saves memory.
# - Compare the loss of training rows with that of rows kept apart. A growing gap means learning by heart.
# - `save_steps` and `resume_from_checkpoint` let a run go on as if nothing had happened.
# - Save with `save_model()`, load with `pipeline`, and always compare before and after on rows the model has not seen.
#
# Next: **chapter 4** looks closely at the data itself.
