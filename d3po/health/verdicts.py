"""What comparisons say: judges on equal seeds, held-out pairs, labels against other judges.

Each is a test, made at every evaluation of a run. So that many looks do not add up to a false
alarm, look n may spend alarm_rate * 6 / (pi^2 n^2): over all looks together that is alarm_rate
(alpha spending, Lan & DeMets 1983), shared among the judges that are tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from d3po.health.pictures import TONES, collapse
from d3po.health.words import Complaint

if TYPE_CHECKING:
    from d3po.health import HealthConfig

Z95 = NormalDist().inv_cdf(0.975)
PLAUSIBLE = NormalDist().inv_cdf(0.95)  # for the rise of the proxy, which alone is no alarm
ENOUGH = 20  # pairs, below which a share says nothing
FEWEST_PROMPTS = 8  # below this a bootstrap over prompts is far too sure of itself


def spent(alarm_rate: float, look: int, tests: int) -> float:
    """The z-value that test must exceed at its look-th time (from 1), one of `tests` at once."""
    alpha = alarm_rate * 6 / (math.pi**2 * look**2) / tests
    return NormalDist().inv_cdf(1 - alpha)


def z_of(difference: float, interval: tuple[float, float]) -> float:
    """How many standard errors a difference is from 0, from its 95% interval."""
    error = (interval[1] - interval[0]) / (2 * Z95)
    return difference / error if error > 0 else 0.0


def z_of_share(share: float, count: float) -> float:
    """How many standard errors a share of `count` pairs is above one half."""
    return (share - 0.5) * 2 * math.sqrt(count)


class Verdicts:
    """Counts the looks, and judges each."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self._looks = {"evaluation": 0, "held out": 0}

    def _limit(self, what: str, tests: int) -> float:
        self._looks[what] += 1
        return spent(self.config.alarm_rate, self._looks[what], tests)

    def evaluation(self, row: Mapping[str, Any]) -> list[Complaint] | None:
        """Complaints about policy against reference; None before anything was learned."""
        judges = {
            name: (own, z_of(own["difference"], own["difference_interval"]))
            for name, own in row["judges"].items()
        }
        if not any(own["wins"] + own["losses"] for own, _ in judges.values()):
            return None  # nothing was learned yet: they are the same network
        enough = row.get("prompts", FEWEST_PROMPTS) >= FEWEST_PROMPTS  # older runs don't say
        found = self._judged(judges) if enough else []
        pair = row["pixel_diversity"]
        if None not in pair.values():  # a single picture a prompt has no distance
            found += collapse(pair["policy"], pair["reference"], self.config.diversity)
        return found + self._tone(row)

    def _judged(self, judges: Mapping[str, tuple[Mapping[str, Any], float]]) -> list[Complaint]:
        limit = self._limit("evaluation", len(judges))
        (proxy, (result, z)), *others = judges.items()
        found = []
        if z < -limit:
            found.append(Complaint("worse", _worse(proxy, result)))
        if z > PLAUSIBLE:
            lost = {name: own for name, (own, other) in others if other < -limit}
            if lost:
                found.append(Complaint("exploited", _exploited(proxy, result, lost)))
        return found

    def _tone(self, row: Mapping[str, Any]) -> list[Complaint]:
        moved = [
            f"{name} from {row[name]['reference']:.2f} to {row[name]['policy']:.2f}"
            for name in TONES
            if name in row and abs(row[name]["policy"] - row[name]["reference"]) > self.config.tone
        ]
        if not moved:
            return []
        return [
            Complaint(
                "tone",
                f"the pictures moved in {' and in '.join(moved)}: the judge is paid in tone in "
                "place of content; add a judge that looks at the prompt, or raise objective.beta",
            )
        ]

    def held_out(self, row: Mapping[str, Any]) -> list[Complaint] | None:
        """Complaints about the order of pairs that were kept out of training."""
        if row["pairs"] < ENOUGH or row["accuracy"] is None:
            return None
        limit = self._limit("held out", 1)
        if z_of_share(row["accuracy"], row["pairs"]) >= -limit:
            return []
        return [
            Complaint(
                "held out",
                f"of {row['pairs']:.0f} held-out pairs only {row['accuracy']:.0%} are ordered as "
                "they are labelled: what is learned from the training pairs has the wrong sign, "
                "winner and loser are exchanged in them, or they are learned by heart; check "
                "which column holds the winner",
            )
        ]

    def labels(self, row: Mapping[str, Any]) -> list[Complaint]:
        """Complaints about pairs whose labels contradict other judges, before any training."""
        limit = spent(self.config.alarm_rate, 1, max(1, len(row["agreement"])))
        against = {
            judge: share
            for judge, share in row["agreement"].items()
            if row["pairs"] >= ENOUGH and z_of_share(share, row["pairs"]) < -limit
        }
        if not against or max(row["agreement"].values()) >= 0.5:
            return []
        told = " and ".join(f"{judge} on {share:.0%}" for judge, share in against.items())
        return [
            Complaint(
                "labels",
                f"of {row['pairs']:.0f} training pairs the labels agree with {told} only: winner "
                "and loser seem to be exchanged (wrong sign); check which column holds the winner",
            )
        ]


def _worse(proxy: str, result: Mapping[str, Any]) -> str:
    return (
        f"by {proxy}, the first judge, the pictures are worse than before training "
        f"({result['reference']:.4g} to {result['policy']:.4g}): the preferences have the wrong "
        "sign (is higher better? which column holds the winner?), or the learning rate is so high "
        "that the network falls apart"
    )


def _exploited(proxy: str, result: Mapping[str, Any], lost: Mapping[str, Mapping[str, Any]]) -> str:
    price = ", ".join(
        f"{name} fell from {own['reference']:.4g} to {own['policy']:.4g}"
        for name, own in lost.items()
    )
    return (
        f"{proxy}, the first judge, rose from {result['reference']:.4g} to "
        f"{result['policy']:.4g} while {price}: the policy exploits {proxy} in place of painting "
        "better (over-optimisation); stop earlier, raise objective.beta, or add the other judge"
    )
