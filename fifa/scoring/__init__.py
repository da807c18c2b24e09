"""The scoring pass: every row of a data set gets its margin, text quality and diversity, once.

The pass goes row group by row group and writes one shard for each. It may be killed at any moment:
run again, it goes on at the first missing shard, and the final table is the same to the byte. When
all shards are there, prompts are embedded and compared and one table is written:

    scores.parquet   row, prompt_id, reward_0, reward_1, win (0, 1, -1 for a tie), margin,
                     quality, quality_reason, log_knn
    embeddings-*.npy unit vectors of the distinct prompts, by prompt_id
    *.sqlite         what judges and text networks answered, kept prompt by prompt
    rejected.jsonl   rows that could not be scored, and why
    manifest.json    what the numbers were made from

With the reward `none` the text alone is scored: rewards, win and margin are null. Several processes
(`fifa.scoring.processes`) or a Ray cluster (`fifa.scoring.cluster`) share the row groups and come
to the same table.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fifa.config import InputError, atomic_path, only_writer, write_atomic
from fifa.embed import STORE, Vectors, cache_path, count_cut, embed, load_embedder
from fifa.judge import CachedJudge, load_judge
from fifa.knn import find_neighbours
from fifa.pairs import PairTable, distinct_prompts
from fifa.rewards import load_reward, on_device
from fifa.scoring.groups import WIN, GroupScorer, rejected_path, shard_path, write_shard
from fifa.scoring.processes import ALONE, Team
from fifa.scoring.settings import TEXT_ONLY, Progress, ScoreConfig
from fifa.sources.prompts import PromptList, open_prompts, prompt_files

__all__ = [
    "MANIFEST",
    "REJECTED",
    "SCORES",
    "ScoreConfig",
    "ScoreSummary",
    "open_data",
    "read_manifest",
    "score",
    "score_share",
]

VERSION = 2  # raised whenever the same inputs would give other numbers

SCORES = "scores.parquet"
REJECTED = "rejected.jsonl"
MANIFEST = "manifest.json"

SCORE_SCHEMA = pa.schema(
    {
        "row": pa.int64(),  # in the data set, counted from 0
        "prompt_id": pa.int64(),  # row of the embeddings
        "reward_0": pa.float32(),  # null, like the next three, where only text was scored
        "reward_1": pa.float32(),
        "win": pa.int8(),
        "margin": pa.float32(),  # reward of the winner minus that of the loser; null for a tie
        "quality": pa.float32(),
        "quality_reason": pa.string(),
        "log_knn": pa.float32(),  # nats
    }
)


@dataclass(frozen=True)
class ScoreSummary:
    """What a scoring pass came to."""

    out: Path
    rows: int  # of the data set, or the limit
    scored: int
    ties: int
    prompts: int  # distinct
    # share of pairs whose winner has the higher reward, ties of the reward half; NaN without pairs
    agreement: float
    cut: int = 0  # prompts that the embedder did not read to their end
    rejected: dict[str, int] = field(default_factory=dict)  # kind -> rows
    resumed: int = 0  # rows found scored already


def no_progress(stage: str, done: int, total: int) -> None:
    """Say nothing."""


def score(
    config: ScoreConfig, progress: Progress = no_progress, team: Team = ALONE
) -> ScoreSummary:
    """Score a data set into `config.out`, or finish what an earlier call began there.

    In a team this is for its first member; the others call `score_share`. Raises InputError if the
    folder holds scores of other data or settings, another process is writing to it, a file cannot
    be read or written, or not one row can be scored.
    """
    # With Ray this process scores nothing and may have no GPU: it asks for names and versions.
    scorer = load_scorer(config, "cpu" if config.ray else config.device)
    with only_writer(config.out, ".lock", "writing scores to", parts=["scores"]):
        manifest = _manifest(config, scorer)
        _check_same(config.out, manifest)
        write_atomic(config.out / MANIFEST, _json({**manifest, "complete": False}))
        groups = scorer.groups()
        there = [i for i in groups if shard_path(config.out, i).exists()]
        team.wait()
        _score_groups(scorer, groups, progress, team)
        _await_others(scorer, groups, progress)
        table, cut, rejected = _finish(config, manifest, groups, progress)
    resumed = sum(scorer.rows(i) for i in there)
    return _summary(config, table, cut, rejected, scorer.total, resumed)


def score_share(config: ScoreConfig, team: Team) -> None:
    """Score what falls to a further member of a team, once the first has seen to the folder."""
    scorer = load_scorer(config, config.device)
    team.wait()
    _score_groups(scorer, scorer.groups(), no_progress, team)


def load_scorer(config: ScoreConfig, device: str) -> GroupScorer:
    """Data, reward and judge of a pass, their networks on the device."""
    table = open_data(config.data, config.text_only)
    reward = None
    if not config.text_only:
        reward = load_reward(config.reward, **config.reward_args)
        reward = on_device(reward, device, "reward", reward.name)
    judge = load_judge(config.judge, **config.judge_args)
    if "device" not in config.judge_args:
        judge = on_device(judge, device, "judge", judge.name)
    return GroupScorer(config, table, reward, CachedJudge(judge, config.out / "judge.sqlite"))


def open_data(path: Path, text_only: bool) -> PairTable | PromptList:
    """The table that a pass reads: pairs, or with `text_only` whatever holds prompts."""
    if text_only:
        return open_prompts(path)
    if prompt_files(path):
        raise InputError(
            f"{path} holds prompts without pictures, which no reward can score; "
            f"the reward '{TEXT_ONLY}' scores the text alone"
        )
    return PairTable.open(path)


def _score_groups(
    scorer: GroupScorer, groups: Sequence[int], progress: Progress, team: Team
) -> None:
    """Score this member's part of the groups, and those of them only that are not done."""
    config, mine = scorer.config, groups[team.rank :: team.size]
    missing = [i for i in mine if not shard_path(config.out, i).exists()]
    done = sum(scorer.rows(i) for i in set(mine) - set(missing))
    if done:
        progress("scoring", done, scorer.total)
    if config.ray:
        from fifa.scoring.cluster import shards_by_ray

        shards = shards_by_ray(config, missing)
    else:
        shards = scorer.shards(missing, progress)
    for i, shard in shards:
        write_shard(config.out, i, shard)
        done += scorer.rows(i)
        progress("scoring", done, scorer.total)


