"""Rewards by name, by function and by model, and what is said of those that fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tunesmith import TunesmithError
from tunesmith.train.rewards import Asked, Rewards


def asked(*answers: str, **columns: list[Any]) -> Asked:
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(answers))]
    return Asked(
        places=[f"rows.jsonl, line {i + 1}" for i in range(len(answers))],
        prompts=["Say "] * len(answers),
        completions=[*answers],
        ids=[[1] * len(answer) for answer in answers],
        rows=rows,
    )


def test_several_rewards_are_columns_in_their_order() -> None:
    async def later(completions: list[str], **_: Any) -> list[float | None]:
        return [None if answer == "b" else 2.0 for answer in completions]

    def of_column(prompts: list[str], answer: list[str]) -> Any:  # takes only what it names
        return torch.tensor([float(len(one)) for one in answer])

    rewards = Rewards([later, "exact_match", of_column], weights=[1, 2, 3])
    found = rewards(asked("a", "b", answer=["a", "ccc"]), trainer_state=None)
    assert rewards.names == ["later", "exact_match", "of_column"]
    assert rewards.weights.tolist() == [1, 2, 3]
    torch.testing.assert_close(found, torch.tensor([[2.0, 1, 1], [torch.nan, 0, 3]]), equal_nan=True)


def test_the_row_and_the_answer_are_named(tmp_path: Path) -> None:
    def fails(completions: list[str], **_: Any) -> list[float]:
        return [1 / (answer != "b") for answer in completions]

    async def fails_later(completions: list[str], **_: Any) -> list[float]:
        return fails(completions)

    def no_number(completions: list[str], **_: Any) -> list[float]:
        return [float("nan") if answer == "b" else 0 for answer in completions]

    for reward in (fails, fails_later):
        with pytest.raises(TunesmithError, match=r"failed on rows.jsonl, line 2, answer 'b': ZeroDivisionError"):
            Rewards(reward)(asked("a", "b"))
    with pytest.raises(TunesmithError, match=r"no_number is nan for rows.jsonl, line 2, answer 'b'"):
        Rewards(no_number)(asked("a", "b"))
    with pytest.raises(TunesmithError, match="returned 1 numbers for 2 answers"):
        Rewards(lambda completions: [1.0])(asked("a", "b"))


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def loud(completions, **_):\n    return [float(c.isupper()) for c in completions]\n")
    monkeypatch.chdir(tmp_path)
    rewards = Rewards({"mine.py:loud": None, "length": {"most": 1}, "regex": {"pattern": "A"}})
    assert rewards(asked("A", "ab")).tolist() == [[1, 1, 1], [0, 0, 0]]
    for given, problem in (
        ("mine.py:lout", "no function 'lout'"),
        ("other.py:loud", "no file other.py"),
        ("no_such_module:f", "can't be imported"),
        ({"length": {"mots": 1}}, "length takes most, least, unit"),
        ("lenght", "did you mean 'length'"),
        ([], "reward_funcs is empty"),
    ):
        with pytest.raises(TunesmithError, match=problem):
            Rewards(given)
    with pytest.raises(TunesmithError, match="reward_weights has 1 numbers, and reward_funcs 2 items"):
        Rewards(["json_valid", "think_format"], weights=[1])
    assert Rewards(["think_format", "think_format"]).names == ["think_format", "think_format_2"]


def test_a_model_scores_prompt_and_answer_together(tokenizer: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    scores = Rewards(model, tokenizers=tokenizer)(asked("yes", "no, never"))
    for score, text in zip(scores[:, 0], ("Say yes", "Say no, never"), strict=True):
        alone = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, 0]
        torch.testing.assert_close(score, alone, rtol=1e-5, atol=1e-6)
    assert tokenizer.padding_side == "right"
    with pytest.raises(TunesmithError, match="is one tokenizer, and 2 models score answers"):
        Rewards([model, "json_valid", model], tokenizers=tokenizer)
    assert Rewards(["json_valid", model], tokenizers=tokenizer).tokenizers == [None, tokenizer]
    with pytest.raises(TunesmithError, match="has 1 items, and reward_funcs 2; their numbers must match"):
        Rewards([model, model], tokenizers=[tokenizer])
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    named = Rewards(str(tmp_path / "judge"))
    assert named.names == ["judge"]
    torch.testing.assert_close(named(asked("yes", "no, never")), scores)


def test_a_language_model_gives_no_score(tiny_model: Path) -> None:
    """A head of random numbers would."""
    with pytest.raises(TunesmithError, match="no sequence classifier, so it has no score to give"):
        Rewards(str(tiny_model))
