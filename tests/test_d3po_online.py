"""Rollouts, judges and pairs: who wins, what is scored how often, and that chunks do not matter."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from d3po.draws import derive_seed, shuffled
from d3po.families import guided, load_family
from d3po.families.conditioning import Conditioning
from d3po.generate import Order, SamplerConfig, generate
from d3po.judging import FileJudge, Judge, Place, RewardJudge, Scores, strict_pairs
from d3po.losses import BoundObjective, ObjectiveConfig
from d3po.online import OnlineSource
from d3po.online.settings import OnlineConfig, groups_per_update, trained_steps
from d3po.policy import Policy, PolicyConfig
from d3po.run import Run, RunConfig
from d3po.schedule import TimeGrid
from d3po.trainer import Learner, OptimConfig, train_step
from d3po.updates import Chunk
from fifa.config import InputError
from fifa.rewards import Reward, load_reward

PROMPTS = ["a red circle", "a blue square", "two small green triangles", "a white star", "a circle"]
SAMPLER = SamplerConfig(steps=3, guidance=2.0, batch=4)

# scores of the 4 groups of a round: 3 pairs, 2 pairs and one idle image by a tie, none, 3 pairs
LABELS = [[2.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 2.0]]
PAIRS = [[(0, 1), (0, 2), (1, 2)], [(0, 1), (0, 2)], [], [(1, 0), (2, 0), (2, 1)]]


def judge_by_table(images: Tensor, prompts: Sequence[str], places: Sequence[Place]) -> Scores:
    return np.array([score for place in places for score in LABELS[place.group]])[:, None]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(RunConfig(dir=str(tmp_path / "run"), seed=5))
    yield run
    run.close()


Start = Callable[..., tuple[Learner, OnlineSource]]


@pytest.fixture
def start(tiny_sd: Path, run: Run) -> Start:
    """A learner away from its reference, on gradient descent, and a source of 4 groups of 3."""

    def make(judge: Judge = judge_by_table, **settings: Any) -> tuple[Learner, OnlineSource]:
        optim = OptimConfig(
            learning_rate=settings.pop("learning_rate", 1.0),
            micro_batch=settings.pop("micro_batch", 4),
            accumulation=settings.pop("accumulation", 1),
            max_grad_norm=None,
        )
        sampler = settings.pop("sampler", SAMPLER)
        config = OnlineConfig(**{"groups": 4, "images": 3, **settings})
        family = load_family(tiny_sd)
        policy = Policy(family, PolicyConfig())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in policy.trainable():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        sgd = torch.optim.SGD(policy.trainable(), lr=1.0)
        policy.denoiser, wrapped = run.accelerator.prepare(policy.bare, sgd)
        objective = BoundObjective.from_config(ObjectiveConfig(name="dpo", beta=50.0))
        source = OnlineSource(
            config, sampler, optim, family, policy, judge, ["judge"], PROMPTS, run
        )
        return Learner(policy, wrapped, objective, optim), source

    return make


def gradients(learner: Learner, source: OnlineSource, run: Run) -> list[Tensor]:
    """The gradient of each update of round 0 at the weights it starts from, in float64.

    The rollout is float32, as ever; what is learned from it is scored in float64.
    """
    policy, found = learner.policy, []
    policy.bare.double()
    for update in source.round(0).updates:
        before = [p.detach().clone() for p in policy.trainable()]
        train_step(learner, replace(update, chunks=[doubled(c) for c in update.chunks]), run, 0)
        moved = [b - p.detach() for b, p in zip(before, policy.trainable(), strict=True)]
        found.append(torch.cat([part.flatten() for part in moved]))
        with torch.no_grad():
            for p, b in zip(policy.trainable(), before, strict=True):
                p.copy_(b)
    return found


def doubled(chunk: Chunk) -> Chunk:
    """The same chunk on float64 latents and text; the reference is scored anew."""
    assert isinstance(chunk.logp, partial)
    latents, cond, steps = chunk.logp.args
    return replace(chunk, logp=partial(chunk.logp.func, latents.double(), cond, steps), ref=None)


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


# ---- who wins -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "pairs"),
    [
        ([[1.0], [3.0], [2.0]], {(1, 0), (1, 2), (2, 0)}),
        ([[1.0], [1.0], [0.0]], {(0, 2), (1, 2)}),
        ([[1.0], [1.0]], set()),
        ([[1.0, 0.0], [0.0, 1.0]], set()),  # the judges disagree
        ([[1.0, 1.0], [0.0, 1.0]], {(0, 1)}),  # one is indifferent
    ],
)
def test_strict_pairs_of_small_groups(
    scores: list[list[float]], pairs: set[tuple[int, int]]
) -> None:
    assert set(strict_pairs(np.array(scores))) == pairs


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=6))
def test_pareto_dominance_is_a_strict_order(points: list[tuple[int, int]]) -> None:
    pairs = strict_pairs(np.array(points, dtype=float))
    expected = [
        (i, j)
        for i, j in itertools.product(range(len(points)), repeat=2)
        if points[i] != points[j] and points[i][0] >= points[j][0] and points[i][1] >= points[j][1]
    ]
    assert sorted(pairs) == sorted(expected)


def test_several_rewards_are_columns() -> None:
    names = ("jpeg_compressibility", "jpeg_incompressibility")
    judge = RewardJudge([load_reward(name) for name in names])
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = judge(images, ["x"] * 3, [Place(0, 0)])
    assert scores.shape == (3, 2)
    assert np.allclose(scores[:, 0], -scores[:, 1])
    assert strict_pairs(scores) == []  # they contradict each other


# ---- labels from people -------------------------------------------------------------------------


def test_labels_are_averaged_over_annotators(tmp_path: Path) -> None:
    lines = [
        {"round": 0, "group": 1, "scores": [0, 1]},
        {"round": 0, "group": 0, "scores": [1, 0]},
        {"round": 0, "group": 1, "scores": [2, 0]},
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    judge = FileJudge(path, tmp_path / "samples", 2)
    scores = judge(torch.zeros(4, 3, 8, 8), ["x"] * 4, [Place(0, 0), Place(0, 1)])
    assert scores.tolist() == [[1.0], [0.0], [1.0], [0.5]]


def test_missing_labels_stop_after_the_pictures_are_there(tmp_path: Path) -> None:
    judge = FileJudge(tmp_path / "labels.jsonl", tmp_path / "samples", 2)
    with pytest.raises(
        InputError, match=r"2 groups of round 7 have no labels in .*run the same comm"
    ):
        judge(torch.zeros(4, 3, 8, 8), ["a", "a", "b", "b"], [Place(7, 0), Place(7, 1)])
    folder = tmp_path / "samples" / "round-000007"
    assert sorted(p.name for p in folder.glob("*.png")) == [
        f"group-000{g}-image-{k}.png" for g in (0, 1) for k in (0, 1)
    ]
    assert json.loads((folder / "group-0001.json").read_text())["prompt"] == "b"


@pytest.mark.parametrize(
    "line",
    ["no json", "[]", '{"round": 0, "group": 0}', '{"round": 0, "group": 0, "scores": "ab"}'],
)
def test_a_line_that_is_no_label_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"round": 0, "group": 0, "scores": [1, 2]}\n' + line + "\n")
    with pytest.raises(InputError, match=r"labels\.jsonl, line 2: expected"):
        FileJudge(path, tmp_path, 2)


def test_labels_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read labels from"):
        FileJudge(tmp_path, tmp_path, 2)


@pytest.mark.parametrize("scores", ["[1]", "[1, 2, 3]", "[NaN, 1]"])
def test_scores_must_be_one_an_image_and_finite(tmp_path: Path, scores: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(f'{{"round": 0, "group": 0, "scores": {scores}}}\n')
    with pytest.raises(InputError, match="line 1: expected 2 finite scores"):
        FileJudge(path, tmp_path, 2)


# ---- judging while sampling ---------------------------------------------------------------------


@dataclass
class Watched:
    """JPEG size, noting what it is asked, by whom, and after how many forwards of the network."""

    name: str = "watched"
    differentiable: bool = False
    asked: list[tuple[int, str, list[str]]] = field(default_factory=list)
    fails_at: int | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.fails_at == len(self.asked):
            raise InputError("the endpoint is gone")
        self.asked.append((len(images), threading.current_thread().name, list(prompts)))
        return load_reward("jpeg_incompressibility")(images, prompts)


def test_judging_while_sampling_changes_when_and_nothing_else(start: Start) -> None:
    rewards = Watched(), Watched()
    found = []
    for reward, at_once in zip(rewards, (False, True), strict=True):
        judge = RewardJudge([reward])
        _, source = start(judge=judge, judge_while_sampling=at_once)
        round_ = source.round(1)
        (update,) = round_.updates
        found.append((round_.metrics, [(c.win, c.lose, c.ref) for c in update.chunks]))
    assert found[0][0] == found[1][0]
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert found[0][0]["pairs"] > 0
    sizes = [[size for size, _, _ in reward.asked] for reward in rewards]
    assert sizes == [[4, 4, 4], [4, 4, 4]]  # sampler.batch, either way
    assert [texts for *_, texts in rewards[0].asked] == [texts for *_, texts in rewards[1].asked]
    assert {name for _, name, _ in rewards[0].asked} == {threading.current_thread().name}
    assert {name.split("_")[0] for _, name, _ in rewards[1].asked} == {"judge"}


def test_pictures_are_judged_before_the_last_ones_are_drawn(start: Start) -> None:
    """Each part but the last waits at the judge until the next one is under way."""
    drawing, reward = threading.Semaphore(0), Watched()

    def patient(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(reward.asked) < 2:
            assert drawing.acquire(timeout=60), "nothing is drawn while pictures are judged"
        return reward(images, prompts)

    patient.name = "patient"  # type: ignore[attr-defined]
    patient.differentiable = False  # type: ignore[attr-defined]
    _, source = start(judge=RewardJudge([cast(Reward, patient)]), judge_while_sampling=True)
    steps = itertools.count()
    source.policy.bare.register_forward_pre_hook(
        lambda *_: drawing.release() if next(steps) in (3, 6) else None  # 3 steps a part
    )
    assert source.round(0).metrics["images"] == 12


@pytest.mark.parametrize("at_once", [False, True])
def test_what_a_judge_raises_is_raised_by_the_round(start: Start, at_once: bool) -> None:
    judge = RewardJudge([Watched(fails_at=1)])
    _, source = start(judge=judge, judge_while_sampling=at_once)
    before = threading.active_count()
    with pytest.raises(InputError, match=r"^the endpoint is gone$"):
        source.round(0)
    assert threading.active_count() == before


# ---- which steps --------------------------------------------------------------------------------


def grid_of(*sigma: float) -> TimeGrid:
    ones = torch.ones(len(sigma), dtype=torch.float64)
    return TimeGrid(torch.arange(len(sigma)).flip(0), ones, ones, torch.tensor(sigma).double())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"skip_last": True}, [0, 1, 2]),
        ({"steps": "early", "step_count": 2}, [0, 1]),
        ({"steps": "late", "step_count": 2}, [2, 3]),
        ({"steps": "late", "step_count": 2, "skip_last": True}, [1, 2]),
        ({"steps": "window", "step_count": 2, "window_start": 1}, [1, 2]),
        ({"steps": "window", "step_count": 4}, [0, 1, 2, 3]),
    ],
)
def test_steps(settings: dict[str, Any], expected: list[int]) -> None:
    assert trained_steps(OnlineConfig(**settings), grid_of(0.4, 0.3, 0.2, 0.1)) == expected


def test_a_last_step_without_noise_is_left_out_once() -> None:
    assert trained_steps(OnlineConfig(), grid_of(0.2, 0.1, 0.0)) == [0, 1]
    assert trained_steps(OnlineConfig(skip_last=True), grid_of(0.2, 0.1, 0.0)) == [0, 1]


def test_random_steps_change_with_the_place_and_are_even() -> None:
    config = OnlineConfig(steps="random", step_count=2)
    grid = grid_of(0.4, 0.3, 0.2, 0.1)
    drawn = [trained_steps(config, grid, 0, index) for index in range(600)]
    assert drawn == [trained_steps(config, grid, 0, index) for index in range(600)]
    assert all(steps == sorted(set(steps)) and len(steps) == 2 for steps in drawn)
    counts = np.bincount([step for steps in drawn for step in steps], minlength=4)
    assert np.abs(counts / 600 - 0.5).max() < 0.08  # 4 standard deviations


def test_a_window_moves_over_all_its_places_evenly() -> None:
    config = OnlineConfig(steps="window", step_count=2)
    grid = grid_of(0.4, 0.3, 0.2, 0.1)
    drawn = [tuple(trained_steps(config, grid, 0, index)) for index in range(600)]
    assert set(drawn) == {(0, 1), (1, 2), (2, 3)}
    shares = [drawn.count(window) / 600 for window in set(drawn)]
    assert max(abs(share - 1 / 3) for share in shares) < 0.08  # 4 standard deviations


def test_a_path_without_noise_cannot_be_trained_on() -> None:
    with pytest.raises(InputError, match=r"0 of the 2 sampler steps have noise .*sampler\.eta > 0"):
        trained_steps(OnlineConfig(), grid_of(0.0, 0.0))
    with pytest.raises(InputError, match="wants 3 steps, but 2 of the 2"):
        trained_steps(OnlineConfig(steps="late", step_count=3), grid_of(0.2, 0.1))
    window = OnlineConfig(steps="window", step_count=2, window_start=1)
    with pytest.raises(InputError, match="wants 2 steps from step 1 on, but 2 of the 2"):
        trained_steps(window, grid_of(0.2, 0.1))


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": "late"},
        {"step_count": 2},
        {"judges": ()},
        {"images": 1},
        {"steps": "middle"},
        {"steps": "early", "step_count": 2, "window_start": 1},
        {"labels": "labels.jsonl", "judge_while_sampling": True},
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="OnlineConfig"):
        OnlineConfig(**settings)


def test_a_round_is_a_whole_number_of_updates() -> None:
    config, optim = OnlineConfig(groups=12), OptimConfig(micro_batch=2, accumulation=3)
    assert groups_per_update(config, optim, 2) == 12
    with pytest.raises(InputError, match=r"online\.groups=12 must be a multiple .* = 24"):
        groups_per_update(config, optim, 4)


# ---- rollouts and updates -----------------------------------------------------------------------


def rolled_out(source: OnlineSource, index: int) -> tuple[Tensor, Tensor]:
    """Paths (4, 3, T+1, ...) and conditioning of a round, drawn again by the seeds' contract."""
    chosen = shuffled(5, len(PROMPTS), index * 4, index * 4 + 4)
    orders = [
        Order(
            PROMPTS[chosen[group]],
            derive_seed(5, "start", index, group),
            derive_seed(5, "path", index, group, image),
        )
        for group in range(4)
        for image in range(3)
    ]
    parts = list(generate(source.family, source.policy.bare, SAMPLER, orders))
    latents = torch.cat([part.trajectory.latents for part in parts])
    return latents.unflatten(0, (4, 3)), Conditioning.cat([part.cond for part in parts])


