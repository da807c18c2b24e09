"""Is this run healthy? What metrics.jsonl says, what is unusual about it, and what to do, in words.

The loss alone does not say: D3PO's stays near 0.693 while the reward climbs, because beta on
per-element log-probabilities keeps its logit small. These checks look at everything else that a
run records (`rules` for updates, `pictures` for what was painted, `verdicts` for comparisons), and
at nothing but that: the same lines give the same warnings, live, after a resume, or years later.
They warn; a run stops only where its config says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from d3po.health.pictures import Rounds
from d3po.health.rules import Updates
from d3po.health.verdicts import Verdicts
from d3po.health.words import CHECKS, Complaint
from d3po.run import Run
from fifa.config import Config, finite

__all__ = ["CHECKS", "Complaint", "Health", "HealthConfig"]


class HealthConfig(Config):
    """From where on a run is called unhealthy, and whether it then stops."""

    stop: bool | tuple[str, ...] = Field(
        False,
        description="End the run at the first warning, with the weights of the last good "
        "checkpoint: true, or a list of checks (" + ", ".join(CHECKS) + ").",
    )
    window: int = Field(
        20, ge=2, description="Updates that are averaged over; with fewer nothing is said of them."
    )
    rounds: int = Field(
        5, ge=2, description="Rounds of pictures that are compared with the first ones."
    )
    alarm_rate: float = Field(
        0.01,
        gt=0,
        lt=0.5,
        description="Chance that a healthy run is warned of by a comparison (held-out pairs, "
        "judges, labels), over all its evaluations together.",
    )
    accuracy: float = Field(
        0.45, ge=0, le=1, description="Share of trained pairs in order below which it is odd."
    )
    clipped: float = Field(
        0.8, gt=0, le=1, description="Share of clipped log-ratios from which steps are too large."
    )
    gradient: float = Field(
        10.0, gt=1, description="Growth of the gradient norm, as a factor of the start's."
    )
    sinking: float = Field(
        2.0,
        gt=0,
        description="Implicit reward, beta times the log-ratio, that winners may lose.",
    )
    runaway: float = Field(
        20.0,
        gt=0,
        description="Implicit reward of both images of a pair, of either sign, from which the "
        "policy has left its reference.",
    )
    margin: float = Field(
        15.0,
        gt=0,
        description="Implicit margin from which pairs are learned by heart: their loss is gone.",
    )
    tied: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of groups without a winner from which little is learned.",
    )
    shortcut: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="Correlation of the judge with brightness or saturation within a prompt, from "
        "which it is taken to see little else.",
    )
    tone: float = Field(
        0.25, gt=0, description="Drift of the pictures' brightness or saturation, both in [0, 1]."
    )
    diversity: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="What must be left of the distance between pictures of one prompt.",
    )
    pairs: int = Field(
        256,
        ge=0,
        description="Pairs that are looked at outside training: held-out ones, and the labels of "
        "training ones; 0: none.",
    )

    @field_validator("stop")
    @classmethod
    def _known(cls, stop: bool | tuple[str, ...]) -> bool | tuple[str, ...]:
        wrong = [] if isinstance(stop, bool) else [name for name in stop if name not in CHECKS]
        if wrong:
            raise ValueError(f"no check is called {wrong[0]!r}, known are {', '.join(CHECKS)}")
        return stop


class Health:
    """Follows the lines of a run's metrics.jsonl; `stopped` is the complaint that ends the run."""

    def __init__(self, config: HealthConfig | None = None, beta: float | None = None) -> None:
        self.config = config or HealthConfig()
        self.stopped: Complaint | None = None
        self._updates = Updates(self.config, beta)
        self._rounds = Rounds(self.config)
        self._verdicts = Verdicts(self.config)
        self._standing: dict[str, set[str]] = {}  # kind of line -> checks that complain of it
        self._step = 0
        self._clean_until = 0

    def see(self, kind: str, step: int, values: Mapping[str, Any]) -> list[Complaint]:
        """What is newly wrong with this line; a lasting complaint is made once.

        `kind`, `step` and `values` are as in metrics.jsonl. Kinds that say nothing about health are
        passed over.
        """
        looks: dict[str, Callable[[Mapping[str, Any]], Iterable[Complaint] | None]] = {
            "update": self._updates.look,
            "round": self._rounds.look,
            "eval": self._verdicts.evaluation,
            "held_out": self._verdicts.held_out,
            "labels": self._verdicts.labels,
        }
        found = looks[kind](finite(values)) if kind in looks else None
        if found is None:
            return []
        complaints = {complaint.check: complaint for complaint in found}
        before = self._standing.get(kind, set())
        self._standing[kind] = set(complaints)
        self._remember(step)
        new = [own for check, own in complaints.items() if check not in before]
        for complaint in new:
            if self.stopped is None and self._stops(complaint):
                self.stopped = complaint
        return new

    def follow(self, run: Run, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Record a line of metrics; say, and record, what is newly wrong with it."""
        run.record(kind, step, values)
        for complaint in self.see(kind, step, values):
            run.record("health", step, {"check": complaint.check, "words": complaint.words})
            run.say(f"warning: {complaint.words}")

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> list[tuple[int, Complaint]]:
        """See lines of metrics.jsonl again, from the first; the complaints with their steps.

        What was complained of then does not stop the run that goes on from here.
        """
        told = [
            (row["step"], complaint)
            for row in rows
            for complaint in self.see(row["kind"], row["step"], row)
        ]
        self.stopped = None
        return told

    def over(self) -> bool:
        """Whether the run is to end here."""
        return self.stopped is not None

    def good(self, step: int) -> bool:
        """Whether a checkpoint of this step was followed by a window of healthy updates."""
        return step + self.config.window <= self._clean_until

    def to_keep(self, steps: Sequence[int]) -> list[int]:
        """Of the checkpoints of these steps, the one to fall back on and the next to become it."""
        if not self.config.stop:
            return []
        good = [step for step in steps if self.good(step)]
        waiting = [step for step in steps if not self.good(step)]
        return [*good[-1:], *waiting[:1]]

    def _remember(self, step: int) -> None:
        self._step = max(self._step, step)
        if not any(self._standing.values()):
            self._clean_until = self._step

    def _stops(self, complaint: Complaint) -> bool:
        stop = self.config.stop
        return stop if isinstance(stop, bool) else complaint.check in stop
