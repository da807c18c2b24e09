"""How far apart prompts are: exact nearest neighbours, and the entropy they imply.

Entropy follows Kozachenko & Leonenko (1987), in the form of Kraskov et al. (2004), eq. 20. Vectors
that coincide have a log distance of minus infinity, so distances are floored: two vectors closer
than `floor` count as being `floor` apart. Repeated prompts must be merged by the caller, so that a
popular prompt is one point; its repetitions then share the point's value (see `fifa.scoring`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, gammaln

from fifa.config import InputError

FLOOR = 0.01  # of the diameter 2 of unit vectors; rewordings of one prompt lie above 0.1
_SPARE = 8  # candidates beyond the k-th that float32 may have put in the wrong order
_BLOCK = 1024  # query rows whose candidates are measured at once

Vectors = NDArray[np.float32]  # (N, D)


def knn_distances(x: Vectors, k: int) -> NDArray[np.float64]:
    """Euclidean distance of each row of x (N, D) to its k-th nearest other row, (N,).

    faiss proposes candidates in float32 by an exhaustive search; their distances are then measured
    in float64, because for close vectors the expansion |x|^2 + |y|^2 - 2xy has no digits left.
    Raises InputError unless 1 <= k < N.
    """
    import faiss

    x = np.ascontiguousarray(x, dtype=np.float32)
    if x.ndim != 2 or not 1 <= k < len(x):
        raise InputError(f"{k} neighbours need more than {k} vectors (N, D), got {x.shape}")
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x)
    wanted = min(len(x), k + 1 + _SPARE)
    distances = np.empty(len(x))
    for start in range(0, len(x), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(x)))
        _, candidates = index.search(x[block], wanted)
        distances[block] = _kth(x, block, candidates, k)
    return distances


def _kth(
    x: Vectors, rows: NDArray[np.int64], candidates: NDArray[np.int64], k: int
) -> NDArray[np.float64]:
    difference = x[candidates].astype(np.float64) - x[rows, None].astype(np.float64)
    distances = np.sqrt((difference**2).sum(axis=2))
    distances[candidates == rows[:, None]] = np.inf  # the row itself
    return np.partition(distances, k - 1, axis=1)[:, k - 1]


def log_knn(x: Vectors, k: int, floor: float = FLOOR) -> NDArray[np.float64]:
    """log of `knn_distances`, floored: what each row adds to the entropy, up to constants; (N,)."""
    return np.log(np.maximum(knn_distances(x, k), floor))


def entropy(x: Vectors, k: int, floor: float = FLOOR) -> float:
    """Differential entropy of the distribution that x (N, D) was drawn from, in nats.

    H = digamma(N) - digamma(k) + log V_D + (D / N) sum_i log d_k(x_i), V_D the volume of the unit
    ball. Vectors on a sphere fill no volume: for them H orders sets of one size, no more.
    """
    n, dim = x.shape
    log_ball = dim / 2 * np.log(np.pi) - gammaln(dim / 2 + 1)
    return float(digamma(n) - digamma(k) + log_ball + dim * log_knn(x, k, floor).mean())
