"""Prompts without pictures: read, scored by their text alone, and selected from."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import caption, write_pairs
from scipy.spatial import cKDTree
from typer.testing import CliRunner

from fifa.cli import app
from fifa.config import InputError
from fifa.filtering import KEPT, SelectConfig, select
from fifa.judge import HeuristicJudge
from fifa.pairs import BadRow
from fifa.report import write_report
from fifa.scoring import SCORES, ScoreConfig, score
from fifa.sources.prompts import PromptList, open_prompts


def run(data: Path, out: Path, **options: Any) -> Any:
    return score(ScoreConfig(data=data, out=out, reward="none", **options))


def text_file(path: Path, rows: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{caption(i)}\n" for i in range(rows)))
    return path


def prompts_of(path: Path) -> list[str]:
    table = open_prompts(path)
    found = [row for i in range(len(table.row_groups())) for row in table.prompts(i)]
    return [row.reason if isinstance(row, BadRow) else row[1] for row in found]


def test_a_prompt_a_line_in_text_json_lines_and_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\n\n  a dog \nein Käfer".encode())
    (tmp_path / "b.jsonl").write_text('"a hen"\n{"caption": "a cow", "id": 7}\n\n{"text": ""}\n')
    (tmp_path / "c.json").write_text('[{"prompt": "a fox"}, ["x"], {"prompt": null}, "owl"]')
    (tmp_path / "notes.md").write_text("# not a prompt")
    assert prompts_of(tmp_path / "a.txt") == ["a cat", "a dog", "ein Käfer"]
    assert prompts_of(tmp_path / "b.jsonl") == ["a hen", "a cow", ""]
    assert prompts_of(tmp_path / "c.json") == [
        "a fox",
        "c.json item 1: there is no prompt, it is ['x']",
        "c.json item 2: there is no prompt, it is {'prompt': None}",
        "owl",
    ]
    whole = prompts_of(tmp_path)
    assert len(whole) == 10
    assert (whole[0], whole[9]) == ("a cat", "owl")
    table = open_prompts(tmp_path)
    assert [(g.path.name, g.start, g.rows) for g in table.row_groups()] == [
        ("a.txt", 0, 3),
        ("b.jsonl", 3, 3),
        ("c.json", 6, 4),
    ]


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(InputError, match=r"blank\.txt holds no prompts"):
        open_prompts(tmp_path / "blank.txt")
    for name in ("nowhere.txt", "nowhere"):
        with pytest.raises(InputError, match="does not exist"):
            open_prompts(tmp_path / name)
    (tmp_path / "cut.json").write_text('["a cat", {"prompt": "a d')
    assert prompts_of(tmp_path / "cut.json")[1].startswith("cut.json item 1: a file breaks off")
    pq.write_table(pa.table({"captoin": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column 'caption'; is it 'captoin'"):
        open_prompts(tmp_path / "a.parquet")


def test_the_fingerprint_follows_the_prompts(tmp_path: Path) -> None:
    def mark(text: str) -> str:
        (tmp_path / "a.txt").write_text(text)
        return open_prompts(tmp_path / "a.txt").fingerprint()

    assert mark("a cat\na dog\n") == mark("a cat\na dog")
    assert len({mark("a cat\na dog"), mark("a dog\na cat"), mark("a cat"), mark("a cata dog")}) == 4


def test_text_alone_is_scored(tmp_path: Path) -> None:
    summary = run(text_file(tmp_path / "prompts.txt"), tmp_path / "out", neighbours=3)
    got = pq.read_table(tmp_path / "out" / SCORES).to_pydict()
    assert (summary.scored, summary.ties, summary.prompts) == (40, 0, 36)
    assert np.isnan(summary.agreement)
    for name in ("reward_0", "reward_1", "win", "margin"):
        assert got[name] == [None] * 40
    judged = HeuristicJudge().score([caption(i) for i in range(40)])
    np.testing.assert_allclose(got["quality"], [q.score for q in judged], rtol=1e-6)
    (path,) = (tmp_path / "out").glob("embeddings-*.npy")
    vectors = np.load(path).astype(np.float64)
    third = np.log(np.maximum(cKDTree(vectors).query(vectors, 4)[0][:, 3], 0.01))
    np.testing.assert_allclose(got["log_knn"], third[got["prompt_id"]], rtol=1e-5)


def test_a_pair_table_is_scored_by_its_captions_alone(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "a.parquet", jpg_0=[b"no picture"] * 40)
    run(data, tmp_path / "pairs")
    run(text_file(tmp_path / "prompts.txt"), tmp_path / "text")
    of_pairs, of_text = (pq.read_table(tmp_path / name / SCORES) for name in ("pairs", "text"))
    assert of_pairs.equals(of_text)
    select(SelectConfig(scores=tmp_path / "pairs", k=3))
    assert pq.read_schema(tmp_path / "pairs" / KEPT).equals(pq.read_schema(data))


def test_a_reward_needs_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prompts without pictures, which no reward can score"):
        score(ScoreConfig(data=text_file(tmp_path / "p.txt"), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_prompts_are_selected_by_quality_and_diversity(tmp_path: Path) -> None:
    data, out = text_file(tmp_path / "p.txt"), tmp_path / "out"
    data.write_text(data.read_text() + "zxcvbnm qwrtpsdf\nwww.example.com\n")
    run(data, out)
    scores = pq.read_table(out / SCORES).to_pydict()
    quality, near = np.array(scores["quality"]), np.array(scores["log_knn"])
    both = sum((x - x.mean()) / x.std() for x in (quality, near))
    for method, value in (
        ("quality", quality),
        ("diversity", near),
        ("importance", both),
    ):
        summary = select(SelectConfig(scores=out, k=5, method=method, cap=0))
        kept = pq.read_table(out / KEPT)
        best = np.sort(np.argsort(-value, kind="stable")[:5])
        assert kept["source"].to_pylist() == [f"p.txt line {i + 1}" for i in best]
        assert kept["caption"].to_pylist() == [prompts_of(data)[i] for i in best]
        assert summary.agreement is None
        assert "margin" not in summary.f
    for method in ("greedy", "random"):
        assert select(SelectConfig(scores=out, k=5, method=method)).kept == 5
    for method in ("margin", "pair_ranking"):
        with pytest.raises(InputError, match=f"'{method}' needs margins; methods that do not are"):
            select(SelectConfig(scores=out, k=5, method=method))
    with pytest.raises(InputError, match="prompts without pictures"):
        write_report(out)


def test_bad_prompts_are_set_aside(tmp_path: Path) -> None:
    records = ["a cat", "", "nul \0 byte", "x" * 50_000, 7, {"prompt": "half \ud83d"}, "🐈 قطة"]
    lines = [json.dumps(record) for record in records]
    path = tmp_path / "p.jsonl"
    path.write_bytes("\n".join([*lines, "{"]).encode() + b'\n"half \xff"\n')
    summary = run(path, tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / SCORES)["row"].to_pylist() == [0, 6]
    assert summary.rejected == {
        "a line is not valid JSON": 1,
        "the prompt holds a NUL byte": 1,
        "the prompt is empty": 1,
        "the prompt is not valid Unicode": 2,
        "the prompt is too long": 1,
        "there is no prompt": 1,
    }


def test_the_command_scores_and_selects_prompts(tmp_path: Path) -> None:
    data, out = text_file(tmp_path / "p.txt"), tmp_path / "out"
    told = CliRunner().invoke(app, ["score", str(data), "--reward", "none", "--out", str(out)])
    assert told.output.splitlines()[-2] == "40 of 40 rows scored (0 found done), 36 prompts"
    told = CliRunner().invoke(app, ["select", str(out), "-k", "10%"])
    assert told.exit_code == 0, told.exception
    assert "agree" not in told.output


def test_a_killed_pass_over_prompts_ends_with_the_same_bytes(tmp_path: Path) -> None:
    data = tmp_path / "prompts"
    for i in range(8):
        text_file(data / f"{i}.txt", 1200)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "fifa.cli", "score", str(data), "--out", str(out)]
    process = subprocess.Popen([*command, "--reward", "none"], stderr=subprocess.DEVNULL)
    while len(list((out / "scores").glob("part-*.parquet"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / SCORES).exists()
    assert 2200 <= run(data, out).resumed < 9600  # three parts, of 1,000 or 200 prompts
    assert run(data, tmp_path / "whole").resumed == 0
    for name in (SCORES, "rejected.jsonl", "manifest.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_list_of_prompts_is_no_pair_table(tmp_path: Path) -> None:
    table = open_prompts(text_file(tmp_path / "p.txt", 5))
    assert isinstance(table, PromptList)
    with pytest.raises(InputError, match=r"rows 0\.\.4"):
        table.take([5], tmp_path / "x.parquet")
    with pytest.raises(InputError, match="asked for twice"):
        table.take([1, 1], tmp_path / "x.parquet")
