"""Rows per second of preparing chat rows: ours against TRL's, and a warm cache against a cold one.

    python benchmarks/prepare.py --data gsm8k_train.jsonl [--pairs 3] [--json out.json]

Each measurement is a process of its own with one worker; the two sides take turns, so that a machine whose speed drifts
changes both. The data is the file three times over, as conversations of a question and an answer, numbered so that
none is a duplicate. Needs `pip install -e '.[bench]'`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COPIES = 3


def rows(data: Path) -> list[dict]:
    pairs = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{copy}. {pair['question']}"},
                {"role": "assistant", "content": pair["answer"]},
            ]
        }
        for copy in range(COPIES)
        for pair in pairs
    ]


def ours(data: Path, home: str) -> dict:
    """Seconds and tokens of one preparation; the cache lives in `home`."""
    import os

    os.environ["TUNESMITH_HOME"] = home
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tunesmith import SFTConfig
    from tunesmith.data.dataset import DataPreparer

    tokenizer = AutoTokenizer.from_pretrained(_demo())
    source = Dataset.from_list(rows(data))
    args = SFTConfig(output_dir=home, max_length=1024, train_on="all", precision="fp32", report_to="none")
    started = time.perf_counter()
    dataset = DataPreparer(args, tokenizer, None)(source, "train", packing=False)
    return {"seconds": time.perf_counter() - started, "rows": len(dataset)}


def theirs(data: Path) -> dict:
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(_demo())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    args = SFTConfig(output_dir=tempfile.mkdtemp(), max_length=1024, bf16=False, report_to="none", use_cpu=True)
    source = Dataset.from_list(rows(data))
    trainer = SFTTrainer(
        LlamaForCausalLM(config), args, train_dataset=source.select(range(8)), processing_class=tokenizer
    )
    started = time.perf_counter()
    dataset = trainer._prepare_dataset(source, tokenizer, trainer.args, False, None, "train")
    return {"seconds": time.perf_counter() - started, "rows": len(dataset)}


def _demo() -> str:
    from tunesmith.model.demo_model import demo_model_path

    return str(demo_model_path())


def measure(side: str, data: Path, home: str) -> dict:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--data", str(data), "--side", side, "--home", home]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--home", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    _demo()  # converted before the first clock starts
    if arguments.side:
        print(json.dumps(ours(arguments.data, arguments.home) if arguments.side == "ours" else theirs(arguments.data)))
        return
    found: dict[str, list[float]] = {"cold": [], "warm": [], "trl": []}
    count = 0
    for pair in range(arguments.pairs):
        with tempfile.TemporaryDirectory() as home:
            cold = measure("ours", arguments.data, home)
            warm = measure("ours", arguments.data, home)
        trl = measure("theirs", arguments.data, "")
        count = cold["rows"]
        assert count == warm["rows"] == trl["rows"], "both sides must keep all rows"
        for name, result in (("cold", cold), ("warm", warm), ("trl", trl)):
            found[name].append(result["seconds"])
        print(
            f"pair {pair + 1}: TRL {trl['seconds']:.1f} s, ours {cold['seconds']:.2f} s, again {warm['seconds']:.3f} s"
        )
    ratios = {
        "ours / TRL": statistics.median(t / c for t, c in zip(found["trl"], found["cold"], strict=True)),
        "warm / cold": statistics.median(c / w for c, w in zip(found["cold"], found["warm"], strict=True)),
    }
    rates = {name: count / statistics.median(times) for name, times in found.items()}
    print(f"\n{count:,} rows; rows per second: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    print("median ratio: " + ", ".join(f"{name} {ratio:.1f}x" for name, ratio in ratios.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": count, "seconds": found, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
