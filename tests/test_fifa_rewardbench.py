from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_files import picture, write_pairs
from scipy.special import expit
from typer.testing import CliRunner

from fifa.cli import app
from fifa.config import InputError
from fifa.images import decode, to_batch, to_uint8
from fifa.miniworld import Group, Request, parse, phrase, sample_request
from fifa.miniworld.oracle import check, look
from fifa.pairs import PairTable
from fifa.rewardbench import BenchConfig, BuildConfig, ReadConfig
from fifa.rewardbench.build import build
from fifa.rewardbench.judges import JUDGES, SPREAD, Judge, agreed, majority
from fifa.rewardbench.leaderboard import NUMBERS, write_leaderboard
from fifa.rewardbench.measures import (
    accuracy,
    bands,
    by_group,
    calibration,
    difficulty,
    macro_mean,
    right,
    ties,
    unchanged,
    within,
)
from fifa.rewardbench.pairwise import margins_of, pictures_of
from fifa.rewardbench.pictures import DISTORTIONS, distorted, saturated
from fifa.rewardbench.reading import KINDS, described, read
from fifa.rewardbench.scenarios import SCENARIOS, draft, meanings
from fifa.rewardbench.standing import Run, Standing, run, standing
from fifa.rewardbench.table import FACTS, ITEMS, Bench, Item, load_bench
from fifa.rewards import BrokenRewardError, ComparingReward, load_reward
from fifa.rewards.nuisance import NUISANCES, measure

