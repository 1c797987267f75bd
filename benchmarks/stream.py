"""Memory of a run on a stream that no machine holds: does it stay flat?

    python benchmarks/stream.py [--rows 5000000] [--batch 512] [--json out.json]
    torchrun --nproc-per-node 2 benchmarks/stream.py ...

Trains a random model of two small layers on synthetic rows, which exist only while they are read, and saves no
checkpoint: states of the stream that nobody asks for must not pile up either. The first process prints what it has in
memory at each twentieth of the way.
"""

import argparse
import json
import os
import resource
import tempfile
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


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows of 4 to 11 tokens."""
    for i in range(count):
        yield {"input_ids": [(i * 7 + j) % 1000 for j in range(4 + i % 8)]}


class Memory(TrainerCallback):
    """Notes the memory of the process at each part of the way."""

    def __init__(self, steps: int, batch: int) -> None:
        self.found: list[tuple[int, float]] = []
        self._every, self._batch = max(1, steps // PARTS), batch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._every == 0:
            self.found.append((state.global_step * self._batch, now()))
            if state.is_world_process_zero:
                print(f"{self.found[-1][0]:>12,} rows  {self.found[-1][1]:,.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--batch", type=int, default=512, help="rows of a step")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    processes, steps = int(os.environ.get("WORLD_SIZE", "1")), arguments.rows // arguments.batch
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    memory = Memory(steps, arguments.batch)
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
        )
        SFTTrainer(
            LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)),
            args,
            train_dataset=IterableDataset.from_generator(rows, gen_kwargs={"count": arguments.rows}),
            processing_class=load_tokenizer("demo"),
            callbacks=[memory],
        ).train()
    if arguments.json and int(os.environ.get("RANK", "0")) == 0:
        arguments.json.write_text(json.dumps(memory.found) + "\n")


if __name__ == "__main__":
    main()
