"""Each recipe in recipes/ runs as it stands: its data are clean, and training starts with a finite loss."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.settings.recipe import resolve

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
QUICK = {
    "--max-steps": "1",
    "--max-length": "160",
    "--per-device-train-batch-size": "1",
    "--gradient-accumulation-steps": "1",
    "--eval-strategy": "no",
    "--save-strategy": "no",
    "--sample-prompts": "0",
    "--self-test": "off",
}
"""A step, as small as it can be; what a recipe is about stays."""
LARGER = {
    "tool_calls": {"--max-length": "384"},
    "kto": {"--per-device-train-batch-size": "2"},
    "grpo": {"--max-length": "null", "--per-device-train-batch-size": "2", "--num-generations": "2"},
}
"""Rows that are longer than that, losses that compare two, and answers whose length has a name of its own."""


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name their data as seen from there."""
    monkeypatch.chdir(REPO)


def test_the_folder_is_complete_and_in_the_table() -> None:
    expected = "chat classification continued_pretraining distill dpo full grpo instruct json_extraction kto lora_4bit"
    assert [*expected.split(), "lora_8bit", "reward", "tool_calls"] == RECIPES
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    used = set()
    for name in RECIPES:
        assert f"| [{name}]({name}.yaml) |" in table
        [path] = [str(source["path"]) for source in resolve(f"recipes/{name}.yaml", {}).sources.values()]
        assert f"](data/{Path(path).name})" in table
        used.add(path)
    assert used == {f"recipes/data/{path.name}" for path in (FOLDER / "data").iterdir()}


@pytest.mark.parametrize("path", sorted((FOLDER / "data").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_rows_are_many_enough_and_different(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 20 <= len(lines) == len(set(lines)) <= 40
    for line in lines:
        row = json.loads(line)
        for message in row.get("messages", []):
            assert message["content"] or message.get("tool_calls")


@pytest.mark.documented
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_checks_clean_and_trains(name: str, tmp_path: Path) -> None:
    checked = CliRunner().invoke(app, ["check", f"recipes/{name}.yaml", "--json"])
    assert checked.exit_code == 0, checked.output
    report = json.loads(checked.stdout)
    assert report["problems"] == []
    for split in report["splits"].values():
        assert split["counts"]["dropped"] == {}
        assert split["counts"]["truncated"] == split["duplicates"] == split["without_end"] == 0
    quick = QUICK | LARGER.get(name, {})
    options = [part for pair in quick.items() for part in pair]
    done = CliRunner().invoke(app, ["train", f"recipes/{name}.yaml", "--output", str(tmp_path / "run"), *options])
    assert done.exit_code == 0, done.output
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [step] = [step for step in steps if "loss" in step]
    assert 0 < step["loss"] < 10 or (name == "grpo" and abs(step["loss"]) < 10)  # where nothing has changed yet, 0
    assert math.isfinite(step["grad_norm"])
    saved = {path.name for path in (tmp_path / "run").iterdir()}
    assert ("model.safetensors" if name == "full" else "adapter_model.safetensors") in saved
