"""The arithmetic of a reward bench, on arrays: who is right, how hard it was, how sure one may be.

`margin` (N,) is the score of the first picture minus that of the second, NaN where a reward has
none; `label` (N,) is 0 or 1, the better picture. What a bench on files does and what a synthetic
world does are these functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fifa.bench import Share, share

Floats = NDArray[np.float64]

BANDS = ("easy", "middle", "hard")


def right(margin: ArrayLike, label: ArrayLike) -> Floats:
    """1 where the better picture has the higher score, 0.5 where they tie, NaN without a score."""
    m, y = np.asarray(margin, np.float64), np.asarray(label)
    found = np.where(m == 0, 0.5, ((m > 0) == (y == 0)).astype(np.float64))
    return np.where(np.isnan(m), np.nan, found)


def difficulty(margins: ArrayLike, label: ArrayLike) -> Floats:
    """Share of a panel that gets each pair wrong, (N,) from margins (panel, N); a tie is half.

    NaN where nobody on the panel has a score, or there is no label (-1).
    """
    y = np.asarray(label)
    wrong = 1 - right(np.asarray(margins, np.float64).reshape(-1, len(y)), y)
    known = ~np.isnan(wrong)
    count = known.sum(0)
    total = np.where(known, wrong, 0.0).sum(0)
    return np.where((count > 0) & (y >= 0), total / np.maximum(count, 1), np.nan)


def bands(values: ArrayLike) -> list[str]:
    """`easy`, `middle` or `hard` for each difficulty, "" for NaN: terciles by rank.

    Equal difficulties share a band, that of their mean rank, so bands may be of unequal size.
    """
    from scipy.stats import rankdata

    v = np.asarray(values, np.float64)
    known = ~np.isnan(v)
    found = np.full(len(v), "", dtype=object)
    if known.any():
        place = (rankdata(v[known]) - 0.5) / known.sum()  # in (0, 1)
        found[known] = np.array(BANDS, dtype=object)[np.minimum((3 * place).astype(int), 2)]
    return [str(band) for band in found]


def within(values: ArrayLike, keep: tuple[float, float] | None) -> NDArray[np.bool_]:
    """Which difficulties lie in the band that is kept, ends included; all of them for None."""
    v = np.asarray(values, np.float64)
    if keep is None:
        return np.ones(len(v), bool)
    return (v >= keep[0]) & (v <= keep[1])  # NaN is in no band


def accuracy(margin: ArrayLike, label: ArrayLike) -> Share:
    """Share of the scored pairs that a reward gets right, ties as half, with its interval."""
    found = right(margin, label)
    found = found[~np.isnan(found)]
    return share(float(found.sum()), len(found))


def by_group(margin: ArrayLike, label: ArrayLike, group: Sequence[str]) -> dict[str, Share]:
    """Accuracy of each group, in order of first appearance."""
    m, y, g = np.asarray(margin, np.float64), np.asarray(label), np.asarray(group, dtype=object)
    return {name: accuracy(m[g == name], y[g == name]) for name in dict.fromkeys(group)}


def macro_mean(groups: Mapping[str, Share]) -> float:
    """The mean of the groups' accuracies, each counting the same; NaN if none has a pair."""
    values = [part.value for part in groups.values() if part.pairs]
    return float(np.mean(values)) if values else float("nan")


def verdict(margin: ArrayLike) -> Floats:
    """1, 0 or -1: the first picture, a tie, the second; NaN without a score."""
    return np.sign(np.asarray(margin, np.float64))


def ties(margin: ArrayLike) -> float:
    """Share of the scored pairs on which a reward does not choose."""
    said = verdict(margin)
    said = said[~np.isnan(said)]
    return float((said == 0).mean()) if len(said) else float("nan")


def unchanged(margin: ArrayLike, other: ArrayLike) -> float:
    """Share of the pairs scored twice whose verdict is the same; NaN if there is none."""
    a, b = verdict(margin), verdict(other)
    both = ~np.isnan(a) & ~np.isnan(b)
    return float((a[both] == b[both]).mean()) if both.any() else float("nan")


def calibration(margin: ArrayLike, label: ArrayLike) -> float:
    """Expected calibration error of sigma(margin / T), T from the other half of the pairs.

    Scores have units of their own, so margins are first divided by their root mean square over that
    half; even and odd pairs take turns. NaN for fewer than 20 pairs or a reward that always ties.
    """
    from fifa.proxies.calibration import calibration_error, temperature

    m, y = np.asarray(margin, np.float64), np.asarray(label)
    known = ~np.isnan(m)
    m, won = m[known], y[known] == 0
    halves = (slice(0, None, 2), slice(1, None, 2))
    if len(m) < 20 or any(not m[half].any() for half in halves):
        return float("nan")
    parts = []
    for fit, test in (halves, halves[::-1]):
        unit = np.sqrt(np.mean(m[fit] ** 2))
        t = temperature(m[fit] / unit, won[fit])
        parts.append(calibration_error(m[test] / unit / t, won[test]) * len(m[test]))
    return float(sum(parts) / len(m))
