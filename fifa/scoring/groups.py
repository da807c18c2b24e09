"""What a pass does to a row group: decode, score, judge; and the shard that it leaves.

While the network scores some pictures, threads decode and prepare the next ones and read the next
row group. What lies waiting is bounded: two batches of pictures and one row group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fifa.config import InputError, atomic_path, write_atomic
from fifa.images import Pixels, decode
from fifa.judge import CachedJudge
from fifa.pairs import IMAGE_COLUMNS, BadRow, Judgment, PairTable, RowError, check_prompt
from fifa.rewards import BrokenRewardError, PreparingReward, Reward, score_pictures
from fifa.scoring.ahead import ahead, threads
from fifa.scoring.settings import Progress, ScoreConfig
from fifa.sources.prompts import PromptList

WIN = {"a": 0, "b": 1, "tie": -1}

SHARD_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "caption": pa.string(),
        "reward_0": pa.float32(),  # null, like reward_1 and win, where only text was scored
        "reward_1": pa.float32(),
        "win": pa.int8(),  # which image the person preferred; -1 for a tie
        "quality": pa.float32(),  # null where the judge gave no answer
        "quality_reason": pa.string(),
    }
)


@dataclass(frozen=True)
class Shard:
    """What became of one row group."""

    scored: pa.Table  # of SHARD_SCHEMA
    bad: list[BadRow]


@dataclass(frozen=True)
class _Row:
    """A row that could be read; a prompt alone comes without a judgment."""

    number: int
    where: str
    prompt: str
    judgment: Judgment | None


def _row(number: int, found: Judgment | tuple[str, str]) -> _Row:
    if isinstance(found, Judgment):
        return _Row(number, found.where, found.prompt, found)
    return _Row(number, *found, judgment=None)


@dataclass(frozen=True)
class _Scored:
    """A row with a reward for each picture, or without pictures."""

    row: int
    prompt: str
    win: int | None
    rewards: tuple[float, float] | tuple[None, None]


@dataclass(frozen=True)
class _Chunk:
    """Rows of one group whose pictures are scored at once."""

    group: int
    rows: list[_Row]
    bad: list[BadRow] = field(default_factory=list)
    last: bool = False  # of its group


_Pictures = list["Future[Pixels | BadRow]"]  # two of each row


class GroupScorer:
    """Scores row groups of a table, one after another."""

    def __init__(
        self,
        config: ScoreConfig,
        table: PairTable | PromptList,
        reward: Reward | None,
        judge: CachedJudge,
    ) -> None:
        self.config = config
        self.table = table
        self.reward = reward
        self.judge = judge
        self.total = min(config.limit or table.num_rows, table.num_rows)

    def groups(self) -> list[int]:
        """The row groups that begin below the limit."""
        return [i for i, group in enumerate(self.table.row_groups()) if group.start < self.total]

    def rows(self, i: int) -> int:
        """Rows of group `i` below the limit."""
        group = self.table.row_groups()[i]
        return min(group.rows, self.total - group.start)

    def shards(self, groups: Sequence[int], progress: Progress) -> Iterator[tuple[int, Shard]]:
        """The groups in turn, each with what it came to.

        Raises InputError if a file cannot be read or the reward breaks its contract.
        """
        with threads(1) as reader, threads(min(8, os.cpu_count() or 1)) as decoders:
            scored: list[_Scored] = []
            bad: list[BadRow] = []
            begun = ahead(partial(self._begin, decoders), self._chunks(groups, reader), depth=2)
            for chunk, pictures in begun:
                good, worse = self._scored(chunk, [picture.result() for picture in pictures])
                scored += good
                bad += chunk.bad + worse
                if chunk.last:
                    yield chunk.group, self._shard(chunk.group, scored, bad, progress)
                    scored, bad = [], []

    def _chunks(self, groups: Sequence[int], reader: ThreadPoolExecutor) -> Iterator[_Chunk]:
        for read in ahead(lambda i: reader.submit(self._read, i), groups, depth=1):
            group, rows, bad = read.result()
            pairs = self.config.batch_size // 2 if self.reward else len(rows)
            starts = range(0, len(rows), pairs) if rows else [0]
            for first in starts:
                last = first == starts[-1]
                yield _Chunk(group, rows[first : first + pairs], bad if last else [], last)

    def _read(self, i: int) -> tuple[int, list[_Row], list[BadRow]]:
        """The rows of group i below the limit, those that can be read and those that cannot."""
        start = self.table.row_groups()[i].start
        rows: list[_Row] = []
        bad: list[BadRow] = []
        for number, found in enumerate(self._found(i), start):
            if number >= self.total:
                break
            if isinstance(found, BadRow):
                bad.append(found)
                continue
            row = _row(number, found)
            try:
                check_prompt(row.prompt, row.where, self.config.max_prompt)
                rows.append(row)
            except RowError as error:
                bad.append(BadRow(number, error.kind, str(error)))
        return i, rows, bad

    def _found(self, i: int) -> Iterator[Judgment | tuple[str, str] | BadRow]:
        if self.reward is not None and isinstance(self.table, PairTable):
            return self.table.judgments(i)
        return self.table.prompts(i)

    def _begin(self, decoders: ThreadPoolExecutor, chunk: _Chunk) -> tuple[_Chunk, _Pictures]:
        """The chunk, its pictures being decoded in other threads."""
        jobs = [
            (row, side, data)
            for row in chunk.rows
            if row.judgment is not None
            for side, data in enumerate((row.judgment.image_a, row.judgment.image_b))
        ]
        return chunk, [decoders.submit(self._picture, *job) for job in jobs]

    def _picture(self, row: _Row, side: int, data: bytes) -> Pixels | BadRow:
        """One picture as the reward wants it."""
        where = f"{row.where}, {IMAGE_COLUMNS[side]}"
        try:
            picture = decode(data, where, self.config.max_pixels)
        except InputError as error:
            return BadRow(row.number, "an image cannot be decoded", str(error))
        if not isinstance(self.reward, PreparingReward):
            return picture
        try:
            return self.reward.prepare(picture)
        except InputError as error:
            return BadRow(row.number, "the reward refuses", f"{where}: {error}")

    def _scored(
        self, chunk: _Chunk, pictures: Sequence[Pixels | BadRow]
    ) -> tuple[list[_Scored], list[BadRow]]:
        if self.reward is None:
            return [_Scored(row.number, row.prompt, None, (None, None)) for row in chunk.rows], []
        answers = _answers(self.reward, [row for row in chunk.rows for _ in (0, 1)], pictures)
        scored: list[_Scored] = []
        bad: list[BadRow] = []
        for row, left, right in zip(chunk.rows, answers[::2], answers[1::2], strict=True):
            if isinstance(left, BadRow):
                bad.append(left)
            elif isinstance(right, BadRow):
                bad.append(right)
            elif row.judgment is not None:
                win = WIN[row.judgment.outcome]
                scored.append(_Scored(row.number, row.prompt, win, (left, right)))
        return scored, bad

    def _shard(
        self, i: int, scored: Sequence[_Scored], bad: Sequence[BadRow], progress: Progress
    ) -> Shard:
        told = partial(_told, progress, self.table.row_groups()[i].start, len(scored), self.total)
        qualities = self.judge.score([row.prompt for row in scored], told)
        columns = {
            "row": [item.row for item in scored],
            "caption": [item.prompt for item in scored],
            "reward_0": [item.rewards[0] for item in scored],
            "reward_1": [item.rewards[1] for item in scored],
            "win": [item.win for item in scored],
            "quality": [quality.score for quality in qualities],
            "quality_reason": [quality.reason for quality in qualities],
        }
        table = pa.table(columns, schema=SHARD_SCHEMA)
        return Shard(table, sorted(bad, key=lambda row: row.row))


def _told(progress: Progress, start: int, rows: int, total: int, done: int, of: int) -> None:
    """Say how far a slow judge is: `done` of the `of` distinct prompts of a group's rows."""
    progress("judging text", start + rows * done // of, total)


def _answers(
    reward: Reward, rows: Sequence[_Row], pictures: Sequence[Pixels | BadRow]
) -> list[float | BadRow]:
    """The reward of each picture under the prompt of its row; pictures of one size go together."""
    answers: dict[int, float | BadRow] = {}
    by_size: dict[tuple[int, ...], dict[int, tuple[_Row, Pixels]]] = {}
    for place, picture in enumerate(pictures):
        if isinstance(picture, BadRow):
            answers[place] = picture
        else:
            by_size.setdefault(picture.shape, {})[place] = (rows[place], picture)
    for group in by_size.values():
        answers.update(zip(group, _rewards(reward, list(group.values())), strict=True))
    return [answers[place] for place in range(len(pictures))]


def _rewards(reward: Reward, group: Sequence[tuple[_Row, Pixels]]) -> list[float | BadRow]:
    """Rewards of pictures of one size; if the reward refuses, one by one, to find out which."""
    try:
        pictures, prompts = [picture for _, picture in group], [row.prompt for row, _ in group]
        return list(score_pictures(reward, pictures, prompts).tolist())
    except BrokenRewardError:
        raise
    except InputError as error:
        if len(group) == 1:
            row = group[0][0]
            return [BadRow(row.number, "the reward refuses", f"{row.where}: {error}")]
    return [answer for item in group for answer in _rewards(reward, [item])]


# ---- files ---------------------------------------------------------------------------------------


def shard_path(out: Path, i: int) -> Path:
    """The file that says that group `i` is done."""
    return out / "scores" / f"part-{i:05d}.parquet"


def rejected_path(out: Path, i: int) -> Path:
    """The rows of group `i` that were set aside, a JSON line each."""
    return out / "scores" / f"part-{i:05d}.rejected.jsonl"


def write_shard(out: Path, i: int, shard: Shard) -> None:
    """The rejected rows first: the shard itself says that the group is done."""
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in shard.bad)
    write_atomic(rejected_path(out, i), lines.encode("utf-8", "backslashreplace"))
    with atomic_path(shard_path(out, i)) as temporary:
        pq.write_table(shard.scored, temporary)