def test_a_group_starts_from_one_noise_and_its_images_part(start: Start) -> None:
    _, source = start()
    latents, _ = rolled_out(source, 0)
    assert all(torch.equal(latents[:, 0, 0], latents[:, k, 0]) for k in (1, 2))
    assert not torch.equal(latents[:, 0, 1], latents[:, 1, 1])
    assert not torch.equal(latents[0, 0, 0], latents[1, 0, 0])


def loss_pair_by_pair(learner: Learner, source: OnlineSource) -> Tensor:
    """D3PO as published: both networks run for each pair anew; the loss of all pairs and steps.

    Written from eq. 14 and the densities, without likelihood, objectives or shared scores.
    """
    latents, cond = rolled_out(source, 0)
    grid, family = source.grid, source.family
    uncond = family.encode_text([""])

    def logp(image: Tensor, text: Conditioning, i: int) -> Tensor:
        predict = guided(family, learner.policy.bare, text, uncond, SAMPLER.guidance)
        x_t, x_s, t = image[i][None].double(), image[i + 1][None].double(), grid.times[i][None]
        abar_t = float(family.schedule.alphas_cumprod[t])
        abar_s, sigma = float(grid.to_x0[i]) ** 2, float(grid.sigma[i])
        eps = predict(x_t, t)
        x0 = (x_t - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
        mean = math.sqrt(abar_s) * x0 + math.sqrt(1 - abar_s - sigma**2) * eps
        return -((x_s - mean) ** 2).mean() / (2 * sigma**2)

    def ratio(group: int, image: int, i: int) -> Tensor:
        with learner.policy.reference():
            ref = logp(latents[group, image], cond[[3 * group + image]], i)
        return logp(latents[group, image], cond[[3 * group + image]], i) - ref

    terms = [
        torch.log1p(torch.exp(-50.0 * (ratio(group, win, i) - ratio(group, lose, i))))
        for group, pairs in enumerate(PAIRS)
        for win, lose in pairs
        for i in range(len(grid))
    ]
    return torch.stack(terms).mean()


def test_an_update_has_the_gradient_of_the_loss_pair_by_pair(start: Start, run: Run) -> None:
    learner, source = start()
    learner.policy.bare.double()
    loss = loss_pair_by_pair(learner, source)
    expected = torch.autograd.grad(loss, learner.policy.trainable())
    (found,) = gradients(learner, source, run)
    assert apart(found, torch.cat([gradient.flatten() for gradient in expected])) < 1e-6
    result = train_step(learner, next(source.round(0).updates), run, 0)
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)  # as it is, in float32


