"""A pass by threads, by several processes and on a Ray cluster: always the same table."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pair_files import columns, write_pairs

from fifa.config import InputError
from fifa.scoring import SCORES, ScoreConfig, score
from fifa.scoring.ahead import ahead, threads
from fifa.scoring.cluster import shards_by_ray

REWARD = "jpeg_incompressibility"
FILES = (SCORES, "rejected.jsonl", "manifest.json")


def data_set(path: Path, rows: int = 60) -> Path:
    """Pairs of which some cannot be scored, in groups of seven."""
    jpg_1: list[Any] = columns(rows)["jpg_1"]
    jpg_1[3], jpg_1[17] = b"no image", None
    return write_pairs(path, rows, rows_a_group=7, jpg_1=jpg_1)


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A data set and the files of a pass of one process over it."""
    folder = tmp_path_factory.mktemp("alone")
    data = data_set(folder / "a.parquet")
    score(ScoreConfig(data=data, out=folder / "out", reward=REWARD))
    return data, contents(folder / "out")


# --- threads --------------------------------------------------------------------------------------


def test_work_is_begun_ahead_and_handed_out_in_order() -> None:
    begun: list[int] = []

    def begin(item: int) -> int:
        begun.append(item)
        return item * item

    results = ahead(begin, iter(range(7)), depth=2)
    assert begun == []
    assert next(results) == 0
    assert begun == [0, 1, 2]
    assert next(results) == 1
    assert begun == [0, 1, 2, 3]
    assert list(results) == [4, 9, 16, 25, 36]
    assert list(ahead(begin, [], depth=2)) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_has_not_begun_is_dropped(error: type[BaseException]) -> None:
    gate = threading.Event()
    waiting: list[Future[bool]] = []

    def interrupted() -> None:
        with threads(1) as pool:
            waiting.extend(pool.submit(gate.wait) for _ in range(50))
            threading.Timer(0.05, gate.set).start()
            raise error

    with pytest.raises(error):
        interrupted()
    assert sum(future.cancelled() for future in waiting) >= 48
    assert all(future.done() for future in waiting)


def test_pictures_are_decoded_while_others_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fifa.scoring import groups

    decode, begun, asked = groups.decode, [], []

    def counted(*args: Any) -> Any:
        begun.append(args[1])
        return decode(*args)

    class Slow:
        name, differentiable = "slow", True

        def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            goal = min(80, 8 * (len(asked) + 3))  # pictures of this batch and two more
            deadline = time.monotonic() + 60
            while len(begun) < goal and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)  # were there more to come, they would
            asked.append(len(begun))
            return images.mean(dim=(1, 2, 3))

    monkeypatch.setattr(groups, "decode", counted)
    monkeypatch.setattr(sys.modules[__name__], "Slow", Slow, raising=False)
    data = write_pairs(tmp_path / "a.parquet", 40)
    score(ScoreConfig(data=data, out=tmp_path / "out", reward=f"{__name__}:Slow", batch_size=8))
    assert asked == [min(80, 8 * (n + 3)) for n in range(10)]  # two batches ahead, and no more


def test_the_table_does_not_depend_on_the_batch_size(
    tmp_path: Path, alone: tuple[Path, dict[str, bytes]]
) -> None:
    data, expected = alone
    for size in (2, 6, 1000):
        out = tmp_path / str(size)
        score(ScoreConfig(data=data, out=out, reward=REWARD, batch_size=size))
        for name in (SCORES, "rejected.jsonl"):
            assert (out / name).read_bytes() == expected[name]


def test_a_file_that_vanishes_ends_the_pass_with_one_sentence(tmp_path: Path) -> None:
    data = data_set(tmp_path / "a.parquet")

    def vanish(stage: str, done: int, total: int) -> None:
        data.unlink(missing_ok=True)

    config = ScoreConfig(data=data, out=tmp_path / "out", reward=REWARD)
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        score(config, vanish)


# --- processes ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launched(*args: object) -> subprocess.CompletedProcess[str]:
    """`fifa score` by two processes on the CPU."""
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--main_process_port", str(free_port()), "-m", "fifa.cli", "score"]
    return subprocess.run(
        [sys.executable, "-m", *launch, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )


def begun(alone: Path, out: Path, shards: int) -> list[Path]:
    """What a pass leaves in `out` that is killed after so many shards; the shards."""
    shutil.copytree(alone, out)
    (out / SCORES).unlink()
    parts = sorted((out / "scores").glob("part-*.parquet"))
    for path in parts[shards:]:
        path.unlink()
    (out / "scores" / ".tmp-killed").touch()
    return parts[:shards]


def test_two_processes_share_the_groups_and_write_one_table(
    tmp_path: Path, alone: tuple[Path, dict[str, bytes]]
) -> None:
    data, expected = alone
    out = tmp_path / "out"
    there = begun(data.parent / "out", out, 2)
    before = [path.stat().st_mtime_ns for path in there]
    ended = launched(data, "--out", out, "--reward", REWARD)
    assert ended.returncode == 0, ended.stderr
    assert contents(out) == expected
    assert ended.stdout.count("58 of 60 rows scored (14 found done)") == 1
    assert [path.stat().st_mtime_ns for path in there] == before
    assert not list(out.rglob(".tmp-*"))


# --- Ray ------------------------------------------------------------------------------------------


def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    data = data_set(tmp_path / "a.parquet", 20)
    config = ScoreConfig(data=data, out=tmp_path / "out", reward=REWARD, ray="nonsense")
    with pytest.raises(InputError, match="cannot reach the Ray cluster 'nonsense'"):
        score(config)
    assert pq.read_metadata(data).num_rows == 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of two CPUs on this machine."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="warning",
    )
    yield
    ray.shutdown()


def test_two_ray_workers_finish_what_one_process_began(
    tmp_path: Path, alone: tuple[Path, dict[str, bytes]], cluster: None
) -> None:
    data, expected = alone
    out = tmp_path / "out"
    begun(data.parent / "out", out, 2)
    told: list[int] = []
    config = ScoreConfig(data=data, out=out, reward=REWARD, ray="local")
    summary = score(config, lambda stage, done, total: told.append(done))
    assert summary.resumed == 14
    assert contents(out) == expected
    assert told[0] == 14
    assert 60 in told
    wrong = ScoreConfig(data=tmp_path / "gone", out=out, reward=REWARD, ray="local")
    with pytest.raises(InputError, match=r"does not exist"):
        next(shards_by_ray(wrong, [0]))
