"""Rows are counted as they are, columns of other names are recognised, and a bad row is named with its place."""

from typing import Any

import pytest

from tunesmith.data.columns import pair_columns
from tunesmith.errors import TunesmithError
from tunesmith.init import facts
from tunesmith.init.facts import Lengths, look, measure, proposed_columns


def placed(*rows: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"rows.jsonl, line {number}", row) for number, row in enumerate(rows, start=1)]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_conversations_are_counted() -> None:
    one = chat(("system", "s"), ("user", "a"), ("assistant", '{"a": 1}'))
    two = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "[]"))
    found = look(placed(one, two, one), {}).facts
    assert (found.rows, found.format, found.kind, found.separate) == (3, "messages", "conversation", False)
    assert (found.roles, found.answers, found.duplicates, found.tools) == (("system", "user", "assistant"), 2, 1, 0)
    assert found.json_answers == 1
    assert found.labels == (('{"a": 1}', 2), ("[]", 1))


def test_tools_labels_and_prompts_are_seen() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert look(placed({"messages": [{"role": "user", "content": "a"}, call]}), {}).facts.tools == 1
    found = look(placed(*({"Text": f"t{i}", "label": "ab"[i % 2]} for i in range(6))), {"prompt": "Text"} | LABEL).facts
    assert (found.kind, found.separate, found.labels) == ("pair", True, (("a", 3), ("b", 3)))
    many = look(placed(*({"prompt": "p", "completion": str(i)} for i in range(300))), {}).facts
    assert many.labels == ()


LABEL = {"completion": "label"}


def test_a_row_of_another_shape_is_named() -> None:
    with pytest.raises(TunesmithError, match=r"rows\.jsonl, line 2: no 'prompt'"):
        look(placed({"prompt": "a", "completion": "b"}, {"text": "c"}), {})
    with pytest.raises(TunesmithError, match=r"line 1: no column 'no'"):
        look(placed({"prompt": "a", "completion": "b"}), {"prompt": "no"})


def test_the_sample_is_bounded_and_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "SAMPLE", 10)
    looked = look(placed(*({"text": str(i)} for i in range(1000))), {})
    assert looked.facts.rows == 1000
    assert len(looked.sample) == 10
    assert max(int(place.split()[-1]) for place, _ in looked.sample) > 500


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, {}),
        ({"question": "q", "answer": "a"}, {"instruction": "question", "output": "answer"}),
        (
            {"Question": "q", "Answer": "a", "context": "c"},
            {"instruction": "Question", "output": "Answer"} | {"input": "context"},
        ),
        ({"編號": "1", "問題": "q", "答案": "a"}, {"instruction": "問題", "output": "答案"}),
        ({"instruction": "q", "response": "a"}, {"output": "response"}),
        ({"prompt": "q", "response": "a"}, {"instruction": "prompt", "output": "response"}),
        ({"input": "q", "target": "a"}, {"instruction": "input", "output": "target"}),
        ({"input": "q", "output": "a"}, {"instruction": "input"}),
        ({"text": "t", "label": "l"}, {"instruction": "text", "output": "label"}),
        ({"text": "t", "label": 0}, {"instruction": "text", "output": "label"}),
        ({"text": "t", "id": "7"}, {}),
        ({"content": "t", "url": "u"}, {"text": "content"}),
        ({"dialog": [{"role": "user", "content": "x"}]}, {"messages": "dialog"}),
        ({"turns": [{"from": "human", "value": "x"}]}, {"conversations": "turns"}),
        ({"left": "x", "right": "y"}, None),
    ],
)
def test_columns_are_proposed_by_their_names(row: dict[str, Any], columns: dict[str, str] | None) -> None:
    assert proposed_columns(row, templated=True) == columns


def test_a_column_that_asks_and_is_called_input_becomes_one_turn() -> None:
    row = {"input": "q", "target": "a"}
    columns = proposed_columns(row, templated=True)
    assert columns is not None
    looked = look(placed(row), columns)
    assert (looked.facts.format, looked.facts.roles) == ("instruction", ("user", "assistant"))


def test_without_a_template_pairs_are_plain_texts() -> None:
    assert proposed_columns({"question": "q", "answer": "a"}, templated=False) == {
        "prompt": "question",
        "completion": "answer",
    }
    assert pair_columns("prompt", "b", templated=False) == {"completion": "b"}


def test_preferences_are_the_users_to_choose() -> None:
    with pytest.raises(TunesmithError, match="preference pairs"):
        proposed_columns({"prompt": "p", "chosen": "a", "rejected": "b"}, templated=True)


def test_lengths_tell_shares_and_the_longer_ones() -> None:
    lengths = Lengths(sizes=tuple(range(1, 101)), rows=1000, supervised=0.5)
    assert (lengths.share(0.5), lengths.share(0.99), lengths.longest, lengths.mean) == (50, 99, 100, 50.5)
    assert lengths.sampled
    assert (lengths.over(97), lengths.over(100)) == (30, 0)
    assert Lengths(sizes=(7,), rows=1, supervised=1).share(0.99) == 7


def test_answers_of_preferences_are_measured_each_with_its_prompt(tokenizer: Any) -> None:
    pair = look(placed({"prompt": "ab", "chosen": "cde", "rejected": "f"}), {}, None, "pairs")
    assert (pair.facts.kind, pair.facts.rows, pair.facts.separate) == ("preference", 1, True)
    lengths = measure(pair, tokenizer, "completion", {})
    assert (lengths.sizes, lengths.rows) == ((4, 6), 2)  # and the end of the text
    judged = look(
        placed(*({"prompt": "ab", "completion": "c", "label": label} for label in (True, False, True))),
        {},
        None,
        "judged",
    )
    assert (judged.facts.kind, judged.facts.rows, judged.facts.good) == ("judged", 3, 2)
    assert measure(judged, tokenizer, "completion", {}).sizes == (4, 4, 4)
