"""Objectives beyond pairs and a reference, from a rollout to the gradient and to a finished run."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_files import write_pairs
from safetensors.torch import load_file
from torch import Tensor
from train_runs import environment, train_and_kill

from d3po import recipe
from d3po.families import guided, load_family
from d3po.families.conditioning import Conditioning
from d3po.generate import Generated, SamplerConfig, generate
from d3po.judging import Hearing, Place, Scores
from d3po.losses import BoundObjective, ObjectiveConfig
from d3po.objectives import OBJECTIVES, POLICY_GRADIENT, REFERENCE_FREE, UNPAIRED
from d3po.offline import OfflineConfig, OfflineSource
from d3po.online import OnlineSource
from d3po.online.blocks import idle_block
from d3po.online.settings import OnlineConfig
from d3po.pair_cache import cached_pairs
from d3po.policy import Policy, PolicyConfig
from d3po.run import Run, RunConfig
from d3po.trainer import Learner, OptimConfig, train_step
from d3po.updates import Chunk, Rated, Update
from fifa.config import InputError

PROMPTS = ["a red circle", "a blue square", "two small green triangles", "a white star", "a circle"]
SAMPLER = SamplerConfig(steps=3, guidance=2.0, batch=4)

# scores of the 4 groups of a round
LABELS = [[2.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 2.0]]
PAIRS = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (10, 9), (11, 9), (11, 10)]  # rows of the round
A, B, C = math.sqrt(1.5), math.sqrt(2), math.sqrt(0.5)  # z-scores of (0, 1, 2) and of (1, 0, 0)
ADVANTAGES = [A, 0, -A, B, -C, -C, 0, 0, 0, -A, 0, A]
LIKED = {0: 1, 2: -1, 3: 1, 4: -1, 5: -1, 9: -1, 11: 1}  # the others say nothing

SETTINGS: dict[str, dict[str, Any]] = {
    "ddpo": {"options": {"clip": 0.002}},
    "dpok": {"beta": 3.0, "options": {"clip": 0.002}},
    "reward_weighted": {"beta": 0.8},
    "kto": {"beta": 60.0, "options": {"undesirable_weight": 2.0}},
    "simpo": {"beta": 40.0, "options": {"gamma": 0.3}},
    "orpo": {"beta": 0.5},
    "mapo": {"beta": 0.5, "options": {"scale": 20.0}},
    "sppo": {"beta": 5.0, "sft": 0.3},
}


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

    def make(name: str, micro_batch: int = 4, **settings: Any) -> tuple[Learner, OnlineSource]:
        optim = OptimConfig(
            learning_rate=1.0, micro_batch=micro_batch, accumulation=4 // micro_batch,
            max_grad_norm=None,
        )  # fmt: skip
        objective = BoundObjective.from_config(ObjectiveConfig(name=name, **SETTINGS[name]))
        policy = Policy(load_family(tiny_sd), PolicyConfig())
        shift(policy, 0, 0.05)
        sgd = torch.optim.SGD(policy.trainable(), lr=1.0)
        policy.denoiser, wrapped = run.accelerator.prepare(policy.bare, sgd)
        config = OnlineConfig(groups=4, images=3, **settings)
        source = OnlineSource(
            config, SAMPLER, optim, policy.family, policy, judge_by_table, ["judge"], PROMPTS, run,
            wants=objective.wants,
        )  # fmt: skip
        return Learner(policy, wrapped, objective, optim), source

    return make


@torch.no_grad()
def shift(policy: Policy, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in policy.trainable():
        p.add_(size * torch.randn(p.shape, generator=generator).to(p))


def doubled(chunk: Chunk | Rated) -> Chunk | Rated:
    """The same chunk on float64 latents and text; the reference is scored anew."""

    def again(score: Any) -> Any:
        latents, cond, steps = score.args
        return partial(score.func, latents.double(), cond.to(torch.float64), steps)

    if isinstance(chunk, Chunk):
        return replace(chunk, logp=again(chunk.logp), ref=None)
    assert chunk.old is not None
    path = None if chunk.path is None else again(chunk.path)
    old, value = chunk.old.double(), chunk.value.double()
    return replace(chunk, logp=again(chunk.logp), path=path, ref=None, old=old, value=value)


def step(learner: Learner, update: Update, run: Run) -> tuple[Tensor, dict[str, float]]:
    """The gradient of one update in float64, and what it reports; the weights are put back."""
    policy = learner.policy
    before = [p.detach().clone() for p in policy.trainable()]
    chunks = [doubled(chunk) for chunk in update.chunks]
    metrics = train_step(learner, replace(update, chunks=chunks), run, 0)
    found = [(b - p.detach()).flatten() for b, p in zip(before, policy.trainable(), strict=True)]
    with torch.no_grad():
        for p, b in zip(policy.trainable(), before, strict=True):
            p.copy_(b)
    return torch.cat(found), metrics


class Written:
    """All that the equations name, from the densities, in float64: (12 images, 3 steps) each."""

    def __init__(self, learner: Learner, source: OnlineSource, latents: Tensor, cond: Conditioning):
        self.learner, self.source = learner, source
        self.latents, self.cond = latents.double(), cond.to(torch.float64)

    def score(self) -> tuple[Tensor, Tensor]:
        """(mean of the squared z of every element, the steps' means over sigma)."""
        family, grid = self.source.family, self.source.grid
        uncond = family.encode_text([""])
        predict = guided(family, self.learner.policy.bare, self.cond, uncond, SAMPLER.guidance)
        squares, means = [], []
        for i in range(len(grid)):
            x_t, x_s = self.latents[:, i], self.latents[:, i + 1]
            abar_t = float(family.schedule.alpha_sigma(grid.times[i : i + 1])[0]) ** 2
            abar_s, sigma = float(grid.to_x0[i]) ** 2, float(grid.sigma[i])
            eps = predict(x_t, grid.times[i].expand(len(x_t)))
            x0 = (x_t - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
            mean = math.sqrt(abar_s) * x0 + math.sqrt(1 - abar_s - sigma**2) * eps
            squares.append(((x_s - mean) ** 2).flatten(1).mean(1) / sigma**2)
            means.append(mean.flatten(1) / sigma)
        return torch.stack(squares, 1), torch.stack(means, 1)


def loss_as_written(name: str, old: Tensor, written: Written) -> Tensor:
    """The mean over images (pairs) and steps, each objective from its paper's equation."""
    with written.learner.policy.reference():
        ref_squares, ref_means = written.score()
    squares, means = written.score()
    # log-densities, their constants left out: they cancel, or are to be left out
    logp, ref = -squares / 2, -ref_squares / 2
    advantage = torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None]
    ratio = torch.exp(logp - old)
    win, lose = (torch.tensor(rows) for rows in zip(*PAIRS, strict=True))
    rows, liked = torch.tensor(list(LIKED)), torch.tensor(list(LIKED.values()))[:, None]
    if name in ("ddpo", "dpok"):
        bounded = ratio.clamp(1 - 0.002, 1 + 0.002)
        loss = -torch.minimum(advantage * ratio, advantage * bounded)
        kl = ((means - ref_means) ** 2).mean(2) / 2
        return (loss + (3.0 * kl if name == "dpok" else 0)).mean()
    if name == "reward_weighted":
        constant = -written.source.grid.sigma.log() - 0.5 * math.log(2 * math.pi)
        return (-torch.exp(advantage / 0.8) * (logp + constant)).mean()
    if name == "kto":
        gain = (logp - ref)[rows]
        baseline = gain.detach().mean().clamp(min=0)
        value = 1 / (1 + torch.exp(-60.0 * liked * (gain - baseline)))
        return (torch.where(liked > 0, 1.0, 2.0) * (1 - value)).mean()
    w, v = logp[win], logp[lose]
    if name == "simpo":
        return torch.log1p(torch.exp(-(40.0 * (w - v) - 0.3))).mean()
    if name == "orpo":
        odds = (w.exp() / (1 - w.exp())) / (v.exp() / (1 - v.exp()))
        return (-w + 0.5 * torch.log(1 + 1 / odds)).mean()
    if name == "mapo":
        mse_w, mse_l = squares[win], squares[lose]
        phi_w, phi_l = (0.5 * x / (torch.exp(0.5 * x) - 1) for x in (mse_w, mse_l))
        return (mse_w + 0.5 * torch.log1p(torch.exp(-20.0 * (phi_w - phi_l)))).mean()
    assert name == "sppo"
    gains = (logp - ref)[win] - 0.1, (logp - ref)[lose] + 0.1
    constant = -written.source.grid.sigma.log() - 0.5 * math.log(2 * math.pi)
    return (gains[0] ** 2 + gains[1] ** 2 - 0.3 * (w + constant)).mean()


@pytest.mark.parametrize("name", SETTINGS)
def test_an_update_has_the_gradient_of_the_loss_as_written(
    start: Start, run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, source = start(name)
    paths: list[Any] = []
    monkeypatch.setattr(
        source, "_sample", lambda i, hearing: paths.append(roll(i, hearing)) or paths[-1]
    )
    roll = type(source)._sample.__get__(source)
    found = source.round(0)
    written = Written(learner, source, paths[0].latents, paths[0].cond)
    learner.policy.bare.double()
    with torch.no_grad():
        old = -written.score()[0] / 2
    shift(learner.policy, 1, 0.02)  # so that the policy is not the one that drew the images
    loss = loss_as_written(name, old, written)
    parts = torch.autograd.grad(loss, learner.policy.trainable())
    expected = torch.cat([part.flatten() for part in parts])
    gradient, metrics = step(learner, next(found.updates), run)
    # the rollout's own log-probabilities were summed in float32
    close = 1e-4 if name in ("ddpo", "dpok") else 1e-6
    assert float((gradient - expected).abs().max() / expected.abs().max()) < close
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=2e-7)
    terms = {"kto": len(LIKED), "ddpo": 12, "dpok": 12, "reward_weighted": 12}.get(name, len(PAIRS))
    assert metrics["pairs" if terms == len(PAIRS) else "images"] == terms
    if name in ("ddpo", "dpok"):
        assert 0.2 < metrics["clipped"] < 0.95
        assert found.metrics["advantage_std"] == pytest.approx(np.std(ADVANTAGES))
    if name == "dpok":
        assert metrics["kl"] > 1e-5  # D3PO's own code has 0 here, whatever the weights
    if name == "kto":
        assert metrics["baseline"] > 0
        assert 0 < metrics["accuracy"] < 1


@pytest.mark.parametrize("name", ["kto", "dpok", "mapo"])
def test_the_size_of_the_chunks_does_not_change_the_gradient(
    start: Start, run: Run, name: str
) -> None:
    found = []
    for micro in (4, 1):
        learner, source = start(name, micro)
        learner.policy.bare.double()
        updates = source.round(0).updates
        found.append(step(learner, next(updates), run)[0])
    assert float((found[0] - found[1]).abs().max() / found[0].abs().max()) < 1e-6


def test_the_first_update_is_that_of_the_policy_that_drew(start: Start, run: Run) -> None:
    learner, source = start("ddpo")
    metrics = train_step(learner, next(source.round(0).updates), run, 0)
    # -mean(A) with a ratio of 1, and no distance yet
    assert metrics["loss"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["old_ratio"] == pytest.approx(0.0, abs=1e-6)
    assert (metrics["clipped"], metrics["approx_kl"]) == (0.0, pytest.approx(0.0, abs=1e-9))
    assert metrics["grad_norm"] > 0


def test_a_round_where_nobody_is_liked_has_no_update(start: Start, run: Run) -> None:
    learner, source = start("kto")
    source.judge = lambda images, prompts, places: np.ones((len(images), 1))
    result = train_step(learner, next(source.round(0).updates), run, 0)
    assert result == {"images": 0.0, "skipped": 0.0}


@pytest.mark.parametrize(("name", "times"), [("kto", 1), ("sppo", 1), ("dpok", 2), ("ddpo", 0)])
def test_the_reference_comes_once_an_update_however_small_the_chunks(
    start: Start, run: Run, monkeypatch: pytest.MonkeyPatch, name: str, times: int
) -> None:
    learner, source = start(name, micro_batch=1, inner_epochs=2)
    came, reference = [], learner.policy.reference
    monkeypatch.setattr(learner.policy, "reference", lambda: came.append(1) or reference())
    chunks = 0
    for update in source.round(0).updates:
        chunks += len(update.chunks)
        train_step(learner, update, run, 0)
    assert chunks > 2 * times  # DPOK's KL wants its means again in the second epoch
    assert len(came) == times


@pytest.mark.parametrize("name", ["kto", "ddpo", "dpok", "reward_weighted", "sppo"])
def test_an_idle_process_walks_without_a_term(start: Start, run: Run, name: str) -> None:
    learner, source = start(name)
    block = idle_block(source._sample(0, Hearing(source.judge, False)))
    block.ref.zero_()
    chunk, asked = source._chunk(block, [0]), learner.objective.takes
    assert chunk.terms == 0
    with learner.policy.reference():
        chunk = chunk.with_reference(learner.policy.bare, asked)
    facts = chunk.facts(learner.policy.denoiser, asked)
    facts["baseline"] = torch.tensor(0.0)
    loss = learner.objective.loss(facts)
    assert loss.shape == (0, 1)
    assert all(value.numel() == 0 for value in learner.objective.watch(facts).values())
    loss.sum().backward()
    gradients = [p.grad for p in learner.policy.trainable()]
    assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize("name", ["ddpo", "dpok", "reward_weighted", "kto"])
def test_a_picture_that_is_nan_costs_itself_alone(
    start: Start, run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def broken(*given: Any) -> Iterator[Generated]:
        for i, part in enumerate(generate(*given)):
            if i == 0:
                part.trajectory.latents[1] = torch.nan
            yield part

    monkeypatch.setattr("d3po.online.generate", broken)
    learner, source = start(name)
    found = source.round(0)
    (update,) = found.updates
    for chunk in update.chunks:
        assert isinstance(chunk, Rated)
        assert len(chunk.value) == (7 if name == "kto" else 11)
        assert int((chunk.value.abs() > 1e-6).sum()) == 7  # two are left, three, a tie, two
    result = train_step(learner, update, run, 0)
    assert result["skipped"] == 0
    assert math.isfinite(result["loss"])
    assert found.metrics["not_finite"] == pytest.approx(1 / 12)


def test_advantages_over_the_round(start: Start, run: Run) -> None:
    _, source = start("ddpo", advantage="round")
    update = next(source.round(0).updates)
    (chunk, *_) = update.chunks
    assert isinstance(chunk, Rated)
    scores = np.array(LABELS).reshape(-1)
    expected = (scores - scores.mean()) / scores.std()
    assert chunk.value.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


# ---- stored pairs -------------------------------------------------------------------------------


def offline(tiny_sd: Path, tmp_path: Path, run: Run, name: str) -> tuple[Learner, OfflineSource]:
    data = write_pairs(tmp_path / "pairs.parquet", 8)
    config = OfflineConfig(data=str(data), cache=str(tmp_path / "cache"))
    optim = OptimConfig(micro_batch=2, accumulation=2, learning_rate=1.0, max_grad_norm=None)
    objective = BoundObjective.from_config(ObjectiveConfig(name=name, beta=500.0))
    policy = Policy(load_family(tiny_sd), PolicyConfig())
    shift(policy, 0, 0.05)
    sgd = torch.optim.SGD(policy.trainable(), lr=1.0)
    policy.denoiser, wrapped = run.accelerator.prepare(policy.bare, sgd)
    cache = cached_pairs(config, policy.family, run)
    source = OfflineSource(config, optim, policy.family, policy, cache, run, wants=objective.wants)
    return Learner(policy, wrapped, objective, optim), source


def test_stored_pairs_are_liked_and_disliked_images(
    tiny_sd: Path, tmp_path: Path, run: Run
) -> None:
    learner, source = offline(tiny_sd, tmp_path, run, "kto")
    update = next(source.round(0).updates)
    policy = learner.policy
    gains, liked = [], []
    with torch.no_grad():
        for chunk in update.chunks:
            assert isinstance(chunk, Rated)
            with policy.reference():
                ref = chunk.logp(policy.bare)
            gains.append((chunk.logp(policy.bare) - ref)[:, 0].double())
            liked += [1.0, 1.0, -1.0, -1.0]
    gain, sign = torch.cat(gains), torch.tensor(liked)
    baseline = max(0.0, float(gain.mean()))
    expected = 1 - torch.sigmoid(500 * sign * (gain - baseline))
    metrics = train_step(learner, update, run, 0)
    assert metrics["images"] == 8
    assert metrics["baseline"] == pytest.approx(baseline, rel=1e-4, abs=1e-9)
    assert metrics["loss"] == pytest.approx(float(expected.mean()), rel=1e-4)


def test_no_reference_is_asked_for_where_none_is_needed(
    tiny_sd: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, source = offline(tiny_sd, tmp_path, run, "mapo")
    asked: list[int] = []
    original = learner.policy.reference
    monkeypatch.setattr(learner.policy, "reference", lambda: asked.append(1) or original())
    metrics = train_step(learner, next(source.round(0).updates), run, 0)
    assert asked == []
    assert set(metrics) >= {"accuracy", "margin", "win_logp", "lose_logp"}
    assert "win_ratio" not in metrics


# ---- what does not go together ------------------------------------------------------------------


def test_rewards_need_rollouts(tiny_sd: Path, tmp_path: Path, run: Run) -> None:
    with pytest.raises(InputError, match="stored pairs have neither: use method d3po"):
        offline(tiny_sd, tmp_path, run, "dpok")


def test_old_log_probabilities_need_the_guidance_of_the_rollout(start: Start) -> None:
    with pytest.raises(InputError, match=r"drawn at sampler\.guidance 2\.0: leave train_guidance"):
        start("ddpo", train_guidance=1.0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "ddpo", "beta": 1.0}, "objective.beta: ddpo takes none"),
        ({"name": "dpo"}, "objective.beta is missing: dpo needs it"),
        ({"name": "ddpo", "sft": 0.1}, "objective.sft: ddpo has no winner to learn from"),
        ({"name": "ddpo", "options": {"clip": 0.0}}, "it must lie between 0.0 and 1.0"),
        ({"name": "kto", "beta": 1.0, "options": {"baseline": 1.0}}, "allowed: desirable_weight, "),
        ({"name": "kot", "beta": 1.0}, "unknown objective 'kot'; did you mean 'kto'?"),
        ({"name": "math:hypot", "beta": 1.0}, "objective.name: math:hypot is no function of ours"),
        ({"name": "math:pi", "beta": 1.0}, "objective.name: math:pi is no function of ours"),
        (
            {"name": "json:loads", "beta": 1.0},
            "objective.name: json:loads takes (s, kw); an objective",
        ),
    ],
)
def test_a_wrong_objective_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        BoundObjective.from_config(ObjectiveConfig(**settings))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


# ---- whole runs ---------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "weights/pytorch_lora_weights.safetensors"
BETAS = {"ddpo": "", "reward_weighted": ", beta: 1", "orpo": ", beta: 0.1", "mapo": ", beta: 0.1"}
ONLINE = [*OBJECTIVES, *REFERENCE_FREE, *UNPAIRED, *POLICY_GRADIENT]
OFFLINE = [*OBJECTIVES, *REFERENCE_FREE, *UNPAIRED]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs, prompts, and whatever is encoded from them."""
    folder = tmp_path_factory.mktemp("stored")
    write_pairs(folder / "pairs.parquet", 8)
    (folder / "train.txt").write_text("a red circle\na blue square\ntwo stars\na purple star\n")
    return folder


@pytest.fixture
def settings(tiny_sd: Path, stored: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of a small run of an objective in tmp_path/<folder>, further ones last."""
    online = [
        f"online={{prompts: {stored / 'train.txt'}, groups: 2, images: 3, inner_epochs: 2, "
        "judges: [jpeg_incompressibility]}",
        "sampler={steps: 2, guidance: 1.0}",
    ]
    offline = ["method=dpo", f"offline={{data: {stored / 'pairs.parquet'}, cache: {stored}}}"]

    def overrides(folder: str, name: str, source: str, *more: str) -> list[str]:
        return [
            f"model={tiny_sd}",
            f"objective={{name: {name}{BETAS.get(name, ', beta: 20')}}}",
            "optim={max_steps: 4, learning_rate: 1e-2, micro_batch: 1, accumulation: 2}",
            *(online if source == "online" else offline),
            *(["offline.path=inverted"] if source == "inverted" else []),
            f"run={{dir: {tmp_path / folder}, checkpoint_every: 2}}",
            *more,
        ]

    return overrides


def same_runs(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "source"), [(n, "online") for n in ONLINE] + [(n, "offline") for n in OFFLINE]
)
def test_a_resumed_run_is_the_straight_run(
    settings: Callable[..., list[str]], tmp_path: Path, name: str, source: str
) -> None:
    recipe.train(recipe.load(None, settings("straight", name, source)))
    for steps in (2, 4):
        more = f"optim.max_steps={steps}"
        recipe.train(recipe.load(None, settings("in parts", name, source, more)))
    same_runs(tmp_path / "straight", tmp_path / "in parts")
    rows = [json.loads(x) for x in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if row["kind"] == "update"]
    assert len(updates) == 4
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in updates)


