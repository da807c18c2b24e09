"""Most of the nearest rows of each row, for sets too large to compare all with all.

`ivf` looks into the cells of a k-means partition that lie nearest to a row; `hnsw` walks the graph
of faiss. Both look as far as a seeded sample of rows needs, whose true neighbours an exact search
finds, and what they reach is measured on another sample. Distances found are measured in float64.
With the same number of threads the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fifa.knn.exact import Distances, Ids, Vectors, fast_bfloat16, first_k, measure, nearest

if TYPE_CHECKING:
    import torch

SAMPLE = 500  # rows to set an index by, and as many others to measure it on
_SPARE = 4  # candidates beyond the k-th, whose order in rough numbers may be wrong
_HELD = 1 << 24  # numbers of an intermediate table held at once
_LINKS, _BUILD = 32, 80  # of the graph: neighbours of a node, and candidates while it is built


class Found(NamedTuple):
    """Neighbours as an index found them."""

    distances: Distances  # (N, k), nearest first
    ids: Ids  # (N, k)
    recall: float  # share of the true neighbours found, on a sample
    effort: int  # cells looked into, or candidates held while walking


Search = Callable[[Vectors, int, float, int], Found]


class _Truth(NamedTuple):
    """Some rows and their true neighbours."""

    rows: Ids  # (R,)
    distances: Distances  # (R, k)
    ids: Ids  # (R, k)


def _truth(x: Vectors, k: int, seed: int) -> tuple[_Truth, _Truth]:
    """Two samples without a common row: one to set an index by, one to measure it on."""
    drawn = np.random.default_rng(seed).permutation(len(x))[: 2 * SAMPLE]
    rows = np.sort(drawn.reshape(2, -1) if len(drawn) % 2 == 0 else drawn[1:].reshape(2, -1))
    first, second = (_Truth(part, *nearest(x, k, part)) for part in rows)
    return first, second


def recall(found: Distances, truth: Distances) -> float:
    """Share of the k true neighbours that were found, both (R, k), nearest first.

    By distance: whoever is as near as the k-th true neighbour is as good as it.
    """
    return float((found <= truth[:, -1:]).mean())


# ---- cells ---------------------------------------------------------------------------------------


def ivf(x: Vectors, k: int, wanted: float, seed: int) -> Found:
    """Search the cells of a k-means partition; x (N, D). See `Found`.

    All rows that look into a cell are multiplied with its members at once, which makes of N small
    searches a matrix product for each cell.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    cells = _Cells(x, seed)
    tuning, check = _truth(x, k, seed)
    probes = cells.probes_for(tuning, (1 + wanted) / 2)
    distances, ids = np.empty((len(x), k)), np.empty((len(x), k), dtype=np.int64)
    step = max(1, _HELD // (probes * (k + _SPARE)))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        distances[part], ids[part] = cells.search(start, min(start + step, len(x)), probes, k)
    return Found(distances, ids, recall(distances[check.rows], check.distances), probes)


class _Cells:
    """A k-means partition of the rows of x, with the members of each cell side by side."""

    def __init__(self, x: Vectors, seed: int) -> None:
        import faiss
        import torch

        self._x = x
        count = max(1, min(round(2 * len(x) ** 0.5), len(x) // 8))
        means = faiss.Kmeans(
            x.shape[1], count, niter=8, seed=seed, max_points_per_centroid=64,
            min_points_per_centroid=1,
        )  # fmt: skip
        means.train(x)
        self._kind = torch.bfloat16 if fast_bfloat16() else torch.float32
        self._means = torch.from_numpy(means.centroids)
        self._half_mean = self._means.square().sum(1) / 2
        home = np.concatenate([cells[:, 0] for cells in self._nearest_cells(1)])
        self._home = home
        self._members = np.argsort(home, kind="stable")
        self._edge = np.searchsorted(home[self._members], np.arange(count + 1))
        self._place = np.empty(len(x), dtype=np.int64)
        self._place[self._members] = np.arange(len(x))
        self._by_cell = torch.empty(x.shape, dtype=self._kind)
        for start in range(0, len(x), 1024):  # a whole reordered copy in float32 would be large
            part = slice(start, start + 1024)
            self._by_cell[part] = torch.from_numpy(x[self._members[part]])
        self._half = torch.from_numpy(np.einsum("ij,ij->i", x, x) / 2)[self._members]

    def _nearest_cells(
        self, probes: int, rows: slice | Ids = slice(None)
    ) -> Iterator[NDArray[np.int64]]:
        """The cells whose means are nearest to each row, (R, probes), block by block."""
        import torch

        chosen = np.arange(len(self._x))[rows]
        step = max(1, _HELD // len(self._means))
        means = self._means.to(self._kind).T.contiguous()
        for start in range(0, len(chosen), step):
            part = torch.from_numpy(self._x[chosen[start : start + step]]).to(self._kind)
            scores = (part @ means).float().sub_(self._half_mean)
            yield scores.topk(probes, dim=1).indices.numpy()

    def probes_for(self, truth: _Truth, wanted: float) -> int:
        """How many cells must be looked into to meet the `wanted` share of true neighbours."""
        order = np.concatenate(list(self._nearest_cells(len(self._means), truth.rows)))
        rank = np.argsort(order, axis=1)
        needed = np.take_along_axis(rank, self._home[truth.ids], axis=1) + 1
        return int(np.quantile(needed, wanted, method="higher"))

    def search(self, start: int, stop: int, probes: int, k: int) -> tuple[Distances, Ids]:
        """The k nearest of rows start to stop among the members of those cells, (R, k) each."""
        import torch

        looked = np.concatenate(list(self._nearest_cells(probes, slice(start, stop))))
        room = k + _SPARE
        scores = torch.full((stop - start, probes, room), -torch.inf)
        ids = torch.full((stop - start, probes, room), -1)
        order = np.argsort(looked, axis=None, kind="stable")
        edges = np.searchsorted(looked.reshape(-1)[order], np.arange(len(self._means) + 1))
        for cell in range(len(self._means)):
            row, place = np.divmod(order[edges[cell] : edges[cell + 1]], probes)
            members = self._members[self._edge[cell] : self._edge[cell + 1]]
            if len(row) and len(members):
                near = self._scores(start + row, cell)
                near[torch.from_numpy((start + row)[:, None] == members)] = -torch.inf
                best, which = near.topk(min(room, len(members)), dim=1)
                at = torch.from_numpy(row), torch.from_numpy(place)
                scores[at[0], at[1], : best.shape[1]] = best
                ids[at[0], at[1], : best.shape[1]] = torch.from_numpy(members)[which]
        best, which = scores.flatten(1).topk(min(room, probes * room), dim=1)
        return self._measured(start, best, ids.flatten(1).gather(1, which), k)

    def _scores(self, rows: Ids, cell: int) -> torch.Tensor:
        """How near the members of a cell are to rows that look into it, (R, M)."""

        members = slice(self._edge[cell], self._edge[cell + 1])
        product = self._by_cell[self._place[rows]] @ self._by_cell[members].T
        return product.float().sub_(self._half[members])

    def _measured(
        self, start: int, scores: torch.Tensor, ids: torch.Tensor, k: int
    ) -> tuple[Distances, Ids]:
        """The k nearest of the candidates; rows that met too few are searched exactly."""
        met = np.isfinite(scores.numpy())
        short = np.flatnonzero(met.sum(axis=1) < k)
        met[short] = False
        row, place = met.nonzero()
        found = ids.numpy()[row, place]
        apart = measure(self._x, start + row, found)
        distances, neighbours = np.empty((len(met), k)), np.empty((len(met), k), dtype=np.int64)
        long = np.setdiff1d(np.arange(len(met)), short)
        distances[long], neighbours[long] = first_k(row, found, apart, k)
        if len(short):
            distances[short], neighbours[short] = nearest(self._x, k, start + short)
        return distances, neighbours


# ---- the graph -----------------------------------------------------------------------------------


def hnsw(x: Vectors, k: int, wanted: float, seed: int) -> Found:
    """Walk a hierarchical navigable small world graph (Malkov & Yashunin 2018); x (N, D).

    Built and searched by one thread: with more, its links depend on who comes first.
    """
    import faiss

    x = np.ascontiguousarray(x, dtype=np.float32)
    tuning, check = _truth(x, k, seed)
    with _one_thread():
        index = faiss.IndexHNSWFlat(x.shape[1], _LINKS)
        index.hnsw.efConstruction = _BUILD
        index.add(x)
        effort = 2 * (k + 1)
        while True:
            index.hnsw.efSearch = effort
            found, _ = _walk(index, x, tuning.rows, k)
            if recall(found, tuning.distances) >= (1 + wanted) / 2 or effort >= len(x):
                break
            effort *= 2
        distances, ids = _walk(index, x, np.arange(len(x)), k)
    return Found(distances, ids, recall(distances[check.rows], check.distances), effort)


def _walk(index: Any, x: Vectors, rows: Ids, k: int) -> tuple[Distances, Ids]:
    """The k nearest of each row by the graph; exactly, where it leads to fewer than k."""
    _, ids = index.search(x[rows], k + 1)
    ids = ids.astype(np.int64)
    good = (ids >= 0) & (ids != rows[:, None])
    short = good.sum(axis=1) < k
    good[short] = False
    at, place = good.nonzero()
    apart = measure(x, rows[at], ids[at, place])
    distances, neighbours = np.empty((len(rows), k)), np.empty((len(rows), k), dtype=np.int64)
    distances[~short], neighbours[~short] = first_k(at, ids[at, place], apart, k)
    if short.any():
        distances[short], neighbours[short] = nearest(x, k, rows[short])
    return distances, neighbours


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let faiss use one thread inside the block."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
