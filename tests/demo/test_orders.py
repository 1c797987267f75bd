"""The order e-mails: the same on every Python, well-posed, and with nothing held out that was trained on."""

import ast
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.demo import orders, pools
from tunesmith.demo.orders import exact_match, export, held_out_rows, training_rows, valid_json
from tunesmith.demo.pools import HELD_OUT, QUANTITY_WORDS, TRAINING, Pool
from tunesmith.errors import TunesmithError

GOOD = '{"customer":"Anna Baker","items":[[3,"blue mugs"]],"date":"2026-03-14"}'
MONTH_NUMBERS = {date(2026, month, 1).strftime("%B"): month for month in range(1, 13)}
SPLITS = pytest.mark.parametrize(("rows", "pool"), [(training_rows(), TRAINING), (held_out_rows(), HELD_OUT)])


def email_of(row: orders.Row) -> str:
    return row["messages"][1]["content"]


def answer_of(row: orders.Row) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(row["messages"][2]["content"])
    return answer


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(GOOD) | fields)


def digest(rows: list[orders.Row]) -> str:
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


# The rows


def test_default_rows_are_pinned_so_that_every_python_makes_the_same() -> None:
    assert (digest(training_rows()), digest(held_out_rows())) == ("087cceb4a20b8460", "5c996343d04bb695")


def test_another_seed_gives_other_rows_and_a_smaller_count_the_first_ones() -> None:
    assert training_rows(5) == training_rows()[:5]
    assert held_out_rows(5) == held_out_rows()[:5]
    for rows_of in (training_rows, held_out_rows):
        assert not {email_of(row) for row in rows_of(50, seed=3)} & {email_of(row) for row in rows_of(50, seed=2)}


@pytest.mark.parametrize("make", [training_rows, held_out_rows])
def test_a_count_below_one_is_refused(make: Any) -> None:
    with pytest.raises(TunesmithError, match="count is 0"):
        make(0)


@SPLITS
def test_every_row_is_a_system_a_user_and_an_assistant_message(rows: list[orders.Row], pool: Pool) -> None:
    for row in rows:
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == orders.TASK_SYSTEM


@SPLITS
def test_every_answer_is_valid_and_in_the_canonical_form(rows: list[orders.Row], pool: Pool) -> None:
    for row in rows:
        answer = row["messages"][2]["content"]
        assert valid_json(answer)
        assert exact_match(answer, answer)
        assert answer == json.dumps(answer_of(row), ensure_ascii=False, separators=(",", ":"))
        assert list(answer_of(row)) == ["customer", "items", "date"]


# The e-mail settles its answer


@SPLITS
def test_names_stand_in_the_email_once_and_letter_for_letter(rows: list[orders.Row], pool: Pool) -> None:
    for row in rows:
        email, answer = email_of(row), answer_of(row)
        assert email.endswith(answer["customer"])
        assert email.count(answer["customer"]) == 1
        for _, name in answer["items"]:
            assert len(re.findall(rf"\b{re.escape(name)}\b", email)) == 1


@SPLITS
def test_every_quantity_is_written_beside_its_item(rows: list[orders.Row], pool: Pool) -> None:
    for row in rows:
        for quantity, item in answer_of(row)["items"]:
            name = re.escape(item)
            words = [word for word, value in QUANTITY_WORDS.items() if value == quantity]
            before = "|".join([str(quantity), f"{quantity} x", *words])
            assert re.search(rf"(?<![\w-])({before}) {name}|{name} \({quantity}\)", email_of(row)), row
            assert item.endswith("s")
            assert quantity > 1


def read_dates(email: str) -> list[date]:
    """Every date in `email`, read without the generator's own forms."""
    found = [date(*map(int, numbers)) for numbers in re.findall(r"\b(\d{4})-(\d\d)-(\d\d)\b", email)]
    names = "|".join(MONTH_NUMBERS)
    named = re.findall(rf"\b(\d+) ({names}) (\d{{4}})", email)
    named += [(day, month, year) for month, day, year in re.findall(rf"\b({names}) (\d+), (\d{{4}})", email)]
    return found + [date(int(year), MONTH_NUMBERS[month], int(day)) for day, month, year in named]


