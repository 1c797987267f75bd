"""Scores are what their definitions say, and intervals those of the sources."""

import json
import random
import subprocess
import sys
from decimal import Decimal
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tunesmith.errors import TunesmithError
from tunesmith.evaluate.scores import (
    METRICS,
    bootstrap,
    chosen,
    common_subsequence,
    contains,
    exact_match,
    fitting,
    json_equal,
    json_valid,
    number,
    refuse_unfit,
    result_of,
    rouge,
    scored,
    wilson,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 1,234", "1234"),
        ("#### 72\nThe next question is about 5 apples", "72"),
        ("#### nothing, but 3", "3"),
        ("16 - 3 - 4 = <<16-3-4=9>>9 eggs\n#### 18", "18"),
        ("first 5, then 1,234,567.89.", "1234567.89"),
        ("x = -5", "-5"),
        ("5-3", "3"),
        ("5 and \u22127", "-7"),
        ("(-5)", "-5"),
        ("-$0.50", "-0.5"),
        ("$-3", "-3"),
        ("it costs \u20ac18.", "18"),
        ("40%", "40"),
        ("10%-20%", "20"),
        ("1e3", "1000"),
        (".5", "0.5"),
        ("1,2,3", "3"),
        ("12\u202f345", "12345"),
        ("5kg of H2O", "5"),
        (r"\boxed{42}", "42"),
        ("H2O v1.2.3", None),
        ("none", None),
    ],
)
def test_the_result_of_a_text_is_its_number(text: str, expected: str | None) -> None:
    assert result_of(text) == (None if expected is None else Decimal(expected))


def test_numbers_are_compared_by_value() -> None:
    assert number("It is $1,000.00 in all.", "so 10 * 100\n#### 1000") == 1.0
    assert number("It is 1000.5", "#### 1000") == 0.0
    assert number("no idea", "#### 1000") == 0.0
    assert number("5", "no number") is None


