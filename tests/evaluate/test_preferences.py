"""`tunesmith eval` on pairs: rewards are those of whole forwards, and their share and mean have intervals."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from tests.ship.runs import adapter_run, record
from tunesmith.cli.eval import evaluate
from tunesmith.cli.main import Commands
from tunesmith.model.load import load_run
from tunesmith.terminal.output import Application

app = Application(cls=Commands)
app.command("eval")(evaluate)
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SIDES = [(f" {word}", f" not {word}, no") for word in WORDS]
PAIRS = [
    dict(zip(("prompt", "chosen", "rejected"), (f"say {i}:", *sides[:: 1 if i % 3 else -1]), strict=True))
    for i, sides in enumerate(SIDES)
]


@app.callback()
def options() -> None:
    """So that the command keeps its name."""


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    settings = {"beta": 0.5, "max_length": 64}
    return adapter_run(tmp_path / "run", tiny_model, run_record=record(trainer="dpo", settings=settings))


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}])
    )
    return str(file)


def evaluated(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def log_probabilities(model: Any, tokenizer: Any) -> list[list[float]]:
    """Of the chosen and of the rejected answer of each pair, by forwards of the whole text."""
    found = []
    for row in PAIRS:
        begin, sides = len(tokenizer(row["prompt"])["input_ids"]), []
        for answer in (row["chosen"], row["rejected"]):
            ids = [*tokenizer(row["prompt"] + answer)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)
            sides.append(float(logits[torch.arange(len(ids) - 1), ids[1:]][begin - 1 :].sum()))
        found.append(sides)
    return found


def test_rewards_are_beta_times_what_the_run_adds_to_its_base(run: Path, pairs: str, tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    result = evaluated(run, "--data", pairs, "--output", output, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    model, tokenizer = cast(Any, load_run(str(run)))
    tuned = log_probabilities(model, tokenizer)
    with model.disable_adapter():
        base = log_probabilities(model, tokenizer)
    margins = [0.5 * ((t[0] - b[0]) - (t[1] - b[1])) for t, b in zip(tuned, base, strict=True)]
    accuracy, margin, likelier = found["metrics"]
    assert (found["rows"], found["beta"]) == (10, 0.5)
    assert accuracy["tuned"]["value"] == sum(value > 0 for value in margins) / 10
    assert accuracy["tuned"]["low"] < accuracy["tuned"]["value"] < accuracy["tuned"]["high"]
    assert margin["tuned"]["value"] == pytest.approx(sum(margins) / 10, abs=1e-4)
    assert margin["tuned"]["low"] < margin["tuned"]["value"] < margin["tuned"]["high"]
    assert likelier["tuned"]["value"] == sum(chosen > rejected for chosen, rejected in tuned) / 10
    assert likelier["base"]["value"] == sum(chosen > rejected for chosen, rejected in base) / 10
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["tuned"]["chosen"] for line in lines] == pytest.approx([chosen for chosen, _ in tuned], abs=1e-4)
    assert [line["base"]["rejected"] for line in lines] == pytest.approx([rejected for _, rejected in base], abs=1e-4)
    [(reason, left_out)] = found["left_out"].items()
    assert left_out["rows"] == 1, reason


def test_pairs_are_shown_and_what_is_of_answers_is_refused(run: Path, pairs: str) -> None:
    shown = evaluated(run, "--data", pairs, "--no-base", "--limit", 5)
    assert shown.exit_code == 0, shown.output
    assert f"5 pairs, as {run} sees them"[:40] in " ".join(shown.stdout.split())
    assert "chosen is likelier" in shown.stdout
    assert "reward accuracy" not in shown.stdout
    refused = evaluated(run, "--data", pairs, "--metric", "rouge")
    assert refused.exit_code == 2
    assert "has pairs, whose answers are not generated: leave out --metric" in refused.stderr
