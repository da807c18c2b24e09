"""The report: its page stands alone, its words follow the numbers, its pictures are the run's."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_fifa_report import Balanced

from d3po.evaluate import EvalConfig, Evaluation, JudgeResult, PromptResult
from d3po.generate import SamplerConfig, generate, independent_orders
from d3po.losses import ObjectiveConfig
from d3po.online.settings import OnlineConfig
from d3po.policy import PolicyConfig
from d3po.recipe import TrainConfig, load_run, train
from d3po.report import write_report
from d3po.report.filtering import hidden_truth
from d3po.report.plots import curves, html_win_rates, running_mean, win_rates
from d3po.report.record import read_run
from d3po.report.sheets import Sheet, draw, html_sheets
from d3po.report.verdicts import Verdict, judge_meaning, verdict
from d3po.run import RunConfig
from d3po.trainer import OptimConfig
from fifa.config import InputError
from fifa.filtering import SelectConfig, select
from fifa.images import decode, to_uint8
from fifa.miniworld.dataset import write_dataset
from fifa.rewards import REWARDS
from fifa.scoring import ScoreConfig, score

PROMPTS = ["a red circle", "two <b>blue</b> squares", "a star"]


@pytest.fixture(scope="module")
def run(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of D3PO on random weights, evaluated before and after."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    config = TrainConfig(
        model=str(tiny_sd),
        objective=ObjectiveConfig(name="d3po_clipped", beta=1.0, options={"clip": 0.1}),
        policy=PolicyConfig(rank=2),
        optim=OptimConfig(max_steps=3, micro_batch=2, learning_rate=0.05),
        sampler=SamplerConfig(steps=2, guidance=1.0),
        online=OnlineConfig(prompt_count=20, groups=2, judges=("jpeg_compressibility",)),
        eval=EvalConfig(
            prompts=str(folder / "prompts.txt"),
            images=2,
            every=0,
            judges=("jpeg_compressibility", "jpeg_incompressibility"),
        ),
        run=RunConfig(dir=str(folder / "first"), log_every=100),
    )
    return train(config).path


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filter")
    write_dataset(folder / "data", rows=60, workers=1)
    score(ScoreConfig(data=folder / "data", out=folder / "s", reward="neatness"))
    select(SelectConfig(scores=folder / "s", k=6))
    return folder / "s"


# ---- the page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(run: Path, filtered: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    more = [("The end", "<p>of it</p>")]
    return write_report([run, run], out, filtered, prompts=3, images=2, more=more).read_text()


def test_the_page_stands_alone(text: str) -> None:
    page = Balanced(text.removeprefix("<!doctype html>"))
    assert page.fetched
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.fetched)
    assert not re.search(r"url\((?!#)|@import|<script|src=\"(?!data:)", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_page_tells_everything(text: str) -> None:
    page = Balanced(text.removeprefix("<!doctype html>"))
    for part in (
        "In short",
        "how often a judge prefers the picture after training",
        "Kept: highest importance first (6)",
        "What the filter could not see",
        "first: before and after",
        "jpeg_incompressibility",
        "reward of the rollouts: jpeg_compressibility",
        "trained pairs ordered as judged",
        "objective.beta",
        "one round: 2 groups x 4 images",
        "The end",
    ):
        assert part in page.text, part
    assert text.count('<div class="sheet">') == 6  # three prompts of two runs
    assert "two <b>blue" not in text
    assert "two <b>blue</b> squares" in page.text


def test_the_pictures_are_those_of_the_evaluation(run: Path, text: str) -> None:
    config, policy = load_run(run)
    orders = independent_orders(PROMPTS, 2, config.eval.seed, range(3))
    with policy.reference():
        before = next(iter(generate(policy.family, policy.bare, config.sampler, orders))).images
    after = next(iter(generate(policy.family, policy.bare, config.sampler, orders))).images
    sheet = text[text.index('<div class="sheet">') :].split('<div class="sheet">')[1]
    stored = [
        decode(base64.b64decode(data), "page")
        for data in re.findall(r"data:image/png;base64,([^\"]+)", sheet)
    ]
    drawn = [*to_uint8(before[:2]), *to_uint8(after[:2])]
    assert len(stored) == 4
    assert all(np.array_equal(a, b) for a, b in zip(stored, drawn, strict=True))
    assert not np.array_equal(stored[0], stored[2])


def test_pictures_can_be_left_out(run: Path, tmp_path: Path) -> None:
    text = write_report([run], tmp_path / "r.html", prompts=0).read_text()
    assert '<div class="sheet">' not in text
    assert "What the judges say" in text


def test_drawing_reports_its_progress(run: Path) -> None:
    done: list[int] = []
    sheets = draw(read_run(run), prompts=2, images=1, advance=done.append)
    assert [sheet.prompt for sheet in sheets] == PROMPTS[:2]
    assert done == [2, 4]


def _result(scores: list[float]) -> PromptResult:
    pictures = [np.full((32, 32, 3), int(100 * s), np.uint8) for s in scores]
    return PromptResult(np.array(scores)[:, None], 0.0, 0.0, pictures)


def test_a_picture_is_marked_by_what_became_of_its_score() -> None:
    sheet = Sheet("a & b", _result([0.5, 0.5, 0.5]), _result([0.5, 1.0, 0.25]))
    text = html_sheets([sheet])
    Balanced(text)
    marks = re.findall(r"<figure(?: class=(\w+))?>.*?<figcaption>([\d.]+)<", text)
    assert marks == [("", "0.50")] * 4 + [("up", "1.00"), ("down", "0.25")]
    assert "a &amp; b" in text
    assert 'width="96" height="96"' in text  # three times the size, pixel by pixel


# ---- what a run folder says ---------------------------------------------------------------------


def test_the_record_is_what_training_left(run: Path) -> None:
    record = read_run(run)
    assert (record.name, record.trained_on) == ("first", ("jpeg_compressibility",))
    assert len(record.updates) == 3
    assert len(record.rounds) == 3
    assert record.evaluation is not None
    assert (record.evaluation.prompts, record.evaluation.images) == (3, 2)
    titles = [title for title, _, _ in curves(record)]
    assert titles[0] == "reward of the rollouts: jpeg_compressibility"
    assert all(len(steps) == len(values) for _, steps, values in curves(record))


def test_win_rates_leave_out_judges_who_saw_no_difference(run: Path) -> None:
    record = read_run(run)
    tied = replace(UP, judge="blind", win_rate=None, win_rate_interval=None)
    judged = replace(record, evaluation=_evaluation(UP, tied))
    alone = replace(record, evaluation=None)
    assert win_rates([judged, alone]) == [("first: jpeg_compressibility", 0.75, (0.3, 0.95), True)]


def test_a_plot_of_few_prompts_is_grey(run: Path) -> None:
    worse = replace(UP, win_rate=0.1, win_rate_interval=(0.05, 0.3))
    for prompts, coloured in ((7, False), (8, True)):
        evaluation = replace(_evaluation(worse), prompts=prompts)
        drawn = html_win_rates([replace(read_run(run), evaluation=evaluation)])
        assert ("#d9603f" in drawn) is coloured


def test_a_younger_evaluation_counts_and_an_older_one_does_not(run: Path) -> None:
    own = read_run(run).evaluation
    assert own is not None
    file = run / "evaluation.json"
    try:
        file.write_text(replace(own, seed=77).to_json())
        assert read_run(run).evaluation == replace(own, seed=77)
        os.utime(file, (0, 0))
        assert read_run(run).evaluation == own
        os.utime(file)
        file.write_text('{"prompts": 3}')
        with pytest.raises(InputError, match=r"evaluation\.json holds no evaluation \('images'"):
            read_run(run)
        file.write_text("{")
        with pytest.raises(InputError, match="is not JSON"):
            read_run(run)
    finally:
        file.unlink()


def test_time_adds_up_over_interruptions(run: Path) -> None:
    timing = run / "timing.jsonl"
    before = timing.read_text()
    try:
        rows = [{"step": i, "seconds": s} for i, s in enumerate([1.0, 2.0, 3.0, 0.5, 1.5])]
        timing.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert read_run(run).seconds == 4.5
    finally:
        timing.write_text(before)


def test_bad_input_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run folder"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(InputError, match="is not a run folder"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(InputError, match="holds no selection"):
        write_report([run], tmp_path / "r.html", filtered=tmp_path, prompts=0)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(InputError, match="has not ended"):
        write_report([tmp_path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


# ---- words --------------------------------------------------------------------------------------


def _judge(name: str, before: float, after: float, low: float, high: float) -> JudgeResult:
    return JudgeResult(name, after, before, after - before, (low, high), 3, 1, 0, 0.75, (0.3, 0.95))


def _evaluation(*judges: JudgeResult, diversity: tuple[float, float] = (0.2, 0.2)) -> Evaluation:
    return Evaluation(8, 2, 0, list(judges), diversity, (1.0, 1.0))


UP = _judge("jpeg_compressibility", -1.25, -0.75, 0.4, 0.6)
SAME = _judge("neatness", 0.5, 0.52, -0.01, 0.05)
DOWN = _judge("oracle", 0.75, 0.5, -0.3, -0.2)


def test_reward_hacking_is_said_in_plain_words() -> None:
    told = verdict(_evaluation(UP, DOWN, SAME), ["jpeg_compressibility"])
    assert told.summary == (
        "Better by jpeg_compressibility (-1.25 to -0.75); worse by oracle (0.75 to 0.5); "
        "no clear difference by neatness (0.5 to 0.52)."
    )
    (warning,) = told.warnings
    for part in (
        "Reward hacking",
        "-1.25 to -0.75",
        "oracle fell from 0.75 to 0.5",
        "-0.3 to -0.2",
    ):
        assert part in warning


@pytest.mark.parametrize(
    ("judges", "trained_on"),
    [
        ((UP, DOWN), ()),  # people chose: no judge was there to be pleased
        ((UP, SAME), ("jpeg_compressibility",)),  # the loss is not clear
        ((DOWN, UP), ("neatness",)),  # nobody who was trained on gained
    ],
)
def test_what_is_no_reward_hacking(
    judges: tuple[JudgeResult, ...], trained_on: tuple[str, ...]
) -> None:
    assert verdict(_evaluation(*judges), trained_on).warnings == ()


def test_a_handful_of_prompts_decides_nothing_and_small_changes_are_seen() -> None:
    close = _judge("neatness", 0.5333, 0.53334, 1e-5, 5e-5)
    few = replace(_evaluation(UP, close), prompts=2)
    assert verdict(few, ["jpeg_compressibility"]) == Verdict(
        "2 prompts are too few to say who is better: jpeg_compressibility (-1.25 to -0.75), "
        "neatness (0.53330 to 0.53334).",
        (),
    )


def test_equal_numbers_have_no_needless_digits() -> None:
    equal = _judge("oracle", 0.734375, 0.734375, 0.0, 0.0)
    told = verdict(_evaluation(equal), [])
    assert told.summary == "No clear difference by oracle (0.734 to 0.734)."


def test_a_loss_by_the_judge_trained_on_and_a_collapse_are_told() -> None:
    told = verdict(_evaluation(DOWN, diversity=(0.05, 0.2)), ["oracle"])
    assert "went the wrong way" in told.warnings[0]
    assert "collapsing" in told.warnings[1]


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_says_what_it_measures(name: str) -> None:
    assert 10 < len(judge_meaning(name)) < 200
    assert "(see" not in judge_meaning(name)


def test_an_unknown_judge_has_no_meaning() -> None:
    assert judge_meaning("my.module:judge") == ""


# ---- numbers ------------------------------------------------------------------------------------


def test_the_running_mean_is_the_mean_of_what_is_there() -> None:
    values = np.array([1.0, np.nan, 3.0, 8.0, np.nan, np.nan, np.nan, 2.0])
    expected = [np.nanmean(values[max(0, i - 1) : i + 2]) if i != 5 else np.nan for i in range(8)]
    assert running_mean(values, 1) == pytest.approx(expected, nan_ok=True)
    assert running_mean(values, 0) == pytest.approx(values, nan_ok=True)


def test_hidden_truth_is_counted_row_by_row(filtered: Path) -> None:
    rows = pq.read_table(filtered / "kept.parquet").to_pylist()
    right, decided = 0, 0
    for row in rows:
        if row["label_0"] != row["label_1"]:
            decided += 1
            first = row["truth_utility_0"] > row["truth_utility_1"]
            right += first == (row["label_0"] > row["label_1"])
    everything, kept = hidden_truth(filtered)
    assert (everything["among"], everything["pairs"]) == ("all", 60)
    assert (kept["among"], kept["pairs"]) == ("kept", 6)
    assert kept["label agrees with the truth"] == right / decided
    careless: Any = [row["truth_annotator"] == "careless" for row in rows]
    assert kept["careless judge"] == np.mean(careless)


def test_people_have_no_hidden_truth(filtered: Path, tmp_path: Path) -> None:
    table = pq.read_table(filtered / "kept.parquet")
    visible = table.select([name for name in table.column_names if not name.startswith("truth_")])
    pq.write_table(visible, tmp_path / "kept.parquet")
    (tmp_path / "selection.json").write_text(json.dumps({"data": str(tmp_path / "kept.parquet")}))
    assert hidden_truth(tmp_path) == []


def test_no_global_generator_is_moved(run: Path) -> None:
    before = torch.get_rng_state()
    draw(read_run(run), prompts=1, images=1)
    assert torch.equal(torch.get_rng_state(), before)
