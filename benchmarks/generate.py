"""Answers per second of the demo model: transformers' `generate` in fixed batches, and ours.

    python benchmarks/generate.py [--data alpaca_en_demo.json] [--prompts 64] [--new 128] [--pairs 3] [--json out.json]

The prompts are the e-mails of the demo, whose answers have 72 tokens at most, and with `--data` the instructions of a
file. Both sides are greedy, take turns in one process, and share the model; transformers gets the prompts sorted by
length, `--batch` at a time. `--lora` gives the model LoRA adapters of rank 16 that change next to nothing.
An answer that differs is a near-tie of two tokens: rounding depends on how many rows are computed together.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from tunesmith.data.prompts import prompt_ids
from tunesmith.demo.orders import held_out_rows
from tunesmith.model.demo_model import demo_model_path
from tunesmith.model.generate import PLAIN, Sampling, generate_from_ids, stop_ids
from tunesmith.model.linear import speed_up
from tunesmith.model.load import load_model, load_tokenizer

Prompts = list[list[int]]


@torch.inference_mode()
def by_transformers(model: Any, tokenizer: Any, prompts: Prompts, new: int, batch: int) -> list[str]:
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    stops = stop_ids(model, tokenizer)
    settings = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=stops[0], max_new_tokens=new)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = len(prompts[chosen[0]])
        ids = torch.tensor([[stops[0]] * (longest - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for i, row in zip(chosen, output[:, longest:].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in stops), None)
            answers[i] = str(tokenizer.decode(row[:end], **PLAIN))
    return answers


def timed(way: Callable[[], list[str]]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    answers = way()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"rate": len(answers) / wall, "cpu_seconds": cpu, "answers": answers}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags"))]
    wide = next((name for name in ("avx512f", "avx2") if names[1:] and name in names[1].split()), "")
    return f"{names[0] if names else platform.processor()} {wide}".strip()


def compare(name: str, model: Any, tokenizer: Any, prompts: Prompts, new: int, batch: int, pairs: int) -> Any:
    lengths = sorted(map(len, prompts))
    print(f"\n{name}: {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, answers up to {new}", flush=True)
    rounds = []
    for _ in range(pairs):
        theirs = timed(lambda: by_transformers(model, tokenizer, prompts, new, batch))
        ours = timed(
            lambda: [a.text for a in generate_from_ids(model, tokenizer, prompts, Sampling(max_new_tokens=new))]
        )
        equal = sum(a == b for a, b in zip(theirs.pop("answers"), ours.pop("answers"), strict=True))
        rounds.append({"transformers": theirs, "ours": ours, "equal": equal})
        print(
            f"  {theirs['rate']:.2f} and {ours['rate']:.2f} answers/s ({ours['rate'] / theirs['rate']:.2f}x; "
            f"CPU time {theirs['cpu_seconds'] / ours['cpu_seconds']:.2f}x less), {equal} of {len(prompts)} equal",
            flush=True,
        )
    ratio = statistics.median(one["ours"]["rate"] / one["transformers"]["rate"] for one in rounds)
    print(f"  median ratio: {ratio:.2f}x answers per second")
    return {"name": name, "new": new, "ratio": ratio, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = str(demo_model_path())
    model, tokenizer = load_model(path), load_tokenizer(path)
    if arguments.lora:
        config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)  # type: ignore[assignment]
        speed_up(model)
    model.eval()
    print(f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads, torch {torch.__version__}")
    orders = [prompt_ids(tokenizer, row["messages"][:-1]) for row in held_out_rows()][: arguments.prompts]
    measured = [compare("demo", model, tokenizer, orders, 72, arguments.batch, arguments.pairs)]
    if arguments.data:
        rows = json.loads(arguments.data.read_text())[: arguments.prompts]
        asked = ["\n".join(filter(None, (row["instruction"], row.get("input")))) for row in rows]
        prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in asked]
        name = arguments.data.stem
        measured.append(compare(name, model, tokenizer, prompts, arguments.new, arguments.batch, arguments.pairs))
    if arguments.json:
        arguments.json.write_text(json.dumps({"processor": processor(), "measured": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