def _await_others(scorer: GroupScorer, groups: Sequence[int], progress: Progress) -> None:
    """Return when all shards are there. A member that fails ends the whole team (its launcher)."""
    while missing := [i for i in groups if not shard_path(scorer.config.out, i).exists()]:
        done = scorer.total - sum(scorer.rows(i) for i in missing)
        progress("waiting for the other processes", done, scorer.total)
        time.sleep(0.1)


# ---- what the numbers are made from --------------------------------------------------------------


def _manifest(config: ScoreConfig, scorer: GroupScorer) -> dict[str, Any]:
    reward = scorer.reward
    version = reward and f"{reward.name} {getattr(reward, 'version', '')}".strip()
    made_from = {
        "version": VERSION,
        "data": scorer.table.fingerprint(),
        "reward": config.reward,
        "reward_args": config.reward_args,
        "reward_version": version,
        "device": config.device,
        "judge": scorer.judge.name,
        "batch_size": config.batch_size,
        "limit": config.limit,
        "max_prompt": config.max_prompt,
        "max_pixels": config.max_pixels,
    }
    then = {
        "embedder": load_embedder(config.embedder, **config.embedder_args).name,
        "neighbours": config.neighbours,
        "floor": config.floor,
        "index": config.index,
    }
    return {"data_path": str(config.data.resolve()), "pass": made_from, "prompts": then}


def _check_same(out: Path, manifest: dict[str, Any]) -> None:
    if not (out / MANIFEST).exists():
        return
    before, now = read_manifest(out, must_be_complete=False)["pass"], manifest["pass"]
    for key, value in now.items():
        if before.get(key) != value:
            raise InputError(
                f"{out} holds scores made with {key} = {before.get(key)!r}, now it is {value!r}; "
                f"choose another folder or delete this one"
            )


