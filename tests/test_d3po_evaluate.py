"""Intervals against scipy, verdicts on worked examples, and pictures that depend on seeds alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from d3po.evaluate import (
    EvalConfig,
    Evaluator,
    PromptResult,
    _check_finite,
    before_after,
    bootstrap_mean,
    compare,
    judge_result,
    mean_distance,
    measure,
    sentence,
    wilson,
)
from d3po.families import load_family
from d3po.generate import SamplerConfig
from d3po.policy import Policy, PolicyConfig
from d3po.run import Run, RunConfig
from fifa.config import InputError
from fifa.images import decode
from fifa.rewards import load_reward

PROMPTS = ["a red circle", "two blue squares", "a star"]
SAMPLER = SamplerConfig(steps=2, guidance=2.0, batch=4)
REWARDS = [load_reward("jpeg_compressibility"), load_reward("jpeg_incompressibility")]


@pytest.fixture
def policy(tiny_sd: Path) -> Policy:
    """A policy away from its reference."""
    policy = Policy(load_family(tiny_sd), PolicyConfig())
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.3)
    return policy


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(RunConfig(dir=str(tmp_path / "run")))
    run.open(run.config)
    yield run
    run.close()


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (3, 7), (50, 100), (12, 12), (1, 1)])
def test_wilson_is_scipys(wins: int, count: int) -> None:
    interval = scipy.stats.binomtest(wins, count).proportion_ci(method="wilson")
    assert wilson(wins, count) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_the_bootstrap_is_scipys_up_to_its_draws() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=60)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    low, high = bootstrap_mean(values, seed=0)
    width = expected.high - expected.low
    assert abs(low - expected.low) < 0.05 * width
    assert abs(high - expected.high) < 0.05 * width
    assert bootstrap_mean(values, seed=0) == (low, high)


def test_mean_distance_is_the_mean_over_pairs() -> None:
    items = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    couples = itertools.combinations(items.double(), 2)
    pairs = [math.sqrt(float(((a - b) ** 2).mean())) for a, b in couples]
    assert mean_distance(items) == pytest.approx(sum(pairs) / 6)
    assert math.isnan(mean_distance(items[:1]))


def test_a_verdict_worked_out_by_hand() -> None:
    policy = np.array([[1.0, 2.0], [3.0, 0.0]])
    reference = np.array([[0.0, 2.0], [1.0, 1.0]])
    result = judge_result("x", policy, reference, seed=0)
    assert (result.wins, result.losses, result.ties) == (2, 1, 1)
    assert (result.policy, result.reference, result.difference) == (1.5, 1.0, 0.5)
    assert result.difference_interval == (0.5, 0.5)  # both prompts gain 0.5
    assert result.win_rate == pytest.approx(2 / 3)
    assert result.win_rate_interval == wilson(2, 3)
    assert sentence(result) == (
        "x 1 -> 1.5 (+0.5, 95% +0.5 to +0.5), wins 67% (21% to 94%), 1 ties"
    )


def test_all_ties_have_no_win_rate() -> None:
    result = judge_result("x", np.zeros((2, 2)), np.zeros((2, 2)), seed=0)
    assert (result.win_rate, result.win_rate_interval, result.ties) == (None, None, 4)
    assert sentence(result).endswith("all ties")


def test_prompts_are_resampled_and_not_pictures() -> None:
    # 2 prompts, 50 pictures each, all the same within a prompt: there are 2 observations, not 100
    policy = np.repeat([[0.0], [1.0]], 50, axis=1)
    low, high = judge_result("x", policy, np.zeros((2, 50)), seed=0).difference_interval
    assert (low, high) == (0.0, 1.0)


def test_pictures_depend_on_prompt_and_seed_alone(policy: Policy) -> None:
    whole = measure(policy.family, policy.bare, SAMPLER, REWARDS, PROMPTS, 2, seed=7)
    batches = SAMPLER.model_copy(update={"batch": 1})
    alone = measure(policy.family, policy.bare, batches, REWARDS, PROMPTS, 2, seed=7, rows=[1, 2])
    assert [result.scores.shape for result in whole] == [(2, 2)] * 3
    for one, other in zip(whole[1:], alone, strict=True):
        assert np.allclose(one.scores, other.scores, atol=0.05)  # a rounded pixel is some bytes
        assert one.latent_distance == pytest.approx(other.latent_distance, rel=1e-3)
    other_seed = measure(policy.family, policy.bare, SAMPLER, REWARDS, PROMPTS, 2, seed=8)
    assert whole[0].latent_distance != pytest.approx(other_seed[0].latent_distance, rel=1e-6)


def test_scores_are_those_of_the_pictures(policy: Policy) -> None:
    from fifa.images import encode_jpeg

    (result,) = measure(
        policy.family,
        policy.bare,
        SAMPLER,
        REWARDS,
        PROMPTS[:1],
        2,
        seed=7,
        keep_pictures=lambda row: True,
    )
    kilobytes = [len(encode_jpeg(picture, 95)) / 1000 for picture in result.pictures]
    assert result.scores[:, 1] == pytest.approx(kilobytes, rel=1e-3)
    assert result.scores[:, 0] == pytest.approx([-size for size in kilobytes], rel=1e-3)


def test_an_untrained_policy_ties_with_its_reference(tiny_sd: Path) -> None:
    policy = Policy(load_family(tiny_sd), PolicyConfig())
    ours = measure(policy.family, policy.bare, SAMPLER, REWARDS, PROMPTS, 2, seed=7)
    with policy.reference():
        theirs = measure(policy.family, policy.bare, SAMPLER, REWARDS, PROMPTS, 2, seed=7)
    result = compare(ours, theirs, ["a", "b"], seed=7)
    assert [judge.ties for judge in result.judges] == [6, 6]
    assert result.pixel_diversity[0] == result.pixel_diversity[1] > 0


def test_pictures_that_are_nan_are_told_before_they_are_judged() -> None:
    images = torch.zeros(3, 3, 4, 4)
    _check_finite(images)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"1 of 3 pictures to be judged are NaN: the network"):
        _check_finite(images)


def test_a_grid_has_the_reference_above_the_policy() -> None:
    def shown(value: int) -> PromptResult:
        pictures = [np.full((8, 8, 3), value + k, dtype=np.uint8) for k in range(2)]
        return PromptResult(np.zeros((2, 1)), 0.0, 0.0, pictures)

    hidden = PromptResult(np.zeros((2, 1)), 0.0, 0.0, [])
    picture = before_after(["a", "b"], [shown(100), hidden], [shown(50), hidden], scale=1)
    column = picture[:, 4 + 4, 0].tolist()  # down the middle of the only column
    values = [v for v in column if v in (50, 51, 100, 101)]
    assert [key for key, _ in itertools.groupby(values)] == [50, 100, 51, 101]


def test_the_evaluator_writes_numbers_and_a_grid(
    policy: Policy, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvalConfig(
        prompts="x", images=2, grid_prompts=2, judges=("compressibility", "incompressibility")
    )
    evaluator = Evaluator(config, SAMPLER, policy.family, policy, REWARDS, PROMPTS, run)
    calls: list[bool] = []
    policy.bare.register_forward_pre_hook(lambda *_: calls.append(True))
    first = evaluator(0)
    drawn = len(calls)
    second = evaluator(10)
    assert len(calls) == 2 * drawn  # the reference is not drawn again
    assert first.judges[0].ties == 6
    assert second.judges[0].difference == pytest.approx(-second.judges[1].difference, rel=1e-4)
    assert second.judges[0].difference != 0
    lines = [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]
    rows = [row for row in lines if row["kind"] == "eval"]  # health may have had something to say
    assert [(row["step"], row["prompts"]) for row in rows] == [(0, 3), (10, 3)]
    assert rows[1]["judges"]["compressibility"]["policy"] == second.judges[0].policy
    grid = decode((run.folder.samples / "step-000010.png").read_bytes(), "grid")
    assert grid.shape[1] > 2 * 2 * 64
    assert json.loads(second.to_json())["judges"][0]["judge"] == "compressibility"
    assert "evaluation at step 10: compressibility" in capsys.readouterr().out