def test_the_size_of_the_chunks_does_not_change_the_gradient(start: Start, run: Run) -> None:
    sizes = [(4, 1), (2, 2), (1, 4)]
    whole, *others = [
        gradients(*start(micro_batch=micro, accumulation=more), run)[0] for micro, more in sizes
    ]
    assert max(apart(other, whole) for other in others) < 1e-6


def test_steps_that_go_through_together_have_the_same_gradient(start: Start, run: Run) -> None:
    alone, *others = [start(steps_at_once=count) for count in (1, 2, 3)]
    (expected,) = gradients(*alone, run)
    for (learner, source), calls in zip(others, (2, 1), strict=True):
        rows = Rows(learner)
        (found,) = gradients(learner, source, run)
        assert apart(found, expected) < 1e-6
        # 3 steps in so many calls; the reference is scored in float32 and again in float64
        assert (rows.trained, rows.trained_calls) == (2 * 9 * 3, calls)
        assert (rows.referred, rows.referred_calls) == (2 * 2 * 9 * 3, 2 * calls)


def test_updates_of_a_round_add_up_to_the_round(start: Start, run: Run) -> None:
    (whole,) = gradients(*start(micro_batch=4), run)
    first, second = gradients(*start(micro_batch=2), run)
    # 5 pairs in groups 0 and 1, 3 in groups 2 and 3
    assert apart((5 * first + 3 * second) / 8, whole) < 1e-6