PAIRS = 6
SMALL: dict[str, Any] = {"pairs": PAIRS, "panel": ("neatness", "saturation", "edges")}


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bench of all scenarios."""
    out = tmp_path_factory.mktemp("reward") / "bench"
    build(BuildConfig(out=out, **SMALL))
    return out


# ---- arithmetic ----------------------------------------------------------------------------------


def test_right_and_accuracy_by_hand() -> None:
    margin, label = [2.0, -1.0, 0.0, 3.0, np.nan], [0, 1, 1, 1, 0]
    np.testing.assert_array_equal(right(margin, label), [1, 1, 0.5, 0, np.nan])
    part = accuracy(margin, label)
    assert (part.pairs, part.value) == (4, 2.5 / 4)
    assert ties(margin) == 1 / 4
    assert unchanged(margin, [1.0, 1.0, 0.0, 9.0, 9.0]) == 3 / 4
    assert np.isnan(ties([np.nan]))
    assert np.isnan(unchanged([np.nan], [1.0]))


def test_difficulty_is_the_share_of_the_panel_that_is_wrong() -> None:
    margins = [[1.0, 1.0, 0.0, np.nan], [-1.0, 1.0, np.nan, np.nan], [1.0, 1.0, np.nan, 2.0]]
    np.testing.assert_allclose(difficulty(margins, [0, 1, 1, 0]), [1 / 3, 1, 0.5, 0])
    np.testing.assert_array_equal(difficulty(margins, [-1, -1, -1, -1]), [np.nan] * 4)
    np.testing.assert_array_equal(difficulty(np.empty((0, 2)), [0, 1]), [np.nan] * 2)


def test_bands_are_terciles_and_equal_difficulties_share_one() -> None:
    values = [0.9, 0.1, 0.5, 0.2, 0.8, 0.4, np.nan]
    assert bands(values) == ["hard", "easy", "middle", "easy", "hard", "middle", ""]
    assert bands([0.5, 0.5, 0.5]) == ["middle"] * 3
    assert bands([0.0, 0.0, 0.0, 1.0]) == ["middle", "middle", "middle", "hard"]
    assert within(values, (0.2, 0.8)).tolist() == [False, False, True, True, True, True, False]
    assert within(values, None).all()


def test_the_macro_mean_counts_scenarios_not_pairs() -> None:
    groups = by_group([1.0, 1.0, 1.0, -1.0], [0, 0, 0, 0], ["a", "a", "a", "b"])
    assert {name: (p.pairs, p.value) for name, p in groups.items()} == {"a": (3, 1), "b": (1, 0)}
    assert macro_mean(groups) == 0.5
    assert np.isnan(macro_mean({}))


def test_a_reward_that_knows_its_odds_is_calibrated_whatever_its_unit() -> None:
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 20_000)
    label = (rng.random(20_000) >= expit(margin)).astype(int)
    assert calibration(margin, label) < 0.02
    assert calibration(1e-4 * margin, label) == pytest.approx(calibration(margin, label), abs=1e-3)
    # The same odds told by their square are too timid near 0 and too bold far out.
    assert calibration(margin * np.abs(margin), label) > 0.03
    assert np.isnan(calibration(np.zeros(40), np.zeros(40)))
    assert np.isnan(calibration([1.0], [0]))


# ---- judges --------------------------------------------------------------------------------------

VERDICTS = np.array(
    [[0, 0, 0, -1, 0], [0, 1, 0, -1, 1], [0, 1, -1, 0, 1], [0, 1, -1, 1, 0]], dtype=np.int8
)


def test_majority_and_agreement_by_hand() -> None:
    assert majority(VERDICTS).tolist() == [0, 1, 0, -1, -1]
    assert agreed(VERDICTS, 4).tolist() == [True, False, False, False, False]
    assert agreed(VERDICTS, 3).tolist() == [True, True, False, False, False]
    assert agreed(VERDICTS, 1).tolist() == [True, True, True, False, False]
    for least in (0, 5):
        with pytest.raises(InputError, match="there are 4 of them"):
            agreed(VERDICTS, least)


def test_a_judge_answers_as_often_as_its_formula_says() -> None:
    judge = Judge(3.0, {"saturation": 0.5}, careless=0.2, tie_half_width=0.4)
    n = 60_000
    merits = np.tile([1.0, 0.5], (n, 1))
    nuisances = np.zeros((n, 2, len(NUISANCES)))
    nuisances[:, 1, NUISANCES.index("saturation")] = 2 * SPREAD["saturation"]
    said = judge.judge(merits, nuisances, np.random.default_rng(0))
    d = 3.0 * 0.5 - 0.5 * 2
    first, second = expit(d - 0.4), expit(-d - 0.4)
    wanted = [0.8 * first + 0.1, 0.8 * second + 0.1, 0.8 * (1 - first - second)]
    found = [(said == verdict).mean() for verdict in (0, 1, -1)]
    np.testing.assert_allclose(found, wanted, atol=0.01)  # five standard errors


def test_every_bias_is_a_nuisance() -> None:
    assert set(SPREAD) == set(NUISANCES)
    assert all(set(judge.bias) <= set(NUISANCES) for judge in JUDGES.values())


# ---- scenarios -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_better_picture_is_the_better_one(scenario: str) -> None:
    for number in range(5):
        found = draft(scenario, np.random.default_rng([7, number]))
        again = draft(scenario, np.random.default_rng([7, number]))
        assert found.prompt == again.prompt
        assert (found.better == again.better).all()
        assert (found.worse == again.worse).all()
        assert found.merit[0] > found.merit[1]
        verdicts = [check(image, found.prompt) for image in (found.better, found.worse)]
        if scenario == "harmless":  # giving in is what was asked for, and still wrong
            assert verdicts[1].all_hold
            assert not look(found.better).things
        elif scenario not in ("overall", "distortions"):
            assert verdicts[0].all_hold
            assert not verdicts[1].all_hold
        if scenario != "overall":
            assert (found.better != found.worse).any()


def test_what_a_scenario_changes_is_what_fails() -> None:
    kinds = {
        "attributes": {"colour", "size", "count", "relation"},  # of a thing of that colour
        "relations": {"relation"},
        "counts": {"count"},
        "constraints": {"without"},
    }
    for scenario, allowed in kinds.items():
        for number in range(8):
            found = draft(scenario, np.random.default_rng([3, number]))
            failed = {c.kind for c in check(found.worse, found.prompt).conditions if not c.holds}
            assert failed, scenario
            assert failed <= allowed, scenario


def test_the_wrong_picture_of_a_conflict_is_the_glossy_one() -> None:
    glossy = [draft("conflict", np.random.default_rng([5, i])) for i in range(12)]
    plain = measure(to_batch([pair.better for pair in glossy])).numpy()
    showy = measure(to_batch([pair.worse for pair in glossy])).numpy()
    for name in ("saturation", "contrast"):
        column = NUISANCES.index(name)
        assert (showy[:, column] > plain[:, column]).mean() >= 10 / 12


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_a_stronger_distortion_is_farther_from_the_picture(kind: str) -> None:
    pictures = [draft("counts", np.random.default_rng(i)).better for i in range(8)]
    mild, bad = (
        np.mean(
            [
                np.abs(distorted(p, kind, s, np.random.default_rng(1)).astype(float) - p).mean()
                for p in pictures
            ]
        )
        for s in (0.0, 1.0)
    )
    assert 0 < mild < bad


def test_saturation_moves_colours_from_grey() -> None:
    pixels = decode(picture(3), "a picture")
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    assert (saturated(pixels, 1.0) == pixels).all()
    assert (saturated(grey, 1.7) == grey).all()
    column = NUISANCES.index("saturation")
    before, after = (measure(to_batch([p]))[0, column] for p in (pixels, saturated(pixels, 1.5)))
    assert after > before


def test_prompts_may_forbid() -> None:
    request = parse("a photo of two red circles on a white background without any blue stars")
    assert request == Request(
        (Group("circle", "red", None, 2),), None, "white", Group("star", "blue")
    )
    assert parse("a star, and no crosses").without == Group("cross")
    rng = np.random.default_rng(0)
    for _ in range(200):
        asked = replace(sample_request(rng), without=Group("star", "pink"))
        if asked.relation is None:
            asked = replace(asked, groups=tuple(sorted(asked.groups, key=str)))
        assert parse(phrase(asked, rng)) == asked
    plain = sample_request(rng)
    assert "without" not in plain.key
    assert replace(plain, without=Group("star")).key != plain.key


def test_every_scenario_says_what_it_is() -> None:
    assert dict(meanings()).keys() == SCENARIOS.keys()
    assert all(20 < len(text) < 100 and text.endswith(".") for _, text in meanings())


# ---- building ------------------------------------------------------------------------------------


def test_a_bench_is_a_pair_table_with_more(bench: Path) -> None:
    table = PairTable.open(bench / ITEMS)
    assert table.num_rows == PAIRS * len(SCENARIOS)
    assert len([row for i in range(len(table.row_groups())) for row in table.judgments(i)])
    found = load_bench(bench)
    assert len(found.items) == table.num_rows
    assert {item.scenario for item in found.items} == set(SCENARIOS)
    for item in found.items:
        verdicts = np.array(item.judges, np.int8)[:, None]
        assert item.label == majority(verdicts)[0]
        assert item.agreed == agreed(verdicts, 4)[0]
        assert item.difficulty is None or 0 <= item.difficulty <= 1
        assert bool(item.band) == item.agreed


def test_difficulty_is_that_of_the_panel(bench: Path) -> None:
    items = [item for item in load_bench(bench).items if item.label >= 0][:8]
    rewards = [load_reward(name) for name in SMALL["panel"]]
    for item in items:
        assert item.first
        assert item.second
        sides = [to_batch([decode(data, item.id)]) for data in (item.first, item.second)]
        wrong = []
        for reward in rewards:
            a, b = (float(reward(side, [item.prompt])) for side in sides)
            wrong.append(0.5 if a == b else float((a > b) != (item.label == 0)))
        assert item.difficulty == pytest.approx(np.mean(wrong))


def test_the_same_seed_gives_the_same_bench_and_a_larger_one_holds_it(
    bench: Path, tmp_path: Path
) -> None:
    facts = load_bench(bench).facts
    again = build(BuildConfig(out=tmp_path / "again", **SMALL))
    assert again["fingerprint"] == facts["fingerprint"]
    larger = {**SMALL, "pairs": PAIRS + 2, "scenarios": ("relations", "counts")}
    build(BuildConfig(out=tmp_path / "larger", **larger))
    of = {item.id: item for item in load_bench(tmp_path / "larger").items}
    same = [item for item in load_bench(bench).items if item.id in of]
    assert len(same) == 2 * PAIRS
    for item in same:
        assert replace(item, band="") == replace(of[item.id], band="")
    other = build(BuildConfig(out=tmp_path / "other", **{**SMALL, "seed": 1}))
    assert other["fingerprint"] != facts["fingerprint"]


def test_agreement_makes_labels_truer(tmp_path: Path) -> None:
    scenarios = ("relations", "details", "conflict")
    facts = build(BuildConfig(out=tmp_path / "b", pairs=60, panel=(), scenarios=scenarios))
    truth = facts["label_truth"]
    assert truth["kept"]["value"] >= 0.97
    assert truth["one_judge"] < truth["majority"]["value"] <= truth["kept"]["value"]
    assert 60 < facts["agreed"] < facts["pairs"] == 180


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scenarios": ("relation",)}, "did you mean 'relations'"),
        ({"judges": ("carefull",)}, "did you mean 'careful'"),
        ({"judges": ("careful",), "agree": 2}, "agree is 2, but there are only 1 judges"),
        ({"panel": ("neetness",)}, "did you mean 'neatness'"),
    ],
)
def test_settings_that_make_no_sense_are_told(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    small = {"pairs": 1, "scenarios": ("counts",), "panel": (), **given}
    with pytest.raises(InputError, match=message):
        build(BuildConfig(out=tmp_path / "bench", **small))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_kept(bench: Path) -> None:
    before = (bench / ITEMS).read_bytes()
    with pytest.raises(InputError, match="exists"):
        build(BuildConfig(out=bench, pairs=1))
    assert (bench / ITEMS).read_bytes() == before


def test_a_bench_that_was_changed_is_refused(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no reward bench"):
        load_bench(tmp_path)
    (tmp_path / FACTS).write_bytes((bench / FACTS).read_bytes())
    table = pq.read_table(bench / ITEMS)
    pq.write_table(table.slice(1), tmp_path / ITEMS)
    with pytest.raises(InputError, match="is not what was written"):
        load_bench(tmp_path)


# ---- running -------------------------------------------------------------------------------------


class ByPicture:
    """A reward that looks its score up by the pixels: the truth, its negative, or one number."""

    differentiable = False

    def __init__(self, items: Sequence[Item], sign: float, name: str = "by picture") -> None:
        self.name = name
        self.scores: dict[tuple[str, bytes], float] = {}
        for item in items:
            assert item.first
            assert item.second
            assert item.truth is not None
            for side, data in enumerate((item.first, item.second)):
                key = (item.prompt, decode(data, item.id).tobytes())
                self.scores[key] = sign * (side == item.truth)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        pixels = to_uint8(images)
        keys = [(prompt, p.tobytes()) for prompt, p in zip(prompts, pixels, strict=True)]
        return torch.tensor([self.scores[key] for key in keys], dtype=torch.float32)


def of_reward(bench: Path, reward: Any) -> Standing:
    items = load_bench(bench).counted()
    pairs, _ = pictures_of(items)
    return standing(reward.name, items, margins_of(reward, pairs, 16).margin)


def test_gold_constant_and_negated_rewards(bench: Path) -> None:
    items = load_bench(bench).items
    gold, negated, constant = (of_reward(bench, ByPicture(items, sign)) for sign in (1, -1, 0))
    assert gold.overall.value >= 0.97
    assert negated.overall.value == 1 - gold.overall.value
    assert (constant.overall.value, constant.macro, constant.ties) == (0.5, 0.5, 1.0)
    for name, part in gold.scenarios.items():
        assert negated.scenarios[name].value == 1 - part.value
        assert sum(cell.pairs for cell in gold.cells[name].values()) == part.pairs


@pytest.fixture(scope="session")
def found(bench: Path) -> Run:
    """Rewards of the table on the bench."""
    rewards = ("oracle", "saturation", "jpeg_compressibility", "0.5*oracle+0.5*neatness")
    return run(BenchConfig(bench=bench, rewards=rewards))


def test_standings_agree_with_scores_by_hand(bench: Path, found: Run) -> None:
    oracle = next(s for s in found.standings if s.reward == "oracle")
    points: dict[str, list[float]] = {}
    for item in load_bench(bench).counted():
        assert item.first
        assert item.second
        a, b = (check(decode(d, item.id), item.prompt).share for d in (item.first, item.second))
        score = 0.5 if a == b else float((a > b) == (item.label == 0))
        points.setdefault(item.scenario, []).append(score)
    means = {name: np.mean(values) for name, values in points.items()}
    assert {n: part.value for n, part in oracle.scenarios.items()} == pytest.approx(means)
    assert oracle.macro == pytest.approx(np.mean(list(means.values())))
    assert oracle.scenarios["harmless"].value == 0  # it gives in
    assert found.standings[0].macro == max(s.macro for s in found.standings)


def test_the_saturation_reward_is_flipped_by_saturation_and_falls_for_gloss(found: Run) -> None:
    by_name = {s.reward: s for s in found.standings}
    gaudy, oracle = by_name["saturation"], by_name["oracle"]
    assert gaudy.flips is not None
    assert oracle.flips is not None
    assert gaudy.flips > 0.2 > oracle.flips
    assert gaudy.scenarios["conflict"].value < 0.5 < oracle.scenarios["conflict"].value
    assert gaudy.on_panel
    assert not oracle.on_panel
    assert gaudy.order is None


def test_the_batch_does_not_matter(bench: Path) -> None:
    pairs, _ = pictures_of(load_bench(bench).items)
    reward = load_reward("neatness")
    whole, small = (margins_of(reward, pairs, batch, 1.4) for batch in (256, 3))
    np.testing.assert_array_equal(whole.margin, small.margin)
    assert whole.glossy is not None
    assert small.glossy is not None
    np.testing.assert_array_equal(whole.glossy[0], small.glossy[0])


class Hurried:
    """Compares two pictures by size of detail, and leans to the one shown first."""

    name = "hurried"
    differentiable = False
    lean = 0.0

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.flatten(1).std(1)

    def compare(
        self, first: torch.Tensor, second: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        return self(first, prompts) - self(second, prompts) + self.lean


def test_both_orders_are_asked_and_averaged(bench: Path) -> None:
    pairs, _ = pictures_of(load_bench(bench).items)
    fair, leaning = Hurried(), Hurried()
    leaning.lean = 0.02
    assert isinstance(fair, ComparingReward)
    plain, leant = (margins_of(reward, pairs, 16) for reward in (fair, leaning))
    np.testing.assert_allclose(leant.margin, plain.margin, atol=1e-6)  # the lean cancels
    assert plain.orders is not None
    assert leant.orders is not None
    assert unchanged(*plain.orders) == 1
    small = float(np.mean(np.abs(plain.margin) < 0.02))
    assert 0 < small < 1
    assert unchanged(*leant.orders) == pytest.approx(1 - small)


class Picky(Hurried):
    """Cannot score prompts about stars."""

    name = "picky"
    compare = None  # type: ignore[assignment]

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if any("star" in prompt for prompt in prompts):
            raise InputError("no stars, please")
        return super().__call__(images, prompts)


class Broken(Picky):
    """Returns a score too many."""

    name = "broken"

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return torch.zeros(len(prompts) + 1)


def test_pairs_that_cannot_be_scored_are_set_aside(bench: Path) -> None:
    pairs, _ = pictures_of(load_bench(bench).items)
    said = margins_of(Picky(), pairs, 16)
    stars = np.array(["star" in pair.item.prompt for pair in pairs])
    np.testing.assert_array_equal(np.isnan(said.margin), stars)
    assert said.set_aside == {"the reward cannot score it": stars.sum()}
    assert said.examples[0].endswith("no stars, please")
    with pytest.raises(BrokenRewardError):
        margins_of(Broken(), pairs, 16)


def test_a_device_that_is_not_there_is_told(bench: Path) -> None:
    with pytest.raises(InputError, match="reward 'mini' cannot run on 'nowhere'"):
        run(BenchConfig(bench=bench, rewards=("mini",), device="nowhere"))


def test_a_band_that_holds_nothing_and_no_reward_are_told(bench: Path) -> None:
    with pytest.raises(InputError, match="has a difficulty in"):
        run(BenchConfig(bench=bench, rewards=("oracle",), keep=(0.41, 0.42)))
    with pytest.raises(InputError, match="name rewards"):
        run(BenchConfig(bench=bench))
    kept = run(BenchConfig(bench=bench, rewards=("edges",), keep=(0.2, 0.8)))
    assert 0 < len(kept.counted) < len(load_bench(bench).counted())
    assert all(item.difficulty and 0.2 <= item.difficulty <= 0.8 for item in kept.counted)


# ---- the leaderboard -----------------------------------------------------------------------------


def test_the_leaderboard_holds_every_number_and_needs_nothing_else(
    found: Run, tmp_path: Path
) -> None:
    page = write_leaderboard(found, tmp_path).read_text(encoding="utf-8")
    numbers = json.loads((tmp_path / NUMBERS).read_text(encoding="utf-8"))
    assert [r["reward"] for r in numbers["rewards"]] == [s.reward for s in found.standings]
    first = numbers["rewards"][0]
    assert first["scenarios"]["counts"]["value"] == found.standings[0].scenarios["counts"].value
    assert numbers["counted"] == len(found.counted)
    for name in (*SCENARIOS, "saturation *", "0.5*oracle+0.5*neatness"):
        assert name in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert page.count("data:image/png") == 2 * len({item.scenario for item in found.counted})


# ---- files ---------------------------------------------------------------------------------------


def read_from(kind: str, path: Path, out: Path, **more: Any) -> tuple[Bench, dict[str, Any]]:
    facts = read(ReadConfig(kind=kind, path=path, out=out, **more))
    return load_bench(out), facts


def test_a_pair_table_becomes_a_bench(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.parquet")
    made, facts = read_from("pairs", path, tmp_path / "bench", panel=("edges",), limit=20)
    assert len(made.items) == 20
    assert {item.scenario for item in made.items} == {"overall"}
    tied = [item for item in made.items if item.label == -1]
    assert tied
    assert not any(item.agreed for item in tied)
    assert all((item.difficulty is not None) == item.agreed for item in made.items)
    found = run(BenchConfig(bench=tmp_path / "bench", rewards=("jpeg_compressibility",)))
    assert found.standings[0].pairs == len(made.counted())
    assert facts["label_truth"] == {}


def test_scored_files_are_joined_by_id(tmp_path: Path) -> None:
    folder = tmp_path / "scored"
    folder.mkdir()
    rows = [{"id": i, "caption": f"c{i}", "label": label} for i, label in enumerate("0110")]
    rows[3]["label"] = "tie"
    first = [{**row, "score_0": 1.0, "score_1": i} for i, row in enumerate(rows)]
    second = [{**row, "prob_0": 0.2, "prob_1": 0.8} for row in rows[:3]]
    second[2] |= {"prob_1": "not a number"}
    second.append({"id": 9, "caption": "x", "label": "?", "prob_0": 1, "prob_1": 0})
    (folder / "one.json").write_text(json.dumps(first))
    (folder / "two.json").write_text(json.dumps(second))
    made, facts = read_from("scored", folder, tmp_path / "bench")
    assert [item.label for item in made.items] == [0, 1, 1, -1]
    assert made.items[1].given == {"one": (1.0, 1.0), "two": (0.2, 0.8)}
    assert sum(facts["set_aside"].values()) == 2
    found = {s.reward: s for s in run(BenchConfig(bench=tmp_path / "bench")).standings}
    assert found["given:one"].overall.value == pytest.approx((1 + 0.5 + 1) / 3)
    assert (found["given:two"].overall.value, found["given:two"].pairs) == (0.5, 2)
    assert found["given:two"].set_aside == {"the files hold no score of it": 1}
    with pytest.raises(InputError, match="ships no pictures"):
        run(BenchConfig(bench=tmp_path / "bench", rewards=("edges",)))


def test_two_opinions_become_two_scenarios(tmp_path: Path) -> None:
    lines = ["name,prompt,mos_quality,mos_align"]
    lines += ["a.png,cat,3,1", "b.png,cat,2,2", "c.png,cat,1,1", "d.png,dog,1,x", "e.png,dog,2,2"]
    lines += ["f.png,dog,nan,2", "g.png,dog,2,inf"]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    for seed, name in enumerate("abc"):
        (tmp_path / f"{name}.png").write_bytes(picture(seed))
    made, facts = read_from("agiqa", tmp_path, tmp_path / "bench", images=tmp_path)
    labels = {item.id: item.label for item in made.items}
    assert labels == {
        "alignment-a.png-b.png": 1,
        "quality-a.png-b.png": 0,
        "alignment-a.png-c.png": -1,
        "quality-a.png-c.png": 0,
        "alignment-b.png-c.png": 0,
        "quality-b.png-c.png": 0,
    }
    assert facts["set_aside"] == {"an opinion is no number": 3}
    assert made.items[0].first == picture(0)
    found = {s.reward: s for s in run(BenchConfig(bench=tmp_path / "bench")).standings}
    assert found["given:quality"].scenarios["alignment"].value == 0.5


def test_workers_are_judges(tmp_path: Path) -> None:
    lines = ["t2i_model,item_id,source_id,worker_id,answer"]
    for worker, one, two in (("w1", 5, 1), ("w2", 4, 3), ("w3", 2, 4)):
        lines += [f"m1,t1,s1,{worker},{one}", f"m2,t1,s1,{worker},{two}"]
        lines += [f"m1,t2,s1,{worker},nan", f"m2,t2,s1,{worker},5"]  # nan would win every time
    lines += ["m3,t1,s1,w9,3", "m3,t1,s1,w1,?"]
    (tmp_path / "tifa160-likert-anns.csv").write_text("\n".join(lines))
    (tmp_path / "tifa160-dev-anns.csv").write_text("item_id,text\ns1,a cat\n")
    (tmp_path / "m1").mkdir()
    (tmp_path / "m1" / "t1.jpg").write_bytes(picture(1))
    made, facts = read_from("tifa", tmp_path, tmp_path / "bench", images=tmp_path)
    (item,) = made.items
    assert (item.prompt, item.judges, item.label, item.agreed) == ("a cat", (0, 0, 1), 0, True)
    assert (item.first, item.second) == (picture(1), None)
    assert facts["set_aside"] == {"the answer is no number": 4, "no worker rated both pictures": 2}
    with pytest.raises(InputError, match="a pair on which judges agree"):
        read_from("tifa", tmp_path, tmp_path / "strict", agree=3)


def test_parquet_layouts_of_public_benches(tmp_path: Path) -> None:
    good, bad = picture(1), picture(2)
    rows = [
        {"prompt": "a", "left_image": {"bytes": good, "path": None}, "vote": "leftvote"},
        {"prompt": "b", "left_image": {"bytes": good, "path": None}, "vote": "bothbad_vote"},
        {"prompt": "c", "left_image": {"bytes": good, "path": None}, "vote": "upvote"},
        {"prompt": "d", "left_image": None, "vote": "rightvote"},
    ]
    for row in rows:
        row |= {"right_image": {"bytes": bad, "path": None}, "vote_type": row.pop("vote")}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test_v1-0.parquet")
    made, facts = read_from("genai", tmp_path, tmp_path / "genai")
    assert [(item.prompt, item.label) for item in made.items] == [("a", 0), ("b", -1)]
    assert sum(facts["set_aside"].values()) == 2
    rows = [
        {"caption": "a", "image0": good, "image1": bad, "label": 0},
        {"caption": "b", "image0": good, "image1": bad, "label": 1},
        {"caption": "c", "image0": good, "image1": bad, "label": 7},
    ]
    folder = tmp_path / "mj"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "safety.parquet")
    pq.write_table(pa.Table.from_pylist([{**rows[0], "category": "Quality"}]), folder / "x.parquet")
    made, _ = read_from("mjbench", folder, tmp_path / "mjbench")
    assert [(item.scenario, item.label) for item in made.items] == [
        ("safety", 0),
        ("safety", 1),
        ("quality", 0),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_that_is_not_there_is_told(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        read_from(kind, tmp_path / "nowhere", tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


def test_every_kind_says_what_it_reads() -> None:
    assert [kind for kind, _ in described()] == list(KINDS)
    assert all(line.endswith(".") for _, line in described())


# ---- the command line, and what else came with it ------------------------------------------------


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_commands_from_nothing_to_a_leaderboard(runner: CliRunner, tmp_path: Path) -> None:
    out = str(tmp_path / "bench")
    options = ["--pairs", "4", "--scenarios", "counts,conflict", "--panel", "edges", "--agree", "3"]
    made = runner.invoke(app, ["reward", "bench-build", out, *options])
    assert made.exit_code == 0, made.exception
    assert re.search(r"\d of 4 pairs count  conflict", made.output)
    shown = runner.invoke(app, ["reward", "bench", out, "--rewards", "oracle,edges"])
    assert shown.exit_code == 0, shown.exception
    lines = shown.stdout.splitlines()
    assert lines[1].split("\t")[:2] == ["reward", "macro mean"]
    assert lines[2].startswith("oracle\t1\t1.000 [")
    assert lines[-1] == str(tmp_path / "bench" / "leaderboard.html")
    copied = runner.invoke(
        app, ["reward", "bench-read", "pairs", f"{out}/{ITEMS}", "--out", f"{out}2"]
    )
    assert copied.exit_code == 0, copied.exception
    kinds = runner.invoke(app, ["reward", "bench-kinds"])
    assert len(kinds.output.splitlines()) == len(KINDS)


def test_outside_code_may_be_handed_a_path() -> None:
    reward: Any = load_reward("fifa.rewards.nuisance:Saturation")
    assert reward.name == "saturation"
    with pytest.raises(InputError, match="path"):
        load_reward("fifa.rewards.nuisance:Saturation:somewhere")
    with pytest.raises(InputError, match="holds nothing fitted"):
        load_reward("fifa.rewards.fitted:FittedReward:nowhere/at all")


@pytest.mark.parametrize("name", ["saturation", "brightness", "contrast", "edges"])
def test_nuisance_rewards_are_the_measures(name: str) -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    column = measure(images)[:, NUISANCES.index(name)]
    assert torch.equal(load_reward(name)(images, [""] * 3), column)
