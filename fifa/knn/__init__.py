"""How far apart prompts are: nearest neighbours, near copies, and the entropy they imply.

Entropy follows Kozachenko & Leonenko (1987), in the form of Kraskov et al. (2004), eq. 20. Vectors
that coincide have a log distance of minus infinity, so distances are floored: two vectors closer
than `floor` count as being `floor` apart. Repeated prompts must be merged by the caller, so that a
popular prompt is one point; its repetitions then share the point's value (see `fifa.scoring`).

Neighbours are exact (`fifa.knn.exact`) up to EXACT_UP_TO rows, beyond that those of an approximate
index, whose share of true neighbours is measured (`fifa.knn.approximate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import digamma, gammaln

from fifa.config import InputError
from fifa.knn.exact import Distances, Ids, Vectors, nearest
from fifa.knn.near import near_groups

__all__ = ["FLOOR", "Index", "Neighbours", "Vectors", "entropy", "find_neighbours", "knn_distances"]
__all__ += ["log_knn", "near_groups", "nearest", "repeated_distances"]

FLOOR = 0.01  # of the diameter 2 of unit vectors; rewordings of one prompt lie above 0.1
EXACT_UP_TO = 200_000  # rows; some 5 minutes of one core at 768 dimensions

Index = Literal["auto", "exact", "ivf", "hnsw"]


@dataclass(frozen=True)
class Neighbours:
    """The k nearest rows of each row, and how they were found."""

    distances: Distances  # (N, k), nearest first
    ids: Ids  # (N, k)
    index: str  # exact, ivf or hnsw
    recall: float  # share of the true neighbours found: 1 for exact, else measured on a sample
    effort: int  # cells looked into (ivf), candidates held (hnsw), 0 for exact


def find_neighbours(
    x: Vectors, k: int, index: Index = "auto", recall: float = 0.98, seed: int = 0
) -> Neighbours:
    """The k nearest rows of each row of x (N, D), by an index of that name.

    `auto` is exact up to EXACT_UP_TO rows and ivf beyond. An approximate index looks as far as it
    must for half of what `recall` lets it miss, on a sample drawn by `seed`; what it reached is
    measured on another. Raises InputError unless 1 <= k < N.
    """
    from fifa.knn import approximate

    if index == "auto":
        index = "exact" if len(x) <= EXACT_UP_TO else "ivf"
    if index == "exact":
        return Neighbours(*nearest(x, k), "exact", 1.0, 0)
    searches: dict[str, approximate.Search] = {"ivf": approximate.ivf, "hnsw": approximate.hnsw}
    found = searches[index](x, k, recall, seed)
    return Neighbours(found.distances, found.ids, index, found.recall, found.effort)


def knn_distances(x: Vectors, k: int) -> Distances:
    """Euclidean distance of each row of x (N, D) to its k-th nearest other row, exactly; (N,).

    Raises InputError unless 1 <= k < N.
    """
    return nearest(x, k)[0][:, -1]


def log_knn(x: Vectors, k: int, floor: float = FLOOR) -> Distances:
    """log of `knn_distances`, floored: what each row adds to the entropy, up to constants; (N,)."""
    return np.log(np.maximum(knn_distances(x, k), floor))


def repeated_distances(x: Vectors, times: Ids, k: int) -> Distances:
    """Distance to the k-th nearest other, (P,), where row i of x (P, D) is there `times[i]` times.

    The copies of a row are neighbours at distance 0. The same as `knn_distances` of the repeated
    rows, but each distinct one is compared once. Raises InputError unless 1 <= k < times.sum().
    """
    if not 1 <= k < times.sum():
        raise InputError(f"{k} neighbours need more than {k} vectors, got {times.sum()}")
    if len(x) == 1:
        return np.zeros(1)
    distances, ids = nearest(x, min(k, len(x) - 1))
    distances = np.column_stack([np.zeros(len(x)), distances])
    met = np.cumsum(np.column_stack([times - 1, times[ids]]), axis=1)
    return distances[np.arange(len(x)), (met >= k).argmax(axis=1)]


def entropy(x: Vectors, k: int, floor: float = FLOOR) -> float:
    """Differential entropy of the distribution that x (N, D) was drawn from, in nats.

    H = digamma(N) - digamma(k) + log V_D + (D / N) sum_i log d_k(x_i), V_D the volume of the unit
    ball. Vectors on a sphere fill no volume: for them H orders sets of one size, no more.
    """
    n, dim = x.shape
    log_ball = dim / 2 * np.log(np.pi) - gammaln(dim / 2 + 1)
    return float(digamma(n) - digamma(k) + log_ball + dim * log_knn(x, k, floor).mean())
