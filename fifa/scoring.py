"""The scoring pass: every pair of a data set gets its margin, text quality and diversity, once.

The pass goes row group by row group and writes one shard for each. It may be killed at any moment:
run again, it goes on at the first missing shard, and the final table is the same to the byte. When
all shards are there, prompts are embedded and compared and one table is written:

    scores.parquet   row, prompt_id, reward_0, reward_1, win (0, 1, -1 for a tie), margin,
                     quality, quality_reason, log_knn
    embeddings-*.npy unit vectors of the distinct prompts, by prompt_id
    *.sqlite         what judges and text networks answered, kept prompt by prompt
    rejected.jsonl   rows that could not be scored, and why
    manifest.json    what the numbers were made from
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from fifa.config import Config, InputError, atomic_path, write_atomic
from fifa.embed import STORE, Embedder, Vectors, cache_path, count_cut, embed, load_embedder
from fifa.images import Pixels, decode, to_batch
from fifa.judge import CachedJudge, Quality, QualityJudge, load_judge
from fifa.knn import FLOOR, log_knn
from fifa.pairs import IMAGE_COLUMNS, BadRow, Judgment, PairTable, distinct_prompts
from fifa.rewards import BrokenRewardError, Reward, load_reward, score_images

VERSION = 1  # raised whenever the same inputs would give other numbers

Progress = Callable[[str, int, int], None]  # stage, rows done, rows in all

SCORES = "scores.parquet"
REJECTED = "rejected.jsonl"
MANIFEST = "manifest.json"

WIN = {"a": 0, "b": 1, "tie": -1}

SHARD_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "caption": pa.string(),
        "reward_0": pa.float32(),
        "reward_1": pa.float32(),
        "win": pa.int8(),  # which image the person preferred; -1 for a tie
        "quality": pa.float32(),  # null where the judge gave no answer
        "quality_reason": pa.string(),
    }
)
SCORE_SCHEMA = pa.schema(
    {
        "row": pa.int64(),  # in the data set, counted from 0
        "prompt_id": pa.int64(),  # row of the embeddings
        "reward_0": pa.float32(),
        "reward_1": pa.float32(),
        "win": pa.int8(),
        "margin": pa.float32(),  # reward of the winner minus that of the loser; null for a tie
        "quality": pa.float32(),
        "quality_reason": pa.string(),
        "log_knn": pa.float32(),  # nats
    }
)


class ScoreConfig(Config):
    """What to score, and by what."""

    data: Path = Field(description="Parquet file, or folder of them, in Pick-a-Pic v2 columns.")
    out: Path = Field(description="Folder for the scores; an unfinished pass in it is continued.")
    reward: str = Field(
        "mini",
        description="Proxy reward: name, name:weights, package.module:factory, or 0.5*a+0.5*b.",
    )
    reward_args: dict[str, Any] = Field({}, description="Arguments of the reward's factory.")
    judge: str = Field(
        "heuristic",
        description="Judge of text quality, 0 to 10: heuristic, local:<model>, "
        "openai:<model>@<base url>.",
    )
    judge_args: dict[str, Any] = Field({}, description="Arguments of the judge's factory.")
    embedder: str = Field(
        "tfidf",
        description="Prompts to vectors: tfidf, clip:<model>:<weights>, clip_hf:<model>, "
        "sentence:<model>.",
    )
    embedder_args: dict[str, Any] = Field({}, description="Arguments of the embedder's factory.")
    embedding_store: Path | None = Field(
        None,
        description="SQLite file that keeps the vectors of text networks prompt by prompt, for "
        "several passes; default: one in `out`.",
    )
    neighbours: int = Field(
        5, ge=1, description="k of the k-th nearest prompt whose log distance is recorded."
    )
    floor: float = Field(
        FLOOR, gt=0, description="Prompts closer than this (of at most 2) count as this far apart."
    )
    device: str = Field(
        "cpu",
        description="Where the networks of reward, local judge and embedder run, such as cuda.",
    )
    batch_size: int = Field(128, ge=2, description="Images decoded and scored at once.")
    limit: int | None = Field(None, ge=1, description="Score only the first rows, this many.")


@dataclass(frozen=True)
class ScoreSummary:
    """What a scoring pass came to."""

    out: Path
    rows: int  # of the data set, or the limit
    scored: int
    ties: int
    prompts: int  # distinct
    agreement: float  # share of pairs whose winner has the higher reward, ties of the reward half
    cut: int = 0  # prompts that the embedder did not read to their end
    rejected: dict[str, int] = field(default_factory=dict)  # kind -> rows
    resumed: int = 0  # rows found scored already


def no_progress(stage: str, done: int, total: int) -> None:
    """Say nothing."""


def score(config: ScoreConfig, progress: Progress = no_progress) -> ScoreSummary:
    """Score a data set into `config.out`, or finish what an earlier call began there.

    Raises InputError if the folder holds scores of other data or settings, another process is
    writing to it, a file cannot be read or written, or not one row can be scored.
    """
    table = PairTable.open(config.data)
    reward = _on(load_reward(config.reward, **config.reward_args), config.device)
    judge = CachedJudge(_load_judge(config), config.out / "judge.sqlite")
    with _only_writer(config.out):
        manifest = _manifest(config, table, reward, judge)
        _check_same(config.out, manifest)
        write_atomic(config.out / MANIFEST, _json({**manifest, "complete": False}))
        total = min(config.limit or table.num_rows, table.num_rows)
        groups = [i for i, group in enumerate(table.row_groups()) if group.start < total]
        resumed = 0
        for i in groups:
            group = table.row_groups()[i]
            stop = min(group.start + group.rows, total)
            if _shard(config.out, i).exists():
                resumed += stop - group.start
            else:
                scored, bad = _score_group(config, table, i, total, reward)
                told = partial(_told, progress, group.start, len(scored), total)
                qualities = judge.score([row.prompt for row in scored], told)
                _write_shard(config.out, i, scored, qualities, bad)
            progress("scoring", stop, total)
        scores, cut, rejected = _finish(config, manifest, groups, progress)
    return _summary(config, scores, cut, rejected, total, resumed)


S = TypeVar("S", Reward, QualityJudge, Embedder)


def _on(scorer: S, device: str, kind: str = "reward") -> S:
    """The reward, judge or embedder with its network, if it has one, on the device."""
    if hasattr(scorer, "to"):
        try:
            scorer.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{kind} '{scorer.name}' cannot run on '{device}': {reason}") from None
    return scorer


def _load_judge(config: ScoreConfig) -> QualityJudge:
    """The judge, on the pass's device unless its own arguments name another."""
    judge = load_judge(config.judge, **config.judge_args)
    return judge if "device" in config.judge_args else _on(judge, config.device, "judge")


