"""f(S): what is maximised, and the scores of single pairs that stand in for it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fifa.knn import repeated_distances
from fifa.selection.terms import Floats, Ints, Terms, minmax, own_value


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
        prompts, times = np.unique(terms.prompt[chosen], return_counts=True)
        apart = repeated_distances(terms.vectors[prompts], times, terms.neighbours)
        inside = np.average(np.log(np.maximum(apart, terms.floor)), weights=times)
        entropy = float((inside - terms.centre) / terms.spread)
    f = margin + terms.alpha * quality + terms.gamma * entropy
    return Objective(f, margin, quality, entropy)


def importance(terms: Terms) -> Floats:
    """FiFA's score of each pair, (N,): norm(m) + alpha norm(q) + gamma norm(log d_k over all)."""
    return own_value(terms) + terms.gamma * terms.diversity


def pair_ranking(terms: Terms) -> Floats:
    """psi(win) (1 - psi(lose)) with psi the reward scaled to [0, 1]: good against bad, (N,).

    Singh, Khanna & Moturi, "Effective Text-to-Image Alignment with Quality Aware Pair Ranking";
    they keep the best 5.33%: `fifa select --method pair_ranking -k 5.33% --cap 0`.
    """
    both = minmax(np.concatenate([terms.win, terms.lose]))
    win, lose = np.split(both, 2)
    return win * (1 - lose)
