"""A bench of real files: what people said becomes labels by the same rule as everywhere."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fifa.config import unknown
from fifa.rewardbench import files
from fifa.rewardbench.build import rated_by
from fifa.rewardbench.files import Aside, Found
from fifa.rewardbench.judges import agreed, majority
from fifa.rewardbench.pairwise import LISTED, Progress
from fifa.rewardbench.settings import ReadConfig
from fifa.rewardbench.table import Item, refuse_existing, write_bench
from fifa.rewards import load_reward

KINDS: dict[str, Callable[[Path, Path | None], Found]] = {
    "pairs": files.pairs,
    "scored": files.scored,
    "agiqa": files.agiqa,
    "tifa": files.tifa,
    "genai": files.genai,
    "mjbench": files.mjbench,
}


def described() -> Iterator[tuple[str, str]]:
    """Each kind of files and the first line of what its reader says about itself."""
    for kind, reader in KINDS.items():
        yield kind, (inspect.getdoc(reader) or "").partition("\n")[0]


def read(
    config: ReadConfig, progress: Progress = lambda stage, done, total: None
) -> dict[str, Any]:
    """Write a bench of the files that the settings name; what it says about itself.

    Rows that are no pair are set aside, counted and listed. Raises InputError for an unknown kind,
    files that are not there or of another layout, or if no pair has a label.
    """
    if config.kind not in KINDS:
        raise unknown("kind of bench files", config.kind, KINDS)
    refuse_existing(config.out)
    panel = [load_reward(name) for name in config.panel]
    items: list[Item] = []
    reasons: Counter[str] = Counter()
    examples: list[str] = []
    for found in _limited(KINDS[config.kind](config.path, config.images), config.limit):
        if isinstance(found, Aside):
            reasons[found.reason] += 1
            if len(examples) < LISTED:
                examples.append(f"{found.where}: {found.reason}")
        else:
            items.append(labelled(found, config.agree))
            progress("reading pairs", len(items), config.limit or 0)
    facts = {
        "source": config.kind,
        "settings": config.model_dump(mode="json", exclude={"out"}),
        "panel": list(config.panel),
        "set_aside": dict(reasons),
        "examples": examples,
    }
    return write_bench(config.out, rated_by(items, panel, progress), facts)


def _limited(found: Found, limit: int | None) -> Iterator[Item | Aside]:
    """As much as holds `limit` items; all of it for None."""
    items = 0
    for one in found:
        if items == limit:
            return
        items += isinstance(one, Item)
        yield one


def labelled(item: Item, least: int | None) -> Item:
    """The item with the majority of its judges as label, and whether at least `least` give it.

    None stands for more than half of them. Fewer judges than `least` agree on nothing.
    """
    verdicts = np.array(item.judges, np.int8)[:, None]
    wanted = len(verdicts) // 2 + 1 if least is None else least
    kept = wanted <= len(verdicts) and bool(agreed(verdicts, wanted)[0])
    return replace(item, label=int(majority(verdicts)[0]), agreed=kept)
