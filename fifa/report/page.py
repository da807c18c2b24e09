"""Pieces that any page is built from; they know nothing of filtering.

A page needs no network and no other file, fits a phone, and follows the reader's light or dark
setting.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fifa.config import fingerprint
from fifa.images import Pixels, data_uri, shrink

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Section = tuple[str, str]  # heading in plain text, body in HTML

SIDE = 160  # longer side of a picture on the page, pixels
TINY = 100  # pictures below this side are enlarged pixel by pixel


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --paper: #fdfdfc;
  --card: #ffffff; --line: #e2e3e6; --good: #18794e; --mark: #2f7ed8; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #a0a4ab; --paper: #16181b;
  --card: #1e2125; --line: #34383e; --good: #4cc38a; --mark: #6cb0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
p { max-width: 46rem; } .soft { color: var(--soft); margin-top: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32rem 1.1rem .32rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; } .num { text-align: right; }
.tiles, .cards { display: flex; flex-wrap: wrap; gap: .75rem; margin-bottom: 1rem; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.tile { padding: .7rem 1.1rem; min-width: 8rem; } .tile b { display: block; font-size: 1.5rem;
  font-weight: 600; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft);
  font-size: .85rem; }
.card { padding: .6rem; } .card .pictures { display: flex; gap: .5rem; }
figure { margin: 0; } .card figure { width: 8rem; }
.card figcaption { font-size: .78rem; color: var(--soft); }
.card img { display: block; width: 8rem; border-radius: .3rem; border: 2px solid transparent; }
.card .tiny { image-rendering: pixelated; }
.card .marked img { border-color: var(--good); } .card .marked figcaption { color: var(--good);
  font-weight: 600; }
.card p { margin: .4rem 0 0; font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; }
.card .pictures + p { max-width: 17rem; } .card .note { color: var(--soft); font-size: .78rem;
  max-width: 17rem; }
svg { max-width: 100%; height: auto; color: var(--ink); } svg text { font-family: inherit
  !important; }
.plots { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; margin-bottom: 1rem; }
.plots svg { flex: 1 1 17rem; max-width: 22rem; min-width: 0; }
.plots svg:only-child { max-width: 34rem; }
.bars { display: grid; grid-template-columns: minmax(8rem, max-content) max-content max-content 1fr;
  gap: .4rem 1rem; align-items: center; font-size: .92rem; font-variant-numeric: tabular-nums; }
.bars .num, .bars .share { text-align: right; } .bars .share { color: var(--soft); }
.bars i { display: block; height: .7rem; min-width: 2px; border-radius: .2rem;
  background: var(--soft); opacity: .55; } .bars i.marked { background: var(--mark); opacity: 1; }
code { font-size: .9em; }
@media (max-width: 34rem) { body { padding: 1.25rem .9rem 3rem; } h1 { font-size: 1.4rem; }
  .tile { flex: 1 1 8rem; padding: .55rem .8rem; } .tile b { font-size: 1.25rem; }
  .bars { grid-template-columns: 1fr max-content max-content; } .bars i { grid-column: 1 / -1;
  margin-bottom: .3rem; } .card { flex: 1 1 100%; } .card figure { width: 50%; }
  .card img { width: 100%; } .card .pictures + p, .card .note { max-width: none; }
  .plots svg { max-width: none; } .scroll td:not(.num) { min-width: 7.5rem; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #555; --paper: #fff;
  --card: #fff; --line: #ccc; --good: #18794e; --mark: #2f7ed8; }
  body { max-width: none; padding: 0; font-size: 12px; print-color-adjust: exact; }
  .card, .tile, tr, svg { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def html_page(title: str, sections: Sequence[Section], subtitle: str = "", style: str = "") -> str:
    """A whole page from sections (heading, HTML body); heading and title are plain text.

    `style` is CSS of the caller's own pieces.
    """
    body = "".join(f"<h2>{html.escape(head)}</h2>\n{inner}\n" for head, inner in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="soft">{html.escape(subtitle)}</p>\n'
        f"{body}</body>\n</html>\n"
    )


def html_text(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def html_number(value: Any) -> str:
    """Plain text of a table cell: four significant digits, thousands apart, a dash for None."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        return f"{float(value):,.0f}" if abs(float(value)) >= 10_000 else f"{float(value):.4g}"
    return str(value)


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with the keys of the first row as headings; numbers stand to the right."""
    if not rows:
        return html_text("Nothing.")
    names = list(rows[0])
    numeric = {n for n in names if all(_is_number(row.get(n)) for row in rows)}
    mark = {name: ' class="num"' if name in numeric else "" for name in names}
    head = "".join(f"<th{mark[name]}>{html.escape(name)}</th>" for name in names)
    lines = [
        "".join(f"<td{mark[n]}>{html.escape(html_number(row.get(n)))}</td>" for n in names)
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def _is_number(value: Any) -> bool:
    return value is None or (
        isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    )


def html_tiles(tiles: Sequence[tuple[str, Any]]) -> str:
    """Large numbers side by side, from (what it is, value)."""
    inner = "".join(
        f'<div class="tile"><b>{html.escape(html_number(value))}</b>'
        f"<span>{html.escape(name)}</span></div>\n"
        for name, value in tiles
    )
    return f'<div class="tiles">\n{inner}</div>'


class Bar(NamedTuple):
    """A part of a whole: what it is, how many, and whether it is marked."""

    label: str
    number: int
    marked: bool = False


def html_bars(bars: Sequence[Bar]) -> str:
    """Counts as lines with their share of the sum, in numbers and as a bar."""
    total = sum(bar.number for bar in bars) or 1
    lines = "".join(
        f'<span>{html.escape(bar.label)}</span><span class="num">{bar.number:,}</span>'
        f'<span class="share">{bar.number / total:.1%}</span>'
        f'<i{" class=marked" if bar.marked else ""} style="width:{100 * bar.number / total:.2f}%">'
        f"</i>\n"
        for bar in bars
    )
    return f'<div class="bars">\n{lines}</div>'


class Picture(NamedTuple):
    """A picture on a card, the line under it, and whether it is marked, say as the winner."""

    image: Pixels
    label: str = ""
    marked: bool = False


class Card(NamedTuple):
    """Pictures that belong together, with a text and a smaller note below."""

    pictures: Sequence[Picture]
    text: str = ""
    note: str = ""


def html_images(cards: Sequence[Card]) -> str:
    """Cards side by side; pictures are shown at one width, large ones stored smaller."""
    return f'<div class="cards">\n{"".join(_card(card) for card in cards)}</div>'


def _card(card: Card) -> str:
    pictures = "".join(
        f"<figure{' class=marked' if picture.marked else ''}>"
        f"<img{' class=tiny' if max(picture.image.shape) < TINY else ''} "
        f'src="{data_uri(shrink(picture.image, SIDE))}" alt="{html.escape(picture.label)}">'
        f"<figcaption>{html.escape(picture.label)}</figcaption></figure>"
        for picture in card.pictures
    )
    text = f"<p>{html.escape(card.text)}</p>" if card.text else ""
    note = f'<p class="note">{html.escape(card.note)}</p>' if card.note else ""
    return f'<div class="card"><div class="pictures">{pictures}</div>{text}{note}</div>\n'


def html_plots(figures: Sequence[Figure]) -> str:
    """Figures side by side, below each other where there is no room."""
    return f'<div class="plots">\n{"".join(map(html_plot, figures))}</div>'


_INK = "#012345"  # stands for the text colour of the page, which SVG calls currentColor


def html_plot(figure: Figure) -> str:
    """A matplotlib figure as inline SVG whose text and axes take the colour of the page."""
    import matplotlib as mpl
    from matplotlib.text import Text

    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=_INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(_INK)
    for text in figure.findobj(Text):
        if text.get_color() == "black":
            text.set_color(_INK)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fifa"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several figures share a page: their ids must not meet.
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{fingerprint(svg)}-", svg)
