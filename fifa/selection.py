"""Which pairs to keep: margin, text quality and diversity weighed against each other.

Pure functions on arrays; N pairs with P distinct prompts and embeddings of D dimensions. What is
maximised over sets S of K pairs is

    f(S) = 1/K sum_S [m_i + alpha q_i] + gamma h(S)
    h(S) = (1/K sum_S log d_k(z_i; S) - centre) / spread

m and q are the normalised margin and quality of `Terms`, d_k is the distance to the k-th nearest
neighbour inside S, floored. h(S) is the Kozachenko-Leonenko entropy of S per dimension without
constants, which do not matter among sets of one size, in units of the spread that log d_k has over
all pairs: alpha and gamma then mean the same to every method. Inside S a repeated prompt is a
neighbour at distance zero. (Were S reduced to its distinct prompts first, repeating prompts would
raise f, since fewer points lie further apart.)

`importance` is FiFA's approximation (arXiv 2410.10166): diversity of each pair taken over all
pairs once. `greedy` measures diversity in what is kept, and is what f is for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from fifa.config import InputError
from fifa.knn import FLOOR, Vectors, log_knn

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MarginKind = Literal["signed", "absolute", "capped"]
Norm = Literal["zscore", "rank", "minmax"]


# ---- terms ---------------------------------------------------------------------------------------


def zscore(x: Floats) -> Floats:
    """Mean 0 and standard deviation 1; all zeros if the values do not differ."""
    spread = x.std()
    return (x - x.mean()) / spread if spread > 0 else np.zeros_like(x)


def rank(x: Floats) -> Floats:
    """Ranks scaled to [0, 1], ties sharing their mean rank; all 0.5 if the values do not differ."""
    return (rankdata(x) - 1) / (len(x) - 1) if len(x) > 1 else np.full_like(x, 0.5)


def minmax(x: Floats) -> Floats:
    """Scaled linearly to [0, 1]; all zeros if the values do not differ."""
    width = x.max() - x.min()
    return (x - x.min()) / width if width > 0 else np.zeros_like(x)


NORMS: dict[str, Callable[[Floats], Floats]] = {"zscore": zscore, "rank": rank, "minmax": minmax}


def signed(margin: Floats) -> Floats:
    """As it is: pairs on which the reward contradicts the person sink to the bottom."""
    return margin


def absolute(margin: Floats) -> Floats:
    """Its size: what is clear to the reward counts, whoever is right."""
    return np.abs(margin)


def capped(margin: Floats, quantile: float = 0.95) -> Floats:
    """Signed, but at most its own quantile: beyond that, larger is not better."""
    return np.minimum(margin, np.quantile(margin, quantile))


MARGINS: dict[str, Callable[[Floats], Floats]] = {
    "signed": signed,
    "absolute": absolute,
    "capped": capped,
}


@dataclass(frozen=True)
class Terms:
    """All that a selector sees of N pairs; made by `make_terms`."""

    margin: Floats  # (N,) normalised
    quality: Floats  # (N,) normalised
    diversity: Floats  # (N,) normalised log_knn over all prompts
    prompt: Ints  # (N,) row of `vectors`
    vectors: Vectors  # (P, D) unit length
    win: Floats  # (N,) reward of the winner, as scored
    lose: Floats  # (N,)
    alpha: float
    gamma: float
    centre: float  # mean and standard deviation of log_knn over the pairs
    spread: float
    neighbours: int = 1  # k of d_k inside S
    floor: float = FLOOR

    def __len__(self) -> int:
        return len(self.margin)


def make_terms(
    *,
    win: Floats,
    lose: Floats,
    quality: Floats,
    log_knn: Floats,
    prompt: Ints,
    vectors: Vectors,
    alpha: float = 0.5,
    gamma: float = 0.5,
    margin: MarginKind = "signed",
    norm: Norm = "zscore",
    neighbours: int = 1,
    floor: float = FLOOR,
) -> Terms:
    """Normalise what was scored. All arrays (N,) but `vectors` (P, D); no NaN.

    `win` and `lose` are rewards of the picture the person preferred and of the other, `quality`
    lies in 0..10, `log_knn` is in nats.
    """
    columns = (win, lose, quality, log_knn, prompt)
    if len({len(column) for column in columns}) != 1 or len(win) == 0:
        raise InputError(f"terms need columns of one length, got {[len(c) for c in columns]}")
    if not all(np.isfinite(column).all() for column in columns):
        raise InputError("terms must be finite, found NaN or infinity")
    scale = NORMS[norm]
    return Terms(
        margin=scale(MARGINS[margin](win - lose)),
        quality=scale(quality),
        diversity=scale(log_knn),
        prompt=prompt,
        vectors=vectors,
        win=win,
        lose=lose,
        alpha=alpha,
        gamma=gamma,
        centre=float(log_knn.mean()),
        spread=float(log_knn.std()) or 1.0,
        neighbours=neighbours,
        floor=floor,
    )


# ---- the objective -------------------------------------------------------------------------------


class Objective(NamedTuple):
    """f(S) and its three means; f = margin + alpha quality + gamma entropy."""

    f: float
    margin: float
    quality: float
    entropy: float  # h(S): per dimension, centred, in spreads


def objective(chosen: Ints, terms: Terms) -> Objective:
    """f of the pairs `chosen`; entropy is NaN, and so is f, if they are not more than k."""
    margin = float(terms.margin[chosen].mean()) if len(chosen) else float("nan")
    quality = float(terms.quality[chosen].mean()) if len(chosen) else float("nan")
    entropy = float("nan")
    if len(chosen) > terms.neighbours:
        inside = log_knn(terms.vectors[terms.prompt[chosen]], terms.neighbours, terms.floor)
        entropy = float((inside.mean() - terms.centre) / terms.spread)
    f = margin + terms.alpha * quality + terms.gamma * entropy
    return Objective(f, margin, quality, entropy)


def importance(terms: Terms) -> Floats:
    """FiFA's score of each pair, (N,): norm(m) + alpha norm(q) + gamma norm(log d_k over all)."""
    return terms.margin + terms.alpha * terms.quality + terms.gamma * terms.diversity


