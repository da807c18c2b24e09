"""Is this run healthy? A few numbers, what is unusual about them, and what to do, in words.

The loss alone does not say: D3PO's stays near 0.693 while the reward climbs, because beta on
per-element log-probabilities keeps its logit small. These rules look at averages over the last
updates instead. They warn; they never stop a run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WINDOW = 20  # updates a rule averages over; it stays silent until it has seen that many

Averages = Mapping[str, float]


@dataclass(frozen=True)
class Rule:
    """What is unusual, in terms of window averages, and the sentence that says so."""

    broken: Callable[[Averages], bool]
    words: str  # may quote the averages as {name}


RULES: dict[str, Rule] = {
    "prefers losers": Rule(
        lambda seen: seen["accuracy"] < 0.45,
        "only {accuracy:.0%} of the trained pairs are ordered as the judge ordered them: the "
        "learning"
        " rate may be too high, or the judge's higher is not better",
    ),
    "clipped": Rule(
        lambda seen: seen["clipped"] > 0.8,
        "{clipped:.0%} of the ratios are outside the clip band and give no gradient: lower the "
        "learning"
        " rate or the inner epochs, or widen the clip",
    ),
    "winner sinks": Rule(
        lambda seen: (
            seen["win_ratio"] < 0 and -seen["win_ratio"] > seen["win_ratio"] - seen["lose_ratio"]
        ),
        "the winners become less likely ({win_ratio:.2g} in log-probability), the losers even "
        "less: the"
        " policy moves away from both; lower the learning rate or raise beta",
    ),
    "gradient": Rule(
        lambda seen: seen["grad_norm"] > 10 * seen["first_grad_norm"] > 0,
        "the gradient norm is {grad_norm:.3g}, ten times what it was at the start: lower the "
        "learning rate",
    ),
    "ties": Rule(
        lambda seen: seen.get("tied", 0.0) > 0.5,
        "{tied:.0%} of the groups are ties and teach nothing: more images a group, another "
        "judge, or"
        " prompts that the model sometimes gets right",
    ),
}


class Health:
    """Remembers the last updates of a run and says what is newly unusual about them."""

    def __init__(self, window: int = WINDOW) -> None:
        self._rows: deque[dict[str, float]] = deque(maxlen=window)
        self._first_grad_norm: float | None = None
        self._complained: set[str] = set()

    def look(self, row: Mapping[str, Any]) -> list[str]:
        """Warnings about the window that ends with this update; a lasting complaint is made once.

        `row` holds accuracy, clipped, win_ratio, lose_ratio, grad_norm of one update, and
        tied, the share of tied groups, of the rollout it came from.
        """
        self._rows.append({key: value for key, value in row.items() if isinstance(value, float)})
        if len(self._rows) < (self._rows.maxlen or 0):
            return []
        seen = self._averages()
        broken = {name for name, rule in RULES.items() if rule.broken(seen)}
        new = broken - self._complained
        self._complained = broken
        return [RULES[name].words.format(**seen) for name in RULES if name in new]

    def _averages(self) -> dict[str, float]:
        keys = set.intersection(*(set(row) for row in self._rows))
        seen = {key: sum(row[key] for row in self._rows) / len(self._rows) for key in keys}
        if self._first_grad_norm is None:
            self._first_grad_norm = seen["grad_norm"]
        return _Seen(seen, first_grad_norm=self._first_grad_norm)


class _Seen(dict[str, float]):
    """Averages; one that an objective does not have is NaN, and no rule finds fault with it."""

    def __missing__(self, key: str) -> float:
        return math.nan


def compare_judges(differences: Mapping[str, tuple[float, float]]) -> list[str]:
    """Warn where the policy gains by the judge it was trained on and loses by another.

    `differences` maps a judge to the 95% interval of (policy - reference); the first is the one
    trained on.
    """
    (proxy, (low, _)), *others = differences.items()
    if low <= 0:
        return []
    return [
        f"better by {proxy}, worse by {name} (difference at most {high:.3g}): the policy may "
        "exploit"
        f" {proxy} instead of making better pictures"
        for name, (_, high) in others
        if high < 0
    ]


def compare_diversity(policy: float, reference: float) -> list[str]:
    """Warn where pictures of one prompt have become much more alike."""
    if policy >= 0.5 * reference:
        return []
    return [
        f"pictures of one prompt differ by {policy:.3g}, by {reference:.3g} before training: "
        "the policy"
        " is collapsing; stop earlier or raise beta"
    ]
