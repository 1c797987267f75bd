"""Twelve small runs and all that they leave behind, to tell whether a change of the code changed what it computes.

    python tests/invariant/trajectories.py record FILE [RUN ...]    # on the old code
    python tests/invariant/trajectories.py compare FILE [RUN ...]   # on the new: every difference, to the last bit
    python tests/invariant/trajectories.py pin FILE                 # what test_trajectories.py compares with

It uses what users use, and files that a run leaves. Bits are those of one machine, its processor and its libraries.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":  # before a library reads them
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, TaskType
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from tunesmith import DataSource, SFTConfig, SFTTrainer
from tunesmith.model.linear import use_onednn

Facts = dict[str, Any]
"""What is known of a run, in JSON's types; `json` writes floats such that they are read back to the bit."""
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


def run(name: str, models: Path, folder: Path) -> Facts:
    """The facts of a run, which writes below `folder`; the same each time on one machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in how many parts something is summed up decides how it is rounded
    use_onednn(False)  # by default the faster library is taken, as measured
    set_seed(0)
    try:
        with warnings_of_ours() as said:
            found = RUNS[name](models, folder)
    finally:
        torch.set_num_threads(threads)
    found["warnings"] = [text.replace(str(folder), "RUN").replace(str(models), "MODELS") for text in said]
    facts: Facts = json.loads(json.dumps(found))
    return facts


@contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Kept(logging.WARNING), logging.getLogger("tunesmith")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


# Facts


def finished(trainer: SFTTrainer, **arguments: Any) -> Facts:
    """Trains, evaluates and saves; the facts of that."""
    trainer.remove_callback(PrinterCallback)
    trainer.train(**arguments)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    folder, model = Path(str(trainer.args.output_dir)), trainer.model
    assert model is not None
    named = dict(model.named_parameters())
    return {
        "log": [timeless(entry) for entry in trainer.state.log_history],
        "metrics": [timeless(entry) for entry in lines(folder / "metrics.jsonl")],
        "eval": timeless(metrics),
        "data": data(trainer),
        "weights": {
            "trained": digest({name: value for name, value in named.items() if value.requires_grad}),
            "all": digest(named),
        },
        "tensors": {str(path.relative_to(folder)): digest(load_file(path)) for path in below(folder, ".safetensors")},
        "examples": content(folder / "examples.json"),
        "preflight": content(folder / "preflight.json"),
        "samples": [timeless(entry) for entry in lines(folder / "samples.jsonl")],
        "skipped": lines(folder / "skipped_rows.jsonl"),
        "files": files(folder),
    }


def timeless(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`entry` without what depends on how fast the machine is, and on what else it holds in memory."""
    return {
        name: value
        for name, value in entry.items()
        if name not in ("seconds", "memory_mb") and not name.endswith(("_runtime", "_per_second"))
    }


def data(trainer: SFTTrainer) -> dict[str, Any]:
    """What was made of the rows, by split."""
    evaluated = trainer.eval_dataset
    parts = evaluated if isinstance(evaluated, Mapping) else {} if evaluated is None else {"": evaluated}
    splits = {"train": trainer.train_dataset} | {f"eval {name}".strip(): rows for name, rows in parts.items()}
    return {name: prepared(rows) for name, rows in splits.items()}


