"""`tunesmith train` on a real terminal: what the screen shows at 80 and 40 columns, and after Ctrl-C."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.terminal import Terminal

pytestmark = pytest.mark.slow


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "yes"}]}
    rows.write_text(f"{json.dumps(row)}\n" * 16, encoding="utf-8")
    output = ["--output", str(tmp_path / "run"), "--save-steps", "20", "--eval-data", str(rows)]
    steps = ["--max-steps", "5000", "--eval-strategy", "steps", "--eval-steps", "20", "--sample-prompts", "0"]
    return ["train", "--model", str(tiny_model), "--data", str(rows), *output, *steps, "--use-cpu", "--precision=fp32"]


def test_the_screen_shows_the_run_at_any_width_and_ctrl_c_leaves_it_clean(arguments: list[str], home: Path) -> None:
    terminal = Terminal(arguments, columns=80, rows=40)
    terminal.until(lambda text: "saved checkpoint-40" in text)
    shown = terminal.text
    assert re.search(r"training [━╺╸]+ \d+/5000 +\d+% epoch \d+\.\d\d/", shown)
    assert re.search(r"^loss \d\.\d{4} [▁▂▃▄▅▆▇█]{20,}$", shown, re.MULTILINE)
    for number in (r"eval loss \d\.\d{4}", r"tokens/s [\d,]+", r"supervised \d+%", r"memory [\d.,]+ [GM]B"):
        assert re.search(number, shown), number
    for number in (r"peak [\d.,]+ [GM]B", r"grad norm \d", r"lr \d\.\d\de-\d\d", r"left \d+:\d\d", r"output /"):
        assert re.search(number, shown), number
    assert "saved checkpoint-20" in shown
    assert "Writing model shards" not in terminal.raw  # a library's bar
    assert terminal.screen.cursor.hidden
    terminal.resize(40, 40)
    terminal.until(lambda text: "saved checkpoint-60" in text)
    assert sum(line.startswith(("training ━", "training ╸")) for line in terminal.lines) == 1
    assert sum(line.startswith("loss ") for line in terminal.lines) == 1
    terminal.type("\x03")
    assert terminal.finish() == 130
    assert not terminal.screen.cursor.hidden
    assert "stopping after this step, with a checkpoint" in terminal.text.replace("\n", " ")
    assert "go on:  tunesmith train" in terminal.text.replace("\n", "")
    assert sum(line.startswith(("stopped ━", "stopped ╸")) for line in terminal.lines) == 1


NUMBERS = r"(best|elapsed|eval loss|grad norm|left|loss|lr|memory|peak|supervised|tokens/s) "


def test_no_line_of_the_view_breaks_in_a_narrow_window(arguments: list[str], home: Path) -> None:
    terminal = Terminal([*arguments, "--max-steps", "60"], columns=40, rows=40)
    terminal.until(lambda text: "saved checkpoint-40" in text)
    assert_whole(terminal, "training")
    assert terminal.finish() == 0
    assert_whole(terminal, "trained")
    assert "saved checkpoint-60" in terminal.text


def assert_whole(terminal: Terminal, phase: str) -> None:
    """The view is there once, each of its lines begins with what it tells, and none fills its row."""
    lines = [line for line in terminal.lines if line]
    [first] = [i for i, line in enumerate(lines) if re.match(rf"{phase} .*\d+/60 +\d+%", line)]
    [last] = [i for i, line in enumerate(lines) if line.startswith("output ")]
    assert last > first + 3
    assert all(re.match(rf"{NUMBERS}|• (saved|the)|\d+ earlier", line) for line in lines[first + 1 : last]), lines
    assert all(len(line) < terminal.screen.columns for line in lines[first : last + 1])


def test_in_a_ci_job_with_a_terminal_there_are_plain_lines(arguments: list[str], home: Path, tmp_path: Path) -> None:
    short = [*arguments, "--max-steps", "12", "--eval-steps", "6", "--logging-steps", "4"]
    terminal = Terminal(short, columns=80, rows=40, env={"CI": "true"})
    assert terminal.finish() == 0
    assert re.findall(r"^step (\d+)/12  loss", terminal.text, re.MULTILINE) == ["4", "8", "12"]
    assert re.findall(r"^step (\d+)  eval loss", terminal.text, re.MULTILINE) == ["6", "12"]
    assert "\x1b" not in terminal.raw  # no colour, no movement
    assert "\r" not in terminal.raw.replace("\r\n", "\n")  # what draws a bar in place
    run, rows = str(tmp_path / "run"), str(tmp_path / "rows.jsonl")
    terminal = Terminal(["eval", run, "--data", rows, "--max-new-tokens", "2"], env={"CI": "true"})
    assert terminal.finish() == 0
    assert sum("16/16" in line for line in terminal.lines) == 1
    assert re.sub(r"\x1b\[[\d;]*m", "", terminal.raw).count("\x1b") == 0  # but for the bold words of a table
    assert "\r" not in terminal.raw.replace("\r\n", "\n")
