"""What a reward model says of pairs: how many it has right, and how true the probabilities of its margins are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner, Result

from tests.models import tiny
from tunesmith.cli.main import app
from tunesmith.evaluate.rewards import pair_scores
from tunesmith.runs.calibration import PairScores


def test_bins_are_of_the_probability_that_the_margin_stands_for() -> None:
    """sigmoid(0.2) = 0.5498 and sigmoid(3) = 0.9526; of the four pairs of the first bin, two are right."""
    rewards = [(0.2, 0.0), (1.2, 1.0), (0.0, 0.2), (0.3, 0.3), (3.0, 0.0), (2.0, -1.0)]
    scores = pair_scores("held out", rewards, seed=0)
    assert scores.accuracy[0] == pytest.approx(4 / 6)
    assert scores.accuracy[1:] == pytest.approx((0.3000, 0.9032), abs=1e-4)  # Wilson's interval
    assert scores.margin[0] == pytest.approx((0.2 + 0.2 - 0.2 + 0.0 + 3.0 + 3.0) / 6)
    first, last = scores.bins
    assert (first.low, first.high, first.pairs, first.observed) == (0.5, 0.6, 4, 0.5)
    assert first.predicted == pytest.approx((3 * 0.549834 + 0.5) / 4, abs=1e-6)
    assert (last.low, last.high, last.pairs, last.observed) == (0.9, 1.0, 2, 1.0)
    assert last.predicted == pytest.approx(0.952574, abs=1e-6)
    assert scores.error == pytest.approx((4 * (first.predicted - 0.5) + 2 * (1 - last.predicted)) / 6)


PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Is it {word}?"}],
        "chosen": [{"role": "assistant", "content": word}],
        "rejected": [{"role": "assistant", "content": "no " * (i % 3) + "!"}],
    }
    for i, word in enumerate(("yes", "perhaps", "so", "it", "why", "here", "there"))
]


@pytest.fixture
def run(tmp_path: Path, tokenizer: Any) -> Path:
    model = tiny("llama", len(tokenizer), auto=AutoModelForSequenceClassification, num_labels=1)
    with torch.no_grad():
        model.score.weight.mul_(10)  # type: ignore[union-attr,operator]
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return tmp_path / "run"


def ask(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_rewards_are_those_of_plain_transformers(run: Path, tmp_path: Path, tokenizer: Any) -> None:
    result = ask(run, "--data", tmp_path / "pairs.jsonl", "--output", tmp_path / "rewards.jsonl", "--json")
    assert result.exit_code == 0, result.output
    model = AutoModelForSequenceClassification.from_pretrained(run).eval()
    expected = []
    for row in PAIRS:
        texts = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        ids = [tokenizer.apply_chat_template(text, return_dict=True, return_tensors="pt") for text in texts]
        with torch.no_grad():
            expected.append([float(model(**inputs).logits) for inputs in ids])
    lines = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    found = torch.tensor([[line["chosen"], line["rejected"]] for line in lines])
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    right = sum(chosen > rejected for chosen, rejected in expected)
    told = json.loads(result.stdout)
    assert told["pairs"] == 7
    assert told["accuracy"][0] == pytest.approx(right / 7)
    kept = PairScores.read(run)
    assert kept is not None
    assert (kept.data, kept.pairs) == ("pairs.jsonl", 7)
    assert kept.accuracy[0] == pytest.approx(right / 7)


def test_what_is_shown_and_what_is_refused(run: Path, tmp_path: Path) -> None:
    shown = ask(run, "--data", tmp_path / "pairs.jsonl", "--limit", 5)
    assert shown.exit_code == 0, shown.output
    assert "of 5 pairs; in brackets: 95% intervals." in shown.stdout
    assert "calibration error: " in shown.stdout
    refused = ask(run, "--data", tmp_path / "pairs.jsonl", "--metric", "rouge", "--no-base")
    assert refused.exit_code == 2
    assert "is a reward model, which is asked nothing: leave out --metric, --no-base" in refused.stderr
    (tmp_path / "texts.jsonl").write_text('{"text": "so"}\n')
    assert "no pair: the columns are text" in ask(run, "--data", tmp_path / "texts.jsonl").stderr
