"""One number an image: worked by hand, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from d3po.advantage import LIMIT, advantages, combined, labels


def test_judges_of_different_units_count_the_same() -> None:
    scores = np.array([[1.0, 100.0], [3.0, 100.0], [2.0, 400.0]])
    mean, std = scores.mean(0), scores.std(0)
    # z-scores: -a, a, 0 with a = sqrt(3/2); -b, -b, 2b with b = 1/sqrt(2)
    a, b = math.sqrt(1.5), math.sqrt(0.5)
    expected = [(-a - b) / 2, (a - b) / 2, b]
    assert combined(scores, mean, std) == pytest.approx(expected)
    grams = scores * [1.0, 0.001]
    assert combined(grams, grams.mean(0), grams.std(0)) == pytest.approx(expected)


def test_a_judge_without_an_opinion_says_nothing() -> None:
    scores = np.array([[1.0, 7.0], [3.0, 7.0]])
    assert combined(scores, scores.mean(0), scores.std(0)).tolist() == [-0.5, 0.5]


def test_an_image_is_compared_with_its_prompt_or_with_the_round() -> None:
    values = np.array([0.0, 2.0, 0.0, -2.0, 0.0, 0.0])  # a good prompt, a bad one, one without
    assert advantages(values, 2, "prompt", 1.0).tolist() == [-1, 1, 1, -1, 0, 0]
    std = values.std()
    assert advantages(values, 2, "round", std) == pytest.approx(values / std)
    assert advantages(values * 0, 2, "round", 0.0).tolist() == [0.0] * 6


def test_a_picture_without_a_judgment_counts_for_nobody() -> None:
    values = np.array([0.0, 2.0, math.nan, math.nan, math.nan, math.nan])
    assert advantages(values, 3, "prompt", 1.0).tolist() == [-1, 1, 0, 0, 0, 0]
    assert advantages(values, 3, "round", 2.0).tolist() == [0, 1, 0, 0, 0, 0]


def test_an_advantage_is_cut_at_the_published_limit() -> None:
    values = np.array([0.0] * 99 + [1.0])
    assert advantages(values, 100, "prompt", 1.0).max() == LIMIT  # (1 - 0.01) / 0.0995 = 9.95


def test_labels_are_signs_and_a_tie_has_none() -> None:
    equal = np.full(3, 0.1) + np.array([0.0, 1e-17, -1e-17])
    assert labels(advantages(equal, 3, "prompt", 1.0)).tolist() == [0.0] * 3
    assert labels(np.array([0.4, -2.0, 1e-9])).tolist() == [1.0, -1.0, 0.0]
