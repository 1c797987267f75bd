"""The memory that `tunesmith plan` tells of the demo model on a CPU, against the peak of real training.

    python benchmarks/plan.py [--steps 3] [--json out.json]

fp32, full fine-tuning and LoRA (r 16, all linear layers), with and without gradient checkpointing. Each measurement is
a process of its own; both figures are without the libraries, which are there before the model.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

POINTS = ("1x512", "8x128", "4x512")
"""Rows x tokens."""
METHODS = ("lora", "full")


def measured(method: str, rows: int, length: int, checkpointing: bool, steps: int) -> dict[str, float]:
    """The peak of this process in training, in MB beside the libraries, and what they take."""
    import warnings

    import torch
    from datasets import Dataset

    from tunesmith import SFTConfig, SFTTrainer
    from tunesmith.model.load import load_tokenizer
    from tunesmith.settings.lora import lora_config

    warnings.filterwarnings("ignore")
    tokenizer = load_tokenizer("demo")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    libraries = pages * resource.getpagesize() / 1e6
    torch.manual_seed(0)
    tokens = [torch.randint(100, 40000, (length,)).tolist() for _ in range(rows * steps)]
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        max_steps=steps,
        max_length=length,
        precision="fp32",
        use_cpu=True,
        activation_checkpointing=checkpointing,
        allow_no_eos=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    SFTTrainer(
        "demo",
        args,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in tokens]),
        processing_class=tokenizer,
        peft_config=lora_config(True) if method == "lora" else None,
    ).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"libraries": libraries, "peak": peak - libraries}


def planned(method: str, rows: int, length: int, checkpointing: bool) -> dict[str, float]:
    """MB by part, without the libraries."""
    from tunesmith.model.devices import device
    from tunesmith.model.load import load_config
    from tunesmith.plan.memory import LIBRARIES_ALONE, Run, count
    from tunesmith.settings.lora import lora_config

    run = Run(
        config=load_config("demo"),
        lora=lora_config(True),
        device=device("cpu", "fp32"),
        precision="fp32",
        rows=rows,
        length=length,
        checkpoint_every=int(checkpointing),
    )
    name: Any = method
    memory = count(run, name).memory(rows, length)
    parts = {part: size / 1e6 for part, size in memory.parts().items()}
    return parts | {
        "overhead": parts["overhead"] - LIBRARIES_ALONE / 1e6,
        "peak": (memory.total - LIBRARIES_ALONE) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--points", nargs="+", default=POINTS, metavar="ROWSxTOKENS")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        method, point, checkpointing = arguments.measure
        rows, length = map(int, point.split("x"))
        print(json.dumps(measured(method, rows, length, checkpointing == "on", arguments.steps)))
        return
    found: dict[str, Any] = {}
    print("| method | rows x tokens | checkpointing | planned, MB | measured, MB | planned / measured |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method, checkpointing in ((method, way) for method in METHODS for way in ("off", "on")):
        for point in arguments.points:
            rows, length = map(int, point.split("x"))
            plan = planned(method, rows, length, checkpointing == "on")
            command = [sys.executable, __file__, "--steps", str(arguments.steps)]
            command += ["--measure", method, point, checkpointing]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            real = json.loads(done.stdout.splitlines()[-1])
            found[f"{method} {point} {checkpointing}"] = {"planned": plan, "measured": real}
            numbers = f"{plan['peak']:,.0f} | {real['peak']:,.0f} | {plan['peak'] / real['peak']:.2f}"
            print(f"| {method} | {point} | {checkpointing} | {numbers} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
