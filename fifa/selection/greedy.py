"""Choosing pair by pair by the gain of F, so that diversity is measured in what is kept.

    F(S) = sum_S [m_i + alpha q_i + gamma (log d_1(z_i; S) - centre) / spread] = K f(S)

with d_1 = 2, the diameter, for a single pair; gains are exact for `neighbours` = 1. A gain is what
a pair brings, its own distance to S included, and the harm: what the pairs already kept lose by
having it near. F is not submodular, since harm can become less, so no bound of the greedy set is
known. But harm is never positive and the distance to S never grows, so that

    own value + gamma (log distance when last measured - centre) / spread

bounds every later gain. Where that is below the best gain known, a pair need not be looked at:
`lazy_greedy` makes the picks of the exact method without looking at most pairs. Gains are rounded
to 6 digits after the point, about what float32 distances are good for; equal ones go by index.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fifa.selection.terms import Floats, Ints, Terms, own_value

_DIGITS = 6
_BLOCK = 256  # prompts looked at together
_FEW = 8  # of a random sample, looked at together
LOG_DIAMETER = float(np.log(2.0))

Logs = NDArray[np.float32]  # log distances


def lazy_greedy(terms: Terms, k: int, cap: int | None = None) -> Ints:
    """The exact greedy set of k pairs, at most `cap` of a group; best first, fewer if none is left.

    Prompts whose bound reaches the best gain are kept in a pool, in which all gains are up to date;
    a pick costs a product of the pool with the new member.
    """
    offers, crowd = Offers(terms, cap), _Crowd(terms, min(k, len(terms)))
    pool = _Pool(offers, crowd)
    picks: list[int] = []
    while len(picks) < k:
        best, slot = pool.best()
        reaching = pool.outside_from(best)
        if len(reaching):
            pool.look_at(reaching, best)
        elif np.isfinite(best):
            picks.append(pool.pick(slot))
        else:
            break
    return np.array(picks, dtype=np.int64)


def stochastic_greedy(
    terms: Terms, k: int, cap: int | None = None, seed: int = 0, epsilon: float = 0.001
) -> Ints:
    """Each pick is the best of a random sample of (n / k) log(1 / epsilon) prompts; best first.

    n is the number of pairs that the cap leaves. Mirzasoleiman et al., "Lazier Than Lazy Greedy"
    (2015), alg. 1; the same bound as in `lazy_greedy` spares most of a sample. Of a prompt its best
    pair stands for all.
    """
    rng = np.random.default_rng(seed)
    offers, crowd = Offers(terms, cap), _Crowd(terms, min(k, len(terms)))
    size = int(np.ceil(offers.pairs_left() / k * np.log(1 / epsilon)))
    nearest = np.full(len(terms.vectors), LOG_DIAMETER, dtype=np.float32)
    picks: list[int] = []
    while len(picks) < k and len(open_ := offers.open()):
        sample = open_ if size >= len(open_) else np.sort(rng.choice(open_, size, replace=False))
        best, apart = _best_of(sample, offers, crowd, nearest)
        nearer = crowd.nearer(apart)
        crowd.add(best, nearest[best], nearer, apart[nearer])
        picks.append(offers.take(best))
    return np.array(picks, dtype=np.int64)


def _best_of(sample: Ints, offers: Offers, crowd: _Crowd, nearest: Logs) -> tuple[int, Logs]:
    """The prompt of the largest gain, and its log distances to the members; measures `nearest`."""
    bounds = crowd.gain(offers.value[sample], nearest[sample])
    order = np.argsort(-bounds, kind="stable")
    best, chosen, apart = (-np.inf, 0), -1, np.empty(0, dtype=np.float32)
    for start in range(0, len(order), _FEW):
        part = order[start : start + _FEW]
        if bounds[part[0]] < best[0]:
            break
        prompts = sample[part]
        to_members = crowd.log_distances(prompts)
        nearest[prompts], harm = crowd.nearest_and_harm(to_members)
        gains = crowd.gain(offers.value[prompts], nearest[prompts], harm)
        for i, prompt in enumerate(prompts.tolist()):
            if (candidate := (float(gains[i]), -offers.pair(prompt))) > best:
                best, chosen, apart = candidate, prompt, to_members[:, i]
    return chosen, apart


class Offers:
    """Of each prompt the best pair that is left: only it can be picked next. P prompts, N pairs."""

    def __init__(self, terms: Terms, cap: int | None) -> None:
        self._own = own_value(terms)
        best_first = np.argsort(-self._own, kind="stable")
        self._order = best_first[np.argsort(terms.prompt[best_first], kind="stable")]
        numbers = np.arange(len(terms.vectors))
        self._head = np.searchsorted(terms.prompt[self._order], numbers)
        self._stop = np.searchsorted(terms.prompt[self._order], numbers, side="right")
        self._cap = cap
        there = self._head < self._stop
        self.value = np.full(len(numbers), -np.inf)  # (P,) of the pair on offer
        self.value[there] = self._own[self._order[self._head[there]]]
        self._group = np.full(len(numbers), -1)
        self._group[there] = terms.groups[self._order[self._head[there]]]
        self._by_group = np.argsort(self._group, kind="stable")
        self._sorted_groups = self._group[self._by_group]
        self.closed = np.empty(0, dtype=np.int64)  # prompts that the last pair taken leaves nothing
        self._taken: dict[int, int] = {}
        self._sizes = np.unique(terms.groups, return_counts=True)[1]

    def pairs_left(self) -> int:
        """How many pairs the cap leaves of all."""
        return int(np.minimum(self._sizes, self._cap or len(self._own)).sum())

    def open(self) -> Ints:
        """Prompts that have a pair on offer."""
        return np.flatnonzero(np.isfinite(self.value))

    def pairs(self, prompts: Ints) -> Ints:
        """The pair on offer of each; anything for a prompt that has none."""
        return self._order[np.minimum(self._head[prompts], len(self._order) - 1)]

    def pair(self, prompt: int) -> int:
        """The pair on offer."""
        return int(self._order[self._head[prompt]])

    def take(self, prompt: int) -> int:
        """Take the pair of a prompt; the next one of the prompt is on offer, if the cap allows."""
        pair = self.pair(prompt)
        self._head[prompt] += 1
        more = self._head[prompt] < self._stop[prompt]
        if more:
            self.value[prompt] = self._own[self.pair(prompt)]
        group = int(self._group[prompt])
        self._taken[group] = self._taken.get(group, 0) + 1
        if self._taken[group] == self._cap:
            first, last = np.searchsorted(self._sorted_groups, [group, group + 1])
            self.closed = self._by_group[first:last]
        else:
            self.closed = np.array([] if more else [prompt], dtype=np.int64)
        self.value[self.closed] = -np.inf
        return pair


class _Crowd:
    """A growing set S of unit vectors, the log distance d_1 of each, and what F gains by more."""

    def __init__(self, terms: Terms, capacity: int) -> None:
        self.vectors = np.ascontiguousarray(terms.vectors, dtype=np.float32)
        self._floor = np.float32(terms.floor)
        self._weight, self._centre = terms.gamma / terms.spread, terms.centre
        self._members = np.empty((capacity, self.vectors.shape[1]), dtype=np.float32)
        self._ids = np.empty(capacity, dtype=np.int64)
        self.own = np.empty(capacity, dtype=np.float32)
        self._inside = np.zeros(len(self.vectors), dtype=bool)
        self.size = 0

    def gain(self, value: Floats, nearest: Logs, harm: Floats | float = 0.0) -> Floats:
        """By how much F grows; a bound of it without the harm."""
        change = nearest.astype(np.float64) + harm - self._centre
        return np.round(value + self._weight * change, _DIGITS)

    def log_distances(self, prompts: Ints) -> Logs:
        """Between all members and prompts: (S, B)."""
        return self.between(slice(0, self.size), self.vectors[prompts], prompts)

    def between(self, members: slice | Ints, vectors: NDArray[np.float32], prompts: Ints) -> Logs:
        """Between those members and prompts, whose vectors are given: (M, B)."""
        return self._log_distance(self._cosines(members, vectors, prompts))

    def log_nearest(self, prompts: Ints, since: int) -> Logs:
        """From prompts to the nearest of the members from number `since` on: (B,)."""
        cosines = self._cosines(slice(since, self.size), self.vectors[prompts], prompts)
        return self._log_distance(cosines.max(axis=0))

    def _cosines(
        self, members: slice | Ints, vectors: NDArray[np.float32], prompts: Ints
    ) -> NDArray[np.float32]:
        cosines = self._members[members] @ vectors.T
        inside = np.flatnonzero(self._inside[prompts])
        if len(inside):  # rounding must not part a prompt from itself
            same = self._ids[members][:, None] == prompts[inside]
            cosines[:, inside] = np.where(same, np.float32(1), cosines[:, inside])
        return cosines

    def _log_distance(self, cosines: NDArray[np.float32]) -> Logs:
        squared = np.multiply(cosines, np.float32(-2), out=cosines)
        squared += np.float32(2)
        np.maximum(squared, self._floor**2, out=squared)
        np.log(squared, out=squared)
        return np.multiply(squared, np.float32(0.5), out=squared)

    def nearest_and_harm(self, apart: Logs) -> tuple[Logs, Floats]:
        """Log distance to S and harm of prompts with those log distances (S, B) to all members."""
        own = self.own[: self.size, None]
        nearest = apart.min(axis=0, initial=LOG_DIAMETER)
        return nearest, np.minimum(0, apart - own).sum(axis=0, dtype=np.float64)

    def nearer(self, apart: Logs) -> Ints:
        """Members that a prompt with those log distances (S,) would be nearest to."""
        return np.flatnonzero(apart < self.own[: self.size])

    def add(self, prompt: int, nearest: np.float32, nearer: Ints, after: Logs) -> None:
        """Put a prompt into S; the members `nearer` now have it at log distances `after`."""
        self.own[nearer] = after
        at = self.size
        self._members[at], self._ids[at], self.own[at] = self.vectors[prompt], prompt, nearest
        self._inside[prompt] = True
        self.size += 1


class _Pool:
    """Prompts whose gains are kept up to date, and bounds for all others.

    Of a prompt in the pool only those members matter that it would be nearest to, a handful.
    """

    def __init__(self, offers: Offers, crowd: _Crowd) -> None:
        self._offers, self._crowd = offers, crowd
        count = len(crowd.vectors)
        self._nearest = np.full(count, LOG_DIAMETER, dtype=np.float32)  # when last measured
        self._measured = np.zeros(count, dtype=np.int64)  # against how many members
        self._bound = crowd.gain(offers.value, self._nearest)
        self._ids = np.empty(0, dtype=np.int64)
        self._vectors = np.empty((0, crowd.vectors.shape[1]), dtype=np.float32)
        self._slot = np.empty(0, dtype=np.int64)  # the prompt in this place of the pool would be
        self._member = np.empty(0, dtype=np.int64)  # nearest to this member
        self._to = np.empty(0, dtype=np.float32)  # at this log distance

    def best(self) -> tuple[float, int]:
        """The largest gain in the pool and where it is, -inf if there is none."""
        if len(self._ids) == 0:
            return -np.inf, -1
        gains = self._gains()
        best = gains.max()
        ties = np.flatnonzero(gains == best)
        return float(best), int(ties[np.argmin(self._offers.pairs(self._ids[ties]))])

    def _gains(self) -> Floats:
        lost = self._to.astype(np.float64) - self._crowd.own[self._member]
        harm = np.bincount(self._slot, weights=lost, minlength=len(self._ids)).astype(np.float64)
        value = self._offers.value[self._ids]
        return self._crowd.gain(value, self._nearest[self._ids], harm)

    def outside_from(self, best: float) -> Ints:
        """Some prompts outside the pool whose bound reaches `best`, those of the largest bounds."""
        reaching = np.flatnonzero(self._bound >= max(best, -np.finfo(np.float64).max))
        if len(reaching) > _BLOCK:
            reaching = reaching[np.argpartition(-self._bound[reaching], _BLOCK)[:_BLOCK]]
        return reaching

    def look_at(self, prompts: Ints, best: float) -> None:
        """Measure those that lag behind, or take those that do not into the pool."""
        size = self._crowd.size
        stale = prompts[self._measured[prompts] < size]
        if len(stale):
            since = int(self._measured[stale].min())
            newly = self._crowd.log_nearest(stale, since)
            self._nearest[stale] = np.minimum(self._nearest[stale], newly)
            self._measured[stale] = size
            self._bound[stale] = self._crowd.gain(self._offers.value[stale], self._nearest[stale])
        else:
            self._drop_below(best)
            self._admit(prompts)

    def _drop_below(self, best: float) -> None:
        """Put out those that cannot be picked soon, once they are half of the pool."""
        bound = self._crowd.gain(self._offers.value[self._ids], self._nearest[self._ids])
        keep = bound >= best
        if 2 * keep.sum() < len(keep):
            out = self._ids[~keep]
            self._bound[out] = bound[~keep]
            self._measured[out] = self._crowd.size
            self._ids, self._vectors = self._ids[keep], self._vectors[keep]
            self._keep(keep[self._slot])
            self._slot = (np.cumsum(keep) - 1)[self._slot]

    def _admit(self, prompts: Ints) -> None:
        apart = self._crowd.log_distances(prompts)
        self._nearest[prompts] = apart.min(axis=0, initial=LOG_DIAMETER)
        self._bound[prompts] = -np.inf
        member, column = np.nonzero(apart < self._crowd.own[: self._crowd.size, None])
        self._note(column + len(self._ids), member, apart[member, column])
        self._ids = np.concatenate([self._ids, prompts])
        self._vectors = np.concatenate([self._vectors, self._crowd.vectors[prompts]])

    def _note(self, slot: Ints, member: Ints, to: Logs) -> None:
        self._slot = np.concatenate([self._slot, slot])
        self._member = np.concatenate([self._member, member])
        self._to = np.concatenate([self._to, to])

    def _keep(self, which: NDArray[np.bool_]) -> None:
        self._slot, self._member, self._to = self._slot[which], self._member[which], self._to[which]

    def pick(self, slot: int) -> int:
        """Take the pair of that place into S and bring the pool up to date."""
        prompt, crowd = int(self._ids[slot]), self._crowd
        own, mine = self._nearest[prompt], self._slot == slot
        crowd.add(prompt, own, self._member[mine], self._to[mine])
        self._keep(self._to < crowd.own[self._member])
        newest = np.array([crowd.size - 1])
        to_pool = crowd.between(newest, self._vectors, self._ids)[0]
        self._nearest[self._ids] = np.minimum(self._nearest[self._ids], to_pool)
        nearer = np.flatnonzero(to_pool < own)
        self._note(nearer, np.repeat(newest, len(nearer)), to_pool[nearer])
        pair = self._offers.take(prompt)
        self._bound[self._offers.closed] = -np.inf
        return pair
