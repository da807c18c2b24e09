"""From a judge's scores to one number an image: how much better than expected it is, or liked.

Objectives on pairs need an order only and take several judges by Pareto dominance (see
`online.strict_pairs`). Those on single images need a number: the mean over judges of each judge's
z-score over the round, so that no judge counts for more because its unit is smaller. NaN stands
for a picture that could not be judged.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Scope = Literal["prompt", "round"]
Numbers = NDArray[np.float64]

LIMIT = 5.0  # standard deviations at which an advantage is cut (published code of DDPO and D3PO)
TIE = 1e-6  # standard deviations within which an image is as good as the mean


def combined(scores: Numbers, mean: Numbers, std: Numbers) -> Numbers:
    """Scores (N, R) of R judges as one number an image, (N,): the mean of their z-scores.

    `mean` and `std` (R,) are those of the whole round on all processes; a judge that gave every
    image the same score says nothing and counts as 0.
    """
    safe = np.where(std > 0, std, 1.0)
    return np.where(std > 0, (scores - mean) / safe, 0.0).mean(1)


def advantages(values: Numbers, images: int, scope: Scope, std: float) -> Numbers:
    """Advantages (N,) of values (N,) in groups of `images`, at most LIMIT in size.

    "prompt": (value - mean of its group) / std of its group (DDPO's per-prompt statistics, within
    one round and so without state). "round": value / std; the mean of a round is 0 already. `std`
    is that of the round. Where all are alike the advantage is 0. A value that is NaN, of a picture
    that could not be judged, counts for nobody, and its own advantage is 0.
    """
    groups = values.reshape(-1, images)
    there = np.isfinite(groups)
    if scope == "prompt":
        count = np.maximum(1, there.sum(1, keepdims=True))
        centred = groups - np.nansum(groups, 1, keepdims=True) / count
        spread = np.sqrt(np.nansum(centred**2, 1, keepdims=True) / count)
    else:
        centred, spread = groups, np.full_like(groups, std)
    found = np.divide(centred, spread, out=np.zeros_like(centred), where=there & (spread > TIE))
    return found.reshape(-1).clip(-LIMIT, LIMIT)


def labels(advantage: Numbers) -> Numbers:
    """+1 for images better than the mean, -1 for worse ones, 0 for those that are neither."""
    return np.where(np.abs(advantage) > TIE, np.sign(advantage), 0.0)
