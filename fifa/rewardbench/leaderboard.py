"""Rewards side by side: one self-contained HTML page, and every number of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fifa.bench import Share
from fifa.config import InputError, finite, write_atomic
from fifa.images import decode
from fifa.report.page import (
    Card,
    Picture,
    Section,
    html_images,
    html_number,
    html_page,
    html_plot,
    html_table,
    html_text,
    html_tiles,
)
from fifa.rewardbench.measures import BANDS
from fifa.rewardbench.scenarios import meanings
from fifa.rewardbench.standing import Run, Standing
from fifa.rewardbench.table import Item

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, NUMBERS = "leaderboard.html", "leaderboard.json"
_DRAWN = 8  # rewards in the picture; the table has all
_HEADINGS = ("reward", "macro mean", "all pairs", "pairs", "ties", "order", "flips", "calibration")
_SHOWN = 1  # pairs of each scenario on the page


def write_leaderboard(run: Run, folder: Path) -> Path:
    """Write `leaderboard.html` and `leaderboard.json` into a folder; the page's path."""
    text = json.dumps(finite(numbers(run)), indent=2, ensure_ascii=False)
    write_atomic(folder / NUMBERS, text + "\n")
    title = f"Reward bench: {run.bench.name}"
    write_atomic(folder / PAGE, html_page(title, _sections(run), _subtitle(run)))
    return folder / PAGE


def numbers(run: Run) -> dict[str, Any]:
    """Every number of a run, with the rules they were made by."""
    return {
        "rules": {
            "ties": "equal scores count as half right",
            "interval": "95% Wilson score interval, pairs taken as independent",
            "macro": "mean accuracy of the scenarios, each counting the same",
            "bands": "terciles of difficulty, the share of the panel that is wrong",
            "flips": f"verdicts that change with one picture's saturation times {run.saturation:g}",
            "calibration": "error of sigma(margin / T), T fitted on the other half of the pairs",
        },
        "bench": dict(run.bench.facts),
        "keep": run.keep,
        "counted": len(run.counted),
        "rewards": [asdict(standing) for standing in run.standings],
    }


def _subtitle(run: Run) -> str:
    kept = "" if run.keep is None else f" of difficulty {run.keep[0]:g} to {run.keep[1]:g}"
    return (
        f"{len(run.counted):,} of {run.bench.facts['pairs']:,} pairs count{kept}; "
        f"fingerprint {run.bench.facts['fingerprint']}"
    )


def _sections(run: Run) -> list[Section]:
    truth = run.bench.facts.get("label_truth", {})
    tiles: list[tuple[str, Any]] = [
        ("pairs that count", len(run.counted)),
        ("scenarios", len({item.scenario for item in run.counted})),
        ("rewards", len(run.standings)),
    ]
    if "kept" in truth:
        tiles.append(("kept labels that are true", f"{truth['kept']['value']:.1%}"))
    panel = ", ".join(run.bench.facts.get("panel", ()))
    reading = (
        "A reward that knows nothing is at 0.5; below it, a reward prefers what is worse. Square "
        "brackets hold 95% intervals. Order: verdicts that stay when the two pictures change "
        "places, for rewards that look at both. Flips: verdicts that change with the saturation "
        "of one picture alone. Calibration: how far the share that is right lies from what the "
        "margin promises."
    )
    if panel:
        reading += f" * helped to say which pairs are difficult (panel: {panel})."
    sections = [
        (
            "Leaderboard",
            html_tiles(tiles) + html_table([_line(s) for s in run.standings]) + html_text(reading),
        ),
        ("By scenario", html_plot(figure(run.standings)) + _by_scenario(run)),
    ]
    if any(item.band for item in run.counted):
        cells = [line for s in run.standings[:_DRAWN] for line in _cell_lines(s)]
        sections.append(("By difficulty", html_table([_band_line(s) for s in run.standings])))
        sections.append(("By scenario and difficulty", html_table(cells)))
    cards = _cards(run.counted)
    if cards:
        sections.append(("What the scenarios are", html_images(cards)))
    gone = [
        {"reward": s.reward, "pairs": count, "why": reason}
        for s in run.standings
        for reason, count in s.set_aside.items()
    ]
    if gone:
        sections.append(("Set aside", html_table(gone)))
    return sections