@pytest.mark.parametrize(
    ("name", "source"), [("dpok", "online"), ("kto", "offline"), ("dpo", "inverted")]
)
def test_a_killed_run_is_the_straight_run(
    settings: Callable[..., list[str]], tmp_path: Path, name: str, source: str
) -> None:
    more = ("optim.max_steps=12", "run.checkpoint_every=4")
    recipe.train(recipe.load(None, settings("straight", name, source, *more)))
    killed = settings("killed", name, source, *more)
    train_and_kill(killed, tmp_path / "killed", 2, 11)
    recipe.train(recipe.load(None, killed))
    same_runs(tmp_path / "straight", tmp_path / "killed")


def test_two_processes_learn_what_one_learns(
    settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    """DPOK, half the groups each: advantages, KL and weights.

    The scores come from a file: a pixel that is rounded otherwise in another batch would be another
    reward. Tolerances as in test_d3po_recipe.
    """
    rows = [
        {"round": r, "group": g, "scores": [r + 0.5 * g, 1 - g, 3 * r - g]}
        for r in range(2)
        for g in range(2)
    ]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join(map(json.dumps, rows)))
    told = f"online.labels={labels}"
    recipe.train(recipe.load(None, settings("one", "dpok", "online", told)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes=2", f"--main_process_port={port}", str(ROOT / "train.py")]
    ended = subprocess.run(
        [*launch, *settings("two", "dpok", "online", told, "optim.accumulation=1")],
        capture_output=True,
        text=True,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        check=False,
        timeout=600,  # processes that wait for each other wait for ever
    )
    assert ended.returncode == 0, ended.stderr
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    largest = max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key)
    assert largest > 0.01
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-3 * largest
    written = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for ours, theirs in zip(*written, strict=True):
        for key in {"images", "advantage_std", "kl", "loss"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
