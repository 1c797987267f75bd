"""Rewards that can be checked, answer by answer."""

from typing import Any

import pytest

from tunesmith import TunesmithError
from tunesmith.objectives.checks import CHECKS, last_number, text_of

SCHEMA = {
    "type": "object",
    "required": ["name", "count"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[A-Z]"},
        "count": {"type": "integer", "minimum": 1},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "note": {"type": ["string", "null"]},
    },
}


def judged(name: str, answers: list[Any], arguments: dict[str, Any] | None = None, **columns: Any) -> list[float]:
    return CHECKS[name](**arguments or {})(
        completions=answers, completion_ids=[[0] * len(a) for a in answers], **columns
    )


def test_an_answer_is_its_text_or_the_assistants_last_message() -> None:
    talk = [
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    assert (text_of("a"), text_of(talk), text_of([])) == ("a", "c", "")


def test_json() -> None:
    assert judged("json_valid", ['{"a": 1}', "3", '{"a": 1} so', "", "NaN"]) == [1, 1, 0, 0, 0]
    answers = {
        '{"name": "A", "count": 1}': 1,
        '{"name": "A", "count": 2.0, "tags": ["a", "b"], "note": null}': 1,
        '{"name": "a", "count": 1}': 0,
        '{"name": "A", "count": 0}': 0,
        '{"name": "A", "count": true}': 0,
        '{"name": "A"}': 0,
        '{"name": "A", "count": 1, "more": 1}': 0,
        '{"name": "A", "count": 1, "tags": ["c"]}': 0,
        '{"name": "A", "count": 1, "tags": ["a", "a", "a"]}': 0,
        "[]": 0,
        "{": 0,
    }
    assert judged("json_schema", [*answers], {"schema": SCHEMA}) == [*answers.values()]
    assert judged("json_schema", ["1", '"1"'], {"column": "form"}, form=[{"type": "number"}, '{"type": "null"}']) == [
        1,
        0,
    ]
    with pytest.raises(TunesmithError, match="'oneOf' is not checked here"):
        judged("json_schema", ["1"], {"schema": {"properties": {"a": {"oneOf": []}}}})


def test_what_the_row_says_is_right() -> None:
    assert judged("exact_match", [" Paris\n", "paris", "Paris."], answer=["Paris"] * 3) == [1, 0, 0]
    assert judged("exact_match", ["4"], {"column": "sum"}, sum=[4]) == [1]
    texts = ["So it is 1,250.", "1250.0", "12 and 50", "none", "-1250", "1.25e3"]
    assert judged("number", texts, answer=[1250] * 6) == [1, 1, 0, 0, 0, 1]
    assert judged("number", ["3.1"], {"tolerance": 0.2}, answer=["it is 3"]) == [1]
    assert (last_number("a 5, b .5"), last_number("x")) == (0.5, None)
    with pytest.raises(TunesmithError, match="the row's answer is 'many', which has no number"):
        judged("number", ["3"], answer=["many"])


def test_forms() -> None:
    assert judged("regex", ["a1", "b"], {"pattern": r"\d"}) == [1, 0]
    assert judged("regex", ["a1", "1"], {"pattern": r"\d", "full": True}) == [0, 1]
    with pytest.raises(TunesmithError, match="can't be read"):
        judged("regex", ["a"], {"pattern": "("})
    thoughts = ["<think>so</think>\n4", "4", "<think>so", "<think><think>a</think></think>4", "x <think>a</think>"]
    assert judged("think_format", thoughts) == [1, 0, 0, 0, 0]


def test_lengths() -> None:
    assert judged("length", ["abc", "abcd", ""], {"most": 3, "least": 1}) == [1, 0, 0]
    assert judged("length", ["ab", "abc"], {"most": 2, "unit": "characters"}) == [1, 0]
    assert judged("soft_overlong", ["a" * 6, "a" * 8, "a" * 10, "a" * 12], {"most": 10, "margin": 4}) == [
        0,
        -0.5,
        -1,
        -1,
    ]