def table_of(run: Run) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(title, headings, rows) of the two tables that a command line prints, in plain text."""
    first = [tuple(map(html_number, _line(s).values())) for s in run.standings]
    names = list(dict.fromkeys(item.scenario for item in run.counted))
    second = [
        (s.reward, *(html_number(_rounded(s.scenarios[name].value)) for name in names))
        for s in run.standings
    ]
    return [
        (f"Reward bench {run.bench.name}, {len(run.counted):,} pairs", _HEADINGS, first),
        ("Accuracy by scenario", ("reward", *names), second),
    ]


def shown(part: Share) -> str:
    """A share with its interval, a dash where there are no pairs."""
    return f"{part.value:.3f} [{part.low:.3f}, {part.high:.3f}]" if part.pairs else "–"


def _narrow(part: Share) -> str:
    """The same with two digits, on one line of a crowded table."""
    return f"{part.value:.2f}\u00a0[{part.low:.2f},\u00a0{part.high:.2f}]" if part.pairs else "–"


def _named(standing: Standing) -> str:
    return standing.reward + (" *" if standing.on_panel else "")


def _line(standing: Standing) -> dict[str, Any]:
    values = (
        _named(standing),
        _rounded(standing.macro),
        shown(standing.overall),
        standing.pairs,
        *map(_rounded, (standing.ties, standing.order, standing.flips, standing.calibration)),
    )
    return dict(zip(_HEADINGS, values, strict=True))


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else round(value, 3)


def _by_scenario(run: Run) -> str:
    names = list(dict.fromkeys(item.scenario for item in run.counted))
    empty = Share(0, float("nan"), float("nan"), float("nan"))
    return html_table(
        [
            {"reward": _named(s), **{n: _narrow(s.scenarios.get(n, empty)) for n in names}}
            for s in run.standings
        ]
    )


def _band_line(standing: Standing) -> dict[str, Any]:
    return {"reward": _named(standing), **{band: shown(standing.bands[band]) for band in BANDS}}


def _cell_lines(standing: Standing) -> list[dict[str, Any]]:
    return [
        {
            "reward": _named(standing),
            "scenario": name,
            **{band: _narrow(cell[band]) for band in BANDS},
        }
        for name, cell in standing.cells.items()
    ]


def figure(standings: Sequence[Standing]) -> Figure:
    """Accuracy of the first rewards by scenario, with intervals."""
    from matplotlib.figure import Figure

    drawn = standings[:_DRAWN]
    names = list(dict.fromkeys(name for s in drawn for name in s.scenarios))
    made = Figure(figsize=(9, 0.5 + 0.55 * max(len(names), 4)))
    axes = made.subplots()
    for place, s in enumerate(drawn):
        offset = 0.7 * ((place + 0.5) / len(drawn) - 0.5)
        at = [i + offset for i, name in enumerate(names) if s.scenarios[name].pairs]
        parts = [s.scenarios[name] for name in names if s.scenarios[name].pairs]
        middle = [part.value for part in parts]
        # at 0 and 1 rounding may put an end of the interval on the wrong side of the share
        ends = np.maximum([[p.value - p.low, p.high - p.value] for p in parts], 0).T
        axes.errorbar(middle, at, xerr=ends, fmt="o", ms=4, lw=1, label=s.reward)
    axes.axvline(0.5, color="gray", lw=0.8, ls=":")
    axes.set(xlim=(0, 1), xlabel="share of pairs that are right")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    made.tight_layout()
    return made


def _cards(items: Sequence[Item]) -> list[Card]:
    """A pair of each scenario, the better picture marked."""
    told = dict(meanings())
    cards = []
    for scenario in dict.fromkeys(item.scenario for item in items):
        of = [item for item in items if item.scenario == scenario]
        for item in of[:_SHOWN]:
            if item.first is None or item.second is None:
                continue
            try:
                sides = [decode(data, item.id) for data in (item.first, item.second)]
            except InputError:
                continue
            pictures = [
                Picture(side, "better" if item.label == i else "", item.label == i)
                for i, side in enumerate(sides)
            ]
            note = " ".join(part for part in (told.get(scenario, ""), item.what) if part)
            cards.append(Card(pictures, f"{scenario}: {item.prompt}", note))
    return cards
