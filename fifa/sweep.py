"""How the kept set changes with its size and with the weights, as numbers and as a picture.

    sweep.json   settings, the curve over K for each method, the curves over alpha and gamma
    sweep.png    the same, drawn

Nothing is scored or embedded again: all sets are chosen from one table of terms, and the entropy of
a set of prompts is measured once, whichever method chose it. f(S) is always that of the configured
weights, so that sets chosen by other weights can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator

from fifa.bench import Share, share
from fifa.config import InputError, atomic_path, fingerprint, finite, write_atomic
from fifa.filtering import Method, SelectConfig, candidates
from fifa.scoring import REJECTED, read_manifest
from fifa.scoring.settings import TEXT_ONLY
from fifa.selection import SELECTORS, Ints, Terms, objective, parse_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERS = "sweep.json"
PICTURE = "sweep.png"

Progress = Callable[[str, int, int], None]  # stage, sets done, sets in all


class SweepConfig(SelectConfig):
    """Which sets to compare; the settings of `select` say what is changed one at a time."""

    methods: tuple[Method, ...] = Field(
        ("importance", "margin", "quality", "diversity", "random"),
        min_length=1,
        description="Methods whose sets are followed over their size.",
    )
    sizes: tuple[str, ...] = Field(
        ("0.1%", "0.2%", "0.5%", "1%", "2%", "5%", "10%", "20%", "50%", "100%"),
        min_length=1,
        description="Sizes of the kept set: numbers of pairs, or shares of all rows.",
    )
    alphas: tuple[float, ...] = Field(
        (0, 0.125, 0.25, 0.5, 1, 2, 4),
        description="Weights of text quality at which `method` chooses k pairs.",
    )
    gammas: tuple[float, ...] = Field(
        (0, 0.125, 0.25, 0.5, 1, 2, 4),
        description="Weights of diversity at which `method` chooses k pairs.",
    )
    grid: bool = Field(False, description="Also every alpha with every gamma.")

    @field_validator("methods", "alphas", "gammas", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """`a,b` is a list, as one writes it on a command line; so is a single value."""
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return [value] if isinstance(value, (int, float)) else value

    @field_validator("sizes", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        parts = cls._listed(value)
        return [str(part) for part in parts] if isinstance(parts, (list, tuple)) else parts

    @field_validator("sizes")
    @classmethod
    def _look_like_counts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for size in value:
            parse_count(size)
        return value

    @field_validator("alphas", "gammas")
    @classmethod
    def _not_negative(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(weight < 0 for weight in value):
            raise ValueError("weights must not be negative")
        return value


@dataclass(frozen=True)
class Point:
    """A kept set and what it is worth. Terms are on the scale of `norm`, see `fifa.selection`."""

    method: str
    alpha: float
    gamma: float
    wanted: int  # pairs
    kept: int
    prompts: int  # distinct, among the kept
    f: float | None  # by the configured weights; null for a set too small to have an entropy
    margin: float  # mean
    quality: float
    entropy: float | None
    agreement: Share  # of proxy and people among the kept
    overlap: float  # pairs in this set and the configured one, over pairs in either


@dataclass(frozen=True)
class Sweep:
    """All points of a sweep."""

    settings: dict[str, Any]
    rows: int  # of the data set
    eligible: int  # rows that could be kept
    sizes: list[Point]  # method by method, smallest first; overlap with `method` at the same size
    alphas: list[Point]  # `method` at k pairs; overlap with the set of the configured weights
    gammas: list[Point]
    grid: list[Point]


def no_progress(stage: str, done: int, total: int) -> None:
    """Say nothing."""


def sweep(config: SweepConfig, progress: Progress = no_progress) -> Sweep:
    """Choose and measure every set of `config`, and write sweep.json and sweep.png.

    Raises InputError if the folder holds no complete scores, or a size is larger than the data set.
    """
    manifest = read_manifest(config.scores)
    if manifest["pass"]["reward"] == TEXT_ONLY:
        raise InputError(f"{config.scores} holds text scores only, a sweep compares pairs")
    scores, _, _, terms = candidates(config, manifest)
    total = len(scores) + _rejected(config.scores)
    compared = Comparison(terms, config)
    wanted = parse_count(config.k, total)
    jobs = list(_jobs(config, [parse_count(size, total) for size in config.sizes], wanted))
    found: dict[str, list[Point]] = {"sizes": [], "alphas": [], "gammas": [], "grid": []}
    for done, (part, method, k, alpha, gamma) in enumerate(jobs, start=1):
        found[part].append(compared.point(method, k, alpha, gamma))
        progress("choosing and measuring", done, len(jobs))
    settings = config.model_dump(mode="json")
    swept = Sweep(settings, total, len(terms), **found)
    out = config.out or config.scores
    write_atomic(out / NUMBERS, json.dumps(asdict(swept), indent=2, ensure_ascii=False) + "\n")
    with atomic_path(out / PICTURE) as temporary:
        draw(swept).savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    return swept


def _rejected(folder: Path) -> int:
    path = folder / REJECTED
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _jobs(
    config: SweepConfig, sizes: Sequence[int], wanted: int
) -> Iterator[tuple[str, str, int, float, float]]:
    """(part, method, pairs, alpha, gamma) of every set, equal ones once."""
    default = (config.alpha, config.gamma)
    for method in dict.fromkeys(config.methods):
        for k in sorted(set(sizes)):
            yield "sizes", method, k, *default
    for alpha in sorted({*config.alphas, config.alpha}):
        yield "alphas", config.method, wanted, alpha, config.gamma
    for gamma in sorted({*config.gammas, config.gamma}):
        yield "gammas", config.method, wanted, config.alpha, gamma
    if config.grid:
        for alpha in sorted({*config.alphas, config.alpha}):
            for gamma in sorted({*config.gammas, config.gamma}):
                yield "grid", config.method, wanted, alpha, gamma


# ---- sets and what they are worth ----------------------------------------------------------------


class Comparison:
    """Sets chosen from one table of terms, each measured against the configured one of its size."""

    def __init__(self, terms: Terms, config: SelectConfig) -> None:
        self._terms, self._config = terms, config
        self._sets: dict[tuple[str, int, float, float], Ints] = {}
        self._entropies: dict[str, float] = {}

    def chosen(self, method: str, k: int, alpha: float, gamma: float) -> Ints:
        """The pairs that a method chooses by these weights, best first."""
        key = (method, k, alpha, gamma)
        if key not in self._sets:
            weighed = replace(self._terms, alpha=alpha, gamma=gamma)
            cap = self._config.cap or None
            self._sets[key] = SELECTORS[method].choose(weighed, k, cap, self._config.seed)
        return self._sets[key]

    def point(self, method: str, k: int, alpha: float, gamma: float) -> Point:
        """That set, measured."""
        config, terms = self._config, self._terms
        pairs = self.chosen(method, k, alpha, gamma)
        usual = self.chosen(config.method, k, config.alpha, config.gamma)
        margin, quality = float(terms.margin[pairs].mean()), float(terms.quality[pairs].mean())
        entropy = self._entropy(pairs)
        f = margin + config.alpha * quality + config.gamma * entropy
        difference = (terms.win - terms.lose)[pairs]
        right = float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        return Point(
            method=method,
            alpha=alpha,
            gamma=gamma,
            wanted=k,
            kept=len(pairs),
            prompts=len(np.unique(terms.prompt[pairs])),
            f=finite(f),
            margin=margin,
            quality=quality,
            entropy=finite(entropy),
            agreement=share(right, len(pairs)),
            overlap=jaccard(pairs, usual),
        )

    def _entropy(self, pairs: Ints) -> float:
        """h(S), which depends on the kept prompts alone."""
        key = fingerprint(np.sort(self._terms.prompt[pairs]).tobytes())
        if key not in self._entropies:
            self._entropies[key] = objective(pairs, self._terms).entropy
        return self._entropies[key]


def jaccard(a: Ints, b: Ints) -> float:
    """Size of the intersection of two sets over that of their union."""
    common = len(np.intersect1d(a, b))
    return common / (len(a) + len(b) - common)


CHANGES = (
    ("text quality does not count", 0.0, 1.0),
    ("text quality counts twice", 2.0, 1.0),
    ("diversity does not count", 1.0, 0.0),
    ("diversity counts twice", 1.0, 2.0),
    ("the margin alone counts", 0.0, 0.0),
)


def weight_effects(terms: Terms, config: SelectConfig, k: int) -> list[tuple[str, Point]]:
    """The configured set of k pairs, and what other weights would have chosen in its place."""
    compared = Comparison(terms, config)
    rows = [("as configured", compared.point(config.method, k, config.alpha, config.gamma))]
    for told, on_alpha, on_gamma in CHANGES:
        alpha, gamma = on_alpha * config.alpha, on_gamma * config.gamma
        rows.append((told, compared.point(config.method, k, alpha, gamma)))
    return rows


# ---- the picture ---------------------------------------------------------------------------------

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#000000")


def draw(swept: Sweep) -> Figure:
    """Six panels over the size of the kept set, three over the weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 11), layout="constrained")
    panels = figure.subplots(3, 3)
    alpha, gamma = swept.settings["alpha"], swept.settings["gamma"]
    over_size: tuple[tuple[str, Callable[[Point], float | None]], ...] = (
        (f"f(S) = margin + {alpha:g} quality + {gamma:g} entropy", lambda p: p.f),
        ("mean margin, normalised", lambda p: p.margin),
        ("mean text quality, normalised", lambda p: p.quality),
        ("entropy of the kept prompts", lambda p: p.entropy),
        ("reward agrees with people", lambda p: p.agreement.value),
        (f"overlap with '{swept.settings['method']}'", lambda p: p.overlap),
    )
    for axes, (title, value) in zip(panels.flat, over_size, strict=False):
        _over_size(axes, swept, title, value)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    _over_weight(panels[2, 0], swept.alphas, "alpha", "weight of text quality, alpha")
    _over_weight(panels[2, 1], swept.gammas, "gamma", "weight of diversity, gamma")
    _overlaps(panels[2, 2], swept)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure


