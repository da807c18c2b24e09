"""What a reward makes of the pairs of a bench: margins in both orders, and after a change of gloss.

A pair that a reward cannot score is set aside with the reason; it never ends a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fifa.config import InputError
from fifa.images import Pixels, decode, to_batch
from fifa.rewardbench.pictures import saturated
from fifa.rewardbench.table import Item
from fifa.rewards import BrokenRewardError, ComparingReward, Reward, score_pictures

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Progress = Callable[[str, int, int], None]

LISTED = 20  # reasons kept in full; all are counted


@dataclass(frozen=True)
class Pictures:
    """A pair in pixels, one size or two."""

    item: Item
    first: Pixels
    second: Pixels


@dataclass
class Margins:
    """What a reward said: score of the first picture less that of the second, NaN for nothing."""

    margin: Floats  # (N,) of a reward that compares: the mean over both orders
    orders: tuple[Floats, Floats] | None = None  # as given, and asked the other way round
    glossy: tuple[Floats, Floats] | None = None  # first, second picture with more saturation
    set_aside: Counter[str] = field(default_factory=Counter)  # reason -> pairs
    examples: list[str] = field(default_factory=list)


def pictures_of(items: Sequence[Item]) -> tuple[list[Pictures], Counter[str]]:
    """The pairs whose pictures are there and can be decoded, and why others are left out."""
    found: list[Pictures] = []
    gone: Counter[str] = Counter()
    for item in items:
        if item.first is None or item.second is None:
            gone["the set ships no pictures"] += 1
            continue
        try:
            first, second = (decode(data, item.id) for data in (item.first, item.second))
        except InputError:
            gone["a picture cannot be decoded"] += 1
            continue
        found.append(Pictures(item, first, second))
    return found, gone


def margins_of(
    reward: Reward,
    pairs: Sequence[Pictures],
    batch: int,
    saturation: float | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Margins:
    """Margins of all pairs; with `saturation` also those with one picture's saturation changed."""
    size = len(pairs)
    columns = np.full((4, size), np.nan)
    found = Margins(columns[0])
    for done, some in _batches(pairs, batch // 2 or 1):
        columns[:, some] = _asked(reward, [pairs[i] for i in some], saturation, found)
        progress(f"{reward.name} judges", done, size)
    if isinstance(reward, ComparingReward):
        found.orders = (columns[0], columns[1])
        found.margin = columns[:2].mean(0)
    if saturation is not None:
        found.glossy = (columns[2], columns[3])
    return found


def _batches(pairs: Sequence[Pictures], most: int) -> list[tuple[int, list[int]]]:
    """(pairs done after it, places) of batches whose pictures all have the same two sizes."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        by_size.setdefault((*pair.first.shape, *pair.second.shape), []).append(i)
    found, done = [], 0
    for places in by_size.values():
        for start in range(0, len(places), most):
            some = places[start : start + most]
            done += len(some)
            found.append((done, some))
    return found


def _asked(
    reward: Reward, pairs: Sequence[Pictures], saturation: float | None, found: Margins
) -> Floats:
    """Margins (4, N) of a batch; where it fails as a whole, pair by pair."""
    try:
        return _four(reward, pairs, saturation)
    except BrokenRewardError:
        raise
    except InputError as error:
        if len(pairs) > 1:
            parts = [_asked(reward, [pair], saturation, found) for pair in pairs]
            return np.concatenate(parts, axis=1)
        found.set_aside["the reward cannot score it"] += 1
        if len(found.examples) < LISTED:
            found.examples.append(f"{pairs[0].item.id}: {error}")
        return np.full((4, 1), np.nan)


def _four(reward: Reward, pairs: Sequence[Pictures], saturation: float | None) -> Floats:
    """Margins (4, N): as they are, asked the other way round, first and second more glossy.

    NaN for what was not asked.
    """
    prompts = [pair.item.prompt for pair in pairs]
    sides = [[pair.first for pair in pairs], [pair.second for pair in pairs]]
    gaudy = [] if saturation is None else [[saturated(p, saturation) for p in s] for s in sides]
    found = np.full((4, len(pairs)), np.nan)
    if isinstance(reward, ComparingReward):
        (first, second), more = map(to_batch, sides), [*map(to_batch, gaudy)]
        found[0] = _logits(reward, first, second, prompts)
        found[1] = -_logits(reward, second, first, prompts)
        if more:
            found[2] = _logits(reward, more[0], second, prompts)
            found[3] = _logits(reward, first, more[1], prompts)
        return found
    scores = [score_pictures(reward, some, prompts).double().cpu() for some in [*sides, *gaudy]]
    found[0] = scores[0] - scores[1]
    if gaudy:
        found[2], found[3] = scores[2] - scores[1], scores[0] - scores[3]
    return found


def _logits(
    reward: ComparingReward, first: torch.Tensor, second: torch.Tensor, prompts: Sequence[str]
) -> Floats:
    """Finite logits (N,) that the first picture is preferred."""
    values: Floats = reward.compare(first, second, prompts).double().cpu().numpy()
    if values.shape != (len(prompts),):
        raise BrokenRewardError(
            f"reward '{reward.name}' compares {len(prompts)} pairs as {values.shape}"
        )
    if not np.isfinite(values).all():
        raise InputError(f"reward '{reward.name}' is not finite on some pair")
    return values
