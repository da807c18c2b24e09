"""From a judge's scores to one number an image: how much better than expected it is, or liked.

Objectives on pairs need an order only and take several judges by Pareto dominance (see
`online.strict_pairs`). Those on single images need a number: the mean over judges of each judge's
z-score over the round, so that no judge counts for more because its unit is smaller.
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
    is that of the round. Where all are alike the advantage is 0.
    """
    if scope == "prompt":
        groups = values.reshape(-1, images)
        centred = groups - groups.mean(1, keepdims=True)
        spread = groups.std(1, keepdims=True)
        found = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > TIE)
        return found.reshape(-1).clip(-LIMIT, LIMIT)
    return (values / std if std > TIE else np.zeros_like(values)).clip(-LIMIT, LIMIT)


def labels(advantage: Numbers) -> Numbers:
    """+1 for images better than the mean, -1 for worse ones, 0 for those that are neither."""
    return np.where(np.abs(advantage) > TIE, np.sign(advantage), 0.0)