def read_manifest(folder: Path, must_be_complete: bool = True) -> dict[str, Any]:
    """The manifest of a folder that `score` wrote; InputError if there is none or it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        complete = manifest["complete"]
        manifest["pass"]["data"]
    except OSError:
        raise InputError(
            f"{folder} holds no scores (no {MANIFEST}); run `fifa score` first"
        ) from None
    except ValueError:
        raise InputError(f"{path} is damaged; score into another folder") from None
    except (KeyError, TypeError):
        raise InputError(
            f"{folder} holds something else than scores; `fifa score` makes them of a pair table"
        ) from None
    if must_be_complete and not complete:
        raise InputError(
            f"the scores in {folder} are not complete; run `fifa score` again to finish"
        )
    return manifest


# ---- the whole table -----------------------------------------------------------------------------


def _finish(
    config: ScoreConfig, manifest: dict[str, Any], groups: Sequence[int], progress: Progress
) -> tuple[pa.Table, int, Counter[str]]:
    """Join the shards, embed and compare the prompts, write the table.

    Returns it, how many prompts the embedder did not read to their end, and the rejections.
    """
    out = config.out
    rejected = b"".join(rejected_path(out, i).read_bytes() for i in groups)
    write_atomic(out / REJECTED, rejected)
    reasons = [json.loads(line) for line in rejected.splitlines()]
    shards = pa.concat_tables([pq.read_table(shard_path(out, i)) for i in groups])
    if len(shards) == 0:
        raise InputError(f"not one row of {config.data} can be scored; {reasons[0]['reason']}")
    prompts, ids = distinct_prompts(shards["caption"].to_pylist())
    progress("embedding prompts", 0, len(prompts))
    embedder = load_embedder(config.embedder, **config.embedder_args)
    store = config.embedding_store or out / STORE
    told = partial(progress, "embedding prompts")
    embedder = on_device(embedder, config.device, "embedder", embedder.name)
    vectors = embed(prompts, embedder, out, store, told)
    cut = count_cut(prompts, embedder)
    progress("comparing prompts", 0, len(prompts))
    diversity, found = _log_knn(vectors, config)
    progress("comparing prompts", len(prompts), len(prompts))
    table = _joined(shards, ids, diversity[ids])
    with atomic_path(out / SCORES) as temporary:
        pq.write_table(table, temporary)
    complete = {
        **manifest,
        "prompts": {**manifest["prompts"], **found, "cut": cut},
        "embeddings": cache_path(prompts, embedder, out).name,
        "complete": True,
    }
    write_atomic(out / MANIFEST, _json(complete))
    return table, cut, Counter(reason["kind"] for reason in reasons)


def _log_knn(vectors: Vectors, config: ScoreConfig) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Log distance to the k-th nearest prompt, (P,), and how it was found.

    With as many neighbours as there are; a lone prompt is a diameter from nothing.
    """
    if len(vectors) == 1:
        return np.array([np.log(2.0)]), {"index": "exact", "recall": 1.0}
    k = min(config.neighbours, len(vectors) - 1)
    found = find_neighbours(vectors, k, config.index, config.recall)
    log_distance = np.log(np.maximum(found.distances[:, -1], config.floor))
    return log_distance, {"index": found.index, "recall": found.recall, "effort": found.effort}


def _joined(shards: pa.Table, ids: NDArray[np.int64], diversity: NDArray[np.float64]) -> pa.Table:
    win = shards["win"].to_numpy()  # NaN where only text was scored
    first, second = shards["reward_0"].to_numpy(), shards["reward_1"].to_numpy()
    margin = np.where(win == 0, first - second, second - first)
    columns = {name: shards[name] for name in SCORE_SCHEMA.names if name in shards.column_names}
    columns["prompt_id"] = pa.array(ids)
    columns["margin"] = pa.array(margin, mask=(win == WIN["tie"]) | np.isnan(margin))
    columns["log_knn"] = pa.array(diversity.astype(np.float32))
    return pa.table(columns).select(SCORE_SCHEMA.names).cast(SCORE_SCHEMA).combine_chunks()


def _summary(
    config: ScoreConfig,
    table: pa.Table,
    cut: int,
    rejected: Counter[str],
    total: int,
    resumed: int,
) -> ScoreSummary:
    margin = table["margin"].drop_null().to_numpy()
    ties = int((table["win"].to_numpy() == WIN["tie"]).sum())
    agreement = float(((margin > 0) + 0.5 * (margin == 0)).mean()) if len(margin) else float("nan")
    return ScoreSummary(
        out=config.out,
        rows=total,
        scored=len(table),
        ties=ties,
        prompts=int(table["prompt_id"].to_numpy().max()) + 1,
        agreement=agreement,
        cut=cut,
        rejected=dict(sorted(rejected.items())),
        resumed=resumed,
    )


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
