"""How good answers are, in numbers with their uncertainty.

A metric gives each answer a score from 0 to 1, or none where the expected answer lacks what it compares: a number, say.
Its value is the mean, with a 95% interval.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import sqrt
from typing import Any

import numpy as np

from tunesmith.errors import TunesmithError, nearest
from tunesmith.text import shorten

Z = 1.959964
"""95% of a normal distribution lie within this many standard deviations."""
RESAMPLES = 2000
MARK = "####"
"""In front of the result in answers of GSM8K (Cobbe et al. 2021, arXiv:2110.14168)."""
IDEOGRAM = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{IDEOGRAM}]|[^\W_{IDEOGRAM}]+")
NUMBER = re.compile(
    r"(?:(?<![\w.)\]}%])(?P<before>[-+\u2212]))?"  # behind a number or a bracket it is an operator
    r"(?:[$\u20ac\u00a3\u00a5\u20b9](?P<after>[-+\u2212])?)?"
    r"(?<![A-Za-z_0-9])(?<![0-9]\.)"
    r"(?P<digits>[0-9]{1,3}(?:[,\u00a0\u202f][0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(?P<rest>(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """`score(answer, expected)`; None leaves the row out, because its expected answer has no `needs`. `is_share`:
    each score is 0 or 1, and their mean the share of right answers."""

    name: str
    score: Callable[[str, str], float | None]
    is_share: bool = True
    needs: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean with its 95% interval; no interval where a single row gives none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One metric over `count` rows; `base` and `difference` (tuned less base, row by row) where there is a base."""

    metric: Metric
    count: int
    tuned: Estimate
    base: Estimate | None = None
    difference: Estimate | None = None


# The metrics


def exact_match(answer: str, expected: str) -> float:
    """Whether they are the same text, white space at the ends aside."""
    return float(answer.strip() == expected.strip())


def contains(answer: str, expected: str) -> float:
    """Whether the expected answer is somewhere in the answer."""
    return float(expected.strip() in answer)


def json_valid(answer: str, _expected: str = "") -> float:
    """Whether the answer is a JSON object or array (RFC 8259) and nothing else."""
    return float(_canonical(answer) is not None)


def json_equal(answer: str, expected: str) -> float | None:
    """Whether both are the same JSON value: the order of keys and the white space don't count, 1 and 1.0 are equal."""
    wanted = _canonical(expected)
    return None if wanted is None else float(_canonical(answer) == wanted)


