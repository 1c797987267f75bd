"""What learning from rewards brings on a task that can be counted, what a shared prompt saves, and steps beside TRL.

    python benchmarks/policy.py score [--seeds 1 2] [--sft-steps 12] [--steps 60] [--json out.json]
    python benchmarks/policy.py sharing [--prompts 200 600] [--rounds 3] [--json out.json]
    python benchmarks/policy.py beside [--prompts 0 200] [--steps 4] [--rounds 3] [--json out.json]

LoRA on the demo model, in fp32.

    score    sums of two numbers of two digits. A short supervised run on some, then GRPO on others, with exact_match as
             the reward; before and after it, the share of right answers to 300 held-out sums: the likeliest answers,
             and drawn ones, with intervals of 95% (Wilson)
    sharing  a step on two groups of 8 answers of 32 tokens that are given, so that only training is measured; with the
             prompt computed once, and with `share_prefix: off`
    beside   steps on the same prompts, sums of some 30 tokens, alone or behind a system message of 200 words, 8 answers
             to each, the same sampling, in turns with TRL's GRPOTrainer; of the seconds of a step, those in which
             answers are drawn

In `sharing` and `beside`, each way is a process of its own, and they take turns. Seconds are by the clock, CPU seconds
of all threads; the first step of each process is left out.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

GROUP = 8
HELD_OUT = 300
ANSWER = 32
"""Tokens of a given answer."""
WORDS = ("ship", "house", "river", "green", "seven", "door", "light", "paper")
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


class Task:
    """Sums of two numbers of two digits: three parts that have no sum in common."""

    def __init__(self, seed: int, learned: int) -> None:
        pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
        Random(seed).shuffle(pairs)
        rows = [{"prompt": [{"role": "user", "content": f"{a} + {b} = ?"}], "answer": str(a + b)} for a, b in pairs]
        self.held_out, self.shown, self.asked = rows[:HELD_OUT], rows[HELD_OUT:][:learned], rows[HELD_OUT + learned :]


def wilson(right: int, count: int) -> tuple[float, float]:
    """The interval of 95% of a share."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def common(folder: str, **more: Any) -> dict[str, Any]:
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return settings | {"output_dir": folder, "precision": "fp32", "self_test": "off"} | more


