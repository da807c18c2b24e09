"""Simulated judges with tastes of their own, and the rule by which their verdicts become a label.

A judge compares two pictures by Bradley-Terry with ties (Rao and Kupper 1967) on

    skill * merit(picture) + sum_j bias_j * nuisance_j(picture)

in logits, nuisances in standard deviations over scenes of the mini world. Their biases differ, so
that what all of them agree on is unlikely to be one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fifa.config import InputError
from fifa.miniworld.annotators import TIE, rao_kupper
from fifa.rewards.nuisance import NUISANCES

Floats = NDArray[np.float64]
Verdicts = NDArray[np.int8]  # 0: the first picture is better, 1: the second, -1: a tie

SPREAD = {  # standard deviation of each nuisance over 2,000 scenes
    "saturation": 0.076,
    "brightness": 0.29,
    "contrast": 0.055,
    "edges": 0.038,
    "jpeg": 1.4,
}


@dataclass(frozen=True)
class Judge:
    """How well a judge sees what is right, and what else impresses it."""

    skill: float  # logits for merit going from 0 to 1
    bias: Mapping[str, float] = field(default_factory=dict)  # nuisance -> logits a deviation
    careless: float = 0.0  # chance to answer by a coin
    tie_half_width: float = 0.2  # logits; 0 never calls a tie

    def judge(self, merits: Floats, nuisances: Floats, rng: np.random.Generator) -> Verdicts:
        """Verdicts (N,) on pairs of `merits` (N, 2) and `nuisances` (N, 2, 5)."""
        weights = np.array([self.bias.get(name, 0.0) / SPREAD[name] for name in NUISANCES])
        utility = self.skill * merits + nuisances @ weights
        uniform = rng.random((3, len(merits)))
        seen = rao_kupper(utility[:, 0] - utility[:, 1], self.tie_half_width, uniform[0])
        said = np.where(uniform[1] < self.careless, uniform[2] < 0.5, seen)
        return np.where(said == TIE, -1, said).astype(np.int8)


JUDGES: dict[str, Judge] = {
    "careful": Judge(7),
    "glossy": Judge(6, {"saturation": 0.5, "contrast": 0.3}),
    "bright": Judge(6, {"brightness": 0.6}),
    "busy": Judge(6, {"edges": 0.4, "jpeg": 0.3}),
    "tired": Judge(5, careless=0.15),
}


def majority(verdicts: Verdicts) -> Verdicts:
    """The picture that more judges prefer, (N,) from (J, N); -1 where neither is ahead."""
    first, second = (verdicts == 0).sum(0), (verdicts == 1).sum(0)
    return np.select([first > second, second > first], [0, 1], -1).astype(np.int8)


def agreed(verdicts: Verdicts, least: int) -> NDArray[np.bool_]:
    """Whether at least `least` of the judges give the majority's verdict, (N,) from (J, N).

    A majority of ties agrees on nothing. Raises InputError for a number of judges that is not
    there.
    """
    judges = len(verdicts)
    if not 1 <= least <= judges:
        raise InputError(f"{least} of the judges shall agree, but there are {judges} of them")
    label = majority(verdicts)
    return (label >= 0) & ((verdicts == label).sum(0) >= least)
