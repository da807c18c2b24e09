"""A bench on disk: a folder with `items.parquet` and `bench.json`.

The table has the columns of a pair table (Pick-a-Pic v2), so `fifa score` reads it too, and more:

    id, scenario   which pair, and what it tests
    caption, jpg_0, jpg_1, label_0, label_1   as everywhere; 0.5 and 0.5 where nobody is ahead
    judges         each judge's verdict: 0, 1 (the better picture) or -1 (a tie)
    agreed         whether enough of them give the label; only such pairs count
    difficulty     share of a weak panel that is wrong; null where that is not known
    band           easy, middle or hard: its tercile among the agreed pairs
    given          scores that came with the files: reward, score_0, score_1
    truth_win, truth_what   what the builder knows: the better picture, and what ails the other

A set that ships no pictures has null in `jpg_0` and `jpg_1`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fifa.bench import share
from fifa.config import InputError, atomic_path, fingerprint, finite
from fifa.rewardbench.measures import bands, within

ITEMS, FACTS = "items.parquet", "bench.json"
VERSION = 1  # of the folder's format

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "scenario": pa.string(),
        "caption": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "judges": pa.list_(pa.int8()),
        "agreed": pa.bool_(),
        "difficulty": pa.float64(),
        "band": pa.string(),
        "given": pa.list_(
            pa.struct({"reward": pa.string(), "score_0": pa.float64(), "score_1": pa.float64()})
        ),
        "truth_win": pa.int8(),
        "truth_what": pa.string(),
    }
)


@dataclass(frozen=True)
class Item:
    """One pair of a bench."""

    id: str
    scenario: str
    prompt: str
    first: bytes | None  # encoded picture; None where the set ships none
    second: bytes | None
    label: int  # 0 or 1, the better picture; -1 where nobody is ahead
    judges: tuple[int, ...]
    agreed: bool
    difficulty: float | None = None
    band: str = ""
    given: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    truth: int | None = None
    what: str = ""


@dataclass(frozen=True)
class Bench:
    """All pairs of a bench, and what its makers say about it."""

    items: tuple[Item, ...]
    facts: Mapping[str, Any]
    name: str

    def counted(self, keep: tuple[float, float] | None = None) -> list[Item]:
        """The pairs on which judges agree, of the difficulties in `keep` (None: any)."""
        agreed = [item for item in self.items if item.agreed and item.label >= 0]
        values = [np.nan if item.difficulty is None else item.difficulty for item in agreed]
        kept = within(values, keep)
        return [item for item, counts in zip(agreed, kept, strict=True) if counts]


def with_difficulty(items: Sequence[Item], difficulty: NDArray[np.float64]) -> tuple[Item, ...]:
    """The items with a difficulty each (NaN: unknown), and bands among those that count."""
    values = np.where([item.agreed for item in items], difficulty, np.nan)
    return tuple(
        replace(item, difficulty=None if np.isnan(value) else float(value), band=band)
        for item, value, band in zip(items, difficulty, bands(values), strict=True)
    )


def write_bench(out: Path, items: Sequence[Item], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write a bench into a folder that does not exist yet, all or nothing; what `bench.json` says.

    Raises InputError if there is no pair on which the judges agree.
    """
    if not any(item.agreed and item.label >= 0 for item in items):
        raise InputError(f"a bench needs a pair on which judges agree; of {len(items)} none is")
    refuse_existing(out)
    with atomic_path(out) as folder:
        folder.mkdir(parents=True)
        pq.write_table(_table(items), folder / ITEMS, row_group_size=500)
        whole = {
            "version": VERSION,
            **facts,
            **counts(items),
            "fingerprint": fingerprint(folder / ITEMS),
        }
        text = json.dumps(finite(whole), indent=2, ensure_ascii=False)
        (folder / FACTS).write_text(text + "\n", encoding="utf-8")
    return whole


def refuse_existing(out: Path) -> None:
    """InputError where something is already; better said before the work than after it."""
    if out.exists():
        raise InputError(f"{out} exists; a bench is written into a new folder")


def counts(items: Sequence[Item]) -> dict[str, Any]:
    """How many pairs there are and count, and where the truth is known how true the labels are.

    `label_truth` has the share of labels that name the truly better picture: of the pairs that
    count, of all that have a majority, and of the judges one by one on all pairs (a tie is half).
    """
    scenarios: dict[str, dict[str, int]] = {}
    for item in items:
        found = scenarios.setdefault(item.scenario, {"pairs": 0, "agreed": 0})
        found["pairs"] += 1
        found["agreed"] += item.agreed
    known = [item for item in items if item.truth is not None]
    truth: dict[str, Any] = {
        name: vars(share(sum(item.label == item.truth for item in some), len(some)))
        for name, some in (
            ("kept", [item for item in known if item.agreed]),
            ("majority", [item for item in known if item.label >= 0]),
        )
        if some
    }
    alone = [
        np.mean([0.5 if v == -1 else float(v == item.truth) for v in item.judges])
        for item in known
        if item.judges
    ]
    if alone:
        truth["one_judge"] = float(np.mean(alone))
    agreed = sum(item.agreed for item in items)
    return {
        "pairs": len(items),
        "agreed": agreed,
        "scenarios": scenarios,
        "label_truth": truth,
    }


def _table(items: Sequence[Item]) -> pa.Table:
    label = {0: (1.0, 0.0), 1: (0.0, 1.0), -1: (0.5, 0.5)}
    rows = [
        {
            "id": item.id,
            "scenario": item.scenario,
            "caption": item.prompt,
            "jpg_0": item.first,
            "jpg_1": item.second,
            "label_0": label[item.label][0],
            "label_1": label[item.label][1],
            "judges": list(item.judges),
            "agreed": item.agreed,
            "difficulty": item.difficulty,
            "band": item.band or None,
            "given": [
                {"reward": name, "score_0": a, "score_1": b} for name, (a, b) in item.given.items()
            ],
            "truth_win": item.truth,
            "truth_what": item.what or None,
        }
        for item in items
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def load_bench(folder: str | Path) -> Bench:
    """A bench from its folder; InputError if it is none, or no longer what was written."""
    folder = Path(folder)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        version, written = facts["version"], facts["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{folder} is no reward bench, it has no readable {FACTS}; `fifa reward bench-build` "
            f"makes one"
        ) from None
    if version != VERSION:
        raise InputError(f"{folder} is a bench of format {version}, not {VERSION}; build it again")
    if fingerprint(folder / ITEMS) != written:
        raise InputError(f"{folder / ITEMS} is not what was written with {FACTS}; build it again")
    rows = pq.read_table(folder / ITEMS, schema=SCHEMA).to_pylist()
    return Bench(tuple(map(_item, rows)), facts, folder.name)


def _item(row: Mapping[str, Any]) -> Item:
    label = {1.0: 0, 0.0: 1}.get(row["label_0"], -1)
    return Item(
        id=row["id"],
        scenario=row["scenario"],
        prompt=row["caption"],
        first=row["jpg_0"],
        second=row["jpg_1"],
        label=label,
        judges=tuple(row["judges"]),
        agreed=row["agreed"],
        difficulty=row["difficulty"],
        band=row["band"] or "",
        given={g["reward"]: (g["score_0"], g["score_1"]) for g in row["given"]},
        truth=row["truth_win"],
        what=row["truth_what"] or "",
    )