# ---- choosing ------------------------------------------------------------------------------------


def top_k(scores: Floats, k: int, groups: Ints | None = None, cap: int | None = None) -> Ints:
    """Indices of the k highest scores, best first, at most `cap` from each group.

    Equal scores go by index. Fewer than k come back where the cap leaves no more.
    """
    order = np.argsort(-scores, kind="stable")
    if groups is not None and cap is not None:
        order = order[_place_in_group(groups[order]) < cap]
    return order[:k].astype(np.int64)


def _place_in_group(groups: Ints) -> Ints:
    """For each position, how many earlier positions hold the same group."""
    order = np.argsort(groups, kind="stable")
    sorted_groups = groups[order]
    first = np.searchsorted(sorted_groups, sorted_groups)
    place = np.empty(len(groups), dtype=np.int64)
    place[order] = np.arange(len(groups)) - first
    return place


def greedy(terms: Terms, k: int, cap: int | None = None) -> Ints:
    """Pick pairs one by one, each time the one that raises F most; best first.

        F(S) = sum_S [m_i + alpha q_i + gamma (log d_1(z_i; S) - centre) / spread] = K f(S)

    with d_1 = 2, the diameter, for a single pair. A gain counts the new pair's own distance and
    what the pairs already kept lose by having it near; it is exact for `neighbours` = 1. F is not
    submodular, so gains cannot be evaluated lazily and no bound is known. A pick costs about two
    products of all vectors with one. Deterministic; equal gains go by index.
    """
    own = terms.margin + terms.alpha * terms.quality
    best_first = np.argsort(-own, kind="stable")
    # Of one prompt only its best remaining pair can be next: P candidates instead of N.
    order = best_first[np.argsort(terms.prompt[best_first], kind="stable")]
    prompts = np.arange(len(terms.vectors))
    head = np.searchsorted(terms.prompt[order], prompts)
    stop = np.searchsorted(terms.prompt[order], prompts, side="right")
    if cap is not None:
        stop = np.minimum(stop, head + cap)
    value = np.where(head < stop, own[order[np.minimum(head, len(order) - 1)]], -np.inf)
    crowd = _Crowd(terms.vectors, terms.floor)
    picks: list[int] = []
    while len(picks) < k and np.isfinite(value).any():
        gains = value + terms.gamma / terms.spread * (crowd.gain() - terms.centre)
        p = _first_best(gains, order, head)
        picks.append(int(order[head[p]]))
        crowd.add(p)
        head[p] += 1
        value[p] = own[order[head[p]]] if head[p] < stop[p] else -np.inf
    return np.array(picks, dtype=np.int64)


