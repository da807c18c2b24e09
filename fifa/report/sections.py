"""The sections of the page on a filter, and the counts and terms among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fifa.config import InputError
from fifa.filtering import CHOSEN, FATES, SUMMARY, SelectConfig, read_scores
from fifa.pairs import PairTable
from fifa.report.comparisons import comparisons
from fifa.report.examples import SHOWN, example_sections
from fifa.report.page import Bar, Section, html_bars, html_plots, html_table, html_text, html_tiles
from fifa.scoring import REJECTED, read_manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = NDArray[np.float64]


def filter_sections(
    folder: Path, examples: int, brief: bool = False
) -> tuple[list[Section], dict[str, Any]]:
    """The page's sections (heading, HTML) and its numbers, for pages that tell of more than this.

    `brief` keeps the counts, the terms, and examples of what was kept and dropped.
    """
    selection, fates = _read_selection(folder)
    table = PairTable.open(selection["data"])
    _check_unchanged(selection, table)
    scores = _with_fates(read_scores(Path(selection["scores"])), fates)
    terms = {name: _term(scores, name) for name in _MEANING}
    numbers = {**selection, "terms": {name: _spread(*values) for name, values in terms.items()}}
    numbers["histograms"] = {name: _histogram(*values) for name, values in terms.items()}
    numbers["rejected"] = _rejected(numbers)
    sections = [
        ("What came and what went", _funnel(numbers, brief)),
        ("The three terms, among all pairs and among the kept", _terms(numbers)),
    ]
    if not brief:
        sections += comparisons(table, scores, numbers)
    shown = SHOWN[:2] if brief else SHOWN
    told, numbers["examples"] = example_sections(table, scores, examples, shown)
    sections += told
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


def _check_unchanged(selection: dict[str, Any], table: PairTable) -> None:
    """InputError where data or scores are not those that the pairs were selected from."""
    then, scores = selection["scored_with"], Path(selection["scores"])
    if table.fingerprint() != then["data"]:
        raise InputError(f"{table.path} has changed since the selection; score and select again")
    manifest = read_manifest(scores)
    now = {**manifest["pass"], **manifest["prompts"]}
    changed = [name for name in then if now.get(name) != then[name]]
    if changed:
        raise InputError(
            f"{scores} was made anew after the selection, with another {', '.join(changed)}; "
            "run `fifa select` again"
        )


def _with_fates(scores: pa.Table, fates: pa.Table) -> pa.Table:
    rows = pa.array(scores["row"].to_numpy())
    for name in ("fate", "importance"):
        scores = scores.append_column(name, fates[name].take(rows))
    return scores


def _rejected(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    path = Path(numbers["scores"]) / REJECTED
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


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
    "margin": "reward of the winner minus that of the loser",
    "quality": "0 to 10 for the text of the prompt",
    "log_knn": "log distance to the nearest prompts, nats",
}
_TITLE = {"margin": "margin", "quality": "text quality", "log_knn": "diversity"}


# ---- counts and terms ----------------------------------------------------------------------------


def _funnel(numbers: dict[str, Any], brief: bool) -> str:
    fates: dict[str, int] = numbers["fates"]
    tiles = html_tiles(
        [
            ("rows in the data set", sum(fates.values())),
            ("pairs kept", numbers["kept"]),
            ("of which different prompts", numbers["prompts"]["kept"]),
            ("reward agrees with people, all", f"{numbers['agreement']['all']:.1%}"),
            ("reward agrees with people, kept", f"{numbers['agreement']['kept']:.1%}"),
        ]
    )
    text = tiles
    if numbers["kept"] < numbers["wanted"]:
        text += html_text(f"{numbers['wanted']:,} were asked for; there are no more to keep.")
    text += html_bars([Bar(fate, count, fate == CHOSEN) for fate, count in fates.items()])
    rejected = numbers["rejected"]
    if rejected and not brief:
        shown = [
            {"row": r["row"], "why it could not be scored": r["reason"]} for r in rejected[:10]
        ]
        more = f"The first {len(shown)} of {len(rejected):,} rows that could not be scored:"
        text += html_text(more) + html_table(shown)
    return text


BINS = 40


def _histogram(values: Values, kept: Values) -> dict[str, list[float]]:
    """Densities among all and among the kept, between the same edges."""
    edges = np.histogram_bin_edges(values, bins=BINS)
    both = {"all": values, "kept": kept}
    densities = {name: np.histogram(x, edges, density=True)[0].tolist() for name, x in both.items()}
    return {"edges": edges.tolist(), **densities}


def _terms(numbers: dict[str, Any]) -> str:
    figures = [_drawn(_TITLE[name], found) for name, found in numbers["histograms"].items()]
    meanings = "; ".join(f"{_TITLE[name]}: {meaning}" for name, meaning in _MEANING.items())
    rows = [
        {"term": _TITLE[name], "among": among, **spread}
        for name, both in numbers["terms"].items()
        for among, spread in both.items()
    ]
    told = html_text(meanings[0].upper() + meanings[1:] + ".")
    return html_plots(figures) + told + html_table(rows)


def _drawn(title: str, found: dict[str, list[float]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.3), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("all", "#8b8d98"), ("kept", "#2f7ed8")):
        axes.stairs(found[name], found["edges"], fill=True, alpha=0.55, color=colour, label=name)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=11)
    axes.set_yticks([])
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _settings(numbers: dict[str, Any]) -> str:
    meanings = SelectConfig.model_fields
    rows = [
        {"setting": key, "value": str(value), "meaning": meanings[key].description or ""}
        for key, value in numbers["settings"].items()
    ]
    rows += [
        {"setting": key, "value": str(value), "meaning": "scored with"}
        for key, value in numbers["scored_with"].items()
    ]
    return html_table(rows)
