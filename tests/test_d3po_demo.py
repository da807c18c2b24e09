"""The main job at tiny sizes, as a person runs it; then run again, and run with other settings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from test_fifa_report import Balanced

from d3po.demo import FULL, QUICK, run_demo, trainings
from d3po.families import MINI
from d3po.recipe import TrainConfig, load
from fifa.config import InputError
from fifa.rewards.mini import WEIGHTS

STAGES = ("data", "filter", "train", "report")

pytestmark = pytest.mark.skipif(
    not (MINI.is_dir() and WEIGHTS.is_dir()), reason="the weights of the mini model are not there"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is no checkout, so that nothing but the installed package is used."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def said(place: Path) -> subprocess.CompletedProcess[str]:
    """The command, once, with its output in a pipe."""
    command = [sys.executable, "-m", "d3po.cli", "demo", "--out", "runs/demo", "--quick"]
    return subprocess.run(
        command, cwd=place, capture_output=True, text=True, check=False, env={**os.environ}
    )


@pytest.fixture(scope="module")
def demo(place: Path, said: subprocess.CompletedProcess[str]) -> Path:
    assert said.returncode == 0, said.stderr[-3000:]
    return place / "runs" / "demo"


class Told:
    """What a caller of run_demo hears."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shown: list[tuple[str, int, int, str]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def show(self, task: str, done: int, total: int, text: str) -> None:
        self.shown.append((task, done, total, text))


def again(demo: Path, seed: int = 0) -> tuple[Told, dict[str, Any]]:
    told = Told()
    return told, run_demo(demo, seed, True, told.show, told.say)


def test_it_tells_each_stage_and_its_time(
    demo: Path, said: subprocess.CompletedProcess[str]
) -> None:
    done = re.findall(r"^(.*): done, (\d+) s \((\d+) s so far\)$", said.stdout, re.MULTILINE)
    assert len(done) == len(STAGES)
    for line in (
        "painting and judging pairs: 120 of 120",
        "scoring: 120 of 120",
        "training dpo: 4 of 4",
        "training d3po: 2 of 2",
        "drawing d3po: 12 of 12",
    ):
        assert line in said.stderr
    assert "Traceback" not in said.stderr
    assert said.stdout.strip().endswith("report.html")


def test_the_summary_has_the_numbers(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["filter"]["pairs"] == 120
    assert (
        summary["filter"]["kept"] == 12 == pq.read_metadata(demo / "filter/kept.parquet").num_rows
    )
    assert set(summary["filter"]["hidden_truth"]) == {"all", "kept"}
    assert set(summary["runs"]) == {"dpo", "d3po"}
    for name, steps in (("dpo", 4), ("d3po", 2)):
        run = summary["runs"][name]
        assert (run["steps"], run["prompts"], run["images"]) == (steps, 4, 2)
        assert {"oracle", "mini", "neatness"} <= set(run["judges"])
        for judge in run["judges"].values():
            low, high = judge["difference_interval"]
            assert low <= judge["after"] - judge["before"] + 1e-9
            assert judge["after"] - judge["before"] <= high + 1e-9
            assert judge["wins"] + judge["losses"] + judge["ties"] == 8
        assert run["diversity"]["before"] > 0
        assert run["verdict"].endswith(".")


def test_both_runs_start_from_the_same_model_and_noise(demo: Path) -> None:
    """The same judges, prompts and pictures of the base wherever the two sample alike."""
    configs = {name: load(demo / name / "config.yaml") for name in ("dpo", "d3po")}
    assert {config.eval.seed for config in configs.values()} == {configs["dpo"].eval.seed}
    assert {config.model for config in configs.values()} == {"mini"}
    assert {config.eval.prompts for config in configs.values()} == {"miniworld:heldout"}


def test_the_report_stands_alone(demo: Path) -> None:
    text = (demo / "report.html").read_text()
    page = Balanced(text.removeprefix("<!doctype html>"))
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.fetched)
    sources = re.findall(r"<img[^>]*\bsrc=\"([^\"]*)\"", text)
    assert len(sources) >= 2 * QUICK.sheets * 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    for part in (
        "dpo: before and after",
        "d3po: before and after",
        "What the filter could not see",
    ):
        assert part in page.text


def test_the_commands_of_the_report_are_what_was_done(demo: Path) -> None:
    page = Balanced((demo / "report.html").read_text().removeprefix("<!doctype html>"))
    for command in (
        "fifa world --out runs/demo/data --rows 120 --seed 0",
        "fifa select runs/demo/filter -k 10%",
        "d3po train runs/demo/dpo.yaml",
        "d3po report runs/demo/dpo runs/demo/d3po --filter runs/demo/filter",
    ):
        assert command in page.text
    assert (demo / "dpo.yaml").is_file()


def test_what_is_done_is_not_done_again(
    demo: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}
    told, summary = again(Path("runs/demo"))
    assert [": done before, " in line for line in told.lines] == [True] * len(STAGES)
    assert told.shown == []
    assert summary == json.loads((demo / "summary.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in demo.rglob("*") if p.is_file()} == before


def test_another_seed_is_refused_and_nothing_is_touched(
    demo: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = (demo / "summary.json").read_bytes()
    with pytest.raises(InputError, match="holds a demo of another seed, size or version"):
        again(Path("runs/demo"), seed=1)
    assert (demo / "summary.json").read_bytes() == before


def test_what_was_cut_off_goes_on(demo: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training whose end got lost goes on from its checkpoint; what stands before it is kept."""
    monkeypatch.chdir(place)
    metrics = {name: (demo / name / "metrics.jsonl").read_text() for name in ("dpo", "d3po")}
    for stage in ("train", "report"):
        (demo / "stages" / f"{stage}.json").unlink()
    (demo / "summary.json").unlink()
    told, summary = again(Path("runs/demo"))
    assert ["done before" in line for line in told.lines if " s so far" in line] == [
        True,
        True,
        False,
        False,
    ]
    for name, text in metrics.items():
        assert "resumed from" in (demo / f"{name}.log").read_text()
        assert (demo / name / "metrics.jsonl").read_text() == text
    assert summary["runs"]["dpo"]["steps"] == 4


def test_a_training_that_fails_is_told_in_one_sentence(
    demo: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (demo / "stages" / "train.json").unlink()
    kept = demo / "filter" / "kept.parquet"
    data = kept.read_bytes()
    try:
        kept.write_bytes(b"no parquet")
        with pytest.raises(InputError, match=r"training dpo ended with code 2: cannot read .*kept"):
            again(Path("runs/demo"))
    finally:
        kept.write_bytes(data)
    assert not (demo / "stages" / "train.json").exists()


# ---- the sizes that people get ------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [FULL, QUICK], ids=["full", "quick"])
def test_the_settings_are_whole_and_survive_their_file(sizes: Any, tmp_path: Path) -> None:
    for name, config in trainings(tmp_path, 3, sizes).items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        assert load(file) == config
        assert isinstance(config, TrainConfig)
        assert config.run.seed == 3
        assert config.run.dir == str(tmp_path / name)
