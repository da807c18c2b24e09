"""Which judgments count, and which prompts are kept from the fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fifa.config import InputError
from fifa.features import PairFeatures
from fifa.pairs import held_out

Rows = NDArray[np.int64]

LEAST_STRICT = 30  # strict pairs below which no proxy is fitted


@dataclass(frozen=True)
class Split:
    """Rows of a PairFeatures by what they are for; no prompt is in two of them."""

    train: Rows
    validation: Rows  # says when to stop, and the temperature
    test: Rows  # for the model card only
    dropped: dict[str, int]  # reason -> rows that are in none


def split_pairs(pairs: PairFeatures, fraction: float, seed: int, drop_ties: bool) -> Split:
    """Hold out `fraction` of the prompts for the test and as many for validation.

    Dropped are pictures compared with themselves, what a known user said twice, and ties if asked.
    Rows without a user are all kept: equal ones may be two people. Raises InputError if a part is
    left without a strict pair.
    """
    keep, dropped = _counted(pairs, drop_ties)
    strict = int((pairs.label[keep] != 0.5).sum())
    if strict < LEAST_STRICT:
        raise InputError(
            f"a proxy needs at least {LEAST_STRICT} strict pairs, there are {strict} "
            f"({len(pairs)} usable rows, {len(pairs.rejected)} set aside)"
        )
    near = np.array([held_out(prompt, 2 * fraction, seed) for prompt in pairs.prompts])
    test = np.array([held_out(prompt, fraction, seed) for prompt in pairs.prompts])
    of = pairs.prompt[keep]
    parts = (keep[~near[of]], keep[near[of] & ~test[of]], keep[test[of]])
    for name, rows in zip(("training", "validation", "test"), parts, strict=True):
        if not (pairs.label[rows] != 0.5).any():
            raise InputError(
                f"the {name} part holds no strict pair: {len(pairs.prompts)} prompts are too few "
                f"to hold out {fraction:g} of them twice; give more prompts or another held_out"
            )
    return Split(*parts, dict(dropped))


def _counted(pairs: PairFeatures, drop_ties: bool) -> tuple[Rows, Counter[str]]:
    """The rows that count in order, and why others do not."""
    dropped: Counter[str] = Counter()
    keep = []
    seen: set[tuple[object, ...]] = set()
    columns = zip(pairs.first, pairs.second, pairs.prompt, pairs.label, pairs.users, strict=True)
    for row, (first, second, prompt, label, user) in enumerate(columns):
        # Swapping the pictures and the label says the same thing again.
        said = min((first, second, label), (second, first, 1 - label))
        fact = (user, prompt, *said)
        if first == second:
            dropped["same picture twice"] += 1
        elif drop_ties and label == 0.5:
            dropped["tie"] += 1
        elif user and fact in seen:
            dropped["said before by the same user"] += 1
        else:
            keep.append(row)
            seen.add(fact)
    return np.array(keep, dtype=np.int64), dropped