@SPLITS
def test_the_only_date_in_the_email_is_the_answers(rows: list[orders.Row], pool: Pool) -> None:
    for row in rows:
        assert read_dates(email_of(row)) == [date.fromisoformat(answer_of(row)["date"])], row


def test_days_have_two_digits_and_every_way_to_write_a_date_is_used() -> None:
    for rows in (training_rows(), held_out_rows()):
        assert {int(answer_of(row)["date"][8:]) for row in rows} <= set(range(10, 29))
        patterns = (r"\d{4}-\d\d-\d\d", r"\d+ [A-Z][a-z]+ \d{4}", r"[A-Z][a-z]+ \d+, \d{4}")
        assert all(any(re.search(pattern, email_of(row)) for row in rows) for pattern in patterns)


@given(st.integers(0, 10_000), st.sampled_from([TRAINING, HELD_OUT]), st.data())
def test_noise_spares_placeholders_and_short_words(seed: int, pool: Pool, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(pool.requests)) + "\n" + data.draw(st.sampled_from(pool.closings))
    spoiled = orders._spoiled(text, orders.Dice(seed))
    assert re.findall(r"\{\w+\}", spoiled) == re.findall(r"\{\w+\}", text)
    assert spoiled.count("\n") == text.count("\n")
    pairs = list(zip(text.split(), spoiled.split(), strict=True))
    assert all(before.lower() == after.lower() for before, after in pairs if len(before) < 5)
    assert sum(before.lower() != after.lower() for before, after in pairs) <= 2


# The splits


def words_of(entries: tuple[str, ...]) -> set[str]:
    return {word.lower() for entry in entries for word in re.findall(r"[\w'-]+", entry)}


@pytest.mark.parametrize("field", [field.name for field in fields(Pool)])
def test_pools_of_the_two_splits_share_no_entry(field: str) -> None:
    training, held_out = getattr(TRAINING, field), getattr(HELD_OUT, field)
    assert len(set(training)) == len(training)
    assert len(set(held_out)) == len(held_out)
    assert not {entry.lower() for entry in training} & {entry.lower() for entry in held_out}


@pytest.mark.parametrize(("left", "right"), [(TRAINING, HELD_OUT), (HELD_OUT, TRAINING)])
def test_no_item_or_customer_word_of_one_split_occurs_in_the_other(left: Pool, right: Pool) -> None:
    names = words_of(left.first_names + left.last_names)
    assert not names & words_of(right.first_names + right.last_names + right.clerks)
    assert not words_of(left.adjectives + left.nouns) & words_of(right.adjectives + right.nouns)


def test_held_out_rows_share_no_customer_item_or_sentence_with_the_training_rows() -> None:
    def entities(rows: list[orders.Row]) -> set[str]:
        return {
            name
            for row in rows
            for name in [answer_of(row)["customer"], *(name for _, name in answer_of(row)["items"])]
        }

    def sentences(rows: list[orders.Row]) -> set[str]:
        return {part for row in rows for part in re.split(r"\n|(?<=[.!?]) ", email_of(row)) if part}

    training, held_out = training_rows(1000), held_out_rows(300)
    assert not entities(training) & entities(held_out)
    assert not sentences(training) & sentences(held_out)


def test_there_are_at_least_twelve_and_six_ways_to_ask_each_with_both_placeholders() -> None:
    assert len(TRAINING.requests) >= 12
    assert len(HELD_OUT.requests) >= 6
    for request in TRAINING.requests + HELD_OUT.requests:
        assert sorted(re.findall(r"\{\w+\}", request)) == ["{date}", "{items}"]


