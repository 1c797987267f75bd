"""How many answers of the demo are exactly right, and what it takes: seed by seed, in each precision.

    python benchmarks/demo.py [--seeds 1 2 3] [--precisions fp32 bf16] [--preferences] [--json out.json]

Each run is what `tunesmith demo --seed N` does, in a process of its own, one after the other. With `--preferences`, it
is what `tunesmith demo --preferences` does: before is after supervised fine-tuning, after is after DPO. CPU seconds,
those of all threads together, say more than the clock where other programs share the cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def outcome(seed: int, precision: str, preferences: bool) -> dict[str, Any]:
    from rich.console import Console

    if preferences:
        from tunesmith.demo.preferences import run_preferences as run
    else:
        from tunesmith.demo.run import run

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = run(Path(folder) / "run", Console(stderr=True), seed, precision)
        files = sorted((Path(folder) / "run").rglob("metrics.jsonl"))
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [entry for entry in map(json.loads, lines) if "tokens_per_second" in entry]
    return {
        "seed": seed,
        "precision": precision,
        "before": done.before.exactly_right,
        "after": done.after.exactly_right,
        **({"pairs": done.pairs} | _interval(done.results[0].difference) if preferences else {}),
        "tokens": sum(entry["tokens"] for entry in steps),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time(),
    }


def _interval(difference: Any) -> dict[str, float]:
    return {"gain": difference.value, "gain_low": difference.low, "gain_high": difference.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--preferences", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("SEED", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(outcome(int(args.child[0]), args.child[1], args.preferences)))
        return
    results = []
    for precision in args.precisions:
        for seed in args.seeds:
            command = [sys.executable, __file__, "--child", str(seed), precision]
            command += ["--preferences"] if args.preferences else []
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(child.stdout.splitlines()[-1]))
            told = "  ".join(f"{key} {value:.4g}" for key, value in results[-1].items() if key != "precision")
            print(f"{precision}  {told}", flush=True)
        mean = statistics.mean(result["after"] for result in results if result["precision"] == precision)
        print(f"{precision}  mean after {mean:.1%}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