def _canonical(text: str) -> str | None:
    """One text for every way to write a JSON object or array; None for what is neither."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    def number(digits: str) -> float | int:
        value = float(digits)
        return int(value) if value.is_integer() else value

    try:
        value = json.loads(text, parse_float=number, parse_constant=refuse)
        return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else None
    except (ValueError, RecursionError):
        return None


def number(answer: str, expected: str) -> float | None:
    """Whether the results are equal: the number behind `####` where there is one, else the last number."""
    wanted = result_of(expected)
    return None if wanted is None else float(result_of(answer) == wanted)


def result_of(text: str) -> Decimal | None:
    """The number that `text` comes to: the first behind the first `####`, as GSM8K's own evaluation takes it, else the
    last one. None without any.

    Numbers are written as in English: `1,234.50`, `-5`, `$18`, `-$0.5`, `40%` (which is 40), `1e3`. Digits that are
    part of a word, as in `H2O`, are none.
    """
    _, mark, behind = text.partition(MARK)
    matches = list(NUMBER.finditer(behind))[:1] if mark else []
    matches = matches or list(NUMBER.finditer(text))[-1:]
    if not matches:
        return None
    [number] = matches
    sign = "-" if (number["before"] or number["after"] or "") in ("-", "\u2212") else ""
    return Decimal(f"{sign}{re.sub(r'[^0-9]', '', number['digits'])}{number['rest']}")


def rouge(answer: str, expected: str) -> float | None:
    """ROUGE-L, the F1 of the longest common subsequence of words (Lin 2004, aclanthology.org/W04-1013).

    Words are lower case and not stemmed; each character of Chinese and Japanese is one.
    """
    mine, wanted = (WORD.findall(text.lower()) for text in (answer, expected))
    if not wanted:
        return None
    common = common_subsequence(mine, wanted)
    return 2 * common / (len(mine) + len(wanted))  # what 2PR / (P + R) comes to


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, a row of the table at a time in the bits of one number (Hyyrö
    2004, "Bit-parallel LCS-length computation revisited")."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = full = (1 << len(a)) - 1
    for word in b:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="exact_match", score=exact_match),
        Metric(name="contains", score=contains),
        Metric(name="json_valid", score=json_valid),
        Metric(name="json_equal", score=json_equal, needs="JSON object or array"),
        Metric(name="number", score=number, needs="number"),
        Metric(name="rouge", score=rouge, is_share=False, needs="word"),
    )
}


def chosen(names: Iterable[str]) -> list[Metric]:
    """The metrics of these names, each once. Raises TunesmithError for an unknown one."""
    for name in (names := list(dict.fromkeys(names))):
        if name not in METRICS:
            raise TunesmithError(f"metric is {name!r}; the metrics are {', '.join(METRICS)}{nearest(name, METRICS)}")
    return [METRICS[name] for name in names]


def fitting(expected: Sequence[str]) -> tuple[list[Metric], str]:
    """The metrics for such expected answers, and why."""
    if all(MARK in text and NUMBER.search(text.partition(MARK)[2]) for text in expected):
        return chosen(["number"]), f"every expected answer has a number behind {MARK}"
    if all(_canonical(text) is not None for text in expected):
        return chosen(["json_equal", "json_valid"]), "every expected answer is JSON"
    return chosen(["exact_match", "rouge"]), "the expected answers are texts"


def refuse_unfit(metrics: Iterable[Metric], expected: Sequence[str]) -> None:
    """Raises TunesmithError for a metric that no expected answer has anything to compare for."""
    for metric in metrics:
        if all(metric.score("", text) is None for text in expected):
            raise TunesmithError(
                f"metric {metric.name} needs a {metric.needs} in the expected answers, and none of {len(expected):,} "
                f"has one; the first is {shorten(repr(expected[0]))}"
            )


# Their uncertainty


def scored(
    metric: Metric, expected: Sequence[str], tuned: Sequence[str], base: Sequence[str] | None, seed: int
) -> Result:
    """`metric` of the answers, and where there are those of a base model, of these and of the difference. Raises as
    `refuse_unfit` does."""
    refuse_unfit([metric], expected)

    def estimate(scores: Any) -> Estimate:
        return wilson(int(scores.sum()), len(scores)) if metric.is_share else bootstrap(scores, seed)

    scores = [metric.score(answer, wanted) for answer, wanted in zip(tuned, expected, strict=True)]
    comparable = [i for i, score in enumerate(scores) if score is not None]
    mine = np.array([scores[i] for i in comparable], dtype=float)
    result = Result(metric=metric, count=len(comparable), tuned=estimate(mine))
    if base is None:
        return result
    theirs = np.array([metric.score(base[i], expected[i]) for i in comparable], dtype=float)
    difference = paired(mine, theirs) if metric.is_share else bootstrap(mine - theirs, seed)
    return replace(result, base=estimate(theirs), difference=difference)


def wilson(right: int, count: int) -> Estimate:
    """The share `right` of `count`, with the score interval (Wilson 1927, doi:10.2307/2276774)."""
    share, spread = right / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z * sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    # At the ends the interval reaches them exactly, which rounding must not hide.
    low, high = 0.0 if right == 0 else middle - half, 1.0 if right == count else middle + half
    return Estimate(value=share, low=low, high=high)


def paired(mine: Any, theirs: Any) -> Estimate:
    """The difference of two shares on the same rows, with the interval of Agresti and Min (2005,
    doi:10.1002/sim.1781): half a row is added to each of the four cases, so that rows without a difference are no
    proof that there is none."""
    better, worse = (int((a > b).sum()) for a, b in ((mine, theirs), (theirs, mine)))
    count = len(mine)
    won, lost, rows = better + 0.5, worse + 0.5, count + 2
    middle = (won - lost) / rows
    half = Z * sqrt((won + lost) - (won - lost) ** 2 / rows) / rows
    return Estimate(value=(better - worse) / count, low=max(-1.0, middle - half), high=min(1.0, middle + half))


def bootstrap(values: Any, seed: int) -> Estimate:
    """The mean of `values`, with the percentile interval of 2,000 resamples (Efron 1979, doi:10.1214/aos/1176344552).

    Paired differences are resampled as pairs: they are one value a row. The same seed gives the same interval.
    """
    count = len(values)
    if count < 2:
        return Estimate(value=float(values.mean()))
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(value=float(values.mean()), low=float(low), high=float(high))
