"""Memory of the demo model in fp32, bf16, 8 and 4 bits: its weights, the process once it is loaded, and in training.

    python benchmarks/memory.py [--steps 3] [--json out.json]

Training is LoRA (r 16, all linear layers) on 8 rows of 128 tokens, and full fine-tuning in fp32; each measurement is a
process of its own. The process includes the libraries, which are there before the model: they are given apart.
"""

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = ("fp32", "bf16", "8bit", "4bit", "fp32 full")
ROWS, LENGTH = 8, 128


def now() -> float:
    """MB that the process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def run(method: str, steps: int) -> dict[str, Any]:
    import warnings

    import torch
    from peft import LoraConfig

    from tunesmith import SFTConfig, SFTTrainer
    from tunesmith.model.load import load_model, load_tokenizer
    from tunesmith.model.quantize import quantization

    warnings.filterwarnings("ignore")
    tokenizer = load_tokenizer("demo")
    before = now()
    precision, _, full = method.partition(" ")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    bits: Any = precision
    config = {"quantization_config": quantization(bits, dtype)} if precision in ("8bit", "4bit") else {}
    model = load_model("demo", dtype=dtype, **config)
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()  # out of the mapped file, whose pages count as the process's
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has used and glibc keeps is not the model's
    loaded = now()
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(100, 40000, (LENGTH,)).tolist()} for _ in range(ROWS * steps)]
    from datasets import Dataset

    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS,
        max_steps=steps,
        precision="bf16" if precision == "bf16" else "fp32",
        use_cpu=True,
        allow_no_eos=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=None if full else lora,
    ).train()
    weights = {id(p): p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" not in name}
    return {
        "weights": sum(weights.values()) / 1e6,
        "libraries": before,
        "loaded": loaded - before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        print(json.dumps(run(arguments.method, arguments.steps)))
        return
    found: dict[str, dict[str, float]] = {}
    print("| | weights, MB | loaded, MB | training, peak MB |\n| --- | --- | --- | --- |")
    for method in METHODS:
        command = [sys.executable, __file__, "--method", method, "--steps", str(arguments.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found[method] = json.loads(done.stdout.splitlines()[-1])
        numbers = " | ".join(f"{found[method][name]:,.0f}" for name in ("weights", "loaded", "peak"))
        print(f"| {method} | {numbers} |", flush=True)
    print(f"\nThe libraries take {found['fp32']['libraries']:,.0f} MB beside that.")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
