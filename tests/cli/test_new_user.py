"""A first session as a new user has it: the installed command, an empty folder, no terminal and no network."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).parent / "tunesmith"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command, what it says, and the files that are there after it."""

    command: str
    says: tuple[str, ...]
    leaves: tuple[str, ...] = ()
    tells: tuple[str, ...] = ()
    """How the lines on stderr begin, all of them: nothing is there that a user can do nothing about."""


STEPS = (
    Step(
        command="init --yes --model base --data rows.jsonl --output runs/first",
        says=("wrote recipe.yaml. Next:", "tunesmith check recipe.yaml"),
        leaves=("recipe.yaml",),
    ),
    Step(command="check recipe.yaml", says=("24 rows, 24 examples",)),
    Step(command="inspect recipe.yaml --row 1", says=("⟦",)),
    Step(command="plan recipe.yaml", says=("lora", "fits")),
    Step(
        command="train recipe.yaml --max-steps 3 --logging-steps 1 --use-cpu --precision fp32",
        says=(
            "saved the adapters to runs/first",
            "how it went:  runs/first/report.html\n",
            "tunesmith chat runs/first",
        ),
        leaves=("runs/first/adapter_model.safetensors", "runs/first/run.json", "runs/first/report.html"),
    ),
    Step(command="report runs/first --output page.html", says=("wrote page.html (",), leaves=("page.html",)),
    Step(
        command="eval runs/first --data held_out.jsonl --max-new-tokens 4 --output answers.jsonl",
        says=("exact_match",),
        leaves=("answers.jsonl",),
        tells=("metrics: exact_match", "answers, tuned ━", "answers, base ━"),
    ),
    Step(command="chat runs/first --prompt 'What is 7 + 1?' --max-new-tokens 4", says=()),
    Step(
        command="merge runs/first --output merged",
        says=("merged: 14 layers merged (LoRA adapters)", "greedy tokens equal"),
        leaves=("merged/model.safetensors", "merged/config.json"),
        tells=(
            "Merging the adapters of 14 layers with the weights of ",
            "Comparing what was written with the adapters",
        ),
    ),
    Step(
        command="push runs/first --repo me/first --base-model me/base --dry-run",
        says=("README.md", "a dry run: nothing was sent"),
    ),
    Step(command="doctor", says=("Training works here.",)),
)


def sums(first: int, last: int) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(first, last)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def tunesmith(step: Step, folder: Path) -> "subprocess.CompletedProcess[str]":
    """As someone starts it who has set nothing."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TUNESMITH_", "PYTEST_"))}
    env |= {"TUNESMITH_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(COMMAND), *shlex.split(step.command)],
        cwd=folder / "work",
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.documented
@pytest.mark.timeout(900)
def test_every_command_of_a_first_session_does_what_it_says(tiny_model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "base").symlink_to(tiny_model)
    (work / "rows.jsonl").write_text(sums(0, 24))
    (work / "held_out.jsonl").write_text(sums(24, 28))
    for step in STEPS:
        done = tunesmith(step, tmp_path)
        shown = f"$ tunesmith {step.command}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, shown
        assert "Traceback" not in shown
        assert [text for text in step.says if text not in done.stdout] == [], shown
        assert [name for name in step.leaves if not (work / name).is_file()] == [], shown
        told = done.stderr.splitlines()
        assert [line for line, begins in zip(told, step.tells, strict=False) if not line.startswith(begins)] == [], (
            shown
        )
        assert len(told) == len(step.tells), shown
