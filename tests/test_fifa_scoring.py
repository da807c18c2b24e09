from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pair_files import LABELS, caption, columns, picture, write_pairs
from scipy.spatial import cKDTree

from fifa.config import InputError
from fifa.images import decode, encode_jpeg
from fifa.judge import HeuristicJudge
from fifa.scoring import SCORES, ScoreConfig, read_manifest, score


def run(data: Path, out: Path, **options: Any) -> Any:
    return score(ScoreConfig(data=data, out=out, reward="jpeg_incompressibility", **options))


def table(out: Path) -> dict[str, list[Any]]:
    return pq.read_table(out / SCORES).to_pydict()


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class Picky:
    """Mean brightness, but it refuses prompts with a star and breaks its contract on request."""

    name, differentiable = "picky", True

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def to(self, device: str) -> None:
        torch.zeros(1).to(device)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if any("star" in prompt for prompt in prompts):
            raise InputError("no stars")
        return images.mean(dim=(1, 2, 3)) if not self.broken else images


def test_every_number_is_what_it_says(tmp_path: Path) -> None:
    summary = run(write_pairs(tmp_path / "a.parquet"), tmp_path / "out")
    got = table(tmp_path / "out")
    kilobytes = [
        [len(encode_jpeg(decode(picture(2 * i + s), "x"), 95)) / 1000 for s in (0, 1)]
        for i in range(40)
    ]
    np.testing.assert_allclose(got["reward_0"], [k[0] for k in kilobytes], rtol=1e-6)
    np.testing.assert_allclose(got["reward_1"], [k[1] for k in kilobytes], rtol=1e-6)
    assert got["row"] == list(range(40))
    assert got["win"] == [{1.0: 0, 0.0: 1, 0.5: -1}[LABELS[i % 4][0]] for i in range(40)]
    for i, (a, b) in enumerate(kilobytes):
        expected = {0: a - b, 1: b - a, -1: np.nan}[got["win"][i]]
        margin = np.nan if got["margin"][i] is None else got["margin"][i]
        assert margin == pytest.approx(expected, abs=1e-6, nan_ok=True)
    judged = HeuristicJudge().score([caption(i) for i in range(40)])
    assert got["quality_reason"] == [q.reason for q in judged]
    np.testing.assert_allclose(got["quality"], [q.score for q in judged], rtol=1e-6)
    margins = np.array([m for m in got["margin"] if m is not None])
    assert (summary.rows, summary.scored, summary.ties) == (40, 40, 10)
    assert summary.agreement == pytest.approx(np.heaviside(margins, 0.5).mean())


def test_diversity_is_over_distinct_prompts_and_shared_by_repetitions(tmp_path: Path) -> None:
    summary = run(write_pairs(tmp_path / "a.parquet"), tmp_path / "out", neighbours=3)
    got = table(tmp_path / "out")
    assert summary.prompts == 36  # rows 9, 19, 29, 39 repeat rows 0, 1, 2, 3
    assert got["prompt_id"][9] == got["prompt_id"][0]
    assert got["log_knn"][39] == got["log_knn"][3]
    assert sorted(set(got["prompt_id"])) == list(range(36))
    (path,) = (tmp_path / "out").glob("embeddings-*.npy")
    vectors = np.load(path).astype(np.float64)
    third = cKDTree(vectors).query(vectors, 4)[0][:, 3]
    expected = np.log(np.maximum(third, 0.01))[got["prompt_id"]]
    np.testing.assert_allclose(got["log_knn"], expected, rtol=1e-5)


