"""The parts of a page about runs: no script, nothing loaded from elsewhere, light and dark, on screen and on paper."""

from collections.abc import Iterable, Sequence
from html import escape

from tunesmith.report.plots import SERIES, swatch

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
@media print { :root { color-scheme: light; } body { margin: 0; max-width: none; font-size: 11px; }
  h2, h3 { break-after: avoid; } .bar, .row b { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

MISSING = "n/a"
"""In a table, a value that is not known."""

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}{series}</style>
</head>
<body>
"""
BORDERS = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}


def whole_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """The whole page of `parts`, which are HTML; `style` is CSS of its own."""
    series = "".join(f".s{i} {{ border-color: var(--s{i}); }}\n" for i in range(SERIES))
    return HEAD.format(title=escape(title), style=STYLE + style, series=series) + "".join(parts) + "</body>\n</html>\n"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, those without a value left out."""
    rows = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in pairs if value]
    return f"<dl>\n{''.join(rows)}</dl>\n" if rows else ""


def numbers(pairs: Iterable[tuple[str, str]]) -> str:
    """The few numbers that matter most, large."""
    items = [f"<li><b>{escape(value)}</b>{escape(name)}</li>\n" for name, value in pairs if value]
    return f'<ul class="numbers">\n{"".join(items)}</ul>\n' if items else ""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], best: Sequence[int | None] = ()) -> str:
    """Cells that begin with a digit stand to the right under their heading. `best` says which cell of a row is to be
    seen first."""
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
    """A histogram as a table that is read without its bars, too."""
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


def cut(text: str, longest: int) -> str:
    """`text`, or its beginning with how much is missing."""
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"
