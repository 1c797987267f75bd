"""A value becomes what its setting's type says, or an error that says what was found and expected."""

from typing import Any, Literal

import pytest
from transformers.trainer_utils import SaveStrategy

from tunesmith.settings.coerce import coerce, expected


@pytest.mark.parametrize(
    ("value", "kind", "result"),
    [
        ("2e-5", float, 2e-5),  # which YAML 1.1 reads as text
        ("500", float, 500),
        (3, float, 3),
        ("1e3", int, 1000),
        (3.0, int, 3),
        ("-1", int, -1),
        ("none", int | None, None),
        ("None", int | None, None),
        (None, int | None, None),
        ("null", str | None, None),
        ("none", str | None, "none"),
        ("Yes", bool, True),
        ("off", bool, False),
        ("false", bool | None, False),
        ("true", bool | str | None, True),
        ("runs/x", bool | str | None, "runs/x"),
        ("text", str, "text"),
        ("nll", Literal["nll", "dft"], "nll"),
        ("steps", SaveStrategy | str, "steps"),
        (False, SaveStrategy | str, "no"),  # YAML's reading of a bare `no`
        ("a, b", list[str], ["a", "b"]),
        ("a,b", str | list[str], "a,b"),
        ("[a, b]", str | list[str], ["a", "b"]),
        (["a", "b"], str | list[str], ["a", "b"]),
        ("{a: {b: 2e-5}}", dict[str, Any] | str | None, {"a": {"b": "2e-5"}}),
        ({"a": "on"}, dict[str, bool] | None, {"a": True}),
        ("a=b c, d = e=f", dict[str, str] | str | None, {"a": "b c", "d": "e=f"}),
        ("a=b,c", dict[str, str] | str | None, "a=b,c"),
        ("a=b", dict[str, Any] | str | None, "a=b"),
        ("config.json", dict[str, Any] | str | None, "config.json"),
        ("64", int | str | None, 64),
        ("auto", int | str | None, "auto"),
    ],
)
def test_a_value_becomes_its_settings_type(value: Any, kind: Any, result: Any) -> None:
    made = coerce(value, kind)
    assert made == result
    assert type(made) is type(result)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("fast", float, r"is 'fast' \(text\), expected a number$"),
        ("nan", float, "expected a number"),
        (10**400, float, "expected a number"),
        (True, int, r"is True \(true or false\), expected a whole number"),
        (2.5, int | None, r"is 2.5 \(a number\), expected a whole number or null"),
        (1, bool, r"is 1 \(a whole number\), expected true or false"),
        (12, str, r"is 12 \(a whole number\), expected text; put it in quotes"),
        (None, float, "is null, expected a number"),
        ("nil", Literal["nll", "dft"], r"expected nll \| dft; did you mean 'nll'\?"),
        ("epochs", SaveStrategy | str, r"expected no \| steps \| epoch \| best; did you mean 'epoch'\?"),
        ([1], list[str], "expected a list"),
        ({"a": "b"}, dict[str, bool], "expected an object"),
        ("{a: 1, a: 2}", dict[str, int], "expected an object"),
        ("a=b,a=c", dict[str, str], "expected an object"),
        ("x" * 300, int, r"x\.\.\. \(text\)"),
        ("x", slice | None, "expected null"),
    ],
)
def test_a_wrong_value_says_what_was_found_and_expected(value: Any, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coerce(value, kind)


def test_a_type_that_no_text_can_be_is_for_scripts() -> None:
    assert expected(slice) == "nothing: it is for scripts only"