def test_default_training_rows_are_all_different_and_cover_the_pools() -> None:
    rows = training_rows()
    emails = "\n".join(email_of(row) for row in rows)
    assert len({email_of(row) for row in rows}) == len(rows)
    names = TRAINING.first_names + TRAINING.nouns
    assert sum(name in emails for name in names) > 0.9 * len(names)
    assert Counter(answer_of(row)["date"][5:7] for row in rows).keys() == {f"{month:02}" for month in range(1, 13)}
    assert {len(answer_of(row)["items"]) for row in rows} == {1, 2, 3}


# Marking an answer


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f" {GOOD}\n",
        json.dumps(json.loads(GOOD), indent=2),
        '{"date":"2026-03-14","items":[[3, "blue mugs"]],"customer":"Anna Baker"}',
    ],
)
def test_spaces_and_the_order_of_keys_do_not_matter(answer: str) -> None:
    assert valid_json(answer)
    assert exact_match(answer, GOOD)


@pytest.mark.parametrize(
    "answer",
    [
        changed(customer="Anna Bakers"),
        changed(customer="anna baker"),
        changed(items=[[3, "mugs"]]),
        changed(items=[[4, "blue mugs"]]),
        changed(items=[[3, "blue mugs"]] * 2),
        changed(date="2026-03-15"),
    ],
)
def test_another_value_is_valid_but_no_match(answer: str) -> None:
    assert valid_json(answer)
    assert not exact_match(answer, GOOD)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        "[]",
        '"text"',
        GOOD[:-1],
        f"Here it is: {GOOD}",
        f"```json\n{GOOD}\n```",
        GOOD + GOOD,
        GOOD.replace('"date"', '"date":"2026-03-14","date"'),
        GOOD.replace("3", "NaN", 1),
        "[" * 100_000,
        changed(note=""),
        json.dumps({key: value for key, value in json.loads(GOOD).items() if key != "date"}),
        changed(customer=None),
        changed(customer=" "),
        changed(items=[]),
        changed(items=[[3, "blue mugs"]] * 4),
        changed(items={"blue mugs": 3}),
        changed(items=["blue mugs"]),
        changed(items=[3, "blue mugs"]),
        changed(items=[[3]]),
        changed(items=[[3, "blue mugs", "box"]]),
        changed(items=[["blue mugs", 3]]),
        changed(items=[[3, " "]]),
        changed(items=[["3", "blue mugs"]]),
        changed(items=[[3.0, "blue mugs"]]),
        changed(items=[[True, "blue mugs"]]),
        changed(items=[[0, "blue mugs"]]),
        changed(date="14 March 2026"),
        changed(date="20260314"),
        changed(date="2026-02-30"),
        changed(date="2026-03-14T00:00:00"),
        changed(date=20260314),
    ],
)
def test_anything_but_the_exact_keys_and_types_is_invalid_and_no_match(answer: str) -> None:
    assert not valid_json(answer)
    assert not exact_match(answer, GOOD)


@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_marking_never_raises_whatever_a_model_says(answer: str) -> None:
    assert not valid_json(answer)
    assert not exact_match(answer, GOOD)


def test_an_expected_answer_that_is_no_order_is_refused() -> None:
    with pytest.raises(TunesmithError, match="expected answer is not an order"):
        exact_match(GOOD, "{}")


# The files


def test_export_writes_both_splits_as_json_lines_and_makes_the_folder(tmp_path: Path) -> None:
    paths = export(tmp_path / "new" / "orders", seed=2)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "new/orders/train.jsonl",
        "new/orders/held_out.jsonl",
    ]
    read = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths]
    assert read == [training_rows(seed=2), held_out_rows(seed=2)]
    assert b"\r" not in paths[0].read_bytes()


def test_the_generator_needs_the_standard_library_only() -> None:
    for module in (orders, pools):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names) | {"tunesmith"}