class Rows:
    """How many latents went through the network, with gradient, without, and as the reference."""

    def __init__(self, learner: Learner) -> None:
        self.trained = self.sampled = self.referred = 0
        self.trained_calls = self.referred_calls = 0
        layer = next(m for m in learner.policy.bare.modules() if isinstance(m, BaseTunerLayer))

        def count(module: Any, args: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                self.trained += len(args[0])
                self.trained_calls += 1
            elif layer.disable_adapters:
                self.referred += len(args[0])
                self.referred_calls += 1
            else:
                self.sampled += len(args[0])

        learner.policy.bare.register_forward_pre_hook(count)


def test_each_image_and_step_is_scored_once_for_all_its_pairs(start: Start, run: Run) -> None:
    learner, source = start(train_guidance=1.0, inner_epochs=2, learning_rate=1e-3)
    rows = Rows(learner)
    found = source.round(0)
    for update in found.updates:
        train_step(learner, update, run, 0)
    # 12 images x 3 steps, doubled by guidance; the 3 of the tied group are never trained on; the
    # reference is not asked again in the second epoch
    assert (rows.sampled, rows.referred, rows.trained) == (12 * 3 * 2, 9 * 3, 9 * 3 * 2)
    assert found.metrics["pairs"] == 8
    assert found.metrics["tied"] == 0.25
    assert found.metrics["unused_images"] == 3


def test_guidance_in_training_doubles_the_rows(start: Start, run: Run) -> None:
    learner, source = start()
    rows = Rows(learner)
    train_step(learner, next(source.round(0).updates), run, 0)
    assert (rows.referred, rows.trained) == (2 * 9 * 3, 2 * 9 * 3)


def test_images_in_no_pair_are_left_out(start: Start, run: Run) -> None:
    def two_judges(images: Tensor, prompts: Sequence[str], places: Sequence[Place]) -> Scores:
        group = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]  # images 0 and 2 contradict each other
        return np.array(group * 3 + [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])

    learner, source = start(two_judges, train_guidance=1.0)
    source.judge_names = ["first", "second"]
    rows = Rows(learner)
    found = source.round(0)
    train_step(learner, next(found.updates), run, 0)
    assert rows.trained == 12 * 3
    assert found.metrics["reward"] == {"first": 4 / 12, "second": 3 / 12}

    def one_pair(images: Tensor, prompts: Sequence[str], places: Sequence[Place]) -> Scores:
        return np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]] * 4)

    source.judge = one_pair
    rows.trained = 0
    found = source.round(1)
    train_step(learner, next(found.updates), run, 0)
    assert rows.trained == 8 * 3
    assert (found.metrics["unused_images"], found.metrics["pairs"]) == (4, 4)


