"""The page about a run of the checks: one HTML file, with what failed first."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from tunesmith.report.page import facts, numbers, table, whole_page
from tunesmith.text import counted, duration, verb

SHOWN = {"GPU", "versions", "model", "precision", "speed, lora", "speed, full", "speed, packed", "demo"}
"""Checks whose words stand at the top."""
MARKS = {"passed": "✓", "failed": "✗", "left out": "-"}
STYLE = """
td:nth-child(2) { min-width: 9rem; }
.verdict { font-size: 1.2rem; font-weight: 600; } .good { color: var(--edge); }
"""


def result_page(result: Mapping[str, Any]) -> str:
    """The page of what `gpu.json` holds."""
    return whole_page("tunesmith on a GPU", _parts(result), STYLE)


def verdict(result: Mapping[str, Any]) -> str:
    """The result in a sentence."""
    counts = Counter(check["outcome"] for section in result["sections"] for check in section["checks"])
    failed, left_out = counts["failed"], counts["left out"]
    first = f"{counted(failed, 'check')} failed" if failed else f"all {counted(counts['passed'], 'check')} passed"
    return first + (f", {left_out} {verb(left_out, 'was', 'were')} left out" if left_out else "")


def _parts(result: Mapping[str, Any]) -> Iterator[str]:
    sections: Sequence[Mapping[str, Any]] = result["sections"]
    failed = [(section, check) for section in sections for check in section["checks"] if check["outcome"] == "failed"]
    yield f"<h1>tunesmith on a GPU</h1>\n<p class='faint'>{escape(result['when'])}</p>\n"
    if result["rehearsed"]:
        yield "<p class='warn'>A rehearsal on a CPU with stand-ins: it proves this program, and nothing of a GPU.</p>\n"
    yield f"<p class='verdict {'warn' if failed else 'good'}'>{escape(verdict(result).capitalize())}.</p>\n"
    yield facts(
        (check["name"], check["found"]) for section in sections for check in section["checks"] if check["name"] in SHOWN
    )
    yield numbers(
        [
            ("sections", f"{len(sections)}"),
            ("checks", f"{sum(len(section['checks']) for section in sections)}"),
            ("failed", f"{len(failed)}"),
            ("in all", duration(result["seconds"])),
        ]
    )
    if failed:
        yield "<h2>What failed</h2>\n"
        yield table(
            ["section", "check", "found"],
            [(section["title"], check["name"], check["found"]) for section, check in failed],
        )
    yield "<h2>Sections</h2>\n"
    yield table(
        ["", "section", "passed", "failed", "left out", "seconds"],
        [_summary(section) for section in sections],
    )
    for section in sections:
        yield f"<h2>{escape(section['title'])}</h2>\n"
        yield table(
            ["", "check", "found"],
            [(MARKS[check["outcome"]], check["name"], check["found"]) for check in section["checks"]],
        )


def _summary(section: Mapping[str, Any]) -> list[str]:
    counts = Counter(check["outcome"] for check in section["checks"])
    worst = "failed" if counts["failed"] else "passed" if counts["passed"] else "left out"
    return [MARKS[worst], section["title"], *(str(counts[name]) for name in MARKS), f"{section['seconds']:.0f}"]