def _told(progress: Progress, start: int, rows: int, total: int, done: int, of: int) -> None:
    """Say how far a slow judge is: `done` of the `of` distinct prompts of a group's rows."""
    progress("judging text", start + rows * done // of, total)


# ---- what the numbers are made from --------------------------------------------------------------


def _manifest(
    config: ScoreConfig, table: PairTable, reward: Reward, judge: QualityJudge
) -> dict[str, Any]:
    made_from = {
        "version": VERSION,
        "data": table.fingerprint(),
        "reward": config.reward,
        "reward_args": config.reward_args,
        "reward_version": f"{reward.name} {getattr(reward, 'version', '')}".strip(),
        "device": config.device,
        "judge": judge.name,
        "batch_size": config.batch_size,
        "limit": config.limit,
    }
    then = {
        "embedder": load_embedder(config.embedder, **config.embedder_args).name,
        "neighbours": config.neighbours,
        "floor": config.floor,
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
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; delete the folder and score again") from None
    if must_be_complete and not complete:
        raise InputError(
            f"the scores in {folder} are not complete; run `fifa score` again to finish"
        )
    return manifest


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases however the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing scores to {folder}") from None
        for left_over in folder.rglob(".tmp-*"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


# ---- one row group -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    """A row with a reward for each picture."""

    row: int
    prompt: str
    win: int
    rewards: tuple[float, float]


def _score_group(
    config: ScoreConfig, table: PairTable, i: int, total: int, reward: Reward
) -> tuple[list[_Scored], list[BadRow]]:
    """The rows of group i below `total`, those that could be scored and those that could not."""
    start = table.row_groups()[i].start
    numbered = [item for item in enumerate(table.judgments(i), start) if item[0] < total]
    bad = [row for _, row in numbered if isinstance(row, BadRow)]
    judged = [(number, row) for number, row in numbered if isinstance(row, Judgment)]
    scored: list[_Scored] = []
    pairs = config.batch_size // 2
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(judged), pairs):
            good, worse = _score_chunk(reward, judged[first : first + pairs], pool)
            scored += good
            bad += worse
    return scored, sorted(bad, key=lambda row: row.row)


def _score_chunk(
    reward: Reward, chunk: Sequence[tuple[int, Judgment]], pool: ThreadPoolExecutor
) -> tuple[list[_Scored], list[BadRow]]:
    jobs = [(number, judgment, side) for number, judgment in chunk for side in (0, 1)]
    pictures = list(pool.map(_decoded, jobs))
    answers: dict[tuple[int, int], float | BadRow] = {}
    by_size: dict[tuple[int, ...], list[tuple[int, Judgment, int, Pixels]]] = {}
    for (number, judgment, side), picture in zip(jobs, pictures, strict=True):
        if isinstance(picture, BadRow):
            answers[number, side] = picture
        else:
            by_size.setdefault(picture.shape, []).append((number, judgment, side, picture))
    for group in by_size.values():
        for (number, _, side, _), answer in zip(group, _rewards(reward, group), strict=True):
            answers[number, side] = answer
    scored: list[_Scored] = []
    bad: list[BadRow] = []
    for number, judgment in chunk:
        left, right = answers[number, 0], answers[number, 1]
        if isinstance(left, BadRow):
            bad.append(left)
        elif isinstance(right, BadRow):
            bad.append(right)
        else:
            win = WIN[judgment.outcome]
            scored.append(_Scored(number, judgment.prompt, win, (left, right)))
    return scored, bad


def _decoded(job: tuple[int, Judgment, int]) -> Pixels | BadRow:
    number, judgment, side = job
    data = (judgment.image_a, judgment.image_b)[side]
    try:
        return decode(data, f"{judgment.where}, {IMAGE_COLUMNS[side]}")
    except InputError as error:
        return BadRow(number, "an image cannot be decoded", str(error))


def _rewards(
    reward: Reward, group: Sequence[tuple[int, Judgment, int, Pixels]]
) -> list[float | BadRow]:
    """Rewards of pictures of one size; if the reward refuses, one by one, to find out which."""
    images = to_batch([picture for _, _, _, picture in group])
    prompts = [judgment.prompt for _, judgment, _, _ in group]
    try:
        return list(score_images(reward, images, prompts).tolist())
    except BrokenRewardError:
        raise
    except InputError as error:
        if len(group) == 1:
            number, judgment, _, _ = group[0]
            reason = f"{judgment.where}: {error}"
            return [BadRow(number, "the reward refuses", reason)]
    return [answer for item in group for answer in _rewards(reward, [item])]


def _shard(out: Path, i: int) -> Path:
    return out / "scores" / f"part-{i:05d}.parquet"


def _rejected_shard(out: Path, i: int) -> Path:
    return out / "scores" / f"part-{i:05d}.rejected.jsonl"


def _write_shard(
    out: Path,
    i: int,
    scored: Sequence[_Scored],
    qualities: Sequence[Quality],
    bad: Sequence[BadRow],
) -> None:
    """The rejected rows first: the shard itself says that the group is done."""
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad)
    write_atomic(_rejected_shard(out, i), lines.encode("utf-8", "backslashreplace"))
    columns = {
        "row": [item.row for item in scored],
        "caption": [item.prompt for item in scored],
        "reward_0": [item.rewards[0] for item in scored],
        "reward_1": [item.rewards[1] for item in scored],
        "win": [item.win for item in scored],
        "quality": [quality.score for quality in qualities],
        "quality_reason": [quality.reason for quality in qualities],
    }
    with atomic_path(_shard(out, i)) as temporary:
        pq.write_table(pa.table(columns, schema=SHARD_SCHEMA), temporary)


# ---- the whole table -----------------------------------------------------------------------------


def _finish(
    config: ScoreConfig, manifest: dict[str, Any], groups: Sequence[int], progress: Progress
) -> tuple[pa.Table, int, Counter[str]]:
    """Join the shards, embed and compare the prompts, write the table.

    Returns it, how many prompts the embedder did not read to their end, and the rejections.
    """
    out = config.out
    rejected = b"".join(_rejected_shard(out, i).read_bytes() for i in groups)
    write_atomic(out / REJECTED, rejected)
    reasons = [json.loads(line) for line in rejected.splitlines()]
    shards = pa.concat_tables([pq.read_table(_shard(out, i)) for i in groups])
    if len(shards) == 0:
        raise InputError(f"not one row of {config.data} can be scored; {reasons[0]['reason']}")
    prompts, ids = distinct_prompts(shards["caption"].to_pylist())
    progress("embedding prompts", 0, len(prompts))
    embedder = load_embedder(config.embedder, **config.embedder_args)
    store = config.embedding_store or out / STORE
    told = partial(progress, "embedding prompts")
    vectors = embed(prompts, _on(embedder, config.device, "embedder"), out, store, told)
    cut = count_cut(prompts, embedder)
    progress("comparing prompts", 0, len(prompts))
    diversity = _log_knn(vectors, config.neighbours, config.floor)[ids]
    progress("comparing prompts", len(prompts), len(prompts))
    table = _joined(shards, ids, diversity)
    with atomic_path(out / SCORES) as temporary:
        pq.write_table(table, temporary)
    complete = {
        **manifest,
        "prompts": {**manifest["prompts"], "cut": cut},
        "embeddings": cache_path(prompts, embedder, out).name,
        "complete": True,
    }
    write_atomic(out / MANIFEST, _json(complete))
    return table, cut, Counter(reason["kind"] for reason in reasons)


def _log_knn(vectors: Vectors, k: int, floor: float) -> NDArray[np.float64]:
    """`log_knn` with as many neighbours as there are; a lone prompt is a diameter from nothing."""
    if len(vectors) == 1:
        return np.array([np.log(2.0)])
    return log_knn(vectors, min(k, len(vectors) - 1), floor)


def _joined(shards: pa.Table, ids: NDArray[np.int64], diversity: NDArray[np.float64]) -> pa.Table:
    win = shards["win"].to_numpy()
    first, second = shards["reward_0"].to_numpy(), shards["reward_1"].to_numpy()
    margin = np.where(win == 0, first - second, second - first)
    columns = {name: shards[name] for name in SCORE_SCHEMA.names if name in shards.column_names}
    columns["prompt_id"] = pa.array(ids)
    columns["margin"] = pa.array(margin, mask=win == WIN["tie"])
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
    agreement = float(((margin > 0) + 0.5 * (margin == 0)).mean()) if len(margin) else float("nan")
    return ScoreSummary(
        out=config.out,
        rows=total,
        scored=len(table),
        ties=len(table) - len(margin),
        prompts=int(table["prompt_id"].to_numpy().max()) + 1,
        agreement=agreement,
        cut=cut,
        rejected=dict(sorted(rejected.items())),
        resumed=resumed,
    )


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
