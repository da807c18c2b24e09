"""The figures of the page: what happened during training, and how often judges prefer what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d3po.health.verdicts import FEWEST_PROMPTS
from d3po.report.record import RunRecord
from fifa.report import html_plot, html_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# ---- curves -------------------------------------------------------------------------------------

Curve = tuple[str, list[int], list[float]]  # title, steps, values

_WATCHED = {
    "accuracy": "trained pairs ordered as judged (share)",
    "margin": "margin over the reference (log-ratio)",
    "clipped": "ratios outside the clip band (share)",
    "grad_norm": "gradient norm",
    "loss": "loss",
}


def curves(record: RunRecord) -> list[Curve]:
    """What happened during training, by optimizer step; empty and constant curves left out."""
    found: list[Curve] = []
    for judge in record.trained_on:
        steps = [row["step"] for row in record.rounds]
        found.append((f"reward of the rollouts: {judge}", steps, _column(record.rounds, judge)))
    for key, title in _WATCHED.items():
        rows = [row for row in record.updates if key in row]
        values = [np.nan if row[key] is None else row[key] for row in rows]
        found.append((title, [row["step"] for row in rows], values))
    return [curve for curve in found if len(set(curve[2])) > 1]


def _column(rounds: Sequence[Mapping[str, Any]], judge: str) -> list[float]:
    return [row["reward"].get(judge, np.nan) for row in rounds]


def html_curves(record: RunRecord) -> str:
    """The curves of a run, a panel each."""
    from matplotlib.figure import Figure

    found = curves(record)
    if not found:
        return html_text("The run recorded no curve.")
    lines = -(-len(found) // 3)
    figure = Figure(figsize=(11, 2.5 * lines), layout="constrained")
    panels = figure.subplots(lines, 3, squeeze=False).ravel()
    for axes, curve in zip(panels, found, strict=False):
        _plot(axes, curve)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    told = "By optimizer step; grey as measured, blue the mean over its neighbours."
    return html_plot(figure) + html_text(told)


def _plot(axes: Axes, curve: Curve) -> None:
    from matplotlib.ticker import MaxNLocator

    title, steps, values = curve
    smooth = running_mean(np.array(values), max(1, len(values) // 12))
    axes.plot(steps, values, color="#8b8d98", alpha=0.5, linewidth=0.8)
    axes.plot(steps, smooth, color="#2f7ed8", linewidth=1.8)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def running_mean(values: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """Mean over a window of `half` values to each side, cut at the ends; NaN are left out."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(values))
    first = np.maximum(places - half, 0)
    last = np.minimum(places + half + 1, len(values))
    found = counts[last] - counts[first]
    return np.divide(
        sums[last] - sums[first], found, out=np.full(len(values), np.nan), where=found > 0
    )


# ---- win rates ----------------------------------------------------------------------------------


WinRate = tuple[str, float, tuple[float, float], bool]
"""run: judge, win rate, 95% interval, whether there are prompts enough to say who is better."""


def win_rates(records: Sequence[RunRecord]) -> list[WinRate]:
    """Those of all judges that saw a difference."""
    return [
        (
            f"{record.name}: {judge.judge}",
            judge.win_rate,
            judge.win_rate_interval,
            record.evaluation.prompts >= FEWEST_PROMPTS,
        )
        for record in records
        if record.evaluation
        for judge in record.evaluation.judges
        if judge.win_rate is not None and judge.win_rate_interval is not None
    ]


def html_win_rates(records: Sequence[RunRecord]) -> str:
    """The win rates of all runs with their intervals, a line each; '' if there is none."""
    from matplotlib.figure import Figure

    rows = win_rates(records)
    if not rows:
        return ""
    figure = Figure(figsize=(9, 0.6 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(50, color="#8b8d98", linewidth=1, linestyle=(0, (4, 3)))
    for place, (_, rate, (low, high), enough) in enumerate(rows):
        colour = "#8b8d98"
        if enough and not low <= 0.5 <= high:
            colour = "#2f9e6e" if low > 0.5 else "#d9603f"
        axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=3)
        axes.plot([100 * rate], [place], "o", color=colour, markersize=7)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    title = "how often a judge prefers the picture after training, % (95% interval; 50: no change)"
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.tick_params(labelsize=8.5, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return html_plot(figure)
