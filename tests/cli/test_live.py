"""`tunesmith train` on a real terminal: what the screen shows at 80 and 40 columns, and after Ctrl-C."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.terminal import Terminal


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "yes"}]}
    rows.write_text(f"{json.dumps(row)}\n" * 16, encoding="utf-8")
    output = ["--output", str(tmp_path / "run"), "--save-steps", "100", "--eval-data", str(rows)]
    steps = ["--max-steps", "5000", "--eval-strategy", "steps", "--eval-steps", "100", "--sample-prompts", "0"]
    return ["train", "--model", str(tiny_model), "--data", str(rows), *output, *steps, "--use-cpu", "--precision=fp32"]


def test_the_screen_shows_the_run_at_any_width_and_ctrl_c_leaves_it_clean(arguments: list[str], home: Path) -> None:
    terminal = Terminal(arguments, columns=80, rows=40)
    terminal.until(lambda text: "saved checkpoint-200" in text)
    shown = terminal.text
    assert re.search(r"training [━╺╸]+ \d+/5000 +\d+% epoch \d+\.\d\d/", shown)
    assert re.search(r"^loss \d\.\d{4} [▁▂▃▄▅▆▇█]{20,}$", shown, re.MULTILINE)
    for number in (r"eval loss \d\.\d{4}", r"tokens/s [\d,]+", r"supervised \d+%", r"memory [\d.,]+ [GM]iB"):
        assert re.search(number, shown), number
    for number in (r"peak [\d.,]+ [GM]iB", r"grad norm \d", r"lr \d\.\d\de-\d\d", r"left \d+:\d\d", r"output /"):
        assert re.search(number, shown), number
    assert "saved checkpoint-100" in shown
    assert "Writing model shards" not in terminal.raw  # a library's bar
    assert terminal.screen.cursor.hidden
    terminal.resize(40, 40)
    terminal.until(lambda text: "saved checkpoint-500" in text)
    assert sum(line.startswith(("training ━", "training ╸")) for line in terminal.lines) == 1
    assert sum(line.startswith("loss ") for line in terminal.lines) == 1
    terminal.child.send("\x03")
    assert terminal.finish() == 130
    assert not terminal.screen.cursor.hidden
    assert "stopping after this step, with a checkpoint" in terminal.text.replace("\n", " ")
    assert "go on:  tunesmith train" in terminal.text.replace("\n", "")
    assert sum(line.startswith(("stopped ━", "stopped ╸")) for line in terminal.lines) == 1
