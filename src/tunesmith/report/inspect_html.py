"""The inspect view as one HTML page: no script, nothing loaded from elsewhere, readable in light and dark.

Supervision is shown three times over (colour, weight of the letters, a line below), so that it needs no colour vision.
"""

from collections.abc import Iterator, Sequence
from html import escape

from tunesmith.report.inspect import Document, InspectedRow, Piece, shown

STYLE = """
:root { color-scheme: light dark;
  --page: light-dark(#fff, #14171a); --text: light-dark(#1b1f24, #e4e7ea); --faint: light-dark(#5b636d, #98a2ad);
  --line: light-dark(#d3d8de, #394047); --code: light-dark(#f6f7f9, #1b1f24); --tint: light-dark(#edf0f3, #22272c);
  --green: light-dark(#bde8c6, #1d4d2b); --green2: light-dark(#d8f3dd, #163c21);
  --edge: light-dark(#1a7f37, #57c273); --special: light-dark(#8a1a8a, #ee9bee); --warn: light-dark(#a03a00, #ffb07c); }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .2rem; } h3 { font-size: 1rem; margin: 0; }
h2 small, h3 small { color: var(--faint); font-weight: 400; } .warn { color: var(--warn); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.pack { border: 1px solid var(--line); border-radius: 6px; background: var(--code); }
.pack > section + section { border-top: 3px double var(--faint); }
.pack h3 { padding: .3rem .8rem 0; }
.tokens { padding: .6rem .8rem; font: 14px/1.75 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.t { color: var(--faint); padding: .1em 0; } .t.b { background: var(--tint); }
.s { color: var(--text); font-weight: 650; background: var(--green); border-bottom: 2px solid var(--edge); }
.s.b { background: var(--green2); } .x { color: var(--special); font-style: italic; }
.m { opacity: .6; font-weight: 400; font-style: normal; }
.w { font: 600 .75em system-ui, sans-serif; border: 1px solid var(--edge); border-radius: 3px; padding: 0 .25em; }
.i { display: none; font: .7em ui-monospace, monospace; color: var(--faint); padding: 0 .3em 0 .1em; }
.i::before { content: "\\2060"; } /* a word joiner: ids stay on the line of their token */
body:has(#ids:checked) .i { display: inline; }
.legend { position: sticky; top: 0; background: var(--page); border-bottom: 1px solid var(--line); padding: .5rem 0; }
.legend > * { margin-right: 1.2rem; }
"""

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
"""

LEGEND = """<p class="legend">
<span><span class="t s">super</span><span class="t s b">vised</span></span>
<span><span class="t">not super</span><span class="t b">vised</span></span>
<span><span class="t x">special</span></span>
<span><span class="m">⏎</span> newline, <span class="m">·</span> space, <span class="m">⇥</span> tab</span>
<span><span class="w">&times;0.5</span> weight</span>
<label><input type="checkbox" id="ids"{checked}> token ids</label>
</p>
<p>Shades tell neighbouring tokens apart. Nothing predicts the first token of a document, so it is never trained on.</p>
"""


def page(title: str, facts: Sequence[tuple[str, str]], rows: Sequence[InspectedRow], *, ids: bool = False) -> str:
    """The whole page. `facts` are labels and values for its head; `ids` shows token ids from the start."""
    parts = [HEAD.format(title=escape(title), style=STYLE), "<dl>\n"]
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in facts]
    parts += ["</dl>\n", LEGEND.format(checked=" checked" if ids else "")]
    for row in rows:
        parts += _row(row)
    return "".join([*parts, "</body>\n</html>\n"])


def _row(row: InspectedRow) -> Iterator[str]:
    packed = len(row.documents) > 1
    lacks_end = not packed and not row.documents[0].ends
    yield f'<h2>{escape(row.title)} {_summary(row.summary(), lacks_end)}</h2>\n<div class="pack">\n'
    for number, document in enumerate(row.documents, start=1):
        heading = f"document {number} of {len(row.documents)} {_summary(document.summary(), not document.ends)}"
        yield f"<section>{f'<h3>{heading}</h3>' if packed else ''}"
        yield from _document(document)
        yield "</section>\n"
    yield "</div>\n"


def _summary(text: str, warn: bool) -> str:
    attribute = ' class="warn"' if warn else ""
    return f"<small{attribute}>{escape(text)}</small>"


def _document(document: Document) -> Iterator[str]:
    yield '<div class="tokens">'
    last_weight = 0.0
    for number, (piece, parts) in enumerate(shown(document.pieces)):
        if piece.weight not in (0, 1, last_weight):
            yield f'<span class="w">&times;{piece.weight:g}</span>'
        last_weight = piece.weight
        classes = " ".join(["t", *["s"] * piece.supervised, *["x"] * piece.special, *["b"] * (number % 2)])
        # The ids of a newline stay on its line.
        line_break = "\n" if parts[-1][0].endswith("\n") else ""
        parts[-1] = (parts[-1][0].removesuffix("\n"), parts[-1][1])
        text = "".join(f'<span class="m">{escape(part)}</span>' if mark else escape(part) for part, mark in parts)
        yield f'<span class="{classes}" title="{escape(_title(piece))}">{text}</span>'
        yield f'<span class="i">{",".join(map(str, piece.ids))}</span>{line_break}'
    yield "</div>"


def _title(piece: Piece) -> str:
    """What the pointer shows over a piece."""
    ids = ", ".join(map(str, piece.ids))
    shared = f" ({len(piece.ids)} tokens share a character)" if len(piece.ids) > 1 else ""
    weight = "not supervised" if not piece.supervised else f"supervised, weight {piece.weight:g}"
    return f"id {ids}{shared}: {weight}"