def prepared(rows: Any) -> dict[str, Any]:
    """Counts, and a digest of each column; of a stream, those of its first rows."""
    listed: list[dict[str, Any]] = list(islice(rows, 16)) if isinstance(rows, IterableDataset) else list(rows)
    names = ("input_ids", "labels", "weights", "seq_lengths")
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in listed] for name in names}
    return {
        "rows": len(listed),
        "tokens": sum(map(len, columns["input_ids"])),
        "supervised": sum(label != -100 for labels in columns["labels"] for label in labels),
    } | {name: short(json.dumps(values).encode()) for name, values in columns.items()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def below(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())


def files(folder: Path) -> dict[str, list[str]]:
    """The names of all files, by folder."""
    found: dict[str, list[str]] = {}
    for path in below(folder):
        found.setdefault(str(path.parent.relative_to(folder)), []).append(path.name)
    return found


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def readable(value: Any) -> str:
    """JSON with lists of numbers and texts on one line."""
    text = json.dumps(value, indent=1)  # in which no text has a line break of its own
    return re.sub(r"\[\n[^][{}]*\]", lambda match: re.sub(r"\n *", " ", match[0]).replace("[ ", "[", 1), text)


# What is compared


def pinned(facts: Facts) -> Facts:
    """What another machine finds, too, but for rounding: data, counts, names of files, and losses."""
    entries = [entry for entry in facts["metrics"] if "loss" in entry]
    steps = {
        name: [rounded(entry[name]) for entry in entries]
        for name in ("step", "loss", "grad_norm", "tokens", "supervised_tokens")
    }
    evaluations = [
        {name: rounded(value) for name, value in entry.items() if name == "step" or name.endswith("_loss")}
        for entry in facts["metrics"]
        if any(name.startswith("eval_") for name in entry)
    ]
    found = {"data": facts["data"], "files": facts["files"], "steps": steps, "evaluations": evaluations}
    return found | ({"resumed": pinned(facts["resumed"])} if "resumed" in facts else {})


def rounded(value: Any) -> Any:
    return float(f"{value:.8g}") if isinstance(value, float) else value


def differences(found: Any, expected: Any, tolerance: float = 0.0, place: str = "") -> Iterator[str]:
    """Each place where two values of JSON differ; floats by more than `tolerance` of the larger."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted(found.keys() | expected.keys()):
            if name not in found or name not in expected:
                yield f"{place}/{name}: only in what was {'expected' if name in expected else 'found'}"
            else:
                yield from differences(found[name], expected[name], tolerance, f"{place}/{name}")
    elif isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            yield f"{place}: {len(found)} items, expected {len(expected)}"
        for number, pair in enumerate(zip(found, expected, strict=False)):
            yield from differences(*pair, tolerance, f"{place}/{number}")
    elif isinstance(found, float) and isinstance(expected, float):
        if repr(found) != repr(expected) and not math.isclose(found, expected, rel_tol=tolerance):
            yield f"{place}: {found!r}, expected {expected!r} (relative {abs(found / (expected or 1.0) - 1):.1e})"
    elif type(found) is not type(expected) or found != expected:
        yield f"{place}: {found!r}, expected {expected!r}"


def dropout_mask() -> str:
    """Which numbers dropout draws after a seed: processors of other makes may draw others."""
    torch.manual_seed(0)
    return short(bytes(torch.nn.functional.dropout(torch.ones(256), 0.1).bool().tolist()))


# The commands


def all_of(names: Iterable[str]) -> dict[str, Facts]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNESMITH_HOME"] = str(Path(folder) / "home")
        build_models(Path(folder) / "models")
        for name in names:
            began = time.perf_counter()
            found[name] = run(name, Path(folder) / "models", Path(folder) / name)
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare", "pin"))
    parser.add_argument("file", type=Path)
    parser.add_argument("runs", nargs="*", help=f"only some of {', '.join(RUNS)}")
    given = parser.parse_args()
    if unknown := set(given.runs) - RUNS.keys():
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    names = given.runs or list(RUNS)
    disable_progress_bar()
    recorded = content(given.file) if given.command == "compare" else {}
    found = all_of(names)
    if given.command == "compare":
        told = list(differences(found, {name: recorded[name] for name in names}))
        print("\n".join([*told, f"{len(told)} differences in {len(names)} runs"]))
        return 1 if told else 0
    pins = {"dropout": dropout_mask(), "runs": {name: pinned(facts) for name, facts in found.items()}}
    given.file.write_text(readable(pins if given.command == "pin" else found) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
