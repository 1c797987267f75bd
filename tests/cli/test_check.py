"""`tunesmith check` reports on the data as training would see it; its exit code says whether training would start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tunesmith.cli.main import app


def check(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    pairs = [("1+1=", "2"), ("1+2=", "3"), ("1+1=", "2")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return path


def test_the_report_has_counts_lengths_and_notes(rows: Path, tiny_model: Path) -> None:
    done = check("--model", tiny_model, "--data", rows)
    assert done.exit_code == 0, done.output
    assert "train: 3 rows, 3 examples, 18 tokens, 6 supervised (33%), longest 6" in done.output
    assert "1 to      6 tokens" in done.output
    assert "note: train: 1 example is an exact copy of another" in done.output
    assert done.output.endswith("ready to train\n")


def test_json_is_for_machines(rows: Path, tiny_model: Path) -> None:
    done = check("--model", tiny_model, "--data", rows, "--eval-data", rows, "--json")
    report = json.loads(done.stdout)
    assert report["splits"]["train"]["counts"]["supervised"] == 6
    assert report["problems"] == []
    assert "eval: 2 examples are in the training data too; its loss will look too good" in report["notes"]


def test_as_a_command_it_loads_no_adapters_and_says_the_same(rows: Path, tiny_model: Path) -> None:
    program = (
        "import sys\n"
        "from tunesmith.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'peft', 'bitsandbytes', 'wandb'} & sys.modules.keys()), file=sys.stderr)"
    )
    command = ["check", "--model", str(tiny_model), "--data", str(rows), "--json"]
    child = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=True)
    assert child.stderr.splitlines()[-1] == "[]"
    assert json.loads(child.stdout) == json.loads(CliRunner().invoke(app, command).stdout)


def test_data_that_would_train_wrongly_exits_with_2(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text(json.dumps({"text": "a text that is cut before its end"}) + "\n")
    done = check("--model", tiny_model, "--data", path, "--max-length", 8)
    assert done.exit_code == 2
    assert "stop: train data: no supervised token ends a text (<|im_end|>)" in done.output
    assert check("--model", tiny_model, "--data", path, "--max-length", 8, "--allow-no-eos").exit_code == 0


@pytest.mark.parametrize(("strategy", "cut"), [("bfd", 1), ("bfd_split", 0), ("wrapped", 0)])
@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
def test_rows_are_cut_as_the_packing_of_the_run_cuts_them(
    strategy: str, cut: int, evaluated: bool, tmp_path: Path, tiny_model: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": "a text over max_length"}) + "\n")
    packing = ("--packing", "--eval-packing", "false") if not evaluated else ("--eval-packing",)
    options = ("--max-length", 16, *packing, "--packing-strategy", strategy, "--json")
    done = check("--model", tiny_model, "--data", path, "--eval-data", path, *options)
    assert done.exit_code == 0, done.output
    splits = json.loads(done.stdout)["splits"]
    found = [splits[name]["counts"]["truncated"] for name in ("train", "eval")]
    assert found == ([1, cut] if evaluated else [cut, 1])


def test_what_train_refuses_to_batch_is_a_problem(rows: Path, tiny_model: Path) -> None:
    done = check("--model", tiny_model, "--data", rows, "--max-tokens-per-batch", 4)
    assert done.exit_code == 2
    assert "stop: train data: row 0 takes 6 tokens, over max_tokens_per_batch: 4" in done.output
    assert check("--model", tiny_model, "--data", rows, "--max-tokens-per-batch", 6).exit_code == 0


def test_a_broken_row_is_named_with_its_line(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n')
    done = check("--model", tiny_model, "--data", path)
    assert done.exit_code == 2
    assert "line 2" in done.output
    assert "both must be text" in done.output


def test_named_sources_are_reported_one_by_one(rows: Path, tmp_path: Path, tiny_model: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\ndata:\n  sums: {{path: {rows}, weight: 2, held_out: 0.34}}\n"
        f"  again: {{path: {rows}, count: 1, columns: {{text: prompt}}}}\n"
    )
    done = check(recipe, "--train-on", "all")
    assert done.exit_code == 0, done.output
    assert "train/sums: 2 rows" in done.output
    assert "\nsums: 1 row, " in done.output
    assert "train: an epoch uses 4 of sums, 1 of again" in done.output


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{path: x.jsonl, wieght: 2}", "unknown key 'wieght'; did you mean 'weight'?"),
        ("{weight: 2}", "source 'a' has no path"),
        ("{path: x.jsonl, weight: much}", "weight of source 'a' is 'much' (text), expected a number"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(source: str, message: str, tmp_path: Path, tiny_model: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\ndata: {{a: {source}}}\n")
    done = check(recipe)
    assert done.exit_code == 2
    assert message in done.output
