"""A bench of the mini world: draw pairs whose truth is known, let judges label them, rate them.

A pair depends on the seed, its scenario and its number, and on nothing else; a larger bench of the
same seed holds every pair of a smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fifa.config import InputError, unknown
from fifa.images import Pixels, encode_png, to_batch
from fifa.rewardbench.judges import JUDGES, Verdicts, agreed, majority
from fifa.rewardbench.measures import difficulty
from fifa.rewardbench.pairwise import Progress, margins_of, pictures_of
from fifa.rewardbench.scenarios import SCENARIOS, Draft, draft
from fifa.rewardbench.settings import BuildConfig
from fifa.rewardbench.table import Item, refuse_existing, with_difficulty, write_bench
from fifa.rewards import Reward, load_reward
from fifa.rewards.nuisance import measure


def build(
    config: BuildConfig, progress: Progress = lambda stage, done, total: None
) -> dict[str, Any]:
    """Write the bench that the settings describe; what it says about itself.

    Raises InputError for an unknown scenario, judge or reward, more judges who shall agree than
    there are, or a folder that exists.
    """
    scenarios = _known("scenario", config.scenarios or tuple(SCENARIOS), SCENARIOS)
    judges = _known("judge", config.judges, JUDGES)
    least = len(judges) if config.agree is None else config.agree
    if least > len(judges):
        raise InputError(f"agree is {least}, but there are only {len(judges)} judges")
    refuse_existing(config.out)
    panel = [load_reward(name) for name in config.panel]
    items: list[Item] = []
    for scenario in scenarios:
        items += _scenario(scenario, config, least)
        progress("drawing pairs", len(items), len(scenarios) * config.pairs)
    rated = rated_by(items, panel, progress)
    facts = {
        "source": "mini world",
        "settings": {
            **config.model_dump(mode="json", exclude={"out"}),
            "scenarios": list(scenarios),
            "agree": least,
        },
        "panel": list(config.panel),
        "judges": {name: asdict(JUDGES[name]) for name in judges},
    }
    return write_bench(config.out, rated, facts)


def _known(what: str, names: Sequence[str], table: dict[str, Any]) -> tuple[str, ...]:
    """The names, each once; InputError for one that is not in the table."""
    for name in names:
        if name not in table:
            raise unknown(what, name, table)
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class _Drawn:
    """A drafted pair with its sides assigned."""

    draft: Draft
    better: int  # 0 or 1

    def sides(self) -> tuple[Pixels, Pixels]:
        pair = (self.draft.better, self.draft.worse)
        return pair if self.better == 0 else pair[::-1]

    def merits(self) -> tuple[float, float]:
        return self.draft.merit if self.better == 0 else self.draft.merit[::-1]


def _scenario(scenario: str, config: BuildConfig, least: int) -> list[Item]:
    """All pairs of one scenario, judged."""
    key = int.from_bytes(blake2b(scenario.encode(), digest_size=4).digest(), "big")
    drawn = []
    for number in range(config.pairs):
        rng = np.random.default_rng([config.seed, 0x62656E, key, number])
        better = int(rng.integers(2))
        drawn.append(_Drawn(draft(scenario, rng), better))
    verdicts = _verdicts(drawn, config, key)
    label, kept = majority(verdicts), agreed(verdicts, least)
    return [
        Item(
            id=f"{scenario}-{number:05}",
            scenario=scenario,
            prompt=pair.draft.prompt,
            first=encode_png(pair.sides()[0]),
            second=encode_png(pair.sides()[1]),
            label=int(label[number]),
            judges=tuple(verdicts[:, number].tolist()),
            agreed=bool(kept[number]),
            truth=pair.better,
            what=pair.draft.what,
        )
        for number, pair in enumerate(drawn)
    ]


def _verdicts(drawn: Sequence[_Drawn], config: BuildConfig, key: int) -> Verdicts:
    """What each judge says of each pair, (J, N)."""
    merits = np.array([pair.merits() for pair in drawn])
    nuisances = np.stack([measure(to_batch(list(pair.sides()))).double().numpy() for pair in drawn])
    found = [
        [
            JUDGES[name].judge(
                merits[i : i + 1], nuisances[i : i + 1], _chance(config, key, i, name)
            )
            for i in range(len(drawn))
        ]
        for name in config.judges
    ]
    return np.array(found, np.int8).reshape(len(config.judges), len(drawn))


def _chance(config: BuildConfig, key: int, number: int, judge: str) -> np.random.Generator:
    """A judge's own chance on one pair, whoever else judges it."""
    return np.random.default_rng([config.seed, 0x6A7564, key, number, list(JUDGES).index(judge)])


def rated_by(
    items: Sequence[Item], panel: Sequence[Reward], progress: Progress
) -> tuple[Item, ...]:
    """The items with the difficulty that a panel of rewards finds; of none without a panel."""
    margins = np.full((len(panel), len(items)), np.nan)
    if panel:
        places = {id(item): i for i, item in enumerate(items)}
        pairs, _ = pictures_of(items)
        where = [places[id(pair.item)] for pair in pairs]
        for row, reward in enumerate(panel):
            margins[row, where] = margins_of(reward, pairs, 256, progress=progress).margin
    label: NDArray[np.int8] = np.array([item.label for item in items], np.int8)
    return with_difficulty(items, difficulty(margins, label))
