"""The nearest rows of each row, exactly, by matrix products that are allowed to be rough.

A product in bfloat16 is several times as fast as one in float32 on CPUs that know the format, and
its error has a bound that the data give. Whoever scores within twice that bound of the k-th best is
a candidate; candidates are measured in float64. Rows with too many of them go on to the next finer
format. The answer is that of a float64 search over all pairs, whatever format proposed it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fifa.config import InputError

if TYPE_CHECKING:
    import torch

Vectors = NDArray[np.float32]  # (N, D)
Distances = NDArray[np.float64]
Ids = NDArray[np.int64]

_STRIP = 1 << 25  # scores of a block of rows against all, held at once
_CHUNK = 64  # scores of which the largest is looked at first
_PAIRS = 256  # measured at once: two blocks of vectors that stay in a core's own cache


class _Format(NamedTuple):
    """A number format to search in, and how many candidates a row may have in it."""

    dtype: str
    candidates: int


# The last takes all rows that are left. Beyond its limit lie rows with more than a hundred others
# whose distances differ by less than 1e-6 of the vectors' length; among them any will do.
_FORMATS = (_Format("bfloat16", 64), _Format("float32", 256), _Format("float64", 128))
_FEW = 32  # dimensions below which the product is no cost worth saving


def nearest(x: Vectors, k: int, rows: Ids | None = None) -> tuple[Distances, Ids]:
    """Euclidean distances (R, k) and ids (R, k) of the k rows of x nearest to each of `rows`.

    x is (N, D), `rows` (R,) are all N by default; a row is no neighbour of itself. Nearest first,
    equal distances by id. Raises InputError unless 1 <= k < N.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    if x.ndim != 2 or not 1 <= k < len(x):
        raise InputError(f"{k} neighbours need more than {k} vectors (N, D), got {x.shape}")
    rows = np.arange(len(x)) if rows is None else np.asarray(rows, dtype=np.int64)
    distances, ids = np.empty((len(rows), k)), np.empty((len(rows), k), dtype=np.int64)
    left = np.arange(len(rows))  # positions in `rows` that have no answer yet
    for number in _formats(x.shape[1]):
        if len(left) == 0:
            break
        last = number is _FORMATS[-1]
        search = _Search(x, number, k)
        undone = []
        for start in range(0, len(left), search.block):
            part = left[start : start + search.block]
            asked, found, crowded = search.candidates(rows[part])
            done = np.full(len(part), True) if last else ~crowded
            keep = done[asked]
            pairs = np.stack([rows[part][asked[keep]], found[keep]])
            measured = measure(x, *pairs)
            distances[part[done]], ids[part[done]] = first_k(asked[keep], pairs[1], measured, k)
            undone.append(part[~done])
        left = np.concatenate(undone)
    return distances, ids


def _formats(dim: int) -> tuple[_Format, ...]:
    if dim < _FEW:
        return _FORMATS[2:]
    return _FORMATS if fast_bfloat16() else _FORMATS[1:]


