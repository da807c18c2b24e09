"""What the page compares: reward with people, prompts with each other, methods, weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from fifa import bench
from fifa.config import InputError, finite
from fifa.filtering import CHOSEN, SelectConfig, candidates
from fifa.pairs import PairTable
from fifa.report.page import Section, html_number, html_plots, html_table, html_text
from fifa.report.prompt_map import KEPT_SHOWN, OTHERS_SHOWN, PromptMap, html_map, prompt_map
from fifa.scoring import SCORES, read_manifest
from fifa.selection import SELECTORS, Terms
from fifa.sweep import Point, weight_effects

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparisons(table: PairTable, scores: pa.Table, numbers: dict[str, Any]) -> list[Section]:
    """Agreement, map, methods and weights; their numbers go into `numbers`."""
    config = _select_config(numbers)
    terms = candidates(config, read_manifest(config.scores)).terms
    measured = bench.agreement(bench.read_pairs(config.scores / SCORES))
    numbers["agreement_by_margin"] = finite(asdict(measured))
    found = _map_of(scores, terms)
    prompts = _prompts(table, scores, found)
    numbers["map"] = _map_numbers(found, prompts)
    effects = weight_effects(terms, config, numbers["kept"])
    numbers["weights"] = [{"change": told, **asdict(point)} for told, point in effects]
    return [
        ("Does the reward agree with people?", _agreement(measured, effects[0][1])),
        ("A map of the prompts", _map_told(found) + html_map(found, prompts)),
        ("What the choice is worth", _objectives(numbers)),
        ("What each weight does", _effects(effects)),
    ]


def _select_config(numbers: dict[str, Any]) -> SelectConfig:
    try:
        return SelectConfig(**{**numbers["settings"], "scores": numbers["scores"]})
    except ValidationError:
        raise InputError(
            "the selection was made by another version; run `fifa select` again"
        ) from None


# ---- agreement -----------------------------------------------------------------------------------

_QUARTERS = ("smallest margins", "second quarter", "third quarter", "largest margins")


def _agreement(measured: bench.Agreement, kept: Point) -> str:
    rows: list[tuple[str, bench.Share, float | None, str]] = [("all", measured.overall, None, "")]
    for name, quarter in zip(_QUARTERS, measured.quarters, strict=True):
        span = f"{html_number(quarter.least)} to {html_number(quarter.most)}"
        rows.append((name, quarter.agreement, quarter.expected, span))
    rows.append(("kept", kept.agreement, None, ""))
    told = (
        f"Of {measured.strict:,} pairs in which a person preferred one picture ({measured.ties:,} "
        f"ties left out), the share in which the reward prefers it too, by the size of the margin. "
        f"Lines are 95% Wilson intervals; rings are what the reward itself expects, fitted to all "
        f"pairs by one slope. A half is chance."
    )
    table = [
        {
            "pairs": name,
            "number": part.pairs,
            "|margin|": span,
            "agreement": f"{part.value:.1%}",
            "95% interval": f"{part.low:.1%} to {part.high:.1%}",
            "expected": "–" if expected is None else f"{expected:.1%}",
        }
        for name, part, expected, span in rows
        if part.pairs
    ]
    return html_text(told) + html_plots([_quarters(measured)]) + html_table(table)


def _quarters(measured: bench.Agreement) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0.5, color="#8b8d98", linewidth=1, linestyle="--")
    for x, quarter in enumerate(measured.quarters):
        part = quarter.agreement
        if part.pairs:
            axes.plot([x, x], [part.low, part.high], color="#2f7ed8", linewidth=2)
            axes.plot([x], [part.value], "o", color="#2f7ed8")
        if quarter.expected is not None:
            axes.plot([x], [quarter.expected], "o", mfc="none", mec="#8b8d98", markersize=9)
    axes.set_xticks(range(4), ["smallest margins", "second", "third", "largest margins"])
    lowest = min([0.45, *(quarter.agreement.low for quarter in measured.quarters)])
    axes.set_ylim(max(0.0, lowest - 0.05), 1.03)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# ---- the map -------------------------------------------------------------------------------------


def _map_of(scores: pa.Table, terms: Terms) -> PromptMap:
    kept = np.zeros(len(terms.vectors), dtype=bool)
    kept[scores["prompt_id"].to_numpy()[scores["fate"].to_numpy() == CHOSEN]] = True
    return prompt_map(terms.vectors, kept)


def _prompts(table: PairTable, scores: pa.Table, found: PromptMap) -> list[str]:
    """The text of each prompt on the map, as its first row spells it."""
    ids, first = np.unique(scores["prompt_id"].to_numpy(), return_index=True)
    rows = scores["row"].to_numpy()[first[np.searchsorted(ids, found.prompt)]]
    order = np.argsort(rows)
    captions = table.read_rows(rows[order], ["caption"])["caption"].to_pylist()
    return [captions[place] for place in np.argsort(order)]


def _map_numbers(found: PromptMap, prompts: Sequence[str]) -> dict[str, Any]:
    points = zip(
        found.prompt.tolist(),
        found.kept.tolist(),
        found.place.tolist(),
        found.nearest.tolist(),
        found.distance.tolist(),
        prompts,
        strict=True,
    )
    return {
        "kept": found.kept_of,
        "not_kept": found.others_of,
        "points": [
            {
                "prompt_id": prompt,
                "kept": kept,
                "x": x,
                "y": y,
                "nearest": found.prompt[nearest].item() if nearest >= 0 else None,
                "distance": distance if np.isfinite(distance) else None,
                "prompt": text,
            }
            for prompt, kept, (x, y), nearest, distance, text in points
        ],
    }


def _map_told(found: PromptMap) -> str:
    shown = int(found.kept.sum())
    told = (
        f"Near here is near in the embedding (t-SNE); a line joins each prompt to the nearest one "
        f"shown. {shown:,} of {found.kept_of:,} kept prompts and {len(found.kept) - shown:,} of "
        f"{found.others_of:,} others, drawn by chance where there are more than {KEPT_SHOWN} and "
        f"{OTHERS_SHOWN}. Point at one to read it."
    )
    key = '<p class="key"><b class="marked"></b>a pair of it was kept<b></b>none was kept</p>'
    return html_text(told) + key


# ---- methods and weights -------------------------------------------------------------------------


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
    told += "".join(f" Not compared: {n}, which {w}." for n, w in numbers["not_compared"].items())
    return html_text(told) + html_table(rows)


def _effects(effects: Sequence[tuple[str, Point]]) -> str:
    usual = effects[0][1]
    rows = [
        {
            "if": change,
            "alpha": point.alpha,
            "gamma": point.gamma,
            "pairs exchanged": _exchanged(usual, point),
            "margin": point.margin,
            "text quality": point.quality,
            "entropy": point.entropy,
            "reward right": f"{point.agreement.value:.1%}",
        }
        for change, point in effects
    ]
    told = (
        f"What '{usual.method}' would have kept by other weights: how many of its {usual.kept:,} "
        f"pairs would be others, and the terms of the set that it would keep. The command "
        f"'fifa sweep' draws this over more weights and sizes."
    )
    if all(point.overlap == 1 for _, point in effects):
        told += " This method kept the same pairs each time."
    return html_text(told) + html_table(rows)


def _exchanged(usual: Point, point: Point) -> str:
    """How many pairs of one set are not in the other, from their overlap."""
    common = round(point.overlap * (usual.kept + point.kept) / (1 + point.overlap))
    return f"{point.kept - common:,} ({(point.kept - common) / point.kept:.0%})"
