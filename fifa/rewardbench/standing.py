"""Where a reward stands: accuracy by scenario and difficulty, and what its margins are worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fifa.bench import Share
from fifa.config import InputError
from fifa.rewardbench.measures import (
    BANDS,
    accuracy,
    by_group,
    calibration,
    macro_mean,
    ties,
    unchanged,
)
from fifa.rewardbench.pairwise import Margins, Pictures, Progress, margins_of, pictures_of
from fifa.rewardbench.settings import BenchConfig
from fifa.rewardbench.table import Bench, Item, load_bench
from fifa.rewards import Reward, load_reward, on_device

GIVEN = "given:"  # before the name of a reward whose scores came with the files


@dataclass(frozen=True)
class Standing:
    """What one reward came to on the pairs that count."""

    reward: str
    version: str
    pairs: int  # that it scored
    macro: float  # mean accuracy of the scenarios, each counting the same
    overall: Share  # of all pairs together
    scenarios: dict[str, Share]
    bands: dict[str, Share]
    cells: dict[str, dict[str, Share]]  # scenario -> band
    ties: float  # share of pairs whose two scores are equal; each is half right
    order: float | None  # share of verdicts that stay when the pictures change places
    flips: float | None  # share of verdicts that change with one picture's saturation
    calibration: float  # expected calibration error of sigma(margin / T)
    on_panel: bool = False  # it helped to say which pairs are difficult
    set_aside: dict[str, int] = field(default_factory=dict)  # reason -> pairs
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """The standings on one bench, best macro mean first."""

    bench: Bench
    counted: tuple[Item, ...]
    keep: tuple[float, float] | None
    saturation: float
    standings: tuple[Standing, ...]


def run(config: BenchConfig, progress: Progress = lambda stage, done, total: None) -> Run:
    """Measure rewards on a bench: those that are named and those whose scores it holds.

    Raises InputError for a folder that is no bench, a `keep` that leaves nothing, an unknown
    reward, or no reward at all.
    """
    bench = load_bench(config.bench)
    counted = bench.counted(config.keep)
    if not counted:
        raise InputError(f"no pair of {config.bench} has a difficulty in {config.keep}")
    given = sorted({name for item in counted for name in item.given})
    if not config.rewards and not given:
        raise InputError(f"{config.bench} holds no scores; name rewards, see `fifa rewards`")
    panel = set(bench.facts.get("panel", ()))
    found = [_of_given(name, counted) for name in given]
    if config.rewards:
        pairs, gone = pictures_of(counted)
        if not pairs:
            reasons = ", ".join(gone)
            raise InputError(f"{config.bench} has no picture that a reward could score: {reasons}")
        for name in dict.fromkeys(config.rewards):
            reward = on_device(load_reward(name), config.device, "reward", name)
            margins = margins_of(reward, pairs, config.batch, config.saturation, progress)
            margins.set_aside += gone
            found.append(_of_reward(name, reward, pairs, margins, name in panel))
    ranked = sorted(found, key=lambda s: -np.inf if np.isnan(s.macro) else s.macro, reverse=True)
    return Run(bench, tuple(counted), config.keep, config.saturation, tuple(ranked))


def _of_reward(
    name: str, reward: Reward, pairs: Sequence[Pictures], said: Margins, on_panel: bool
) -> Standing:
    changed = None
    if said.glossy is not None:
        plain = said.margin if said.orders is None else said.orders[0]
        changed = 1 - unchanged(np.tile(plain, 2), np.concatenate(said.glossy))
    return standing(
        name,
        [pair.item for pair in pairs],
        said.margin,
        version=str(getattr(reward, "version", "")),
        order=None if said.orders is None else unchanged(*said.orders),
        flips=changed,
        on_panel=on_panel,
        set_aside=said.set_aside,
        examples=said.examples,
    )


def _of_given(name: str, items: Sequence[Item]) -> Standing:
    pairs = [item.given.get(name, (np.nan, np.nan)) for item in items]
    margin = np.array([a - b for a, b in pairs], np.float64)
    missing = int(np.isnan(margin).sum())
    gone = Counter({"the files hold no score of it": missing} if missing else {})
    return standing(GIVEN + name, items, margin, set_aside=gone)


def standing(
    name: str,
    items: Sequence[Item],
    margin: NDArray[np.float64],
    version: str = "",
    order: float | None = None,
    flips: float | None = None,
    on_panel: bool = False,
    set_aside: Counter[str] | None = None,
    examples: Sequence[str] = (),
) -> Standing:
    """The standing that margins (N,) of the items' pictures give; NaN where there is no score."""
    label = np.array([item.label for item in items])
    scenario = [item.scenario for item in items]
    band = np.array([item.band for item in items], dtype=object)
    scenarios = by_group(margin, label, scenario)
    of = np.array(scenario, dtype=object)
    return Standing(
        reward=name,
        version=version,
        pairs=int((~np.isnan(margin)).sum()),
        macro=macro_mean(scenarios),
        overall=accuracy(margin, label),
        scenarios=scenarios,
        bands=_by_band(margin, label, band),
        cells={s: _by_band(margin[of == s], label[of == s], band[of == s]) for s in scenarios},
        ties=ties(margin),
        order=order,
        flips=flips,
        calibration=calibration(margin, label),
        on_panel=on_panel,
        set_aside=dict(set_aside or {}),
        examples=tuple(examples),
    )


def _by_band(margin: NDArray[Any], label: NDArray[Any], band: NDArray[Any]) -> dict[str, Share]:
    return {name: accuracy(margin[band == name], label[band == name]) for name in BANDS}
