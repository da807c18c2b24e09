"""Rules about updates: window averages of what each optimizer step reported."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d3po.health.words import Complaint

if TYPE_CHECKING:
    from d3po.health import HealthConfig

START = 5  # updates whose median gradient norm is the start's
IN_A_ROW = 3  # skipped steps; fp16's loss scale finds its size by skipping one or two
SURE = 3.0  # standard errors that a window average must be away from what is usual


@dataclass(frozen=True)
class Rule:
    """What is unusual, in terms of the window, and the sentence that says so."""

    needs: tuple[str, ...]  # metrics; an update without one of them is not judged by this rule
    broken: Callable[[Window, HealthConfig], bool]
    words: str  # may quote the averages as {name}


class Window:
    """The last updates of a run as averages, with what else the rules ask for.

    `average` has `win_reward` and `lose_reward` too: beta times the log-ratios, in units of the
    objective's logit, so that a threshold means the same for every likelihood and every beta.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, float]], beta: float | None, start: float | None
    ) -> None:
        keys = set.intersection(*(set(row) for row in rows))
        self.columns = {key: [row[key] for row in rows] for key in keys}
        if beta is not None:
            for name in ("win", "lose"):
                if f"{name}_ratio" in keys:
                    values = [beta * value for value in self.columns[f"{name}_ratio"]]
                    self.columns[f"{name}_reward"] = values
        if start is not None:
            self.columns["start"] = [start] * len(rows)
        self.average = {key: statistics.fmean(own) for key, own in self.columns.items()}

    def clearly_below(self, key: str, limit: float) -> bool:
        """Whether the average is below the limit by more than its own scatter explains."""
        values = self.columns[key]
        error = statistics.stdev(values) / math.sqrt(len(values))
        return self.average[key] + SURE * error < limit


def _against_the_labels(seen: Window, config: HealthConfig) -> bool:
    return seen.average["accuracy"] < config.accuracy and seen.clearly_below("accuracy", 0.5)


def _sinking(seen: Window, config: HealthConfig) -> bool:
    """The winner's own fall is larger than what tells it from the loser, and too large anyway."""
    win, lose = seen.average["win_reward"], seen.average["lose_reward"]
    return -win > max(config.sinking, win - lose) and seen.clearly_below("win_reward", 0)


def _runaway(seen: Window, config: HealthConfig) -> bool:
    """Both ratios are far on one side, far beyond what tells winner and loser apart."""
    win, lose = seen.average["win_reward"], seen.average["lose_reward"]
    common = min(abs(win), abs(lose)) if win * lose > 0 else 0.0
    return common > max(config.runaway, 2 * abs(win - lose))


RULES: dict[str, Rule] = {
    "gradient": Rule(
        ("grad_norm", "start"),
        lambda seen, config: (
            statistics.median(seen.columns["grad_norm"]) > config.gradient * seen.average["start"]
        ),
        "the gradient norm is {grad_norm:.3g}, at the start it was {start:.3g}: the learning rate "
        "is too high and the weights run away; lower optim.learning_rate or lengthen "
        "optim.warmup_steps",
    ),
    "order": Rule(
        ("accuracy",),
        _against_the_labels,
        "only {accuracy:.0%} of the trained pairs are ordered as they are labelled: the learning "
        "rate is too high; lower optim.learning_rate",
    ),
    "sinking": Rule(
        ("win_reward", "lose_reward"),
        _sinking,
        "winners and losers become less likely together (implicit rewards {win_reward:.3g} and "
        "{lose_reward:.3g}): the policy leaves the reference behind and its pictures fall apart, "
        "the learning rate is too high or beta too low; lower optim.learning_rate or raise "
        "objective.beta",
    ),
    "runaway": Rule(
        ("win_reward", "lose_reward"),
        _runaway,
        "winners and losers both left the reference far behind (implicit rewards {win_reward:.3g} "
        "and {lose_reward:.3g}): the learning rate is too high; lower optim.learning_rate or "
        "lengthen optim.warmup_steps",
    ),
    "by heart": Rule(
        ("margin", "accuracy"),
        lambda seen, config: (
            seen.average["margin"] > config.margin and seen.average["accuracy"] > 0.95
        ),
        "the implicit margin of trained pairs is {margin:.3g}: they are learned by heart and what "
        "still moves is noise; stop earlier, use more pairs, or an objective that stops at a "
        "margin (ipo)",
    ),
    "clipped": Rule(
        ("clipped",),
        lambda seen, config: seen.average["clipped"] > config.clipped,
        "{clipped:.0%} of the ratios are outside the clip band and give no gradient: steps are "
        "too large; lower optim.learning_rate or online.inner_epochs, or widen the clip",
    ),
}


class Updates:
    """Remembers the last updates."""

    def __init__(self, config: HealthConfig, beta: float | None) -> None:
        self.config, self.beta = config, beta
        self._rows: deque[dict[str, float]] = deque(maxlen=config.window)
        self._first: list[float] = []
        self._skipped = 0

    def look(self, row: Mapping[str, Any]) -> list[Complaint] | None:
        """Complaints about the window that ends with this update; None where there is no saying."""
        self._skipped = self._skipped + 1 if row.get("skipped") else 0
        if self._skipped:
            return [Complaint("nan", self._not_finite())] if self._skipped >= IN_A_ROW else []
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        if "grad_norm" not in numbers:
            return None  # an update without a pair
        if len(self._first) < START:
            self._first.append(numbers["grad_norm"])
        self._rows.append(numbers)
        if len(self._rows) < self.config.window:
            return []
        seen = Window(self._rows, self.beta, statistics.median(self._first) or None)
        return [
            Complaint(name, rule.words.format(**seen.average))
            for name, rule in RULES.items()
            if all(key in seen.columns for key in rule.needs) and rule.broken(seen, self.config)
        ]

    def _not_finite(self) -> str:
        """NaN out of the blue is arithmetic; after a growing gradient it is the learning rate."""
        grown = bool(self._rows) and bool(self._first)
        grown = grown and self._rows[-1]["grad_norm"] > self.config.gradient * self._first[0]
        if grown:
            return (
                "the gradient is not finite after it had grown from "
                f"{self._first[0]:.3g} to {self._rows[-1]['grad_norm']:.3g}: the learning rate is "
                "too high and the weights run away; lower optim.learning_rate"
            )
        return (
            "the gradient is not finite although it had not grown: numbers overflow, or latents or "
            "weights are NaN; use run.mixed_precision bf16 or no, and look at the data's latents"
        )