def test_every_gsm8k_answer_has_the_number_behind_its_mark(shared_data: Path) -> None:
    with (shared_data / "gsm8k_test.jsonl").open(encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    assert len(answers) == 1319
    for answer in answers:
        assert result_of(answer) == Decimal(answer.split("####")[1].strip().replace(",", ""))
    metrics, why = fitting(answers)
    assert [metric.name for metric in metrics] == ["number"]
    assert "####" in why


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (' {"a": 1}\n', 1.0),
        ("[]", 1.0),
        ("1", 0.0),
        ('"text"', 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1} and more', 0.0),
        ('```json\n{"a": 1}\n```', 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_json_is_an_object_or_an_array_and_nothing_else(text: str, valid: float) -> None:
    assert json_valid(text) == valid


def test_json_is_compared_as_a_value() -> None:
    wanted = '{"a": 1, "b": [true, 2.5]}'
    assert json_equal('{ "b":[true,2.5], "a":1.0 }', wanted) == 1.0
    assert json_equal('{"a": true, "b": [true, 2.5]}', wanted) == 0.0
    assert json_equal('{"a": 1, "b": [2.5, true]}', wanted) == 0.0
    assert json_equal("{", wanted) == 0.0
    assert json_equal(wanted, "no JSON") is None


def test_texts_match_but_for_white_space_at_the_ends() -> None:
    assert exact_match(" Paris\n", "Paris") == 1.0
    assert exact_match("paris", "Paris") == 0.0
    assert contains("It is Paris.", " Paris") == 1.0
    assert contains("It is paris.", "Paris") == 0.0


def test_rouge_is_the_f1_of_the_longest_common_subsequence() -> None:
    # Lin 2004, section 3: "police kill the gunman" has "police the gunman" in common, "the gunman kill police" two.
    assert rouge("police kill the gunman", "Police killed the gunman.") == pytest.approx(3 / 4)
    assert rouge("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    assert rouge("the cat", "the cat sat down") == pytest.approx(2 * (1.0 * 0.5) / (1.0 + 0.5))
    assert rouge("", "words") == 0.0
    assert rouge("我喜歡茶", "我喜歡水") == pytest.approx(3 / 4)
    assert rouge("words", "!?") is None


def test_the_common_subsequence_is_that_of_the_table() -> None:
    draw = random.Random(0)
    for length, other in product((0, 1, 5, 70), (0, 1, 9, 130)):
        a, b = draw.choices("abcd", k=length), draw.choices("abcde", k=other)
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert common_subsequence(a, b) == table[-1][-1]


def test_the_interval_of_a_share_is_wilsons() -> None:
    # Newcombe 1998 (doi:10.1002/sim.1), table I: method 3.
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        found = wilson(right, count)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert wilson(29, 29).high == 1.0


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_for_many_rows() -> None:
    values = np.random.default_rng(5).random(1000)
    half = 1.96 * values.std() / 1000**0.5
    found = bootstrap(values, 0)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=2e-3)
    assert bootstrap(values, 0) == found
    assert bootstrap(values, 1) != found
    assert bootstrap(values[:1], 0).low is None


def test_the_difference_is_paired() -> None:
    expected = ["yes"] * 40
    base = ["yes"] * 20 + ["no"] * 20
    tuned = ["yes"] * 28 + ["no"] * 12  # right wherever the base is, and on eight rows more
    crossed = ["no"] * 12 + ["yes"] * 28
    paired = scored(METRICS["exact_match"], expected, tuned, base, 0)
    unpaired = scored(METRICS["exact_match"], expected, crossed, base, 0)
    assert paired.count == 40
    assert paired.base is not None
    assert paired.difference is not None
    assert unpaired.difference is not None
    assert (paired.tuned.value, paired.base.value, paired.difference.value) == pytest.approx((0.7, 0.5, 0.2))
    # Agresti and Min: (8.5 - 0.5) / 42 -+ 1.96 * sqrt(9 - 64 / 42) / 42
    assert (paired.difference.low, paired.difference.high) == pytest.approx((0.0629, 0.318), abs=1e-3)
    assert unpaired.difference.value == pytest.approx(0.2)
    assert unpaired.difference.low is not None
    assert unpaired.difference.low < 0  # the same shares, but rows were lost as well


def test_the_difference_of_means_is_paired() -> None:
    expected = ["a b c d"] * 12
    base = ["a", "a b", "a b c"] * 4
    result = scored(METRICS["rouge"], expected, [f"{answer} d" for answer in base], base, 0)
    assert result.difference is not None
    assert result.base is not None
    assert result.difference.low is not None
    assert result.difference.low > 0.1
    assert result.difference.value == pytest.approx(result.tuned.value - result.base.value)


def test_rows_without_what_a_metric_compares_are_left_out_of_it() -> None:
    result = scored(METRICS["number"], ["1", "none", "3"], ["1", "2", "4"], ["9", "9", "3"], 0)
    assert (result.count, result.tuned.value) == (2, 0.5)
    with pytest.raises(TunesmithError, match="metric number needs a number in the expected answers, and none of 1"):
        refuse_unfit(chosen(["exact_match", "number"]), ["none"])


def test_metrics_are_chosen_by_the_data_or_by_name() -> None:
    assert [metric.name for metric in fitting(['{"a": 1}', "[2]"])[0]] == ["json_equal", "json_valid"]
    assert [metric.name for metric in fitting(['{"a": 1}', "text"])[0]] == ["exact_match", "rouge"]
    assert [metric.name for metric in fitting(["#### 1", "1"])[0]] == ["exact_match", "rouge"]
    assert [metric.name for metric in chosen(["rouge", "number", "rouge"])] == ["rouge", "number"]
    with pytest.raises(TunesmithError, match=r"metric is 'exact'.*did you mean 'exact_match'"):
        chosen(["exact"])


def test_metrics_and_questions_load_no_heavy_library() -> None:
    code = (
        "import sys, tunesmith.evaluate.scores, tunesmith.evaluate.evaluation; "
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
