"""Writes `first-session.md`: every command of it is run, and what it printed is what the page shows. The page in
Chinese gets the same commands and outputs, and keeps its words.

    python docs/first_session.py

Takes about two minutes on two CPU cores, and needs no network once the demo model is there. The commands run in an
empty folder; `docs/images/live.svg` is drawn from the run (see `pictures.py`).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pictures import draw_live

from tunesmith.model.demo_model import demo_model_path

PAGE = Path(__file__).with_name("first-session.md")
CHINESE = PAGE.with_name("first-session.zh-TW.md")
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LIVE = Path(__file__).parent / "images" / "live.svg"
RUN = Path("runs") / "first"
COLUMNS = 100
HEADER = """# A first session

<!-- Written by docs/first_session.py, which runs each command below. Change it there. -->

From nothing to a model that has learned something, with what each command prints. It was run on a machine without a
GPU and without a network; times and speeds are that machine's. `tunesmith demo` does much the same on its own.
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A heading, what is to be said, and the command, whose output follows."""

    title: str
    text: str
    command: str


SYSTEM = "Extract the order as JSON."
STEPS = (
    Step(
        title="Does training work here?",
        text="`doctor` looks at the machine and at what is installed, and says how to fix what is missing.",
        command="tunesmith doctor",
    ),
    Step(
        title="Rows to train on",
        text="Order e-mails, each with the JSON that it should become. The first 48 are enough for a first run.",
        command="tunesmith demo --export-data orders && head -n 48 orders/train.jsonl > train.jsonl",
    ),
    Step(
        title="A recipe",
        text="`init` looks at the rows and at the machine, and writes the settings of a run that fits both. It asks\n"
        "for what the options leave out; with `--yes` it takes the defaults.",
        command="tunesmith init recipe.yaml --data train.jsonl --model demo --output runs/first --yes",
    ),
    Step(
        title="What is in the recipe?",
        text="One setting a line, each with its reason. Change what you like.",
        command="cat recipe.yaml",
    ),
    Step(
        title="What is in the data?",
        text="`check` reads it as training would, before any weight is loaded.",
        command="tunesmith check recipe.yaml",
    ),
    Step(
        title="What will be learned?",
        text="`inspect` shows the tokens of the batch: those between ⟦ and ⟧ are trained on.",
        command="tunesmith inspect recipe.yaml --row 1",
    ),
    Step(
        title="Does it fit?",
        text="`plan` counts the memory of each way to train, still without weights; `--gpu t4` counts for a GPU that\n"
        "is elsewhere.",
        command="tunesmith plan recipe.yaml",
    ),
    Step(
        title="Train",
        text="Every setting is an option, too, and overrides the recipe: here one epoch in smaller steps, in place of\n"
        "five, which is enough for a first look. On a terminal one view is drawn in place, as below; in a log there\n"
        "are plain lines.\n\n![The view of a run](images/live.svg)",
        command="tunesmith train recipe.yaml --num-train-epochs 1 --per-device-train-batch-size 2 --learning-rate 2e-3",
    ),
    Step(
        title="How good is it?",
        text="Rows that were not trained on, beside the answers of the model before training, which writes prose and\n"
        "often does not end.",
        command="tunesmith eval runs/first --data orders/held_out.jsonl --limit 8 --max-new-tokens 72 "
        "--metric json_valid --metric json_equal",
    ),
    Step(
        title="Ask it",
        text="An e-mail that was in no row.",
        command=f"tunesmith chat runs/first --system {SYSTEM!r} "
        "--prompt 'Hi, Mia Chen here. Please send 3 desk lamps and 2 chairs by 6 March 2026. It is urgent!'",
    ),
    Step(
        title="How did it go?",
        text="One page with curves, samples and the examples that were hardest.",
        command="tunesmith report runs/first",
    ),
    Step(
        title="Take it along",
        text="A run that trained adapters needs its base model. `merge` writes one model, which loads with plain "
        "`transformers`.\n`tunesmith export` writes a file for llama.cpp and Ollama, and `tunesmith push` publishes.",
        command="tunesmith merge runs/first --output models/orders",
    ),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        page = written(session(folder))
        draw_live(folder / RUN, LIVE)
    PAGE.write_text(page, encoding="utf-8")
    CHINESE.write_text(with_code_of(page, CHINESE.read_text(encoding="utf-8")), encoding="utf-8")


def session(folder: Path) -> list[tuple[Step, str]]:
    """Every step, run in the empty `folder`, and what it showed."""
    demo_model_path()  # converted once: that is told in the first session on a machine, and in no other
    return [(step, neutral(printed(step.command, folder), folder)) for step in STEPS]


def written(shown: list[tuple[Step, str]]) -> str:
    """The page."""
    parts = [HEADER]
    for step, output in shown:
        parts.append(f"\n## {step.title}\n\n{step.text}\n\n```console\n$ {step.command}\n{output}```\n")
    return "".join(parts)


def with_code_of(page: str, translation: str) -> str:
    """`translation` with the blocks of code of `page` in place of its own."""
    blocks = iter(CODE.findall(page))
    return CODE.sub(lambda _: next(blocks), translation)


def printed(command: str, folder: Path) -> str:
    """What `command` writes in `folder`, stderr too, as on a screen. A command that fails ends the script."""
    tool = Path(sys.executable).with_name("tunesmith")
    path = f"{tool.parent}:{os.environ['PATH']}" if tool.exists() else os.environ["PATH"]
    env = os.environ | {"PATH": path, "COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # the page is that of any machine
    shell = shutil.which("bash") or "sh"
    done = subprocess.run(
        [shell, "-c", command],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    text = done.stdout.decode("utf-8", errors="replace")
    if done.returncode:
        raise SystemExit(f"{command}\n{text}exit code {done.returncode}")
    print(f"$ {command}\n{text}")
    return text


def neutral(text: str, folder: Path) -> str:
    """`text` without what is this machine's alone: its folders, and the spaces at the ends of lines."""
    text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    text = text.replace(sys.prefix, "~/venv").replace(str(Path.home()), "~")
    text = re.sub(r"(?<![\w.~])/(?:[\w.+-]+/)+(?=[\w.+-])", "…/", text)
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(lines).strip("\n") + "\n" if any(lines) else ""


if __name__ == "__main__":
    main()