def test_only_the_chosen_steps_are_scored(start: Start, run: Run) -> None:
    learner, source = start(
        steps="random", step_count=1, inner_epochs=3, train_guidance=1.0, learning_rate=1e-3
    )
    rows = Rows(learner)
    for update in source.round(0).updates:
        train_step(learner, update, run, 0)
    chosen = {
        step
        for epoch in range(3)
        for step in trained_steps(source.config, source.grid, 5, 0, 0, epoch)
    }
    assert (rows.referred, rows.trained) == (9 * len(chosen), 9 * 3)


def test_a_round_of_ties_makes_updates_without_pairs(start: Start, run: Run) -> None:
    learner, source = start(lambda images, prompts, places: np.zeros((len(images), 1)))
    rows = Rows(learner)
    found = source.round(0)
    results = [train_step(learner, update, run, 0) for update in found.updates]
    assert [result["pairs"] for result in results] == [0.0]
    assert found.metrics["tied"] == 1.0
    assert (rows.referred, rows.trained) == (0, 0)


def test_learning_on_a_rollout_prefers_its_winners(start: Start, run: Run) -> None:
    learner, source = start(inner_epochs=6, learning_rate=0.3, train_guidance=None)
    results = [train_step(learner, update, run, 0) for update in source.round(0).updates]
    assert results[-1]["loss"] < results[0]["loss"] - 0.02
    assert results[-1]["margin"] > results[0]["margin"] + 0.02
    assert results[-1]["accuracy"] > results[0]["accuracy"]


def test_an_untrained_policy_has_the_loss_of_a_coin(tiny_sd: Path, start: Start, run: Run) -> None:
    learner, source = start()
    with torch.no_grad():
        for name, p in learner.policy.bare.named_parameters():
            if "lora_B" in name:
                p.zero_()
    result = train_step(learner, next(source.round(0).updates), run, 0)
    assert result["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (result["margin"], result["accuracy"]) == (0.0, 0.5)
    assert result["grad_norm"] > 0


def test_rounds_differ_and_can_be_had_in_any_order(start: Start, run: Run) -> None:
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def keep(images: Tensor, prompts: Sequence[str], places: Sequence[Place]) -> Scores:
        seen[places[0].round].append(images.clone())
        return judge_by_table(images, prompts, places)

    _, source = start(keep)
    for index in (1, 0, 1):
        source.round(index)
    assert torch.equal(*seen[1])
    assert not torch.equal(seen[0][0], seen[1][0])
