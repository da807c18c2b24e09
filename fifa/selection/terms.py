"""What was scored of N pairs, normalised: margin, text quality and diversity, and their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from fifa.config import InputError
from fifa.knn import FLOOR, Vectors

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MarginKind = Literal["signed", "absolute", "capped"]
Norm = Literal["zscore", "rank", "minmax"]


def zscore(x: Floats) -> Floats:
    """Mean 0 and standard deviation 1; all zeros if the values do not differ."""
    spread = x.std()
    return (x - x.mean()) / spread if spread > 0 else np.zeros_like(x)


def rank(x: Floats) -> Floats:
    """Ranks scaled to [0, 1], ties sharing their mean rank; all 0.5 if the values do not differ."""
    return (rankdata(x) - 1) / (len(x) - 1) if len(x) > 1 else np.full_like(x, 0.5)


def minmax(x: Floats) -> Floats:
    """Scaled linearly to [0, 1]; all zeros if the values do not differ."""
    width = x.max() - x.min()
    return (x - x.min()) / width if width > 0 else np.zeros_like(x)


NORMS: dict[str, Callable[[Floats], Floats]] = {"zscore": zscore, "rank": rank, "minmax": minmax}


def signed(margin: Floats) -> Floats:
    """As it is: pairs on which the reward contradicts the person sink to the bottom."""
    return margin


def absolute(margin: Floats) -> Floats:
    """Its size: what is clear to the reward counts, whoever is right."""
    return np.abs(margin)


def capped(margin: Floats, quantile: float = 0.95) -> Floats:
    """Signed, but at most its own quantile: beyond that, larger is not better."""
    return np.minimum(margin, np.quantile(margin, quantile))


MARGINS: dict[str, Callable[[Floats], Floats]] = {
    "signed": signed,
    "absolute": absolute,
    "capped": capped,
}


@dataclass(frozen=True)
class Terms:
    """All that a selector sees of N pairs; made by `make_terms`."""

    margin: Floats  # (N,) normalised
    quality: Floats  # (N,) normalised
    diversity: Floats  # (N,) normalised log_knn over all prompts
    prompt: Ints  # (N,) row of `vectors`
    vectors: Vectors  # (P, D) unit length
    win: Floats  # (N,) reward of the winner, as scored
    lose: Floats  # (N,)
    alpha: float
    gamma: float
    centre: float  # mean and standard deviation of log_knn over the pairs
    spread: float
    neighbours: int = 1  # k of d_k inside S
    floor: float = FLOOR
    group: Ints | None = None  # (N,) near copies share one; None: each prompt is its own

    def __len__(self) -> int:
        return len(self.margin)

    @property
    def groups(self) -> Ints:
        """(N,): what a cap counts, the group of near copies or else the prompt."""
        return self.prompt if self.group is None else self.group


def make_terms(
    *,
    win: Floats,
    lose: Floats,
    quality: Floats,
    log_knn: Floats,
    prompt: Ints,
    vectors: Vectors,
    alpha: float = 0.5,
    gamma: float = 0.5,
    margin: MarginKind = "signed",
    norm: Norm = "zscore",
    neighbours: int = 1,
    floor: float = FLOOR,
    group: Ints | None = None,
) -> Terms:
    """Normalise what was scored. All arrays (N,) but `vectors` (P, D); no NaN.

    `win` and `lose` are rewards of the picture the person preferred and of the other, `quality`
    lies in 0..10, `log_knn` is in nats. `group` numbers groups of near copies: all pairs of a
    prompt are in the same one.
    """
    columns = (win, lose, quality, log_knn, prompt, *(() if group is None else (group,)))
    if len({len(column) for column in columns}) != 1 or len(win) == 0:
        raise InputError(f"terms need columns of one length, got {[len(c) for c in columns]}")
    if not all(np.isfinite(column).all() for column in columns):
        raise InputError("terms must be finite, found NaN or infinity")
    scale = NORMS[norm]
    return Terms(
        margin=scale(MARGINS[margin](win - lose)),
        quality=scale(quality),
        diversity=scale(log_knn),
        prompt=prompt,
        vectors=vectors,
        win=win,
        lose=lose,
        alpha=alpha,
        gamma=gamma,
        centre=float(log_knn.mean()),
        spread=float(log_knn.std()) or 1.0,
        neighbours=neighbours,
        floor=floor,
        group=group,
    )


def own_value(terms: Terms) -> Floats:
    """What each pair is worth without regard to others, (N,): margin + alpha quality."""
    return terms.margin + terms.alpha * terms.quality