class _Crowd:
    """sum_S log d_1 of a growing set S of unit vectors, and what each further vector would add."""

    def __init__(self, vectors: Vectors, floor: float) -> None:
        self._vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._floor = floor
        self._nearest = np.full(len(vectors), np.log(2.0))  # log distance of each vector to S
        self._harm = np.zeros(len(vectors))  # what S would lose by each vector, <= 0
        self._members = np.empty(0, dtype=np.int64)
        self._own = np.empty(0)  # log d_1 of each member

    def gain(self) -> Floats:
        """Change of the sum by adding each vector, (P,)."""
        return self._nearest + self._harm

    def add(self, p: int) -> None:
        """Put vector p into S; it may be there already."""
        to_p = self._log_distances(p)
        own = np.minimum(self._own, to_p[self._members])
        for i in np.flatnonzero(own < self._own):
            to_i = self._log_distances(self._members[i])
            self._harm += np.minimum(0, to_i - own[i]) - np.minimum(0, to_i - self._own[i])
        self._harm += np.minimum(0, to_p - self._nearest[p])
        self._members = np.append(self._members, p)
        self._own = np.append(own, self._nearest[p])
        self._nearest = np.minimum(self._nearest, to_p)

    def _log_distances(self, p: int) -> Floats:
        squared = 2.0 - 2.0 * (self._vectors @ self._vectors[p]).astype(np.float64)
        squared[p] = 0.0
        return np.log(np.maximum(squared, self._floor**2)) / 2


def _first_best(gains: Floats, order: Ints, head: Ints) -> int:
    """The prompt of the largest gain; among equal ones, that of the smallest pair index."""
    ties = np.flatnonzero(gains == gains.max())
    return int(ties[np.argmin(order[head[ties]])])


def pair_ranking(terms: Terms) -> Floats:
    """psi(win) (1 - psi(lose)) with psi the reward scaled to [0, 1]: good against bad, (N,).

    Singh, Khanna & Moturi, "Effective Text-to-Image Alignment with Quality Aware Pair Ranking".
    """
    both = minmax(np.concatenate([terms.win, terms.lose]))
    win, lose = np.split(both, 2)
    return win * (1 - lose)


class Selector(NamedTuple):
    """A way to choose: (terms, k, cap per prompt, seed) -> indices, best first."""

    choose: Callable[[Terms, int, int | None, int], Ints]
    meaning: str


def _by(score: Callable[[Terms], Floats]) -> Callable[[Terms, int, int | None, int], Ints]:
    return lambda terms, k, cap, seed: top_k(score(terms), k, terms.prompt, cap)


def _greedy(terms: Terms, k: int, cap: int | None, seed: int) -> Ints:
    """Greedy, or the one-pass choice where that has the larger f.

    Greedy wins where K is small beside P. Where K is a large part of P its first picks spread too
    far out, and one pass can be better.
    """
    one_pass, step_by_step = (
        SELECTORS["importance"].choose(terms, k, cap, seed),
        greedy(terms, k, cap),
    )
    better = objective(one_pass, terms).f > objective(step_by_step, terms).f
    return one_pass if better else step_by_step


def _random(terms: Terms, k: int, cap: int | None, seed: int) -> Ints:
    return top_k(np.random.default_rng(seed).random(len(terms)), k, terms.prompt, cap)


SELECTORS: dict[str, Selector] = {
    "importance": Selector(_by(importance), "margin + alpha quality + gamma diversity, one pass"),
    "greedy": Selector(_greedy, "the same, with diversity among the kept, pair by pair"),
    "margin": Selector(_by(lambda terms: terms.margin), "largest margin"),
    "quality": Selector(_by(lambda terms: terms.quality), "best text"),
    "diversity": Selector(_by(lambda terms: terms.diversity), "prompts far from all others"),
    "pair_ranking": Selector(_by(pair_ranking), "good winner and bad loser"),
    "random": Selector(_random, "by chance"),
}


def parse_count(text: str | int | float, total: int) -> int:
    """How many of `total` rows "0.5%" or "4000" means; at least one. InputError otherwise."""
    match = re.fullmatch(r"\s*(\d+)\s*|\s*(\d+\.?\d*|\.\d+)\s*%\s*", str(text))
    if match is None:
        raise InputError(f"the number of pairs is '{text}', it must look like 4000 or 0.5%")
    if match[1] is not None:
        count = int(match[1])
    else:
        count = max(1, round(float(match[2]) / 100 * total)) if float(match[2]) > 0 else 0
    if not 1 <= count <= total:
        raise InputError(f"the number of pairs is '{text}' of {total} rows, it must be 1..{total}")
    return count
