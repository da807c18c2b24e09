"""Does a proxy know how sure it may be? The temperature that says so, and the error that is left.

`margin` (N,) is the logit that the first picture wins, `won` (N,) whether it did; no ties.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fifa.config import InputError

Floats = NDArray[np.float64]

LEAST, MOST = 0.05, 20.0  # temperatures; at the ends the data does not say how sure to be
BINS = 10


def temperature(margin: ArrayLike, won: ArrayLike) -> float:
    """The T in [LEAST, MOST] that makes sigma(margin / T) most likely (Guo et al. 2017, sec. 4.2).

    The likelihood is concave in 1 / T, so the one maximum is found.
    """
    from scipy.optimize import minimize_scalar

    m, y = _checked(margin, won)
    signed = np.where(y, m, -m)

    def loss(inverse: float) -> float:
        return float(np.logaddexp(0, -signed * inverse).mean())

    found = minimize_scalar(loss, bounds=(1 / MOST, 1 / LEAST), method="bounded")
    return float(1 / found.x)


def calibration_error(margin: ArrayLike, won: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) of sigma(|margin|), in [0, 1].

    Bins of equal width between 0.5 and 1: the mean over pairs of |share right - mean confidence|
    of their bin. A margin of 0 is half right.
    """
    m, y = _checked(margin, won)
    confidence = 1 / (1 + np.exp(-np.abs(m)))
    right = np.where(m == 0, 0.5, (m > 0) == y)
    where = np.minimum((2 * bins * (confidence - 0.5)).astype(int), bins - 1)
    count = np.bincount(where, minlength=bins)
    gap = np.bincount(where, right - confidence, bins)
    return float(np.abs(gap[count > 0]).sum() / len(m))


def agreement(margin: ArrayLike, won: ArrayLike) -> float:
    """Pairs of which the proxy prefers the winner; a margin of 0 counts half."""
    m, y = _checked(margin, won)
    return float(np.where(m == 0, 0.5, (m > 0) == y).sum())


def _checked(margin: ArrayLike, won: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    m, y = np.asarray(margin, dtype=np.float64), np.asarray(won, dtype=bool)
    if m.shape != y.shape or m.ndim != 1 or len(m) == 0 or not np.isfinite(m).all():
        raise InputError(
            f"calibration needs as many finite margins as outcomes, at least one, "
            f"got {m.shape} and {y.shape}"
        )
    return m, y
