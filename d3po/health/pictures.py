"""What the pictures say: their tone, how much they differ, and what the judge sees in them.

Brightness is the mean of Rec. 709 luma, saturation the mean of max - min over the three channels,
both in [0, 1]. A judge that follows one of them within a prompt's group, whatever is painted, is
soon satisfied with white or garish pictures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d3po.health.words import Complaint

if TYPE_CHECKING:
    from torch import Tensor

    from d3po.health import HealthConfig

LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709
TONES = ("brightness", "saturation")


def tone(images: Tensor) -> NDArray[np.float64]:
    """Brightness and saturation, (N, 2), of images (N, 3, H, W) in [0, 1]."""
    pixels = images.detach().double().cpu()
    weights = pixels.new_tensor(LUMA)[:, None, None]
    bright = (pixels * weights).sum(1).mean((1, 2))
    saturated = (pixels.amax(1) - pixels.amin(1)).mean((1, 2))
    return np.stack([bright.numpy(), saturated.numpy()], 1)


def spread(latents: Tensor) -> float:
    """Root mean square distance of K latents (K, ...) to their mean, per element."""
    return float(latents.detach().double().var(0, correction=0).mean().sqrt())


def group_sums(
    images: Tensor, latents: Tensor, scores: NDArray[np.float64], groups: int
) -> list[float]:
    """Sums over groups and images that `picture_metrics` turns into means, one process's share.

    images (N, 3, H, W), clean latents (N, C, h, w), scores (N,) of the first judge; N is `groups`
    times the images of a group. Scores that are NaN belong to pictures that are not finite.
    """
    tones = tone(images)
    finite = np.isfinite(scores)
    values = [float(finite.sum()), *tones[finite].sum(0).tolist(), float((~finite).sum())]
    distances, counted = 0.0, 0
    correlations = np.zeros(4)  # of each tone: their sum, and in how many groups there is one
    for own in np.split(np.arange(len(scores)), groups):
        kept = own[finite[own]]
        if len(kept) < 2:
            continue
        distances, counted = distances + spread(latents[kept]), counted + 1
        for i in range(2):
            found = correlation(scores[kept], tones[kept, i])
            if found is not None:
                correlations[[2 * i, 2 * i + 1]] += found, 1
    return [*values, distances, float(counted), *correlations.tolist()]


def picture_metrics(sums: Sequence[float]) -> dict[str, Any]:
    """Metrics of a round from `group_sums`, added up over all processes."""
    count, bright, saturated, broken, distances, groups, *found = sums
    return {
        "brightness": _mean(bright, count),
        "saturation": _mean(saturated, count),
        "diversity": _mean(distances, groups),
        "follows": {name: _mean(found[2 * i], found[2 * i + 1]) for i, name in enumerate(TONES)},
        "not_finite": broken / max(1.0, broken + count),
    }


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Pearson's; None where one of the two does not vary, or for two points, which say nothing."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


class Rounds:
    """Compares the last rounds of pictures with the first."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self._rows: list[dict[str, Any]] = []  # the first and the last `rounds`

    def look(self, row: Mapping[str, Any]) -> list[Complaint] | None:
        """Complaints about the rounds up to this one."""
        found = self._broken(row)
        if row.get("brightness") is None or not math.isfinite(row["brightness"]):
            return found or None
        self._rows.append({**row, "follows": row.get("follows") or {}})
        first = self.config.rounds
        if len(self._rows) > 2 * first:
            del self._rows[first]
        if len(self._rows) >= first:
            found += self._ties() + self._shortcut()
        if len(self._rows) == 2 * first:
            found += self._tone() + self._diversity()
        return found

    def _broken(self, row: Mapping[str, Any]) -> list[Complaint]:
        if not row.get("not_finite"):
            return []
        return [
            Complaint(
                "nan",
                f"{row['not_finite']:.0%} of the pictures of a round have latents that are NaN or "
                "infinite, and are in no pair: the network or the VAE overflows, or its weights "
                "are broken; use run.mixed_precision bf16 or no, and go back to a checkpoint "
                "before it began",
            )
        ]

    def _last(self, name: str) -> list[float]:
        return [row[name] for row in self._rows[-self.config.rounds :] if _is_number(row.get(name))]

    def _first(self, name: str) -> list[float]:
        return [row[name] for row in self._rows[: self.config.rounds] if _is_number(row.get(name))]

    def _ties(self) -> list[Complaint]:
        tied = self._last("tied")
        if not tied or statistics.fmean(tied) <= self.config.tied:
            return []
        return [
            Complaint(
                "ties",
                f"{statistics.fmean(tied):.0%} of the groups are ties and teach nothing: draw more "
                "images a group (online.images), take another judge, or prompts that the model "
                "sometimes gets right",
            )
        ]

    def _shortcut(self) -> list[Complaint]:
        recent = self._rows[-self.config.rounds :]
        for name in TONES:
            values = [own for row in recent if _is_number(own := row["follows"].get(name))]
            if len(values) < self.config.rounds:
                continue
            found = statistics.fmean(values)
            if abs(found) > self.config.shortcut:
                return [
                    Complaint(
                        "shortcut",
                        f"within a prompt the judge follows {name} (correlation {found:+.2f}): it "
                        f"rewards {'more' if found > 0 else 'less'} {name} whatever is painted; "
                        "add a judge that looks at the prompt",
                    )
                ]
        return []

    def _tone(self) -> list[Complaint]:
        found = []
        for name in TONES:
            before, now = self._first(name), self._last(name)
            drift = statistics.fmean(now) - statistics.fmean(before)
            if abs(drift) > self.config.tone and apart(before, now):
                found.append(
                    f"{name} from {statistics.fmean(before):.2f} to {statistics.fmean(now):.2f}"
                )
        if not found:
            return []
        return [
            Complaint(
                "tone",
                f"the pictures drift in {' and in '.join(found)}: the judge is paid in tone in "
                "place of content; add a judge that looks at the prompt, or raise objective.beta",
            )
        ]

    def _diversity(self) -> list[Complaint]:
        before, now = self._first("diversity"), self._last("diversity")
        if len(before) < 2 or len(now) < 2 or not apart(before, now):
            return []
        return collapse(statistics.fmean(now), statistics.fmean(before), self.config.diversity)


def collapse(policy: float, reference: float, least: float) -> list[Complaint]:
    """Complain where pictures of one prompt have become much more alike."""
    if not policy < least * reference:
        return []
    return [
        Complaint(
            "diversity",
            f"pictures of one prompt differ by {policy:.3g}, by {reference:.3g} before training: "
            "the policy is collapsing onto few pictures; stop earlier or raise objective.beta",
        )
    ]


def apart(before: Sequence[float], now: Sequence[float], errors: float = 4.0) -> bool:
    """Whether two means differ by more than `errors` standard errors (Welch 1947)."""
    error = math.sqrt(
        statistics.variance(before) / len(before) + statistics.variance(now) / len(now)
    )
    return abs(statistics.fmean(now) - statistics.fmean(before)) > errors * error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
