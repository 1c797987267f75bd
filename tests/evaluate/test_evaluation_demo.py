"""`tunesmith eval` with a real model and real questions."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.test_evaluation import RUNNER, app

pytestmark = pytest.mark.slow
COLUMNS = ("--columns", "{prompt: question, completion: answer}")


def evaluated(data: Path, *arguments: str) -> dict[str, Any]:
    result = RUNNER.invoke(app, ["eval", "demo", "--data", str(data), "--json", *arguments])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_demo_model_knows_a_capital_and_ends_its_answer(tmp_path: Path) -> None:
    rows = [
        {"question": "What is the capital of France?", "answer": "Paris"},
        {"question": "What is the capital of Japan?", "answer": "Tokyo"},
        {"question": "What is the capital of Germany?", "answer": "an animal"},
    ]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    found = evaluated(data, *COLUMNS, "--metric", "contains", "--metric", "rouge", "--max-new-tokens", "24")
    contains, rouge = found["metrics"]
    assert contains["tuned"]["value"] == pytest.approx(2 / 3)
    assert 0 < rouge["tuned"]["value"] < 1
    assert found["cut_off"] == {"tuned": 0}


def test_gsm8k_is_scored_by_its_numbers(shared_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = ("--limit", "2", "--max-new-tokens", "24", "--output", str(output))
    found = evaluated(shared_data / "gsm8k_test.jsonl", *COLUMNS, *arguments)
    assert [(metric["name"], metric["rows"]) for metric in found["metrics"]] == [("number", 2)]
    assert found["cut_off"]["tuned"] == 2  # no answer to such a question is so short
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert all("####" in line["expected"] and line["tuned"]["answer"] for line in lines)
