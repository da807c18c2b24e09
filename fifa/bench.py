"""How often a proxy reward agrees with people, overall and where it is sure of itself.

Two kinds of input, both read as they are:

    *.json          a list of rows: `label` ("0", "1" or "tie": the image that the person preferred)
                    with `score_0` and `score_1`, or `prob_0` and `prob_1`
    scores.parquet  what `fifa score` writes, or the folder that holds it

FiFA keeps pairs by their margin, so the question is not only how often a proxy is right, but
whether it is right more often where its margin is large (arXiv 2410.10166).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fifa.config import InputError, finite, write_atomic

Floats = NDArray[np.float64]

SCORES, MANIFEST = "scores.parquet", "manifest.json"  # of a folder that `fifa score` wrote
SCORE_KEYS = (("score_0", "score_1"), ("prob_0", "prob_1"))
LABELS = {"0": 0, "1": 1, "tie": -1}
_Z = 1.959963984540054  # the normal distribution's 97.5% point
_LISTED = 20  # reasons kept in full; all are counted


@dataclass(frozen=True)
class Share:
    """A share of pairs with its 95% Wilson interval, which takes the pairs as independent."""

    pairs: int
    value: float  # NaN where there are no pairs
    low: float
    high: float


@dataclass(frozen=True)
class Quarter:
    """Strict pairs of neighbouring |margin|: how often the proxy is right, and should be."""

    least: float  # smallest |margin|
    most: float
    agreement: Share
    expected: float | None  # mean probability of being right; None where no slope can be fitted


@dataclass(frozen=True)
class Agreement:
    """What one proxy came to."""

    proxy: str
    file: str
    strict: int  # pairs of which the person preferred one image
    ties: int  # pairs that the person called a tie: left out of every share
    undecided: int  # strict pairs whose two scores are equal: each counts as half right
    overall: Share
    quarters: tuple[Quarter, ...]  # smallest |margin| first
    set_aside: dict[str, int] = field(default_factory=dict)  # reason -> rows
    examples: tuple[str, ...] = ()  # the first rows that were set aside, with the reason

    @property
    def largest(self) -> Share:
        """Agreement in the quarter with the largest |margin|."""
        return self.quarters[-1].agreement

    @property
    def smallest(self) -> Share:
        """Agreement in the quarter with the smallest |margin|."""
        return self.quarters[0].agreement


@dataclass(frozen=True)
class ScoredPairs:
    """Scores of both images and who won, row by row."""

    proxy: str
    file: str
    first: Floats  # (N,) score of image 0
    second: Floats
    win: NDArray[np.int8]  # 0 or 1, the image that the person preferred; -1 for a tie
    probabilities: bool  # the scores are the probabilities that the image is preferred
    set_aside: dict[str, int] = field(default_factory=dict)
    examples: tuple[str, ...] = ()


def bench(paths: Sequence[str | Path]) -> list[Agreement]:
    """The agreement of every proxy: JSON files, scores.parquet files, or folders of either.

    Raises InputError for a path that holds neither, or a file without a strict pair.
    """
    files = [file for path in paths for file in _files(Path(path))]
    return [agreement(read_pairs(file)) for file in files]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist (expected scored pairs: .json or {SCORES})")
    if (path / SCORES).is_file():
        return [path / SCORES]
    found = sorted(file for file in path.glob("*.json") if file.name != MANIFEST)
    if not found:
        raise InputError(f"{path} holds no scored pairs (expected .json files or {SCORES})")
    return found


# ---- reading -------------------------------------------------------------------------------------


def read_pairs(file: Path) -> ScoredPairs:
    """The scored pairs of one file; rows that are none are set aside, counted and listed."""
    return _read_parquet(file) if file.suffix == ".parquet" else _read_json(file)


def _read_parquet(file: Path) -> ScoredPairs:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = ["reward_0", "reward_1", "win"]
    try:
        table = pq.read_table(file, columns=wanted)
        first, second, win = (table[name].to_numpy().astype(np.float64) for name in wanted)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file} is no table of `fifa score` ({reason})") from None
    good = np.isfinite(first) & np.isfinite(second) & np.isin(win, list(LABELS.values()))
    bad = int((~good).sum())
    return ScoredPairs(
        proxy=_proxy_of(file.parent / MANIFEST) or file.parent.name,
        file=str(file),
        first=first[good],
        second=second[good],
        win=win[good].astype(np.int8),
        probabilities=False,
        set_aside={"a reward or the winner is missing": bad} if bad else {},
    )


def _proxy_of(manifest: Path) -> str | None:
    try:
        return str(json.loads(manifest.read_text(encoding="utf-8"))["pass"]["reward"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_json(file: Path) -> ScoredPairs:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not a JSON file ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{file} must be a JSON list of scored pairs that is not empty")
    known = [row for row in rows if isinstance(row, Mapping)]
    keys = next((k for k in SCORE_KEYS if any(k[0] in row for row in known)), None)
    if keys is None:
        raise InputError(f"{file}: no row has score_0 and score_1, or prob_0 and prob_1")
    good: list[tuple[float, float, int]] = []
    reasons: Counter[str] = Counter()
    examples: list[str] = []
    for number, row in enumerate(rows):
        read = read_row(row, keys)
        if isinstance(read, str):
            reasons[read] += 1
            examples.append(f"row {number}: {read}")
        else:
            good.append(read)
    columns = np.array(good, dtype=np.float64).reshape(-1, 3)
    return ScoredPairs(
        proxy=file.stem,
        file=str(file),
        first=columns[:, 0],
        second=columns[:, 1],
        win=columns[:, 2].astype(np.int8),
        probabilities=keys[0].startswith("prob"),
        set_aside=dict(reasons),
        examples=tuple(examples[:_LISTED]),
    )


def read_row(row: Any, keys: tuple[str, str]) -> tuple[float, float, int] | str:
    """Both scores and who won, or why the row is no scored pair."""
    if not isinstance(row, Mapping):
        return "not an object"
    label = LABELS.get(str(row.get("label")).strip())
    if label is None:
        return "the label is not 0, 1 or tie"
    scores = []
    for key in keys:
        value = _number(row.get(key))
        if value is None:
            return f"{key} is not a finite number"
        scores.append(value)
    return scores[0], scores[1], label


def _number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else, sentences included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# ---- arithmetic ----------------------------------------------------------------------------------


def agreement(pairs: ScoredPairs) -> Agreement:
    """How often the person's choice has the higher score; InputError without a strict pair."""
    strict = pairs.win >= 0
    if not strict.any():
        raise InputError(f"{pairs.file} holds no strict pair (one whose label is not a tie)")
    first, second = pairs.first[strict], pairs.second[strict]
    margin = np.where(pairs.win[strict] == 0, first - second, second - first)
    right = (margin > 0) + 0.5 * (margin == 0)
    sure = np.abs(margin)
    expected = _given(first, second) if pairs.probabilities else _fitted(margin)
    return Agreement(
        proxy=pairs.proxy,
        file=pairs.file,
        strict=len(margin),
        ties=int((~strict).sum()),
        undecided=int((margin == 0).sum()),
        overall=share(float(right.sum()), len(right)),
        quarters=_quarters(sure, right, expected),
        set_aside=pairs.set_aside,
        examples=pairs.examples,
    )


