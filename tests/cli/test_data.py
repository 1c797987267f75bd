"""A recipe's data may be any files, wherever it names them."""

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.ship.folders import byte_tokenizer
from tunesmith.cli.data import data_recipe, eval_rows, origins, training_rows
from tunesmith.cli.main import app


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the process, with rows that say where they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    for name in ("train", "test"):
        (tmp_path / "parts" / f"{name}.json").write_text(json.dumps({"text": f"parts {name}"}) + "\n")
    both = {name: [{"text": f"both {name}"}] for name in ("train", "test", "more")}
    (tmp_path / "both.json").write_text(json.dumps(both))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    return tmp_path


def texts(rows: object) -> list[str]:
    return [row["text"] for _, row in rows]  # type: ignore[attr-defined]


def test_every_place_of_a_recipe_takes_files_folders_patterns_and_splits(folder: Path) -> None:
    options = ["--model", "demo"]
    plain = data_recipe(
        [*options, "--data", "parts", "--data", "a*", "--data", "both.json", "--eval-data", "both.json"]
    )
    assert texts(training_rows(plain)) == ["parts train", "a", "both train"]
    assert texts(eval_rows(plain)) == ["both test"]
    assert origins(plain)["eval"].name == "both.json"
    split = data_recipe(
        [*options, "--data", "parts", "--split", "test", "--eval-data", "both.json", "--eval-split=more"]
    )
    assert (texts(training_rows(split)), texts(eval_rows(split))) == (["parts test"], ["both more"])
    named = training_rows(
        data_recipe([*options, "--data", "{one: {path: parts, split: test}, two: {path: [a.jsonl.gz, both.json]}}"])
    )
    assert isinstance(named, dict)
    assert {name: texts(source.rows) for name, source in named.items()} == {
        "one": ["parts test"],
        "two": ["a", "both train"],
    }


def test_check_and_inspect_read_a_folder_as_training_does(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    options = ["--model", "model", "--data", "parts", "--eval-data", "parts"]
    checked = CliRunner().invoke(app, ["check", *options, "--json"])
    assert checked.exit_code == 0, checked.output
    splits = json.loads(checked.stdout)["splits"]
    assert {name: split["counts"]["rows"] for name, split in splits.items()} == {"train": 1, "eval": 1}
    shown = CliRunner().invoke(app, ["inspect", *options])
    assert "arts train" in shown.stdout
    assert "arts test" not in shown.stdout
