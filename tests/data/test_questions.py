"""Rows that only ask: what is read of them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tunesmith import DataSource, GRPOConfig, TunesmithError
from tunesmith.data.questions import Questions
from tunesmith.data.samplers import Generations

TALK = {"prompt": [{"from": "human", "value": "Hi"}], "answer": {"a": [1, None]}}


@pytest.fixture
def questions_of(tokenizer: Any, tmp_path: Path) -> Any:
    def make(**settings: Any) -> Questions:
        return Questions(GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **settings), tokenizer)

    return make


def test_texts_are_gone_on_with_and_messages_are_answered(questions_of: Any, tokenizer: Any) -> None:
    questions = questions_of()
    dataset = questions([TALK, {"prompt": "2 + 2 ="}], "train")
    assert tokenizer.decode(dataset[0]["prompt_ids"]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(dataset[1]["prompt_ids"]) == "2 + 2 ="
    assert questions.every[0].prompt == [{"role": "user", "content": "Hi"}]
    assert questions.every[0].row["answer"] == {"a": [1, None]}  # as the user gave it
    assert questions.columns["train"] == {"prompt", "answer"}
    assert questions.preflight().notes == ["train: 2 prompts of 7 to 21 tokens"]


def test_another_column_answers_and_held_out_rows(questions_of: Any) -> None:
    questions = questions_of(columns={"prompt": "question"})
    rows = Dataset.from_list([{"question": f"{i}?"} for i in range(10)])
    train, held_out = questions.everything({"sums": DataSource(rows=rows, held_out=0.2)}, None)
    assert len(train) == 8
    assert len(held_out["sums"]) == 2
    numbers = [*train["number"], *held_out["sums"]["number"]]
    assert {questions.every[number].row["question"] for number in numbers} == {f"{i}?" for i in range(10)}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"question": "Hi"}], "row 0: no 'prompt'; the row has question"),
        ([{"prompt": 3}], r"row 0: 'prompt' is a number \(3\)"),
        ([{"prompt": ""}], "row 0: the prompt is empty"),
        ([{"prompt": [{"role": "assistant", "content": "Hi"}]}], "the last message of 'prompt' is the assistant's"),
        ([], "has no rows with a prompt"),
    ],
)
def test_rows_without_a_question_are_refused(rows: Any, problem: str, questions_of: Any) -> None:
    with pytest.raises(TunesmithError, match=problem):
        questions_of()(rows, "train")


def test_bad_rows_are_left_out_and_kept(questions_of: Any, tmp_path: Path) -> None:
    questions = questions_of(on_bad_row="skip")
    assert len(questions([{"prompt": "a"}, {"prompt": None}, {"prompt": "b"}], "train")) == 2
    questions.save_skipped()
    assert questions.preflight().notes == ["train: 2 prompts of 1 to 1 tokens; 1 row left out"]
    assert "no 'prompt'" in (tmp_path / "skipped_rows.jsonl").read_text()


def test_a_generation_comes_once_for_each_of_its_micro_batches() -> None:
    in_order = Generations(5, 2, repeats=3, seed=0, shuffled=False)
    assert [*in_order] == [[0, 1]] * 3 + [[2, 3]] * 3
    assert len(in_order) == 6
    shuffled = Generations(5, 2, seed=0)
    first = [*shuffled]
    shuffled.set_epoch(1)
    assert len(first) == 2
    assert first != [*shuffled]
    assert [*Generations(5, 2, seed=None)] == [[0, 1], [2, 3], [4]]