def share(right: float, pairs: int) -> Share:
    """right / pairs with its 95% Wilson score interval; `right` may hold halves."""
    if pairs == 0:
        return Share(0, math.nan, math.nan, math.nan)
    p, z2 = right / pairs, _Z**2 / pairs
    middle = (p + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(p * (1 - p) / pairs + z2 / (4 * pairs)) / (1 + z2)
    return Share(pairs, p, max(0.0, middle - half), min(1.0, middle + half))


def _quarters(sure: Floats, right: Floats, expected: Floats | None) -> tuple[Quarter, ...]:
    """Four parts by |margin|: floor(N / 4) at each end, the rest in the middle two.

    Pairs of equal |margin| that a border runs through are shared out: each lends every part its
    average, so the order of rows does not matter.
    """
    order = np.argsort(sure, kind="stable")
    ordered = sure[order]
    right, n = _shared(ordered, right[order]), len(sure)
    likely = None if expected is None else _shared(ordered, expected[order])
    end = n // 4
    borders = [0, end, n // 2, n - end, n]
    quarters = []
    for start, stop in pairwise(borders):
        size = stop - start
        quarters.append(
            Quarter(
                least=float(ordered[start]) if size else math.nan,
                most=float(ordered[stop - 1]) if size else math.nan,
                agreement=share(float(right[start:stop].sum()), size),
                expected=float(likely[start:stop].mean()) if likely is not None and size else None,
            )
        )
    return tuple(quarters)


def _shared(ordered: Floats, values: Floats) -> Floats:
    """Each value replaced by the mean over the pairs of the same |margin|."""
    _, group, sizes = np.unique(ordered, return_inverse=True, return_counts=True)
    means: Floats = np.bincount(group, weights=values) / sizes
    return means[group]


def _given(first: Floats, second: Floats) -> Floats | None:
    """The probability that the file gives to the image it favours."""
    total = first + second
    if (total <= 0).any():
        return None
    return np.maximum(first, second) / total


def _fitted(margin: Floats) -> Floats | None:
    """sigmoid(a |margin|) of the favoured image, with the a that makes the choices most likely.

    The Bradley-Terry model with one slope; None where every choice, or none, fits the scores: then
    no finite a is the best.
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    scale = float(np.abs(margin).max())
    if scale == 0:
        return np.full(len(margin), 0.5)
    if (margin >= 0).all() or (margin <= 0).all():
        return None
    unit = margin / scale

    def gradient(a: float) -> float:  # of the log-likelihood; falls as a grows
        return float((unit * expit(-a * unit)).sum())

    reach = 1.0
    while gradient(reach) > 0 or gradient(-reach) < 0:
        reach *= 2
    slope = brentq(gradient, -reach, reach)
    likely: Floats = expit(slope * np.abs(unit))
    return likely


# ---- telling -------------------------------------------------------------------------------------


def write_json(path: Path, results: Sequence[Agreement]) -> None:
    """All numbers of `bench` as JSON, with the rules they were made by; NaN becomes null."""
    document = {
        "interval": "95% Wilson score interval, pairs taken as independent",
        "ties": "pairs that people called a tie are left out; equal scores count as half right",
        "quarters": "floor(N / 4) strict pairs at each end of |margin|; equal ones share a border",
        "proxies": [finite(asdict(result)) for result in results],
    }
    write_atomic(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
