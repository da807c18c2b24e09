"""Choosing by a score of each pair: sort once, keep the best."""

from __future__ import annotations

import re

import numpy as np

from fifa.config import InputError
from fifa.selection.terms import Floats, Ints


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


def parse_count(text: str | int | float, total: int | None = None) -> int:
    """How many of `total` rows "0.5%" or "4000" means; at least one. InputError otherwise.

    Without a total only what is wrong with any total is refused.
    """
    match = re.fullmatch(r"\s*(\d+)\s*|\s*(\d+\.?\d*|\.\d+)\s*%\s*", str(text))
    if match is None:
        raise InputError(f"the number of pairs is '{text}', it must look like 4000 or 0.5%")
    number = float(match[1] or match[2])
    if number == 0 or (match[2] is not None and number > 100):
        raise InputError(
            f"the number of pairs is '{text}', it must be at least 1, or a share up to 100%"
        )
    if match[1] is not None:
        count = int(match[1])
    else:
        count = max(1, round(number / 100 * (total or 0)))
    if total is not None and count > total:
        raise InputError(f"the number of pairs is '{text}' of {total} rows, it must be 1..{total}")
    return count
