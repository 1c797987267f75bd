"""Every file of the real data to supervised tokens, and batches of any size alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.styles import bytes_, words
from tunesmith.data.arrow import FlatExamples
from tunesmith.data.formats import FormatOptions, parse_rows
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder, encoded
from tunesmith.errors import TunesmithError
from tunesmith.types import IGNORE_INDEX


def rows_of(path: Path, most: int = 400) -> list[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [(f"{path.name}, row {i}", row) for i, row in enumerate(rows[:most])]


def encode(rows: Any, tokenizer: Any, formats: FormatOptions, **options: Any) -> tuple[list[FlatExamples], Counts]:
    counts = Counts()
    encoder = Encoder(tokenizer, EncodeOptions(max_length=None, **options))
    return list(encoded(parse_rows(rows, formats), encoder, counts)), counts


GSM8K = {"prompt": "question", "completion": "answer"}


@pytest.mark.parametrize(
    ("name", "columns", "train_on"),
    [
        ("movie_reviews.jsonl", {}, None),
        ("c4_demo.jsonl", {}, None),
        ("alpaca_en_demo.json", {}, None),
        ("alpaca_zh_demo.json", {}, "assistant"),
        ("sharegpt_identity.json", {}, "assistant"),
        ("sharegpt_identity.json", {}, "last_assistant"),
        ("glaive_toolcall_en_demo.json", {}, "assistant"),
        ("gsm8k_train.jsonl", GSM8K, None),
        ("gsm8k_test.jsonl", {"instruction": "question", "output": "answer"}, None),
        ("dpo_en_demo.json", {"prompt": "conversations", "completion": "chosen"}, None),
    ],
)
def test_every_row_of_the_real_data_is_prepared(shared_data: Path, name: str, columns: Any, train_on: Any) -> None:
    tokenizer = bytes_("qwen3", "<|im_end|>")
    rows = rows_of(shared_data / name)
    batches, counts = encode(rows, tokenizer, FormatOptions(columns=columns), train_on=train_on)
    assert counts.rows == counts.examples == sum(len(batch.lengths) for batch in batches) == len(rows)
    assert counts.dropped == {}
    assert counts.ends == {tokenizer.eos_token_id: len(rows)}
    labels, ids = (np.concatenate([getattr(batch, column) for batch in batches]) for column in ("labels", "ids"))
    assert counts.tokens == len(ids)
    assert counts.supervised == (labels != IGNORE_INDEX).sum()
    assert (labels[labels != IGNORE_INDEX] == ids[labels != IGNORE_INDEX]).all()
    said = tokenizer.decode(labels[labels != IGNORE_INDEX])
    if name == "glaive_toolcall_en_demo.json":
        assert '<tool_call>\n{"name": "search_recipes", "arguments": {"ingredients": ["chicken", ' in said
        assert "<tool_response>" not in said
        assert "<tools>" not in said
    if name == "gsm8k_train.jsonl":
        assert said.startswith(rows[0][1]["answer"] + "<|im_end|>" + rows[1][1]["answer"])


def test_preference_pairs_of_the_real_data_are_named(shared_data: Path) -> None:
    with pytest.raises(TunesmithError, match=r"^dpo_en_demo\.json, row 0: these are preference pairs"):
        encode(rows_of(shared_data / "dpo_en_demo.json"), bytes_("qwen3", "<|im_end|>"), FormatOptions())
    with pytest.raises(TunesmithError, match=r"^kto_en_demo\.json, row 0: 'label' is true: .* \(KTO\)"):
        encode(rows_of(shared_data / "kto_en_demo.json"), bytes_("qwen3", "<|im_end|>"), FormatOptions())


def test_tool_calls_that_a_template_does_not_know_are_refused(shared_data: Path) -> None:
    rows = rows_of(shared_data / "glaive_toolcall_en_demo.json")
    with pytest.raises(TunesmithError, match="the chat template does not show tool calls"):
        encode(rows, bytes_("chatml", "<|im_end|>"), FormatOptions())


def test_rows_give_the_same_examples_in_batches_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[str, Any]] = [
        (f"row {i}", {"prompt": "Hi" * (i % 3), "completion": " Yes", "weight": 0.5 if i == 4 else None})
        for i in range(7)
    ]
    made = []
    for size in (1000, 2, 1):
        monkeypatch.setattr("tunesmith.data.tokenize.BATCH_ROWS", size)
        batches, counts = encode(rows, words("", "</s>"), FormatOptions())
        ids, labels = (
            np.concatenate([getattr(batch, name) for batch in batches]).tolist() for name in ("ids", "labels")
        )
        made.append((ids, labels, counts))
        (weights,) = [batch.weights for batch in batches if batch.weights is not None]
        assert weights[weights != 1].tolist() == [0.0, 0.5, 0.5, 0.5]
    assert made[0] == made[1] == made[2]
