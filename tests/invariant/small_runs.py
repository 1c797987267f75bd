"""Twelve small runs, one of each kind, on small random models: all that decides them is here."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, TaskType
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from tests.invariant.facts import Facts, digest, finished
from tunesmith import DataSource, SFTConfig, SFTTrainer

STEPS = 12

# Models

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _LAYERS | {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64},
    "wide": _LAYERS | {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128},  # for blocks of 64 weights
    "gpt_neo": {
        "model_type": "gpt_neo",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
}


def build_models(folder: Path) -> None:
    """Each of `MODELS` in a folder of its own below `folder`, with a tokenizer that takes a byte for a token."""
    tokenizer = _tokenizer()
    for name, settings in MODELS.items():
        common = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = AutoConfig.for_model(**common | settings)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms start at the same numbers everywhere
                parameter.add_(torch.randn(parameter.shape), alpha=0.05)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _tokenizer() -> PreTrainedTokenizerBase:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


# Rows

_WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "again"]
_WORDS += ["it", "runs", "far", "away", "until", "night", "falls", "on", "them"]
_SYSTEM = "You answer in one short line, in plain words."


def words(seed: int, count: int) -> str:
    """Others for each `seed`: the beginnings of rows that begin alike are computed once, which is a run of its own."""
    return " ".join(Random(seed).choices(_WORDS, k=count))


def texts(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": words(i, 1 + 7 * i % 11)} for i in range(start, start + count)]


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    numbers = range(start, start + count)
    return [{"prompt": words(i, 1 + 3 * i % 8) + "?", "completion": " " + words(i + 1, 1 + 5 * i % 7)} for i in numbers]


def chats(count: int, start: int = 0, system: str | None = None, turns: int = 1) -> list[dict[str, Any]]:
    rows = []
    for row in range(start, start + count):
        messages = [] if system is None else [{"role": "system", "content": system}]
        for turn in range(row, row + turns):
            messages.append({"role": "user", "content": words(turn, 1 + 3 * turn % 5)})
            messages.append({"role": "assistant", "content": words(turn + 2, 1 + 5 * turn % 6)})
        rows.append({"messages": messages})
    return rows


def weighted(count: int) -> list[dict[str, Any]]:
    """Conversations of two turns, whose rows and answers weigh differently, in some rows 0."""
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(chats(count, turns=2)):
        row["messages"][1]["weight"] = (0.0, 0.5, 2.0)[number % 3]
        rows.append(row if number % 4 == 0 else row | {"weight": (0.25, 1.0, 1.5)[number % 3]})
    return rows


# Runs


def settings(folder: Path, **own: Any) -> SFTConfig:
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "precision": "fp32",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 4,
    }
    return SFTConfig(**common | own)


def full(models: Path, folder: Path) -> Facts:
    args = settings(folder, max_length=40, overlong="split", save_strategy="steps", save_steps=6, save_total_limit=1)
    return finished(SFTTrainer(str(models / "llama"), args=args, train_dataset=pairs(22)))


def lora(models: Path, folder: Path) -> Facts:
    args = settings(folder, train_on="assistant", learning_rate=1e-2, save_strategy="steps", save_steps=6)
    adapter = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
    return finished(SFTTrainer(str(models / "llama"), args=args, train_dataset=chats(20, turns=2), peft_config=adapter))


def packing(models: Path, folder: Path) -> Facts:
    args = settings(
        folder,
        packing=True,
        max_length=128,
        shuffle_dataset=True,
        loss_type="dft",
        activation_checkpointing=True,
        per_device_train_batch_size=2,
    )
    return finished(
        SFTTrainer(str(models / "llama"), args=args, train_dataset=texts(60), eval_dataset=texts(12, start=60))
    )


def streaming(models: Path, folder: Path) -> Facts:
    rows: list[dict[str, Any]] = texts(40)
    rows[7] = {"text": None}
    stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    args = settings(folder, on_bad_row="skip", save_strategy="steps", save_steps=6)
    return finished(SFTTrainer(str(models / "llama"), args=args, train_dataset=stream))


def share_prefix(models: Path, folder: Path) -> Facts:
    """LoRA without dropout, which is computed in other ways than with it."""
    args = settings(folder, train_on="assistant", learning_rate=2e-3, loraplus_lr_ratio=4.0)
    adapter = LoraConfig(r=4, target_modules="all-linear")
    rows = chats(20, system=_SYSTEM)
    return finished(SFTTrainer(str(models / "llama"), args=args, train_dataset=rows, peft_config=adapter))


def weights(models: Path, folder: Path) -> Facts:
    args = settings(folder, train_on="assistant", label_smoothing_factor=0.1, max_length=110)
    return finished(SFTTrainer(str(models / "llama"), args=args, train_dataset=weighted(20)))


def eight_bit(models: Path, folder: Path) -> Facts:
    args = settings(folder, learning_rate=1e-2)
    trainer = SFTTrainer(
        str(models / "wide"),
        args=args,
        train_dataset=pairs(20),
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    return finished(trainer)


def virtual_tokens(models: Path, folder: Path) -> Facts:
    args = settings(folder, learning_rate=0.1)
    adapter = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    trainer = SFTTrainer(
        str(models / "llama"),
        args=args,
        train_dataset=pairs(20),
        eval_dataset=pairs(6, start=20),
        peft_config=adapter,
    )
    return finished(trainer)


def padded(models: Path, folder: Path) -> Facts:
    """A model that can't take flat batches, whose rows are grouped by their length."""
    args = settings(folder)
    return finished(
        SFTTrainer(
            str(models / "gpt_neo"), args=args, train_dataset=texts(24), eval_dataset={"more": texts(6, start=24)}
        )
    )


