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
pairs once. `greedy` measures diversity in what is kept, and is what f is for. The others are what
both are to be compared with. Adding one is a function and a line in SELECTORS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fifa.selection.coverage import facility_location, k_centre
from fifa.selection.greedy import lazy_greedy, stochastic_greedy
from fifa.selection.objective import Objective, importance, objective, pair_ranking
from fifa.selection.one_pass import parse_count, top_k
from fifa.selection.terms import (
    MARGINS,
    NORMS,
    Floats,
    Ints,
    MarginKind,
    Norm,
    Terms,
    make_terms,
)

__all__ = ["MARGINS", "NORMS", "SELECTORS", "Floats", "Ints", "MarginKind", "Norm", "Objective"]
__all__ += ["Selector", "Terms", "affordable", "facility_location", "importance", "k_centre"]
__all__ += ["lazy_greedy", "make_terms", "objective", "pair_ranking", "parse_count"]
__all__ += ["stochastic_greedy", "top_k"]

BUDGET = 2e13  # multiplications a method may need to be compared with others: about a minute

Choose = Callable[[Terms, int, int | None, int], Ints]


class Selector(NamedTuple):
    """A way to choose: (terms, k, cap per group, seed) -> indices, best first."""

    choose: Choose
    meaning: str
    cost: Callable[[Terms, int], float] = lambda terms, k: 0.0  # multiplications, roughly


def _by(score: Callable[[Terms], Floats]) -> Choose:
    return lambda terms, k, cap, seed: top_k(score(terms), k, terms.groups, cap)


def _not_below_one_pass(choose: Choose) -> Choose:
    """That choice, or the one-pass choice where it has the larger f.

    Greedy wins where K is small beside P. Where K is a large part of P its first picks spread too
    far out, and one pass can be better.
    """

    def better(terms: Terms, k: int, cap: int | None, seed: int) -> Ints:
        one_pass = top_k(importance(terms), k, terms.groups, cap)
        chosen = choose(terms, k, cap, seed)
        return one_pass if objective(one_pass, terms).f > objective(chosen, terms).f else chosen

    return better


def _random(terms: Terms, k: int, cap: int | None, seed: int) -> Ints:
    return top_k(np.random.default_rng(seed).random(len(terms)), k, terms.groups, cap)


def _step_by_step(terms: Terms, k: int) -> float:
    """Each pick meets the members and about a tenth of the prompts, at the speed of memory.

    That is some 20 times slower than a product of matrices.
    """
    met = min(k, len(terms.vectors)) / 2 + len(terms.vectors) / 10
    return 20.0 * k * met * terms.vectors.shape[1]


def _all_with_all(terms: Terms, k: int) -> float:
    return float(len(terms.vectors)) * terms.vectors.size


SELECTORS: dict[str, Selector] = {
    "importance": Selector(_by(importance), "margin + alpha quality + gamma diversity, one pass"),
    "greedy": Selector(
        _not_below_one_pass(lambda terms, k, cap, seed: lazy_greedy(terms, k, cap)),
        "the same, with diversity among the kept, pair by pair",
        _step_by_step,
    ),
    "stochastic": Selector(
        _not_below_one_pass(stochastic_greedy),
        "greedy, each pair the best of a random sample",
        _step_by_step,
    ),
    "margin": Selector(_by(lambda terms: terms.margin), "largest margin"),
    "quality": Selector(_by(lambda terms: terms.quality), "best text"),
    "diversity": Selector(_by(lambda terms: terms.diversity), "prompts far from all others"),
    "pair_ranking": Selector(_by(pair_ranking), "good winner and bad loser"),
    "facility_location": Selector(
        lambda terms, k, cap, seed: facility_location(terms, k, cap),
        "every prompt has a similar one among the kept",
        _all_with_all,
    ),
    "k_centre": Selector(
        lambda terms, k, cap, seed: k_centre(terms, k, cap),
        "no prompt is far from all of the kept",
        _step_by_step,
    ),
    "random": Selector(_random, "by chance"),
}


def affordable(name: str, terms: Terms, k: int) -> str | None:
    """None if a method can be run beside others at this size, else a sentence that says why not."""
    measuring = float(min(k, len(terms.vectors))) ** 2 * terms.vectors.shape[1]
    cost = SELECTORS[name].cost(terms, k) + measuring
    if cost <= BUDGET:
        return None
    return f"would need about {cost:.0e} multiplications, more than {BUDGET:.0e}"
