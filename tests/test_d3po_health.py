"""Warnings appear when a number is off, once, and not before there is enough to tell."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from d3po.health import CHECKS, Health, HealthConfig
from d3po.health.pictures import TONES, correlation, group_sums, picture_metrics, spread, tone
from d3po.health.verdicts import spent, z_of, z_of_share

BETA = 10.0
GOOD = {
    "loss": 0.6,
    "accuracy": 0.7,
    "margin": 2.0,
    "clipped": 0.1,
    "win_ratio": 0.1,
    "lose_ratio": -0.1,
    "grad_norm": 1.0,
    "skipped": 0.0,
}
BAD = {
    "order": {"accuracy": 0.3},
    "clipped": {"clipped": 0.9},
    "sinking": {"win_ratio": -0.5, "lose_ratio": -0.6},
    "runaway": {"win_ratio": 9.0, "lose_ratio": 8.8},
    "by heart": {"margin": 20.0, "accuracy": 0.99},
}


def health(**settings: Any) -> Health:
    return Health(HealthConfig(**{"window": 3, "rounds": 2, **settings}), BETA)


def told(follower: Health, kind: str, *rows: dict[str, Any]) -> list[list[str]]:
    return [[c.check for c in follower.see(kind, i + 1, row)] for i, row in enumerate(rows)]


# ---- updates ------------------------------------------------------------------------------------


def test_a_good_run_is_left_in_peace() -> None:
    assert told(health(), "update", *[GOOD] * 20) == [[]] * 20


@pytest.mark.parametrize("check", BAD)
def test_a_bad_number_is_told_once_with_its_value(check: str) -> None:
    follower = health()
    found = [follower.see("update", i, {**GOOD, **BAD[check]}) for i in range(6)]
    assert [[c.check for c in own] for own in found] == [[], [], [check], [], [], []]
    (words,) = [complaint.words for complaint in found[2]]
    assert "{" not in words
    assert any(sign in words for sign in ("lower", "stop earlier"))  # a remedy


def test_it_is_told_again_after_it_had_passed() -> None:
    rows = [{**GOOD, "clipped": c} for c in (0.9, 0.9, 0.9, 0.0, 0.9, 0.9, 0.9)]
    assert [bool(own) for own in told(health(), "update", *rows)] == [0, 0, 1, 0, 0, 0, 1]


def test_a_gradient_ten_times_the_first_is_told() -> None:
    rows = [{**GOOD, "grad_norm": norm} for norm in (1, 1, 1, 1, 1, 5, 30, 30, 30)]
    rows = [{**row, "grad_norm": float(row["grad_norm"])} for row in rows]
    assert told(health(), "update", *rows) == [[]] * 7 + [["gradient"], []]


def test_a_low_share_that_scatters_is_no_finding() -> None:
    rows = [{**GOOD, "accuracy": a} for a in (0.0, 0.9, 0.3)]
    assert told(health(), "update", *rows) == [[], [], []]


def test_skipped_steps_name_the_cause() -> None:
    broken = {**GOOD, "grad_norm": math.nan, "skipped": 1.0}
    assert (
        told(health(), "update", broken, broken, GOOD, GOOD) == [[]] * 4
    )  # fp16 looks for a scale
    (words,) = [c.words for c in [health_after(broken)][0]]
    assert "latents" in words
    grown = [{**GOOD, "grad_norm": g} for g in (1.0, 1.0, 50.0)]
    (words,) = [c.words for c in health_after(broken, *grown)]
    assert "learning rate" in words


def health_after(last: dict[str, Any], *before: dict[str, Any]) -> list[Any]:
    follower = health()
    for row in [*before, last, last]:
        follower.see("update", 0, row)
    return follower.see("update", 0, last)


def test_an_objective_without_pairs_is_judged_by_what_it_has() -> None:
    bare = {"loss": 0.1, "grad_norm": 1.0, "skipped": 0.0}
    assert told(health(), "update", *[bare] * 5) == [[]] * 5
    rows = [*[bare] * 5, *[{**bare, "grad_norm": 20.0}] * 3]
    assert told(health(), "update", *rows)[-2:] == [["gradient"], []]


def test_updates_without_a_pair_are_passed_over() -> None:
    nothing = {"pairs": 0.0, "skipped": 0.0}
    bad = {**GOOD, "clipped": 0.9}
    assert told(health(), "update", bad, nothing, bad, nothing, bad)[-1] == ["clipped"]


# ---- pictures -----------------------------------------------------------------------------------


def test_tone_of_known_colours() -> None:
    colours = [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.2, 0.4, 0.6]]
    images = torch.tensor(colours)[:, :, None, None].expand(4, 3, 5, 7)
    weighted = [0.0, 1.0, 0.2126, 0.2 * 0.2126 + 0.4 * 0.7152 + 0.6 * 0.0722]
    assert np.allclose(tone(images)[:, 0], weighted, atol=1e-6)
    assert np.allclose(tone(images)[:, 1], [0, 0, 1, 0.4], atol=1e-6)


def test_spread_and_correlation_against_numpy_and_scipy() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(5, 4, 3, 3))
    expected = math.sqrt(np.mean((latents - latents.mean(0)) ** 2))
    assert spread(torch.from_numpy(latents)) == pytest.approx(expected, rel=1e-6)
    a, b = rng.normal(size=(2, 8))
    assert correlation(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert correlation(a, np.ones(8)) is None


def test_group_sums_add_up_over_processes() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 4, 4, generator=generator)
    latents = torch.randn(12, 4, 2, 2, generator=generator)
    scores = np.random.default_rng(1).normal(size=12)
    scores[[5, 6]] = np.nan
    whole = picture_metrics(group_sums(images, latents, scores, 3))
    parts = [
        group_sums(images[i : i + k], latents[i : i + k], scores[i : i + k], k // 4)
        for i, k in ((0, 4), (4, 8))
    ]
    assert picture_metrics(np.sum(parts, 0).tolist()) == pytest.approx(
        {**whole, "follows": pytest.approx(whole["follows"])}
    )
    assert whole["not_finite"] == pytest.approx(2 / 12)
    kept = np.isfinite(scores)
    assert whole["brightness"] == pytest.approx(tone(images)[kept, 0].mean())
    groups = [[0, 1, 2, 3], [4, 7], [8, 9, 10, 11]]
    assert whole["diversity"] == pytest.approx(np.mean([spread(latents[own]) for own in groups]))
    bright = tone(images)[:, 0]
    followed = [stats.pearsonr(scores[g], bright[g]).statistic for g in (groups[0], groups[2])]
    assert whole["follows"]["brightness"] == pytest.approx(np.mean(followed))


ROUND = {
    "brightness": 0.5,
    "saturation": 0.3,
    "diversity": 1.0,
    "follows": {"brightness": 0.2, "saturation": -0.3},
    "not_finite": 0.0,
    "tied": 0.2,
}


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("shortcut", {"follows": {"brightness": 0.97, "saturation": 0.1}}),
        ("shortcut", {"follows": {"brightness": None, "saturation": -0.95}}),
        ("ties", {"tied": 0.95}),
        ("tone", {"brightness": 0.8}),
        ("tone", {"saturation": 0.02}),
        ("diversity", {"diversity": 0.4}),
    ],
)
def test_rounds_that_change(check: str, change: dict[str, Any]) -> None:
    good = [ROUND, {**ROUND, "brightness": 0.51, "saturation": 0.31, "diversity": 1.01}]
    assert told(health(), "round", *good * 3) == [[]] * 6
    found = told(health(), "round", *good, *[{**row, **change} for row in good])
    assert found == [[], [], [], [check]]


def test_a_drift_within_the_scatter_is_none() -> None:
    rows = [{**ROUND, "brightness": b} for b in (0.3, 0.7, 0.45, 0.85)]
    assert told(health(), "round", *rows) == [[]] * 4


def test_latents_that_are_not_finite_are_told_at_once() -> None:
    nothing = {"not_finite": 1.0, "brightness": math.nan, "diversity": math.nan, "tied": 1.0}
    assert told(health(), "round", nothing, nothing) == [["nan"], []]


# ---- comparisons --------------------------------------------------------------------------------


def verdict(**judges: tuple[float, float]) -> dict[str, Any]:
    """An evaluation of these judges, (difference, its standard error)."""
    rows = {
        name: {
            "difference": mean,
            "difference_interval": [mean - 1.959964 * error, mean + 1.959964 * error],
            "policy": 1 + mean,
            "reference": 1.0,
            "wins": 3,
            "losses": 2,
        }
        for name, (mean, error) in judges.items()
    }
    same = {"policy": 0.3, "reference": 0.3}
    return {
        "prompts": 32,
        "judges": rows,
        "pixel_diversity": same,
        "brightness": same,
        "saturation": same,
    }


def test_over_optimisation_needs_a_rise_and_a_clear_fall() -> None:
    for second, expected in (((-0.5, 0.1), ["exploited"]), ((-0.2, 0.1), []), ((0.5, 0.1), [])):
        assert told(health(), "eval", verdict(mini=(0.5, 0.1), oracle=second)) == [expected]
    # the proxy did not clearly rise: something else is wrong, not this
    assert told(health(), "eval", verdict(mini=(0.1, 0.1), oracle=(-0.5, 0.1))) == [[]]


def test_a_worse_judge_is_a_wrong_sign() -> None:
    (complaint,) = health().see("eval", 9, verdict(mini=(-0.5, 0.1), oracle=(-0.5, 0.1)))
    assert complaint.check == "worse"
    assert "wrong sign" in complaint.words
    assert told(health(), "eval", verdict(mini=(-0.25, 0.1))) == [[]]  # 2.5 errors, 1 look


def test_a_handful_of_prompts_raises_no_alarm() -> None:
    row = {**verdict(mini=(-0.5, 0.01)), "prompts": 3}
    assert told(health(), "eval", row) == [[]]


def test_an_evaluation_of_equal_networks_is_no_look() -> None:
    row = verdict(mini=(0.0, 0.0))
    row["judges"]["mini"] |= {"wins": 0, "losses": 0}
    follower = health(alarm_rate=0.05)
    assert told(follower, "eval", *[row] * 50) == [[]] * 50
    # as strict as at the first look: 3 errors are enough for alarm_rate 0.05
    assert told(follower, "eval", verdict(mini=(-0.3, 0.1))) == [["worse"]]


def test_collapse_and_tone_of_an_evaluation() -> None:
    row = {**verdict(mini=(0.5, 0.1)), "pixel_diversity": {"policy": 0.1, "reference": 0.3}}
    assert told(health(), "eval", row) == [["diversity"]]
    row = {**verdict(mini=(0.5, 0.1)), "brightness": {"policy": 0.8, "reference": 0.5}}
    assert told(health(), "eval", row) == [["tone"]]


def test_spending_adds_up_to_the_alarm_rate() -> None:
    """All looks together, and in a simulation of runs in which nothing ever changes."""
    total = sum(stats.norm.sf(spent(0.01, look, 1)) for look in range(1, 20000))
    assert total == pytest.approx(0.01, rel=1e-3)
    assert spent(0.01, 1, 4) == pytest.approx(stats.norm.isf(0.01 * 6 / math.pi**2 / 4))
    rng = np.random.default_rng(0)
    limits = np.array([spent(0.05, look, 1) for look in range(1, 31)])
    false = (rng.normal(size=(20000, 30)) < -limits).any(1).mean()
    assert 0.035 < false < 0.055


def test_z_values() -> None:
    assert z_of(0.3, (0.3 - 1.959964 * 0.1, 0.3 + 1.959964 * 0.1)) == pytest.approx(3, rel=1e-5)
    assert z_of_share(0.4, 100) == pytest.approx((40 - 50) / math.sqrt(100 * 0.25))


@pytest.mark.parametrize(
    ("accuracy", "pairs", "expected"), [(0.3, 100, ["held out"]), (0.45, 100, []), (0.1, 10, [])]
)
def test_held_out_pairs_in_the_wrong_order(accuracy: float, pairs: int, expected: Any) -> None:
    assert told(health(), "held_out", {"accuracy": accuracy, "pairs": pairs}) == [expected]


@pytest.mark.parametrize(
    ("agreement", "expected"),
    [
        ({"oracle": 0.3, "mini": 0.35}, ["labels"]),
        ({"oracle": 0.3, "mini": 0.6}, []),  # judges of another taste prove nothing
        ({"oracle": 0.45}, []),
    ],
)
def test_labels_against_judges(agreement: dict[str, float], expected: list[str]) -> None:
    assert told(health(), "labels", {"pairs": 200, "agreement": agreement}) == [expected]


# ---- stopping and going on ----------------------------------------------------------------------


def test_only_named_checks_stop_a_run() -> None:
    rows = [{**GOOD, "clipped": 0.9}] * 3
    for stop, stopped in ((False, None), (True, "clipped"), (("nan",), None)):
        follower = health(stop=stop)
        told(follower, "update", *rows)
        assert (follower.stopped.check if follower.stopped else None) == stopped
        assert follower.over() == (stopped is not None)
    with pytest.raises(ValidationError, match="no check is called 'cliped', known are nan, "):
        HealthConfig(stop=("cliped",))


def test_a_checkpoint_is_good_once_a_healthy_window_has_followed() -> None:
    follower = health()
    rows = [GOOD] * 8 + [{**GOOD, "clipped": 1.0}] * 8
    assert [own for own in told(follower, "update", *rows) if own] == [["clipped"]]
    # updates 9, 10 and 11 are clipped: the average of the last three is above 0.8 at update 11
    assert [step for step in range(1, 17) if follower.good(step)] == list(range(1, 8))
    assert follower.to_keep([2, 4, 6, 8, 10]) == []  # it is not asked to stop
    follower.config = HealthConfig(stop=True, window=3)
    assert follower.to_keep([2, 4, 6, 8, 10]) == [6, 8]
    assert follower.to_keep([12, 13]) == [12]


def test_replayed_lines_leave_the_same_state_and_do_not_stop() -> None:
    lines = [{"kind": "round", "step": 0, **ROUND}]
    lines += [{"kind": "update", "step": i + 1, **GOOD, "clipped": 1.0} for i in range(5)]
    live, again = health(stop=True), health(stop=True)
    first = [(r["step"], c) for r in lines for c in live.see(r["kind"], r["step"], r)]
    assert again.replay(lines) == first
    assert len(first) == 1
    assert live.over()
    assert not again.over()
    bad = {**GOOD, "accuracy": 0.2}
    assert told(live, "update", *[bad] * 4) == told(again, "update", *[bad] * 4)


def test_every_check_is_in_the_table() -> None:
    import d3po.health.pictures
    import d3po.health.rules
    import d3po.health.verdicts

    named = set(d3po.health.rules.RULES)
    for module in (d3po.health.rules, d3po.health.pictures, d3po.health.verdicts):
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        named |= {check for check in CHECKS if f'"{check}",' in source}
    assert named == set(CHECKS)
    assert TONES == ("brightness", "saturation")
