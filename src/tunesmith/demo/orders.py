"""The demo's task: an order e-mail in free English in, strict JSON out.

A seeded generator in pure Python; nothing is read from disk. A row is a conversation of three messages::

    system     Extract the order as JSON.
    user       Hi Tom,
               We need 3 blue mugs and a dozen large towels delivered on March 14, 2026. I will pay by card.
               Thanks,
               Anna Baker
    assistant  {"customer":"Anna Baker","items":[[3,"blue mugs"],[12,"large towels"]],"date":"2026-03-14"}

The e-mail settles every field of its answer: the customer is the name it is signed with, an item's name is copied
letter for letter, and the one date in it is the delivery date.
Typing errors, odd capitals and doubled spaces spare names, items, quantities and dates.

The held-out rows have other customers, other items and other phrasings than the training rows: who matches them exactly
has not learnt them by heart.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.demo.pools import DATE_FORMS, HELD_OUT, MONTHS, QUANTITY_WORDS, TRAINING, Pool
from tunesmith.errors import TunesmithError

TASK_SYSTEM = "Extract the order as JSON."
"""The system message of every row; without one, SmolLM2's chat template puts in a longer one of its own."""

TRAINING_COUNT = 270
HELD_OUT_COUNT = 60
SEED = 1

FIRST_YEAR, YEARS = 2025, 3
LAST_QUANTITY = 99