def mixture(models: Path, folder: Path) -> Facts:
    columns = {"prompt": "question", "completion": "answer"}
    asked = [{"question": row["prompt"], "answer": row["completion"]} for row in pairs(12)]
    sources = {
        "texts": DataSource(rows=texts(16), weight=1.5, held_out=0.25),
        "pairs": DataSource(rows=Dataset.from_list(asked), count=7, held_out=0.2, columns=columns),
        "chats": chats(6, start=40),
    }
    args = settings(folder, eval_strategy="steps", eval_steps=6, sample_prompts=2)
    return finished(SFTTrainer(str(models / "llama"), args=args, train_dataset=sources))


def async_save(models: Path, folder: Path) -> Facts:
    """What a run leaves, and under `resumed` what one leaves that goes on from its second checkpoint of three."""

    def trainer() -> SFTTrainer:
        args = settings(folder, async_save=True, save_strategy="steps", save_steps=4, logging_steps=3)
        return SFTTrainer(str(models / "llama"), args=args, train_dataset=texts(24))

    whole = finished(trainer())
    set_seed(1)  # what follows must come from the checkpoint
    return whole | {"resumed": finished(trainer(), resume_from_checkpoint=str(folder / "checkpoint-8"))}


def evaluated(models: Path, folder: Path) -> Facts:
    args = settings(
        folder,
        per_device_train_batch_size=8,  # which the tokens of a batch stand in for
        max_tokens_per_batch=256,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first is loaded, not the last, which is there already
    )
    trainer = SFTTrainer(str(models / "llama"), args=args, train_dataset=pairs(48), eval_dataset=pairs(10, start=48))
    found = finished(trainer)
    logits = trainer.predict(pairs(4, start=60)).predictions
    return found | {"predictions": digest({"logits": torch.from_numpy(logits)})}


RUNS: dict[str, Callable[[Path, Path], Facts]] = {
    function.__name__: function
    for function in (
        full,
        lora,
        packing,
        streaming,
        share_prefix,
        weights,
        eight_bit,
        virtual_tokens,
        padded,
        mixture,
        async_save,
        evaluated,
    )
}