def _over_size(
    axes: Axes, swept: Sweep, title: str, value: Callable[[Point], float | None]
) -> None:
    methods = list(dict.fromkeys(point.method for point in swept.sizes))
    for number, method in enumerate(methods):
        points = [point for point in swept.sizes if point.method == method]
        x = [100 * point.wanted / swept.rows for point in points]
        y = np.array([value(point) for point in points], dtype=float)  # None becomes NaN
        line = "--" if method == "random" else "-"
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(x, y, line, marker="o", markersize=3.5, color=colour, label=method)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}%")
    axes.xaxis.set_minor_formatter(lambda x, _: "")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("pairs kept, share of all rows", fontsize=9)


def _over_weight(axes: Axes, points: Sequence[Point], weight: str, label: str) -> None:
    """Terms of the kept set by a weight; evenly placed, as 0 has no place on a log scale."""
    x = np.arange(len(points))
    rows = (
        ("margin", [p.margin for p in points]),
        ("quality", [p.quality for p in points]),
        ("entropy", [p.entropy for p in points]),
    )
    for colour, (name, values) in zip(COLOURS, rows, strict=False):
        y = np.array(values, dtype=float)
        axes.plot(x, y, marker="o", markersize=3.5, color=colour, label=name)
    axes.set_xticks(x, [f"{getattr(point, weight):g}" for point in points])
    axes.set_title(f"terms of the {points[0].kept:,} kept", fontsize=10)
    axes.set_xlabel(label, fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def _overlaps(axes: Axes, swept: Sweep) -> None:
    for colour, points, weight in (
        (COLOURS[3], swept.alphas, "alpha"),
        (COLOURS[4], swept.gammas, "gamma"),
    ):
        x = [f"{getattr(point, weight):g}" for point in points]
        y = [point.overlap for point in points]
        axes.plot(x, y, marker="o", markersize=3.5, color=colour, label=weight)
    axes.set_ylim(0, 1.04)
    axes.set_title("overlap with the configured weights", fontsize=10)
    axes.set_xlabel("weight, the other as configured", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
