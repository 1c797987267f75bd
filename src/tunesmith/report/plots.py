"""Curves over the steps of a run as SVG to stand in a page: no script, no font of their own, colours of the page."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice, pairwise
from typing import Any

import numpy as np

MOST_POINTS = 500
"""Of a curve, so many are drawn; of what lies between them, the lowest and the highest."""
FEW_POINTS = 40
"""Up to so many, each is marked, and nothing is smoothed."""
SERIES = 8
"""Colours, after which they are used again with other dashes."""
DASHES = ("-", "--", ":", "-.")

# Matplotlib wants colours of its own; these are put in place of the page's, which differ in light and dark.
TEXT, GRID, WARN = "#010101", "#010102", "#010103"
COLOURS = [f"#0102{number:02x}" for number in range(SERIES)]
VARIABLES = {TEXT: "--faint", GRID: "--line", WARN: "--warn"} | {c: f"--s{i}" for i, c in enumerate(COLOURS)}

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """`points` are (step, value), None where there is no finite one. `number` says which colour and dash; of a `noisy`
    one the course is drawn, and the values faintly behind it."""

    points: Points
    number: int = 0
    noisy: bool = False

    @property
    def is_empty(self) -> bool:
        return not any(value is not None for _, value in self.points)


def swatch(number: int) -> tuple[int, str]:
    """Which colour (of `SERIES`) and dash the curve `number` has."""
    return number % SERIES, DASHES[number // SERIES % len(DASHES)]


def svg(curves: Sequence[Curve], *, label: str, marks: Sequence[int] = (), wide: bool = False) -> str | None:
    """`label` says what is measured, and `marks` at which steps something happened. None where there is nothing to
    draw. The same curves give the same text."""
    curves = [curve for curve in curves if not curve.is_empty]
    if not curves:
        return None
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    settings: Any = {
        **{"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9, "text.parse_math": False},
        **{"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT},
        **{"axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False},
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.6, 3.4) if wide else (4.7, 2.3), layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for step in islice(sorted(set(marks)), MOST_POINTS):
            axes.axvline(step, color=WARN, linewidth=0.8, linestyle=(0, (2, 2)))
        for curve in curves:
            _draw(axes, curve)
        values = np.array([value for curve in curves for _, value in curve.points if value is not None])
        if values.min() > 0 and values.max() > 30 * np.median(values):  # which would press all others to the ground
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8 if wide else 5))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), label)


def _draw(axes: Any, curve: Curve) -> None:
    colour, dash = swatch(curve.number)
    x = np.array([step for step, _ in curve.points], dtype=float)
    y = np.array([np.nan if value is None else value for _, value in curve.points], dtype=float)
    few = len(x) <= FEW_POINTS
    at, middle, low, high = _thinned(x, y)
    if curve.noisy and not few:
        if len(at) < len(x):
            axes.fill_between(at, low, high, color=COLOURS[colour], alpha=0.18, linewidth=0)
        else:
            axes.plot(x, y, color=COLOURS[colour], alpha=0.3, linewidth=0.8)
        _, middle, _, _ = _thinned(x, smoothed(y))
    mark = "o" if few else None
    axes.plot(at, middle, color=COLOURS[colour], linestyle=dash, marker=mark, markersize=2.5, linewidth=1.7)


def smoothed(y: Any) -> Any:
    """The moving mean over a fortieth of the values, centred; what is not finite is left out of it."""
    half = max(1, len(y) // 80)
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    number = counts[high] - counts[low]
    return np.where(number, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def _thinned(x: Any, y: Any) -> tuple[Any, Any, Any, Any]:
    """At most `MOST_POINTS` places, and there the mean, the lowest and the highest value."""
    if len(x) <= MOST_POINTS:
        return x, y, y, y
    bounds = np.linspace(0, len(x), MOST_POINTS + 1).astype(int)
    rows = []
    for start, stop in pairwise(bounds):
        known = y[start:stop][np.isfinite(y[start:stop])]
        values = (known.mean(), known.min(), known.max()) if len(known) else (np.nan, np.nan, np.nan)
        rows.append((x[start:stop].mean(), *values))
    at, middle, low, high = np.array(rows).T
    return at, middle, low, high


def _inline(text: str, label: str) -> str:
    """What stands in a page: without the head of a file, its ids its own, its colours and fonts those of the page."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[\d. -]+"', head)
    assert box is not None
    rest = rest.replace("xlink:href", "href")
    rest = re.sub(r'<g id="[^"]*">', "<g>", rest)
    rest = re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", rest)
    prefix = re.sub(r"\W+", "-", label)
    rest = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', rest)
    rest = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", rest)
    for colour, variable in VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    rest = re.sub(r"\s*\n\s*", "\n", rest)
    return f'<svg role="img" aria-label="{escape(label)} over the steps" {box[0]}>{rest}'
