"""From a score table to a kept set: reads what `fifa.scoring` wrote, chooses, writes the pairs.

kept.parquet        the chosen rows of the data set, with all their columns
selection.parquet   row, fate (kept, or why not), importance (null where there is none)
selection.json      settings, counts, each term among all and among the kept, f(S) of the chosen
                    method beside all others of equal size, and which were too dear to compare
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, field_validator

from fifa.config import Config, InputError, atomic_path, finite, write_atomic
from fifa.denylist import DenyList, read_deny_list
from fifa.knn import FLOOR, Vectors, near_groups
from fifa.pairs import PairTable
from fifa.scoring import SCORES, open_data, read_manifest
from fifa.scoring.settings import TEXT_ONLY
from fifa.selection import (
    SELECTORS,
    Floats,
    Ints,
    MarginKind,
    Norm,
    Terms,
    affordable,
    importance,
    make_terms,
    objective,
    parse_count,
)
from fifa.sources.prompts import PromptList

KEPT = "kept.parquet"
FATES = "selection.parquet"
SUMMARY = "selection.json"

Method = Literal[
    "importance",
    "greedy",
    "stochastic",
    "margin",
    "quality",
    "diversity",
    "pair_ranking",
    "facility_location",
    "k_centre",
    "random",
]

NEED_MARGINS = ("margin", "pair_ranking")  # the others take no margin as one that is always 0

# Why a row was not kept; the first that applies.
REJECTED = "could not be scored"
TIE = "tie"
DENIED = "on the deny list"
UNJUDGED = "text without a score"
POOR = "text below the minimum"
FULL = "its prompt has its share"
LOWER = "others scored higher"
CHOSEN = "kept"


class SelectConfig(Config):
    """Which pairs to keep."""

    scores: Path = Field(description="Folder that `fifa score` wrote.")
    data: Path | None = Field(None, description="The data set, if it has moved since.")
    out: Path | None = Field(None, description="Folder for the kept pairs; default: the scores'.")
    k: str | int = Field("0.5%", description="Pairs to keep: a number, or a share of all rows.")
    method: Method = Field("importance", description="How pairs are chosen.")
    alpha: float = Field(0.5, ge=0, description="Weight of text quality; the margin has weight 1.")
    gamma: float = Field(0.5, ge=0, description="Weight of diversity.")
    margin: MarginKind = Field(
        "signed", description="Margin as it is, its absolute value, or capped at its 95% quantile."
    )
    norm: Norm = Field("zscore", description="Scale on which the terms are added up.")
    cap: int = Field(1, ge=0, description="Most pairs of one prompt; 0 for no limit.")
    near: float = Field(
        0.0,
        ge=0,
        lt=2,
        description="Prompts closer than this to an earlier one share its cap; 0 for none.",
    )
    min_quality: float = Field(0.0, ge=0, le=10, description="Drop prompts judged below this.")
    deny: Path | None = Field(
        None, description="File of phrases and /regular expressions/, a line each, to drop."
    )
    neighbours: int = Field(
        1, ge=1, description="k of the k-th nearest prompt by which f(S) measures the kept set."
    )
    floor: float = Field(
        FLOOR, gt=0, description="Prompts closer than this (of at most 2) count as this far apart."
    )
    seed: int = Field(0, ge=0, description="Seed of the methods random and stochastic.")

    @field_validator("k")
    @classmethod
    def _looks_like_a_count(cls, value: str | int) -> str | int:
        parse_count(value)
        return value


@dataclass(frozen=True)
class SelectSummary:
    """What was kept, and where it is."""

    out: Path
    wanted: int
    kept: int
    fates: dict[str, int]  # every row of the data set, by what became of it
    f: dict[str, float | None]  # method -> f(S) at equal size, null for a single pair
    agreement: float | None  # share of the kept whose winner has the higher reward; null for text


def select(config: SelectConfig) -> SelectSummary:
    """Choose pairs by `config` and write them.

    Keeps fewer than wanted where ties, the minimum quality and the cap leave no more. Raises
    InputError if the folder holds no complete scores or the data set has changed since.
    """
    manifest = read_manifest(config.scores)
    text_only = manifest["pass"]["reward"] == TEXT_ONLY
    if text_only and config.method in NEED_MARGINS:
        raise InputError(
            f"{config.scores} holds text scores only and the method '{config.method}' needs "
            f"margins; methods that do not are "
            f"{', '.join(name for name in SELECTORS if name not in NEED_MARGINS)}"
        )
    table = scored_data(config, manifest)
    total = min(manifest["pass"]["limit"] or table.num_rows, table.num_rows)
    wanted = parse_count(config.k, total)
    scores, fates, eligible, terms = candidates(config, manifest)
    chosen = _choose(terms, config, wanted, config.method)
    fates[eligible] = _fates(terms, chosen, config.cap)
    kept_rows = scores["row"].to_numpy()[eligible[chosen]]
    out = config.out or config.scores
    table.take(kept_rows, out / KEPT)
    _write_fates(out / FATES, scores, fates, eligible, terms, total)
    counts = _counts(fates, total)
    report = _report(config, manifest, terms, chosen, wanted, counts)
    write_atomic(out / SUMMARY, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    f = {name: values["f"] for name, values in report["objective"].items()}
    return SelectSummary(out, wanted, len(chosen), counts, f, report["agreement"]["kept"])


class Candidates(NamedTuple):
    """Scored rows, and those of them that may be kept."""

    scores: pa.Table  # all scored rows
    fates: NDArray[np.object_]  # of each scored row that may not be kept, '' of the others
    eligible: Ints  # places of the others in `scores`
    terms: Terms  # of the eligible rows, in their order


def candidates(config: SelectConfig, manifest: dict[str, Any]) -> Candidates:
    """What there is to choose from; InputError where no row may be kept."""
    denied = read_deny_list(config.deny) if config.deny else None
    scores = read_scores(config.scores)
    fates = _ruled_out(scores, config)
    if denied is not None:
        named = _denied(scored_data(config, manifest), scores, denied)
        fates[(fates != TIE) & named] = DENIED
    eligible = np.flatnonzero(fates == "")
    if len(eligible) == 0:
        raise InputError(f"no row of {config.scores} can be kept; {_listed(Counter(fates))}")
    terms = terms_of(scores.take(eligible), _vectors(config.scores, manifest), config)
    return Candidates(scores, fates, eligible, terms)


def scored_data(config: SelectConfig, manifest: dict[str, Any]) -> PairTable | PromptList:
    """The data set that scores were made from; InputError if it has changed since."""
    text_only = manifest["pass"]["reward"] == TEXT_ONLY
    table = open_data(Path(config.data or manifest["data_path"]), text_only)
    if table.fingerprint() != manifest["pass"]["data"]:
        raise InputError(f"{table.path} has changed since {config.scores} was made from it")
    return table


def read_scores(folder: Path) -> pa.Table:
    """The score table that `fifa.scoring` wrote into `folder`."""
    try:
        return pq.read_table(folder / SCORES)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {folder / SCORES}: {error}") from None


def _vectors(folder: Path, manifest: dict[str, Any]) -> Vectors:
    path = folder / manifest["embeddings"]
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError):
        raise InputError(f"cannot read {path}; run `fifa score` again to make it") from None


def _denied(table: PairTable | PromptList, scores: pa.Table, denied: DenyList) -> NDArray[np.bool_]:
    """Which scored rows have a prompt that the list names."""
    captions = table.captions(scores["row"].to_numpy())
    named = {caption: denied.names(caption) for caption in dict.fromkeys(captions)}
    return np.array([named[caption] for caption in captions], dtype=bool)


def _ruled_out(scores: pa.Table, config: SelectConfig) -> NDArray[np.object_]:
    """The fate of each scored row that cannot be kept, '' for the others."""
    quality = scores["quality"].to_numpy()  # null comes as NaN
    fates = np.full(len(scores), "", dtype=object)
    fates[quality < config.min_quality] = POOR
    fates[np.isnan(quality)] = UNJUDGED
    fates[scores["win"].to_numpy() < 0] = TIE
    return fates


def terms_of(scores: pa.Table, vectors: Vectors, config: SelectConfig) -> Terms:
    """What the selectors see of rows that are no ties and have a quality.

    Where only text was scored every margin is 0.
    """
    column = {name: scores[name].fill_null(0).to_numpy().astype(np.float64) for name in _READ}
    first_won = scores["win"].to_numpy() == 0
    prompt = scores["prompt_id"].to_numpy()
    return make_terms(
        win=np.where(first_won, column["reward_0"], column["reward_1"]),
        lose=np.where(first_won, column["reward_1"], column["reward_0"]),
        quality=column["quality"],
        log_knn=column["log_knn"],
        prompt=prompt,
        vectors=vectors,
        alpha=config.alpha,
        gamma=config.gamma,
        margin=config.margin,
        norm=config.norm,
        neighbours=config.neighbours,
        floor=config.floor,
        group=near_groups(vectors, config.near)[prompt] if config.near else None,
    )


_READ = ("reward_0", "reward_1", "quality", "log_knn")


def _choose(terms: Terms, config: SelectConfig, k: int, method: str) -> Ints:
    return SELECTORS[method].choose(terms, k, config.cap or None, config.seed)


def _fates(terms: Terms, chosen: Ints, cap: int) -> NDArray[np.object_]:
    fates = np.full(len(terms), LOWER, dtype=object)
    if cap:
        kept_of = np.bincount(terms.groups[chosen], minlength=len(terms.vectors))
        fates[kept_of[terms.groups] >= cap] = FULL
    fates[chosen] = CHOSEN
    return fates


def _write_fates(
    path: Path,
    scores: pa.Table,
    fates: NDArray[np.object_],
    eligible: Ints,
    terms: Terms,
    total: int,
) -> None:
    value = np.full(total, np.nan)
    value[scores["row"].to_numpy()[eligible]] = importance(terms)
    fate = np.full(total, REJECTED, dtype=object)
    fate[scores["row"].to_numpy()] = fates
    columns = {
        "row": pa.array(np.arange(total)),
        "fate": pa.array(fate, pa.string()),
        "importance": pa.array(value, mask=np.isnan(value)),
    }
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _counts(fates: NDArray[np.object_], total: int) -> dict[str, int]:
    counts = Counter(fates.tolist())
    counts[REJECTED] = total - len(fates)
    order = (CHOSEN, LOWER, FULL, POOR, UNJUDGED, DENIED, TIE, REJECTED)
    return {fate: counts[fate] for fate in order if counts[fate]}


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} rows: {fate}" for fate, count in counts.most_common())


def _report(
    config: SelectConfig,
    manifest: dict[str, Any],
    terms: Terms,
    chosen: Ints,
    wanted: int,
    fates: dict[str, int],
) -> dict[str, Any]:
    text_only = manifest["pass"]["reward"] == TEXT_ONLY
    margin = None if text_only else terms.win - terms.lose
    dear = {
        name: affordable(name, terms, len(chosen))
        for name in SELECTORS
        if not (text_only and name in NEED_MARGINS)
    }
    sets: dict[str, Ints] = {config.method: chosen}
    for name, why in dear.items():
        if name != config.method and why is None:
            sets[name] = _choose(terms, config, len(chosen), name)
    return {
        "settings": config.model_dump(mode="json"),
        "scored_with": {**manifest["pass"], **manifest["prompts"]},
        "data": str((config.data or Path(manifest["data_path"])).resolve()),
        "scores": str(config.scores.resolve()),
        "wanted": wanted,
        "kept": len(chosen),
        "eligible": len(terms),
        "fates": fates,
        "agreement": {
            "all": None if margin is None else _agreement(margin),
            "kept": None if margin is None else _agreement(margin[chosen]),
        },
        "prompts": {
            "all": len(np.unique(terms.prompt)),
            "kept": len(np.unique(terms.prompt[chosen])),
        },
        "objective": {name: finite(objective(s, terms)._asdict()) for name, s in sets.items()},
        "not_compared": {name: why for name, why in dear.items() if why and name not in sets},
    }


def _agreement(margin: Floats) -> float:
    return float(((margin > 0) + 0.5 * (margin == 0)).mean())