Row = dict[str, list[dict[str, str]]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of an order: the name as the e-mail has it, and how many."""

    name: str
    quantity: int


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a strict reader finds in one e-mail."""

    customer: str
    items: tuple[Item, ...]
    day: date

    def to_json(self) -> str:
        """The one canonical serialisation: keys in order, items as [quantity, name], no spaces between tokens."""
        items = [[item.quantity, item.name] for item in self.items]
        fields = {"customer": self.customer, "items": items, "date": self.day.isoformat()}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


class Dice:
    """Seeded choices that are the same on every Python: only `Random.random` is documented to stay as it is."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, stop: int) -> int:
        return int(self._random.random() * stop)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]


def training_rows(count: int = TRAINING_COUNT, seed: int = SEED) -> list[Row]:
    """`count` rows to train on; a smaller count with the same seed gives the first of them."""
    return _rows(TRAINING, count, 2 * seed)


def held_out_rows(count: int = HELD_OUT_COUNT, seed: int = SEED) -> list[Row]:
    """`count` rows to measure on, from pools that share no customer, item or phrasing with the training rows."""
    return _rows(HELD_OUT, count, 2 * seed + 1)


def exact_match(answer: str, expected: str) -> bool:
    """Whether `answer` is a valid order with the same fields as `expected`; spaces and the order of keys are free.

    Raises:
        TunesmithError: `expected` is itself no valid order.
    """
    order = _parse(expected)
    if order is None:
        raise TunesmithError(f"exact_match: the expected answer is not an order: {expected!r}; pass a row's own answer")
    return _parse(answer) == order


def valid_json(answer: str) -> bool:
    """Whether `answer` is JSON with exactly the keys of an order, each of its type, and nothing around it."""
    return _parse(answer) is not None


def export(folder: Path, seed: int = SEED) -> list[Path]:
    """Write the rows of `seed` as `train.jsonl` and `held_out.jsonl` into `folder`, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in (("train.jsonl", training_rows(seed=seed)), ("held_out.jsonl", held_out_rows(seed=seed))):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path = folder / name
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def _rows(pool: Pool, count: int, seed: int) -> list[Row]:
    if count < 1:
        raise TunesmithError(f"orders: count is {count}; ask for at least 1 row")
    dice = Dice(seed)
    return [_row(pool, dice) for _ in range(count)]


def _row(pool: Pool, dice: Dice) -> Row:
    order = Order(customer=_customer(pool, dice), items=_items(pool, dice), day=_day(dice))
    messages = [
        {"role": "system", "content": TASK_SYSTEM},
        {"role": "user", "content": _email(order, pool, dice)},
        {"role": "assistant", "content": order.to_json()},
    ]
    return {"messages": messages}


def _customer(pool: Pool, dice: Dice) -> str:
    first, last = dice.pick(pool.first_names), dice.pick(pool.last_names)
    return f"{first} {dice.pick('ABCDEFGHJKLMNPRST')}. {last}" if dice.chance(0.1) else f"{first} {last}"


def _day(dice: Dice) -> date:
    """A day from the 10th to the 28th, whose two digits are the answer's: only the month has to be translated."""
    return date(FIRST_YEAR + dice.below(YEARS), 1 + dice.below(12), 10 + dice.below(19))


def _items(pool: Pool, dice: Dice) -> tuple[Item, ...]:
    """One to three items with different nouns; mostly one or two."""
    count = dice.pick((1, 1, 1, 2, 2, 2, 3))
    nouns: list[str] = []
    while len(nouns) < count:
        noun = dice.pick(pool.nouns)
        if noun not in nouns:
            nouns.append(noun)
    items, in_words = [], tuple(QUANTITY_WORDS.values())
    for noun in nouns:
        quantity = dice.pick(in_words) if dice.chance(0.4) else 2 + dice.below(LAST_QUANTITY - 1)
        items.append(Item(name=f"{dice.pick(pool.adjectives)} {noun}s", quantity=quantity))
    return tuple(items)


def _email(order: Order, pool: Pool, dice: Dice) -> str:
    """The e-mail: its phrases are joined, spoiled, and only then filled in, so that no typing error hits an entity."""
    body = [dice.pick(pool.requests)]
    if dice.chance(0.3):
        body.insert(dice.below(len(body) + 1), dice.pick(pool.strays))
    parts, day = [" ".join(body), dice.pick(pool.closings)], order.day
    if dice.chance(0.6):
        parts.insert(0, dice.pick(pool.greetings))
    return _spoiled("\n".join(parts), dice).format(
        items=_written_items(order.items, dice),
        date=dice.pick(DATE_FORMS).format(year=day.year, month=day.month, day=day.day, name=MONTHS[day.month - 1]),
        clerk=dice.pick(pool.clerks),
        customer=order.customer,
    )


def _written_items(items: tuple[Item, ...], dice: Dice) -> str:
    """The items in one style: `3 mugs and a dozen towels`, `3 x mugs, 12 x towels`, `mugs (3) plus towels (12)`, ..."""
    style, written = dice.pick(("{quantity} {name}",) * 5 + ("{quantity} x {name}", "{name} ({quantity})")), []
    for item in items:
        words = [word for word, value in QUANTITY_WORDS.items() if value == item.quantity]
        in_words = bool(words) and style == "{quantity} {name}"
        written.append(style.format(quantity=dice.pick(words) if in_words else item.quantity, name=item.name))
    last_joint = dice.pick((" and ", " and ", " plus ", ", "))
    return last_joint.join([", ".join(written[:-1]), written[-1]] if len(written) > 1 else written)


def _spoiled(text: str, dice: Dice) -> str:
    """Typing noise on the words outside of `{...}`: errors, one word in capitals, all in small letters, two spaces."""
    if dice.chance(0.12):
        text = text.lower()
    for _ in range(dice.pick((0, 0, 0, 0, 1, 2))):
        text = _with_one_word_changed(text, _mistyped, dice)
    if dice.chance(0.08):
        text = _with_one_word_changed(text, lambda word, _: word.upper(), dice)
    if dice.chance(0.15):
        gaps = [match.start() for match in re.finditer(" ", text)]
        at = dice.pick(gaps)
        text = f"{text[:at]} {text[at:]}"
    return text


def _with_one_word_changed(text: str, change: Callable[[str, Dice], str], dice: Dice) -> str:
    words = list(re.finditer(r"(?<![{\w'])[A-Za-z]{5,}(?![}\w'])", text))
    if not words:
        return text
    word = dice.pick(words)
    return text[: word.start()] + change(word.group(), dice) + text[word.end() :]


def _mistyped(word: str, dice: Dice) -> str:
    """`word` without one of its inner letters, or with two of them swapped."""
    at = 1 + dice.below(len(word) - 3)
    if dice.chance(0.5):
        return word[:at] + word[at + 1 :]
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _parse(answer: str) -> dict[str, Any] | None:
    """The order in `answer`, or None where it is not JSON, or has a key too many, a key too few or a wrong type."""
    try:
        value = json.loads(answer, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.keys() != {"customer", "items", "date"}:
        return None
    items = value["items"]
    right = (
        _is_name(value["customer"])
        and isinstance(items, list)
        and 1 <= len(items) <= 3
        and all(_is_item(item) for item in items)
        and _is_date(value["date"])
    )
    return value if right else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_item(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    quantity, name = value
    return type(quantity) is int and quantity > 0 and _is_name(name)


def _is_date(value: object) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        return False
    try:
        date.fromisoformat(value)
    except ValueError:
        return False
    return True
