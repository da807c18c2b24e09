"""Baselines that know prompts only: keep a set that all prompts have somebody near in.

Of a prompt the pair with the largest margin + alpha quality is taken. Where every prompt is
covered, the largest of that follow.
"""

from __future__ import annotations

import heapq

import numpy as np

from fifa.knn import Vectors, nearest
from fifa.selection.greedy import Offers
from fifa.selection.one_pass import top_k
from fifa.selection.terms import Floats, Ints, Terms, own_value

NEIGHBOURS = 64  # of each prompt, that facility location knows the similarity to
_BLOCK = 256  # prompts measured together


def facility_location(terms: Terms, k: int, cap: int | None = None) -> Ints:
    """k pairs that greedily maximise sum_i max_{j in S} sim(i, j), over all pairs i; best first.

    sim is the cosine of two prompts where that is positive and j is among the NEIGHBOURS prompts
    nearest to i, else 0. Monotone and submodular: greedy reaches 1 - 1/e of the best set
    (Nemhauser, Wolsey & Fisher 1978), and gains can be evaluated lazily (Minoux 1978). Equal gains
    go by index.
    """
    there, weight = np.unique(terms.prompt, return_counts=True)
    covers = _Covers(terms, there, weight)
    offers = Offers(terms, cap)
    queue = [(-covers.gain(j), offers.pair(p), j) for j, p in enumerate(there.tolist())]
    heapq.heapify(queue)
    picks: list[int] = []
    while queue and len(picks) < k:
        _, pair, j = heapq.heappop(queue)
        if not np.isfinite(offers.value[there[j]]):
            continue  # near copies have used up its group's share
        entry = (-covers.gain(j), pair, j)
        if queue and entry > queue[0]:
            heapq.heappush(queue, entry)
        elif entry[0] < 0:
            covers.add(j)
            picks.append(offers.take(int(there[j])))
    return _filled(terms, picks, k, cap)


class _Covers:
    """How well each prompt is represented, and what one more representative would add."""

    def __init__(self, terms: Terms, there: Ints, weight: Ints) -> None:
        count = len(there)
        if count > 1:
            apart, ids = nearest(terms.vectors[there], min(NEIGHBOURS, count - 1))
        else:
            apart, ids = np.empty((1, 0)), np.empty((1, 0), dtype=np.int64)
        who = np.repeat(np.arange(count), ids.shape[1])
        similarity = np.maximum(0, 1 - apart.ravel() ** 2 / 2)
        whose = np.concatenate([ids.ravel(), np.arange(count)])
        order = np.argsort(whose, kind="stable")
        self._edge = np.searchsorted(whose[order], np.arange(count + 1))
        self._who = np.concatenate([who, np.arange(count)])[order]
        self._similarity = np.concatenate([similarity, np.ones(count)])[order]
        self._weight = weight.astype(np.float64)
        self._covered = np.zeros(count)

    def gain(self, j: int) -> float:
        """What representative j would add."""
        part = slice(self._edge[j], self._edge[j + 1])
        who = self._who[part]
        more = np.maximum(0, self._similarity[part] - self._covered[who])
        return float((self._weight[who] * more).sum())

    def add(self, j: int) -> None:
        """Make j a representative."""
        part = slice(self._edge[j], self._edge[j + 1])
        who = self._who[part]
        self._covered[who] = np.maximum(self._covered[who], self._similarity[part])


def k_centre(terms: Terms, k: int, cap: int | None = None) -> Ints:
    """k pairs, the first the best by itself, each next the farthest from those before.

    No prompt is then more than twice as far from the kept ones as it would be from the best k
    (Gonzalez 1985). Distances only shrink, so the last one measured is a bound, and only prompts
    that lead by it are measured anew. Equal distances go by number of the prompt.
    """
    offers = Offers(terms, cap)
    x = np.ascontiguousarray(terms.vectors, dtype=np.float32)
    bound = np.where(np.isfinite(offers.value), 4.5, -np.inf)  # above any squared distance
    bound[offers.value.argmax()] = 5.0
    measured = np.zeros(len(x), dtype=np.int64)
    picks: list[int] = []
    chosen = np.empty(0, dtype=np.int64)
    while len(picks) < k and bound.max() > 0:
        first = int(bound.argmax())
        if measured[first] == len(chosen):
            picks.append(offers.take(first))
            chosen = np.append(chosen, first)
            bound[first] = 0
            bound[~np.isfinite(offers.value)] = -np.inf
        else:
            block = np.argpartition(-bound, min(_BLOCK, len(bound)) - 1)[:_BLOCK]
            _measure(x, block, chosen, measured, bound)
    return _filled(terms, picks, k, cap)


def _measure(x: Vectors, block: Ints, chosen: Ints, measured: Ints, bound: Floats) -> None:
    """Bring the squared distances of a block of prompts to the chosen ones up to date."""
    new = chosen[measured[block].min() :]
    squared = 2 - 2 * (x[block] @ x[new].T).max(axis=1, initial=-1).astype(np.float64)
    bound[block] = np.minimum(bound[block], np.maximum(squared, 0))
    measured[block] = len(chosen)


def _filled(terms: Terms, picks: list[int], k: int, cap: int | None) -> Ints:
    """The picks in their order, then the best by themselves."""
    priority = own_value(terms)
    priority[picks] = priority.max() + np.arange(len(picks), 0, -1)
    return top_k(priority, k, terms.groups, cap)
