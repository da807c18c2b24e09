"""Near copies: which rows say nearly the same, by a rule that does not depend on luck."""

from __future__ import annotations

import numpy as np

from fifa.config import InputError
from fifa.knn.exact import Ids, Vectors, measure

_BLOCK = 2048  # rows compared with all leaders at once


def near_groups(x: Vectors, near: float) -> Ids:
    """The leader of each row of x (N, D), (N,): a row that leads, or one closer to it than `near`.

    Rows come in order. A row joins the earliest leader that it is closer to than `near`, and leads
    itself if there is none (Hartigan's leader clustering). So all of a group lie within `near` of
    its leader: chains, in which each row resembles the next and the ends do not resemble each
    other, are cut. A threshold of 0 leaves every row its own leader.
    """
    if not 0 <= near < 2:
        raise InputError(f"the distance below which prompts are copies is {near}, it must be 0..2")
    x = np.ascontiguousarray(x, dtype=np.float32)
    leader = np.arange(len(x))
    if near == 0:
        return leader
    leads = np.empty(0, dtype=np.int64)
    for start in range(0, len(x), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(x)))
        row, led = _close(x, rows, leads, near)
        leader[row[::-1]] = led[::-1]  # pairs come in order: the earliest leader is written last
        free = rows[leader[rows] == rows]
        row, other = _close(x, free, free, near)
        for a, b in zip(row.tolist(), other.tolist(), strict=True):
            if b < a and leader[a] == a and leader[b] == b:
                leader[a] = b
        leads = np.concatenate([leads, free[leader[free] == free]])
    return leader


def _close(x: Vectors, rows: Ids, others: Ids, near: float) -> tuple[Ids, Ids]:
    """Pairs of `rows` and `others` closer than `near`, in order of the row, then of the other."""
    if len(rows) == 0 or len(others) == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    square = np.einsum("ij,ij->i", x[rows], x[rows])[:, None]
    square = square + np.einsum("ij,ij->i", x[others], x[others])
    square -= 2 * (x[rows] @ x[others].T)
    slack = 1e-6 * (x.shape[1] + 4)  # more than float32 can be wrong by for unit vectors
    i, j = np.nonzero(square < near**2 + slack)
    i, j = rows[i], others[j]
    close = measure(x, i, j) < near
    return i[close], j[close]
