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


def test_a_schema_as_pydantic_writes_it() -> None:
    item = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    schema = {
        "$defs": {"Item": item},
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"$ref": "#/$defs/Item"}},
            "note": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}], "default": None},
        },
        "required": ["items"],
    }
    answers = {
        '{"items": [{"name": "a"}], "note": null}': 1,
        '{"items": [{"name": 1}]}': 0,
        '{"items": [], "note": "abcd"}': 0,
    }
    assert judged("json_schema", [*answers], {"schema": schema}) == [*answers.values()]


def test_schemas_of_rows_keep_their_own_keys_in_a_table() -> None:
    from datasets import Dataset

    # A table fills in the keys that another row's schema has.
    rows = Dataset.from_list([{"schema": {"type": "number", "minimum": 2}}, {"schema": {"type": "string"}}])
    assert rows[1]["schema"] == {"type": "string", "minimum": None}
    assert judged("json_schema", ["1", '"1"'], schema=rows["schema"]) == [0, 1]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"type": "text"}}}, "properties/a/type: 'text' is not valid"),
        ("{", r"'\{' is no schema; write an object"),
        ({"$ref": "#/$defs/Item"}, r"the \$ref '/\$defs/Item' is not in the schema"),
        ({"$ref": "#"}, "the schema refers to itself without end"),
        ({"$ref": "http://localhost:1/item.json"}, r"the \$ref 'http://localhost:1/item.json' .* nothing is fetched"),
    ],
)
def test_a_schema_that_is_none(schema: Any, message: str) -> None:
    with pytest.raises(TunesmithError, match=f"json_schema: .*{message}"):
        judged("json_schema", ["1"], {"schema": schema})


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
