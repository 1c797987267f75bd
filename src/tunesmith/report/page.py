"""The parts of an HTML page, with curves as SVG: nothing loaded from elsewhere, in light and dark, on screen and on
paper. Curves have the fonts and colours of the page. A script of ours lets them be asked where one may run
(`curves.js`); no other may, and where none does, the pictures stay."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

STYLE = """
:root { color-scheme: light dark;
  --page: light-dark(#fff, #14171a); --text: light-dark(#1b1f24, #e4e7ea); --faint: light-dark(#5b636d, #98a2ad);
  --line: light-dark(#d8dde3, #363d44); --code: light-dark(#f6f7f9, #1b1f24); --warn: light-dark(#a03a00, #ffb07c);
  --green: light-dark(#d3efd9, #1b4427); --edge: light-dark(#1a7f37, #57c273);
  --s0: light-dark(#1f5fd0, #7aa9ff); --s1: light-dark(#b8470b, #ffa566); --s2: light-dark(#157a3c, #63cf86);
  --s3: light-dark(#8432c9, #cd9bff); --s4: light-dark(#0b7285, #55cfe4); --s5: light-dark(#b81d5c, #ff8fbf);
  --s6: light-dark(#806000, #e0bb52); --s7: light-dark(#475569, #a9b6c8); }
* { box-sizing: border-box; }
body { margin: 2rem auto; max-width: 68rem; padding: 0 1rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; overflow-wrap: anywhere; }
h2 small, h3 small, .faint { color: var(--faint); font-weight: 400; } small { font-size: .85em; }
.warn { color: var(--warn); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; margin: .6rem 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.numbers { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; padding: 0; list-style: none; }
.numbers li { flex: 1 1 8rem; border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; }
.numbers b { display: block; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.curves figure:first-child { grid-column: 1 / -1; }
figure { margin: 0; break-inside: avoid; } figcaption { color: var(--faint); } figcaption b { color: var(--text); }
svg { width: 100%; height: auto; display: block; }
.curves figure { overflow-x: auto; }
svg.live text { font: 9px system-ui, sans-serif; fill: var(--faint); }
svg.live { touch-action: pan-y; } svg.live path { fill: none; stroke-width: 1.7; } svg.live .faintly { opacity: .3;
  stroke-width: .8; } svg.live .d1 { stroke-dasharray: 6 3; } svg.live .d2 { stroke-dasharray: 2 2; }
svg.live .d3 { stroke-dasharray: 6 2 2 2; } svg.live .grid { stroke: var(--line); stroke-width: .6; }
svg.live .mark { stroke: var(--warn); stroke-dasharray: 2 2; stroke-width: .8; } svg.live .pointer {
  stroke: var(--faint); }
.tools { display: flex; flex-wrap: wrap; gap: .2rem .6rem; align-items: center; color: var(--faint); min-height: 1.7em;
  font-size: .85em; } .tools button { font: inherit; color: inherit; background: var(--code); border-radius: 4px;
  border: 1px solid var(--line); } .tools input { width: 5rem; margin: 0; }
@media screen { svg.still { display: none; } }
@media screen and (max-width: 42rem) { .curves figure:first-child svg { min-width: 40rem; } }
.key { display: inline-block; width: 1.6em; height: 0; border-top: 3px solid; vertical-align: middle;
  margin: 0 .4em 0 .2em; }
.legend { margin: .4rem 0; } .legend > span { margin-right: 1.2rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 500; } td.n, th.n { text-align: right; white-space: nowrap; }
td.best { font-weight: 700; }
.wide { overflow-x: auto; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 2.5rem; }
.bar { display: block; height: .75rem; min-width: 1px; border-radius: 2px; background: var(--s0); margin-top: .35rem; }
td.bars { width: 55%; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: .6rem;
  margin: 0 0 .6rem; align-items: start; }
.answers.two { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); align-items: stretch; }
.text { border: 1px solid var(--line); border-radius: 6px; background: var(--code); padding: .5rem .7rem;
  break-inside: avoid; min-width: 0; }
.text > small { display: block; color: var(--faint); margin-bottom: .15rem; }
.text.same { border-color: var(--edge); } .text.same > small { color: var(--edge); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, monospace; }
.row { margin: .6rem 0; } .row pre { color: var(--faint); } .row b { font-weight: 600; color: var(--text);
  background: var(--green); border-bottom: 2px solid var(--edge); }
@media print { .tools, svg.live { display: none; } }
@media print { :root { color-scheme: light; } body { margin: 0; max-width: none; font-size: 11px; }
  h2, h3 { break-after: avoid; } .bar, .row b { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

REPETITION = re.compile(r"(.{1,300}?)\1{3,}", re.DOTALL)
REPEATED = 100
"""Characters that a repetition must take to be folded."""
MISSING = "n/a"
"""In a table, a value that is not known."""

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; {scripts}base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}{series}</style>
</head>
<body>
"""
SCRIPT = Path(__file__).with_name("curves.js")
BORDERS = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}

MOST_POINTS = 500
"""The most that are drawn of a curve; between them, the lowest and the highest value are shown as an area."""
FEW_POINTS = 40
"""Up to this many, each point is marked, and nothing is smoothed."""
FLAT = 0.01
"""What changes by less than this part of itself is drawn as flat."""
SERIES = 8
"""Colours, after which they are used again with other dashes."""
DASHES = ("-", "--", ":", "-.")

# Matplotlib wants colours of its own; these are put in place of the page's, which differ in light and dark.
TEXT, GRID, WARN = "#010101", "#010102", "#010103"
COLOURS = [f"#0102{number:02x}" for number in range(SERIES)]
VARIABLES = {TEXT: "--faint", GRID: "--line", WARN: "--warn"} | {c: f"--s{i}" for i, c in enumerate(COLOURS)}

Points = Sequence[tuple[float, float | None]]


def whole_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """The whole page of `parts`, which are HTML; `style` is CSS of its own. The only script that may run is that of the
    curves, where there are some: the page names its digest."""
    body, tail, scripts = "".join(parts), "</body>\n</html>\n", ""
    series = "".join(
        f".s{i} {{ border-color: var(--s{i}); }} .c{i} {{ stroke: var(--s{i}); }}\n" for i in range(SERIES)
    )
    if "<svg" in body:
        script = SCRIPT.read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        scripts, tail = f"script-src 'sha256-{digest}'; ", f"<script>{script}</script>\n{tail}"
    head = HEAD.format(title=escape(title), style=STYLE + style, series=series, scripts=scripts)
    return head + body + tail


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, those without a value left out."""
    rows = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in pairs if value]
    return f"<dl>\n{''.join(rows)}</dl>\n" if rows else ""


def numbers(pairs: Iterable[tuple[str, str]]) -> str:
    """The few numbers that matter most, in large type."""
    items = [f"<li><b>{escape(value)}</b>{escape(name)}</li>\n" for name, value in pairs if value]
    return f'<ul class="numbers">\n{"".join(items)}</ul>\n' if items else ""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], best: Sequence[int | None] = ()) -> str:
    """A table. Columns of numbers are aligned right. `best` has the index of the cell of each row to mark."""
    body = [list(row) for row in rows]
    right = {
        i
        for i in range(1, len(headings))
        if body and all(row[i] in ("", MISSING) or row[i].lstrip("-")[:1].isdigit() for row in body)
    }

    def line(tag: str, cells: Sequence[str], chosen: int | None) -> str:
        names = [" ".join(["n"] * (i in right) + ["best"] * (i == chosen)) for i in range(len(cells))]
        marks = [f' class="{name}"' if name else "" for name in names]
        inner = (f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>\n"

    lines = [line("th", headings, None)]
    lines += [line("td", row, best[i] if i < len(best) else None) for i, row in enumerate(body)]
    return f'<div class="wide"><table>\n{"".join(lines)}</table></div>\n'


def bars(title: str, rows: Sequence[tuple[str, int]], unit: str) -> str:
    """A histogram as a table, which can be read without its bars, too."""
    largest = max((count for _, count in rows), default=0)
    if not largest:
        return ""
    lines = [
        f'<tr><td>{escape(name)}</td><td class="n">{count:,}</td>'
        f'<td class="bars"><span class="bar" style="width: {100 * count / largest:.1f}%"></span></td></tr>\n'
        for name, count in rows
    ]
    head = f'<tr><th>{escape(unit)}</th><th class="n">examples</th><th></th></tr>\n'
    return f"<div><h3>{escape(title)}</h3>\n<table>\n{head}{''.join(lines)}</table></div>\n"


def legend(names: Iterable[tuple[int, str]]) -> str:
    """What the curves are, by their numbers."""
    spans = []
    for number, name in names:
        colour, dash = swatch(number)
        style = f"border-top-style: {BORDERS[dash]}"
        spans.append(f'<span><span class="key s{colour}" style="{style}"></span>{escape(name)}</span>\n')
    return f'<p class="legend">{"".join(spans)}</p>\n' if spans else ""


def figure(picture: str | None, title: str, caption: str) -> str:
    """`picture` is SVG; nothing without it."""
    if picture is None:
        return ""
    return f"<figure>\n<figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption>\n{picture}\n</figure>\n"


def text_box(title: str, text: str, *, same: bool = False) -> str:
    """A text as it is, line breaks and all."""
    mark = " same" if same else ""
    return f'<div class="text{mark}"><small>{escape(title)}</small><pre>{escape(text)}</pre></div>\n'


# Curves


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """`points` are (step, value), None where there is no finite one. `number` says which colour and dash; of a `noisy`
    one the course is drawn, and the values faintly behind it. `name` tells it from the others of its picture."""

    points: Points
    number: int = 0
    noisy: bool = False
    name: str = ""

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
        # Which would press all others to the ground.
        is_log = bool(values.min() > 0 and values.max() > 30 * np.median(values))
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
            if 0 < np.ptp(values) < FLAT * abs(values.mean()):  # a line, not what it trembles by
                axes.set_ylim(values.mean() - FLAT * abs(values.mean()), values.mean() + FLAT * abs(values.mean()))
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8 if wide else 5))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), label, _asked(curves, marks, is_log=is_log))


def _asked(curves: Sequence[Curve], marks: Sequence[int], *, is_log: bool) -> str:
    """What `curves.js` draws them by, as JSON. Of long curves, means."""
    drawn = []
    for curve in curves:
        at, values, _, _ = _thinned(
            np.array([step for step, _ in curve.points], dtype=float),
            np.array([np.nan if value is None else value for _, value in curve.points], dtype=float),
        )
        colour, dash = swatch(curve.number)
        drawn.append(
            {
                "name": curve.name,
                "colour": colour,
                "dash": f"d{DASHES.index(dash)}",
                "noisy": curve.noisy and len(curve.points) > FEW_POINTS,
                "steps": [round(float(step)) for step in at],
                "values": [float(f"{value:.5g}") if np.isfinite(value) else None for value in values],
            }
        )
    shown = sorted(set(marks))[:MOST_POINTS]
    return json.dumps({"curves": drawn, "marks": shown, "log": is_log}, separators=(",", ":"))


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


def _inline(text: str, label: str, asked: str) -> str:
    """SVG to put into a page: without the head of a file, with ids of its own, and the page's colours and fonts.
    `asked` is what its script reads."""
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
    name = f'role="img" aria-label="{escape(label)} over the steps"'
    return f'<svg {name} data-curves="{escape(asked)}" {box[0]}>{rest}'


# Values as text


def amount(value: float | None, digits: int = 4) -> str:
    """`1,234`, `0.5432`, `1.2e-05`, or nothing."""
    if value is None:
        return ""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.{digits - 2}g}"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def folded(text: str) -> str:
    """`text`, of which what repeats itself again and again is there twice, with how often it came."""

    def said(found: re.Match[str]) -> str:
        unit, times = found[1], len(found[0]) // len(found[1])
        return f"{unit}{unit} … ({times - 2:,} more times)" if len(found[0]) >= REPEATED else found[0]

    return REPETITION.sub(said, text)


def cut(text: str, longest: int) -> str:
    """`text`, or its beginning with how much is missing."""
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"