def score(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from peft import LoraConfig

    from tunesmith import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    from tunesmith.model.generate import generate

    def measured(trainer: Any, task: Task) -> dict[str, Any]:
        found = {}
        for name, temperature in (("likeliest", 0.0), ("drawn", 1.0)):
            asked = [row["prompt"] for row in task.held_out]
            answers = generate(
                trainer.model, trainer.processing_class, asked, max_new_tokens=8, temperature=temperature
            )
            pairs = zip(answers, task.held_out, strict=True)
            right = sum(answer.strip() == row["answer"] for answer, row in pairs)
            found[name] = {"share": right / HELD_OUT, "interval": wilson(right, HELD_OUT)}
        return found

    outcomes = []
    for seed in arguments.seeds:
        folder, task = tempfile.mkdtemp(), Task(seed, 16 * arguments.sft_steps)
        shown = [{"messages": [*row["prompt"], {"role": "assistant", "content": row["answer"]}]} for row in task.shown]
        settings = common(f"{folder}/sft", learning_rate=1e-3, max_steps=arguments.sft_steps, seed=seed)
        supervised = SFTTrainer(
            "demo",
            SFTConfig(**settings, per_device_train_batch_size=16, train_on="assistant"),
            train_dataset=shown,
            peft_config=LoraConfig(**LORA),
        )
        supervised.train()
        supervised.save_model()
        started = time.perf_counter()
        settings = common(f"{folder}/grpo", learning_rate=arguments.rate, max_steps=arguments.steps, seed=seed)
        trainer = GRPOTrainer(
            f"{folder}/sft",
            "exact_match",
            GRPOConfig(
                **settings,
                per_device_train_batch_size=8 * GROUP,
                num_generations=GROUP,
                max_completion_length=8,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=5,
            ),
            train_dataset=task.asked,
        )
        before = measured(trainer, task)
        trainer.train()
        after = measured(trainer, task)
        minutes = (time.perf_counter() - started) / 60
        outcomes.append({"seed": seed, "before": before, "after": after, "minutes": minutes, "run": f"{folder}/grpo"})
        for name in ("likeliest", "drawn"):
            (low, high), (lower, higher) = before[name]["interval"], after[name]["interval"]
            print(
                f"seed {seed}, {name}: {before[name]['share']:.1%} ({low:.0%} to {high:.0%}) -> "
                f"{after[name]['share']:.1%} ({lower:.0%} to {higher:.0%}), {minutes:.1f} minutes with both counts",
                flush=True,
            )
    return outcomes


def clock_of_steps() -> Any:
    """A callback that stamps the end of each step: seconds, and CPU seconds."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.stamps: list[tuple[float, float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.stamps.append((time.perf_counter(), time.process_time()))

    return Clock()


def told(stamps: list[tuple[float, float]], drawn: list[float] | None = None) -> None:
    """Print the mean seconds of a step but for the first, those of drawing, and the most memory."""
    steps = len(stamps) - 1
    seconds, cpu = ((stamps[-1][i] - stamps[0][i]) / steps for i in range(2))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    more = {} if drawn is None else {"drawing": sum(drawn[1:]) / steps}
    print(json.dumps({"seconds": seconds, "cpu": cpu, "memory_mb": memory} | more))


def timed(function: Any, seconds: list[float]) -> Any:
    """The function, which notes how long each call takes."""

    def call(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            seconds.append(time.perf_counter() - started)

    return call


def share(way: str, prompt: int, steps: int) -> None:
    """Train on answers that are given, behind prompts of so many tokens."""
    from peft import LoraConfig

    from tunesmith import GRPOConfig, GRPOTrainer
    from tunesmith.train.generator import Generated

    random = Random(0)

    def given(prompts: Any, sampling: Any) -> list[Generated]:
        return [Generated(ids=[random.randint(100, 40000) for _ in range(ANSWER)], finish="length") for _ in prompts]

    def chance(completions: Any) -> list[float]:
        return [random.random() for _ in completions]

    rows = [{"prompt": " ".join(random.choice(WORDS) for _ in range(prompt - 1))} for _ in range(2 * (steps + 1))]
    settings = common(tempfile.mkdtemp(), max_steps=steps + 1, share_prefix=way, learning_rate=1e-5)
    args = GRPOConfig(**settings, per_device_train_batch_size=2 * GROUP, max_completion_length=ANSWER)
    clock = clock_of_steps()
    GRPOTrainer("demo", chance, args, rows, peft_config=LoraConfig(**LORA), callbacks=[clock], generator=given).train()
    told(clock.stamps)


def steps_of(way: str, prompt: int, steps: int) -> None:
    """Steps on the same prompts by one of the two, with a system message of so many words; none for 0."""
    from peft import LoraConfig

    from tunesmith.model.demo_model import demo_model_path

    task, clock, random = Task(0, 16), clock_of_steps(), Random(0)
    told_before = (
        [{"role": "system", "content": " ".join(random.choice(WORDS) for _ in range(prompt))}] if prompt else []
    )
    rows = [row | {"prompt": told_before + row["prompt"]} for row in task.asked]
    same = {
        "output_dir": tempfile.mkdtemp(),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": steps + 1,
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 4 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": ANSWER,
        "gradient_checkpointing": False,
    }

    def varied(completions: Any, **_: Any) -> list[float]:
        """Differs within each group: where all rewards are equal, there is nothing to train, and our step ends."""
        return [sum(map(ord, text[0]["content"])) % 97 / 97 for text in completions]

    common_arguments = {"reward_funcs": varied, "peft_config": LoraConfig(**LORA), "callbacks": [clock]}
    drawn = list[float]()
    if way == "tunesmith":
        from tunesmith import GRPOConfig, GRPOTrainer
        from tunesmith.train.generator import OwnDecoding

        OwnDecoding.__call__ = timed(OwnDecoding.__call__, drawn)  # type: ignore[method-assign]
        GRPOTrainer("demo", args=GRPOConfig(**same), train_dataset=rows, **common_arguments).train()
    else:
        import trl
        from datasets import Dataset
        from transformers import GenerationMixin

        GenerationMixin.generate = timed(GenerationMixin.generate, drawn)
        trl.GRPOTrainer(
            str(demo_model_path()),
            args=trl.GRPOConfig(**same),
            train_dataset=Dataset.from_list(rows),
            **common_arguments,
        ).train()
    told(clock.stamps, drawn)


def in_turns(cases: dict[str, list[str]], rounds: int) -> list[dict[str, Any]]:
    """Each case a process, in turns; the medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for number in range(rounds):
        for name, options in cases.items():
            command = [sys.executable, __file__, *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"round {number + 1}, {name}: {found[name][-1]}", flush=True)
    outcomes = []
    for name, results in found.items():
        medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
        outcomes.append({"case": name, "rounds": results, **medians})
        print(f"{name}: {60 / medians['seconds']:.2f} steps a minute, {medians['cpu']:.1f} CPU s, ", end="")
        print(f"{medians['memory_mb']:,.0f} MiB", end="")
        print(f", drawing {medians['drawing'] / medians['seconds']:.0%}" if "drawing" in medians else "")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["score", "sharing", "beside", "one-share", "one-side"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sft-steps", type=int, default=12)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--prompts", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    steps = arguments.steps or {"score": 60, "sharing": 3, "one-share": 3}.get(arguments.what, 4)
    if arguments.what == "one-share":
        return share(arguments.way, arguments.prompts[0], steps)
    if arguments.what == "one-side":
        return steps_of(arguments.way, arguments.prompts[0], steps)
    if arguments.what == "score":
        arguments.steps = steps
        outcomes = score(arguments)
    elif arguments.what == "sharing":
        cases = {
            f"{tokens} tokens, share_prefix {way}": [
                *("one-share", "--way", way, "--prompts", str(tokens), "--steps", str(steps))
            ]
            for tokens in arguments.prompts or (200, 600)
            for way in ("auto", "off")
        }
        outcomes = in_turns(cases, arguments.rounds)
    else:
        cases = {
            f"{words} words before, {way}": ["one-side", "--way", way, "--prompts", str(words), "--steps", str(steps)]
            for words in arguments.prompts or (0, 200)
            for way in ("tunesmith", "trl")
        }
        outcomes = in_turns(cases, arguments.rounds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(outcomes, indent=2) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
