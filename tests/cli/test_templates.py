"""`tunesmith templates`: a table of templates and kinds, the texts of a kind, and JSON."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.data.styles import TEMPLATES
from tunesmith.cli.main import app

RUNNER = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("qwen35", "llama2"):
        (tmp_path / f"{name}.jinja").write_text((TEMPLATES / f"{name}.jinja").read_text())
    (tmp_path / "torn.jinja").write_text("{% for %}")
    return tmp_path


def test_a_folder_gives_a_row_a_template_and_the_reasons(folder: Path) -> None:
    result = RUNNER.invoke(app, ["templates", str(folder)])
    assert result.exit_code == 0
    rows = {words[0]: words[1:] for line in result.stdout.splitlines() if (words := line.split())}
    assert rows["qwen35"][:8] == ["whole", "whole", "each", "each", "each", "whole", "whole", "whole"]
    assert rows["qwen35"][-1] == "enable_thinking=False"
    assert rows["llama2"] == ["whole"] * 6 + ["refused"] * 3
    assert "refused: the chat template does not show tool calls" in result.stdout
    assert "1 template: llama2" in result.stdout
    assert "broken: torn: the chat template can't be read" in result.stdout
    assert "2 templates; trained: plain 100.0%" in result.stdout


def test_the_texts_of_a_kind_are_shown_with_what_is_supervised(folder: Path) -> None:
    result = RUNNER.invoke(app, ["templates", str(folder / "qwen35.jinja"), "--show", "system"])
    assert result.exit_code == 0
    assert result.stdout == (
        "qwen35.jinja: system: whole\nrendered with {'enable_thinking': False}\n"
        "<|im_start|>system\nAnswer in few words.<|im_end|>\n<|im_start|>user\nWho wrote Faust?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n[[Goethe.<|im_end|>]]\n\n---\n"
    )


def test_a_model_has_its_own_tokenizer_and_json_has_it_all(tiny_model: Path) -> None:
    result = RUNNER.invoke(app, ["templates", str(tiny_model), "--json"])
    assert result.exit_code == 0
    (value,) = json.loads(result.stdout)["templates"].values()
    assert value["kinds"]["plain"] == {"whole": 3}
    assert value["refusals"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}/none"], "there is no .jinja file and no tokenizer in it"),
        (["{folder}/torn.jinja"], "torn.jinja: the chat template can't be read"),
        (["{folder}", "--show", "all"], "--show all: choose plain | system | multi-turn"),
    ],
)
def test_mistakes_are_named(folder: Path, words: list[str], message: str) -> None:
    (folder / "none").mkdir()
    result = RUNNER.invoke(app, ["templates", *(word.format(folder=folder) for word in words)])
    assert result.exit_code == 2
    assert message in result.stderr
