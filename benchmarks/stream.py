"""Memory of a run on a stream that no machine holds: does it stay flat?

    python benchmarks/stream.py [--rows 5000000] [--batch 512] [--seconds 900] [--json out.json]
    torchrun --nproc-per-node 2 benchmarks/stream.py [--parts 2] ...
    python benchmarks/stream.py --read ...

Trains a random model of two small layers on synthetic rows, which exist only while they are read, and saves no
checkpoint: states of the stream that nobody asks for must not pile up either. The rows come shuffled in a buffer. With
`--read` nothing is trained: texts are read, shuffled and tokenized, and the place in the stream is noted after each
batch. The first process prints what it has in memory at each twentieth of the way, and stops after `--seconds`.
"""

import argparse
import json
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from tunesmith import SFTConfig, SFTTrainer
from tunesmith.model.load import load_tokenizer

PARTS = 20


def now() -> float:
    """MB that the process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def rows(firsts: list[int], count: int, text: bool) -> Iterator[dict[str, Any]]:
    """So many rows of 4 to 11 tokens, or texts of up to 20 words, of each file by the number of its first row."""
    for first in firsts:
        for i in range(first, first + count):
            if text:
                yield {"text": f"Row {i}: " + "a word " * (1 + i % 8)}
            else:
                yield {"input_ids": [(i * 7 + j) % 1000 for j in range(4 + i % 8)]}


class Memory(TrainerCallback):
    """Notes the memory of the process at each part of the way."""

    def __init__(self, steps: int, batch: int, seconds: float) -> None:
        self.found: list[tuple[int, float]] = []
        self._every, self._batch = max(1, steps // PARTS), batch
        self._end, self._shows = time.monotonic() + seconds, os.environ.get("RANK", "0") == "0"

    def after(self, step: int) -> bool:
        """Whether the time is up after so many steps."""
        over = time.monotonic() > self._end
        if step == 1 or step % self._every == 0 or over:
            self.found.append((step * self._batch, now()))
            if self._shows:
                print(f"{self.found[-1][0]:>12,} rows  {self.found[-1][1]:,.0f} MB", flush=True)
        return over

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.after(state.global_step) or control.should_training_stop


def read(stream: Any, memory: Memory, batch: int) -> None:
    started, tokens, number = time.perf_counter(), 0, 0
    for number, row in enumerate(stream, start=1):
        tokens += len(row["input_ids"])
        if number % batch == 0:
            stream.state_dict()
            if memory.after(number // batch):
                break
    seconds = time.perf_counter() - started
    print(f"{number:,} rows, {tokens:,} tokens, {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--batch", type=int, default=512, help="rows of a step")
    parser.add_argument("--files", type=int, default=8, help="files that the stream says it has")
    parser.add_argument("--parts", type=int, default=1, help="stream_parts")
    parser.add_argument("--read", action="store_true", help="read, shuffle and tokenize texts; train nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many (one process)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    processes, steps = int(os.environ.get("WORLD_SIZE", "1")), arguments.rows // arguments.batch
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    memory = Memory(steps, arguments.batch, arguments.seconds)
    of_each = -(-arguments.rows // arguments.files)
    kwargs = {"firsts": [file * of_each for file in range(arguments.files)], "count": of_each, "text": arguments.read}
    SFTTrainer.draw_page = None
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch // processes,
            max_steps=steps,
            logging_steps=max(1, steps // PARTS),
            use_cpu=True,
            precision="fp32",
            allow_no_eos=True,
            save_strategy="no",
            self_test="off",
            report_to="none",
            disable_tqdm=True,
            shuffle_dataset=True,
            stream_parts=arguments.parts,
        )
        trainer = SFTTrainer(
            LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)),
            args,
            train_dataset=IterableDataset.from_generator(rows, gen_kwargs=kwargs),
            processing_class=load_tokenizer("demo"),
            callbacks=[memory],
        )
        if arguments.read:
            read(trainer.train_dataset, memory, arguments.batch)
        else:
            trainer.train()
    if arguments.json and int(os.environ.get("RANK", "0")) == 0:
        arguments.json.write_text(json.dumps(memory.found) + "\n")


if __name__ == "__main__":
    main()
