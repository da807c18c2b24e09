"""Warnings appear when a number is off, once, and not before there is enough to average."""

from __future__ import annotations

import pytest

from d3po.health import RULES, Health, compare_diversity, compare_judges

GOOD = {
    "accuracy": 0.7,
    "clipped": 0.1,
    "win_ratio": 0.1,
    "lose_ratio": -0.1,
    "grad_norm": 1.0,
    "tied": 0.2,
}
BAD = {
    "prefers losers": {"accuracy": 0.3},
    "clipped": {"clipped": 0.9},
    "winner sinks": {"win_ratio": -0.5, "lose_ratio": -0.6},
    "ties": {"tied": 0.8},
}


def test_a_good_run_is_left_in_peace() -> None:
    health = Health(window=3)
    assert [health.look(GOOD) for _ in range(20)] == [[]] * 20


@pytest.mark.parametrize("rule", BAD)
def test_a_bad_number_is_told_once_with_its_value(rule: str) -> None:
    health = Health(window=3)
    told = [health.look({**GOOD, **BAD[rule]}) for _ in range(6)]
    (value, *_) = BAD[rule].items()
    assert told[:2] == [[], []]
    assert told[2] == [RULES[rule].words.format(**{**GOOD, **BAD[rule]})]
    assert told[3:] == [[]] * 3
    assert value[0] in RULES[rule].words


def test_it_is_told_again_after_it_had_passed() -> None:
    health = Health(window=1)
    rows = [{"clipped": 0.9}, {}, {"clipped": 0.9}]
    assert [len(health.look({**GOOD, **row})) for row in rows] == [1, 0, 1]


def test_a_gradient_ten_times_the_first_is_told() -> None:
    health = Health(window=2)
    norms = [1.0, 1.0, 5.0, 30.0]
    assert [bool(health.look({**GOOD, "grad_norm": norm})) for norm in norms] == [0, 0, 0, 1]


def test_rows_without_a_rollout_have_no_ties() -> None:
    health = Health(window=1)
    assert health.look({k: v for k, v in GOOD.items() if k != "tied"}) == []


def test_a_gain_by_the_proxy_and_a_loss_by_another_is_told() -> None:
    assert len(compare_judges({"mini": (0.1, 0.2), "oracle": (-0.3, -0.1)})) == 1
    assert compare_judges({"mini": (0.1, 0.2), "oracle": (-0.3, 0.1)}) == []
    assert compare_judges({"mini": (-0.1, 0.2), "oracle": (-0.3, -0.1)}) == []
    assert compare_judges({"mini": (0.1, 0.2)}) == []


def test_collapse_is_told() -> None:
    assert len(compare_diversity(0.1, 0.3)) == 1
    assert compare_diversity(0.2, 0.3) == []