def test_bad_rows_are_set_aside_counted_and_listed(tmp_path: Path) -> None:
    clean = columns(40)
    jpg_1: list[Any] = list(clean["jpg_1"])
    jpg_1[3], jpg_1[17] = b"no image", None
    captions: list[Any] = list(clean["caption"])
    captions[20] = None
    label = list(clean["label_0"])
    label[33] = 0.7
    data = write_pairs(tmp_path / "a.parquet", jpg_1=jpg_1, caption=captions, label_0=label)
    summary = run(data, tmp_path / "out")
    assert summary.rejected == {
        "an image cannot be decoded": 1,
        "an image is missing or empty": 1,
        "the caption is missing or empty": 1,
        "the label is missing or wrong": 1,
    }
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [3, 17, 20, 33]
    assert json.loads(lines[0])["reason"].startswith("row 3 (a.parquet), jpg_1: cannot decode")
    assert table(tmp_path / "out")["row"] == [i for i in range(40) if i not in (3, 17, 20, 33)]


def test_a_reward_that_refuses_some_prompts_costs_those_rows_only(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet")
    spec = f"{__name__}:Picky"
    summary = score(ScoreConfig(data=data, out=tmp_path / "out", reward=spec))
    stars = sum("star" in caption(i) for i in range(40))
    assert summary.rejected == {"the reward refuses": stars}
    assert 0 < stars < 40 - summary.scored + 1
    with pytest.raises(InputError, match=r"^reward 'picky' returned"):
        score(
            ScoreConfig(
                data=data, out=tmp_path / "b", reward=spec, reward_args={"broken": True}, limit=3
            )
        )


def test_a_device_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet", 4)
    spec = f"{__name__}:Picky"
    with pytest.raises(InputError, match="'picky' cannot run on 'nowhere'"):
        score(ScoreConfig(data=data, out=tmp_path / "out", reward=spec, device="nowhere"))


def test_nothing_scorable_is_one_sentence(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet", rows=3, jpg_0=[b"x"] * 3)
    with pytest.raises(InputError, match=r"not one row .* can be scored; row 0"):
        run(data, tmp_path / "out")


def test_pictures_of_different_sizes_are_scored_together(tmp_path: Path) -> None:
    sides = [16, 24, 8, 16]
    data = write_pairs(
        tmp_path / "a.parquet", 4, jpg_1=[picture(i, s) for i, s in enumerate(sides)]
    )
    run(data, tmp_path / "out")
    expected = [len(encode_jpeg(decode(picture(i, s), ""), 95)) / 1000 for i, s in enumerate(sides)]
    np.testing.assert_allclose(table(tmp_path / "out")["reward_1"], expected, rtol=1e-6)


def test_a_pass_killed_in_the_middle_ends_with_the_same_bytes(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet", rows=480, rows_a_group=6)
    command = [sys.executable, "-m", "fifa.cli", "score", str(data), "--out"]
    options = ["--reward", "jpeg_incompressibility"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "killed"), *options], stderr=subprocess.DEVNULL
    )
    shards = tmp_path / "killed" / "scores"
    while len(list(shards.glob("part-*.parquet"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / SCORES).exists()
    summary = run(data, tmp_path / "killed")
    assert 30 <= summary.resumed < 480
    assert run(data, tmp_path / "whole").resumed == 0
    for name in (SCORES, "rejected.jsonl", "manifest.json"):
        killed, whole = ((tmp_path / f / name).read_bytes() for f in ("killed", "whole"))
        assert killed == whole
    assert not list((tmp_path / "killed").rglob(".tmp-*"))


def test_a_full_disk_is_one_sentence_and_the_pass_continues_when_there_is_room(
    tmp_path: Path,
) -> None:
    data = write_pairs(tmp_path / "a.parquet", rows=60)
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from fifa.config import InputError\n"
        "from fifa.scoring import ScoreConfig, score\n"
        "def full(stage, done, total):\n"
        "    if done >= 24: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "config = ScoreConfig(data=sys.argv[1], out=sys.argv[2], reward='jpeg_incompressibility')\n"
        "try:\n"
        "    score(config, full)\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    out = tmp_path / "out"
    answer = subprocess.run(
        [sys.executable, "-c", program, str(data), str(out)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert answer.startswith("cannot ")
    assert str(out) in answer
    assert answer.count("\n") == 1
    assert not list(out.rglob(".tmp-*"))
    assert run(data, out).resumed == 24
    run(data, tmp_path / "whole")
    assert (out / SCORES).read_bytes() == (tmp_path / "whole" / SCORES).read_bytes()


def test_other_settings_or_data_do_not_mix_with_what_is_there(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet")
    run(data, tmp_path / "out")
    with pytest.raises(InputError, match="limit = None, now it is 7"):
        run(data, tmp_path / "out", limit=7)
    write_pairs(tmp_path / "a.parquet", label_0=columns(40)["label_1"])
    with pytest.raises(InputError, match="data = "):
        run(data, tmp_path / "out")


def test_another_embedding_keeps_the_scores(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet")
    run(data, tmp_path / "out")
    before = table(tmp_path / "out")
    summary = run(data, tmp_path / "out", embedder="tfidf:4")
    after = table(tmp_path / "out")
    assert summary.resumed == 40
    assert before["log_knn"] != after["log_knn"]
    assert before["reward_0"] == after["reward_0"]


def test_how_neighbours_were_found_is_in_the_manifest(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet")
    run(data, tmp_path / "out")
    exact = table(tmp_path / "out")["log_knn"]
    told = read_manifest(tmp_path / "out")["prompts"]
    assert (told["index"], told["recall"], told["effort"]) == ("exact", 1.0, 0)
    for index in ("ivf", "hnsw"):
        run(data, tmp_path / "out", index=index)
        told = read_manifest(tmp_path / "out")["prompts"]
        assert told["index"] == index
        assert 0.9 <= told["recall"] <= 1
        assert told["effort"] >= 1
        np.testing.assert_array_less(exact, np.add(table(tmp_path / "out")["log_knn"], 1e-6))


def test_hidden_truth_changes_nothing(tmp_path: Path) -> None:
    first = write_pairs(tmp_path / "1" / "a.parquet")
    second = write_pairs(tmp_path / "2" / "a.parquet", truth_utility_0=[0.5] * 40)
    run(first, tmp_path / "out1")
    run(second, tmp_path / "out2")
    assert (tmp_path / "out1" / SCORES).read_bytes() == (tmp_path / "out2" / SCORES).read_bytes()


def test_a_limit_ends_within_a_row_group(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    config = ScoreConfig(
        data=write_pairs(tmp_path / "a.parquet"),
        out=tmp_path / "out",
        reward="jpeg_compressibility",
        limit=11,
    )
    score(config, lambda stage, done, total: seen.append((stage, done, total)))
    assert table(tmp_path / "out")["row"] == list(range(11))
    assert seen[:2] == [("scoring", 8, 11), ("scoring", 11, 11)]


def test_one_prompt_alone_is_fine(tmp_path: Path) -> None:
    run(write_pairs(tmp_path / "a.parquet", 8, caption=["one hand"] * 8), tmp_path / "out")
    np.testing.assert_allclose(table(tmp_path / "out")["log_knn"], np.log(2))


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet")
    run(data, tmp_path / "out")
    with (tmp_path / "out" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            run(data, tmp_path / "out")


def test_a_damaged_manifest_is_one_sentence(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet")
    run(data, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        run(data, tmp_path / "out")


def test_a_folder_of_something_else_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"shards": 3}')
    with pytest.raises(InputError, match="holds something else than scores; `fifa score`"):
        read_manifest(tmp_path)


def test_nothing_is_left_over(tmp_path: Path) -> None:
    run(write_pairs(tmp_path / "a.parquet", 10), tmp_path / "out")
    (embeddings,) = (tmp_path / "out").glob("embeddings-*")
    assert files(tmp_path / "out") == {
        ".lock",
        "judge.sqlite",
        "manifest.json",
        "rejected.jsonl",
        "scores.parquet",
        embeddings.name,
        *(f"scores/part-{i:05d}{end}" for i in (0, 1) for end in (".parquet", ".rejected.jsonl")),
    }