@cache
def fast_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 faster than in float32, as far as torch can tell."""
    import torch

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older ones
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class _Search:
    """All rows of x in one number format, ready to be multiplied with some of them.

    Rows are compared by x_i . x_j - |x_j|^2 / 2, the larger the closer.
    """

    def __init__(self, x: Vectors, number: _Format, k: int) -> None:
        import torch

        self._k = k
        width = -(-len(x) // _CHUNK) * _CHUNK
        self.block = max(1, min(len(x), _STRIP // width))  # rows to ask about at once
        self._limit = min(len(x) - 1, max(number.candidates, 4 * k))
        exact = torch.from_numpy(x)
        self._rough = exact.to(getattr(torch, number.dtype))
        wide = torch.promote_types(self._rough.dtype, torch.float32)
        self._half = torch.empty(len(x), dtype=wide)
        self._length = torch.empty(len(x), dtype=torch.float64)
        self._rounding = torch.empty(len(x), dtype=torch.float64)
        for start in range(0, len(x), _PAIRS):
            part = slice(start, start + _PAIRS)
            square = exact[part].double().square().sum(1)
            self._half[part] = square / 2
            self._length[part] = square.sqrt()
            self._rounding[part] = (exact[part].double() - self._rough[part].double()).norm(dim=1)
        self._space = (
            torch.empty(self.block, len(x), dtype=self._rough.dtype),
            torch.full((self.block, width), -torch.inf, dtype=wide),
        )
        self._stored = torch.finfo(self._rough.dtype).eps / 2  # of the product as it is stored
        self._summed = torch.finfo(wide).eps / 2 * (x.shape[1] + 4)  # of the terms added up

    def _bound(self, rows: torch.Tensor, kth: torch.Tensor) -> torch.Tensor:
        """How far the true score of a neighbour can be from the one seen, (R,); `kth` is seen.

        Rounded vectors, by Cauchy and Schwarz; the sums; and the stored product. The latter errs in
        proportion to its own size, which for whoever is about as good as the k-th is known.
        """
        import torch

        length, rounding = self._length[rows], self._rounding[rows]
        longest, worst = self._length.max(), self._rounding.max()
        size = (length + rounding) * (longest + worst)
        before = rounding * longest + length * worst + rounding * worst
        before += self._summed * (size + longest**2)
        ends = torch.stack([kth + self._half.min(), kth + self._half.max()]).abs().amax(0)
        return before + self._stored * torch.minimum(size, ends + before + self._stored * size)

    def candidates(self, rows: Ids) -> tuple[Ids, Ids, NDArray[np.bool_]]:
        """Who may be among the k nearest: position in `rows` and id of each, and who has too many.

        Positions come in order.
        """
        import torch

        chosen = torch.from_numpy(rows)
        products, scores = self._space[0][: len(rows)], self._space[1][: len(rows)]
        torch.mm(self._rough[chosen], self._rough.T, out=products)
        scores[:, : len(self._half)] = products  # converted first: mixed formats subtract slowly
        scores[:, : len(self._half)] -= self._half
        scores[torch.arange(len(rows)), chosen] = -torch.inf
        best, ids, missed = self._best(scores)
        kth = best[:, self._k - 1]
        lowest = kth - 2 * self._bound(chosen, kth)
        within = best >= lowest[:, None]
        crowded = missed >= lowest
        asked, place = within.nonzero(as_tuple=True)
        return asked.numpy(), ids[asked, place].numpy(), crowded.numpy()

    def _best(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best scores of each row in order, whose they are, and a bound of all others.

        They lie in the chunks with the largest maxima, and maxima are quick to find.
        """
        import torch

        chunks = scores.unflatten(1, (-1, _CHUNK))
        peaks, which = chunks.amax(2).topk(min(self._limit + 1, chunks.shape[1]), dim=1)
        held = chunks[torch.arange(len(scores))[:, None], which].flatten(1)
        best, place = held.topk(min(self._limit + 1, held.shape[1]), dim=1)
        ids = which.gather(1, place // _CHUNK) * _CHUNK + place % _CHUNK
        missed = torch.full((len(scores),), -torch.inf, dtype=torch.float64)
        if best.shape[1] > self._limit:
            missed = best[:, self._limit].double()
        if peaks.shape[1] > self._limit:
            missed = torch.maximum(missed, peaks[:, self._limit].double())
        return best[:, : self._limit].double(), ids[:, : self._limit], missed


def measure(x: Vectors, first: Ids, second: Ids) -> Distances:
    """Distance of x[first[i]] and x[second[i]] for each i, (M,), from differences in float64."""
    distances = np.empty(len(first))
    for start in range(0, len(first), _PAIRS):
        part = slice(start, start + _PAIRS)
        apart = x[first[part]].astype(np.float64)
        apart -= x[second[part]]
        distances[part] = np.einsum("ij,ij->i", apart, apart)
    return np.sqrt(distances)


def first_k(groups: Ids, ids: Ids, distances: Distances, k: int) -> tuple[Distances, Ids]:
    """The k nearest of each group, (G, k) and (G, k), groups ascending; each has k at least."""
    order = np.lexsort((ids, distances, groups))
    sorted_groups = groups[order]
    place = np.arange(len(order)) - np.searchsorted(sorted_groups, sorted_groups)
    order = order[place < k]
    return distances[order].reshape(-1, k), ids[order].reshape(-1, k)
