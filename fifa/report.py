"""One self-contained HTML page: what was kept, what was dropped, and why; the same as JSON.

The `html_*` functions below know nothing of filtering: any room may build its page from them. A
page needs no network and no other file, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fifa import filtering
from fifa.config import InputError, fingerprint, write_atomic
from fifa.filtering import CHOSEN, FATES, FULL, LOWER, POOR, SUMMARY, TIE, UNJUDGED, read_scores
from fifa.images import Pixels, data_uri, decode, shrink
from fifa.pairs import PairTable
from fifa.scoring import REJECTED
from fifa.selection import SELECTORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
NUMBERS = "report.json"
SIDE = 160  # longer side of a picture on the page, pixels
TINY = 100  # pictures below this side are enlarged pixel by pixel


# ---- pieces of any page --------------------------------------------------------------------------

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
code { font-size: .9em; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #555; --paper: #fff;
  --card: #fff; --line: #ccc; --good: #18794e; --mark: #2f7ed8; }
  body { max-width: none; padding: 0; font-size: 12px; print-color-adjust: exact; }
  .card, .tile, tr, svg { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def html_page(
    title: str, sections: Sequence[tuple[str, str]], subtitle: str = "", style: str = ""
) -> str:
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


# ---- the report on a filter ----------------------------------------------------------------------


def write_report(folder: str | Path, examples: int = 8) -> Path:
    """Write report.html and report.json beside the selection in `folder`; the page's path.

    `folder` is where `fifa select` wrote. `examples` is the number of pairs shown of each kind.
    Raises InputError if there is no selection, or what it was made from is gone.
    """
    folder = Path(folder)
    sections, numbers = filter_sections(folder, examples)
    subtitle = f"{numbers['data']}, method {numbers['settings']['method']}"
    write_atomic(folder / NUMBERS, json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / PAGE, html_page("FiFA: which pairs were kept", sections, subtitle))
    return folder / PAGE


def filter_sections(
    folder: Path, examples: int, brief: bool = False
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """The page's sections (heading, HTML) and its numbers, for pages that tell of more than this.

    `brief` leaves out the comparison of methods, the settings and the rarer fates.
    """
    selection, fates = _read_selection(folder)
    scores = _with_fates(read_scores(Path(selection["scores"])), fates)
    terms = {name: _term(scores, name) for name in ("margin", "quality", "log_knn")}
    numbers = {**selection, "terms": {name: _spread(*values) for name, values in terms.items()}}
    table = PairTable.open(selection["data"])
    sections = [
        ("What came and what went", _funnel(numbers, [] if brief else _rejected(numbers))),
        ("The three terms, among all pairs and among the kept", _terms(terms, numbers)),
    ]
    if not brief:
        sections.append(("What the choice is worth", _objectives(numbers)))
    sections += _example_sections(table, scores, examples, _SHOWN[:2] if brief else _SHOWN)
    if not brief:
        sections.append(("Settings", _settings(numbers)))
    return sections, numbers


def _read_selection(folder: Path) -> tuple[dict[str, Any], pa.Table]:
    try:
        selection = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        fates = pq.read_table(folder / FATES)
    except FileNotFoundError:
        raise InputError(f"{folder} holds no selection; run `fifa select` first") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the selection in {folder}: {error}") from None
    if selection["agreement"]["all"] is None:
        raise InputError(f"{folder} holds prompts without pictures, the report shows pairs")
    return selection, fates


def _with_fates(scores: pa.Table, fates: pa.Table) -> pa.Table:
    rows = scores["row"].to_numpy()
    if len(rows) and rows.max() >= len(fates):
        raise InputError("the scores were made anew after the selection; run `fifa select` again")
    for name in ("fate", "importance"):
        scores = scores.append_column(name, fates[name].take(pa.array(rows)))
    return scores


def _rejected(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    path = Path(numbers["scores"]) / REJECTED
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


Values = NDArray[np.float64]


def _term(scores: pa.Table, name: str) -> tuple[Values, Values]:
    """A column among all rows that have it, and among the kept."""
    values = scores[name].to_numpy().astype(np.float64)
    kept = scores["fate"].to_numpy() == CHOSEN
    return values[np.isfinite(values)], values[kept]


def _spread(values: Values, kept: Values) -> dict[str, dict[str, float]]:
    def row(x: Values) -> dict[str, float]:
        low, quarter, half, three, high = np.percentile(x, [5, 25, 50, 75, 95]).tolist()
        return {
            "mean": float(x.mean()),
            "5%": low,
            "25%": quarter,
            "median": half,
            "75%": three,
            "95%": high,
        }

    return {"all": row(values), "kept": row(kept)}


_MEANING = {
    "margin": "margin: reward of the winner minus that of the loser",
    "quality": "text quality, 0 to 10",
    "log_knn": "diversity: log distance to the nearest prompts, nats",
}


def _funnel(numbers: dict[str, Any], rejected: list[dict[str, Any]]) -> str:
    fates: dict[str, int] = numbers["fates"]
    total = sum(fates.values())
    tiles = html_tiles(
        [
            ("rows in the data set", total),
            ("pairs kept", numbers["kept"]),
            ("of which different prompts", numbers["prompts"]["kept"]),
            ("reward agrees with people, all", f"{numbers['agreement']['all']:.1%}"),
            ("reward agrees with people, kept", f"{numbers['agreement']['kept']:.1%}"),
        ]
    )
    short = ""
    if numbers["kept"] < numbers["wanted"]:
        short = html_text(f"{numbers['wanted']:,} were asked for; there are no more to keep.")
    rows = [{"fate": f, "rows": n, "% of rows": 100 * n / total} for f, n in fates.items()]
    text = tiles + short + html_table(rows)
    if rejected:
        shown = [
            {"row": r["row"], "why it could not be scored": r["reason"]} for r in rejected[:10]
        ]
        more = f"The first {len(shown)} of {len(rejected):,} rows that could not be scored:"
        text += html_text(more) + html_table(shown)
    return text


def _terms(terms: dict[str, tuple[Values, Values]], numbers: dict[str, Any]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (name, (values, kept)) in zip(figure.subplots(1, 3), terms.items(), strict=True):
        bins = np.histogram_bin_edges(values, bins=40)
        for x, colour, label in ((values, "#8b8d98", "all"), (kept, "#2f7ed8", "kept")):
            style = {"histtype": "stepfilled", "alpha": 0.55, "color": colour, "label": label}
            axes.hist(x, bins, density=True, **style)
        axes.set_title(_MEANING[name].split(":")[0], fontsize=10)
        axes.set_yticks([])
        axes.spines[["top", "left", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    rows = [
        {"term": _MEANING[name], "among": among, **spread}
        for name, both in numbers["terms"].items()
        for among, spread in both.items()
    ]
    return html_plot(figure) + html_table(rows)


def _objectives(numbers: dict[str, Any]) -> str:
    settings = numbers["settings"]
    rows = [
        {
            "method": name + (" (chosen)" if name == settings["method"] else ""),
            "how": SELECTORS[name].meaning,
            "f(S)": values["f"],
            "margin": values["margin"],
            "text quality": values["quality"],
            "entropy": values["entropy"],
        }
        for name, values in numbers["objective"].items()
    ]
    told = (
        f"f(S) = mean margin + {settings['alpha']:g} x mean text quality + {settings['gamma']:g} x "
        f"entropy of the kept prompts, for {numbers['kept']:,} pairs each. Margin and quality on "
        f"the {settings['norm']} scale; entropy per dimension, in standard deviations of the log "
        f"distance that prompts have in the whole set, 0 being its mean."
    )
    left_out = "".join(
        f" Not compared: {n}, which {w}." for n, w in numbers["not_compared"].items()
    )
    return html_text(told + left_out) + html_table(rows)


_SHOWN = (
    (CHOSEN, "Kept: highest importance first", "descending"),
    (LOWER, "Dropped: lowest importance first", "ascending"),
    (FULL, "Dropped although important: their prompts had their share", "descending"),
    (POOR, "Dropped: text below the minimum", "row"),
    (UNJUDGED, "Dropped: text without a score", "row"),
    (TIE, "Dropped: ties, from which no preference can be learned", "row"),
)


def _example_sections(
    table: PairTable, scores: pa.Table, count: int, shown: Sequence[tuple[str, str, str]]
) -> list[tuple[str, str]]:
    sections = []
    fates = scores["fate"].to_numpy()
    importance = scores["importance"].to_numpy()
    for fate, title, order in shown:
        found = np.flatnonzero(fates == fate)
        if order != "row":
            sign = -1 if order == "descending" else 1
            found = found[np.argsort(sign * importance[found], kind="stable")]
        if len(found):
            cards = _cards(table, scores.take(found[:count]))
            sections.append((f"{title} ({len(found):,})", html_images(cards)))
    return sections


def _cards(table: PairTable, scores: pa.Table) -> list[Card]:
    shown = scores.to_pylist()
    rows = sorted(score["row"] for score in shown)
    source = table.read_rows(rows, ["caption", "jpg_0", "jpg_1"]).to_pylist()
    by_row = dict(zip(rows, source, strict=True))
    return [_pair_card(score, by_row[score["row"]]) for score in shown]


def _pair_card(score: dict[str, Any], source: dict[str, Any]) -> Card:
    pictures = [
        Picture(
            decode(source[f"jpg_{side}"], f"row {score['row']}"),
            f"{'preferred, ' if score['win'] == side else ''}reward {score[f'reward_{side}']:.3g}",
            score["win"] == side,
        )
        for side in (0, 1)
    ]
    parts = [f"row {score['row']}"]
    if score["margin"] is not None:
        parts.append(f"margin {score['margin']:.3g}")
    if score["quality"] is not None:
        parts.append(f"text {score['quality']:.3g} ({score['quality_reason']})")
    parts.append(f"diversity {score['log_knn']:.2f}")
    if score["importance"] is not None:
        parts.append(f"importance {score['importance']:.2f}")
    return Card(pictures, source["caption"][:300], ", ".join(parts))


def _settings(numbers: dict[str, Any]) -> str:
    meanings = filtering.SelectConfig.model_fields
    rows = [
        {"setting": key, "value": str(value), "meaning": meanings[key].description or ""}
        for key, value in numbers["settings"].items()
    ]
    rows += [
        {"setting": key, "value": str(value), "meaning": "scored with"}
        for key, value in numbers["scored_with"].items()
    ]
    return html_table(rows)
